"""Prompts of a training batch laid end to end, without padding; positions that all begin with are there once.

Causal attention gives the positions of a common beginning (system prompt, start of the user's turn) the same
states in every prompt, so they are computed once and every prompt attends to them. So it is with the branches
of a prompt: each attends to the prompt's beginning and to itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from llm_bridge.branches import branch_numbers, common_length, first_label
from llm_bridge.prompt import PLACEHOLDER, Prompt

# Branches attend in groups of about as many positions: more would compute much that is hidden.
GROUP = 128


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
        found = [Block((), (self.shared,))] if self.shared else []
        for prompt, length in zip(self.prompts, self.lengths, strict=True):
            before = (0,) if self.shared else ()
            end = self.shared + length
            beginning = min(prompt.branches[0][0], end) if prompt.branches else end
            if beginning > self.shared:
                found.append(Block(before, (beginning - self.shared,)))
                before = (*before, len(found) - 1)
            branches = [min(stop, end) - start for start, stop in prompt.branches if start < end]
            found += [Block(before, parts) for parts in _groups(branches)]
        return found

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
    """How long a common beginning may be: before visuals, branches and what predicts a label, one position
    left."""
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
    """(length, before + length): 0 where a key is seen, the least number of the type where it is not."""
    seen = torch.zeros(block.length, before + block.length, dtype=torch.bool)
    seen[:, :before] = True
    for end, length in zip(accumulate(block.parts), block.parts, strict=True):
        own = slice(end - length, end)
        seen[own, before + end - length : before + end] = torch.ones(length, length, dtype=torch.bool).tril()
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
