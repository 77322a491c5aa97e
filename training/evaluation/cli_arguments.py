"""What was asked for on the command line, as objects; and the end of every command: table and file."""

from __future__ import annotations

import argparse
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from encoder.budget import PlanTable
from encoder.errors import ConfigError
from llm_bridge.model import VideoLanguageModel
from training.data.examples import Example
from training.data.synthetic_examples import WorldExamples
from training.data.synthetic_source import WorldSource
from training.evaluation.benchmarks import Labelled, read_labelled, renamed
from training.evaluation.chat_evaluator import Watcher
from training.evaluation.encoder_input import Setting, from_table
from training.evaluation.results import Sharing, weights_hash, write_result
from training.evaluation.run import describe_setting, provenance
from training.trainer.recipe import build

INTERVAL = "Wilson, 95 % (means over tasks: MOVER)"


def sharing_device(asked: str | None) -> str | None:
    """The device asked for; of several processes each takes the GPU of its number."""
    local = os.environ.get("LOCAL_RANK")
    if asked is None and local is not None and torch.cuda.is_available():
        return f"cuda:{local}"
    return asked


def settings_of(args: argparse.Namespace, config: Any) -> list[Setting]:
    """Those of --setting, and one per row of --plan-table."""
    table = from_table(PlanTable.read(args.plan_table)) if args.plan_table else []
    return [*(Setting.parse(text).check(config) for text in args.setting), *table]


def about_data(args: argparse.Namespace) -> dict[str, Any]:
    """Which data it is, for journals and results."""
    dataset = "world" if args.command == "world" else args.dataset
    if dataset == "world":
        return about_world(world_source(args))
    return {"dataset": dataset, "annotations": args.annotations and Path(args.annotations).name}


def about_world(source: WorldSource) -> dict[str, Any]:
    """Which part of the world, and a hash of its first scenes: another version of the world has another."""
    world = source.open()
    seen = repr([world.sample(source.first + number) for number in range(3)])
    return {
        "dataset": "world",
        "split": source.split,
        "preset": source.preset,
        "nouns": source.nouns,
        "scenes": hashlib.blake2b(seen.encode(), digest_size=6).hexdigest(),
    }


def about_model(model: VideoLanguageModel) -> dict[str, Any]:
    """A chat model's weights: a hash of encoder and projector, the language model, hashes of its adapters."""
    quantize, *adapters = model.llm.identity.removeprefix(model.llm.name + "|").split("|")
    return {
        "weights": weights_hash(model.encoder, model.projector),
        "llm": Path(model.llm.name).name,
        "quantize": quantize or None,
        "adapters": [adapter[:24] for adapter in adapters],
        "dtype": str(model.llm.dtype).removeprefix("torch."),
    }


def world_source(args: argparse.Namespace) -> WorldSource:
    values = {"split": args.split, "preset": args.preset, "count": args.clips, "first": args.first}
    return build(WorldSource, values | ({"nouns": args.nouns} if args.nouns else {}), "world")


def world_examples(args: argparse.Namespace, label: str) -> Labelled:
    source = WorldExamples(world_source(args), label)  # type: ignore[arg-type]
    return Labelled([source[number] for number in range(len(source))], source.classes)


def labelled(args: argparse.Namespace) -> Labelled:
    if args.dataset == "world":
        attribute = "motion" if args.command == "action" else args.attribute
        return world_examples(args, attribute)
    annotations, videos = needed(args)
    data = read_labelled(args.dataset, annotations, videos, Path(args.classes) if args.classes else None)
    examples: Sequence[Example] = renamed(data.examples)[: args.limit]
    return Labelled(examples, data.classes)


def needed(args: argparse.Namespace) -> tuple[Path, Path]:
    if args.annotations is None or args.videos is None:
        raise ConfigError(f"Name the files of {args.dataset}: --annotations FILE and --videos DIR.")
    return Path(args.annotations), Path(args.videos)


def path_of(out: str | None) -> Path | None:
    return Path(out) if out else None


def finish(
    args: argparse.Namespace,
    text: str,
    told: dict[str, Any],
    device: torch.device,
    watchers: dict[str, Watcher],
    figures: dict[str, Any],
) -> int:
    """Write the file, then print the table: a reader that closes the pipe must not lose the figures."""
    sharing = Sharing()
    shown = {
        label: None if watcher.setting is None else describe_setting(watcher.setting)
        for label, watcher in watchers.items()
    }
    result = {**provenance(args.told, device, args.recipe), **told, "interval": INTERVAL}
    write_result(path_of(args.out), {**result, **({"inputs": shown} if shown else {}), **figures}, sharing)
    if sharing.first:
        print(text)
    return 0
