"""Questions that share a video's tokens: the loss is that of separate conversations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm_bridge.attention import NAME, use_for_training
from llm_bridge.model import VideoLanguageModel
from llm_bridge.packing import branch_numbers, branched_attention, first_label, share_beginning
from llm_bridge.prompt import IGNORE, Message, Prompt, Visual, render_chat_training
from tests.llm_bridge.tiny_vlm import vision_of

TURNS = [("What?", "A dog."), ("What moves, and where to?", "It moves to the left."), ("How many?", "Two.")]


def conversations(model: VideoLanguageModel, keep: int) -> list[Prompt]:
    visual = Visual(keep, "k", duration_s=4.0, times_s=(0.0, 1.0, 2.0, 3.0))
    return [
        render_chat_training(
            model.llm.tokenizer, [Message.of("user", visual, asked), Message.of("assistant", answer)]
        )
        for asked, answer in TURNS
    ]


@pytest.mark.parametrize("half", [False, True])
def test_the_loss_is_that_of_separate_conversations(model: VideoLanguageModel, half: bool) -> None:
    if half:
        model.language_model.to(torch.bfloat16)
        assert use_for_training(model.language_model)
        assert model.language_model.config._attn_implementation == NAME
    vision = vision_of(model, [7, 12])
    alone = [conversations(model, keep) for keep in (7, 12)]
    total, count = torch.zeros(()), 0
    for index, prompts in enumerate(alone):
        for prompt in prompts:
            learned = sum(label != IGNORE for label in prompt.labels)
            total = total + model.loss([prompt], vision.select(index)) * learned
            count += learned
    shared = [share_beginning(prompts) for prompts in alone]
    assert len(shared[0]) < sum(map(len, alone[0])) - 2 * 7  # the video's tokens are there once
    tolerance = 2e-2 if half else 1e-5
    found = model.loss(shared, vision)
    torch.testing.assert_close(found, total / count, atol=tolerance, rtol=tolerance)


def test_a_branch_does_not_see_another(model: VideoLanguageModel) -> None:
    vision = vision_of(model, [7])
    one = share_beginning(conversations(model, 7))
    start, end = one.branches[1]
    # The labels of all but the last branch are left out; what the middle one says must not matter to it.
    only_last = replace(one, labels=(IGNORE,) * one.branches[2][0] + one.labels[one.branches[2][0] :])
    changed = replace(only_last, ids=one.ids[:start] + (5,) * (end - start) + one.ids[end:])
    torch.testing.assert_close(model.loss([only_last], vision), model.loss([changed], vision))


prompts_of_ids = st.lists(
    st.tuples(st.lists(st.integers(0, 3), min_size=1, max_size=6), st.integers(1, 6)), min_size=1, max_size=4
).map(
    lambda parts: [
        Prompt(
            (9, 9, *ids), (), (), (IGNORE,) * min(at, len(ids) + 1) + (9, 9, *ids)[min(at, len(ids) + 1) :]
        )
        for ids, at in parts
    ]
)


@given(prompts_of_ids, st.integers(0, 4))
def test_every_prompt_can_be_read_back(prompts: list[Prompt], padding: int) -> None:
    one = share_beginning(prompts)
    begin = one.branches[0][0]
    for prompt, (start, end) in zip(prompts, one.branches, strict=True):
        assert one.ids[:begin] + one.ids[start:end] == prompt.ids
        assert one.labels[:begin] + one.labels[start:end] == prompt.labels
        assert start < end
        assert begin < first_label(prompt)
    length = len(one) + padding
    numbers, positions = branch_numbers(one, length)
    mask, _ = branched_attention([one], length, torch.float32)
    for prompt, (start, end) in zip(prompts, one.branches, strict=True):
        seen = (mask[0, 0, end - 1] == 0).nonzero().flatten().tolist()
        assert seen == [*range(begin), *range(start, end)]
        assert positions[seen].tolist() == list(range(len(prompt)))
    assert (numbers == -1).sum() == padding
    assert (mask[0, 0] == 0).any(dim=1).all()  # no row without a key, not even of padding


def test_different_visuals_do_not_share() -> None:
    first = Prompt((-1, 5, 6), (Visual(1, "a"),), ((0, 1),), (IGNORE, IGNORE, 6))
    with pytest.raises(ValueError, match="same visuals"):
        share_beginning([first, replace(first, visuals=(Visual(1, "b"),))])
