"""Lean decoding against transformers, forced on the tokens that transformers chooses.

    python -m tests.bench.agreement [--llm NAME] [--prompts 500] [--tokens 8] [--quantize int8]

One JSON line: the share of positions where both choose the same token, the mismatches with the distance of
the reference's two best scores, and the perplexity of a text (--text FILE) by either. Ends with 1 where a
mismatch has a distance above 0.05; not with --quantize, whose figures are only reported.
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
from llm_bridge.prompt import Message, render
from tests.bench.common import environment, print_json

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


def prompts(llm: LanguageModel, count: int) -> list[list[int]]:
    """Token ids of distinct questions, the same in every run."""
    chance = random.Random(0)
    found: dict[str, list[int]] = {}
    while len(found) < count:
        a, b = chance.sample(THINGS, 2)
        text = chance.choice(ASKED).format(a=a, b=b, n=chance.randrange(2, 99))
        found[text] = list(render(llm.tokenizer, [Message.of("user", text)]).ids)
    return list(found.values())


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
    return {
        "positions": count * tokens,
        "same": round(same / (count * tokens), 5),
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
    parser.add_argument("--text", type=Path)
    args = parser.parse_args(argv)
    name = resolve_llm(args.llm)
    reference = load_llm(name, device="cpu")
    llm = reference if args.quantize is None else load_llm(name, device="cpu", quantize=args.quantize)
    found = compare(reference, llm, args.prompts, args.tokens)
    result = {"bench": "agreement", "prompts": args.prompts, "quantize": args.quantize, **found}
    if args.text is not None:
        text = args.text.read_text()
        result["perplexity"] = round(perplexity(llm, text), 3)
        result["perplexity_reference"] = round(perplexity(reference, text), 3)
    print_json(result | environment(str(reference.dtype)))
    return int(args.quantize is None and found["beyond_a_near_tie"] > 0)


if __name__ == "__main__":
    raise SystemExit(main())
