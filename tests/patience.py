"""How long tests wait for what must happen: long, since it costs nothing where a machine is quick."""

from __future__ import annotations

import time
from collections.abc import Callable

import psutil

PATIENCE_S = 200


def until(happened: Callable[[], object]) -> None:
    """Return as soon as that is true."""
    end = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def ended(pid: int) -> bool:
    """Whether that process is gone, or only waits for its parent to notice."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
