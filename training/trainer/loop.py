"""The one training loop: accumulation, schedule, logs, atomic checkpoints, exact resume.

A stage brings a model whose `forward(batch)` gives a loss and named figures, and `batch(index)`, a pure
function of the index of a micro-batch. So the position in the data is a number, and a resumed run repeats
nothing. On several processes each takes its own indices of a step; the losses are those of one process.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from encoder.compiling import compile_encoder
from encoder.errors import CheckpointError, ConfigError, DataError
from encoder.fluxvit import FluxViT
from llm_bridge.assets.write_lock import WriteLock
from training.trainer.checkpoints import (
    Progress,
    checkpoints,
    load_optimizer,
    load_weights,
    save,
)
from training.trainer.distributed import (
    GradientNorms,
    backward,
    choose_sharded_layers,
    gathered,
    is_deepspeed,
    make_whole,
    merged_on_ranks,
    open_accelerator,
    share_of,
    whole,
)
from training.trainer.optim import learn_in_float32, learning_rate, parameter_groups
from training.trainer.recipe import LoopConfig, OptimConfig
from training.trainer.run_log import Figures, RunLog
from training.trainer.run_recipe import keep_recipe


class Stage(Protocol):
    """What differs between stages.

    A stage may also have `parameter_groups(optim) -> list[dict]`, the optimiser's groups as
    `optim.parameter_groups` makes them (each with its `lr_scale`). With `shares_out` its batches are
    dataclasses with `weight`, how much of the step's loss is theirs, and `share`, by which the model
    multiplies the mean loss of the batch: the loop sets it so that the step's loss is the weighted mean over
    all of its batches, on all ranks, as if they were one. For losses beside it, which the stage names in
    `weighed`, a batch has `weights` and `shares` by name. Without, all batches count the same.
    """

    @property
    def model(self) -> nn.Module:
        """`model(batch) -> (loss, figures)`; its parameters with requires_grad are trained and saved.

        The figure "tokens", where a model reports it, is logged as tokens_per_s. A step whose "label_tokens"
        are none taught nothing: it is skipped.
        """
        ...

    @property
    def micro_batches(self) -> int:
        """Micro-batches in one epoch."""
        ...

    def batch(self, index: int) -> Any:
        """Micro-batch number `index` (counted over epochs); pure, may run in another thread."""
        ...

    def evaluate(self) -> Mapping[str, float]:
        """Figures on held-out data; called on every rank each `loop.evaluate_every` steps."""
        ...

    def finish(self, out: Path) -> None:
        """Write the stage's result into `out`; called on the main process."""
        ...


@dataclass
class TrainResult:
    """Losses by step, and how the run ended."""

    losses: list[float] = field(default_factory=list)
    skipped: int = 0
    finished: bool = False


def total_steps(micro_batches: int, optim: OptimConfig, loop: LoopConfig) -> int:
    """Optimiser steps of the whole run. micro_batches: in one epoch."""
    per_step = optim.batch_size // optim.micro_batch
    steps = math.ceil(optim.epochs * micro_batches / per_step)
    return max(1, min(steps, loop.max_steps or steps))


def train(
    stage: Stage, optim: OptimConfig, loop: LoopConfig, *, resume: bool = False, recipe: Any = None
) -> TrainResult:
    """Run a stage to its end, or until a signal or `stop_after_s` interrupts it after a checkpoint.

    recipe: what stage, optim and loop are of, to be kept in `out`.
    Raises ConfigError when the ranks do not divide the accumulation, the machine lacks the precision or
    another process trains into `out`, DataError when `out` already holds a run and `resume` is not asked for,
    or when all steps were skipped, CheckpointError when the run in `out` cannot be continued or its loss is
    not finite at the end.
    """
    accelerator = open_accelerator(loop.precision)
    with _claimed(Path(loop.out), resume) if accelerator.is_main_process else nullcontext():
        return _trained(_Run(accelerator, stage, optim, loop, resume), recipe)


def _trained(run: _Run, recipe: Any) -> TrainResult:
    from tqdm.auto import tqdm

    optim, loop = run.optim, run.loop
    total, main = run.total, run.accelerator.is_main_process
    result = TrainResult(skipped=run.done.skipped)
    if main and recipe is not None:
        keep_recipe(recipe)
    settings = {"optim": asdict(optim), "loop": asdict(loop)}
    log = RunLog(run.out, run.done.step, loop.trackers, settings) if main else None
    bar = tqdm(total=total, initial=run.done.step, unit="step", disable=not main, smoothing=0.05)
    if log is not None and log.warning:
        bar.write(log.warning)
    began, clock = time.monotonic(), time.perf_counter()

    with _interruption() as interrupted, _prefetch(run.make) as made, bar:
        for step in range(run.done.step, total):
            rate = learning_rate(step, total, optim)
            loss, figures = run.gradients(step, rate, made)
            empty = figures.total("label_tokens") == 0
            norms, skipped = run.update(loss, empty=empty)
            run.done = Progress(
                step + 1, run.done.skipped + skipped, math.isfinite(loss), run.done.empty + empty
            )
            result.losses.append(loss)
            result.skipped = run.done.skipped

            due = run.done.step % loop.checkpoint_every == 0 or run.done.step == total
            now = time.perf_counter()
            if log is not None:
                speed = optim.batch_size / (now - clock)
                line = {"loss": loss, **norms, "lr": rate, "samples_per_s": speed, **figures.means()}
                if (tokens := figures.total("tokens")) is not None:
                    line["tokens_per_s"] = tokens / (now - clock)
                bar.update()
                bar.set_postfix(loss=f"{loss:.3f}", lr=f"{rate:.1e}", per_s=f"{speed:.1f}")
                flush = due or run.done.step % loop.log_every == 0
                log.write(run.done.step, line, skipped=run.done.skipped, flush=flush)
            clock = now
            if loop.evaluate_every and run.done.step % loop.evaluate_every == 0:
                measured = run.evaluate()
                if log is not None:
                    log.write(run.done.step, measured, flush=True, echo=bar.write)
                clock = time.perf_counter()
            late = loop.stop_after_s is not None and time.monotonic() - began > loop.stop_after_s
            stopping = run.any_rank(bool(interrupted()) or late)
            if due or stopping:
                run.save()
            if stopping and run.done.step < total:
                if log is not None:
                    bar.write(f"Stopped after step {run.done.step} of {total}: continue with --resume.")
                    log.close()
                return result
    if log is not None:
        log.close()
    run.check()
    run.finish()
    result.finished = True
    return result


def encoders_of(stage: Stage) -> list[FluxViT]:
    """Those that a stage trains, or whose features it trains on (of its `vlm`)."""
    parts: list[nn.Module] = [stage.model]
    if (vlm := getattr(stage, "vlm", None)) is not None:
        parts.append(vlm)
    found = {module for part in parts for module in part.modules() if isinstance(module, FluxViT)}
    return list(found)


class _Run:
    """Model, optimiser and position of a run on this rank."""

    def __init__(
        self, accelerator: Any, stage: Stage, optim: OptimConfig, loop: LoopConfig, resume: bool
    ) -> None:
        self.stage, self.optim, self.loop, self.out = stage, optim, loop, Path(loop.out)
        self.accelerator = accelerator
        self.per_step = optim.batch_size // optim.micro_batch
        self.share = share_of(self.accelerator, optim, loop.precision)
        self.total = total_steps(stage.micro_batches, optim, loop)
        self.counted = {
            "seed": loop.seed,
            "batch_size": optim.batch_size,
            "micro_batch": optim.micro_batch,
            "micro_batches of an epoch": stage.micro_batches,
        }
        learn_in_float32(stage.model)
        if loop.compile:
            for encoder in encoders_of(stage):
                compile_encoder(encoder)
        self.done = load_weights(stage.model, self.out, self.counted) if resume else Progress()
        groups = getattr(stage, "parameter_groups", None)
        optimizer = torch.optim.AdamW(
            groups(optim)
            if groups is not None
            else parameter_groups(stage.model, optim.weight_decay, optim.layer_decay),
            lr=optim.lr,
            betas=optim.betas,
            eps=optim.eps,
        )
        if optim.layer_decay != 1 and all(
            group.get("lr_scale", 1.0) == 1 for group in optimizer.param_groups
        ):
            raise ConfigError("optim.layer_decay is for runs that train an encoder's blocks: leave it out.")
        choose_sharded_layers(self.accelerator, stage.model)
        self.model, self.optimizer = self.accelerator.prepare(stage.model, optimizer)
        if resume:
            load_optimizer(self.accelerator, self.model, self.optimizer, self.out)
        self.norms = GradientNorms(self._plain, loop.modules)

    @property
    def _plain(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model)

    def _index(self, step: int, part: int) -> int:
        """Ranks take micro-batches in turn, so that their number does not change a step's data, and those
        that run side by side are neighbours, of like length where the stage sorts them."""
        return step * self.per_step + part * self.accelerator.num_processes + self.accelerator.process_index

    @property
    def make(self) -> Callable[[int], Any]:
        """What is made ahead of time: micro-batches by index, or the list of a step's on this rank."""
        if not getattr(self.stage, "shares_out", False):
            return self.stage.batch
        return lambda step: [self.stage.batch(self._index(step, part)) for part in range(self.share)]

    def _batches(self, step: int, made: Callable[[int, int | None], Any]) -> Iterator[Any]:
        """The micro-batches of a step on this rank."""
        ends = step + 1 == self.total
        if getattr(self.stage, "shares_out", False):
            yield from self._shared_out(made(step, None if ends else step + 1))
            return
        for part in range(self.share):
            last = part + 1 == self.share
            following = self._index(step + 1, 0) if last else self._index(step, part + 1)
            yield made(self._index(step, part), None if last and ends else following)

    def _shared_out(self, batches: Sequence[Any]) -> list[Any]:
        """Each with its share, so that the mean over parts and ranks becomes the step's weighted mean."""
        weight = self._of_step(sum(batch.weight for batch in batches))
        parts = self.share * self.accelerator.num_processes
        shared = [replace(batch, share=parts * batch.weight / weight if weight else 1.0) for batch in batches]
        names = getattr(self.stage, "weighed", ())  # the same on all ranks, whatever their batches hold
        if not names:
            return shared
        totals = {name: self._of_step(sum(b.weights.get(name, 0.0) for b in batches)) for name in names}
        return [
            replace(b, shares={name: parts * own / totals[name] for name, own in b.weights.items()})
            for b in shared
        ]

    def _of_step(self, own: float) -> float:
        """The sum over all ranks."""
        mine = torch.tensor(float(own), device=self.accelerator.device)
        return float(self.accelerator.reduce(mine, reduction="sum"))

    def gradients(
        self, step: int, rate: float, made: Callable[[int, int | None], Any]
    ) -> tuple[float, Figures]:
        """Gradients of the step's mean loss; that loss and the figures, of all ranks."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        self.model.train()
        figures, total = Figures(), torch.zeros((), device=self.accelerator.device)
        for part, batch in enumerate(self._batches(step, made)):
            last = part + 1 == self.share
            # Randomness inside the model is a function of the position too, so that resuming is exact.
            torch.manual_seed(self.loop.seed * 1_000_003 + self._index(step, part))
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                with self.accelerator.autocast():
                    loss, part_figures = self.model(batch)
                backward(self.accelerator, loss, self.share, last=last)
            total += loss.detach() / self.share
            figures.add(part_figures)
        figures.settle()
        figures.merge(merged_on_ranks(figures))
        return float(self.accelerator.reduce(total, reduction="mean")), figures

    def update(self, loss: float, *, empty: bool) -> tuple[dict[str, float], bool]:
        """Clip and step; the gradient norms before clipping, and whether the step was skipped.

        empty: nothing had a label, so not even momentum and decay may move the weights. Loss and norm are the
        same on all ranks here, so all of them skip or none does.
        """
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        limit = self.optim.clip_grad
        # None before DeepSpeed's first step.
        total = self.accelerator.clip_grad_norm_(trained, limit or math.inf)
        norm = float("nan") if total is None else float(whole(torch.as_tensor(total)))
        norms = {"grad_norm": norm}
        if not is_deepspeed(self.accelerator):
            norms |= self.norms.after_clipping(norm, limit)
        useful = math.isfinite(loss) and math.isfinite(norm) and not empty
        if empty:
            self.optimizer.zero_grad(set_to_none=True)  # a step without gradients changes nothing
        # The fp16 scaler must see bad steps too: it skips them, and lowers its scale.
        if useful or self.accelerator.scaler is not None or is_deepspeed(self.accelerator):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norms, not useful or bool(self.optimizer.step_was_skipped)

    def evaluate(self) -> dict[str, float]:
        """The stage's figures; every rank computes them, since sharded weights need all of them."""
        self.model.eval()
        with gathered(self._plain), self.accelerator.autocast(), torch.no_grad():
            return {f"eval/{name}": value for name, value in self.stage.evaluate().items()}

    def any_rank(self, flag: bool) -> bool:
        """Whether it holds on any rank."""
        flags = torch.tensor(float(flag), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flags))

    def save(self) -> None:
        """A checkpoint of where the run is."""
        save(self.accelerator, self.model, self.optimizer, self.out, self.done, self.counted, self.loop)

    def check(self) -> None:
        """Raises DataError for a run whose steps were all skipped, CheckpointError when its last loss is not
        finite."""
        done = self.done
        if done.step and done.empty == done.step:
            raise DataError(
                f"None of the {done.step} steps held anything to learn: no answer lies within max_length."
            )
        if done.step and done.skipped == done.step:
            raise DataError(
                f"All {done.step} steps were skipped, since no loss or gradient was finite: lower optim.lr, "
                "or compute with loop.precision fp32."
            )
        if not done.finite:
            raise CheckpointError(
                f"The loss is not finite at the end, in step {done.step}: continue from an older checkpoint "
                f"in {self.out} with a lower optim.lr, or with optim.clip_grad."
            )

    def finish(self) -> None:
        """The stage's result, by the main process."""
        make_whole(self._plain)
        if self.accelerator.is_main_process:
            self.stage.finish(self.out)
        self.accelerator.wait_for_everyone()


@contextmanager
def _claimed(out: Path, resume: bool) -> Iterator[None]:
    """The folder of a run, which no other run writes into meanwhile; raises DataError and ConfigError."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"Cannot make the folder {out}: {error.strerror}; choose another loop.out."
        ) from error
    with WriteLock(out / "writing.lock", str(out), passing=True):
        if not resume and checkpoints(out):
            raise DataError(
                f"{out} already holds a run: continue it with --resume, or choose another loop.out."
            )
        yield


# -- around the steps ---------------------------------------------------------------------------------------


@contextmanager
def _interruption() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM end the run after the current step instead of at once."""
    received: list[int] = []
    signals = (signal.SIGINT, signal.SIGTERM)
    try:
        previous = {number: signal.signal(number, lambda got, _: received.append(got)) for number in signals}
    except ValueError:  # not in the main thread: leave signals alone
        previous = {}
    try:
        yield lambda: bool(received)
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
