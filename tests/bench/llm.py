"""The language model on this CPU: ms per token and per prefill, each way of decoding in turn.

    python -m tests.bench.llm [--llm NAME] [--kinds bf16 int8 int4 transformers] [--n 5]

A step appends one token to each of B answers that hold N positions. `transformers` is its own loop with its
own cache, several rows in one padded pass. `read_weights` reads the bytes of the first kind's weights once.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llm_bridge.batched_kv_cache import BatchedKVCache
from llm_bridge.kv_cache import DecodingBatch, Layers, kv_from_layers
from llm_bridge.llm import LanguageModel, load_llm
from llm_bridge.model import DEFAULT_LLM, resolve_llm
from tests.bench.common import environment, interleave, print_json, summary

ROWS, POSITIONS, PREFILL = (1, 4, 8), (64, 1024), 300
KINDS = ("bf16", "int8", "int4", "transformers")


def past(llm: LanguageModel, positions: int) -> Layers:
    """Random keys and values of a prompt."""
    kv = kv_from_layers(llm.model.config)
    with torch.inference_mode():
        llm.advance(kv, input_ids=torch.tensor([[1]]))
        shapes = [layer.keys.shape for layer in kv.layers]
    random = torch.Generator().manual_seed(0)

    def drawn(shape: torch.Size) -> Tensor:
        return torch.randn(1, shape[1], positions, shape[3], generator=random).to(llm.dtype)

    return tuple((drawn(shape), drawn(shape)) for shape in shapes)


def stepper(llm: LanguageModel, kind: str, rows: int, positions: int) -> Callable[[], object]:
    """What appends a token to each of several answers."""
    layers = past(llm, positions)
    if kind == "transformers" and rows == 1:
        kv = kv_from_layers(llm.model.config, layers)
        return lambda: llm.step(kv, 5)
    sequences = [layers] * rows
    batch: DecodingBatch = (
        BatchedKVCache(llm, sequences) if kind == "transformers" else llm.together(sequences)
    )
    return lambda: batch.step([5] * rows)


def prefill(llm: LanguageModel) -> Callable[[], object]:
    """What computes a prompt."""
    embeds = llm.embed(torch.arange(PREFILL) % 1000)[None]
    return lambda: llm.advance(kv_from_layers(llm.model.config), inputs_embeds=embeds)


def reading(llm: LanguageModel) -> tuple[Callable[[], object], int]:
    """What reads as many bytes as the weights of a step have, and their number."""
    table = llm.model.get_input_embeddings().weight
    tied = llm.model.get_output_embeddings().weight.data_ptr() == table.data_ptr()
    count = sum(p.nbytes for p in llm.model.parameters()) - (0 if tied else table.nbytes)
    parts = torch.zeros(count // 8 // 16 * 16, dtype=torch.int64).chunk(16)
    return lambda: [part.sum() for part in parts], count


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--llm", default=DEFAULT_LLM)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--n", type=int, default=5)
    args = parser.parse_args(argv)
    models: dict[str, LanguageModel] = {}
    for kind in args.kinds:
        options: dict[str, Any] = {"quantize": kind} if kind.startswith("int") else {}
        models[kind] = load_llm(resolve_llm(args.llm), device="cpu", **options)
    first = models[args.kinds[0]]
    result: dict[str, Any] = {"bench": "llm", "llm": args.llm, **environment(str(first.dtype))}
    result |= {"prefill_positions": PREFILL, "quantize": [k for k in args.kinds if k.startswith("int")]}
    with torch.inference_mode():
        read, size = reading(first)
        cases: dict[str, Callable[[], object]] = {"read_weights": read}
        for kind, llm in models.items():
            cases[f"{kind} prefill"] = prefill(llm)
            for rows in ROWS:
                for positions in POSITIONS:
                    cases[f"{kind} {rows} rows {positions}"] = stepper(llm, kind, rows, positions)
        samples = interleave(cases, args.n, warmup=2)
    result["weights_mb"] = round(size / 1e6)
    result |= {name: summary(seconds) for name, seconds in samples.items()}
    for kind in args.kinds:
        one, eight = (result[f"{kind} {rows} rows 64"]["median_ms"] for rows in (1, 8))
        result[f"{kind} speedup of 8 rows"] = round(8 * one / eight, 2)
    print_json(result)


if __name__ == "__main__":
    main()
