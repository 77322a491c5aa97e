"""How long tests wait for what must happen: long, since it costs nothing where a machine is quick."""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE_S = 200


def until(happened: Callable[[], object]) -> None:
    """Return as soon as that is true."""
    end = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)
