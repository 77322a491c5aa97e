"""Parts of videos: what is a part, which frames it has, and that only they are decoded."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from encoder.errors import VideoError
from encoder.video import backends
from encoder.video.containers import inspect
from encoder.video.geometry import DisplayGeometry, cut_to
from encoder.video.limits import DEFAULT_LIMITS
from encoder.video.part import Part
from encoder.video.reader import Clip, VideoInfo, cropped, probe, read_clip
from tests.encoder.video.video_files import numbers_in, rotated_by_matrix, steady, uneven, write

INFO = VideoInfo("video", 640, 360, 60.0, 1500, "h264", "mov", 0, "abc")
share = st.floats(0, 1)
boxes = st.tuples(share, share, share, share)


@given(st.floats(0, 59.9), st.one_of(st.none(), st.floats(0.001, 60)), st.one_of(st.none(), boxes))
def test_a_part_is_within_its_video_or_one_sentence(start, end, region):
    try:
        part = Part.of(start, end, region)
        seen = part.seen(INFO)
    except VideoError:
        empty = region is not None and (region[0] >= region[2] or region[1] >= region[3])
        assert empty or (end is not None and end <= start)
        return
    first, last = part.range_s(INFO)
    assert 0 <= first < last <= 60
    assert seen.duration_s == pytest.approx(last - first)
    assert 1 <= seen.frames <= 1500
    assert 1 <= seen.width <= 640
    assert 1 <= seen.height <= 360
    assert (seen.digest == INFO.digest) == part.whole
    assert seen.pixels == 640 * 360


@given(boxes, boxes)
def test_two_parts_share_a_digest_only_when_they_are_the_same(one, other):
    made = []
    for region in (one, other):
        left, right = sorted((region[0], region[2]))
        top, bottom = sorted((region[1], region[3]))
        if left == right or top == bottom:
            return
        made.append(Part.of(region=(left, top, right, bottom)))
    assert (made[0].seen(INFO).digest == made[1].seen(INFO).digest) == (made[0] == made[1])


@given(
    boxes,
    st.integers(0, 3),
    st.booleans(),
    st.one_of(st.none(), st.just((0.25, 0.0, 1.0, 0.5))),
)
def test_a_box_of_the_upright_picture_is_found_in_the_stored_one(region, turns, mirror, crop):
    left, right = sorted((region[0], region[2]))
    top, bottom = sorted((region[1], region[3]))
    height, width = 400, 600
    stored = torch.arange(height * width).view(height, width)

    def upright(part: DisplayGeometry) -> torch.Tensor:
        x0, y0, x1, y1 = part.crop or (0, 0, 1, 1)
        rows = slice(math.floor(y0 * height + 1e-6), max(math.ceil(y1 * height - 1e-6), 1))
        columns = slice(math.floor(x0 * width + 1e-6), max(math.ceil(x1 * width - 1e-6), 1))
        inner = stored[rows, columns]
        return (inner.flip(1) if mirror else inner).rot90(turns, (0, 1))

    whole = upright(DisplayGeometry(1, 1, turns, mirror, crop))
    high, wide = whole.shape
    # Whole pixels, so that both ways cut at the same places.
    box = [round(v * n) for v, n in zip((left, top, right, bottom), (wide, high) * 2, strict=True)]
    if box[0] >= box[2] or box[1] >= box[3]:
        return
    shares = [v / n for v, n in zip(box, (wide, high) * 2, strict=True)]
    part = cut_to(DisplayGeometry(wide, high, turns, mirror, crop), tuple(shares))
    expected = whole[box[1] : box[3], box[0] : box[2]]
    assert (part.height, part.width) == expected.shape
    assert torch.equal(upright(part), expected)


@given(boxes, st.integers(1, 40), st.integers(1, 40))
def test_a_crop_holds_the_box_and_less_than_a_pixel_more(region, width, height):
    left, right = sorted((region[0], region[2]))
    top, bottom = sorted((region[1], region[3]))
    if left == right or top == bottom:
        return
    x = torch.arange(width).expand(height, width)
    y = torch.arange(height)[:, None].expand(height, width)
    inner = cropped(torch.stack((x, y, x), -1)[None], (left, top, right, bottom))[0]
    for axis, low, high, size in ((0, left, right, width), (1, top, bottom, height)):
        first, last = inner[..., axis].min().item(), inner[..., axis].max().item() + 1
        assert low * size - 1 < first <= low * size
        assert high * size <= last < high * size + 1 + 1e-9 or last == first + 1


def test_wrong_parts_are_one_sentence():
    for options, words in (
        ({"start": 5, "end": 3}, "must be after"),
        ({"start": 5, "end": 5}, "must be after"),
        ({"start": 60}, "nothing at 1:00, it lasts 1:00"),
        ({"end": 62}, "nothing at 1:02"),
        ({"start": -1}, "The start cannot be -1"),
        ({"end": math.inf}, "The end cannot be inf"),
        ({"region": (0, 0, 0, 1)}, "fractions"),
        ({"region": (0.5, 0, 0.2, 1)}, "fractions"),
        ({"region": (0, 0, 320, 180)}, "fractions"),
        ({"region": (0, 0, math.nan, 1)}, "fractions"),
        ({"region": (0, 0, 1)}, "fractions"),
        ({"region": "left"}, "fractions"),
        ({"region": 3}, "fractions"),
        ({"region": (True, 0, 1, 1)}, "fractions"),
    ):
        with pytest.raises(VideoError, match=words) as caught:
            Part.of(**options).seen(INFO)
        assert str(caught.value).count("\n") == 0
    still = VideoInfo("image", 64, 64, 0.0, 1, "png", "png", 0, "abc")
    with pytest.raises(VideoError, match="no times"):
        Part.of(1, 2).seen(still)
    assert Part.of(region="0.5,0,1,1").seen(still).width == 32
    assert Part.of(0, None, (0, 0, 1, 1)).whole
    # A clock shows 0:10 at the end of a video of 9.6 s.
    assert Part.of(0, "1:00").range_s(VideoInfo(**{**vars(INFO), "duration_s": 59.4})) == (0.0, 59.4)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
@pytest.mark.parametrize("trusted", [True, False])
def test_frames_lie_in_the_part_and_have_the_video_s_times(tmp_path, suffix, trusted):
    times = uneven(60)
    video = write(tmp_path / f"a.{suffix}", times, gop=6)
    start, end = times[20], times[40]
    clip = read_clip(video, 8, start_s=start, end_s=end, decoder="pyav", trusted=trusted)
    assert all(20 <= number < 40 for number in numbers_in(clip))
    for time_s, number in zip(clip.times_s, numbers_in(clip), strict=True):
        assert time_s == pytest.approx(times[number], abs=2e-3)


def test_only_the_part_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    video = str(write(tmp_path / "a.mp4", steady(1000), gop=25, size=(96, 64)))
    rules = DEFAULT_LIMITS.rules(True, 1)
    header = inspect(video, rules)
    decoded = []
    plain = backends._Cursor._decode

    def counting(self, sought=False):
        for frame in plain(self, sought):
            decoded.append(self.time_of(frame))
            yield frame

    monkeypatch.setattr(backends._Cursor, "_decode", counting)
    list(backends.decode_pyav(video, header, [30.2, 30.6, 31.0, 31.4], (192, 128), rules))
    assert min(decoded) >= 30.0 - 1e-6
    assert len(decoded) <= 45


@pytest.mark.parametrize("turn", [0, 90, 180, 270])
@pytest.mark.parametrize("trusted", [True, False])
@pytest.mark.quick(1)
def test_a_region_of_a_turned_video_is_that_of_the_upright_picture(tmp_path, turn, trusted):
    plain = write(tmp_path / "plain.mp4", steady(12), options={"crf": "5"})
    video = rotated_by_matrix(plain, tmp_path / "a.mp4", turn)
    whole = read_clip(video, 3, decoder="pyav").frames.float()
    region = (0.25, 0.5, 0.75, 1.0)
    part = read_clip(video, 3, region=region, trusted=trusted).frames.float()
    expected = cropped(whole, region)
    assert part.shape == expected.shape
    assert (part - expected).abs().mean() < 3
    small = read_clip(video, 3, region=region, max_side=24).frames
    assert max(small.shape[1:3]) == 24


@pytest.mark.parametrize("suffix", ["png", "gif"])
def test_a_region_of_a_picture_and_of_an_animation(tmp_path, suffix):
    pixels = np.random.default_rng(0).integers(0, 255, (4, 40, 60, 3), np.uint8)
    pictures = [Image.fromarray(one) for one in pixels]
    path = tmp_path / f"a.{suffix}"
    more = {"save_all": True, "append_images": pictures[1:], "duration": 100} if suffix == "gif" else {}
    pictures[0].save(path, **more)
    whole, region = read_clip(path, 4).frames, (0.5, 0.25, 1.0, 0.75)
    assert torch.equal(read_clip(path, 4, region=region).frames, cropped(whole, region))
    assert torch.equal(read_clip(pixels, 4, region=region).frames, cropped(torch.from_numpy(pixels), region))
    assert probe(path).width == 60


def test_a_clip_in_memory_has_parts_too():
    frames = torch.arange(10, dtype=torch.uint8)[:, None, None, None].expand(10, 8, 8, 3)
    clip = Clip(frames, tuple(float(i) for i in range(10)), VideoInfo(**{**vars(INFO), "duration_s": 10.0}))
    assert Part.of(3, 6, (0, 0, 0.5, 1)).of_clip(clip).times_s == (3.0, 4.0, 5.0)
    assert Part.of(3, 6, (0, 0, 0.5, 1)).of_clip(clip).frames.shape == (3, 8, 4, 3)
    assert Part.of(3.2, 3.4).of_clip(clip).frames[0, 0, 0, 0] == 3
