"""The guard against tests that write into the repository, in a small repository of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import leftovers

WRITES = """
from pathlib import Path

def test_it():
    Path("OUT").mkdir()
    Path("OUT/found.json").touch()
"""


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "leftovers", *options]
    alone = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # others take long to import
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=alone)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    shutil.copy(leftovers.__file__, tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / ".gitignore").write_text("__pycache__/\n*.tmp\n")
    (tmp_path / "notes.txt").write_text("There before the tests.")
    if shutil.which("git") is None:
        pytest.skip("needs git")
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    return tmp_path


@pytest.mark.parametrize("options", [(), ("-p", "xdist", "-n", "2")], ids=["one process", "workers"])
@pytest.mark.quick(1)
def test_a_file_left_behind_fails_the_run(repository: Path, options: tuple[str, ...]) -> None:
    (repository / "test_writes.py").write_text(WRITES)
    found = run(repository, *options)
    assert found.returncode == 1
    assert "1 passed" in found.stdout
    assert "left files in the repository: OUT/found.json\n" in found.stdout


def test_ignored_files_and_no_files_pass(repository: Path) -> None:
    (repository / "test_writes.py").write_text(WRITES.replace("OUT/found.json", "OUT/found.tmp"))
    assert run(repository).returncode == 0


def test_without_git_nothing_is_said(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (repository / "test_writes.py").write_text(WRITES)
    monkeypatch.setenv("PATH", "")
    assert run(repository).returncode == 0
