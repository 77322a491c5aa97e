"""Where downloaded and converted files are kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """`$FLUXCHAT_CACHE`, or `fluxchat` in the user's cache folder; not created here."""
    if override := os.environ.get("FLUXCHAT_CACHE"):
        return Path(override).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "fluxchat"
