"""Time to the first token of a follow-up question, against re-encoding everything.

    python -m tests.bench.second_turn [--n 5] [--encoder small] [--budgets 256 1024] [--smallest]

FluxViT (random weights: the time does not depend on them) and SmolLM2-135M on a real 30 s clip. Three ways,
in turn: everything again (decode, encode, prefill: what most video-chat programs do), cached embeddings with
a full prefill (the stronger baseline), and ours (KV prefix rewound). Prints one JSON line.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import gradio
import torch

from app.chat import VideoChat
from encoder.config import SIZES
from encoder.fluxvit import FluxViT
from llm_bridge.model import DEFAULT_LLM, VLMConfig, assemble
from llm_bridge.projector import ProjectorConfig
from tests.bench.common import arguments, environment, print_json, summary

VIDEO = Path(gradio.__file__).parent / "media_assets" / "videos" / "world.mp4"
FIRST, SECOND = "What is shown in the video?", "And where does it go?"


def measure(chat: VideoChat, tokens: int, n: int) -> dict[str, Any]:
    """Seconds to the first token of turn two, by way."""
    seconds: dict[str, list[float]] = {"again": [], "cached_embeddings": [], "ours": []}
    texts: dict[str, str] = {}
    chat.forget()
    reply = chat.ask(VIDEO, FIRST, budget=tokens, max_new_tokens=12).text
    history = [(FIRST, reply)]
    for repeat in range(-1, n):
        for way, samples in seconds.items():
            chat.forget()
            if way != "again":
                chat.look(VIDEO, tokens)
            if way == "ours":
                chat.ask(VIDEO, FIRST, budget=tokens, max_new_tokens=12)
            answer = chat.ask(VIDEO, SECOND, budget=tokens, history=history, max_new_tokens=12)
            texts[way] = answer.text
            if repeat >= 0:
                samples.append(answer.timings.first_token_s)
    result: dict[str, Any] = {way: summary(samples) for way, samples in seconds.items()}
    result["same_answers"] = len(set(texts.values())) == 1
    return result


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--n", type=int, default=5, help="measurements of each way, in turn")
    parser.add_argument("--encoder", choices=list(SIZES), default="small")
    parser.add_argument("--budgets", type=int, nargs="+", default=[256, 1024], help="visual tokens")
    args = arguments(parser, argv, n=1, encoder="micro", budgets=[16])
    torch.set_num_threads(
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    torch.manual_seed(0)
    encoder = SIZES[args.encoder].replace(num_classes=0, num_pools=0, num_aligners=0)
    config = VLMConfig(llm=DEFAULT_LLM, projector=ProjectorConfig(encoder.embed_dim, 576), encoder=encoder)
    with VideoChat(assemble(config, FluxViT(encoder), None)) as chat:
        results = {str(tokens): measure(chat, tokens, args.n) for tokens in args.budgets}
        dtype = str(chat.model.llm.dtype).removeprefix("torch.")
    print_json(
        {
            "bench": "second_turn",
            **environment(dtype),
            "n": args.n,
            "speedup": {
                k: round(r["again"]["median_ms"] / r["ours"]["median_ms"], 1) for k, r in results.items()
            },
            "speedup_over_cached_embeddings": {
                k: round(r["cached_embeddings"]["median_ms"] / r["ours"]["median_ms"], 1)
                for k, r in results.items()
            },
            "results": results,
        },
        smallest=args.smallest,
    )


if __name__ == "__main__":
    main()
