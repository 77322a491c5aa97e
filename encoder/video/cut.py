"""Cut a part out of a video into a file of its own, without coding it again.

    cut("film.mp4", 65, "1:20", "scene.mp4")    # CutPart(start_s=64.0, end_s=80.0, sound=True)

The part begins at the last key frame at or before the wanted start. The video is read in the confined child
that decodes all videos (sandbox.py); the child hands over the new file's bytes, and this process writes them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from encoder.checkpoint import atomic_path
from encoder.errors import VideoError
from encoder.video.clock import interval
from encoder.video.in_memory import is_images
from encoder.video.limits import DEFAULT_LIMITS, Limits
from encoder.video.protocol import CutPart
from encoder.video.reader import cut_file
from encoder.video.remux import MUXERS
from encoder.video.sources import open_source, reason, source_label

__all__ = ["CutPart", "cut"]


def cut(
    source: Any,
    start: float | str,
    end: float | str,
    out: str | os.PathLike[str],
    *,
    trusted: bool = True,
    limits: Limits = DEFAULT_LIMITS,
    name: str | None = None,
    overwrite: bool = False,
) -> CutPart:
    """Copy the part of a video from start to end into the file `out`, sound included where it fits in.

    source: path, bytes or binary file object. start, end: seconds, or "1:02" and "1:23:45.5"; an end beyond
    the video's is its end. out: its suffix says the container (.mp4, .mov, .mkv, .webm, .ts, .avi). trusted,
    limits, name: as in `read_clip`; a part of more than a third of `limits.memory_mib` is refused.
    The CutPart that is returned says where it really begins. `out` is written atomically or not at all.
    Raises VideoError: one sentence, what was wrong and what to do.
    """
    start_s, end_s = interval(start, end)
    target = Path(out)
    _check_target(target, source, overwrite)
    if is_images(source):
        raise VideoError("Pictures in memory cannot be cut: give a video file.")
    name = name or source_label(source)
    try:
        with open_source(source, limits, name) as file, atomic_path(target) as temporary:
            if target.exists() and os.path.samestat(os.fstat(file.descriptor), os.stat(target)):
                raise VideoError(f"Cannot write {target.name!r}: it is the video itself; name another file.")
            with open(temporary, "wb") as new:
                return cut_file(
                    file, start_s, end_s, MUXERS[target.suffix.lower()], new, trusted, limits, name
                )
    except OSError as error:
        raise VideoError(f"Cannot write {target.name!r}: {reason(error)}; name another place.") from error


def _check_target(target: Path, source: Any, overwrite: bool) -> None:
    """Raises VideoError for a new file that cannot be."""
    if target.suffix.lower() not in MUXERS:
        raise VideoError(f"The new file's name must end in one of {', '.join(MUXERS)}, not {target.name!r}.")
    if target.is_dir():
        raise VideoError(f"Cannot write {target.name!r}: it is a folder; name a file in it.")
    if target.exists() and not overwrite:
        raise VideoError(
            f"Cannot write {target.name!r}: that file exists; name another, or write over it (--force)."
        )
