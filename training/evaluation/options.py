"""The command line of `python -m training.evaluate`: which options each table takes."""

from __future__ import annotations

import argparse

from training.evaluation.benchmarks import ACTIONS, CLASSIFY, RETRIEVAL
from training.evaluation.encoder_input import DTYPES
from training.evaluation.mvbench import TASKS

SELECTORS = ["flux", "random", "uniform", "tube"]


def parser(doc: str | None) -> argparse.ArgumentParser:
    """One sub-command per table."""
    top = argparse.ArgumentParser(
        prog="python -m training.evaluate",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True)

    world = commands.add_parser("world", help="the demo world's held-out clips")
    world.add_argument("--model", help="a saved chat model, such as app/pretrained")
    _encoder(world, required=False)
    _budgets(world, [128])
    _chat(world)
    world.add_argument(
        "--unseen-clips",
        type=int,
        metavar="N",
        help="with --model: also the kind of N things that training never showed; default: as --clips",
    )
    world.add_argument("--no-retrieval", action="store_true", help="with --encoder: attribute heads alone")

    retrieval = commands.add_parser("retrieval", help="zero-shot text-to-video and video-to-text retrieval")
    retrieval.add_argument("--dataset", choices=[*RETRIEVAL, "world"], required=True)
    _encoder(retrieval)
    _budgets(retrieval, None)
    _files(retrieval)
    retrieval.add_argument("--dsl-scale", type=float, default=1.0, help="scale inside the dual softmax")
    retrieval.add_argument(
        "--text",
        choices=["auto", "plain", "raw"],
        default="auto",
        help="captions in lower case without punctuation, or as they are (auto: as they are for sentence "
        "encoders)",
    )

    action = commands.add_parser("action", help="zero-shot action recognition by prompts")
    action.add_argument("--dataset", choices=[*ACTIONS, "world"], required=True)
    _encoder(action)
    _budgets(action, None)
    _files(action)
    action.add_argument("--classes", help="file of class names")

    classify = commands.add_parser("classify", help="classification by trained heads")
    classify.add_argument("--dataset", choices=[*CLASSIFY, "world"], required=True)
    _encoder(classify)
    _budgets(classify, None)
    _files(classify)
    classify.add_argument("--classes", help="file of class names")
    classify.add_argument("--clips-per-video", type=int, help="default: as published for the dataset")
    classify.add_argument("--crops", type=int, choices=[1, 3], help="default: as published for the dataset")
    classify.add_argument("--attribute", choices=["noun", "motion"], default="noun", help="of the demo world")

    mvbench = commands.add_parser("mvbench", help="20 tasks of multiple choice")
    mvbench.add_argument("--dataset", choices=["mvbench", "world"], default="mvbench")
    mvbench.add_argument("--model", required=True, help="a saved chat model, such as app/pretrained")
    mvbench.add_argument("--annotations", metavar="DIR", help="the folder of TASK.json files")
    mvbench.add_argument("--videos", metavar="DIR", help="the folder of star, perception, clevrer, ...")
    mvbench.add_argument("--task", nargs="+", choices=list(TASKS), metavar="TASK", help="only these")
    mvbench.add_argument(
        "--prompt",
        nargs="+",
        choices=["flash", "videochat2", "words"],
        default=["flash", "videochat2"],
        help="of VideoChat-Flash or VideoChat2, with their readers of letters; words: as flash, but the "
        "words of an option count as its letter",
    )
    _budgets(mvbench, [128])
    _chat(mvbench)

    for command in (world, retrieval, action, classify, mvbench):
        _common(command)
    return top


def _encoder(command: argparse.ArgumentParser, *, required: bool = True) -> None:
    command.add_argument(
        "--encoder", required=required, help="a folder, an official file, or a chat model's folder"
    )
    command.add_argument("--alignment", help="alignment.safetensors of training.clip, or its folder")
    command.add_argument(
        "--text-tower",
        help="a MobileCLIP file, or a Hugging Face folder; default: the small sentence encoder",
    )
    command.add_argument("--text-tokenizer", help="of a MobileCLIP file; default: CLIP's")
    command.add_argument("--pool", type=int, help="pooling head; default: by the number of tokens")
    command.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    command.add_argument("--block", type=int, default=8, help="videos that go through the encoder together")
    command.add_argument("--workers", type=int, default=2, help="threads that decode")


def _files(command: argparse.ArgumentParser) -> None:
    command.add_argument("--annotations", metavar="FILE", help="the test set's list, as published")
    command.add_argument("--videos", metavar="DIR", help="folder of its videos")
    command.add_argument("--limit", type=int, help="only so many videos")


def _budgets(command: argparse.ArgumentParser, default: list[int] | None) -> None:
    command.add_argument("--budget", type=int, nargs="+", default=default, help="tokens, one run for each")
    command.add_argument("--selector", nargs="+", default=["flux"], choices=SELECTORS)


def _chat(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--compare",
        nargs="+",
        default=[],
        choices=SELECTORS,
        metavar="SELECTOR",
        help="further selectors, at the first budget alone",
    )
    command.add_argument("--plan", action="store_true", help="the model's own input for each budget")
    command.add_argument("--no-blind", action="store_true", help="skip the run without video")


def _common(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--setting",
        nargs="+",
        default=[],
        metavar="16x168:1024",
        help="FRAMESxRESOLUTION[:TOKENS][/SELECTOR][+vid-tldr], one run for each",
    )
    command.add_argument("--plan-table", metavar="FILE", help="also one run for each of its rows")
    command.add_argument("--clips", type=int, default=200, help="of the demo world")
    command.add_argument("--first", type=int, default=0, help="number of the world's first sample")
    command.add_argument("--split", choices=["test", "unseen"], default="test", help="of the demo world")
    command.add_argument("--preset", choices=["simple", "solo", "full"], default="full")
    command.add_argument("--nouns", type=int, help="nouns of the world that take part")
    command.add_argument("--seed", type=int, default=0, help="for selectors that draw")
    command.add_argument("--device")
    command.add_argument("--recipe", help="what the weights were trained with, for the result file")
    command.add_argument("--out", help="JSON file for all figures; a journal lies beside it")
