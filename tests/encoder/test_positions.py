"""Positions against torch's own interpolation, on grids of any shape."""

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from encoder.positions import PositionCache, interpolate, sin_cos_3d
from encoder.tokens import Grid

SIDES = st.integers(1, 7)


@settings(deadline=None, max_examples=40)
@given(SIDES, SIDES, SIDES, SIDES, SIDES, SIDES)
def test_equals_linear_then_bicubic(t0, h0, w0, t1, h1, w1) -> None:
    table = torch.randn(t0 * h0 * w0, 5, generator=torch.Generator().manual_seed(1))
    x = table.view(t0, h0 * w0 * 5).T[None]
    if t0 != t1:
        x = F.interpolate(x, size=t1, mode="linear")
    x = x[0].T.reshape(t1, h0, w0, 5).permute(0, 3, 1, 2)
    if (h0, w0) != (h1, w1):
        x = F.interpolate(x, size=(h1, w1), mode="bicubic")
    expected = x.permute(0, 2, 3, 1).reshape(-1, 5)
    torch.testing.assert_close(
        interpolate(table, Grid(t0, h0, w0), Grid(t1, h1, w1)), expected, atol=1e-5, rtol=0
    )


def test_table_layout() -> None:
    table = sin_cos_3d(32, Grid(3, 2, 4))
    assert table.shape == (1, 25, 32)
    rows = table[0, 1:].view(3, 2, 4, 32)
    assert torch.equal(rows[1, 0, 0, :8], rows[1, 1, 3, :8])  # first quarter: the frame
    assert torch.equal(rows[0, 0, 2, 8:20], rows[2, 1, 2, 8:20])  # then the column
    assert torch.equal(rows[0, 1, 0, 20:], rows[2, 1, 3, 20:])  # then the row


def test_a_single_frame_is_the_mean_of_the_middle_two() -> None:
    table = torch.arange(24.0)[:, None]
    assert interpolate(table, Grid(24, 1, 1), Grid(1, 1, 1)).item() == 11.5


def test_cache_is_bounded_and_survives_threads() -> None:
    from concurrent.futures import ThreadPoolExecutor

    table, cache = torch.randn(8, 4), PositionCache(entries=3)
    source = Grid(2, 2, 2)
    grids = [Grid(t, h, 3) for t in range(1, 6) for h in range(1, 4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda grid: cache.get(table, source, grid), grids * 5))
    for grid, rows in zip(grids * 5, found, strict=True):
        assert torch.equal(rows, interpolate(table, source, grid))
    assert len(cache) <= 3
