"""The sound of a video: 16 kHz mono, each sample at its time, from the child that decodes pictures."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
import torch

from encoder.errors import VideoError
from encoder.video.sound import RATE, read_sound
from tests.encoder.video import video_files as vf

SECONDS, CLICK_S = 6, 4.0


def talking(path: Path, codec: str = "pcm_s16le", rate: int = 44100, late_s: float = 0.0) -> Path:
    """A video whose sound is silent but for a tenth of a second at CLICK_S. late_s: when the sound begins."""
    with av.open(path, "w") as container:
        pictures = container.add_stream("mpeg4", rate=10)
        pictures.width, pictures.height, pictures.pix_fmt = 64, 48, "yuv420p"
        sound = container.add_stream(codec, rate=rate, layout="stereo")
        for number in range(SECONDS * 10):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), number, np.uint8), format="rgb24")
            frame.pts = number
            container.mux(pictures.encode(frame))
        samples = np.zeros((2, SECONDS * rate), np.float32)
        at = int(CLICK_S * rate)
        samples[:, at : at + rate // 10] = 0.5 * np.sin(np.arange(rate // 10) * 2 * np.pi * 440 / rate)
        first = int(late_s * rate)
        for begin in range(first, samples.shape[1], 1024):
            block = np.ascontiguousarray(samples[:, begin : begin + 1024])
            piece = av.AudioFrame.from_ndarray(block, format="fltp", layout="stereo")
            piece.sample_rate, piece.pts = rate, begin
            for out in av.AudioResampler(format=sound.format.name, layout="stereo", rate=rate).resample(
                piece
            ):
                out.pts = begin
                container.mux(sound.encode(out))
        container.mux(pictures.encode(None))
        container.mux(sound.encode(None))
    return path


def click_s(samples: torch.Tensor) -> float:
    """When it becomes loud, seconds from the first sample."""
    return int((samples.abs() > 2000).nonzero()[0, 0]) / RATE


@pytest.mark.parametrize("trusted", [True, False])
@pytest.mark.parametrize(
    ("name", "codec", "rate"),
    [("a.mkv", "pcm_s16le", 44100), ("a.mp4", "aac", 48000), ("a.mkv", "flac", 22050)],
)
def test_every_sample_is_at_its_time(tmp_path: Path, name: str, codec: str, rate: int, trusted: bool) -> None:
    sound = read_sound(talking(tmp_path / name, codec, rate), trusted=trusted)
    assert sound is not None
    assert sound.samples.dtype == torch.int16
    assert sound.seconds == pytest.approx(SECONDS, abs=0.15)
    assert click_s(sound.samples) == pytest.approx(CLICK_S, abs=0.06)


def test_a_part_begins_where_it_is_asked_to(tmp_path: Path) -> None:
    path = talking(tmp_path / "a.mkv")
    sound = read_sound(path, 2.5, 5.0)
    assert sound is not None
    assert (sound.start_s, sound.seconds) == (2.5, pytest.approx(2.5, abs=0.01))
    assert click_s(sound.samples) == pytest.approx(CLICK_S - 2.5, abs=0.06)


def test_sound_that_begins_late_is_silent_before(tmp_path: Path) -> None:
    sound = read_sound(talking(tmp_path / "a.mkv", late_s=3.0))
    assert sound is not None
    assert click_s(sound.samples) == pytest.approx(CLICK_S, abs=0.06)


def test_what_has_no_sound_is_none(tmp_path: Path) -> None:
    assert read_sound(vf.write(tmp_path / "silent.mp4", vf.steady(10))) is None
    assert read_sound(torch.zeros(4, 8, 8, 3, dtype=torch.uint8).numpy()) is None


def test_wrong_inputs_are_one_sentence(tmp_path: Path) -> None:
    path = talking(tmp_path / "a.mkv", "pcm_s32le")
    assert read_sound(path) is not None
    with pytest.raises(VideoError, match=r"Cannot listen to .*'pcm_s32le' is not allowed here"):
        read_sound(path, trusted=False)
    with pytest.raises(VideoError, match="after its start"):
        read_sound(path, 3.0, 3.0)
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    with pytest.raises(VideoError, match="Cannot listen to"):
        read_sound(tmp_path / "bad.mp4")


def test_sound_that_is_cut_off_is_read_up_to_there(tmp_path: Path) -> None:
    cut = vf.truncated(talking(tmp_path / "a.mkv"), tmp_path / "cut.mkv", 0.8)
    sound = read_sound(cut)
    assert sound is not None
    assert 3.0 < sound.seconds < SECONDS
    assert click_s(sound.samples) == pytest.approx(CLICK_S, abs=0.06)
