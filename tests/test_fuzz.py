"""Damaged files of every kind (tests/bench/fuzz.py) end in an answer or an error and leave nothing."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.bench.fuzz import KINDS, fuzz

# Files of seed 7: five media, two request bodies, a model folder, an adapter and a GGUF file.
FEW = (0, 1, 2, 3, 4, 21, 39, 5, 10, 43)


@pytest.mark.parametrize(
    "files",
    [
        pytest.param(FEW, id="few", marks=pytest.mark.slow),
        pytest.param(range(60), id="many", marks=pytest.mark.slow),
    ],
)
def test_damaged_files_end_in_an_answer_or_an_error(files: Sequence[int], tmp_path: Path) -> None:
    result = fuzz(files, 7, tmp_path / "work")
    assert result["violations"] == []
    assert {name.split(":")[0] for name in result["outcomes"]} == set(KINDS)
