"""Learning rates by step and by layer, and which parameters decay."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from encoder.config import MICRO, SMALL
from encoder.fluxvit import FluxViT
from training.trainer.optim import encoder_depths, learning_rate, parameter_groups
from training.trainer.recipe import OptimConfig


def optim(**changes) -> OptimConfig:
    return OptimConfig(**{"lr": 1e-3, "batch_size": 256, "micro_batch": 1, "warmup_ratio": 0.25} | changes)


def test_warm_up_then_cosine_by_hand() -> None:
    rates = [learning_rate(step, 8, optim(min_lr=1e-4)) for step in range(8)]
    wanted = [1e-4 + 9e-4 * 0.5 * (1 + math.cos(math.pi * k / 6)) for k in range(6)]
    assert rates == pytest.approx([5e-4, 1e-3, *wanted])


def test_a_warm_up_from_a_given_rate() -> None:
    rates = [learning_rate(step, 20, optim(warmup_lr=1e-6)) for step in range(5)]
    assert rates == pytest.approx([1e-6 + (1e-3 - 1e-6) * k / 4 for k in range(5)])


@pytest.mark.parametrize(("batch", "peak"), [(1024, 8e-4), (2048, 1.6e-3), (512, 4e-4)])
def test_the_released_scaling(batch: int, peak: float) -> None:
    """2e-4 for 256 clips: 8e-4 at 512 x 2 repeats, 1.6e-3 at the batch of Kinetics-710."""
    scaled = optim(lr=2e-4, batch_size=batch, scale_lr=True, warmup_lr=1e-6, min_lr=1e-6)
    assert learning_rate(250, 1000, scaled) == pytest.approx(peak)
    assert learning_rate(0, 1000, scaled) == pytest.approx(1e-6 * batch / 256)
    # At the end of the cosine the floor is scaled too.
    assert learning_rate(10**6, 1000, scaled) == pytest.approx(1e-6 * batch / 256)


@given(
    total=st.integers(1, 500),
    ratio=st.floats(0, 0.9),
    floor=st.floats(0, 1e-3),
    start=st.one_of(st.none(), st.floats(0, 1e-3)),
)
def test_rates_rise_then_fall_within_bounds(
    total: int, ratio: float, floor: float, start: float | None
) -> None:
    config = optim(warmup_ratio=ratio, min_lr=floor, warmup_lr=start)
    rates = [learning_rate(step, total, config) for step in range(total)]
    peak = rates.index(max(rates))
    assert all(0 <= rate <= 1e-3 * (1 + 1e-9) for rate in rates)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    falling = rates[max(peak, math.ceil(ratio * total)) :]
    assert all(a >= b - 1e-12 for a, b in pairwise(falling))
    assert all(rate >= floor * (1 - 1e-9) for rate in falling)


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.device("meta"):
            self.encoder = FluxViT(SMALL)
        self.extra = nn.Linear(2, 2, device="meta")


def test_layer_decay_of_the_small_encoder() -> None:
    model = Wrapped()
    scales = {
        id(p): (group["lr_scale"], group["weight_decay"])
        for group in parameter_groups(model, 0.05, 0.75)
        for p in group["params"]
    }
    found = {name: scales[id(p)] for name, p in model.named_parameters()}
    for name, layer in {
        "encoder.cls_token": 0,
        "encoder.pos_embed": 0,
        "encoder.patch_embed.norm.weight": 0,
        "encoder.patch_embed.proj.bias": 0,
        **{f"encoder.blocks.{i}.ls1.gamma": i + 1 for i in range(12)},
        "encoder.gpe_proj.depthwise_conv.bias": 13,
        "encoder.clip_projector.0.cross_attn.q_bias": 13,
        "encoder.fc_norm.bias": 13,
        "encoder.head.2.bias": 13,
        "extra.bias": 13,
    }.items():
        assert found[name] == (pytest.approx(0.75 ** (13 - layer)), 0.0), name
    for name, layer in {
        "encoder.patch_embed.proj.weight": 0,
        "encoder.blocks.4.attn.qkv.weight": 5,
        "encoder.blocks.4.attn.lpe.depthwise_conv.weight": 5,
        "encoder.gpe_proj.depthwise_conv.weight": 13,
        "encoder.final_clip_decoder_for_projs.1.head.weight": 13,
        "extra.weight": 13,
    }.items():
        assert found[name] == (pytest.approx(0.75 ** (13 - layer)), 0.05), name
    assert len(found) == len(list(model.parameters()))


def test_without_layer_decay_there_are_two_groups_decayed_first() -> None:
    groups = parameter_groups(FluxViT(MICRO.replace(num_classes=3)), 0.05)
    assert [(group["weight_decay"], group["lr_scale"]) for group in groups] == [(0.05, 1.0), (0.0, 1.0)]


def test_frozen_parameters_are_left_out_but_count_as_layers() -> None:
    encoder = FluxViT(MICRO)
    for block in encoder.blocks[:3]:
        block.requires_grad_(False)
    groups = parameter_groups(encoder, 0.0, 0.5)
    trained = {id(p) for group in groups for p in group["params"]}
    assert trained == {id(p) for p in encoder.parameters() if p.requires_grad}
    # Six blocks: the fourth is layer 4 of 7, however many below it are frozen.
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert scale[id(encoder.blocks[3].mlp.fc1.weight)] == 0.5**3


def test_depths_are_counted_by_encoder() -> None:
    names = ["blocks.0.w", "blocks.5.w", "teacher.blocks.39.w", "head.w"]
    assert encoder_depths(names) == {"": 6, "teacher.": 40}
