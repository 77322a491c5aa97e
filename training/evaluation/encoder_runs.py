"""Encoders: the `retrieval`, `action` and `classify` commands, and `world` without a language model."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from encoder.checkpoint import weights_hash
from encoder.config import FluxViTConfig
from encoder.errors import ConfigError
from llm_bridge.clip_head import ClipHead, TrainedPools, read_clip_head
from llm_bridge.text_encoders.text_towers import MINILM, SentenceTower, Tower, open_tower
from training.evaluation.benchmarks import CLASSIFY, RETRIEVAL, read_retrieval
from training.evaluation.classification import accuracy_table, evaluate_action, evaluate_classify
from training.evaluation.cli_arguments import (
    about_data,
    device_of_process,
    encoder_inputs,
    files_of_data,
    labelled_data,
    out_path,
    world_examples,
    world_source,
)
from training.evaluation.encoder_input import EncoderInput, unmasked
from training.evaluation.encoder_run import EncoderRun
from training.evaluation.frozen_encoder import FrozenEncoder, chosen_pools
from training.evaluation.journal import Journal, Sharing
from training.evaluation.provenance import about_encoder, write_result
from training.evaluation.retrieval import evaluate_retrieval, retrieval_table
from training.evaluation.synthetic_encoder import WorldClips, encoder_table, evaluate_encoder
from training.evaluation.views import Views
from training.synthetic.phrases import ANSWERS


def run_world_encoder(args: argparse.Namespace) -> int:
    """`world --encoder`: attribute heads, and retrieval by caption."""
    command = _Command.open(args)
    tower = None if args.no_retrieval else _tower(args)
    clips = WorldClips.of(world_source(args))
    run = command.start()
    results = [
        evaluate_encoder(run, command.clip_head, tower, clips, encoder_input)
        for encoder_input in command.inputs
    ]
    return command.finish(encoder_table(results), {"text tower": _tower_name(args), "settings": results})


def run_retrieval(args: argparse.Namespace) -> int:
    """The `retrieval` command."""
    command = _Command.open(args)
    tower, world = _tower(args), args.dataset == "world"
    if world:
        examples = world_examples(args, "noun").examples
    else:
        annotations, videos = files_of_data(args)
        examples = read_retrieval(annotations, videos, RETRIEVAL[args.dataset])
    examples = examples[: args.limit]
    raw = isinstance(tower, SentenceTower) if args.text == "auto" else args.text == "raw"
    run = command.start()
    results = [
        evaluate_retrieval(
            run,
            command.clip_head,
            tower,
            examples,
            encoder_input,
            duplicates="equal" if world else "strict",
            scale=args.dsl_scale,
            raw_text=raw,
        )
        for encoder_input in command.inputs
    ]
    more = {"text tower": _tower_name(args), "text": "raw" if raw else "plain", "settings": results}
    return command.finish(retrieval_table(results), more)


def run_action(args: argparse.Namespace) -> int:
    """The `action` command."""
    command = _Command.open(args)
    tower, data = _tower(args), labelled_data(args)
    wording: dict[str, Any] = {}
    if args.dataset == "world":  # its motions as its captions tell them
        names = [ANSWERS[motion] for motion in data.classes]  # type: ignore[index]
        wording = {"prompts": ("it {}", "the object {}", "something {}"), "names": names}
    run = command.start()
    results = [
        evaluate_action(run, command.clip_head, tower, data, encoder_input, **wording)
        for encoder_input in command.inputs
    ]
    return command.finish(accuracy_table(results), {"text tower": _tower_name(args), "settings": results})


def run_classify(args: argparse.Namespace) -> int:
    """The `classify` command."""
    published = CLASSIFY.get(args.dataset)
    clips, crops = (published.clips, published.crops) if published else (1, 1)
    views = Views(args.clips_per_video or clips, args.crops or crops, "crop")
    command = _Command.open(args, views, needs_clip_head=False, attribute=args.attribute)
    data = labelled_data(args)
    run = command.start()
    results = [
        evaluate_classify(run, data, encoder_input, clip_head=command.head, attribute=args.attribute)
        for encoder_input in command.inputs
    ]
    return command.finish(accuracy_table(results), {"settings": results})


@dataclass(frozen=True)
class _Command:
    """What these commands share. head: of --alignment; metadata: what the figures depend on."""

    args: argparse.Namespace
    encoder: FrozenEncoder
    head: ClipHead | None
    pools: TrainedPools
    views: Views
    inputs: list[EncoderInput]
    metadata: dict[str, Any]

    @staticmethod
    def open(
        args: argparse.Namespace, views: Views | None = None, *, needs_clip_head: bool = True, **more: Any
    ) -> _Command:
        """The encoder, heads and inputs that the options name. Raises ConfigError or CheckpointError."""
        encoder = FrozenEncoder.open(args.encoder, device_of_process(args.device), args.dtype)
        if needs_clip_head and args.alignment is None:
            raise ConfigError("Name the alignment that training.clip saved beside the encoder (--alignment).")
        head = read_clip_head(args.alignment).to(encoder.device) if args.alignment else None
        inputs, views = _inputs(args, encoder.config), views or Views()
        pools = chosen_pools(args.pool, head, encoder)
        more |= {"alignment": weights_hash(*head.modules) if head else None, "block": args.block}
        metadata = about_encoder(encoder, views, pools, args.seed, **about_data(args), **more)
        return _Command(args, encoder, head, pools, views, inputs, metadata)

    @property
    def clip_head(self) -> ClipHead:
        """The head of a command that needs one."""
        assert self.head is not None
        return self.head

    def start(self) -> EncoderRun:
        """The run, with its journal beside --out."""
        args, journal = self.args, Journal(out_path(self.args), self.metadata)
        return EncoderRun(self.encoder, journal, self.pools, self.views, args.seed, args.block, args.workers)

    def finish(self, text: str, figures: Mapping[str, Any]) -> int:
        """Write the file, then print the table: a reader that closes the pipe must not lose the figures."""
        args, device = self.args, self.encoder.device
        write_result(out_path(args), args.command_line, device, args.recipe, self.metadata, figures)
        if Sharing().first:
            print(text)
        return 0


def _inputs(args: argparse.Namespace, config: FluxViTConfig) -> list[EncoderInput]:
    """Those that were named; else for the synthetic world the largest trained input at every budget, and for
    public sets the upper lines of the paper's tables: 8, 4 and 2 frames of 224 pixels, nothing dropped."""
    inputs = encoder_inputs(args, config)
    if not inputs and (args.command == "world" or args.dataset == "world"):
        frames, side = max(range(*config.frames_range)), max(range(*config.resolution_range))
        budgets, selectors = args.budget or [256, 128, 64], args.selector
        inputs = [EncoderInput(frames, side, keep, selector) for selector in selectors for keep in budgets]
    if not inputs:
        inputs = unmasked(args.budget or (2048, 1024, 512), 224, config.patch_size)
    return [encoder_input.check(config) for encoder_input in inputs]


def _tower(args: argparse.Namespace) -> Tower:
    return open_tower(args.text_tower, tokenizer=args.text_tokenizer)


def _tower_name(args: argparse.Namespace) -> str:
    return Path(args.text_tower).name if args.text_tower else MINILM
