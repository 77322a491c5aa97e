"""The fuzz in short: nothing breaks, nothing stays."""

from pathlib import Path

from tests.bench.fuzz import fuzz


def test_damaged_files_of_every_kind_end_well(tmp_path: Path) -> None:
    result = fuzz(range(25), 7, tmp_path / "work")
    assert result["violations"] == []
    assert len({name.split(":")[0] for name in result["outcomes"]}) > 3  # kinds
