"""Samples per second of chat stage 1 against a plain loop, and whether both learn the same; one JSON line.

    python -m tests.bench.stage1 [--model app/pretrained] [--samples 32] [--seeds 5] [--smallest]

Same records, same steps, same model, same optimiser. The plain loop does what LLaVA-style trainers do: it
encodes every clip each time, pads each micro-batch to its longest, and lets the language model score every
position. Ours keeps features, sorts a step's records by length into micro-batches, packs prompts behind
their common beginning, scores labelled positions only, and multiplies attention in groups. Both divide a
step's loss by the labels of the whole step, and see the records several times (one epoch fills the cache,
the others read it), in turns. A seed draws the projector and the order of the records. What each has learned
is the loss per label over the same records, measured in the same plain way; of the differences between both,
one for each seed, the mean and its 95 % interval (Student's t).
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_bridge.attention import use_for_training
from llm_bridge.model import VideoLanguageModel
from llm_bridge.prompt import IGNORE, PLACEHOLDER, Prompt
from tests.bench.common import arguments, environment, print_json
from training.chat_stage1 import Stage1Recipe
from training.data.chat_batches import ChatBatch, ChatData
from training.trainer.recipe import build

MICRO_BATCHES = 2  # of a step


def recipe(folder: Path, args: argparse.Namespace, seed: int, *, ours: bool) -> Stage1Recipe:
    """Conversations of one to four turns about the synthetic world. args: of the command line."""
    samples, micro = args.samples, args.micro_batch
    world = {"split": "train", "preset": "solo", "count": samples // 2}
    values = {
        "model": {"encoder": "-", "llm": "-"},
        "datasets": [
            {"world": {**world, "first": 0}, "turns": 1, "captions": 1.0},
            {"world": {**world, "first": samples}, "turns": 4, "captions": 0.5},
        ],
        "frames": 8,
        "resolution": 112,
        "num_tokens": [args.keep],
        "template": "chat",
        "bucket": MICRO_BATCHES if ours else 1,
        "feature_cache": str(folder / "features") if ours else None,
        "optim": {"lr": 1e-3, "batch_size": micro * MICRO_BATCHES, "micro_batch": micro},
        "loop": {"out": str(folder), "seed": seed},
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

    def __init__(self, folder: Path, args: argparse.Namespace, seed: int, *, ours: bool) -> None:
        self.vlm = VideoLanguageModel.from_pretrained(args.model, device="cpu")
        torch.manual_seed(seed)
        for layer in self.vlm.projector.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.reset_parameters()
        self.vlm.projector.requires_grad_(True)
        self.ours = ours
        if ours:
            use_for_training(self.vlm.language_model)
        self.data = ChatData(recipe(folder, args, seed, ours=ours), self.vlm)
        self.optimizer = torch.optim.AdamW(self.vlm.projector.parameters(), lr=1e-3, weight_decay=0.0)
        self.done, self.seconds = 0, list[float]()

    def epoch(self) -> None:
        start = time.perf_counter()
        for _ in range(self.data.micro_batches // MICRO_BATCHES):
            step = [self.data.batch(self.done + part) for part in range(MICRO_BATCHES)]
            labels = sum(batch.weight for batch in step)
            for batch in step:
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    loss = self._loss(batch)
                (loss * batch.weight / labels).backward()
            torch.nn.utils.clip_grad_norm_(self.vlm.projector.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.done += MICRO_BATCHES
        self.seconds.append(time.perf_counter() - start)

    def _loss(self, batch: ChatBatch) -> Tensor:
        return self.vlm.loss(batch.prompts, batch.vision) if self.ours else plain_loss(self.vlm, batch)

    @torch.no_grad()
    def learned(self) -> float:
        """The loss per label of all records, as the plain loop scores them."""
        total, labels = 0.0, 0.0
        for index in range(self.data.micro_batches):
            batch = self.data.batch(index)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                total += plain_loss(self.vlm, batch).item() * batch.weight
            labels += batch.weight
        return total / labels


def interval(values: list[float]) -> list[float]:
    """Of the mean of independent values, with 95 % confidence: lower and upper end."""
    from scipy import stats

    middle, error = statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5
    wide = float(stats.t.ppf(0.975, len(values) - 1)) * error
    return [round(middle - wide, 4), round(middle + wide, 4)]


def compare(args: argparse.Namespace, seed: int) -> dict[str, Run]:
    """Both ways, trained in turns."""
    with tempfile.TemporaryDirectory() as scratch:
        runs = {
            name: Run(Path(scratch) / name, args, seed, ours=name == "ours") for name in ("plain", "ours")
        }
        for _ in range(args.epochs):
            for run in runs.values():
                run.epoch()
    return runs


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="app/pretrained")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--keep", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--micro-batch", type=int, default=8, help="records of a micro-batch, two of which are a step"
    )
    args = arguments(parser, argv, samples=4, keep=16, micro_batch=2, epochs=1, seeds=2)
    rates: dict[str, list[float]] = {"plain": [], "ours": []}
    losses: dict[str, list[float]] = {"plain": [], "ours": []}
    for seed in range(args.seeds):
        print(f"seed {seed} ...", flush=True)
        for name, run in compare(args, seed).items():
            rates[name].append(args.samples * args.epochs / sum(run.seconds))
            losses[name].append(run.learned())
    differences = [ours - plain for ours, plain in zip(losses["ours"], losses["plain"], strict=True)]
    result: dict[str, Any] = {
        "bench": "stage1",
        **environment("bfloat16"),
        "n": args.seeds,
        "samples": args.samples * args.epochs,
        "samples_per_s": {name: [round(value, 3) for value in values] for name, values in rates.items()},
        "speedup": round(
            statistics.median(o / p for o, p in zip(rates["ours"], rates["plain"], strict=True)), 2
        ),
        "loss_after": {name: [round(value, 4) for value in values] for name, values in losses.items()},
        "loss_difference": round(statistics.mean(differences), 4),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    if len(differences) > 1:
        result["loss_difference_95"] = interval(differences)
    print_json(result, smallest=args.smallest)


if __name__ == "__main__":
    main()
