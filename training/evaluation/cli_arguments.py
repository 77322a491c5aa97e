"""Options that several evaluations share, and the objects that they name."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch

from encoder.budget import InputSpace, PlanTable
from encoder.config import FluxViTConfig
from encoder.errors import ConfigError
from llm_bridge.chat_model import ChatModel, load_chat_model
from llm_bridge.llm import Quantize
from llm_bridge.towers.tower import Stage
from training.command_line import at_least
from training.data.examples import Example
from training.data.synthetic_examples import WorldExamples
from training.data.synthetic_source import WorldSource
from training.evaluation.benchmarks import Labelled, read_labelled, with_unique_ids
from training.evaluation.encoder_input import SELECTORS, EncoderInput, from_plan_table
from training.evaluation.frozen_encoder import DTYPES
from training.evaluation.provenance import about_world
from training.trainer.recipe import build

PRESETS: tuple[str, ...] = get_args(get_type_hints(WorldSource)["preset"])


def add_world_options(command: argparse.ArgumentParser, clips: int) -> None:
    """Which clips of the synthetic world; clips: how many by default."""
    command.add_argument("--clips", type=at_least(1), default=clips, help="of the synthetic world")
    command.add_argument("--first", type=at_least(0), default=0, help="number of the world's first sample")
    command.add_argument("--preset", choices=PRESETS, default="full", help="how rich the world is")
    command.add_argument("--nouns", type=at_least(1), help="nouns of the world that take part")


def add_encoder_options(command: argparse.ArgumentParser, *, required: bool = True) -> None:
    """An encoder and how its features are computed."""
    command.add_argument(
        "--encoder", required=required, help="a folder, an official file, or a chat model's folder"
    )
    command.add_argument("--alignment", help="alignment.safetensors of training.clip, or its folder")
    command.add_argument("--pool", type=at_least(0), help="pooling head; default: those that were trained")
    command.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    command.add_argument(
        "--block", type=at_least(1), default=8, help="videos that go through the encoder together"
    )


def add_run_options(command: argparse.ArgumentParser) -> None:
    """Seed, device and what the result file says of the weights."""
    command.add_argument("--seed", type=int, default=0, help="for selectors that draw")
    command.add_argument("--device")
    command.add_argument("--recipe", help="what the weights were trained with, for the result file")


def add_model_options(command: argparse.ArgumentParser, *, required: bool = True) -> None:
    """A chat model and how it is loaded."""
    command.add_argument(
        "--model",
        required=required,
        help="a chat model: a saved one, such as app/pretrained, or a stock video model (folder or hub id)",
    )
    command.add_argument(
        "--select",
        choices=get_args(Stage),
        help="when a stock model drops tokens (default: after)",
    )
    command.add_argument("--adapters", metavar="DIR", nargs="+", default=[], help="LoRA adapters")
    command.add_argument("--quantize", choices=get_args(Quantize), help="of the language model")
    command.add_argument("--llm", help="another language model in its place: hub id, folder or GGUF file")
    command.add_argument(
        "--engine",
        default="local",
        help="what runs the language model: local (default), llamacpp, vllm, or addresses of vLLM servers",
    )


def open_model(args: argparse.Namespace) -> ChatModel:
    """The chat model that the options name; raises ModelError, CheckpointError or ConfigError."""
    return load_chat_model(
        args.model,
        llm=args.llm,
        engine=args.engine,
        stage=args.select,
        device=device_of_process(args.device),
        quantize=args.quantize,
        adapters=args.adapters,
        on_download=lambda name, size: print(
            f"Downloading {name}, {size / 1e9:.2f} GB, once.", file=sys.stderr
        ),
    )


def add_budget_options(command: argparse.ArgumentParser, default: list[int] | None) -> None:
    """Token counts and how they are selected."""
    command.add_argument(
        "--budget", type=at_least(1), nargs="+", default=default, help="tokens, one run for each"
    )
    command.add_argument("--selector", nargs="+", default=["flux"], choices=SELECTORS)


def device_of_process(name: str | None) -> str | None:
    """The device asked for; of several processes each takes the GPU of its number."""
    local = os.environ.get("LOCAL_RANK")
    if name is None and local is not None and torch.cuda.is_available():
        return f"cuda:{local}"
    return name


def encoder_inputs(args: argparse.Namespace, config: FluxViTConfig | InputSpace) -> list[EncoderInput]:
    """Those of --setting, and one per row of --plan-table."""
    table = from_plan_table(PlanTable.read(args.plan_table)) if args.plan_table else []
    return [*(EncoderInput.parse(text).check(config) for text in args.setting), *table]


def world_source(args: argparse.Namespace) -> WorldSource:
    """The part of the synthetic world that the options name; the test split where there is no --split."""
    split = getattr(args, "split", "test")
    values = {"split": split, "preset": args.preset, "count": args.clips, "first": args.first}
    return build(WorldSource, values | ({"nouns": args.nouns} if args.nouns else {}), "world")


def about_data(args: argparse.Namespace) -> dict[str, Any]:
    """Which data it is, for journals and results."""
    dataset = "world" if args.command == "world" else args.dataset
    if dataset == "world":
        return about_world(world_source(args))
    return {"dataset": dataset, "annotations": args.annotations and Path(args.annotations).name}


def world_examples(args: argparse.Namespace, label: str) -> Labelled:
    """The world's clips with their first actor's noun or motion as label."""
    source = WorldExamples(world_source(args), label)  # type: ignore[arg-type]
    return Labelled([source[number] for number in range(len(source))], source.classes)


def labelled_data(args: argparse.Namespace) -> Labelled:
    """The labelled set of `action` and `classify`."""
    if args.dataset == "world":
        return world_examples(args, "motion" if args.command == "action" else args.attribute)
    annotations, videos = files_of_data(args)
    return read_labelled_files(args, annotations, videos)


def read_labelled_files(args: argparse.Namespace, annotations: Path, videos: Path) -> Labelled:
    """A labelled set by --dataset, --classes and --limit."""
    data = read_labelled(args.dataset, annotations, videos, Path(args.classes) if args.classes else None)
    examples: Sequence[Example] = with_unique_ids(data.examples)[: args.limit]
    return Labelled(examples, data.classes)


def files_of_data(args: argparse.Namespace) -> tuple[Path, Path]:
    """The annotations and the folder of videos; raises ConfigError without them."""
    if args.annotations is None or args.videos is None:
        raise ConfigError(f"Name the files of {args.dataset}: --annotations FILE and --videos DIR.")
    return Path(args.annotations), Path(args.videos)


def out_path(args: argparse.Namespace) -> Path | None:
    """Where the result goes; None keeps it in memory."""
    return Path(args.out) if args.out else None
