"""The hub's cache in a folder of a test, with models that were made and not downloaded."""

from __future__ import annotations

import shutil
from pathlib import Path

COMMIT = "a" * 40


def put(cache: Path, name: str, model: Path) -> Path:
    """A model folder as if it had been downloaded under that name; the folder of its snapshot."""
    place = cache / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(COMMIT)
    (place / "blobs").mkdir()
    return Path(shutil.copytree(model, place / "snapshots" / COMMIT))
