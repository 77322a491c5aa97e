"""Classification: by trained heads (the main tables), and zero-shot by prompts (supplement Table 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from encoder.errors import DataError
from llm_bridge.clip_head import ClipHead
from llm_bridge.text_encoders.text_towers import TextTower
from training.command_line import table
from training.evaluation.benchmarks import Labelled, class_words
from training.evaluation.encoder_input import EncoderInput
from training.evaluation.encoder_run import EncoderRun
from training.evaluation.metrics import Share, top_k
from training.evaluation.views import mean_probabilities

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


def mean_cosines(video: Tensor, classes: Tensor) -> Tensor:
    """Cosines averaged over prompts: (N, D), (P, C, D) -> (N, C)."""
    return video.float() @ classes.float().mean(dim=0).T


def evaluate_action(
    run: EncoderRun,
    clip_head: ClipHead,
    tower: TextTower,
    data: Labelled,
    encoder_input: EncoderInput,
    *,
    prompts: Sequence[str] = ACTION_PROMPTS,
    names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Zero-shot top-1, top-5 and their mean at one input, over the videos that could be read; the others are
    listed.

    names: what to call the classes; default: their names as class_words words.
    """
    clip_head.check(tower)
    called = list(names) if names is not None else [class_words(name) for name in data.classes]

    def features(pixels: Sequence[Tensor], seed: int) -> Tensor:
        return clip_head.embed(run.pooled(pixels, encoder_input, seed))

    readable, video, missing = run.vectors(data.examples, encoder_input, features)
    labels = torch.tensor([data.examples[number].label for number in readable])
    return {
        **encoder_input.to_dict(),
        **accuracies(mean_cosines(video, class_vectors(called, prompts, tower)), labels),
        "classes": len(called),
        "prompt": list(prompts),
        "missing": missing,
    }


def evaluate_classify(
    run: EncoderRun,
    data: Labelled,
    encoder_input: EncoderInput,
    *,
    clip_head: ClipHead | None = None,
    attribute: str = "noun",
) -> dict[str, Any]:
    """Top-1 and top-5 at one input, over the videos that could be read; the others are listed.

    The encoder's class heads decide, or with `clip_head` its head of an attribute (the synthetic world's
    nouns and motions). Raises DataError when heads and labels do not fit.
    """
    if clip_head is not None and attribute not in clip_head.heads:
        raise DataError(f"The alignment has no head for {attribute!r}: it has {', '.join(clip_head.heads)}.")

    def features(pixels: Sequence[Tensor], seed: int) -> Tensor:
        if clip_head is None:
            return run.encoder.logits(pixels, encoder_input, run.pools, seed)
        return clip_head.scores(attribute, run.pooled(pixels, encoder_input, seed))

    readable, scores, missing = run.vectors(
        data.examples, encoder_input, features, "scores", mean_probabilities
    )
    labels = torch.tensor([data.examples[number].label for number in readable])
    if scores.shape[1] != len(data.classes):
        raise DataError(
            f"The model tells {scores.shape[1]} classes apart, but the data has {len(data.classes)}: they "
            "belong to different sets."
        )
    return {
        **encoder_input.to_dict(),
        **accuracies(scores, labels),
        "classes": len(data.classes),
        "views": str(run.views),
        "missing": missing,
    }


def accuracies(scores: Tensor, labels: Tensor) -> dict[str, Any]:
    """top1, top5 (of fewer classes: none) and "avg", their mean, as the released evaluation reports it."""
    first = Share.of(top_k(scores, labels, 1))
    figures: dict[str, Any] = {"top1": first.to_dict(), "n": len(labels)}
    if scores.shape[1] > 5:
        fifth = Share.of(top_k(scores, labels, 5))
        figures |= {"top5": fifth.to_dict(), "avg": round((first.value + fifth.value) / 2, 4)}
    return figures


def accuracy_table(results: Sequence[Mapping[str, Any]]) -> str:
    """One line per input, in percent with the interval of top-1."""
    lines = []
    for result in results:
        first, fifth = result["top1"], result.get("top5")
        interval = f"[{100 * first['low']:.1f}, {100 * first['high']:.1f}]"
        top5 = None if fifth is None else 100 * fifth["value"]
        label = EncoderInput.from_dict(result).label
        lines.append([label, 100 * first["value"], interval, top5, result["n"]])
    return table(["tokens", "top-1", "interval", "top-5", "n"], lines)
