"""A decoder that its file has taken over: the decoding child runs code of the test in place of `answer`."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from encoder.video import sandbox
from encoder.video.reader import close_idle_workers

FREE = """
def free(untrusted, last=lambda: None):
    last()
    return dw.Confinement(seccomp=True)
dw.confine = free
"""


@contextmanager
def hijacked(code: str, folder: Path, *, confined: bool = True, **options: Any) -> Iterator[None]:
    """New children run `code`, which sees `encoder.video.worker` as dw.

    confined=False: they do not confine themselves. options: for the child's Popen, in place of the real ones.
    """
    script = folder / "hijack.py"
    script.write_text("from encoder.video import worker as dw\n" + ("" if confined else FREE) + code)
    real = subprocess.Popen

    def popen(arguments: list[str], **real_options: Any) -> Any:
        run = f"; exec(open({str(script)!r}).read()); main()"
        return real([a.replace("; main()", run) for a in arguments], **{**real_options, **options})

    close_idle_workers()  # children that wait for the next file are not hijacked
    try:
        with mock.patch.object(sandbox.subprocess, "Popen", popen):
            yield
    finally:
        close_idle_workers()
