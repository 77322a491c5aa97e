"""Token merging against the published code's output, and its properties."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from llm_bridge.tome import merge_schedule, merge_tokens
from tests import ROOT

GOLDEN = ROOT / "tests" / "data" / "tome_golden.safetensors"


@pytest.mark.parametrize(
    ("tokens", "target", "rounds"),
    [
        (1024, 64, [512, 256, 128, 64]),
        (784, 64, [392, 196, 98, 34]),
        (256, 64, [128, 64]),
        (2048, 128, [1024, 512, 256, 128]),
        (64, 64, []),
    ],
)
def test_schedule(tokens: int, target: int, rounds: list[int]) -> None:
    assert merge_schedule(tokens, target) == rounds


def test_golden_as_sets_of_rows() -> None:
    x = torch.from_numpy(np.random.default_rng(22).standard_normal((2, 784, 64)).astype(np.float32))
    expected = load_file(GOLDEN)["merged"]
    found = merge_tokens(x, 64, heads=4)
    for ours, theirs in zip(found, expected, strict=True):
        distance = torch.cdist(ours, theirs, compute_mode="donot_use_mm_for_euclid_dist")
        assert distance.min(dim=1).values.max() < 1e-4
        assert distance.min(dim=0).values.max() < 1e-4


@settings(deadline=None, max_examples=40)
@given(count=st.integers(1, 60), target=st.integers(1, 40), seed=st.integers(0, 99))
def test_count_order_and_content(count: int, target: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # The last channel carries each token's own time, so that it is averaged like the rest.
    x = torch.randn(1, count, 8, generator=generator)
    x[..., -1] = torch.arange(count) / 100
    merged = merge_tokens(x, target, heads=2)
    assert merged.shape == (1, min(count, target), 8)
    assert (merged[0, :, -1].diff() >= -1e-6).all()
    assert merged.amin() >= x.amin() - 1e-5
    assert merged.amax() <= x.amax() + 1e-5


def test_gradients_reach_every_token() -> None:
    x = torch.randn(1, 20, 8, requires_grad=True)
    merge_tokens(x, 4, heads=2).sum().backward()
    assert x.grad is not None
    assert (x.grad.abs().sum(-1) > 0).all()
