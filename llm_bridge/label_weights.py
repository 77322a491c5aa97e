"""How much each learned position of a training batch counts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor

from llm_bridge.prompt import IGNORE, Prompt

Weighting = Literal["token", "square", "answer"]
POWERS = {"token": 0.0, "square": 0.5, "answer": 1.0}


def label_weights(prompts: Sequence[Prompt], weighting: Weighting) -> Tensor:
    """Weight of each labelled position (P,), in order: n ** -power in an answer of n positions.

    "token": 1, so that long answers count for more; "answer": 1 / n, each answer the same; "square": between
    the two, 1 / sqrt(n), as InternVL 2.5 trains (arXiv 2412.05271, section 3.2).
    """
    power = POWERS[weighting]
    # No position predicts the label of the first.
    runs = [groupby(prompt.labels[1:], key=lambda label: label != IGNORE) for prompt in prompts]
    lengths = [len(list(run)) for found in runs for learned, run in found if learned]
    return torch.tensor([length**-power for length in lengths for _ in range(length)])
