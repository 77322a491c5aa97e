"""Recipes: what is accepted, and one clear sentence for what is not."""

import importlib
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from encoder.errors import ConfigError
from training.chat_stage1 import Stage1Recipe
from training.clip import ClipRecipe
from training.config import OptimConfig, read_recipe
from training.schedule import learning_rate, parameter_groups

RECIPES = Path(__file__).parents[2] / "training" / "recipes"
KINDS = {
    "chat_stage1": "Stage1Recipe",
    "chat_lora": "LoraRecipe",
    "clip": "ClipRecipe",
    "finetune": "FinetuneRecipe",
    "umt": "UmtRecipe",
    "warm_start": "WarmStartRecipe",
}


def command_of(path: Path) -> str:
    """Recipes are named after their command, with what they are for behind it: clip_stage1_small.yaml."""
    return max((name for name in KINDS if f"{path.stem}_".startswith(f"{name}_")), key=len)


@pytest.mark.parametrize(
    "path",
    sorted(path for path in RECIPES.rglob("*.yaml") if path.parent.name != "accelerate"),
    ids=lambda p: str(p.relative_to(RECIPES)),
)
def test_every_recipe_reads_and_starts_with_its_command(path: Path) -> None:
    command = command_of(path)
    kind: Any = getattr(importlib.import_module(f"training.{command}"), KINDS[command])
    recipe = read_recipe(kind, path)
    assert recipe.loop.out.startswith("runs/")
    first = path.read_text().splitlines()[0]
    assert first.startswith("# ")
    assert f"-m training.{command} --config {path.relative_to(RECIPES.parents[1])}" in first


def test_the_papers_stage_one() -> None:
    recipe = read_recipe(Stage1Recipe, RECIPES / "chat_stage1.yaml")
    optim = recipe.optim
    assert (optim.lr, optim.batch_size, optim.epochs, optim.warmup_ratio) == (1e-3, 512, 1, 0.03)
    assert (optim.weight_decay, optim.clip_grad, optim.betas) == (0, 1.0, (0.9, 0.999))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.rate=1", "optim has the unknown setting 'rate': known are lr"),
        ("optim.lr=fast", "optim: lr must be float, not 'fast'"),
        ("optim.lr=-1", "lr must be positive"),
        ("optim.batch_size=10", "multiple of micro_batch"),
        ("optim.warmup_ratio=1.5", "warmup_ratio"),
        ("loop.precision=fp8", "precision must be one of fp32, bf16, fp16, not 'fp8'"),
        ("keeps=[]", "at least one token count"),
        ("keeps=7", "keeps must be a list"),
        ("world=3", "must be a table"),
        ("world.split=dev", "split must be one of"),
        ("siblings=5", "multiple of siblings"),
        ("optim.betas=[0.9]", "must hold 2 values"),
        ("nonsense", "key=value"),
        ("temperature.x=1", "is not a table"),
    ],
)
def test_wrong_settings(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_recipe(ClipRecipe, RECIPES / "cpu" / "clip.yaml", [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, "[1, 2]", "a: [", "", "optim: {lr: 1e-3}"])
def test_wrong_files(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "r.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        read_recipe(ClipRecipe, path)
    assert str(path) in str(caught.value)


def test_scientific_notation_is_a_number(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("{lr: 1e-3, batch_size: 8, micro_batch: 4}")
    assert read_recipe(OptimConfig, path).lr == 1e-3


def test_cosine_with_warm_up() -> None:
    config = OptimConfig(lr=1.0, batch_size=1, micro_batch=1, warmup_ratio=0.1, min_lr=0.01)
    rates = [learning_rate(step, 100, config) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.505)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.01, abs=1e-3)


def test_what_is_never_decayed() -> None:
    from encoder.fluxvit import FluxViT
    from tests.encoder.test_fluxvit import TINY

    model = FluxViT(TINY)
    model.blocks[0].requires_grad_(False)
    decayed, plain = parameter_groups(model, 0.05)
    names = {id(p): n for n, p in model.named_parameters()}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    assert {"pos_embed", "cls_token", "fc_norm.weight"} <= {names[id(p)] for p in plain["params"]}
    # Five-dimensional, so decayed, as in the released training code.
    assert "gpe_proj.depthwise_conv.weight" in {names[id(p)] for p in decayed["params"]}
    assert not any(names[id(p)].startswith("blocks.0.") for p in decayed["params"] + plain["params"])
    assert parameter_groups(nn.Linear(2, 2, bias=False), 0.1)[0]["weight_decay"] == 0.1
