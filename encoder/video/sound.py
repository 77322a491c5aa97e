"""The sound of a video, for those who listen to speech.

    sound = read_sound("talk.mp4")     # Sound(samples (N,) int16 at 16 kHz, start_s), None without sound

It is decoded in the confined child that decodes pictures (sandbox.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from encoder.errors import VideoError
from encoder.video.in_memory import is_images
from encoder.video.limits import DEFAULT_LIMITS, Limits
from encoder.video.reader import sound_of
from encoder.video.sound_decoder import RATE
from encoder.video.sources import open_source, source_label

__all__ = ["RATE", "Sound", "read_sound"]


@dataclass(frozen=True)
class Sound:
    """samples: int16 (N,), mono, RATE per second. start_s: where in the video they begin, seconds."""

    samples: Tensor
    start_s: float

    @property
    def seconds(self) -> float:
        """How long it is."""
        return len(self.samples) / RATE


def read_sound(
    source: Any,
    start_s: float = 0.0,
    end_s: float | None = None,
    *,
    trusted: bool = True,
    limits: Limits = DEFAULT_LIMITS,
    name: str | None = None,
) -> Sound | None:
    """The sound of a video from start_s to end_s (default: its end), in step with its pictures.

    None for what has no sound: silent videos, pictures, images in memory. source, trusted, limits, name: as
    in `read_clip`. Raises VideoError: one sentence, what was wrong and what to do.
    """
    if not 0 <= start_s < (float("inf") if end_s is None else end_s):
        raise VideoError("The sound's end must be after its start, and both from 0 up.")
    if is_images(source):
        return None
    name = name or source_label(source)
    with open_source(source, limits, name) as file:
        data = sound_of(file, start_s, end_s, trusted, limits, name)
    return Sound(torch.frombuffer(data, dtype=torch.int16), start_s) if data else None
