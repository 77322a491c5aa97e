"""Videos in which somebody speaks, by espeak-ng, and a speech model that hears what a test tells it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest

from app.speech.listener import Progress
from app.speech.transcript import Line
from encoder.errors import ConfigError
from encoder.video.sound import RATE, Sound

SENTENCES = {1.0: "Two dogs run across the street.", 6.0: "Now it is raining in the city."}


class ToldModel:
    """Hears these lines wherever there is sound at their time."""

    def __init__(self, lines: list[Line]) -> None:
        self.told, self.heard = lines, list[tuple[float, float, str | None]]()

    def check(self, language: str | None) -> None:
        if language == "tlh":
            raise ConfigError("The speech model knows no language 'tlh'.")

    def lines(self, sound: Sound, language: str | None, heard: Progress) -> tuple[list[Line], str]:
        self.heard.append((sound.start_s, sound.seconds, language))
        heard(0.5)
        end_s = sound.start_s + sound.seconds
        found = [line for line in self.told if sound.start_s <= line.start_s < end_s]
        return found, language or ("en" if found else "")


def spoken(text: str, path: Path, voice: str = "en-us", speed: int = 140) -> np.ndarray:
    """A sentence as float samples at RATE. speed: words per minute."""
    subprocess.run(["espeak-ng", "-v", voice, "-s", str(speed), "-w", str(path), text], check=True)
    with av.open(path) as container:
        resampler = av.AudioResampler(format="flt", layout="mono", rate=RATE)
        pieces = [
            out.to_ndarray()[0] for frame in container.decode(audio=0) for out in resampler.resample(frame)
        ]
    return np.concatenate(pieces)


def with_sound(path: Path, samples: np.ndarray) -> Path:
    """A video with these float samples at RATE as its sound."""
    with av.open(path, "w") as container:
        pictures = container.add_stream("libx264", rate=5)
        pictures.width, pictures.height, pictures.pix_fmt = 64, 48, "yuv420p"
        sound = container.add_stream("aac", rate=RATE, layout="mono")
        for number in range(round(len(samples) / RATE * 5)):
            grey = np.full((48, 64, 3), number % 200, np.uint8)
            frame = av.VideoFrame.from_ndarray(grey, format="rgb24")
            frame.pts = number
            container.mux(pictures.encode(frame))
        for begin in range(0, len(samples), 1024):
            block = np.ascontiguousarray(samples[None, begin : begin + 1024].astype(np.float32))
            piece = av.AudioFrame.from_ndarray(block, format="fltp", layout="mono")
            piece.sample_rate, piece.pts = RATE, begin
            container.mux(sound.encode(piece))
        container.mux(pictures.encode(None))
        container.mux(sound.encode(None))
    return path


@pytest.fixture(scope="session")
def talk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten seconds with SENTENCES at their times."""
    if shutil.which("espeak-ng") is None:
        pytest.skip("espeak-ng is not installed")
    folder = tmp_path_factory.mktemp("talk")
    samples = np.zeros(10 * RATE, np.float32)
    for start_s, text in SENTENCES.items():
        said = spoken(text, folder / "said.wav")
        begin = int(start_s * RATE)
        samples[begin : begin + len(said)] = said[: len(samples) - begin]
    return with_sound(folder / "talk.mp4", samples)


@pytest.fixture
def humming(tmp_path: Path) -> Path:
    """Eight seconds of a tone."""
    return with_sound(tmp_path / "hum.mp4", 0.1 * np.sin(np.arange(8 * RATE) * 0.1))


@pytest.fixture
def told() -> Callable[[list[Line]], ToldModel]:
    return ToldModel
