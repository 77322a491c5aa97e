"""Encoders: the `retrieval`, `action` and `classify` commands, and `world` without a language model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from encoder.errors import ConfigError
from llm_bridge.text_encoders.text_towers import MINILM, SentenceTower, Tower, open_tower
from training.evaluation.action import accuracy_table, evaluate_action
from training.evaluation.alignment import Alignment, read_alignment
from training.evaluation.benchmarks import CLASSIFY, RETRIEVAL, read_retrieval
from training.evaluation.classify import evaluate_classify
from training.evaluation.cli_arguments import (
    about_data,
    finish,
    labelled,
    needed,
    path_of,
    settings_of,
    sharing_device,
    world_examples,
    world_source,
)
from training.evaluation.encoder_input import Setting, Viewer, unmasked
from training.evaluation.results import Journal, weights_hash
from training.evaluation.retrieval import evaluate_retrieval, retrieval_table
from training.evaluation.run import Run, header
from training.evaluation.synthetic import WorldClips, encoder_table, evaluate_encoder
from training.evaluation.views import Views
from training.synthetic.phrases import ANSWERS


def run_world_encoder(args: argparse.Namespace) -> int:
    """`world --encoder`: attribute heads, and retrieval by caption."""
    viewer = Viewer(args.encoder, sharing_device(args.device), args.dtype)
    alignment = _alignment(args, viewer)
    settings = _encoder_settings(args, viewer)
    tower = None if args.no_retrieval else _tower(args)
    source = world_source(args)
    told = _encoder_header(args, viewer, alignment, Views())
    run = _run(args, viewer, Views(), told)
    clips = WorldClips.of(source)
    results = [evaluate_encoder(run, alignment, tower, clips, setting) for setting in settings]
    return finish(
        args,
        encoder_table(settings, results),
        told,
        viewer.device,
        {},
        {"text tower": _tower_name(args), "settings": results},
    )


def run_retrieval(args: argparse.Namespace) -> int:
    """The `retrieval` command."""
    viewer = Viewer(args.encoder, sharing_device(args.device), args.dtype)
    alignment, tower, world = _alignment(args, viewer), _tower(args), args.dataset == "world"
    if world:
        examples = world_examples(args, "noun").examples
    else:
        annotations, videos = needed(args)
        examples = read_retrieval(annotations, videos, RETRIEVAL[args.dataset])
    examples = examples[: args.limit]
    told = _encoder_header(args, viewer, alignment, Views())
    run = _run(args, viewer, Views(), told)
    settings = _encoder_settings(args, viewer)
    raw = isinstance(tower, SentenceTower) if args.text == "auto" else args.text == "raw"
    results = [
        evaluate_retrieval(
            run,
            alignment,
            tower,
            examples,
            setting,
            duplicates="equal" if world else "strict",
            scale=args.dsl_scale,
            raw_text=raw,
        )
        for setting in settings
    ]
    more = {"text tower": _tower_name(args), "text": "raw" if raw else "plain", "settings": results}
    return finish(args, retrieval_table(settings, results), told, viewer.device, {}, more)


def run_action(args: argparse.Namespace) -> int:
    """The `action` command."""
    viewer = Viewer(args.encoder, sharing_device(args.device), args.dtype)
    alignment, tower = _alignment(args, viewer), _tower(args)
    data = labelled(args)
    # The world's motions as its captions tell them.
    names = [ANSWERS[motion] for motion in data.classes] if args.dataset == "world" else None  # type: ignore[index]
    prompts = ("it {}", "the object {}", "something {}") if names is not None else None
    told = _encoder_header(args, viewer, alignment, Views())
    run = _run(args, viewer, Views(), told)
    settings = _encoder_settings(args, viewer)
    options: dict[str, Any] = {} if prompts is None else {"prompts": prompts, "names": names}
    results = [evaluate_action(run, alignment, tower, data, setting, **options) for setting in settings]
    more = {"text tower": _tower_name(args), "settings": results}
    return finish(args, accuracy_table(settings, results), told, viewer.device, {}, more)


def run_classify(args: argparse.Namespace) -> int:
    """The `classify` command."""
    viewer = Viewer(args.encoder, sharing_device(args.device), args.dtype)
    alignment = _alignment(args, viewer) if args.alignment else None
    data = labelled(args)
    usual = CLASSIFY.get(args.dataset)
    clips, crops = (usual.clips, usual.crops) if usual else (1, 1)
    views = Views(args.clips_per_video or clips, args.crops or crops, "crop")
    told = _encoder_header(args, viewer, alignment, views, attribute=args.attribute)
    run = _run(args, viewer, views, told)
    settings = _encoder_settings(args, viewer)
    results = [
        evaluate_classify(run, data, setting, alignment=alignment, attribute=args.attribute)
        for setting in settings
    ]
    return finish(args, accuracy_table(settings, results), told, viewer.device, {}, {"settings": results})


def _alignment(args: argparse.Namespace, viewer: Viewer) -> Alignment:
    if args.alignment is None:
        raise ConfigError("Name the alignment that training.clip saved beside the encoder (--alignment).")
    return read_alignment(args.alignment).to(viewer.device)


def _tower(args: argparse.Namespace) -> Tower:
    return open_tower(args.text_tower, tokenizer=args.text_tokenizer)


def _tower_name(args: argparse.Namespace) -> str:
    return Path(args.text_tower).name if args.text_tower else MINILM


def _run(args: argparse.Namespace, viewer: Viewer, views: Views, told: dict[str, Any]) -> Run:
    return Run(
        viewer,
        Journal(path_of(args.out), told),
        views,
        args.pool,
        args.seed,
        block=args.block,
        workers=args.workers,
    )


def _encoder_header(
    args: argparse.Namespace, viewer: Viewer, alignment: Alignment | None, views: Views, **more: Any
) -> dict[str, Any]:
    beside = [] if alignment is None else [alignment.align, *alignment.heads.values()]
    more |= {"alignment": weights_hash(*beside) if beside else None, "block": args.block}
    return header(viewer, views, args.pool, args.seed, **about_data(args), **more)


def _encoder_settings(args: argparse.Namespace, viewer: Viewer) -> list[Setting]:
    """Those given; else for the world the largest trained input at every budget, and for public sets the
    upper lines of the paper's tables: 8, 4 and 2 frames of 224 pixels, nothing dropped."""
    config = viewer.config
    settings = settings_of(args, config)
    if not settings and (args.command == "world" or args.dataset == "world"):
        frames, side = max(range(*config.frames_range)), max(range(*config.resolution_range))
        budgets, selectors = args.budget or [256, 128, 64], args.selector
        settings = [Setting(frames, side, keep, selector) for selector in selectors for keep in budgets]
    if not settings:
        settings = unmasked(args.budget or (2048, 1024, 512), 224, config.patch_size)
    return [setting.check(config) for setting in settings]
