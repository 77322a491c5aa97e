"""The encoder against golden outputs of the official definition, and the command `encoder.golden`."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from encoder.golden import main
from tests import ROOT

GOLDEN = ROOT / "tests" / "data" / "fluxvit_golden.safetensors"
CASE = "small_16x168_keep512"


def one_case(path: Path, change: float = 0.0) -> Path:
    """A golden file of CASE alone; change: added to one number of its pooled feature."""
    with safe_open(GOLDEN, "pt") as file:
        metadata = {CASE: file.metadata()[CASE]}
    tensors = {k: v for k, v in load_file(GOLDEN).items() if k.startswith(CASE)}
    tensors[f"{CASE}/pooled"][0, 0] += change
    save_file(tensors, path, metadata)
    return path


def test_a_golden_case_matches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(one_case(tmp_path / "one.safetensors"))]) == 0
    assert capsys.readouterr().out.startswith(f"ok   {CASE}: largest difference ")


@pytest.mark.slow
def test_the_command_checks_a_golden_case(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "encoder.golden", str(one_case(tmp_path / "one.safetensors"))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(f"ok   {CASE}: largest difference ")


@pytest.mark.slow
def test_all_golden_cases_match(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(GOLDEN)]) == 0
    assert capsys.readouterr().out.count("ok ") == 4


@pytest.mark.slow
def test_a_changed_reference_is_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(one_case(tmp_path / "wrong.safetensors", change=2e-4))]) == 1
    output = capsys.readouterr().out
    assert "FAIL" in output
    assert "pooled" in output


@pytest.mark.parametrize("content", [None, b"", b"not a golden file"])
def test_unreadable_file_is_one_sentence(
    tmp_path: Path, content: bytes | None, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.safetensors"
    if content is not None:
        path.write_bytes(content)
    assert main([str(path)]) == 2
    assert re.fullmatch(r"Cannot read [^\n]*\.\n", capsys.readouterr().err)
