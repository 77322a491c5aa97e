"""The loop: exact resume, kills, signals, bad steps, ranks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from encoder.errors import CheckpointError, ConfigError, DataError
from tests.training.toy_stage import ToyStage, configs
from training.loop import train, trainable_state


def losses(out: Path) -> list[float]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def run(out: Path, **changes) -> list[float]:
    resume = changes.pop("resume", False)
    stage = ToyStage(poison=changes.pop("poison", -1))
    return train(stage, *configs(out, **changes), resume=resume).losses


def command(out: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.training.toy_stage", str(out), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment, "OMP_NUM_THREADS": "1"},
    )


def test_training_learns_and_leaves_a_record(tmp_path: Path) -> None:
    found = run(tmp_path, evaluate_every=10)
    assert len(found) == 20
    assert found == losses(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "eval/weight" in row] == [10, 20]
    assert {"grad_norm", "lr", "samples_per_s", "mean", "skipped"} <= rows[0].keys()
    assert (tmp_path / "done.txt").exists()
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == [
        "step_00000016",
        "step_00000020",
    ]
    saved = load_file(tmp_path / "checkpoints" / "step_00000020" / "trainable.safetensors")
    assert saved.keys() == trainable_state(ToyStage().model).keys()
    assert not any(name.startswith("frozen") for name in saved)


@pytest.mark.parametrize("stop", [1, 4, 7, 19])
def test_resumed_losses_are_bit_equal(tmp_path: Path, stop: int) -> None:
    whole = run(tmp_path / "whole")
    settings = {"checkpoint_every": 1, "keep_checkpoints": 20}
    run(tmp_path / "parts", **settings)
    for step in range(stop + 1, 21):
        shutil.rmtree(tmp_path / "parts" / "checkpoints" / f"step_{step:08d}")
    assert run(tmp_path / "parts", **settings, resume=True) == whole[stop:]
    assert losses(tmp_path / "parts") == whole


def test_signal_saves_and_resume_continues_exactly(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    process = command(tmp_path / "cut", "pause_s=0.1")
    assert process.stderr is not None
    while not (tmp_path / "cut" / "checkpoints" / "step_00000004").exists():
        assert process.poll() is None, process.stderr.read()
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    done = len(losses(tmp_path / "cut"))
    assert 4 <= done < 20
    assert not (tmp_path / "cut" / "done.txt").exists()
    assert run(tmp_path / "cut", resume=True) == whole[done:]
    assert losses(tmp_path / "cut") == whole


def test_kill_in_the_middle_of_a_checkpoint(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    process = command(tmp_path / "cut", SLOW_SAVE="1")
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "SAVING"
    process.kill()
    process.wait(30)
    names = {p.name for p in (tmp_path / "cut" / "checkpoints").iterdir()}
    assert "step_00000012" not in names
    assert run(tmp_path / "cut", resume=True) == whole[8:]
    assert losses(tmp_path / "cut") == whole


def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path: Path) -> None:
    stage = ToyStage(poison=10)
    result = train(stage, *configs(tmp_path))
    assert result.skipped == 1
    assert sum(loss != loss for loss in result.losses) == 1
    assert all(torch.isfinite(p).all() for p in stage.model.parameters())


def test_accumulation_equals_one_large_batch(tmp_path: Path) -> None:
    small = ToyStage()
    small.model.net[2].p = 0.0

    class Large(ToyStage):
        def batch(self, index: int):
            parts = [ToyStage.batch(self, 2 * index + part) for part in range(2)]
            return tuple(map(torch.cat, zip(*parts, strict=True)))

    large = Large()
    large.micro_batches = 20
    large.model.net[2].p = 0.0
    two = train(small, *configs(tmp_path / "two")).losses
    one = train(large, *configs(tmp_path / "one", micro_batch=8)).losses
    assert two == pytest.approx(one, rel=1e-5)


def test_a_second_run_does_not_overwrite_the_first(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(DataError, match="--resume"):
        run(tmp_path)


def test_another_recipes_checkpoint_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    stage = ToyStage()
    stage.model.net = torch.nn.Sequential(torch.nn.Linear(4, 1))
    with pytest.raises(CheckpointError, match="another recipe"):
        train(stage, *configs(tmp_path), resume=True)


def test_batches_must_divide(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="multiple of micro_batch"):
        configs(tmp_path, micro_batch=3)


def test_two_processes_train_like_one(tmp_path: Path) -> None:
    one = run(tmp_path / "one")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node=2",
            "--master-port=29517",
            "-m",
            "tests.training.toy_stage",
            str(tmp_path / "two"),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert losses(tmp_path / "two") == pytest.approx(one, rel=1e-5)
