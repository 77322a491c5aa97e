"""Temporary folders: a killed process's is removed by the next one, a living one's is not."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from app.scratch import ScratchFolder

OWNER = """
import sys, time
from pathlib import Path
from app.scratch import ScratchFolder
folder = ScratchFolder("try")
(Path(folder.path) / "video.mp4").write_bytes(b"1")
print(folder.path, flush=True)
time.sleep(60)
"""


def test_what_a_killed_process_leaves_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    theirs = Path(owner.stdout.readline().strip())
    try:
        assert theirs.parent == tmp_path
        first, other = ScratchFolder("try"), ScratchFolder("other")
        assert (theirs / "video.mp4").exists()  # it lives
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        second = ScratchFolder("try")
        assert not theirs.exists()
        assert Path(first.path).exists()
        for folder in (first, second, other):
            folder.remove()
            folder.remove()
        assert list(tmp_path.iterdir()) == []
    finally:
        owner.kill()
        owner.wait()
