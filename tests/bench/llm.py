"""The language model on this CPU: ms per token and per prefill, each way of decoding in turn.

    python -m tests.bench.llm [--llm NAME] [--kinds bf16 int8 int4 transformers] [--gguf FILE ...]
        [--rows 1 4 8] [--positions 64 1024] [--n 5] [--smallest]

A step appends one token to each of B answers that hold N positions. `transformers` is its own loop with its
own cache, several rows in one padded pass. Of each GGUF file (extra: gguf), `NAME` is the engine with
sampling and streaming, `NAME raw` llama.cpp's own rate: its passes alone, of one row.
`read_weights` reads the bytes of the first kind's weights once.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm_bridge.batched_kv_cache import BatchedKVCache
from llm_bridge.compute_worker import ComputeWorker
from llm_bridge.engines import Request
from llm_bridge.engines.llama_context import LlamaContext
from llm_bridge.kv_cache import DecodingBatch, Layers, kv_from_layers
from llm_bridge.llm import LanguageModel, load_llm
from llm_bridge.model import DEFAULT_LLM, resolve_llm
from llm_bridge.prompt import Prompt
from llm_bridge.sampling import SamplingParams
from tests.bench.common import arguments, environment, interleave, print_json, summary

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


class Gguf:
    """A GGUF file, computed by the engine, and by llama.cpp's own passes."""

    def __init__(self, file: Path) -> None:
        from llm_bridge.engines.gguf_model import GgufModel

        llm = load_llm(file, device="cpu", engine="llamacpp")
        assert isinstance(llm, GgufModel)
        self.name, self.llm = file.stem, llm

    def _context(self, cells: int, sequences: int) -> LlamaContext:
        return LlamaContext(self.llm.weights, cells=cells, sequences=sequences)

    def cases(self, all_rows: Sequence[int], all_positions: Sequence[int]) -> dict[str, Callable[[], object]]:
        """By name."""
        found: dict[str, Callable[[], object]] = {f"{self.name} prefill": self.prefill()}
        for positions in all_positions:
            found[f"{self.name} raw 1 rows {positions}"] = self.raw(positions)
            for rows in all_rows:
                found[f"{self.name} {rows} rows {positions}"] = self.stepper(rows, positions)
        return found

    def prefill(self) -> Callable[[], object]:
        context, rows = self._context(512, 1), torch.zeros(PREFILL, self.llm.hidden_size)

        def run() -> None:
            context.append_rows(rows, at=0, sequence=0)
            context.rewind(0, 0)

        return run

    def raw(self, positions: int) -> Callable[[], object]:
        """A pass of one token without looking at its scores."""
        from llama_cpp import llama_decode

        context = self._context(2048, 1)
        context.append_ids([5] * positions, at=0, sequence=0)
        batch, at = context._ids, [positions]

        def run() -> None:
            batch.n_tokens, batch.token[0], batch.pos[0] = 1, 5, at[0]
            batch.n_seq_id[0], batch.seq_id[0][0], batch.logits[0] = 1, 0, 1
            assert llama_decode(context._context, batch) == 0
            at[0] += 1

        return run

    def stepper(self, rows: int, positions: int) -> Callable[[], object]:
        """The next token of each of several answers, in an engine of their own: all of one share a pass."""
        from llm_bridge.engines.llamacpp import LlamaCppEngine

        context = self._context(rows * (positions + 1024), 2 * rows)
        engine = LlamaCppEngine(self.llm, ComputeWorker(self.llm), context=context)
        prompts = [Prompt((*[5] * (positions - 1), row + 3), (), ()) for row in range(rows)]
        made = [engine.start(Request(p, [], SamplingParams(max_new_tokens=900))) for p in prompts]
        for answer in made:
            answer.made.ends = frozenset()  # none ends early
        answers = [iter(answer) for answer in made]
        for tokens in answers:
            next(tokens)

        def run() -> None:
            for tokens in answers:
                next(tokens)

        return run


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--llm", default=DEFAULT_LLM)
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=KINDS)
    parser.add_argument("--gguf", nargs="+", type=Path, default=[])
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    parser.add_argument("--positions", nargs="+", type=int, default=POSITIONS)
    parser.add_argument("--n", type=int, default=5)
    args = arguments(parser, argv, kinds=["bf16", "int8"], rows=[1, 2], positions=[16], n=1)
    models: dict[str, LanguageModel] = {}
    for kind in args.kinds:
        options: dict[str, Any] = {"quantize": kind} if kind.startswith("int") else {}
        models[kind] = load_llm(resolve_llm(args.llm), device="cpu", **options)
    first = models[args.kinds[0]] if args.kinds else load_llm(resolve_llm(args.llm), device="cpu")
    result: dict[str, Any] = {"bench": "llm", "llm": args.llm, **environment(str(first.dtype))}
    result |= {"prefill_positions": PREFILL, "quantize": [k for k in args.kinds if k.startswith("int")]}
    with torch.inference_mode():
        read, size = reading(first)
        cases: dict[str, Callable[[], object]] = {"read_weights": read}
        for kind, llm in models.items():
            cases[f"{kind} prefill"] = prefill(llm)
            for rows in args.rows:
                for positions in args.positions:
                    cases[f"{kind} {rows} rows {positions}"] = stepper(llm, kind, rows, positions)
        for file in args.gguf:
            cases |= Gguf(file).cases(args.rows, args.positions)
        samples = interleave(cases, args.n, warmup=2)
    result["weights_mb"] = round(size / 1e6)
    result |= {name: summary(seconds) for name, seconds in samples.items()}
    least, most, at = min(args.rows), max(args.rows), args.positions[0]
    for kind in [*args.kinds, *(file.stem for file in args.gguf)]:
        one, many = (result[f"{kind} {rows} rows {at}"]["median_ms"] for rows in (least, most))
        result[f"{kind} speedup of {most} rows"] = round(most / least * one / many, 2)
    print_json(result, smallest=args.smallest)


if __name__ == "__main__":
    main()
