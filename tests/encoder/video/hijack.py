"""A decoder that a file has taken over: code of the test's runs in the child in place of its `answer`."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from encoder.video import reader, sandbox

FREE = """
def free(untrusted, last=lambda: None):
    last()
    return dw.Confinement(seccomp=True)
dw.confine = free
"""


@contextmanager
def hijacked(code: str, folder: Path, *, confined: bool = True, **options: Any) -> Iterator[None]:
    """New children run `code`, which sees `decode_worker` as dw.

    confined=False: they do not confine themselves. options: for the child's Popen, in place of the real ones.
    """
    script = folder / "hijack.py"
    script.write_text("from encoder.video import worker as dw\n" + ("" if confined else FREE) + code)
    real = subprocess.Popen

    def popen(arguments: list[str], **given: Any) -> Any:
        run = f"; exec(open({str(script)!r}).read()); main()"
        return real([a.replace("; main()", run) for a in arguments], **{**given, **options})

    reader._sandbox.close()  # children that wait for the next file are not hijacked
    try:
        with mock.patch.object(sandbox.subprocess, "Popen", popen):
            yield
    finally:
        reader._sandbox.close()
