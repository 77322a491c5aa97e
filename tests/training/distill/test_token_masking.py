"""The student's choice among the teacher's tokens."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from encoder.errors import BudgetError
from training.distill.token_masking import student_choices, take, visible_count


def test_visible_counts_of_the_distillation() -> None:
    assert visible_count(2048, 0.8) == 410
    assert visible_count(1568, 0.8) == 314
    assert visible_count(2048, 0.0) == 2048
    for tokens, ratio in [(2048, 1.0), (2048, -0.1)]:
        with pytest.raises(BudgetError):
            visible_count(tokens, ratio)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 3),
    st.integers(1, 40),
    st.lists(st.integers(1, 50), min_size=1, max_size=4),
    st.sampled_from(["multinomial", "top"]),
    st.booleans(),
)
def test_choices_are_ascending_places_of_the_wanted_number(
    seed: int, clips: int, tokens: int, counts: list[int], how, nested: bool
) -> None:
    torch.manual_seed(seed)
    attention = torch.rand(clips, tokens)
    attention[:, ::3] = 0
    found = student_choices(attention, counts, how, nested=nested)
    for count, places in zip(counts, found, strict=True):
        assert places.shape == (clips, min(count, tokens))
        assert (places[:, 1:] > places[:, :-1]).all()
        assert places.min() >= 0
        assert places.max() < tokens
    if nested or how == "top":
        ordered = sorted(found, key=lambda places: places.shape[1])
        for small, large in pairwise(ordered):
            for one, other in zip(small, large, strict=True):
                assert set(one.tolist()) <= set(other.tolist())
    # Tokens without attention come after all that have some.
    wanted = int((attention[0] > 0).sum())
    for places in found:
        assert (attention[0, places[0]] > 0).sum() == min(wanted, places.shape[1])


def test_the_top_by_hand() -> None:
    attention = torch.tensor([[0.1, 0.4, 0.2, 0.4, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    found = student_choices(attention, (4, 2, 1), "top")
    assert [places.tolist() for places in found] == [
        [[0, 1, 2, 3], [0, 1, 2, 3]],
        [[1, 3], [0, 1]],
        [[1], [0]],
    ]


def test_sampling_follows_the_attention() -> None:
    torch.manual_seed(0)
    attention = torch.tensor([0.2, 0.3, 0.5]).expand(20_000, 3) * 7  # of any sum
    one, two = student_choices(attention, (1, 2), nested=False)
    shares = one.flatten().bincount(minlength=3) / len(one)
    assert shares.tolist() == pytest.approx([0.2, 0.3, 0.5], abs=0.015)
    # Without replacement: the last place is left out with p(1)p(2|1) + p(2)p(1|2) of the other two.
    left_out = (two.sum(dim=1) == 1).float().mean().item()
    assert left_out == pytest.approx(0.2 * 0.3 / 0.8 + 0.3 * 0.2 / 0.7, abs=0.015)


def test_counts_draw_anew_unless_nested() -> None:
    torch.manual_seed(0)
    attention = torch.rand(1, 100)
    small, large = student_choices(attention, (20, 40), nested=False)
    assert not set(small[0].tolist()) <= set(large[0].tolist())


def test_no_count_is_refused() -> None:
    for counts in [(), (4, 0)]:
        with pytest.raises(BudgetError):
            student_choices(torch.rand(1, 8), counts)


def test_take() -> None:
    tokens = torch.arange(12.0).view(1, 4, 3).repeat(2, 1, 1)
    tokens[1] += 100
    found = take(tokens, torch.tensor([[0, 3], [1, 2]]))
    assert found.tolist() == [[[0, 1, 2], [9, 10, 11]], [[103, 104, 105], [106, 107, 108]]]
