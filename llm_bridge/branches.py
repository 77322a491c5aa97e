"""Several questions about one video in one training row: they share its tokens and never see each other.

A row is a common beginning and then one branch per question. Positions start anew in each branch and the mask
hides the others, so that the loss is that of separate conversations, while the video is read once.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from itertools import takewhile

import torch
from torch import Tensor

from llm_bridge.prompt import IGNORE, Prompt

PADDING = -1


def share_beginning(prompts: Sequence[Prompt]) -> Prompt:
    """Prompts about the same visuals as one, each a branch behind what all begin with.

    Raises ValueError when a visual or a label is not the same in all of them.
    """
    shared = common_length([list(zip(p.ids, p.labels, strict=True)) for p in prompts])
    # Every branch needs a first position of its own, from which its first label is predicted.
    shared = min(shared, *(first_label(prompt) - 1 for prompt in prompts))
    first = prompts[0]
    same = all(prompt.visuals == first.visuals for prompt in prompts)
    if not same or any(start + count > shared for start, count in first.spans):
        raise ValueError("prompts share a beginning only when they show the same visuals at the same place")
    ids, labels, branches = list(first.ids[:shared]), list(first.labels[:shared]), []
    for prompt in prompts:
        branches.append((len(ids), len(ids) + len(prompt) - shared))
        ids += prompt.ids[shared:]
        labels += prompt.labels[shared:]
    return replace(first, ids=tuple(ids), labels=tuple(labels), branches=tuple(branches))


def common_length(rows: Sequence[Sequence[Hashable]]) -> int:
    """How many first values all rows have in common."""
    return len(list(takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False))))


def first_label(prompt: Prompt) -> int:
    """Index of the first position that is learned; the length when none is."""
    return next((place for place, label in enumerate(prompt.labels) if label != IGNORE), len(prompt))


def branch_numbers(prompt: Prompt, length: int) -> tuple[Tensor, Tensor]:
    """(branch, position) of the first `length` places: int64; the beginning is branch 0, PADDING follows."""
    numbers = torch.full((max(length, len(prompt)),), PADDING)
    positions = torch.zeros_like(numbers)
    shared = prompt.branches[0][0] if prompt.branches else len(prompt)
    numbers[:shared] = 0
    positions[:shared] = torch.arange(shared)
    for number, (start, end) in enumerate(prompt.branches, start=1):
        numbers[start:end] = number
        positions[start:end] = torch.arange(shared, shared + end - start)
    return numbers[:length], positions[:length]


def sees(queries: Tensor, keys: Tensor) -> Tensor:
    """Whether branches (B, L) see branches (B, M): the beginning and themselves, bool (B, L, M)."""
    return (keys[:, None] == 0) | (keys[:, None] == queries[:, :, None])


def branched_attention(prompts: Sequence[Prompt], length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(additive mask (B, 1, L, L), positions (B, L)) of prompts that are padded to `length`."""
    pairs = [branch_numbers(prompt, length) for prompt in prompts]
    numbers, positions = (torch.stack(part) for part in zip(*pairs, strict=True))
    before = torch.ones(length, length, dtype=torch.bool).tril()
    # Padding sees its own kind: a row of nothing but hidden keys has no softmax.
    hidden = ~(sees(numbers, numbers) & before)
    mask = torch.zeros(len(prompts), 1, length, length, dtype=dtype)
    return mask.masked_fill_(hidden[:, None], torch.finfo(dtype).min), positions
