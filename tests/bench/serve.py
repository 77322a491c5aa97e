"""The server under load: requests/s and time to the first token, decoding together against one at a time.

    python -m tests.bench.serve [--n 3] [--encoder micro] [--tokens 64] [--answer 32] [--clients 1 4 8]
                                [--ways alone together encoded vllm] [--smallest]

SmolLM2-135M and FluxViT with random weights (the time does not depend on them). Every client asks about a
video of its own: first a question that finds nothing cached ("cold": decode, encode, prefill, answer), then
another one ("follow_up"). All clients ask at once. Answers have a fixed length, so that both ways do the same
work. alone: one answer at a time, the others wait. together: up to eight, or all, are decoded in one pass.
encoded: as together, and as many videos are encoded in one call, as on a GPU (`--encode-batch`).
vllm: by a vLLM server that is started for it, in the Python that FLUXCHAT_VLLM_PYTHON names.
The ways take turns; speedup and same_answers (the share of answers that are the same, letter by letter, over
all rounds) compare each with the first. CPU seconds beside wall seconds tell load from work; they are this
process's, so that those of a vLLM server are not among them. On CPUs alone and together are the same to a
letter.
Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import torch

from app.chat import VideoChat
from app.server.options import WEB_LIMITS, LaunchOptions
from app.server.routes import ServerSettings
from encoder.config import SIZES
from encoder.fluxvit import FluxViT
from llm_bridge.model import DEFAULT_LLM, VideoLanguageModel, VLMConfig, assemble
from llm_bridge.projector import ProjectorConfig
from tests.app.server.serving import question, running
from tests.bench.common import arguments, environment, print_json
from tests.encoder.video import video_files as vf

LONGEST_S = 300.0  # that a video may take to be read
WAYS = ("alone", "together", "encoded", "vllm")
QUESTIONS = {"cold": "What is shown in the video?", "follow_up": "And where does it go in the end?"}


def ask(address: str, body: dict[str, Any], start: threading.Barrier, found: list[tuple[float, str]]) -> None:
    """One streamed question; appends the seconds to its first piece, and the answer."""
    with httpx.Client(timeout=600) as client:
        start.wait()
        began = time.perf_counter()
        with client.stream("POST", f"{address}/v1/chat/completions", json=body) as response:
            assert response.status_code == 200, response.read()
            first_s, text = 0.0, ""
            for line in response.iter_lines():
                if '"content": "' in line:
                    text += json.loads(line.removeprefix("data: "))["choices"][0]["delta"]["content"]
                    first_s = first_s or (time.perf_counter() - began if text else 0.0)
    found.append((first_s, text))


def round_of(address: str, videos: list[str], text: str, tokens: int, answer: int) -> dict[str, Any]:
    """All clients ask at once: wall and CPU seconds until the last is answered, and what each one got."""
    found: list[list[tuple[float, str]]] = [[] for _ in videos]
    start = threading.Barrier(len(videos) + 1)
    threads = []
    for video, place in zip(videos, found, strict=True):
        length = {"max_tokens": answer, "min_tokens": answer}
        body = question(text, video, stream=True, token_budget=tokens, **length)
        threads.append(threading.Thread(target=ask, args=(address, body, start, place)))
        threads[-1].start()
    start.wait()
    wall, cpu = time.perf_counter(), time.process_time()
    for thread in threads:
        thread.join()
    return {
        "wall_s": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu,
        "first_s": [place[0][0] for place in found],
        "texts": [place[0][1] for place in found],
    }


def measure(
    models: dict[str, VideoLanguageModel], folder: Path, counts: list[int], n: int, tokens: int, answer: int
) -> dict[str, Any]:
    """Rounds by question, number of clients and way, each with its model."""
    rounds: dict[tuple[str, int, str], list[dict[str, Any]]] = defaultdict(list)
    videos = [f"{index}.mp4" for index in range(max(counts))]
    for index, name in enumerate(videos):
        vf.write(folder / name, vf.steady(48 + 4 * index), size=(320 + 16 * index, 240))
    together = max(8, *counts)
    rows = {way: 1 if way == "alone" else together for way in models}
    patient = replace(WEB_LIMITS, seconds=LONGEST_S)  # a vLLM on the same cores leaves decoders few of them
    chats = {
        way: VideoChat(
            model,
            trusted=False,
            batch=rows[way],
            encode_batch=together if way == "encoded" else None,
            limits=patient,
        )
        for way, model in models.items()
    }
    with ExitStack() as servers:
        addresses = {}
        for way, chat in chats.items():
            settings = ServerSettings(slots=rows[way], media_root=folder)
            serving = running(chat, LaunchOptions(page=False, server=settings))
            addresses[way], _ = servers.enter_context(serving)
        for repeat in range(-1, n):
            for count in counts:
                for way, address in addresses.items():
                    chats[way].forget()
                    for kind, text in QUESTIONS.items():
                        done = round_of(address, videos[:count], text, tokens, answer if repeat >= 0 else 2)
                        if repeat >= 0:
                            rounds[kind, count, way].append(done)
        per_step = {}
        if "together" in chats:
            steps, made, _ = chats["together"].decoding
            per_step["tokens_per_step"] = round(made / steps, 2)
    for chat in chats.values():
        chat.close()
    return {**per_step, **{kind: _compared(rounds, kind, counts, list(models)) for kind in QUESTIONS}}


def _compared(
    rounds: dict[tuple[str, int, str], list[dict[str, Any]]], kind: str, counts: list[int], ways: list[str]
) -> dict[str, Any]:
    """By number of clients and way: its figures, and beside those of the first way."""
    found: dict[str, Any] = {}
    for count in counts:
        figures = {way: _figures(rounds[kind, count, way], count) for way in ways}
        texts = {way: [text for done in rounds[kind, count, way] for text in done["texts"]] for way in ways}
        first = ways[0]
        for way in ways[1:]:
            same = sum(a == b for a, b in zip(texts[first], texts[way], strict=True))
            figures[way]["same_answers"] = round(same / len(texts[first]), 3)
            for name, key, sign in (
                ("speedup", "requests_per_s", 1),
                ("cpu_speedup", "cpu_s_per_request", -1),
            ):
                if way != "vllm" or sign == 1:
                    figures[way][name] = round((figures[way][key] / figures[first][key]) ** sign, 2)
        found[str(count)] = figures
    return found


def _figures(samples: list[dict[str, Any]], count: int) -> dict[str, float]:
    first = sorted(value for sample in samples for value in sample["first_s"])
    return {
        "requests_per_s": round(count / statistics.median(sample["wall_s"] for sample in samples), 3),
        "cpu_s_per_request": round(statistics.median(sample["cpu_s"] for sample in samples) / count, 3),
        "first_token_p50_s": round(statistics.median(first), 3),
        "first_token_p95_s": round(first[min(len(first) - 1, round(0.95 * (len(first) - 1)))], 3),
    }


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--n", type=int, default=3, help="rounds of each way, in turn")
    parser.add_argument("--encoder", choices=list(SIZES), default="micro")
    parser.add_argument("--tokens", type=int, default=64, help="token budget")
    parser.add_argument("--answer", type=int, default=32, help="tokens of every answer")
    parser.add_argument("--ways", choices=WAYS, nargs="+", default=["alone", "together"])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 8])
    args = arguments(parser, argv, n=1, tokens=16, answer=2, clients=[2])
    torch.set_num_threads(
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    torch.manual_seed(0)
    encoder = SIZES[args.encoder].replace(num_classes=0, num_pools=0, num_aligners=0)
    config = VLMConfig(llm=DEFAULT_LLM, projector=ProjectorConfig(encoder.embed_dim, 576), encoder=encoder)
    vision = FluxViT(encoder)
    model = assemble(config, vision, None)
    models = dict.fromkeys(args.ways, model)
    if "vllm" in models:
        served = assemble(config, vision, None, engine="vllm")
        served.projector.load_state_dict(model.projector.state_dict())
        models["vllm"] = served
    with tempfile.TemporaryDirectory() as folder:
        results = measure(models, Path(folder), args.clients, args.n, args.tokens, args.answer)
    print_json(
        {
            "bench": "serve",
            **environment(str(model.llm.dtype).removeprefix("torch.")),
            "n": args.n,
            "encoder": args.encoder,
            "budget": args.tokens,
            "answer_tokens": args.answer,
            "results": results,
        },
        smallest=args.smallest,
    )


if __name__ == "__main__":
    main()
