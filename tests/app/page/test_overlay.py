"""Which patches are drawn bright, and the HTML around them."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from app.answer import Answer, KeptTokens, Timings, Usage
from app.chat import VideoChat
from app.page import html as markup
from app.page import overlay
from encoder.tokens import Grid
from tests.app.conftest import SHORT

GRID = Grid(2, 2, 3)


def kept(indices: tuple[int, ...], grid: Grid = GRID) -> KeptTokens:
    times = tuple(0.5 + k for k in range(grid.frames))
    return KeptTokens(times, float(grid.frames), grid, indices)


def test_kept_patches_stay_as_they_are_and_dropped_ones_dim() -> None:
    frames = torch.full((2, 40, 60, 3), 200, dtype=torch.uint8)
    first, second = overlay.paint(frames, kept((0, 5, 6)))
    bright = np.asarray(first).max(axis=2) == 200
    assert bright[:20, :20].all()  # patch 0
    assert bright[20:, 40:].all()  # patch 5
    assert not bright[:20, 20:].any()
    assert not bright[20:, :40].any()
    assert np.asarray(second)[:20, :20].min() == 200  # patch 6 is the first of the second frame
    assert np.asarray(second)[20:].max() < 100


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(5, 41),
    st.integers(5, 41),
    st.data(),
)
def test_the_bright_share_equals_the_kept_share(
    frames: int, rows: int, columns: int, height: int, width: int, data: st.DataObject
) -> None:
    grid = Grid(frames, rows, columns)
    indices = tuple(sorted(data.draw(st.sets(st.integers(0, grid.size - 1)))))
    pictures = overlay.paint(
        torch.full((frames, height, width, 3), 255, dtype=torch.uint8), kept(indices, grid)
    )
    bright = np.stack([np.asarray(picture)[..., 0] == 255 for picture in pictures])
    patch_of = np.arange(height)[:, None] * rows // height * columns + np.arange(width) * columns // width
    expected = np.isin(np.arange(frames)[:, None, None] * rows * columns + patch_of, indices)
    assert (bright == expected).all()


def test_frames_must_fit_the_grid() -> None:
    with pytest.raises(ValueError, match="3 frames do not fit a grid of 2"):
        overlay.paint(torch.zeros((3, 8, 8, 3), dtype=torch.uint8), kept(()))


def test_data_url_is_a_small_jpeg() -> None:
    url = overlay.data_url(Image.new("RGB", (400, 200), "red"), 100)
    picture = Image.open(io.BytesIO(base64.b64decode(url.split(",")[1])))
    assert picture.format == "JPEG"
    assert picture.size == (100, 50)


def test_preview_and_answer_keep_the_same_tokens(chat: VideoChat) -> None:
    for selector in ("flux", "uniform", "random", "tube"):
        preview = chat.preview(SHORT, 48, selector)
        seen = chat.look(SHORT, 48, selector)
        assert preview.kept == seen.kept
        assert len(preview.frames) == seen.kept.grid.frames
        assert preview.frames.dtype == torch.uint8
    assert chat.look(SHORT, 48, "tube").decode_s == 0


def test_preview_runs_no_encoder_block_and_decodes_once(
    chat: VideoChat, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("a block ran")

    with monkeypatch.context() as patch:
        patch.setattr(type(chat.model.encoder.blocks[0]), "forward", never)
        chat.preview(SHORT, 32)
    assert chat.caches["clips"].entries == 1
    chat.ask(SHORT, "What?", budget=32, max_new_tokens=2)
    assert chat.caches["clips"].hits == 1


def test_strip_has_a_button_per_frame_with_its_time() -> None:
    html = markup.strip(
        [(torch.zeros((2, 28, 42, 3), dtype=torch.uint8), kept((0, 5, 6)))], 1, side=64, label="<seen>"
    )
    assert re.findall(r'data-seek="([\d.]+)" data-medium="1"', html) == ["0.500", "1.500"]
    assert "Go to 0:00.5: 2 tokens kept" in html
    assert "Go to 0:01.5: 1 tokens kept" in html
    assert "<seen>" not in html


def test_strip_of_an_image_has_no_buttons() -> None:
    one = KeptTokens((), 0.0, Grid(1, 2, 3), (0, 1))
    html = markup.strip([(torch.zeros((1, 28, 42, 3), dtype=torch.uint8), one)], 0, side=64, label="seen")
    assert "data-seek" not in html
    assert "2 tokens" in html


@pytest.mark.parametrize(
    ("text", "linked"),
    [
        ("It appears at 0:07.", "It appears at [0:07](#t=7)."),
        ("From 1:02.5 on", "From [1:02.5](#t=62.5) on"),
        ("it ends at 1:02.03: the end", "it ends at [1:02.03](#t=62.03): the end"),
        ("after about 3 seconds, or 4.5 s", "after about [3 seconds](#t=3), or [4.5 s](#t=4.5)"),
        ("After about Three seconds.", "After about [Three seconds](#t=3)."),
        ("twenty-five seconds in", "twenty-five seconds in"),
        ("one of ten, someone seconds it", "one of ten, someone seconds it"),
        ("3 sheep, 2 secrets, 5secs", "3 sheep, 2 secrets, [5secs](#t=5)"),
        ("at 3:00 there is nothing", "at 3:00 there is nothing"),  # past the end
        ("a 16:9 picture at 12:345 or x1:02", "a 16:9 picture at 12:345 or x1:02"),
    ],
)
def test_times_become_links(text: str, linked: str) -> None:
    assert markup.link_times(text, 90.0) == linked
    html = re.sub(r"\[([^]]*)\]\(([^)]*)\)", r'<a href="\2">\1</a>', linked)
    assert markup.link_times(text, 90.0, html=True) == html


@pytest.mark.parametrize(
    ("seconds", "whole", "tenths"),
    [(0, "0:00", "0:00.0"), (59.96, "1:00", "1:00.0"), (67.44, "1:07", "1:07.4")],
)
def test_clock(seconds: float, whole: str, tenths: str) -> None:
    assert markup.clock(seconds) == whole
    assert markup.clock(seconds, tenths=True) == tenths


def test_small_print_shows_reuse_and_finish() -> None:
    usage = Usage(100, 40, 40, 90, 60, 12)
    answer = Answer("", usage, Timings(0.0, 0.25, 0.05, 1.5, 2.0, 31.4), (), "cancelled")
    text = markup.small_print(answer)
    for part in ("40 of 100 tokens kept", "decode reused", "encode 250 ms", "60 of 90 prompt tokens reused"):
        assert part in text
    assert "first word 1.5 s · 31 tokens/s · stopped" in text


def test_cost_line_adds_up_over_videos(chat: VideoChat) -> None:
    one = chat.estimate(SHORT, 64)
    html = markup.cost_line([one, one])
    assert f"<b>{2 * one.kept_tokens}</b> of {2 * one.seen_tokens}" in html
    assert f"2 × {one.frames} × {one.width}×{one.height}" in html
    assert f"{100 * one.kept_tokens / one.seen_tokens:.0f} %" in html
    assert "takes longer" in markup.cost_line([one], seconds=1e-9)


@pytest.mark.parametrize(
    ("text", "linked"),
    [
        ("From 0:01 to 0:02.", "From [0:01 to 0:02](#t=1,2)."),
        ("It runs 3-5 s.", "It runs [3-5 s](#t=3,5)."),
        ("From 3 s to 5 seconds, then at 0:06", "From [3 s to 5 seconds](#t=3,5), then at [0:06](#t=6)"),
        ("From 0:05 to 0:02", "From [0:05](#t=5) to [0:02](#t=2)"),
        ("From 0:05 to 9:00", "From [0:05](#t=5) to 9:00"),
    ],
)
def test_an_interval_is_one_link(text: str, linked: str) -> None:
    assert markup.link_times(text, 10.0) == linked


@pytest.mark.parametrize(
    ("text", "other", "shown"),
    [
        ("A cat sits.", "A dog sits.", "A <mark>cat </mark>sits."),
        ("A cat sits.", "a cat sits", "A cat sits."),
        ("<b> & so", "", "<mark>&lt;b&gt; &amp; so</mark>"),
        ("It ends at 0:03", "It starts", 'It <mark>ends at <a href="#t=3">0:03</a></mark>'),
        ("", "Words", ""),
    ],
)
def test_what_one_answer_says_alone_is_marked(text: str, other: str, shown: str) -> None:
    assert markup.said_alone(text, [other], 10.0) == shown
    assert "<mark>" not in markup.said_alone(text, [], 10.0)
