"""Temporary folders: a killed process's is removed by the next one, a living one's is not."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llm_bridge.assets.scratch import ScratchFolder

OWNER = """
import sys, time
from pathlib import Path
from llm_bridge.assets.scratch import ScratchFolder
folder = ScratchFolder("fluxchat-try-")
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
        first, other = ScratchFolder("fluxchat-try-"), ScratchFolder("fluxchat-other-")
        assert (theirs / "video.mp4").exists()  # it lives
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        second = ScratchFolder("fluxchat-try-")
        assert not theirs.exists()
        assert Path(first.path).exists()
        for folder in (first, second, other):
            folder.remove()
            folder.remove()
        assert list(tmp_path.iterdir()) == []
    finally:
        owner.kill()
        owner.wait()


MAKER = """
import sys
from llm_bridge.assets.scratch import ScratchFolder
print("ready", flush=True)
sys.stdin.readline()
for _ in range(200):
    with ScratchFolder("try-", sys.argv[1]) as folder:
        (folder / "file").write_text("1")
        assert (folder / "file").read_text() == "1"
"""


def test_nobody_removes_what_another_is_just_making(tmp_path: Path) -> None:
    makers = [
        subprocess.Popen(
            [sys.executable, "-c", MAKER, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for maker in makers:
        assert maker.stdout is not None
        assert maker.stdout.readline() == "ready\n"
    for maker in makers:
        assert maker.stdin is not None
        maker.stdin.write("\n")
        maker.stdin.flush()
    for maker in makers:
        maker.communicate()
        assert maker.returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_without_locks_nothing_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_here(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("llm_bridge.assets.scratch.fcntl.flock", none_here)
    (tmp_path / "try-old").mkdir()
    with ScratchFolder("try-", tmp_path) as folder:
        assert folder.is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["try-old"]


def test_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("")
    (tmp_path / "try-link").symlink_to(tmp_path / "kept")
    with ScratchFolder("try-", tmp_path):
        assert (tmp_path / "kept" / "file").exists()
