"""Checkpoints of a run: written beside their place, moved there whole, continued from exactly.

One holds the trained tensors, the optimiser's state by parameter name, and the step. Nothing else is needed:
the schedule, the data and the randomness of a step are functions of its number. Tensors are whole, so a run
may continue on another number of processes, or with FSDP where it had none.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from encoder.checkpoint import load_tensors, save_json, save_tensors
from encoder.errors import CheckpointError
from training.trainer.distributed import is_deepspeed, is_sharded, like, whole
from training.trainer.recipe import LoopConfig


@dataclass
class Progress:
    """How far a run is: optimiser steps done, how many of them were skipped, whether the last one's loss was
    finite, and how many had no label."""

    step: int = 0
    skipped: int = 0
    finite: bool = True
    empty: int = 0


def checkpoints(out: Path) -> list[Path]:
    """Complete checkpoints, oldest first; a half-written one has another name."""
    return sorted(path for path in (out / "checkpoints").glob("step_*") if path.is_dir())


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters that are trained, by name."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def save(
    accelerator: Any,
    model: Any,
    optimizer: Any,
    out: Path,
    done: Progress,
    counted: Mapping[str, int],
    loop: LoopConfig,
) -> None:
    """Write a checkpoint and drop the oldest; all ranks call it, the main one writes.

    counted: what the position in the data is counted in. A kill at any moment leaves the former checkpoints
    and a folder that no resume looks at. Raises CheckpointError when it cannot be written.
    """
    folder = out / "checkpoints"
    target, scratch = folder / f"step_{done.step:08d}", folder / f".step_{done.step:08d}.tmp"
    writes = accelerator.is_main_process
    if writes:
        with _writing(scratch):
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
    plain = accelerator.unwrap_model(model)
    if is_deepspeed(accelerator):
        # Every rank writes its own part of the optimiser; `load` needs the same number of ranks.
        accelerator.wait_for_everyone()
        model.save_checkpoint(str(scratch), tag="deepspeed", exclude_frozen_parameters=True)
        state = trainable_state(plain)  # whole on every rank: ZeRO-1 shards the optimiser only
    elif writes or is_sharded(accelerator):
        state = {name: whole(p) for name, p in trainable_state(plain).items()}
        by_name = _optimizer_by_name(plain, optimizer)
        if writes:
            with _writing(scratch):
                torch.save({"state": by_name}, scratch / "optimizer.pt")
    if writes:
        scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
        with _writing(scratch):
            save_tensors(state, scratch / "trainable.safetensors")
            save_json({**asdict(done), **counted, "scaler": scaler}, scratch / "state.json")
    accelerator.wait_for_everyone()
    if writes:
        with _writing(scratch):
            _put(scratch, target)
        for old in checkpoints(out)[: -loop.keep_checkpoints]:
            shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _writing(scratch: Path) -> Iterator[None]:
    """What cannot be written becomes one sentence, and leaves nothing that takes room."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch's own writer raises the latter
        shutil.rmtree(scratch, ignore_errors=True)
        why = getattr(error, "strerror", None) or "the disk may be full"
        raise CheckpointError(
            f"Cannot write a checkpoint into {scratch.parent}: {why}; make room, then go on with --resume."
        ) from error


def _put(scratch: Path, target: Path) -> None:
    """Move a folder into place once it is on the disk, so that a power cut leaves all of it or nothing."""
    if target.exists():
        shutil.rmtree(scratch)
        return
    for path in (*(p for p in scratch.rglob("*") if p.is_file()), scratch):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    os.replace(scratch, target)


def _named(model: nn.Module, optimizer: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """The optimiser's parameters with their names, in its order, which is the same on all ranks."""
    names = {id(p): name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield names[id(parameter)], parameter


def _optimizer_by_name(model: nn.Module, optimizer: Any) -> dict[str, dict[str, Tensor]]:
    """What the optimiser remembers of each parameter, whole and in main memory."""
    by_name = {}
    for name, parameter in _named(model, optimizer):
        if state := optimizer.state.get(parameter):
            by_name[name] = {key: whole(value).cpu() for key, value in state.items()}
    return by_name


def load_weights(model: nn.Module, out: Path, counted: Mapping[str, int]) -> Progress:
    """Put the newest checkpoint's tensors into a model that is not wrapped yet; no step when there is none.

    counted: what the position in the data is counted in. Raises CheckpointError when it is damaged, or was
    written by a recipe whose parameters differ, or what they are counted in.
    """
    saved = checkpoints(out)
    if not saved:
        return Progress()
    with _reading(saved[-1]):
        state = json.loads((saved[-1] / "state.json").read_text())
        changed = [key for key, value in counted.items() if state.get(key, value) != value]
        if changed:
            raise CheckpointError(
                f"{saved[-1]} was written with {changed[0]} {state[changed[0]]}, not {counted[changed[0]]}: "
                "a run continues with the settings and data it began with."
            )
        tensors = load_file(saved[-1] / "trainable.safetensors")
        if set(tensors) != set(trainable_state(model)):
            raise CheckpointError(f"{saved[-1]} was written by another recipe: its parameters differ.")
        load_tensors(model, tensors, strict=False)
        # Checkpoints of earlier versions have neither of the last two.
        finite, empty = bool(state.get("finite", True)), int(state.get("empty", 0))
        return Progress(int(state["step"]), int(state["skipped"]), finite, empty)


def load_optimizer(accelerator: Any, model: Any, optimizer: Any, out: Path) -> None:
    """Put the newest checkpoint's optimiser state into a prepared optimiser, sharded as its parameters are.

    Raises CheckpointError when it is damaged or of another recipe.
    """
    saved = checkpoints(out)
    if not saved:
        return
    if is_deepspeed(accelerator):
        model.load_checkpoint(str(saved[-1]), tag="deepspeed", load_module_strict=False)
        return
    with _reading(saved[-1]):
        optimizer_state = torch.load(saved[-1] / "optimizer.pt", map_location="cpu", weights_only=True)
        scaler = json.loads((saved[-1] / "state.json").read_text()).get("scaler")
        if "param_groups" in optimizer_state:  # written before states were kept by name
            optimizer.load_state_dict(optimizer_state)
        else:
            for name, parameter in _named(accelerator.unwrap_model(model), optimizer):
                if name in optimizer_state["state"]:
                    optimizer.state[parameter] = {
                        # The count of steps is a number of its own kind and stays where it is.
                        key: value if key == "step" else like(value, parameter)
                        for key, value in optimizer_state["state"][name].items()
                    }
        if scaler is not None and accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(scaler)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What a damaged checkpoint raises becomes one sentence."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, EOFError, SafetensorError, UnpicklingError) as error:
        raise CheckpointError(
            f"Cannot continue from {path}: {error}; delete it to use an older one."
        ) from error
