"""What a result file says besides its figures: the weights, the command, the commit and the machine."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from encoder.checkpoint import save_json, weights_hash
from llm_bridge.chat_model import ChatModel
from llm_bridge.clip_head import TrainedPools
from training.data.synthetic_source import WorldSource
from training.evaluation.frozen_encoder import FrozenEncoder
from training.evaluation.journal import Sharing
from training.evaluation.views import Views

DECODER = "auto (decord for trusted files, else PyAV)"
INTERVAL = "Wilson, 95 % (means over tasks: MOVER)"


def about_encoder(
    encoder: FrozenEncoder, views: Views, pools: TrainedPools, seed: int, **more: Any
) -> dict[str, Any]:
    """What every row about an encoder depends on."""
    return {
        "weights": weights_hash(encoder.encoder),
        "dtype": str(encoder.dtype).removeprefix("torch."),
        "views": str(views),
        "fit": views.fit,
        "pool": str(pools),
        "seed": seed,
        **more,
    }


def about_model(model: ChatModel) -> dict[str, Any]:
    """A chat model's weights: a hash of its tower, the language model, hashes of its adapters; its engine
    where it is not the local one."""
    quantize, *adapters = model.llm.weights_identity.removeprefix(model.llm.name + "|").split("|")
    return {
        "weights": model.tower.digest(),
        "llm": Path(model.llm.name).name,
        "quantize": quantize or None,
        "adapters": [adapter[:24] for adapter in adapters],
        "dtype": str(model.llm.dtype).removeprefix("torch."),
        **({} if model.llm.engine_name == "local" else {"engine": model.llm.engine_name}),
    }


def about_world(source: WorldSource) -> dict[str, Any]:
    """Which part of the synthetic world, and a hash of its first scenes: another version has another."""
    world = source.open()
    first_samples = repr([world.sample(source.first + number) for number in range(3)])
    return {
        "dataset": "world",
        "split": source.split,
        "preset": source.preset,
        "nouns": source.nouns,
        "scenes": hashlib.blake2b(first_samples.encode(), digest_size=6).hexdigest(),
    }


def commit() -> str | None:
    """The commit of this code, with + when files were changed; None outside a checkout."""
    folder = Path(__file__).parent
    head, changes = (
        subprocess.run(["git", *command], capture_output=True, text=True, cwd=folder)
        for command in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "-uno"])
    )
    if head.returncode or changes.returncode:
        return None
    return head.stdout.strip() + ("+" if changes.stdout.strip() else "")


def machine(device: torch.device) -> dict[str, Any]:
    """What it ran on."""
    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    except OSError:
        pass
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": name or str(device),
        "processes": Sharing().count,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def write_result(
    out: Path | None,
    command: Sequence[str],
    device: torch.device,
    recipe: str | None,
    metadata: Mapping[str, Any],
    figures: Mapping[str, Any],
) -> None:
    """The result file, by the first process. recipe: what the weights were trained with; metadata: what the
    figures depend on, as in the journal's header."""
    if out is None or not Sharing().first:
        return
    made_by = {
        "command": shlex.join(command),
        "commit": commit(),
        "recipe": recipe,
        "decoder": DECODER,
        "machine": machine(device),
    }
    save_json({**made_by, **metadata, "interval": INTERVAL, **figures}, out)
