"""Runs a command that ends with the process it is for, however that ends: ended_with.py PID COMMAND...

It starts the command in its own process group and ends the whole group once it is no longer PID's child: no
handler runs in a process that is killed, so another one must look. Its status is the command's. It imports
the standard library alone, since any interpreter may run this file.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys

LOOK_S = 0.5  # how soon an end is noticed
ENDED_S = 20.0  # what the command may take to end when it is asked to


def run(parent: int, command: list[str]) -> int:
    """The command's status, or no return: the group is killed, with the caller."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # sent to the group, it is meant for the command
    process = subprocess.Popen(command, preexec_fn=_take_signals)
    while os.getppid() == parent:
        try:
            return process.wait(LOOK_S)
        except subprocess.TimeoutExpired:
            continue
    os.killpg(0, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(ENDED_S)
    os.killpg(0, signal.SIGKILL)
    return 1


def _take_signals() -> None:
    """In the command: what is ignored here would be ignored there."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


if __name__ == "__main__":
    status = run(int(sys.argv[1]), sys.argv[2:])
    sys.exit(status if status >= 0 else 128 - status)
