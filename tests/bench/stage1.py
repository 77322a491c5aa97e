"""Samples per second of chat stage 1 against a plain loop; the last line is JSON.

    python -m tests.bench.stage1 [--model app/pretrained] [--samples 48]

Same records, same model, same optimiser. The plain loop does what LLaVA-style trainers do: it encodes every
clip each time, pads a random batch to its longest, and lets the language model score every position. Ours
keeps features, sorts by length, packs prompts behind their common beginning, scores labelled positions only,
and multiplies attention in groups. Both see the records several times (one epoch fills the cache, the others
read it), in turns. What each has learned is the loss per label over the same records, measured in the same
plain way; half of them apart, for the noise.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_bridge.attention import use_for_training
from llm_bridge.model import VideoLanguageModel
from llm_bridge.prompt import IGNORE, PLACEHOLDER, Prompt
from tests.bench.common import environment, print_json
from training.chat_stage1 import Stage1Recipe
from training.data.chat_batches import ChatBatch, ChatData
from training.trainer.recipe import build

MICRO_BATCH = 8


def recipe(folder: Path, samples: int, keep: int, *, ours: bool) -> Stage1Recipe:
    """Conversations of one to four turns about the synthetic world."""
    world = {"split": "train", "preset": "solo", "count": samples // 2}
    values = {
        "model": {"encoder": "-", "llm": "-"},
        "datasets": [
            {"world": {**world, "first": 0}, "turns": 1, "captions": 1.0},
            {"world": {**world, "first": samples}, "turns": 4, "captions": 0.5},
        ],
        "frames": 8,
        "resolution": 112,
        "num_tokens": [keep],
        "template": "chat",
        "bucket": samples // MICRO_BATCH if ours else 1,
        "feature_cache": str(folder / "features") if ours else None,
        "optim": {"lr": 1e-3, "batch_size": MICRO_BATCH, "micro_batch": MICRO_BATCH},
        "loop": {"out": str(folder), "seed": 0},
    }
    return build(Stage1Recipe, values, "bench")


def plain_loss(vlm: VideoLanguageModel, batch: ChatBatch) -> Tensor:
    """Mean cross-entropy from scores at every position of the padded batch."""
    assert batch.vision is not None
    visuals = vlm.project(batch.vision)
    longest = max(map(len, batch.prompts))
    rows = [_row(vlm, prompt, visual) for prompt, visual in zip(batch.prompts, visuals, strict=True)]
    inputs = torch.stack([F.pad(row, (0, 0, 0, longest - len(row))) for row in rows])
    labels = torch.tensor([[*p.labels, *[IGNORE] * (longest - len(p))] for p in batch.prompts])
    mask = torch.tensor([[1] * len(p) + [0] * (longest - len(p)) for p in batch.prompts])
    scores = vlm.language_model(inputs_embeds=inputs, attention_mask=mask, use_cache=False).logits.float()
    return F.cross_entropy(scores[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE)


def _row(vlm: VideoLanguageModel, prompt: Prompt, visual: Tensor) -> Tensor:
    ids = torch.tensor(prompt.ids)
    row = vlm.llm.embed(ids.masked_fill(ids == PLACEHOLDER, 0)).clone()
    start, count = prompt.spans[0]
    return torch.cat([row[:start], visual.to(row), row[start + count :]])


class Run:
    """One way of training, an epoch at a time, with its own model."""

    def __init__(self, model: str, folder: Path, samples: int, keep: int, *, ours: bool) -> None:
        self.vlm = VideoLanguageModel.from_pretrained(model, device="cpu")
        torch.manual_seed(0)
        for layer in self.vlm.projector.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.reset_parameters()
        self.vlm.projector.requires_grad_(True)
        self.ours = ours
        if ours:
            use_for_training(self.vlm.language_model)
        self.data = ChatData(recipe(folder, samples, keep, ours=ours), self.vlm)
        self.optimizer = torch.optim.AdamW(self.vlm.projector.parameters(), lr=1e-3, weight_decay=0.0)
        self.done, self.seconds = 0, list[float]()

    def epoch(self) -> None:
        start = time.perf_counter()
        for _ in range(self.data.micro_batches):
            batch = self.data.batch(self.done)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = (
                    self.vlm.loss(batch.prompts, batch.vision) if self.ours else plain_loss(self.vlm, batch)
                )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.vlm.projector.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.done += 1
        self.seconds.append(time.perf_counter() - start)

    @torch.no_grad()
    def learned(self) -> list[float]:
        """The loss per label of either half of the records, as the plain loop scores them."""
        batch = self.data.held_out(self.data.micro_batches * MICRO_BATCH)
        assert batch.vision is not None
        sums = [[0.0, 0.0], [0.0, 0.0]]
        for number, prompt in enumerate(batch.prompts):
            labels = sum(label != IGNORE for label in prompt.labels)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = plain_loss(self.vlm, ChatBatch([prompt], batch.vision.select(number)))
            half = sums[number % 2]
            half[0], half[1] = half[0] + loss.item() * labels, half[1] + labels
        return [loss / labels for loss, labels in sums]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="app/pretrained")
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--keep", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=4)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        runs = {
            name: Run(args.model, Path(scratch) / name, args.samples, args.keep, ours=name == "ours")
            for name in ("plain", "ours")
        }
        for _ in range(args.epochs):
            for run in runs.values():
                run.epoch()
        learned = {name: run.learned() for name, run in runs.items()}
    rate = {name: args.samples * args.epochs / sum(run.seconds) for name, run in runs.items()}
    print_json(
        {
            "bench": "stage1",
            **environment("bfloat16"),
            "n": args.samples * args.epochs,
            "samples_per_s": {name: round(value, 3) for name, value in rate.items()},
            "seconds_per_epoch": {name: [round(s, 1) for s in run.seconds] for name, run in runs.items()},
            "speedup": round(rate["ours"] / rate["plain"], 2),
            "loss_after": {name: round(sum(halves) / 2, 3) for name, halves in learned.items()},
            "loss_of_halves": {name: [round(v, 3) for v in halves] for name, halves in learned.items()},
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        }
    )


if __name__ == "__main__":
    main()
