"""Chat models: the `world` and `mvbench` commands, at every encoder input and text-only."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from encoder.budget import input_for
from encoder.errors import ConfigError
from encoder.selection import Selector
from llm_bridge.chat_model import ChatModel
from llm_bridge.towers.stock import StockModel
from training.evaluation.ability_metrics import UNSEEN
from training.evaluation.budget_input import BudgetInput
from training.evaluation.chat_evaluator import ChatEvaluator
from training.evaluation.cli_arguments import (
    about_data,
    encoder_inputs,
    open_model,
    out_path,
    world_source,
)
from training.evaluation.encoder_input import EncoderInput
from training.evaluation.journal import Journal, Sharing
from training.evaluation.mvbench import evaluate_mvbench, mvbench_table, read_mvbench, world_items
from training.evaluation.provenance import about_model, write_result
from training.evaluation.synthetic_chat import evaluate_unseen, evaluate_world, world_table

TEXT_ONLY = "text-only"  # the run without the video; "blind" in result files of earlier versions


def run_world_chat(args: argparse.Namespace) -> int:
    """`world --model`: a chat model at every input and text-only."""
    model = open_model(args)
    source = world_source(args)
    evaluators = _evaluators(model, args)
    metadata = _metadata(model, args)
    journal = Journal(out_path(args), metadata)
    world = source.open()
    results = {
        label: evaluate_world(evaluator, world, source.first, source.count, journal)
        for label, evaluator in evaluators.items()
    }
    unseen_clips = source.count if args.unseen_clips is None else args.unseen_clips
    if unseen_clips and source.split == "test":
        unseen = replace(source, split="unseen").open()
        for label, evaluator in evaluators.items():
            row = evaluate_unseen(evaluator, unseen, source.first, unseen_clips, journal)
            results[label]["goals"][UNSEEN] = row
    return _finish(args, world_table(results), metadata, model, evaluators, results)


def run_mvbench(args: argparse.Namespace) -> int:
    """The `mvbench` command: every input and text-only, in each prompt form."""
    model = open_model(args)
    if args.dataset == "world":
        items = world_items(world_source(args))
    elif args.annotations is None or args.videos is None:
        raise ConfigError("Name the folder of MVBench's JSON files (--annotations) and that of --videos.")
    else:
        items = read_mvbench(Path(args.annotations), Path(args.videos), args.task)
    evaluators = _evaluators(model, args)
    metadata = _metadata(model, args)
    journal = Journal(out_path(args), metadata)
    results = {
        f"{label}, {form}": evaluate_mvbench(evaluator, items, form, journal)
        for form in args.prompt
        for label, evaluator in evaluators.items()
    }
    return _finish(args, mvbench_table(results), metadata, model, evaluators, results)


def _finish(
    args: argparse.Namespace,
    text: str,
    metadata: dict[str, Any],
    model: ChatModel,
    evaluators: Mapping[str, ChatEvaluator],
    results: Mapping[str, Any],
) -> int:
    """Write the file, then print the table: a reader that closes the pipe must not lose the figures."""
    inputs = {
        label: e.encoder_input.to_dict() if e.encoder_input else None for label, e in evaluators.items()
    }
    figures = {"inputs": inputs, "runs": results}
    write_result(out_path(args), args.command_line, model.tower.device, args.recipe, metadata, figures)
    if Sharing().first:
        print(text)
    return 0


def _evaluators(model: ChatModel, args: argparse.Namespace) -> dict[str, ChatEvaluator]:
    """Runs by name: the inputs that were named, else every selector at every budget; and text-only."""
    space = model.tower.space
    if args.setting or args.plan_table:
        inputs: dict[str, EncoderInput | BudgetInput] = {
            str(encoder_input): encoder_input.check(space) for encoder_input in encoder_inputs(args, space)
        }
    else:
        runs = [(selector, keep) for selector in args.selector for keep in args.budget]
        runs += [(selector, args.budget[0]) for selector in args.compare]
        inputs = {f"{selector} {keep}": _input(model, keep, selector, args.plan) for selector, keep in runs}
    evaluators = {
        label: ChatEvaluator(model, encoder_input, args.seed) for label, encoder_input in inputs.items()
    }
    return evaluators if args.no_text_only else {**evaluators, TEXT_ONLY: ChatEvaluator(model, None)}


def _input(model: ChatModel, keep: int, selector: Selector, plan: bool | None) -> EncoderInput | BudgetInput:
    """Of a stock model what the budget buys of each clip, unless declined; of others as `input_of`."""
    if isinstance(model, StockModel) and plan is not False:
        return BudgetInput(keep, selector)
    return input_of(model, keep, selector, bool(plan))


def input_of(model: ChatModel, keep: int, selector: Selector = "flux", plan: bool = True) -> EncoderInput:
    """What a budget buys of a long video by the model's plan table or policy; without `plan` the largest
    trained input."""
    space = model.tower.space
    frames, side = space.full
    if plan:  # the world draws as many frames as are asked for
        frames, side = input_for(keep, sys.maxsize, space, model.tower.plan_table)
    return EncoderInput(frames, side, keep, selector)


def _metadata(model: ChatModel, args: argparse.Namespace) -> dict[str, Any]:
    """What a chat model's answers depend on."""
    table = model.tower.plan_table if isinstance(model, StockModel) else None
    return {
        **about_model(model),
        **({} if table is None else {"plan table": [asdict(row) for row in table.rows]}),
        "decoding": "greedy",
        "system": model.system,
        "time sentence": model.tower.time_form,
        "seed": args.seed,
        **about_data(args),
    }
