"""Windows of a video cover it without overlap, and each has the frames of its own times."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from app.library import clip_reader
from app.library.clip_reader import read_clips, windows
from tests.app.library.conftest import film


@given(st.floats(0.04, 50_000), st.floats(0.5, 3600))
def test_windows_cover_the_video(duration_s: float, seconds: float) -> None:
    spans = windows(duration_s, seconds)
    assert spans[0][0] == 0
    assert spans[-1][1] == duration_s
    assert all(before[1] == after[0] for before, after in pairwise(spans))
    assert all(end - start <= 1.5 * seconds + 1e-6 for start, end in spans)
    if len(spans) > 1:
        assert all(end - start >= 0.5 * seconds - 1e-6 for start, end in spans)


def test_every_window_has_its_own_frames_in_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip_reader, "WINDOWS_AT_ONCE", 2)
    path = film(tmp_path / "a.mp4", ["red", "green", "blue", "white", "red"])
    groups = list(read_clips(str(path), 2, 4))
    assert [len(group) for group in groups] == [2, 2, 1]
    clips = [clip for group in groups for clip in group]
    assert [(clip.number, clip.count, clip.start_s) for clip in clips] == [(i, 5, 2.0 * i) for i in range(5)]
    dark = [[channel < 100 for channel in clip.frames.float().mean((0, 1, 2)).tolist()] for clip in clips]
    assert dark == [[0, 1, 1], [1, 0, 1], [1, 1, 0], [0, 0, 0], [0, 1, 1]]
    assert all(clip.frames.shape == (4, 32, 32, 3) for clip in clips)


def test_a_picture_is_one_clip(tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    [[clip]] = read_clips(str(tmp_path / "a.png"), 10, 8)
    assert (clip.count, clip.start_s, clip.end_s, clip.frames.shape) == (1, 0.0, 0.0, (8, 30, 40, 3))
