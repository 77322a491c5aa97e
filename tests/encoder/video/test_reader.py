"""read_clip and probe on files of every kind: the right frame at the right time, upright."""

from __future__ import annotations

import io
import os
from pathlib import Path

import gradio
import numpy as np
import pytest
import torch

from encoder.errors import VideoError
from encoder.video.frame_times import middle_times
from encoder.video.reader import Limits, probe, read_clip
from tests.encoder.video import video_files as vf

REAL = Path(gradio.__file__).parent / "media_assets" / "videos"


def expected(times_s: list[float], duration_s: float, count: int) -> list[int]:
    """Brute force: the last frame whose time is not after the wanted one."""
    wanted = middle_times(0.0, duration_s, count)
    return [max([i for i, t in enumerate(times_s) if t <= w + 1e-6], default=0) for w in wanted]


@pytest.mark.parametrize(("suffix", "encoder", "pix_fmt", "codec"), vf.FORMATS)
@pytest.mark.quick(3)
def test_every_format_gives_the_frame_shown_at_each_time(tmp_path, suffix, encoder, pix_fmt, codec):
    times = vf.steady(30) if suffix == "avi" else vf.uneven(30)
    path = vf.write(tmp_path / f"v.{suffix}", times, encoder=encoder, pix_fmt=pix_fmt)
    for trusted in (True, False):
        clip = read_clip(path, 8, trusted=trusted)
        assert vf.numbers_in(clip) == expected(times, clip.duration_s, 8)
        assert clip.info.codec == codec
        assert clip.duration_s == pytest.approx(times[-1] + 0.04, abs=0.1)
        assert list(clip.times_s) == pytest.approx([times[i] for i in vf.numbers_in(clip)], abs=0.006)


@pytest.mark.parametrize(
    ("encoder", "suffix"),
    [
        ("libx264", "avi"),
        ("mpeg4", "avi"),
        *((e, s) for e in ("libx264", "libx265", "mpeg4") for s in ("mp4", "mkv")),
    ],
)
@pytest.mark.quick(3)
def test_reordered_frames_and_open_gops(tmp_path, encoder, suffix):
    """decord returns wrong frames here, so that the choice of decoder matters."""
    options = {
        "libx264": {"preset": "veryfast", "bf": "3", "x264-params": "open-gop=1:keyint=12"},
        "libx265": {"x265-params": "log-level=none:pools=1:open-gop=1:keyint=12"},
        "mpeg4": {"bf": "2"},
    }[encoder]
    path = vf.write(tmp_path / f"v.{suffix}", vf.steady(100), encoder=encoder, options=options)
    rng = np.random.default_rng(0)
    for _ in range(6):
        wanted = sorted(rng.choice(100, 5, replace=False).tolist())
        assert vf.numbers_in(read_clip(path, at_s=[0.04 * i + 0.01 for i in wanted])) == wanted
    for count in (1, 2, 3, 5):  # the last ones, which the decoder holds back, after a jump
        last = list(range(100 - count, 100))
        clip = read_clip(path, at_s=[0.04 * i + 0.01 for i in last])
        assert vf.numbers_in(clip) == last
        assert list(clip.times_s) == pytest.approx([0.04 * i for i in last], abs=0.002)


@pytest.mark.parametrize("count", [36, 40])
def test_the_last_frames_of_an_avi_that_its_decoder_holds_back(tmp_path, count):
    times = vf.steady(count, 12)
    path = vf.write(tmp_path / "v.avi", times, encoder="mpeg4", gop=8, rate=12, options={"bf": "2"})
    for first in range(count - 6, count):
        wanted = [3, *range(first, count)]
        clip = read_clip(path, at_s=[times[i] + 0.01 for i in wanted])
        assert vf.numbers_in(clip) == wanted
        assert list(clip.times_s) == pytest.approx([times[i] for i in wanted], abs=0.002)


def test_intra_refresh_without_idr_frames(tmp_path):
    """A stream refreshed little by little: decord miscounts after a jump into it."""
    options = {"x264-params": "intra-refresh=1:keyint=20"}
    path = vf.write(tmp_path / "v.mp4", vf.steady(60), gop=20, options=options)
    for trusted in (True, False):
        for wanted in ([3, 11, 27, 38, 52, 59], [35], [41, 58]):
            clip = read_clip(path, at_s=[0.04 * i + 0.01 for i in wanted], trusted=trusted)
            assert vf.numbers_in(clip) == wanted


def test_decord_refuses_open_gops(tmp_path):
    pytest.importorskip("decord")
    path = vf.write(tmp_path / "v.mp4", vf.steady(40), encoder="libx265")
    with pytest.raises(VideoError, match="open GOP"):
        read_clip(path, 4, decoder="decord")


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
@pytest.mark.quick(2)
def test_rotation_is_applied_once_by_both_decoders(tmp_path, degrees):
    pytest.importorskip("decord")
    plain = vf.write(tmp_path / "plain.mp4", vf.steady(10))
    path = vf.rotated_by_matrix(plain, tmp_path / "turned.mp4", degrees)
    upright = read_clip(plain, 3).frames.rot90(-degrees // 90, (1, 2))
    for max_side in (None, 96):
        clips = [read_clip(path, 3, decoder=d, max_side=max_side) for d in ("decord", "pyav")]
        clips.append(read_clip(path, 3, trusted=False, max_side=max_side))
        for clip in clips:
            assert clip.info.rotation == degrees
            assert (clip.info.width, clip.info.height) == ((192, 128) if degrees % 180 == 0 else (128, 192))
            difference = (clip.frames.int() - clips[1].frames.int()).abs()
            assert difference.float().mean() < (0.01 if max_side is None else 2.0)
        if max_side is None:
            assert torch.equal(clips[1].frames, upright)
        else:
            assert max(clips[1].frames.shape[1:3]) == 96


@pytest.mark.parametrize("size", [(193, 127), (33, 17), (2, 2)])
def test_odd_sizes(tmp_path, size):
    path = vf.write(tmp_path / "v.webm", vf.steady(5), encoder="libvpx-vp9", size=size)
    clip = read_clip(path, 3)
    assert clip.frames.shape == (3, size[1], size[0], 3)


def test_a_video_of_one_frame_is_an_image(tmp_path):
    clip = read_clip(vf.write(tmp_path / "v.mp4", [0.0]), 4)
    assert vf.numbers_in(clip) == [0]
    assert (clip.times_s, clip.duration_s, clip.info.kind) == ((0.0,), 0.0, "image")


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("trusted", [True, False])
def test_ten_hours_by_header(tmp_path, suffix, trusted):
    times = [0.0, 10_000.0, 20_000.0, 35_000.0]
    path = vf.write(tmp_path / f"v.{suffix}", times, last_s=36_000)
    clip = read_clip(path, 8, trusted=trusted)
    assert clip.duration_s == pytest.approx(36_000)
    assert vf.numbers_in(clip) == [0, 0, 1, 1, 2, 2, 2, 2]
    assert vf.numbers_in(read_clip(path, at_s=[35_500.0], trusted=trusted)) == [3]


def test_cinepak_only_when_trusted(tmp_path):
    path = vf.write(tmp_path / "v.avi", vf.steady(10), encoder="cinepak", pix_fmt="rgb24")
    assert vf.numbers_in(read_clip(path, 5)) == [1, 3, 5, 7, 9]
    with pytest.raises(VideoError, match="'cinepak' is not allowed"):
        read_clip(path, 5, trusted=False)


def test_a_live_recording_without_a_length(tmp_path):
    for name, sound in (("v.webm", 0.0), ("v.mkv", 3.0)):
        encoder = "libvpx" if name.endswith("webm") else "libx264"
        path = vf.write(
            tmp_path / name, vf.steady(50), encoder=encoder, sound_s=sound, container_options={"live": "1"}
        )
        clip = read_clip(path, 5)
        assert clip.duration_s == pytest.approx(2.0, abs=0.05)
        assert vf.numbers_in(clip) == [5, 15, 25, 35, 45]


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_longer_sound_does_not_lengthen_the_video(tmp_path, suffix):
    path = vf.write(tmp_path / f"v.{suffix}", vf.steady(25), sound_s=4.0)
    clip = read_clip(path, 5)
    assert clip.duration_s == pytest.approx(1.0, abs=0.05)
    assert vf.numbers_in(clip) == [2, 7, 12, 17, 22]


def test_path_bytes_and_file_object_are_the_same(tmp_path):
    path = vf.write(tmp_path / "v.mp4", vf.steady(20))
    data = path.read_bytes()
    clips = [read_clip(source, 4) for source in (path, str(path), data, io.BytesIO(data))]
    with open(path, "rb") as file:
        clips.append(read_clip(file, 4))
    for clip in clips:
        assert torch.equal(clip.frames, clips[0].frames)
        assert clip.info == clips[0].info == probe(path)
    assert clips[0].info.frames == 20


def test_start_end_and_exact_times(tmp_path):
    path = vf.write(tmp_path / "v.mp4", vf.steady(100))
    assert vf.numbers_in(read_clip(path, 4, start_s=1.0, end_s=2.0)) == [28, 34, 40, 46]
    clip = read_clip(path, at_s=[3.0, 1.0])
    assert clip.times_s == (1.0, 3.0)
    assert vf.numbers_in(read_clip(path, 2, start_s=2.0, end_s=99.0)) == [62, 87]
    with pytest.raises(VideoError, match="the part from 98 to 99 s is not in it"):
        read_clip(path, 2, start_s=98.0, end_s=99.0)


def test_max_side_shrinks_and_never_enlarges(tmp_path):
    path = vf.write(tmp_path / "v.mp4", vf.steady(10), size=(320, 180))
    for decoder in ("decord", "pyav"):
        if decoder == "decord":
            pytest.importorskip("decord")
        clip = read_clip(path, 2, max_side=160, decoder=decoder)
        assert clip.frames.shape == (2, 90, 160, 3)
        assert (clip.info.width, clip.info.height) == (320, 180)
        assert vf.numbers_in(clip) == [2, 7]
    assert read_clip(path, 1, max_side=4000).frames.shape == (1, 180, 320, 3)


@pytest.mark.parametrize("name", ["world.mp4", "a.mp4", "b.mp4"])
@pytest.mark.quick(1)
def test_real_videos_are_equal_through_both_decoders(name):
    pytest.importorskip("decord")
    clips = [read_clip(REAL / name, 6, decoder=d, max_side=480) for d in ("pyav", "auto")]
    clips.append(read_clip(REAL / name, 6, trusted=False, max_side=480))
    for clip in clips:
        assert clip.times_s == pytest.approx(clips[0].times_s, abs=1e-5)
        assert (clip.frames.int() - clips[0].frames.int()).abs().float().mean() < 2.0
        assert clip.info == clips[0].info
    full = [read_clip(REAL / "b.mp4", 3, decoder=d).frames for d in ("pyav", "decord")]
    assert torch.equal(*full)


def test_limits_on_length_size_and_codec(tmp_path):
    path = vf.write(tmp_path / "v.mp4", vf.steady(50))
    for limits, words in (
        (Limits(max_duration_s=1.0), "2.0 s, more than the allowed 1 s"),
        (Limits(max_pixels=1000), "192 x 128 pixels exceed"),
        (Limits(max_bytes=100), "exceed the limit of 100"),
        (Limits(codecs=("vp9",)), "'h264' is not allowed"),
    ):
        with pytest.raises(VideoError, match=words):
            read_clip(path, limits=limits)
        with pytest.raises(VideoError, match=words):
            probe(path, limits=limits)


@pytest.mark.skipif(
    not hasattr(os, "sched_getscheduler"), reason="this system has no real-time scheduling to ask for"
)
def test_writing_a_test_video_leaves_the_process_as_it_was(tmp_path):
    vf.need_encoder("libsvtav1")
    vf.write(tmp_path / "v.mp4", vf.steady(2), encoder="libsvtav1")
    assert {os.sched_getscheduler(int(thread)) for thread in os.listdir("/proc/self/task")} == {
        os.SCHED_OTHER
    }
