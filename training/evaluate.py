"""The paper's tables, one command each; each also runs on the synthetic world, so that anybody can.

    python -m training.evaluate world --model app/pretrained --clips 200 --budget 128 --out runs/world.json
    python -m training.evaluate world --model app/pretrained --budget 64 32 16 --compare uniform random ...
    python -m training.evaluate world --encoder runs/clip/encoder --alignment runs/clip --preset simple
    python -m training.evaluate retrieval --dataset msrvtt --encoder flux_b.pth --alignment clip.safetensors
    python -m training.evaluate action --dataset k400 ...     zero-shot, by prompts
    python -m training.evaluate classify --dataset ssv2 ...   by trained heads, clips x crops
    python -m training.evaluate mvbench --model DIR --annotations DIR --videos DIR
    python -m training.evaluate mvbench --model DIR --dataset world ...
    python -m training.evaluate mvbench --model Qwen/Qwen3-VL-2B-Instruct --budget 512 256 --compare \\
        uniform --prompt words open ...        a stock video model; open answers too

Results go to --out with all they depend on, and items to a journal beside it, so that the same command goes
on after a stop; `accelerate launch -m training.evaluate ...` shares the items over GPUs (on CPUs, torchrun).
Videos that cannot be read are listed and left out. `world` and `mvbench` also run the language model without
the video.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from encoder.errors import ConfigError
from training.command_line import at_least, command_parser, run_command
from training.evaluation.benchmarks import ACTIONS, CLASSIFY, RETRIEVAL
from training.evaluation.chat_runs import run_mvbench, run_world_chat
from training.evaluation.cli_arguments import (
    add_budget_options,
    add_encoder_options,
    add_model_options,
    add_run_options,
    add_world_options,
)
from training.evaluation.encoder_input import SELECTORS
from training.evaluation.encoder_runs import run_action, run_classify, run_retrieval, run_world_encoder
from training.evaluation.mvbench import FORMS, TASKS


def run_world(args: argparse.Namespace) -> int:
    """The `world` command: a chat model, or an encoder alone."""
    if (args.model is None) == (args.encoder is None):
        raise ConfigError("Give either --model (a chat model) or --encoder with --alignment.")
    return run_world_chat(args) if args.encoder is None else run_world_encoder(args)


COMMANDS = {
    "world": run_world,
    "retrieval": run_retrieval,
    "action": run_action,
    "classify": run_classify,
    "mvbench": run_mvbench,
}


def parser() -> argparse.ArgumentParser:
    """One sub-command per table."""
    top = command_parser("training.evaluate", __doc__)
    commands = top.add_subparsers(dest="command", required=True)

    world = commands.add_parser("world", help="the synthetic world's held-out clips")
    add_model_options(world, required=False)
    _encoder_options(world, required=False)
    add_budget_options(world, [128])
    _chat_options(world)
    world.add_argument(
        "--unseen-clips",
        type=at_least(0),
        metavar="N",
        help="with --model: also the kind of N things that training never showed; default: as --clips",
    )
    world.add_argument("--no-retrieval", action="store_true", help="with --encoder: attribute heads alone")

    retrieval = commands.add_parser("retrieval", help="zero-shot text-to-video and video-to-text retrieval")
    retrieval.add_argument("--dataset", choices=[*RETRIEVAL, "world"], required=True)
    _encoder_options(retrieval)
    add_budget_options(retrieval, None)
    _file_options(retrieval)
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
    _encoder_options(action)
    add_budget_options(action, None)
    _file_options(action)
    action.add_argument("--classes", help="file of class names")

    classify = commands.add_parser("classify", help="classification by trained heads")
    classify.add_argument("--dataset", choices=[*CLASSIFY, "world"], required=True)
    _encoder_options(classify)
    add_budget_options(classify, None)
    _file_options(classify)
    classify.add_argument("--classes", help="file of class names")
    classify.add_argument("--clips-per-video", type=at_least(1), help="default: as published for the dataset")
    classify.add_argument("--crops", type=int, choices=[1, 3], help="default: as published for the dataset")
    classify.add_argument(
        "--attribute", choices=["noun", "motion"], default="noun", help="of the synthetic world"
    )

    mvbench = commands.add_parser("mvbench", help="20 tasks of multiple choice")
    mvbench.add_argument("--dataset", choices=["mvbench", "world"], default="mvbench")
    add_model_options(mvbench)
    mvbench.add_argument("--annotations", metavar="DIR", help="the folder of TASK.json files")
    mvbench.add_argument("--videos", metavar="DIR", help="the folder of star, perception, clevrer, ...")
    mvbench.add_argument("--task", nargs="+", choices=list(TASKS), metavar="TASK", help="only these")
    mvbench.add_argument(
        "--prompt",
        nargs="+",
        choices=FORMS,
        default=["flash", "videochat2"],
        help="of VideoChat-Flash or VideoChat2, with their readers of letters; words: as flash, but the "
        "words of an option count as its letter; open: the options are not shown, and the answer counts as "
        "the one whose words it has",
    )
    add_budget_options(mvbench, [128])
    _chat_options(mvbench)

    for command in (world, retrieval, action, classify, mvbench):
        command.add_argument(
            "--setting",
            nargs="+",
            default=[],
            metavar="16x168:1024",
            help="FRAMESxRESOLUTION[:TOKENS][/SELECTOR][+vid-tldr], one run for each",
        )
        command.add_argument("--plan-table", metavar="FILE", help="also one run for each of its rows")
        add_world_options(command, clips=200)
        command.add_argument(
            "--split", choices=["test", "unseen"], default="test", help="of the synthetic world"
        )
        add_run_options(command)
        command.add_argument("--out", help="JSON file for all figures; a journal lies beside it")
    return top


def _encoder_options(command: argparse.ArgumentParser, *, required: bool = True) -> None:
    add_encoder_options(command, required=required)
    command.add_argument(
        "--text-tower",
        help="a MobileCLIP file, or a Hugging Face folder; default: the small sentence encoder",
    )
    command.add_argument("--text-tokenizer", help="of a MobileCLIP file; default: CLIP's")
    command.add_argument("--workers", type=at_least(1), default=2, help="threads that decode")


def _file_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--annotations", metavar="FILE", help="the test set's list, as published")
    command.add_argument("--videos", metavar="DIR", help="folder of its videos")
    command.add_argument("--limit", type=at_least(1), help="only so many videos")


def _chat_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--compare",
        nargs="+",
        default=[],
        choices=SELECTORS,
        metavar="SELECTOR",
        help="further selectors, at the first budget alone",
    )
    command.add_argument(
        "--plan",
        action=argparse.BooleanOptionalAction,
        help="the frames and size that a budget buys, as VideoChat asks, in the place of the largest input; "
        "stock video models: for each clip, and unless --no-plan is given",
    )
    command.add_argument(
        "--no-text-only", "--no-blind", action="store_true", help="skip the run without the video"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    return run_command(parser(), lambda args: COMMANDS[args.command](args), argv)


if __name__ == "__main__":
    sys.exit(main())
