"""The encoder against outputs of the official definition, through the command people run."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from encoder.golden import rule_model, rule_pixels
from tests import ROOT

GOLDEN = ROOT / "tests" / "data" / "fluxvit_golden.safetensors"


def run(path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "encoder.golden", str(path)], capture_output=True, text=True)


def test_public_cases_match() -> None:
    done = run(GOLDEN)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok ") == 4


def test_a_changed_reference_is_noticed(tmp_path: Path) -> None:
    from safetensors import safe_open

    with safe_open(GOLDEN, "pt") as file:
        metadata = {"small_16x168_keep512": file.metadata()["small_16x168_keep512"]}
    tensors = {k: v for k, v in load_file(GOLDEN).items() if k.startswith("small_16x168")}
    tensors["small_16x168_keep512/pooled"][0, 0] += 2e-4
    save_file(tensors, tmp_path / "wrong.safetensors", metadata)
    done = run(tmp_path / "wrong.safetensors")
    assert done.returncode == 1
    assert "FAIL" in done.stdout
    assert "pooled" in done.stdout


@pytest.mark.parametrize("content", [None, b"", b"not a golden file"])
def test_unreadable_file_is_one_sentence(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "x.safetensors"
    if content is not None:
        path.write_bytes(content)
    done = run(path)
    assert done.returncode == 2
    assert "Cannot read" in done.stderr
    assert "Traceback" not in done.stderr


def test_forward_of_one_clip_equals_the_batch() -> None:
    """The official model cannot run a batch of one at all."""
    model = rule_model("small")
    pixels = rule_pixels(5, 2, 8, 84)
    with torch.inference_mode():
        both, alone = model(pixels, 100), model(pixels[1:], 100)
    assert torch.equal(both.kept[1], alone.kept[0])
    torch.testing.assert_close(both.split()[1], alone.packed, atol=1e-5, rtol=0)
