"""Starting several processes: their error is one sentence, said once."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests import ROOT
from tests.patience import PATIENCE_S
from training.command_line import _says_it_first


def launched(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(sys.executable, "-m", "training.launch", *options, "--num_machines=1", "--mixed_precision=no"),
            *("--dynamo_backend=no", "-m", "training.umt", "--config", "nowhere.yaml"),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1", **environment},
        timeout=PATIENCE_S,
    )


@pytest.mark.slow
@pytest.mark.parametrize("options", [("--cpu", "--num_processes=1"), ("--multi_gpu", "--num_processes=2")])
def test_an_error_of_all_processes_is_one_sentence(options: tuple[str, ...]) -> None:
    done = launched(*options, MASTER_PORT="29551")
    assert done.returncode == 2
    assert done.stderr.count("Cannot read the recipe nowhere.yaml") == 1
    assert "Traceback" not in done.stderr
    assert "ChildFailedError" not in done.stderr


def test_one_process_of_a_launch_speaks(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert _says_it_first("It is so.")
    assert _says_it_first("It is so.")  # alone
    for name, value in (("WORLD_SIZE", "2"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    assert [_says_it_first(text) for text in ("It is so.", "It is so.", "Another.")] == [True, False, True]
    for mark in tmp_path.iterdir():
        os.utime(mark, (0, 0))
    assert _says_it_first("It is so.")
