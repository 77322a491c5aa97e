"""Packed batches: the losses and gradients of padded ones, each common position once."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from encoder.tokens import VisionTokens
from llm_bridge import attention, model
from llm_bridge import packing as packing_module
from llm_bridge.attention import register
from llm_bridge.model import VideoLanguageModel
from llm_bridge.packing import Block, Packing, branch_numbers, label_weights, share_beginning
from llm_bridge.prompt import IGNORE, Message, Prompt, Visual, render_chat_training
from tests.llm_bridge.tiny_vlm import answered, tiny_vlm

ANSWERS = {5: "A dog.", 9: "It moves to the left, then up, and stays there.", 7: "No."}


def text(ids: list[int], first_label: int) -> Prompt:
    labels = [IGNORE] * first_label + ids[first_label:]
    return Prompt(tuple(ids), (), (), tuple(labels))


def shared_and_lengths(prompts: list[Prompt]) -> tuple[int, tuple[int, ...]]:
    packing = Packing.of(prompts)
    return packing.shared, packing.lengths


def test_what_is_shared_ends_before_labels_visuals_and_the_last_position() -> None:
    same = [text([1, 2, 3, 4, 5, 6], 4), text([1, 2, 3, 4, 5, 7], 4)]
    assert shared_and_lengths(same) == (3, (2, 2))  # position 3 predicts the first label
    assert shared_and_lengths(same[:1]) == (0, (5,))
    unlabelled = [text([1, 2, 3], 3), text([1, 2, 3, 4], 4)]
    assert shared_and_lengths(unlabelled) == (1, (1, 2))
    visual = Visual(2)
    seen = [Prompt((1, 2, -1, -1, 3), (visual,), ((2, 2),), (IGNORE,) * 4 + (3,))] * 2
    assert Packing.of(seen).shared == 2
    assert Packing.of(seen).positions == [0, 1, 2, 3, 2, 3]


def branched(beginning: int, *lengths: int) -> Prompt:
    """A prompt of branches of these lengths, the last position of each is learned."""
    ids = list(range(1, beginning + 1))
    labels, branches = [IGNORE] * beginning, []
    for length in lengths:
        branches.append((len(ids), len(ids) + length))
        ids += [50 + len(ids)] * length
        labels += [IGNORE] * (length - 1) + [ids[-1]]
    return Prompt(tuple(ids), (), (), tuple(labels), tuple(branches))


def test_branches_attend_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing_module, "GROUP", 5)
    packing = Packing.of([branched(4, 2, 3, 2, 7), branched(2, 3, 4)])
    assert packing.shared == 2
    blocks = [Block((), (2,)), Block((0,), (2,)), Block((0, 1), (2, 3)), Block((0, 1), (2,))]
    # Its last position predicts nothing; the second prompt has no beginning of its own.
    assert packing.blocks == [*blocks, Block((0, 1), (6,)), Block((0,), (3,)), Block((0,), (3,))]
    assert sum(block.length for block in packing.blocks) == len(packing.positions)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(2, 6), st.lists(st.integers(2, 5), min_size=1, max_size=4)), min_size=1),
    st.integers(2, 9),
)
def test_every_position_sees_what_its_prompt_lets_it(made: list[tuple[int, list[int]]], group: int) -> None:
    prompts = [branched(beginning, *lengths) for beginning, lengths in made]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing_module, "GROUP", group)
        packing = Packing.of(prompts)
        starts = [0, *accumulate(block.length for block in packing.blocks)]
        places = [range(start, end) for start, end in pairwise(starts)]
        seen_by: dict[int, set[int]] = {}
        for number, (block, bias) in enumerate(
            zip(packing.blocks, packing.biases(1, torch.float32), strict=True)
        ):
            keys = [key for before in (*block.before, number) for key in places[before]]
            for place, row in zip(places[number], bias, strict=True):
                seen_by[place] = {key for key, value in zip(keys, row.tolist(), strict=True) if value == 0}
    start = packing.shared
    for prompt, length in zip(prompts, packing.lengths, strict=True):
        numbers, _ = branch_numbers(prompt, packing.shared + length)
        for own in range(packing.shared, packing.shared + length):
            wanted = {key for key in range(own + 1) if numbers[key] in (0, numbers[own])}
            offset = start - packing.shared
            assert seen_by[own + offset] == {key if key < packing.shared else key + offset for key in wanted}
        start += length


@pytest.fixture(params=["llama", "qwen2", "qwen3"])
def parts(request: pytest.FixtureRequest, llm_folder: Callable[[str], Path]) -> VideoLanguageModel:
    """A tiny model in full precision that attends as half precision does in training."""
    made = tiny_vlm(llm_folder(request.param))
    register()
    made.language_model.set_attn_implementation(attention.NAME)
    made.projector.requires_grad_(True)
    return made


def assert_packed_as_padded(
    parts: VideoLanguageModel, prompts: list[Prompt], vision: VisionTokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and gradients of the projector are the same both ways."""
    found = []
    for packed in (True, False):
        monkeypatch.setattr(model, "packs", lambda *_, packed=packed: packed)
        parts.zero_grad()
        loss = parts.loss(prompts, vision)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in parts.projector.parameters())])
    for ours, padded in zip(*found, strict=True):
        torch.testing.assert_close(ours, padded, atol=1e-5, rtol=1e-3)


def test_a_batch_has_the_loss_and_gradients_of_a_padded_one(
    parts: VideoLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips = [torch.randn(3, 4, 28, 28) for _ in ANSWERS]
    vision = parts.encode(clips, list(ANSWERS), [(0.0, 1.0, 2.0, 3.0)] * len(clips))
    prompts = [answered(parts, keep, answer) for keep, answer in ANSWERS.items()]
    assert Packing.of(prompts).shared > 1
    assert_packed_as_padded(parts, prompts, vision, monkeypatch)


def test_branches_pack_as_they_pad(parts: VideoLanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    vision = parts.encode([torch.randn(3, 4, 28, 28) for _ in ANSWERS], list(ANSWERS))
    prompts = [
        share_beginning(
            [
                render_chat_training(
                    parts.llm.tokenizer,
                    [Message.of("user", Visual(keep, "k"), asked), Message.of("assistant", answer)],
                )
                for asked in ("What?", "What happens in the video?")[: 1 + keep % 3]
                for answer in (ANSWERS[keep], "Nothing.")
            ]
        )
        for keep in ANSWERS
    ]
    assert Packing.of(prompts).shared > 1
    assert len({len(prompt.branches) for prompt in prompts}) > 1
    assert_packed_as_padded(parts, prompts, vision, monkeypatch)


def test_a_window_shorter_than_the_prompts_keeps_padding(parts: VideoLanguageModel) -> None:
    assert attention.packs(parts.language_model, 100)
    parts.language_model.config.sliding_window = 50
    assert not attention.packs(parts.language_model, 100)
    assert attention.packs(parts.language_model, 50)


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
