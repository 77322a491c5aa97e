"""Weights of learned positions: what an answer counts for, whatever it is long."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_bridge.label_weights import label_weights
from llm_bridge.prompt import IGNORE, Prompt


def talk(*lengths: int) -> Prompt:
    """A conversation with answers of these lengths, a question before each."""
    labels: list[int] = []
    for length in lengths:
        labels += [IGNORE, IGNORE, *range(1, length + 1)]
    return Prompt(tuple(range(len(labels))), (), (), tuple(labels))


def test_weights_of_long_and_short_answers() -> None:
    prompts = [talk(4, 1), talk(2)]
    assert label_weights(prompts, "token").tolist() == [1.0] * 7
    assert label_weights(prompts, "answer").tolist() == [0.25] * 4 + [1.0] + [0.5] * 2
    assert label_weights(prompts, "square").tolist() == pytest.approx([0.5] * 4 + [1.0] + [0.5**0.5] * 2)


def test_a_label_that_nothing_predicts_is_none() -> None:
    assert label_weights([Prompt((1, 2, 3), (), (), (1, 2, 3))], "answer").tolist() == [0.5, 0.5]


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(1, 9), min_size=1), min_size=1))
def test_every_answer_counts_the_same(lengths: list[list[int]]) -> None:
    weights = label_weights([talk(*row) for row in lengths], "answer")
    flat = [length for row in lengths for length in row]
    sums = [part.sum() for part in weights.split(flat)]
    torch.testing.assert_close(torch.stack(sums), torch.ones(len(flat)))
