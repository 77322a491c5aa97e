"""A stock model behind the dial against plain transformers: first answer and follow-up on the same frames.

    python -m tests.bench.stock [--n 3] [--frames 16] [--side 512] [--layers 30 12] [--smallest]

SmolVLM2-256M's shape with random weights (times do not depend on them), frames of a real
clip. plain: the model's own `generate` from pixels, one token, each question anew, as its card shows. Ours:
VideoChat at 100 and 25 % of the tokens, dropped after or before the encoder. Decoding and resizing of frames
are left out of both. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from app.chat import VideoChat
from encoder.budget import Budget
from encoder.video.reader import read_clip
from llm_bridge.prompt import PLACEHOLDER, Message, Visual, render
from llm_bridge.towers.stock import StockModel, load_stock
from tests import tiny_video_models
from tests.bench.common import arguments, environment, print_json, summary
from tests.bench.second_turn import FIRST, SECOND, VIDEO

TEXT: dict[str, object] = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49280,
    "max_position_embeddings": 8192,
    "pad_token_id": 0,
}
VISION: dict[str, object] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "patch_size": 16,
}


@dataclass(frozen=True)
class Scale:
    """Frames of side x side pixels, and the layers of the language model and of the encoder."""

    frames: int
    side: int
    layers: tuple[int, int]


def make(folder: Path, scale: Scale) -> Path:
    """A model folder of SmolVLM2-256M's shape, in bfloat16."""
    text, vision = (
        {**part, "num_hidden_layers": count} for part, count in zip((TEXT, VISION), scale.layers, strict=True)
    )
    return tiny_video_models.make(
        folder,
        "smolvlm",
        scale=0.02,
        text=text,
        vision={**vision, "image_size": scale.side},
        scale_factor=4,
        dtype=torch.bfloat16,
    )


class Plain:
    """The model's own way: pixels and ids through `generate`, every time."""

    def __init__(self, folder: Path, model: StockModel, visual: Visual, pixels: torch.Tensor) -> None:
        from transformers import AutoModelForImageTextToText

        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16).eval()
        self.stock, self.visual, self.pixels = model, visual, pixels

    @torch.inference_mode()
    def ask(self, *turns: str) -> float:
        """Seconds to the first token of the last question; turns: questions and answers, in turn."""
        roles = ("user", "assistant")
        messages: list[Message[Visual]] = [
            Message.of(roles[index % 2], *((self.visual,) if index == 0 else ()), text)  # type: ignore[arg-type]
            for index, text in enumerate(turns)
        ]
        prompt = render(self.stock.llm.tokenizer, messages, time_form="none", marks=self.stock.tower.marks)
        image = self.model.config.image_token_id
        ids = torch.tensor([[image if token == PLACEHOLDER else token for token in prompt.ids]])
        began = time.perf_counter()
        self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=self.pixels.transpose(0, 1)[None].bfloat16(),
            do_sample=False,
            max_new_tokens=1,
            pad_token_id=0,
        )
        return time.perf_counter() - began


def ours(chat: VideoChat, scale: Scale, share: float) -> tuple[float, float, float]:
    """Seconds of encoding, prefill and follow-up; all of the first answer but decoding of frames."""
    chat.forget()
    tokens = round(share * scale.frames * chat.model.tower.space.tokens(1, scale.side))
    budget = Budget(tokens, frames=scale.frames, resolution=scale.side)
    first = chat.ask(VIDEO, FIRST, budget=budget, max_new_tokens=4)
    second = chat.ask(VIDEO, SECOND, budget=budget, history=[(FIRST, first.text)], max_new_tokens=1)
    return first.timings.encode_s, first.timings.prefill_s, second.timings.first_token_s


def measure(folder: Path, scale: Scale, n: int) -> dict[str, Any]:
    """Seconds by way, interleaved."""
    chats = {
        stage: VideoChat(load_stock(folder, stage=stage, dtype=torch.bfloat16))
        for stage in ("after", "before")
    }
    model: Any = chats["after"].model
    budget = Budget(10**6, frames=scale.frames, resolution=scale.side)
    encoded, plan = chats["after"].look(VIDEO, budget), chats["after"].plan(VIDEO, budget)
    pixels = model.tower.pixels(read_clip(VIDEO, plan.frames, max_side=4 * scale.side), plan)
    plain = Plain(folder, model, encoded.visual, pixels)
    found: dict[str, list[float]] = {}

    def add(name: str, seconds: float) -> None:
        found.setdefault(name, []).append(seconds)

    for repeat in range(-1, n):
        first, second = plain.ask(FIRST), plain.ask(FIRST, "So it is.", SECOND)
        own = {
            (stage, share): ours(chat, scale, share) for stage, chat in chats.items() for share in (1.0, 0.25)
        }
        if repeat < 0:
            continue
        add("plain first", first)
        add("plain follow-up", second)
        for (stage, share), (encode, prefill, follow) in own.items():
            add(f"{stage} {share:.0%} first", encode + prefill)
            add(f"{stage} {share:.0%} encode", encode)
            add(f"{stage} {share:.0%} prefill", prefill)
            add(f"{stage} {share:.0%} follow-up", follow)
    return {name: summary(samples) for name, samples in found.items()}


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--n", type=int, default=3, help="measurements of each way, in turn")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--side", type=int, default=512, help="of a frame, in pixels: a multiple of 64")
    parser.add_argument("--layers", type=int, nargs=2, default=[30, 12], metavar=("LLM", "ENCODER"))
    args = arguments(parser, argv, n=1, frames=2, side=128, layers=[2, 2])
    scale = Scale(args.frames, args.side, tuple(args.layers))
    torch.set_num_threads(
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    with tempfile.TemporaryDirectory() as folder:
        results = measure(make(Path(folder) / "model", scale), scale, args.n)

    def times(way: str, base: str) -> float:
        return round(results[base]["median_ms"] / results[way]["median_ms"], 2)

    print_json(
        {
            "bench": "stock",
            **environment("bfloat16"),
            "frames": args.frames,
            "side": args.side,
            "sooner than plain": {
                **{
                    f"{stage} {share} first": times(f"{stage} {share} first", "plain first")
                    for stage in ("after", "before")
                    for share in ("100%", "25%")
                },
                **{
                    f"{stage} {share} follow-up": times(f"{stage} {share} follow-up", "plain follow-up")
                    for stage in ("after", "before")
                    for share in ("100%", "25%")
                },
            },
            "prefill at 25% sooner than at 100%": times("after 25% prefill", "after 100% prefill"),
            "results": results,
        },
        smallest=args.smallest,
    )


if __name__ == "__main__":
    main()
