"""The loop: exact resume, kills, signals, bad steps, ranks."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from encoder.errors import CheckpointError, ConfigError, DataError, FluxChatError
from llm_bridge.assets.write_lock import WriteLock
from tests.patience import PATIENCE_S
from tests.training.trainer.toy_stage import ToyStage, configs
from training.trainer import loop
from training.trainer.checkpoints import Progress, checkpoints, load_weights, trainable_state
from training.trainer.loop import train
from training.trainer.optim import parameter_groups


def losses(out: Path) -> list[float]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def run(out: Path, **changes) -> list[float]:
    resume = changes.pop("resume", False)
    stage = ToyStage(poison=changes.pop("poison", -1))
    return train(stage, *configs(out, **changes), resume=resume).losses


def command(out: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.training.trainer.toy_stage", str(out), *arguments],
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
    assert (tmp_path / "model.safetensors").exists()
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == [
        "step_00000016",
        "step_00000020",
    ]
    saved = load_file(tmp_path / "checkpoints" / "step_00000020" / "trainable.safetensors")
    assert saved.keys() == trainable_state(ToyStage().model).keys()
    assert not any(name.startswith("frozen") for name in saved)


@pytest.mark.parametrize("stop", [7, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 4, 19))])
def test_resumed_losses_are_bit_equal(tmp_path: Path, stop: int) -> None:
    whole = run(tmp_path / "whole")
    settings = {"checkpoint_every": 1, "keep_checkpoints": 20}
    run(tmp_path / "parts", **settings)
    for step in range(stop + 1, 21):
        shutil.rmtree(tmp_path / "parts" / "checkpoints" / f"step_{step:08d}")
    assert run(tmp_path / "parts", **settings, resume=True) == whole[stop:]
    assert losses(tmp_path / "parts") == whole


def test_signal_saves_and_resume_continues_exactly(tmp_path: Path) -> None:
    class Interrupted(ToyStage):
        """Gets a signal while its batch 14 is made."""

        def batch(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
            if index == 14:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().batch(index)

    whole = run(tmp_path / "whole")
    assert not train(Interrupted(), *configs(tmp_path / "cut")).finished
    done = len(losses(tmp_path / "cut"))
    assert 4 <= done < 20
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    assert run(tmp_path / "cut", resume=True) == whole[done:]
    assert losses(tmp_path / "cut") == whole


@pytest.mark.slow
def test_kill_in_the_middle_of_a_checkpoint(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    process = command(tmp_path / "cut", SLOW_SAVE="1")
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "SAVING"
    process.kill()
    process.wait(PATIENCE_S)
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


class LabelledStage(ToyStage):
    """A toy whose micro-batches `without` have no labels, and so a loss of 0."""

    def __init__(self, without: range) -> None:
        super().__init__()
        self.without = without
        forward = self.model.forward

        def labelled(batch: tuple[torch.Tensor, torch.Tensor, bool]):
            loss, figures = forward(batch[:2])
            return loss * batch[2], {**figures, "label_tokens": float(batch[2])}

        self.model.forward = labelled  # type: ignore[method-assign]

    def batch(self, index: int):
        return *super().batch(index), index not in self.without


def test_micro_batches_without_labels_add_nothing_and_a_step_of_them_is_skipped(tmp_path: Path) -> None:
    stage = LabelledStage(range(9, 12))  # half of step 5, and all of step 6
    settings = {"checkpoint_every": 1, "keep_checkpoints": 20, "weight_decay": 0.5}
    result = train(stage, *configs(tmp_path, **settings))
    assert result.skipped == 1
    assert result.losses[5] == 0
    assert result.losses[4] > 0
    before, skipped, after = (
        load_file(tmp_path / "checkpoints" / f"step_{step:08d}" / "trainable.safetensors")
        for step in (5, 6, 7)
    )
    # Neither momentum nor decay moved anything.
    assert all(torch.equal(before[name], skipped[name]) for name in before)
    assert not all(torch.equal(after[name], skipped[name]) for name in before)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (lambda: LabelledStage(range(99)), "None of the 2 steps held anything to learn"),
        (lambda: ToyStage(poison=range(99)), "All 2 steps were skipped, since no loss"),
        (lambda: ToyStage(poison=range(2, 4)), "not finite at the end, in step 2"),
    ],
)
def test_a_run_that_learnt_nothing_or_ended_in_ruins_says_so(tmp_path: Path, stage, message: str) -> None:
    for resume in (False, True):  # a second look at the finished run does not make it a good one
        with pytest.raises(FluxChatError, match=message):
            train(stage(), *configs(tmp_path, max_steps=2), resume=resume)
        assert not (tmp_path / "model.safetensors").exists()
        assert checkpoints(tmp_path)


def test_a_checkpoint_of_the_last_version_is_continued(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    run(tmp_path / "old", max_steps=8)
    state = tmp_path / "old" / "checkpoints" / "step_00000008" / "state.json"
    known = json.loads(state.read_text())
    for name in ("finite", "empty"):
        del known[name]
    state.write_text(json.dumps(known))
    assert len(whole) == 20
    assert len(run(tmp_path / "old", resume=True)) == 12


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


def test_two_runs_at_once_do_not_share_a_folder(tmp_path: Path) -> None:
    class Nested(ToyStage):
        """Starts another run of the same folder when it is evaluated."""

        def evaluate(self) -> dict[str, float]:
            with pytest.raises(ConfigError, match="Another process is writing into"):
                run(tmp_path, resume=True)
            return {}

    train(Nested(), *configs(tmp_path, max_steps=2, evaluate_every=1))
    assert len(losses(tmp_path)) == 2
    assert not (tmp_path / "writing.lock").exists()


def test_no_other_run_writes_between_what_is_resumed_and_the_resumed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, max_steps=8)

    def load(*arguments: Any) -> Progress:
        with (
            pytest.raises(ConfigError, match="Another process is writing into"),
            WriteLock(tmp_path / "writing.lock", "it"),
        ):
            pass
        return load_weights(*arguments)

    monkeypatch.setattr("training.trainer.loop.load_weights", load)
    run(tmp_path, resume=True)


@pytest.mark.parametrize("failing", ["save_tensors", "torch.save"])
def test_a_full_disk_costs_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    whole = run(tmp_path / "full", keep_checkpoints=9)
    for step in (8, 12, 16, 20):
        shutil.rmtree(tmp_path / "full" / "checkpoints" / f"step_{step:08d}")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device") if failing == "save_tensors" else RuntimeError("pos")

    with monkeypatch.context() as patched:
        patched.setattr(f"training.trainer.checkpoints.{failing}", full)
        with pytest.raises(CheckpointError, match=r"Cannot write a checkpoint into .*; make room"):
            run(tmp_path / "full", resume=True)
    assert [path.name for path in (tmp_path / "full" / "checkpoints").iterdir()] == ["step_00000004"]
    assert run(tmp_path / "full", resume=True) == whole[4:]


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"Cannot make the folder .*file/run: Not a directory"):
        run(tmp_path / "file" / "run")


def test_another_recipes_checkpoint_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    stage = ToyStage()
    stage.model.net = torch.nn.Sequential(torch.nn.Linear(4, 1))
    with pytest.raises(CheckpointError, match="another recipe"):
        train(stage, *configs(tmp_path), resume=True)


def test_evaluation_is_in_evaluation_mode_without_gradients(tmp_path: Path) -> None:
    class Watching(ToyStage):
        def evaluate(self) -> dict[str, float]:
            modes = [module.training for module in self.model.modules()]
            return {"training": float(any(modes)), "graph": float(torch.is_grad_enabled())}

    train(Watching(), *configs(tmp_path, evaluate_every=5))
    assert figures(tmp_path, "eval/training") == [0.0] * 4
    assert figures(tmp_path, "eval/graph") == [0.0] * 4


def test_evaluation_computes_in_the_recipes_precision(tmp_path: Path) -> None:
    class Watching(ToyStage):
        def evaluate(self) -> dict[str, float]:
            return {"half": float(self.model.net[0](torch.ones(1, 4)).dtype == torch.bfloat16)}

    train(Watching(), *configs(tmp_path, evaluate_every=20, precision="bf16"))
    assert figures(tmp_path, "eval/half") == [1.0]


def test_batches_must_divide(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="multiple of micro_batch"):
        configs(tmp_path, micro_batch=3)


def processes(out: Path, *arguments: str, port: int = 29517, **environment: str) -> None:
    """Two processes over gloo train the toy stage."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"),
            *("-m", "tests.training.trainer.toy_stage", str(out), *arguments),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1", **environment},
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def figures(out: Path, name: str) -> list[float]:
    return [
        row[name] for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if name in row
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sharded", "port"),
    [("", 29517), ("1", 29518)],
    ids=["ddp", "fsdp"],
)
def test_two_processes_train_like_one(tmp_path: Path, sharded: str, port: int) -> None:
    """Each process accumulates two of a step's four micro-batches."""
    settings = {"batch_size": 16, "evaluate_every": 5}
    one = run(tmp_path / "one", **settings)
    poisoned = run(tmp_path / "poisoned", **settings, poison=14)
    processes(
        *(tmp_path / "two", "batch_size=16", "evaluate_every=5", "poison=14"), port=port, SHARDED=sharded
    )
    two = losses(tmp_path / "two")
    assert two[:3] == pytest.approx(one[:3], rel=1e-5)
    # Step 4 is not finite on the second process alone: both skip it, and count it.
    assert two[3] != two[3]
    assert figures(tmp_path / "two", "skipped") == [0] * 3 + [1] * 7
    assert two[4:] == pytest.approx(poisoned[4:], rel=1e-5)
    assert two[4:] != pytest.approx(one[4:], rel=1e-5)
    for name in ("grad_norm", "grad_norm/net.0", "grad_norm/net.3", "mean", "eval/weight"):
        wanted = figures(tmp_path / "poisoned", name)
        assert figures(tmp_path / "two", name) == pytest.approx(wanted, rel=1e-4, nan_ok=True), name
    # What the run leaves is whole, whoever held which part of it.
    found, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "poisoned"))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second", "port"),
    [("two", "one", 29521), ("one", "two", 29522)],
    ids=["shrink", "grow"],
)
def test_a_sharded_run_continues_on_another_number_of_processes(
    tmp_path: Path, first: str, second: str, port: int
) -> None:
    whole = run(tmp_path / "whole")

    def train_on(count: str, out: Path, *arguments: str) -> None:
        if count == "two":
            processes(out, *arguments, port=port, SHARDED="1")
        else:
            assert command(out, *arguments).wait(PATIENCE_S) == 0

    train_on(first, tmp_path / "run", "checkpoint_every=8")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000020")
    train_on(second, tmp_path / "run", "checkpoint_every=8", "--resume")
    assert losses(tmp_path / "run") == pytest.approx(whole, rel=1e-5)


def test_gradient_norms_are_those_before_clipping(tmp_path: Path) -> None:
    stage = ToyStage()
    stage.model.net[2].p = 0.0
    loss = 0.0
    for index in range(2):
        part, _ = stage.model(stage.batch(index))
        loss = loss + part / 2
    loss.backward()
    wanted = {
        layer: torch.stack([p.grad.norm() for p in stage.model.net[layer].parameters()]).norm().item()
        for layer in (0, 3)
    }
    bias = stage.model.net[0].bias.grad.norm().item()
    stage.model.zero_grad()
    train(stage, *configs(tmp_path, clip_grad=0.1, modules=["net.0.bias"], max_steps=1))
    (row,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert row["grad_norm/net.0"] == pytest.approx(wanted[0], rel=1e-4)
    assert row["grad_norm/net.3"] == pytest.approx(wanted[3], rel=1e-4)
    assert row["grad_norm/net.0.bias"] == pytest.approx(bias, rel=1e-4)
    assert row["grad_norm"] == pytest.approx((wanted[0] ** 2 + wanted[3] ** 2) ** 0.5, rel=1e-4)
    assert row["grad_norm"] > 0.1


def test_a_module_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'net\.9'"):
        run(tmp_path, modules=["net.9"])


def test_throughput_counts_all_tokens_of_a_step(tmp_path: Path) -> None:
    run(tmp_path, max_steps=2)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    # Two micro-batches of four samples of four values.
    assert all(row["tokens_per_s"] == pytest.approx(4 * row["samples_per_s"]) for row in rows)


def test_tensorboard_holds_the_figures(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = run(tmp_path, max_steps=3)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [event.value for event in board.Scalars("loss")] == pytest.approx(found)
    assert "grad_norm/net.0" in board.Tags()["scalars"]


def test_trackers_get_the_figures_or_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Tracker:
        def __init__(self) -> None:
            self.calls: list[tuple] = []

        def init(self, **settings) -> None:
            self.calls.append(("init", settings["name"], settings["config"]["optim"]["lr"]))

        def log(self, figures, step) -> None:
            self.calls.append((step, figures["loss"]))

        def finish(self) -> None:
            self.calls.append(("finish",))

    tracker = Tracker()
    monkeypatch.setitem(sys.modules, "trackio", tracker)
    found = run(tmp_path / "told", max_steps=2, trackers=["trackio"])
    assert tracker.calls == [("init", "told", 0.01), (1, found[0]), (2, found[1]), ("finish",)]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="pip install wandb"):
        run(tmp_path / "untold", trackers=["wandb"])


def test_a_run_continues_with_the_settings_it_began_with(tmp_path: Path) -> None:
    run(tmp_path, max_steps=4)
    with pytest.raises(CheckpointError, match="batch_size 8, not 16"):
        run(tmp_path, batch_size=16, resume=True)
    more = ToyStage()
    more.micro_batches = 41
    with pytest.raises(CheckpointError, match=r"micro_batches of an epoch 40, not 41: .* and data"):
        train(more, *configs(tmp_path), resume=True)


def test_a_damaged_checkpoint_is_one_sentence(tmp_path: Path) -> None:
    run(tmp_path, max_steps=4)
    for name in ("trainable.safetensors", "optimizer.pt"):
        path = tmp_path / "checkpoints" / "step_00000004" / name
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        with pytest.raises(CheckpointError, match="delete it to use an older one"):
            run(tmp_path, resume=True)
        path.write_bytes(content)


def test_a_checkpoint_whose_states_are_numbered_is_read(tmp_path: Path) -> None:
    """Checkpoints once held the optimiser's own state_dict, numbered in the order of its groups."""
    whole = run(tmp_path / "whole", checkpoint_every=8)
    shutil.rmtree(tmp_path / "whole" / "checkpoints" / "step_00000020")
    path = tmp_path / "whole" / "checkpoints" / "step_00000016" / "optimizer.pt"
    by_name = torch.load(path, weights_only=True)["state"]
    model = ToyStage().model
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.01), lr=0.01)
    names = {id(p): name for name, p in model.named_parameters()}
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    old = optimizer.state_dict() | {"state": {i: by_name[name] for i, name in enumerate(order)}}
    torch.save(old, path)
    assert run(tmp_path / "whole", resume=True) == whole[16:]


def test_a_stage_may_bring_its_own_groups(tmp_path: Path) -> None:
    class OnlyTheLast(ToyStage):
        def parameter_groups(self, optim):
            return [{"params": list(self.model.net[3].parameters()), "weight_decay": 0.0, "lr_scale": 0.5}]

    stage = OnlyTheLast()
    before = {name: p.clone() for name, p in stage.model.named_parameters()}
    train(stage, *configs(tmp_path, max_steps=1, weight_decay=0.0, warmup_ratio=0.0))
    moved = {name: (p - before[name]).abs().max().item() for name, p in stage.model.named_parameters()}
    assert moved["net.0.weight"] == 0
    # The first step of Adam moves every weight by the rate.
    assert moved["net.3.weight"] == pytest.approx(0.5 * 0.01, rel=1e-3)


def test_fp16_on_a_cpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs a GPU"):
        run(tmp_path, precision="fp16")


def test_bf16_on_a_gpu_without_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("training.trainer.distributed.default_device", lambda: torch.device("cuda"))
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **_: False)
    with pytest.raises(ConfigError, match="This GPU has no bfloat16"):
        loop.open_accelerator("bf16")


def test_two_runs_of_one_process_may_differ_in_precision(tmp_path: Path) -> None:
    assert run(tmp_path / "a", precision="bf16", max_steps=2) != run(tmp_path / "b", max_steps=2)


def test_the_fp16_scaler_recovers_from_overflow_and_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = loop.open_accelerator

    def scaled(precision: str):
        # accelerate allows fp16 on GPUs only; torch's scaler itself works anywhere.
        accelerator = opened("fp32")
        accelerator.state._shared_state["_mixed_precision"] = "fp16"
        accelerator.state._mixed_precision = "fp16"
        accelerator.native_amp = True
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=5)
        return accelerator

    monkeypatch.setattr(loop, "open_accelerator", scaled)
    settings = {"checkpoint_every": 1, "keep_checkpoints": 99}
    whole = run(tmp_path / "whole", **settings)
    skips = figures(tmp_path / "whole", "skipped")
    # The scale starts far too high: it halves with each skipped step until gradients fit.
    first = next(number for number, count in enumerate(skips) if count == number)
    assert 3 <= first <= 9
    assert skips[:first] == list(range(1, first + 1))
    assert skips[-1] < 15
    assert all(map(math.isfinite, whole))
    state = json.loads((tmp_path / "whole" / "checkpoints" / f"step_{first:08d}" / "state.json").read_text())
    assert state["scaler"]["scale"] == 2.0 ** (24 - first)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for step in range(11, 21):
        shutil.rmtree(tmp_path / "cut" / "checkpoints" / f"step_{step:08d}")
    assert run(tmp_path / "cut", **settings, resume=True) == whole[10:]
    assert figures(tmp_path / "cut", "skipped") == skips
