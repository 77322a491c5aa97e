"""The accelerate settings that are shipped: accelerate reads them, and knows every setting in them."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import is_deepspeed_available
from accelerate.utils.deepspeed import HfDeepSpeedConfig

from encoder.errors import ConfigError
from tests import ROOT
from training.trainer.distributed import is_deepspeed, open_accelerator

FOLDER = ROOT / "training" / "recipes" / "accelerate"
KINDS = {
    "ddp": "MULTI_GPU",
    "fsdp": "FSDP",
    "deepspeed_zero1": "DEEPSPEED",
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


def test_what_the_launch_asks_for_is_installed_and_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    if not is_deepspeed_available():
        with monkeypatch.context() as asked:
            asked.setenv("ACCELERATE_USE_DEEPSPEED", "true")
            with pytest.raises(ConfigError, match="not installed: DeepSpeed"):
                open_accelerator("fp32")

    def with_stage(zero: int) -> Any:
        kind, plugin = SimpleNamespace(value="DEEPSPEED"), SimpleNamespace(zero_stage=zero)
        return SimpleNamespace(distributed_type=kind, state=SimpleNamespace(deepspeed_plugin=plugin))

    for zero in (2, 3):
        monkeypatch.setattr("accelerate.Accelerator", lambda zero=zero, **_: with_stage(zero))
        with pytest.raises(ConfigError, match=f"ZeRO-{zero} is not supported: use fsdp.yaml"):
            open_accelerator("bf16")
    monkeypatch.setattr("accelerate.Accelerator", lambda **_: with_stage(1))
    assert is_deepspeed(open_accelerator("bf16"))
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    with pytest.raises(ConfigError, match="fp16 does not go with DeepSpeed"):
        open_accelerator("fp16")


def test_deepspeed_settings_leave_the_recipes_numbers_to_the_recipe() -> None:
    values = yaml.safe_load((FOLDER / "deepspeed_zero1.yaml").read_text())["deepspeed_config"]
    path = ROOT / values["deepspeed_config_file"]
    config = HfDeepSpeedConfig(json.loads(path.read_text()))
    assert config.get_value("zero_optimization.stage") == 1
    # As without DeepSpeed: weights in fp32, products in bf16.
    assert config.is_false("bf16.enabled")
    assert config.is_true("torch_autocast.enabled")
    for name in ("gradient_accumulation_steps", "gradient_clipping", "train_micro_batch_size_per_gpu"):
        assert config.get_value(name) == "auto"
