"""Prompts of a training batch: questions that share a video, rows without padding, and weights of labels.

Branches: several questions about one video are one row (a `Prompt` with `branches`). A row is a common
beginning, then one branch per question; positions start anew in each branch and the mask hides the others, so
that the loss is that of separate conversations while the video is read once.

Packing: prompts laid end to end, without padding. Causal attention gives the positions of a common beginning
(system prompt, start of the user's turn) the same states in every prompt, so they are computed once and every
prompt attends to them. So it is with the branches of a prompt: each attends to its beginning and to itself.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, groupby, takewhile
from typing import Literal

import torch
from torch import Tensor

from llm_bridge.prompt import IGNORE, PLACEHOLDER, Prompt

PADDING = -1
# Branches attend in groups of about as many positions: more would compute much that is hidden.
GROUP = 128
Weighting = Literal["token", "square", "answer"]
POWERS = {"token": 0.0, "square": 0.5, "answer": 1.0}


# -- branches ----------------------------------------------------------------------------------------------


def share_beginning(prompts: Sequence[Prompt]) -> Prompt:
    """Prompts about the same visuals as one: a common beginning, then a branch for the rest of each.

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


def without_branches(prompt: Prompt) -> list[Prompt]:
    """The prompts that were made one by `share_beginning`; the prompt itself when it has no branches."""
    if not prompt.branches:
        return [prompt]
    shared = prompt.branches[0][0]
    return [
        replace(
            prompt,
            ids=prompt.ids[:shared] + prompt.ids[start:end],
            labels=prompt.labels[:shared] + prompt.labels[start:end],
            branches=(),
        )
        for start, end in prompt.branches
    ]


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


# -- packing -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """Consecutive positions that attend to blocks before them, as a whole, and causally to each other.

    before: numbers of the blocks that it sees. parts: lengths of the stretches in it that do not see each
    other, mostly a single one.
    """

    before: tuple[int, ...]
    parts: tuple[int, ...]

    @property
    def length(self) -> int:
        """Positions."""
        return sum(self.parts)


@dataclass(frozen=True)
class Packing:
    """Where the positions of prompts lie: first `shared` of all, then each prompt's own ones.

    lengths: own positions of each prompt, at least one. N = shared + sum(lengths) positions in all.
    """

    shared: int
    lengths: tuple[int, ...]
    prompts: tuple[Prompt, ...]
    _biases: dict[tuple[int, torch.dtype], list[Tensor]] = field(default_factory=dict, compare=False)

    @staticmethod
    def of(prompts: Sequence[Prompt]) -> Packing:
        """Without the last position of each prompt, which predicts nothing."""
        ends = [max(1, len(p) - (p.ids[-1] != PLACEHOLDER)) for p in prompts]
        common = common_length([p.ids for p in prompts]) if len(prompts) > 1 else 0
        limits = [_shareable(prompt, end) for prompt, end in zip(prompts, ends, strict=True)]
        shared = min(common, *limits)
        return Packing(shared, tuple(end - shared for end in ends), tuple(prompts))

    def of_prompts(self, values: Sequence[Sequence[int]]) -> list[int]:
        """One value per packed position (N) from one per position of each prompt."""
        own = [row[self.shared : self.shared + n] for row, n in zip(values, self.lengths, strict=True)]
        return [*values[0][: self.shared], *(value for row in own for value in row)]

    @cached_property
    def positions(self) -> list[int]:
        """Position in its prompt, of each packed one (N)."""
        return self.of_prompts([branch_numbers(p, len(p))[1].tolist() for p in self.prompts])

    @cached_property
    def blocks(self) -> list[Block]:
        """All positions, in order."""
        blocks = [Block((), (self.shared,))] if self.shared else []
        for prompt, length in zip(self.prompts, self.lengths, strict=True):
            before = (0,) if self.shared else ()
            end = self.shared + length
            beginning = min(prompt.branches[0][0], end) if prompt.branches else end
            if beginning > self.shared:
                blocks.append(Block(before, (beginning - self.shared,)))
                before = (*before, len(blocks) - 1)
            branches = [min(stop, end) - start for start, stop in prompt.branches if start < end]
            blocks += [Block(before, parts) for parts in _groups(branches)]
        return blocks

    def biases(self, repeat: int, dtype: torch.dtype) -> list[Tensor]:
        """What is added to the scores of each block, `repeat` times one below the other:
        (repeat * length, keys), where the keys are those of the blocks before and then its own."""
        if (repeat, dtype) not in self._biases:
            lengths = [block.length for block in self.blocks]
            self._biases[repeat, dtype] = [
                _bias(block, sum(lengths[number] for number in block.before), dtype).repeat(repeat, 1)
                for block in self.blocks
            ]
        return self._biases[repeat, dtype]


def _shareable(prompt: Prompt, end: int) -> int:
    """Longest beginning that can be shared: before visuals, branches and positions that predict a label."""
    visual = min((start for start, _ in prompt.spans), default=end)
    beginning = prompt.branches[0][0] if prompt.branches else end
    return max(0, min(visual, first_label(prompt) - 1, beginning, end - 1))


def _groups(lengths: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Consecutive lengths in groups that sum up to GROUP at most, where no single one is longer."""
    group: tuple[int, ...] = ()
    for length in lengths:
        if group and sum(group) + length > GROUP:
            yield group
            group = ()
        group = (*group, length)
    if group:
        yield group


def _bias(block: Block, before: int, dtype: torch.dtype) -> Tensor:
    """(length, before + length): 0 where a key is visible, the least number of the type where it is not."""
    visible = torch.zeros(block.length, before + block.length, dtype=torch.bool)
    visible[:, :before] = True
    for end, length in zip(accumulate(block.parts), block.parts, strict=True):
        own = slice(end - length, end)
        visible[own, before + end - length : before + end] = torch.ones(
            length, length, dtype=torch.bool
        ).tril()
    return torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)


# -- weights of labels -------------------------------------------------------------------------------------


def label_weights(prompts: Sequence[Prompt], weighting: Weighting) -> Tensor:
    """Weight of each labelled position (P,), in order: n ** -power in an answer of n positions.

    "token": 1, so that long answers count for more; "answer": 1 / n, each answer the same; "square": between
    the two, 1 / sqrt(n), as InternVL 2.5 trains (arXiv 2412.05271, section 3.2).
    """
    power = POWERS[weighting]
    # No position predicts the label of the first.
    runs = [groupby(prompt.labels[1:], key=lambda label: label != IGNORE) for prompt in prompts]
    lengths = [len(list(run)) for labels in runs for learned, run in labels if learned]
    return torch.tensor([length**-power for length in lengths for _ in range(length)])
