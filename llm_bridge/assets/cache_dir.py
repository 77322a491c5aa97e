"""The cache folder of downloaded, converted and measured files, and small JSON files in it.

Contents of a cache file are validated or ignored, and a cache that cannot be written is done without: nothing
that works without a cache may fail because of it.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from encoder.errors import FluxChatError, ModelError
from encoder.json_files import read_object

T = TypeVar("T")


def cache_dir() -> Path:
    """`$FLUXCHAT_CACHE`, or `fluxchat` in the user's cache folder; not created here.

    Raises ModelError where the user has no home folder and names none.
    """
    try:
        if override := os.environ.get("FLUXCHAT_CACHE"):
            return Path(override).expanduser()
        base = Path(os.environ.get("XDG_CACHE_HOME") or "")
        if not base.is_absolute():  # of XDG's rule: a relative one is ignored
            base = Path.home() / ".cache"
    except (RuntimeError, KeyError):  # neither HOME nor an entry for this user
        base = Path()
    if not base.is_absolute():
        raise ModelError(
            "This user has no home folder to keep files in: set FLUXCHAT_CACHE to one that can be written."
        )
    return base / "fluxchat"


def read_cached(name: str, check: Callable[[dict[str, Any]], T]) -> T | None:
    """The JSON object in the cache's file `name`, converted by `check`; None if there is no valid one.

    check: raises ValueError, KeyError or TypeError for what this version does not write.
    """
    try:
        return check(read_object(cache_dir() / name))
    except (OSError, ValueError, KeyError, TypeError, FluxChatError):
        return None


def write_cached(name: str, values: object) -> None:
    """Keep a JSON object in the cache's file `name`, whole or not at all; logs once where that cannot be."""
    from encoder.checkpoint import save_json

    try:
        save_json(values, cache_dir() / name)
    except (OSError, FluxChatError) as error:
        _warn_once(getattr(error, "strerror", None) or str(error))


@functools.cache
def _warn_once(reason: str) -> None:
    logging.getLogger(__name__).warning("Nothing is kept in the cache folder: %s.", reason.rstrip("."))
