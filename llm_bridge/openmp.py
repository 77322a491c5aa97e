"""How the threads that compute for torch on a CPU wait for one another.

Set before torch is loaded, which reads it then. A program sets it for itself, a library does not.
"""

from __future__ import annotations

import os

# Asleep: by default they wait in loops, and where other programs compute too the loops take the cores from
# the very threads that are waited for.
WAITING = {"OMP_WAIT_POLICY": "passive"}


def let_threads_sleep() -> None:
    """Threads of this process and its children sleep while they wait, unless they are told otherwise."""
    for name, value in WAITING.items():
        os.environ.setdefault(name, value)
