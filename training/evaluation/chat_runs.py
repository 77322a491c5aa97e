"""Chat models: the `world` and `mvbench` commands, at every setting and without the video."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from encoder.budget import input_for
from encoder.errors import ConfigError
from encoder.selection import Selector
from llm_bridge.model import VideoLanguageModel
from training.evaluation.ability_metrics import UNSEEN
from training.evaluation.chat_evaluator import Watcher
from training.evaluation.cli_arguments import (
    about_data,
    about_model,
    finish,
    path_of,
    settings_of,
    sharing_device,
    world_source,
)
from training.evaluation.encoder_input import Setting
from training.evaluation.mvbench import evaluate_mvbench, mvbench_table, read_mvbench, world_items
from training.evaluation.results import Journal
from training.evaluation.synthetic import evaluate_unseen, evaluate_world, world_table


def run_world_chat(args: argparse.Namespace) -> int:
    """`world --model`: a chat model at every setting and blind."""
    model = VideoLanguageModel.from_pretrained(args.model, device=sharing_device(args.device))
    source = world_source(args)
    watchers = _watchers(model, args)
    told = _told(model, args, **about_data(args))
    journal = Journal(path_of(args.out), told)
    world = source.open()
    results = {
        label: evaluate_world(watcher, world, source.first, source.count, journal)
        for label, watcher in watchers.items()
    }
    unseen = source.count if args.unseen_clips is None else args.unseen_clips
    if unseen and source.split == "test":
        strange = replace(source, split="unseen").open()
        for label, watcher in watchers.items():
            row = evaluate_unseen(watcher, strange, source.first, unseen, journal)
            results[label]["goals"][UNSEEN] = row
    return finish(args, world_table(results), told, model.device, watchers, {"runs": results})


def run_mvbench(args: argparse.Namespace) -> int:
    """The `mvbench` command: every setting and blind, in each prompt form."""
    model = VideoLanguageModel.from_pretrained(args.model, device=sharing_device(args.device))
    if args.dataset == "world":
        items = world_items(world_source(args))
    elif args.annotations is None or args.videos is None:
        raise ConfigError("Name the folder of MVBench's JSON files (--annotations) and that of --videos.")
    else:
        items = read_mvbench(Path(args.annotations), Path(args.videos), args.task)
    watchers = _watchers(model, args)
    told = _told(model, args, **about_data(args))
    journal = Journal(path_of(args.out), told)
    results = {
        f"{label}, {form}": evaluate_mvbench(watcher, items, form, journal)
        for form in args.prompt
        for label, watcher in watchers.items()
    }
    return finish(args, mvbench_table(results), told, model.device, watchers, {"runs": results})


def _watchers(model: VideoLanguageModel, args: argparse.Namespace) -> dict[str, Watcher]:
    """Runs by name: the settings given, else every selector at every budget; and blind."""
    if args.setting or args.plan_table:
        settings = {str(s): s.check(model.config.encoder) for s in settings_of(args, model.config.encoder)}
    else:
        runs = [(selector, keep) for selector in args.selector for keep in args.budget]
        runs += [(selector, args.budget[0]) for selector in args.compare]
        settings = {
            f"{selector} {keep}": input_of(model, keep, selector, args.plan) for selector, keep in runs
        }
    watchers = {label: Watcher(model, setting, args.seed) for label, setting in settings.items()}
    return watchers if args.no_blind else {**watchers, "blind": Watcher(model, None)}


def input_of(model: VideoLanguageModel, keep: int, selector: Selector = "flux", plan: bool = True) -> Setting:
    """What a budget buys of a long video by the model's plan table or policy; without `plan` the largest
    trained input."""
    config = model.config.encoder
    frames, side = max(range(*config.frames_range)), max(range(*config.resolution_range))
    if plan:  # the world draws as many frames as are asked for
        frames, side = input_for(keep, sys.maxsize, config, model.plan_table)
    return Setting(frames, side, keep, selector)


def _told(model: VideoLanguageModel, args: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """What a chat model's answers depend on."""
    return {
        **about_model(model),
        "decoding": "greedy",
        "system": model.config.system,
        "time sentence": model.config.time_sentence,
        "seed": args.seed,
        **more,
    }
