"""Classification by trained heads (the main tables): softmax of each view, mean over views, argmax."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from encoder.errors import DataError
from training.evaluation.action import accuracies
from training.evaluation.alignment import Alignment
from training.evaluation.benchmarks import Labelled
from training.evaluation.encoder_input import Setting
from training.evaluation.results import Row
from training.evaluation.run import Run, describe_setting, pack, split_missing, unpack


def over_views(logits: Tensor) -> Tensor:
    """(V, C) class scores of the views of one video -> (C,) mean of their softmaxes."""
    return logits.float().softmax(dim=-1).mean(dim=0)


def evaluate_classify(
    run: Run,
    data: Labelled,
    setting: Setting,
    *,
    alignment: Alignment | None = None,
    attribute: str = "noun",
) -> dict[str, Any]:
    """Top-1 and top-5 at one setting, over the videos that could be read; the others are listed.

    The encoder's class heads decide, or with `alignment` its head of an attribute (the demo world's nouns
    and motions). Raises DataError when heads and labels do not fit.
    """
    if alignment is not None and attribute not in alignment.heads:
        raise DataError(f"The alignment has no head for {attribute!r}: it has {', '.join(alignment.heads)}.")

    def features(pixels: Sequence[Tensor], seed: int) -> Tensor:
        if alignment is None:
            return run.viewer.logits(pixels, setting, run.pool, seed)
        return alignment.scores(attribute, run.viewer.pooled(pixels, setting, run.pool, seed))

    def describe(_: Any, logits: Tensor) -> Row:
        return {"scores": pack(over_views(logits))}

    rows = run.rows(data.examples, setting, features, describe)
    present, gone = split_missing(data.examples, rows)
    if not present:
        raise DataError(f"None of the {len(rows)} videos can be read; the first: {next(iter(gone.values()))}")
    scores = unpack([rows[number]["scores"] for number in present])
    labels = torch.tensor([data.examples[number].label for number in present])
    if scores.shape[1] != len(data.classes):
        raise DataError(
            f"The model tells {scores.shape[1]} classes apart, but the data has {len(data.classes)}: they "
            "belong to different sets."
        )
    return {
        **describe_setting(setting),
        **accuracies(scores, labels),
        "classes": len(data.classes),
        "views": str(run.views),
        "missing": gone,
    }
