"""Engines under load, without videos and HTTP of FluxChat: requests/s and time to the first token.

    python -m tests.bench.engine_load [--clients 1 8 16] [--tokens 64] [--answer 32] [--n 2] [--vllm]
        [--smallest]

SmolLM2-135M. Every client asks once, all at the same time, with random visual embeddings that no one asked
about before; answers have a fixed length. local: in this process. vllm (--vllm): by a server that is started
for it, in the Python that FLUXCHAT_VLLM_PYTHON names, asked through its engine. The engines take turns;
`speedup` compares requests/s with those of local. One JSON line.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import torch

from llm_bridge.compute_worker import ComputeWorker
from llm_bridge.engines.engine import Engine, Request
from llm_bridge.llm import LanguageModel, load_llm
from llm_bridge.model import DEFAULT_LLM, resolve_llm
from llm_bridge.prompt import Message, Visual, render
from llm_bridge.sampling import SamplingParams
from tests.bench.common import arguments, environment, print_json


def asked(llm: LanguageModel, number: int, tokens: int, answer: int) -> Request:
    """A question about so many embeddings, drawn from a number."""
    random = torch.Generator().manual_seed(number)
    rows = torch.randn(tokens, llm.hidden_size, generator=random).to(llm.dtype)
    message = Message.of("user", Visual(tokens, f"clip {number}"), "What is shown in the video?")
    sampling = SamplingParams(max_new_tokens=answer, min_tokens=answer)
    return Request(render(llm.tokenizer, [message]), [rows], sampling)


def round_of(engine: Engine, requests: list[Request]) -> tuple[float, list[float], list[list[int]]]:
    """Seconds until the last answer was complete and to each first token, and the answers."""
    begins = Barrier(len(requests) + 1)

    def read(request: Request) -> tuple[float, list[int]]:
        begins.wait()
        begun, first = time.perf_counter(), 0.0
        made: list[int] = []
        for token in engine.start(request):
            first = first or time.perf_counter() - begun
            made.append(token)
        return first, made

    with ThreadPoolExecutor(len(requests)) as pool:
        reading = [pool.submit(read, request) for request in requests]
        begins.wait()
        begun = time.perf_counter()
        found = [future.result() for future in reading]
    return time.perf_counter() - begun, [first for first, _ in found], [made for _, made in found]


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--tokens", type=int, default=64, help="visual embeddings of a prompt")
    parser.add_argument("--answer", type=int, default=32, help="tokens of every answer")
    parser.add_argument("--n", type=int, default=2, help="rounds of each engine, in turn")
    parser.add_argument("--vllm", action="store_true", help="start a vLLM server too")
    args = arguments(parser, argv, clients=[2], tokens=16, answer=2, n=1)
    llm = load_llm(resolve_llm(DEFAULT_LLM), device="cpu")
    engines: dict[str, Engine] = {
        "local": llm.engine(ComputeWorker(llm, max(args.clients)), 2**28, max(args.clients))
    }
    if args.vllm:
        served = load_llm(resolve_llm(DEFAULT_LLM), engine="vllm", dtype=llm.dtype)
        assert served.own_engine is not None
        engines["vllm"] = served.own_engine
    rounds: dict[tuple[int, str], list[Any]] = defaultdict(list)
    for repeat in range(-1, args.n):
        for count in args.clients:
            numbers = [1000 * (repeat + 1) + 100 * args.clients.index(count) + n for n in range(count)]
            requests = [asked(llm, n, args.tokens, args.answer if repeat >= 0 else 2) for n in numbers]
            for name, engine in engines.items():
                done = round_of(engine, requests)
                if repeat >= 0:
                    rounds[count, name].append(done)
    for engine in engines.values():
        engine.close()
    results: dict[str, dict[str, Any]] = defaultdict(dict)
    for (count, name), samples in rounds.items():
        rate = count / statistics.median(wall for wall, _, _ in samples)
        local = rounds[count, "local"]
        pairs = [pair for a, b in zip(local, samples, strict=True) for pair in zip(a[2], b[2], strict=True)]
        results[str(count)][name] = {
            "requests_per_s": round(rate, 3),
            "first_token_p50_s": round(
                statistics.median(first for _, all_, _ in samples for first in all_), 3
            ),
            "speedup": round(rate / results[str(count)]["local"]["requests_per_s"], 2)
            if name != "local"
            else 1,
            "same_answers": round(sum(a == b for a, b in pairs) / len(pairs), 3),
        }
    settings = ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "FLUXCHAT_VLLM_OPTIONS")
    print_json(
        {
            "bench": "engine_load",
            **environment(str(llm.dtype).removeprefix("torch.")),
            "n": args.n,
            "visual_tokens": args.tokens,
            "answer_tokens": args.answer,
            "settings": {name: os.environ[name] for name in settings if name in os.environ},
            "results": results,
        },
        smallest=args.smallest,
    )


if __name__ == "__main__":
    main()
