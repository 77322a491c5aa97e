"""The selector against hand-computed cases and a direct reading of its definition."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from encoder.errors import BudgetError
from encoder.selection import group_frames, importance, quotas, select
from encoder.tokens import Grid


@pytest.mark.parametrize(
    ("frames", "groups"),
    [
        (1, [1]),
        (2, [2]),
        (3, [3]),
        (4, [2, 2]),
        (5, [3, 2]),
        (6, [3, 3]),
        (7, [4, 3]),
        (8, [2] * 4),
        (12, [3] * 4),
        (10, [5, 5]),
        (24, [6] * 4),
    ],
)
def test_groups(frames: int, groups: list[int]) -> None:
    assert group_frames(frames) == groups


@pytest.mark.parametrize(
    ("frames", "side", "keep", "official"),
    [
        (6, 224, 512, 510),
        (8, 196, 1024, 1020),
        (10, 252, 1024, 1022),
        (16, 196, 2048, 2044),
        (24, 224, 2048, 2044),
        (24, 196, 3072, 3068),
        (8, 224, 1024, 1024),
    ],
)
def test_counts(frames: int, side: int, keep: int, official: int) -> None:
    per_frame = (side // 14) ** 2
    groups = group_frames(frames)
    assert sum(quotas(keep, groups, per_frame)) == keep
    assert sum(quotas(keep, groups, per_frame, compat_truncation=True)) == official


@given(st.integers(1, 40), st.integers(1, 30), st.data())
def test_quotas_fit_their_groups(frames: int, per_frame: int, data) -> None:
    keep = data.draw(st.integers(1, frames * per_frame))
    groups = group_frames(frames)
    counts = quotas(keep, groups, per_frame)
    assert sum(groups) == frames
    assert sum(counts) == keep
    assert all(0 <= count <= size * per_frame for count, size in zip(counts, groups, strict=True))


def test_importance_by_hand() -> None:
    # One patch over four frames in groups of two; embeddings 0, 3, 10, 14 along one axis and 0, 4, 10, 17.
    patches = torch.tensor([[0.0, 0.0], [3.0, 4.0], [10.0, 10.0], [14.0, 13.0]]).view(1, 4, 1, 2)
    assert importance(patches, [2, 2]).flatten().tolist() == [5.0, 5.0, 5.0, 5.0]
    assert importance(patches, [4]).flatten().tolist() == pytest.approx([5.0, 5.0, 85**0.5, 5.0])
    assert importance(patches, [2, 2], p=1).flatten().tolist() == [7.0, 7.0, 7.0, 7.0]


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 12), st.integers(1, 6), st.integers(0, 10**6), st.data())
def test_flux_equals_its_definition(frames: int, per_frame: int, seed: int, data) -> None:
    keep = data.draw(st.integers(1, frames * per_frame))
    # Small integers: exact in float32, with many ties.
    z = np.random.default_rng(seed).integers(0, 3, (frames, per_frame, 2)).astype(np.float32)
    expected, start = [], 0
    groups = group_frames(frames)
    for size, count in zip(groups, quotas(keep, groups, per_frame), strict=True):
        scores = {}
        for t in range(size):
            for i in range(per_frame):
                now = max(t, 1)
                change = z[start + now, i] - z[start + now - 1, i] if size > 1 else np.zeros(2)
                scores[(start + t) * per_frame + i] = float((change**2).sum())
        expected += sorted(scores, key=lambda index: (-scores[index], index))[:count]
        start += size
    found = select(torch.from_numpy(z).view(1, -1, 2), Grid(frames, 1, per_frame), keep)
    assert found[0].tolist() == sorted(expected)


def test_random_and_tube_follow_their_generator() -> None:
    patches, grid = torch.zeros(2, 24, 4), Grid(4, 2, 3)
    for selector in ("random", "tube"):
        first, second = (
            select(patches, grid, 10, selector=selector, generator=torch.Generator().manual_seed(3))
            for _ in range(2)
        )
        assert torch.equal(first, second)
    tube = select(patches, grid, 8, selector="tube")
    assert (tube.view(2, 4, 2) % 6 == (tube.view(2, 4, 2) % 6)[:, :1]).all()


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12), st.data())
def test_uniform_takes_one_patch_of_each_interval(frames: int, height: int, width: int, data) -> None:
    grid = Grid(frames, height, width)
    keep = data.draw(st.integers(1, grid.size))
    [kept] = select(torch.zeros(1, grid.size, 3), grid, keep, selector="uniform").tolist()
    borders = [number * grid.size // keep for number in range(keep + 1)]
    stretches = pairwise(borders)
    assert all(first <= one < end for one, (first, end) in zip(kept, stretches, strict=True))


@pytest.mark.parametrize("keep", [256, 128, 64])
def test_uniform_takes_as_many_of_each_frame_row_and_column(keep: int) -> None:
    [kept] = select(torch.zeros(1, 512, 3), Grid(8, 8, 8), keep, selector="uniform")
    for place in (kept // 64, kept // 8 % 8, kept % 8):
        assert (torch.bincount(place, minlength=8) - keep // 8).abs().max() <= 1


def test_unknown_selector() -> None:
    with pytest.raises(BudgetError, match="choose one of flux"):
        select(torch.zeros(1, 4, 2), Grid(1, 2, 2), 2, selector="best")  # type: ignore[arg-type]


def test_evs_takes_the_first_frame_then_what_is_least_like_the_frame_before() -> None:
    patches = torch.ones(3, 4, 2)  # frames, patches of a frame, width
    patches[1, 2] = torch.tensor([1.0, -1.0])  # turns, and turns back
    patches[2, 0] = torch.tensor([1.0, 0.9])  # hardly changes
    kept = select(patches.flatten(0, 1)[None], Grid(3, 2, 2), 7, selector="evs")
    assert kept.tolist() == [[0, 1, 2, 3, 6, 8, 10]]
