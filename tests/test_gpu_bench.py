"""The script that runs on a GPU works before there is one: on a CPU, with what a bare machine has."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT

ABSENT = ("pydantic", "av", "decord", "gguf", "bitsandbytes", "gradio", "sentencepiece", "fastapi")
BLOCKED = f"""
import importlib.machinery, runpy, sys

found = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = lambda name, *rest: (
    None if name.split(".")[0] in {ABSENT} else found(name, *rest)
)
sys.argv = ["gpu", *sys.argv[1:]]
runpy.run_module("tests.bench.gpu", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_part_runs_without_what_a_bare_machine_lacks(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-c", BLOCKED, "--device", "cpu", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=850)
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr[-3000:]
    assert result == json.loads(out.read_text())
    assert result["tiny"]
    for case in result["golden"].values():
        assert not isinstance(case, dict) or case["float32_difference"] < 1e-4
    for way in ("plain", "compiled"):
        assert all(result["encoder"]["micro"][way][keep]["clips_per_s"] > 0 for keep in ("512", "128"))
    made = [
        [row["tokens"] for row in result[part].values() if isinstance(row, dict)]
        for part in ("decode", "decode_static")
    ]
    assert min(made[0]) > 0
    assert made[0] == made[1]
    assert result["umt_saving"]["batch"] > result["umt"]["batch"]
    assert result["umt_saving"]["loss_last"] < result["umt_saving"]["loss_first"]


def test_a_machine_without_an_accelerator_is_told_so(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    from tests.bench.gpu import main

    if torch.accelerator.is_available():
        pytest.skip("there is an accelerator")
    assert main([]) == 2
    assert "--device cpu" in capsys.readouterr().err
