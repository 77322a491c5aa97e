"""Flux-UMT in less memory: the same gradients, and how many bytes a clip takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from encoder.config import SMALL
from encoder.errors import ConfigError
from encoder.fluxvit import FluxViT
from encoder.positions import _resampling
from encoder.tokens import Grid
from tests.peak_memory import peak_bytes
from tests.training.test_umt import STUDENT, batch, data, model, recipe  # noqa: F401 - data is a fixture
from training.data.video_batches import VideoBatch
from training.distill.efficientnet import EfficientNetLiteSource
from training.distill.in_turn import InTurn
from training.distill.teachers import TeacherTargets
from training.trainer.loop import train
from training.trainer.losses import unit
from training.trainer.recipe import LoopConfig, OptimConfig
from training.umt import TeacherSource, UmtModel, UmtRecipe, UmtStage

SAVING: dict[str, dict[str, Any]] = {
    "cheap": {"recompute_cheap": True},
    "in turn": {"passes_in_turn": True},
    "both": {"recompute_cheap": True, "passes_in_turn": True},
    "blocks in turn": {"gradient_checkpointing": True, "passes_in_turn": True},
}


def gradients(
    recipe_: UmtRecipe, dtype: torch.dtype | None
) -> tuple[float, dict[str, Tensor], dict[str, float]]:
    student, _ = model(recipe_)
    student.train()
    clip = batch()
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        loss, figures = student(clip)
    (0.5 * loss).backward()
    found = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    return loss.item(), found, {name: float(value) for name, value in figures.items()}


@pytest.mark.parametrize("how", SAVING)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "autocast"])
@pytest.mark.quick(1)
def test_less_memory_gives_the_same_gradients(
    data: Path,  # noqa: F811
    tmp_path: Path,
    how: str,
    dtype: torch.dtype | None,
) -> None:
    student = {"size": "micro", "settings": {**STUDENT, "drop_path": 0.2}}
    settings: dict[str, Any] = {"encoder": student, "count_alignment": 0.5}
    loss, usual, figures = gradients(recipe(data, tmp_path, **settings), dtype)
    other_loss, found, other_figures = gradients(recipe(data, tmp_path, **settings, **SAVING[how]), dtype)
    assert other_loss == pytest.approx(loss, rel=1e-6)
    assert other_figures == pytest.approx(figures, rel=1e-6)
    assert found.keys() == usual.keys()
    exact = dtype is None
    for name, gradient in usual.items():
        # The order in which the counts' gradients are added is all that differs.
        atol = (1e-5 if exact else 0.02) * float(gradient.abs().max())
        close = {"rtol": 1e-5 if exact else 0.02, "atol": atol}
        torch.testing.assert_close(
            found[name], gradient, **close, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_settings_that_exclude_each_other(data: Path, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(ConfigError, match="exclude each other"):
        recipe(data, tmp_path, recompute_cheap=True, gradient_checkpointing=True)
    with pytest.raises(ConfigError, match="not fp16"):
        recipe(data, tmp_path, passes_in_turn=True, loop={"out": "x", "precision": "fp16"})


def test_shared_out_parameters_are_refused() -> None:
    shard = torch.nn.Parameter(torch.ones(2))
    shard.to_local = lambda: shard  # type: ignore[attr-defined]  # as a DTensor has
    with pytest.raises(ConfigError, match="whole parameters"):
        InTurn(torch.ones(1), [shard])


# -- bytes --------------------------------------------------------------------------------------------------


class Targets:
    """Targets of the width of InternVideo2-1B's, made up: the teacher itself holds nothing for backward."""

    layer_dims, final_dim, has_cls, dense, fingerprint = (1408,) * 6, 768, True, False, "made up"

    def to(self, device: torch.device) -> Targets:
        return self

    def observe(self, pixels: Tensor, grid: Grid, chosen: Tensor) -> dict[str, Tensor]:
        return {}

    def targets(self, observed: Any, grid: Grid, chosen: Tensor) -> TeacherTargets:
        clips, tokens = chosen.shape
        layers = tuple(unit(torch.randn(clips, 1 + tokens, 1408)) for _ in self.layer_dims)
        return TeacherTargets(layers, unit(torch.randn(clips, 768)), torch.rand(clips, tokens))


def bytes_per_clip(tokens: int, **settings: Any) -> float:
    """Peak of a step beyond weights, gradients and the teacher's targets, under the GPU's dtypes: what two
    clips take more than one."""
    wanted = UmtRecipe(
        optim=OptimConfig(lr=1e-3, batch_size=2, micro_batch=2),
        loop=LoopConfig(out="-"),
        teacher=TeacherSource(efficientnet=EfficientNetLiteSource()),
        data=(),
        teacher_tokens=tokens,
        num_tokens=(tokens, 3 * tokens // 4, tokens // 2),
        **settings,
    )
    _resampling.cache_clear()
    try:
        with FakeTensorMode():  # sizes and types without numbers
            return _bytes(wanted, tokens)
    finally:
        _resampling.cache_clear()  # of what has no numbers


def _bytes(wanted: UmtRecipe, tokens: int) -> float:
    student = UmtModel(FluxViT(SMALL.replace(num_classes=0, gelu="tanh")), Targets(), wanted).train()  # type: ignore[arg-type]

    def step(clips: int) -> None:
        pixels = torch.randn(clips, 3, tokens // 64, 112, 112)
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = student(VideoBatch(examples=(), pixels=pixels, index=0))
        loss.backward()

    step(1)  # gradients are there from now on
    peaks = [peak_bytes(lambda clips=clips: step(clips)) for clips in (1, 2)]
    return peaks[1] - peaks[0]


@pytest.mark.slow
def test_bytes_of_a_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound is of one token: times 2048 tokens and 64 clips it must leave room on a card of 40 GiB."""
    monkeypatch.setattr("encoder.layers.attend", F.scaled_dot_product_attention)  # as on a GPU
    monkeypatch.setattr("torch.nn.init.trunc_normal_", lambda tensor, std: tensor)
    tokens = 2048
    usual = bytes_per_clip(tokens) / tokens
    saving = bytes_per_clip(tokens, recompute_cheap=True, passes_in_turn=True) / tokens
    print(f"{usual:.0f} and {saving:.0f} bytes for each of the teacher's tokens")
    assert saving < usual / 3
    assert 64 * 2048 * saving < 36 * 2**30


@pytest.mark.slow  # a compiler runs for about a minute
def test_a_compiled_encoder_learns_the_same(data: Path, tmp_path: Path) -> None:  # noqa: F811
    """With an InternVideo2 teacher that is compiled too, and whole blocks computed again."""
    losses = []
    for compiles in (False, True):
        loop = {
            "out": str(tmp_path / f"{compiles}"),
            "max_steps": 2,
            "compile": compiles,
            "precision": "fp32",
        }
        wanted = recipe(data, tmp_path, gradient_checkpointing=True, loop=loop)
        losses.append(train(UmtStage(wanted), wanted.optim, wanted.loop).losses)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
