"""Encoding in buffers of fixed shape gives the same tokens; what a graph would record is run eagerly."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch

from encoder import graphs
from encoder.config import MICRO
from encoder.errors import BudgetError
from encoder.fluxvit import FluxViT
from encoder.graphs import EncoderGraphs
from encoder.tokens import VisionTokens


@pytest.fixture(scope="module")
def encoder() -> FluxViT:
    torch.manual_seed(0)
    return FluxViT(MICRO.replace(num_classes=0)).eval().requires_grad_(False)


@pytest.fixture
def encode(encoder: FluxViT) -> EncoderGraphs:
    return EncoderGraphs(encoder, most=2, devices=("cpu",))


def clips(count: int = 1, side: int = 56, frames: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, frames, side, side)


def same(one: VisionTokens, other: VisionTokens) -> bool:
    kept = all(torch.equal(a, b) for a, b in zip(one.kept, other.kept, strict=True))
    return (
        kept
        and torch.equal(one.packed, other.packed)
        and torch.equal(one.cls, other.cls)
        and (one.grids, one.times_s) == (other.grids, other.times_s)
    )


@pytest.mark.parametrize("how", [{}, {"selector": "evs"}, {"selector": "uniform"}, {"depth": -1}])
def test_tokens_are_those_of_the_plain_encoder(
    encoder: FluxViT, encode: EncoderGraphs, how: dict[str, Any]
) -> None:
    for _ in range(4):
        pixels = clips(2)
        times = [(0.0, 1.0, 2.0, 3.0)] * 2
        assert same(
            encode(list(pixels), [20, 20], times_s=times, **how),
            encoder(pixels, 20, times_s=times, **how),
        )
    assert encode.recorded == 1


def test_clips_of_inference_mode_are_taken(encoder: FluxViT, encode: EncoderGraphs) -> None:
    with torch.inference_mode():
        for _ in range(3):
            pixels = clips()
            assert same(encode(list(pixels), [16]), encoder(pixels, 16))
    assert encode.recorded == 1


def test_earlier_tokens_outlive_later_passes(encoder: FluxViT, encode: EncoderGraphs) -> None:
    given = [clips() for _ in range(4)]
    tokens = [encode(pixels, 12) for pixels in given]
    assert all(same(one, encoder(pixels, 12)) for one, pixels in zip(tokens, given, strict=True))


def test_the_least_recent_shape_goes(encode: EncoderGraphs) -> None:
    for keep in (10, 10, 20, 20):
        encode(clips(), keep)
    assert encode.recorded == 2
    encode(clips(), 10)
    encode(clips(), 30)  # 20 goes
    assert encode.recorded == 1
    encode(clips(), 10)
    assert encode.recorded == 1


@pytest.mark.parametrize(
    ("pixels", "keep", "how"),
    [
        (clips(), 10, {"selector": "random", "generator": torch.Generator().manual_seed(0)}),
        (clips(), 10, {"selector": "tube", "generator": torch.Generator().manual_seed(0)}),
        (clips(), None, {"merge": [32]}),
        (clips(2), [10, 20], {}),
        ([clips()[0], clips(side=84)[0]], 10, {}),
    ],
)
def test_what_has_no_one_shape_runs_as_it_is(
    encoder: FluxViT, encode: EncoderGraphs, pixels: Any, keep: Any, how: dict[str, Any]
) -> None:
    def seeded() -> dict[str, Any]:
        return {k: v.manual_seed(0) if k == "generator" else v for k, v in how.items()}

    with torch.inference_mode():
        for _ in range(3):
            assert same(encode(pixels, keep, **seeded()), encoder(pixels, keep, **seeded()))
    assert encode.recorded == 0


def test_a_wrong_budget_is_refused_as_by_the_encoder(encode: EncoderGraphs) -> None:
    for _ in range(3):
        with pytest.raises(BudgetError, match="2 token budgets were given for 1 clips"):
            encode(clips(), [1, 2])
        with pytest.raises(BudgetError, match="at least 1"):
            encode(clips(), 0)


def test_where_recording_fails_clips_are_encoded_all_the_same(
    encoder: FluxViT,
    encode: EncoderGraphs,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("no room for buffers")

    monkeypatch.setattr(graphs, "_Recorded", broken)
    with caplog.at_level(logging.WARNING, "fluxchat"):
        for _ in range(4):
            pixels = clips()
            assert same(encode(pixels, 16), encoder(pixels, 16))
    assert [record.getMessage() for record in caplog.records] == [
        "Clips are encoded without CUDA graphs from now on: recording one failed (no room for buffers)"
    ]


def test_elsewhere_than_on_cuda_nothing_is_recorded(encoder: FluxViT) -> None:
    encode = EncoderGraphs(encoder)
    for _ in range(3):
        pixels = clips()
        assert same(encode(pixels, 16), encoder(pixels, 16))
    assert encode.recorded == 0


def test_a_copy_records_for_itself(encode: EncoderGraphs) -> None:
    for _ in range(2):
        encode(clips(), 16)
    assert (encode.recorded, copy.deepcopy(encode).recorded) == (1, 0)
