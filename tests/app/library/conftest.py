"""Small videos of one colour each, and an embedder that sees colours: what is nearest is known."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from training.synthetic.export import write_video

# Found, not imported: that is for what is tested.
collect_ignore = [] if find_spec("lancedb") else ["test_library.py", "test_commands.py"]
COLOURS = {"red": (250, 20, 20), "green": (20, 250, 20), "blue": (20, 20, 250), "white": (250, 250, 250)}


class ColourEmbedder:
    """A clip is its mean colour, a text the colour that it names."""

    name, frames = "colours", 2

    def __init__(self, fingerprint: str = "c0") -> None:
        self.fingerprint = fingerprint
        self.seen = 0  # clips

    def embed_clips(self, clips: Sequence[Tensor]) -> Tensor:
        self.seen += len(clips)
        return F.normalize(torch.stack([clip.float().mean((0, 1, 2)) for clip in clips]) - 100, dim=-1)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        return F.normalize(torch.tensor([COLOURS[text] for text in texts]).float() - 100, dim=-1)

    def count_tokens(self, texts: Sequence[str]) -> int:
        return len(texts)


def film(path: Path, colours: Iterable[str]) -> Path:
    """Two seconds of each colour."""
    pictures = [np.full((32, 32, 3), COLOURS[colour], np.uint8) for colour in colours for _ in range(8)]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, np.stack(pictures), 4)
    return path


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """A folder with a red, a green and a blue video in it, and one that turns from white to red."""
    folder = tmp_path / "videos"
    for colour in ("red", "green", "blue"):
        film(folder / f"{colour}.mp4", [colour])
    film(folder / "deep er" / "it's two.mp4", ["white", "red"])
    return folder


@pytest.fixture
def colours() -> Callable[..., ColourEmbedder]:
    return ColourEmbedder
