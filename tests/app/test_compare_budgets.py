"""The comparison of budgets, from end to end around a tiny stock model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from app.compare_budgets import SELECTORS, SHARES, found_clips, main, word_f1
from tests import tiny_video_models
from tests.app.conftest import SHORT


@pytest.mark.slow
def test_one_table_of_all_shares_and_selectors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_video_models.make(tmp_path / "smol", "smolvlm")
    out = tmp_path / "answers.jsonl"
    assert main([str(SHORT), "--model", str(model), "--max-new-tokens", "3", "--json", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 5 * (1 + len(SHARES) * len(SELECTORS))
    full = next(row["tokens"] for row in rows if row["share"] == 1)
    assert {row["share"]: row["tokens"] for row in rows} == {s: round(s * full) for s in (1.0, *SHARES)}
    printed = capsys.readouterr().out
    assert "100.0% all         100%   1.00" in printed
    assert printed.count("evs") == len(SHARES)


def test_agreement_of_words() -> None:
    assert word_f1("a red car", "A red car") == 1
    assert word_f1("a red car", "a dog") == pytest.approx(2 / 5)
    assert word_f1("", "") == 1
    assert word_f1("yes", "no") == 0


def test_a_wrong_clip_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_video_models.make(tmp_path / "smol", "smolvlm")
    assert main([str(tmp_path / "none.mp4"), "--model", str(model)]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()[-1:]) == 1


def test_installed_packages_bring_clips() -> None:
    assert "world.mp4" in {clip.name for clip in found_clips()}
