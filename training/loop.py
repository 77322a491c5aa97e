"""The one training loop: accumulation, schedule, logs, atomic checkpoints, exact resume.

A stage brings a model whose `forward(batch)` gives a loss and named figures, and `batch(index)`, a pure
function of the index of a micro-batch. So the position in the data is a number, and a resumed run repeats
nothing.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from encoder.checkpoint import load_tensors, read_tensors, save_json, save_tensors
from encoder.errors import CheckpointError, ConfigError, DataError
from training.config import LoopConfig, OptimConfig
from training.schedule import learning_rate, parameter_groups


class Stage(Protocol):
    """What differs between stages."""

    @property
    def model(self) -> nn.Module:
        """`model(batch) -> (loss, figures)`; its parameters with requires_grad are trained and saved."""
        ...

    @property
    def micro_batches(self) -> int:
        """Micro-batches in one epoch."""
        ...

    def batch(self, index: int) -> Any:
        """Micro-batch number `index` (counted over epochs); pure, may run in another thread."""
        ...

    def evaluate(self) -> Mapping[str, float]:
        """Figures on held-out data; called every `loop.evaluate_every` steps."""
        ...

    def finish(self, out: Path) -> None:
        """Write the stage's result into `out`."""
        ...


@dataclass
class TrainResult:
    """Losses by step, and how the run ended."""

    losses: list[float] = field(default_factory=list)
    skipped: int = 0
    finished: bool = False


def total_steps(stage: Stage, optim: OptimConfig, loop: LoopConfig) -> int:
    """Optimiser steps of the whole run."""
    per_step = optim.batch_size // optim.micro_batch
    steps = math.ceil(optim.epochs * stage.micro_batches / per_step)
    return min(steps, loop.max_steps) if loop.max_steps is not None else max(1, steps)


def train(stage: Stage, optim: OptimConfig, loop: LoopConfig, *, resume: bool = False) -> TrainResult:
    """Run a stage to its end, or until a signal or `stop_after_s` interrupts it after a checkpoint.

    Raises ConfigError when the ranks do not divide the accumulation, DataError when `out` already holds a run
    and `resume` is not asked for.
    """
    from accelerate import Accelerator
    from tqdm.auto import tqdm

    precision = {"fp32": "no"}.get(loop.precision, loop.precision)
    accelerator = Accelerator(mixed_precision=precision, cpu=not torch.accelerator.is_available())
    ranks, rank = accelerator.num_processes, accelerator.process_index
    per_step = optim.batch_size // optim.micro_batch
    if per_step % ranks:
        raise ConfigError(f"{per_step} micro-batches per step cannot be shared by {ranks} processes evenly.")
    share, total = per_step // ranks, total_steps(stage, optim, loop)
    out = Path(loop.out)
    if accelerator.is_main_process:
        _claim(out, resume)
    optimizer = torch.optim.AdamW(
        parameter_groups(stage.model, optim.weight_decay), lr=optim.lr, betas=optim.betas, eps=optim.eps
    )
    start, skipped = _restore(stage.model, optimizer, out) if resume else (0, 0)
    model, optimizer = accelerator.prepare(stage.model, optimizer)
    result = TrainResult(skipped=skipped)
    log = _Log(out, start) if accelerator.is_main_process else None
    bar = tqdm(
        total=total, initial=start, unit="step", disable=not accelerator.is_main_process, smoothing=0.05
    )
    began, clock = time.monotonic(), time.perf_counter()

    def index_of(step: int, part: int) -> int:
        return step * per_step + rank * share + part

    with _interruption() as interrupted, _prefetch(stage.batch) as batch_of, bar:
        for step in range(start, total):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, total, optim)
            model.train()
            loss_sum, figures = torch.zeros((), device=accelerator.device), dict[str, float]()
            for part in range(share):
                index = index_of(step, part)
                following = index + 1 if part + 1 < share else index_of(step + 1, 0)
                batch = batch_of(index, following if step + 1 < total or part + 1 < share else None)
                # Randomness inside the model is a function of the position too, so that resuming is exact.
                torch.manual_seed(loop.seed * 1_000_003 + index)
                with accelerator.no_sync(model) if part + 1 < share else nullcontext():
                    with accelerator.autocast():
                        loss, found = model(batch)
                    accelerator.backward(loss / share)
                loss_sum += loss.detach() / share
                for name, value in found.items():
                    figures[name] = figures.get(name, 0.0) + float(value) / share
            mean_loss = float(accelerator.reduce(loss_sum, reduction="mean"))
            trainable = [p for group in optimizer.param_groups for p in group["params"]]
            norm = float(accelerator.clip_grad_norm_(trainable, optim.clip_grad or math.inf))
            if math.isfinite(mean_loss) and math.isfinite(norm):
                optimizer.step()
            else:
                result.skipped += 1
            optimizer.zero_grad(set_to_none=True)
            result.losses.append(mean_loss)

            done = step + 1
            now = time.perf_counter()
            if log is not None:
                rate = optim.batch_size / (now - clock)
                lr = optimizer.param_groups[0]["lr"]
                bar.update()
                bar.set_postfix(loss=f"{mean_loss:.3f}", lr=f"{lr:.1e}", per_s=f"{rate:.1f}")
                log.write(
                    done,
                    {"loss": mean_loss, "grad_norm": norm, "lr": lr, "samples_per_s": rate, **figures},
                    skipped=result.skipped,
                    flush=done % loop.log_every == 0,
                )
            clock = now
            if loop.evaluate_every and done % loop.evaluate_every == 0 and log is not None:
                model.eval()
                log.write(
                    done, {f"eval/{k}": v for k, v in stage.evaluate().items()}, flush=True, echo=bar.write
                )
                clock = time.perf_counter()
            late = loop.stop_after_s is not None and time.monotonic() - began > loop.stop_after_s
            stopping = bool(
                accelerator.reduce(torch.tensor(float(interrupted() or late)).to(accelerator.device))
            )
            if done % loop.checkpoint_every == 0 or done == total or stopping:
                if accelerator.is_main_process:
                    _save(accelerator.unwrap_model(model), optimizer, out, done, result.skipped, loop)
                accelerator.wait_for_everyone()
            if stopping and done < total:
                bar.write(f"Stopped after step {done} of {total}: continue with --resume.")
                return result
    if accelerator.is_main_process:
        stage.finish(out)
    accelerator.wait_for_everyone()
    result.finished = True
    return result


def _claim(out: Path, resume: bool) -> None:
    if not resume and _checkpoints(out):
        raise DataError(f"{out} already holds a run: continue it with --resume, or choose another loop.out.")
    out.mkdir(parents=True, exist_ok=True)


# -- checkpoints --------------------------------------------------------------------------------------------


def _checkpoints(out: Path) -> list[Path]:
    """Complete checkpoints, oldest first; a half-written one has another name."""
    return sorted(path for path in (out / "checkpoints").glob("step_*") if path.is_dir())


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters that are trained, by name."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def _save(model: nn.Module, optimizer: Any, out: Path, step: int, skipped: int, loop: LoopConfig) -> None:
    """Write a checkpoint beside its place and move it there whole; then drop the oldest."""
    folder = out / "checkpoints"
    target, scratch = folder / f"step_{step:08d}", folder / f".step_{step:08d}.tmp"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    save_tensors(trainable_state(model), scratch / "trainable.safetensors")
    torch.save(optimizer.state_dict(), scratch / "optimizer.pt")
    save_json({"step": step, "skipped": skipped, "seed": loop.seed}, scratch / "state.json")
    if target.exists():
        shutil.rmtree(scratch)
    else:
        os.replace(scratch, target)
    for old in _checkpoints(out)[: -loop.keep_checkpoints]:
        shutil.rmtree(old, ignore_errors=True)


def _restore(model: nn.Module, optimizer: torch.optim.Optimizer, out: Path) -> tuple[int, int]:
    """Load the newest checkpoint; returns (steps done, steps skipped), zeros when there is none."""
    found = _checkpoints(out)
    if not found:
        return 0, 0
    try:
        state = json.loads((found[-1] / "state.json").read_text())
        tensors = read_tensors(found[-1] / "trainable.safetensors")
        expected = set(trainable_state(model))
        if set(tensors) != expected:
            raise CheckpointError(f"{found[-1]} was written by another recipe: its parameters differ.")
        load_tensors(model, tensors, strict=False)
        optimizer.load_state_dict(
            torch.load(found[-1] / "optimizer.pt", map_location="cpu", weights_only=True)
        )
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"Cannot continue from {found[-1]}: {error}; delete it to use an older one."
        ) from error
    return int(state["step"]), int(state["skipped"])


# -- around the steps ---------------------------------------------------------------------------------------


@contextmanager
def _interruption() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM end the run after the current step instead of at once."""
    seen: list[int] = []
    signals = (signal.SIGINT, signal.SIGTERM)
    try:
        previous = {number: signal.signal(number, lambda got, _: seen.append(got)) for number in signals}
    except ValueError:  # not in the main thread: leave signals alone
        previous = {}
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def _prefetch(make: Callable[[int], Any]) -> Iterator[Callable[[int, int | None], Any]]:
    """`get(index, following)`: a batch, made ahead of time in another thread while the last one trained."""
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        ready: dict[int, Any] = {}

        def get(index: int, following: int | None) -> Any:
            future = ready.pop(index, None) or pool.submit(make, index)
            batch = future.result()
            if following is not None:
                ready[following] = pool.submit(make, following)
            return batch

        yield get


class _Log:
    """metrics.jsonl, and TensorBoard where it is installed; lines after a resumed step are dropped."""

    def __init__(self, out: Path, start: int) -> None:
        path = out / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if json.loads(line)["step"] <= start]
        self._file = open(path, "w")  # noqa: SIM115  lives as long as the run
        self._file.writelines(line + "\n" for line in kept)
        self._board = None
        try:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(out / "tensorboard"), purge_step=start + 1)
        except ImportError:
            pass

    def write(
        self,
        step: int,
        figures: Mapping[str, float],
        *,
        skipped: int | None = None,
        flush: bool = False,
        echo: Callable[[str], object] | None = None,
    ) -> None:
        line = {"step": step, **figures} | ({} if skipped is None else {"skipped": skipped})
        self._file.write(json.dumps(line) + "\n")
        if self._board is not None:
            for name, value in figures.items():
                self._board.add_scalar(name, value, step)
        if flush:
            self._file.flush()
            if self._board is not None:
                self._board.flush()
        if echo is not None:
            echo(f"step {step}: " + ", ".join(f"{name} {value:.3f}" for name, value in figures.items()))
