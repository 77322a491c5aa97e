"""The accelerate settings that are shipped: accelerate reads them, and knows every setting in them."""

from __future__ import annotations

import json

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.deepspeed import HfDeepSpeedConfig

from tests import ROOT

FOLDER = ROOT / "training" / "recipes" / "accelerate"
KINDS = {
    "ddp": "MULTI_GPU",
    "fsdp": "FSDP",
    "deepspeed_zero1": "DEEPSPEED",
    "deepspeed_zero3": "DEEPSPEED",
}


def test_every_file_is_looked_at() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == KINDS.keys()


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_reads_it(name: str) -> None:
    path = FOLDER / f"{name}.yaml"
    config = load_config_from_file(str(path))
    assert config.distributed_type == KINDS[name]
    first = path.read_text().splitlines()[0]
    assert first.startswith(f"# accelerate launch --config_file training/recipes/accelerate/{name}.yaml -m ")
    known = {
        option.removeprefix("--")
        for action in launch_command_parser()._actions
        for option in action.option_strings
    }
    values = yaml.safe_load(path.read_text())
    for group in ("fsdp_config", "deepspeed_config"):
        assert set(values.get(group, {})) <= known


def test_fsdp_is_the_second_version() -> None:
    """The loop gathers DTensors, which the first version does not have."""
    values = yaml.safe_load((FOLDER / "fsdp.yaml").read_text())["fsdp_config"]
    assert values["fsdp_version"] == 2
    assert not values["fsdp_cpu_ram_efficient_loading"]


@pytest.mark.parametrize("stage", [1, 3])
def test_deepspeed_settings_leave_the_recipes_numbers_to_the_recipe(stage: int) -> None:
    values = yaml.safe_load((FOLDER / f"deepspeed_zero{stage}.yaml").read_text())["deepspeed_config"]
    path = ROOT / values["deepspeed_config_file"]
    config = HfDeepSpeedConfig(json.loads(path.read_text()))
    assert config.get_value("zero_optimization.stage") == stage
    # As without DeepSpeed: weights in fp32, products in bf16.
    assert config.is_false("bf16.enabled")
    assert config.is_true("torch_autocast.enabled")
    for name in ("gradient_accumulation_steps", "gradient_clipping", "train_micro_batch_size_per_gpu"):
        assert config.get_value(name) == "auto"
