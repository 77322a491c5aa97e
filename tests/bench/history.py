"""Whether a greedy answer depends on anything but its question: what was asked before, caches, the batch.

    python -m tests.bench.history [--tiny 2000] [--box 100] [--seed 0] [--threads 8] [--smallest]

Random conversations on a tiny random model, and on the box's: prompts that share videos, words and turns,
follow-ups, several scopes, answers of many lengths and some stopped in the middle. Each is asked alone
without caches, alone with them, and by several threads at once with caches that are too small and with
batched decoding. The last line is one JSON line, `differing` counts answers other than those alone; exit
status 1 if there are any.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llm_bridge.compute_worker import ComputeWorker
from llm_bridge.generation import Generation
from llm_bridge.kv_cache import PrefixCache
from llm_bridge.llm import LanguageModel, load_llm
from llm_bridge.prompt import Message, Visual, render
from llm_bridge.sampling import SamplingParams
from tests import tiny_llms
from tests.bench.common import arguments, environment, print_json

VIDEOS = 12
WORDS = [
    "what",
    "is",
    "it",
    "where",
    "does",
    "the",
    "red",
    "car",
    "move",
    "how",
    "many",
    "birds",
    "are",
    "there",
    "describe",
    "the",
    "video",
    "a",
    "dog",
    "runs",
    "to",
    "the",
    "left",
    "then",
    "up",
    "and",
    "down",
    "why",
    "who",
    "sleeps",
    "while",
    "sun",
    "shines",
    "yes",
    "no",
    "maybe",
    "two",
    "three",
    "seconds",
    "before",
    "after",
]
SYSTEMS = (
    None,
    "Answer briefly.",
    "You watch videos. Say only what is there to see, and say it in plain words.",
)
THREADS = 8


@dataclass(frozen=True)
class Question:
    """What is asked in one turn. key: names it; equal keys must get equal answers. stop_after: pieces of the
    answer that are read before it is stopped, None for all of them."""

    messages: tuple[Message, ...]
    max_new_tokens: int
    scope: str
    stop_after: int | None

    @property
    def key(self) -> tuple[Any, ...]:
        """All that its answer may depend on."""
        return self.messages, self.max_new_tokens


def words(chance: random.Random, longest: int) -> str:
    """A question or answer of up to so many words."""
    return " ".join(chance.choices(WORDS, k=chance.randint(1, longest))) + chance.choice("?.!")


def visual_of(number: int, tokens: int) -> Visual:
    """One of the videos, as so many tokens of it."""
    return Visual(tokens, f"video {number}/{tokens}", 12.5, (0.5, 4.0, 8.0) if number % 3 else ())


def conversations(count: int, seed: int, sizes: Sequence[int]) -> list[list[Question]]:
    """Random conversations of one to four turns; the earlier answers in them are random words.

    sizes: of the videos, in tokens.
    """
    chance = random.Random(seed)
    common = [words(chance, 8) for _ in range(6)]  # questions that many ask
    made = []
    for _ in range(count):
        system, scope = chance.choice(SYSTEMS), chance.choice(("", "a", "b"))
        messages: list[Message] = [Message.of("system", system)] if system else []
        turns: list[Question] = []
        for turn in range(chance.choice((1, 1, 2, 3, 4))):
            shown = []
            if chance.random() < (0.85 if turn == 0 else 0.1):
                number = chance.randrange(VIDEOS)
                shown = [visual_of(number, sizes[number % len(sizes)])]
            asked = chance.choice(common) if chance.random() < 0.4 else words(chance, 40)
            messages = [*messages, Message.of("user", *shown, asked)]
            stopped = chance.randint(1, 4) if chance.random() < 0.15 else None
            turns.append(Question(tuple(messages), chance.choice((1, 4, 12, 24)), scope, stopped))
            messages = [*messages, Message.of("assistant", words(chance, 25))]
        made.append(turns)
    return made


def answer(
    llm: LanguageModel, question: Question, prefixes: PrefixCache | None, worker: ComputeWorker | None
) -> tuple[str, bool, int, int]:
    """The text, whether it was stopped, and how many tokens of the prompt were reused, of how many."""
    prompt = render(llm.tokenizer, question.messages)
    visuals = [
        0.1
        * torch.randn(
            v.tokens, llm.hidden_size, generator=torch.Generator().manual_seed(len(v.key) + v.tokens)
        )
        for v in prompt.visuals
    ]
    stop = threading.Event()
    generation = Generation(
        llm,
        prompt,
        visuals,
        SamplingParams(question.max_new_tokens),
        prefixes,
        question.scope,
        stop,
        worker=worker,
    )
    pieces = []
    for piece in generation:
        pieces.append(piece)
        if len(pieces) == question.stop_after:
            stop.set()
    stats = generation.stats
    return "".join(pieces), stats.finish == "cancelled", stats.cached_tokens, stats.prompt_tokens


def compare(
    llm: LanguageModel, talks: Sequence[Sequence[Question]], threads: int, cache_tokens: int
) -> dict[str, Any]:
    """Ask all, in the three ways; counts of questions, differing answers, reused tokens, and CPU seconds."""
    expected: dict[tuple[Any, ...], str] = {}
    counts: dict[str, int] = {"questions": 0, "distinct": 0}
    seconds: dict[str, float] = {}
    lock = threading.Lock()

    def ask(way: str, question: Question, prefixes: PrefixCache | None, worker: ComputeWorker | None) -> None:
        text, stopped, cached, length = answer(llm, question, prefixes, worker)
        whole = expected[question.key]
        same = whole.startswith(text) if stopped else text == whole
        with lock:
            counts[f"differing_{way}"] += not same
            counts[f"cached_{way}"] += cached
            counts[f"prompt_{way}"] += length

    def run(way: str, everything: Callable[[], object]) -> None:
        counts.update({f"differing_{way}": 0, f"cached_{way}": 0, f"prompt_{way}": 0})
        start = time.process_time()
        everything()
        seconds[way] = round(time.process_time() - start, 1)

    def first() -> None:
        for question in (question for talk in talks for question in talk):
            if question.key not in expected:
                whole = Question(question.messages, question.max_new_tokens, question.scope, None)
                expected[question.key] = answer(llm, whole, None, None)[0]

    def in_order() -> None:
        prefixes = PrefixCache(1 << 40, llm.kv_bytes_per_token)
        for talk in talks:
            for question in talk:
                ask("cached", question, prefixes, None)

    def together() -> None:
        per_token = llm.kv_bytes_per_token
        prefixes, worker = PrefixCache(cache_tokens * per_token, per_token), ComputeWorker(llm)

        def whole_talk(talk: Sequence[Question]) -> None:
            for question in talk:
                ask("batched", question, prefixes, worker)

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(whole_talk, talks))
        worker.close()
        counts["steps"], counts["made"] = worker.steps, worker.made

    counts["questions"] = sum(map(len, talks))
    run("alone", first)
    counts["distinct"] = len(expected)
    run("cached", in_order)
    run("batched", together)
    differing = counts["differing_cached"] + counts["differing_batched"]
    return {
        "differing": differing,
        **counts,
        "cpu_s": seconds,
        "dtype": str(llm.dtype).removeprefix("torch."),
    }


def tiny(
    count: int, seed: int, threads: int, dtype: torch.dtype = torch.float32, cache_tokens: int = 4000
) -> dict[str, Any]:
    """With a tiny random model."""
    with tempfile.TemporaryDirectory() as folder:
        path = tiny_llms.make(Path(folder) / "llm", "qwen2", max_position_embeddings=4096)
        llm = load_llm(path, device="cpu", dtype=dtype)
        return compare(llm, conversations(count, seed, (16, 33, 64, 120, 300)), threads, cache_tokens)


def box(count: int, seed: int, threads: int) -> dict[str, Any]:
    """With the language model that ships."""
    from llm_bridge.assets.fetch import default_llm_path

    llm = load_llm(default_llm_path(), device="cpu")
    return compare(llm, conversations(count, seed, (64, 128, 256)), threads, 6000)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tiny", type=int, default=2000, help="conversations with a tiny random model")
    parser.add_argument("--box", type=int, default=100, help="conversations with the model that ships")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=THREADS, help="that ask at once")
    args = arguments(parser, argv, tiny=3, box=1, threads=2)
    results: dict[str, Any] = {}
    if args.tiny:
        results["tiny"] = tiny(args.tiny, args.seed, args.threads)
    if args.box:
        results["box"] = box(args.box, args.seed, args.threads)
    differing = sum(result["differing"] for result in results.values())
    whole = {"bench": "history", **environment(), "seed": args.seed, "differing": differing, **results}
    print_json(whole, smallest=args.smallest)
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main())
