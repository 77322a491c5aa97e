"""The soak in short: nothing wrong, nothing left."""

from pathlib import Path

import pytest

from tests.bench.soak import soak


@pytest.mark.slow
def test_a_short_soak(tmp_path: Path) -> None:
    result = soak(20, tmp_path)
    # Twenty seconds are too few to call memory flat; the five minutes of the benchmark do.
    assert [problem for problem in result["problems"] if not problem.startswith("memory")] == []
    assert sum(result["done"].values()) > 10
