"""The soak in short: nothing wrong, nothing left."""

from pathlib import Path

import pytest

from tests.bench.soak import soak


@pytest.mark.slow
def test_a_short_soak(tmp_path: Path) -> None:
    result = soak(20, tmp_path)
    # Twenty seconds are too few to call memory flat, and a test asserts no time; the benchmark does both.
    assert [p for p in result["problems"] if not p.startswith(("memory", "/healthz took"))] == []
    assert sum(result["done"].values()) > 10
