"""The same questions about the same clip, answered by every engine: is it the same text?

    python -m tests.bench.engines [--gguf box-F16.gguf] [--vllm] [--dtype bfloat16] [--smallest]

The shipped model by the local engine, and beside it by llama.cpp from an F16 file of `fluxchat export`
(--gguf; the interpreter needs llama-cpp-python), and by a vLLM server that is started for it (--vllm; in the
Python that FLUXCHAT_VLLM_PYTHON names). The judge is the local engine in float32: where an answer leaves the
judge's, the tokens before are given to both, and the distance of the judge's scores for its own token and for
the other one tells a near tie. One JSON line: the answers of the judge, and of each engine how many are equal
letter by letter, to the judge's and to the local engine's, and every difference. Ends with 1 where one is no
near tie.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from app.chat import SHIPPED, VideoChat
from llm_bridge.engines.engine import Engine, Request, TokenStream
from llm_bridge.engines.local import LocalAnswer
from llm_bridge.kv_cache import kv_from_layers
from tests.bench.common import arguments, environment, print_json

# In scores. bfloat16 tells scores between 16 and 32, as these are, only in steps of 0.125: two of them.
NEAR = {"float32": 0.05, "bfloat16": 0.25}
QUESTIONS = (
    "What is shown in the video?",
    "Which way does it move?",
    "How many things are there?",
    "Describe the video.",
    "Is there a dog in the video?",
    "What colour is the background?",
    "Does anything change in the video?",
    "When does it appear?",
    "Is it (a) a vehicle, (b) an animal, (c) a plant or (d) a piece of furniture?",
    "What happens at the end?",
)


@dataclass(frozen=True)
class Said:
    """An answer: its text, what was asked of the engine for it, and the tokens that came."""

    text: str
    request: Request
    tokens: tuple[int, ...]


@dataclass
class Listening:
    """An engine that notes what is asked of it and what it makes."""

    engine: Engine
    requests: list[Request] = field(default_factory=list)
    made: list[list[int]] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def start(self, request: Request) -> TokenStream:
        self.requests.append(request)
        self.made.append([])
        return _Noted(self.engine.start(request), self.made[-1])


@dataclass
class _Noted:
    stream: TokenStream
    made: list[int]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def __iter__(self) -> Iterator[int]:
        for token in self.stream:
            self.made.append(token)
            yield token


def answers(chat: VideoChat, clip: str, budget: int, tokens: int, questions: int) -> list[Said]:
    """Of so many questions, greedy, each asked alone and after one another."""
    chat._engine = listening = Listening(chat._engine)
    texts = [
        chat.ask(clip, text, budget=budget, max_new_tokens=tokens).text for text in QUESTIONS[:questions]
    ]
    made = zip(texts, listening.requests, listening.made, strict=True)
    return [Said(text, request, tuple(tokens)) for text, request, tokens in made]


@torch.inference_mode()
def scores_after(chat: VideoChat, request: Request, tokens: tuple[int, ...]) -> Tensor:
    """The judge's scores (V,) of the next token, after some of an answer."""
    llm = chat.model.llm
    embedded = LocalAnswer(llm, request).inputs(0, len(request.prompt))["inputs_embeds"]
    rows = torch.cat([embedded, llm.embed(torch.tensor(tokens, dtype=torch.long))[None]], dim=1)
    return llm.advance(kv_from_layers(llm.model.config), inputs_embeds=rows)[0]


def difference(judge: VideoChat, own: Said, other: Said) -> dict[str, Any] | None:
    """Where two answers part, and how far the judge's scores of both tokens lie apart; None: nowhere."""
    ended = min(judge.model.llm.eos_ids)
    left, right = (*own.tokens, ended), (*other.tokens, ended)
    place = next((at for at, pair in enumerate(zip(left, right, strict=False)) if pair[0] != pair[1]), None)
    if place is None:
        return None
    scores = scores_after(judge, own.request, own.tokens[:place])
    gap = float(scores[left[place]] - scores[right[place]])
    return {"token": place, "words": [own.text, other.text], "gap": round(gap, 4)}


def compare(judge: VideoChat, expected: list[Said], local: list[Said], found: list[Said]) -> dict[str, Any]:
    """How many texts of an engine are those of the judge, and of the local engine; the others."""
    parted = [
        {"question": question, **where}
        for question, own, other in zip(QUESTIONS, expected, found, strict=False)
        if (where := difference(judge, own, other)) is not None
    ]
    return {
        "same_as_float32": sum(a.text == b.text for a, b in zip(expected, found, strict=True)),
        "same_as_local": sum(a.text == b.text for a, b in zip(local, found, strict=True)),
        "differences": parted,
    }


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--gguf", type=Path, help="the shipped model's language model as F16")
    parser.add_argument("--vllm", action="store_true", help="start a vLLM server too")
    parser.add_argument("--dtype", choices=list(NEAR), default="bfloat16", help="of local and vllm")
    parser.add_argument("--clip", default=str(SHIPPED / "examples" / "flying-saucer-left.mp4"))
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=48, help="longest answer")
    parser.add_argument("--questions", type=int, default=len(QUESTIONS), help="how many of them")
    args = arguments(parser, argv, budget=16, tokens=4, questions=2)
    asked = (args.clip, args.budget, args.tokens, args.questions)
    said: dict[str, list[Said]] = {}
    with VideoChat(device="cpu", dtype=args.dtype, engine="local") as chat:
        said["local"] = answers(chat, *asked)
    if args.gguf is not None:
        with VideoChat(llm=str(args.gguf), device="cpu", engine="llamacpp") as chat:
            said["llamacpp"] = answers(chat, *asked)
    if args.vllm:
        with VideoChat(device="cpu", dtype=args.dtype, engine="vllm") as chat:
            said["vllm"] = answers(chat, *asked)
    with VideoChat(device="cpu", dtype="float32", engine="local") as judge:
        expected = answers(judge, *asked)
        results = {name: compare(judge, expected, said["local"], found) for name, found in said.items()}
    print_json(
        {
            "bench": "engines",
            **environment(args.dtype),
            "clip": Path(args.clip).name,
            "budget": args.budget,
            "questions": len(expected),
            "answers": [one.text for one in expected],
            "results": results,
        },
        smallest=args.smallest,
    )
    gaps = [where["gap"] for result in results.values() for where in result["differences"]]
    return int(any(gap > NEAR[args.dtype] for gap in gaps))


if __name__ == "__main__":
    raise SystemExit(main())
