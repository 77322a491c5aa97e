"""Lean decoding against transformers, forced on the tokens that transformers chooses.

    python -m tests.bench.agreement [--llm NAME] [--prompts 500] [--tokens 8] [--quantize int8] [--gguf FILE]
        [--smallest]

One JSON line: the share of positions where both choose the same token, the mismatches with the distance of
the reference's two best scores, and the perplexity of a text (--text FILE) by either. Ends with 1 where a
mismatch has a distance above 0.05; not with --quantize, whose figures are only reported. With --gguf it is
llama.cpp against transformers in float32 on the same file, about the shipped model's example clips.
"""

from __future__ import annotations

import argparse
import math
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm_bridge.kv_cache import kv_from_layers, layers_of
from llm_bridge.llm import LanguageModel, load_llm
from llm_bridge.model import DEFAULT_LLM, resolve_llm
from llm_bridge.prompt import PLACEHOLDER, Message, render
from tests.bench.common import arguments, environment, print_json

NEAR, ROWS = 0.05, 8
THINGS = (
    *("dog", "car", "bird", "boat", "tree", "train", "horse", "robot"),
    *("planet", "river", "clock", "garden", "teacher", "island", "recipe"),
)
ASKED = (
    "What is a {a}?",
    "Tell me a short story about a {a} and a {b}.",
    "How does a {a} differ from a {b}?",
    "Write three sentences about the {a} in the {b}.",
    "List {n} facts about a {a}.",
    "Translate to French: the {a} is behind the {b}.",
    "A {a} costs {n} dollars and a {b} twice as much. What do both cost?",
)


def questions(count: int) -> list[str]:
    """Distinct ones, the same in every run."""
    chance = random.Random(0)
    found: dict[str, None] = {}
    while len(found) < count:
        a, b = chance.sample(THINGS, 2)
        found[chance.choice(ASKED).format(a=a, b=b, n=chance.randrange(2, 99))] = None
    return list(found)


def prompts(llm: LanguageModel, count: int) -> list[list[int]]:
    """Token ids of the questions."""
    return [list(render(llm.tokenizer, [Message.of("user", text)]).ids) for text in questions(count)]


def prefilled(llm: LanguageModel, ids: list[int]) -> tuple[Any, Tensor]:
    kv = kv_from_layers(llm.model.config)
    return kv, llm.advance(kv, input_ids=torch.tensor([ids]))[0]


def compare(reference: LanguageModel, llm: LanguageModel, count: int, tokens: int) -> dict[str, Any]:
    """Positions, those where the choice is the same, and the distances of the others."""
    same, gaps = 0, list[float]()
    asked = prompts(reference, count)
    for start in range(0, count, ROWS):
        rows = asked[start : start + ROWS]
        expected = [prefilled(reference, ids) for ids in rows]
        own = expected if llm is reference else [prefilled(llm, ids) for ids in rows]
        batch = llm.together([layers_of(kv) for kv, _ in own])
        scores = torch.stack([logits for _, logits in expected])
        for _ in range(tokens):
            forced = scores.argmax(dim=1)
            found = batch.step(forced.tolist())
            scores = torch.stack(
                [reference.step(kv, int(t)) for (kv, _), t in zip(expected, forced, strict=True)]
            )
            agrees = found.argmax(dim=1) == scores.argmax(dim=1)
            same += int(agrees.sum())
            best = scores[~agrees].topk(2, dim=1).values
            gaps += (best[:, 0] - best[:, 1]).tolist()
    return _figures(same, gaps)


def compare_gguf(file: Path, count: int, tokens: int) -> dict[str, Any]:
    """As `compare`, of prompts with the visual tokens of real clips, 64 each."""
    from app.chat import SHIPPED, VideoChat
    from llm_bridge.engines.gguf_model import GgufModel
    from llm_bridge.engines.llama_context import LlamaContext

    reference, llm = load_llm(file, device="cpu", dtype=torch.float32), load_llm(file, engine="llamacpp")
    assert isinstance(llm, GgufModel)
    context = LlamaContext(llm.weights, cells=1024)
    with VideoChat(llm=str(file), engine="llamacpp") as chat:
        looked = [chat.look(clip, 64) for clip in sorted((SHIPPED / "examples").glob("*.mp4"))]
    same, gaps = 0, list[float]()
    for number, question in enumerate(questions(count)):
        video = looked[number % len(looked)]
        prompt = render(llm.tokenizer, [Message.of("user", video.visual, question)])
        ids = torch.tensor(prompt.ids)
        rows = reference.embed(ids.clamp_min(0))
        rows[ids == PLACEHOLDER] = video.embedding.float()
        kv = kv_from_layers(reference.model.config)
        expected = reference.advance(kv, inputs_embeds=rows[None])[0]
        context.rewind(0, 0)
        start, length = prompt.spans[0]
        context.append_ids(prompt.ids[:start], at=0, sequence=0)
        context.append_rows(video.embedding, at=start, sequence=0)
        found = context.append_ids(prompt.ids[start + length :], at=start + length, sequence=0)
        for place in range(len(prompt), len(prompt) + tokens):
            token = int(expected.argmax())
            if int(found.argmax()) == token:
                same += 1
            else:
                best = expected.topk(2).values
                gaps.append(float(best[0] - best[1]))
            expected = reference.step(kv, token)
            found = context.step([token], [place], [0])[0]
    return _figures(same, gaps)


def _figures(same: int, gaps: list[float]) -> dict[str, Any]:
    return {
        "positions": same + len(gaps),
        "same": round(same / (same + len(gaps)), 5),
        "mismatches": len(gaps),
        "largest_gap": round(max(gaps, default=0.0), 4),
        "beyond_a_near_tie": sum(gap > NEAR for gap in gaps),
    }


def perplexity(llm: LanguageModel, text: str, length: int = 512, most: int = 8) -> float:
    """Of a text in stretches of some length."""
    ids = torch.tensor(llm.tokenizer(text, add_special_tokens=False).input_ids)
    losses = []
    for stretch in ids[: most * length].split(length):
        if len(stretch) > 1:
            logits = llm.model(input_ids=stretch[None], use_cache=False).logits[0, :-1].float()
            losses.append(torch.nn.functional.cross_entropy(logits, stretch[1:], reduction="none"))
    return math.exp(float(torch.cat(losses).mean()))


@torch.inference_mode()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--llm", default=DEFAULT_LLM)
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--quantize", choices=["int8", "int4"])
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--text", type=Path)
    args = arguments(parser, argv, prompts=2, tokens=2)
    if args.gguf is not None:
        found = compare_gguf(args.gguf, args.prompts, args.tokens)
        result = {
            "bench": "agreement",
            "prompts": args.prompts,
            "gguf": args.gguf.name,
            **found,
            **environment(),
        }
        print_json(result, smallest=args.smallest)
        return int(found["beyond_a_near_tie"] > 0)
    name = resolve_llm(args.llm)
    reference = load_llm(name, device="cpu")
    llm = reference if args.quantize is None else load_llm(name, device="cpu", quantize=args.quantize)
    found = compare(reference, llm, args.prompts, args.tokens)
    result = {"bench": "agreement", "prompts": args.prompts, "quantize": args.quantize, **found}
    if args.text is not None:
        text = args.text.read_text()
        result["perplexity"] = round(perplexity(llm, text), 3)
        result["perplexity_reference"] = round(perplexity(reference, text), 3)
    print_json(result | environment(str(reference.dtype)), smallest=args.smallest)
    return int(args.quantize is None and found["beyond_a_near_tie"] > 0)


if __name__ == "__main__":
    raise SystemExit(main())
