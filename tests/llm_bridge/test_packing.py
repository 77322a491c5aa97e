"""Packed batches: the losses and gradients of padded ones, each common position once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from encoder.config import MICRO
from encoder.fluxvit import FluxViT
from encoder.tokens import VisionTokens
from llm_bridge import attention, model
from llm_bridge.attention import register
from llm_bridge.branches import share_beginning
from llm_bridge.model import VideoLanguageModel, VLMConfig, assemble
from llm_bridge.packing import Packing, pack, unpack
from llm_bridge.projector import ProjectorConfig
from llm_bridge.prompt import IGNORE, Message, Prompt, Visual, render_chat_training

ENCODER = MICRO.replace(embed_dim=32, depth=2, num_heads=2, pool_heads=2, clip_embed_dim=16)
ANSWERS = {5: "A dog.", 9: "It moves to the left, then up, and stays there.", 7: "No."}


def text(ids: list[int], first_label: int) -> Prompt:
    labels = [IGNORE] * first_label + ids[first_label:]
    return Prompt(tuple(ids), (), (), tuple(labels))


@pytest.mark.parametrize(("shared", "lengths"), [(0, (3, 1, 4)), (2, (1, 3)), (3, (2,))])
def test_gradients_of_unpacking_and_packing(shared: int, lengths: tuple[int, ...]) -> None:
    packing = Packing(shared, lengths)
    x = torch.randn(shared + sum(lengths), 2, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(len(lengths), 2, shared + max(lengths), 3, dtype=torch.float64)
    weights.view(-1, 3)[:, :] *= torch.tensor([1.0, 2.0, 3.0])
    filled = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    weights[:, :, shared:] *= filled[:, None, :, None]  # what lies at padding never counts

    def keys(x: torch.Tensor) -> torch.Tensor:
        return unpack(x, packing, shared=True) * weights

    def there_and_back(x: torch.Tensor) -> torch.Tensor:
        return pack(unpack(x, packing, shared=False), packing)

    assert torch.autograd.gradcheck(keys, x)
    assert torch.autograd.gradcheck(there_and_back, x)
    assert torch.equal(there_and_back(x), x[shared:])


def test_packing_gives_padding_no_gradient() -> None:
    packing = Packing(1, (3, 1))
    rows = torch.randn(2, 2, 3, 4, requires_grad=True)
    pack(rows, packing).sum().backward()
    assert rows.grad is not None
    assert rows.grad[:, :, 1:].sum() == 2 * 2 * 4  # two positions, heads and dimensions of the first row
    assert not rows.grad[1, :, 1:].any()


def test_what_is_shared_ends_before_labels_visuals_and_the_last_position() -> None:
    same = [text([1, 2, 3, 4, 5, 6], 4), text([1, 2, 3, 4, 5, 7], 4)]
    assert Packing.of(same) == Packing(3, (2, 2))  # position 3 predicts the first label
    assert Packing.of(same[:1]) == Packing(0, (5,))
    unlabelled = [text([1, 2, 3], 3), text([1, 2, 3, 4], 4)]
    assert Packing.of(unlabelled) == Packing(1, (1, 2))
    visual = Visual(2)
    seen = [Prompt((1, 2, -1, -1, 3), (visual,), ((2, 2),), (IGNORE,) * 4 + (3,))] * 2
    assert Packing.of(seen).shared == 2
    assert Packing.of(seen).positions == [0, 1, 2, 3, 2, 3]


@pytest.fixture(params=["llama", "qwen2", "qwen3"])
def parts(request: pytest.FixtureRequest, llm_folder: Callable[[str], Path]) -> VideoLanguageModel:
    """A tiny model in full precision that attends as half precision does in training."""
    torch.manual_seed(0)
    config = VLMConfig(
        llm=str(llm_folder(request.param)), projector=ProjectorConfig(32, 64, norm=True), encoder=ENCODER
    )
    made = assemble(config, FluxViT(ENCODER), None, device="cpu", dtype=torch.float32)
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
    prompts = [
        render_chat_training(
            parts.llm.tokenizer,
            [Message.of("user", Visual(keep, "k"), "What?"), Message.of("assistant", answer)],
        )
        for keep, answer in ANSWERS.items()
    ]
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
