"""Zero-shot action recognition (supplement Table 4): classes as prompts, cosines averaged over prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from encoder.errors import DataError
from llm_bridge.text_encoders.text_towers import TextTower
from training.evaluation.alignment import Alignment
from training.evaluation.benchmarks import Labelled, spoken
from training.evaluation.encoder_input import Setting
from training.evaluation.metrics import Share, top_k
from training.evaluation.results import Row, table
from training.evaluation.retrieval import check_widths
from training.evaluation.run import Run, describe_setting, pack, split_missing, unpack

# The 16 prompts of the released evaluation (they come from ActionCLIP).
ACTION_PROMPTS = (
    "a photo of action {}",
    "a picture of action {}",
    "Human action of {}",
    "{}, an action",
    "{} this is an action",
    "{}, a video of action",
    "Playing action of {}",
    "{}",
    "Playing a kind of action, {}",
    "Doing a kind of action, {}",
    "Look, the human is {}",
    "Can you recognize the action of {}?",
    "Video classification of {}",
    "A video of {}",
    "The man is {}",
    "The woman is {}",
)


def class_vectors(names: Sequence[str], prompts: Sequence[str], tower: TextTower) -> Tensor:
    """(P, C, D): every class in every prompt."""
    return torch.stack([tower.embed([prompt.format(name) for name in names]).cpu() for prompt in prompts])


def ensemble(video: Tensor, classes: Tensor) -> Tensor:
    """Cosines averaged over prompts: (N, D), (P, C, D) -> (N, C)."""
    return video.float() @ classes.float().mean(dim=0).T


def evaluate_action(
    run: Run,
    alignment: Alignment,
    tower: TextTower,
    data: Labelled,
    setting: Setting,
    *,
    prompts: Sequence[str] = ACTION_PROMPTS,
    names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Top-1, top-5 and their mean at one setting, over the videos that could be read; the others are listed.

    names: what to call the classes; default: their names as spoken words.
    """
    check_widths(alignment, tower)
    called = list(names) if names is not None else [spoken(name) for name in data.classes]

    def features(pixels: Sequence[Tensor], seed: int) -> Tensor:
        return alignment.unit(run.viewer.pooled(pixels, setting, run.pool, seed))

    def describe(_: Any, found: Tensor) -> Row:
        return {"vector": pack(found.mean(dim=0))}

    rows = run.rows(data.examples, setting, features, describe)
    present, gone = split_missing(data.examples, rows)
    if not present:
        raise DataError(f"None of the {len(rows)} videos can be read; the first: {next(iter(gone.values()))}")
    video = unpack([rows[number]["vector"] for number in present])
    labels = torch.tensor([data.examples[number].label for number in present])
    return {
        **describe_setting(setting),
        **accuracies(ensemble(video, class_vectors(called, prompts, tower)), labels),
        "classes": len(called),
        "prompt": list(prompts),
        "missing": gone,
    }


def accuracies(scores: Tensor, labels: Tensor) -> dict[str, Any]:
    """top1, top5 (of fewer classes: none) and "avg", their mean, as the released evaluation reports it."""
    first = Share.of(top_k(scores, labels, 1))
    found: dict[str, Any] = {"top1": first.to_dict(), "n": len(labels)}
    if scores.shape[1] > 5:
        fifth = Share.of(top_k(scores, labels, 5))
        found |= {"top5": fifth.to_dict(), "avg": round((first.value + fifth.value) / 2, 4)}
    return found


def accuracy_table(settings: Sequence[Setting], results: Sequence[dict[str, Any]]) -> str:
    """One line per setting, in percent with the interval of top-1."""
    lines = []
    for setting, result in zip(settings, results, strict=True):
        one, five = result["top1"], result.get("top5")
        interval = f"[{100 * one['low']:.1f}, {100 * one['high']:.1f}]"
        percent = None if five is None else 100 * five["value"]
        lines.append([setting.label, 100 * one["value"], interval, percent, result["n"]])
    return table(["tokens", "top-1", "interval", "top-5", "n"], lines)
