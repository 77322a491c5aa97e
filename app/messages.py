"""The media of a message: what VideoChat takes as a video, and what its user calls it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Media:
    """A video or image in a message. source: as in `VideoChat.ask`. name: what errors call it, or ""."""

    source: Any
    name: str = ""
