"""Grouped attention: the same numbers and gradients as the library's own, with padding and grouped heads."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from llm_bridge.attention import NAME, grouped_attention, use_for_training
from llm_bridge.batch_invariance import NAME as BY_ROW
from llm_bridge.llm import load_llm


@pytest.mark.parametrize("groups", [1, 3, 9])
def test_equals_the_reference(groups: int) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, 9, 7, 8, requires_grad=True)
    k, v = (torch.randn(2, groups, 7, 8, requires_grad=True) for _ in range(2))
    seen = torch.ones(7, 7, dtype=torch.bool).tril()[None, None].repeat(2, 1, 1, 1)
    seen[1, :, :, 5:] = False
    bias = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    repeat = 9 // groups
    expected = scaled_dot_product_attention(
        q, k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1), attn_mask=seen
    )
    found, _ = grouped_attention(torch.nn.Identity(), q, k, v, bias)
    assert torch.allclose(found.transpose(1, 2), expected, atol=1e-5)
    weights = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * weights).sum(), (q, k, v))
    got = torch.autograd.grad((found.transpose(1, 2) * weights).sum(), (q, k, v))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(wanted, got, strict=True))


@pytest.mark.parametrize("layout", ["qwen2", "llama"])
def test_a_model_gives_the_same_scores_and_gradients(llm_folder, layout: str) -> None:
    results = []
    for switch in (False, True):
        llm = load_llm(llm_folder(layout), device="cpu", dtype=torch.bfloat16)
        assert llm.model.config._attn_implementation == BY_ROW  # the fused kernel, when training
        if switch:
            assert use_for_training(llm.model)
            assert llm.model.config._attn_implementation == NAME
        torch.manual_seed(1)
        inputs = torch.randn(3, 12, llm.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        mask = torch.ones(3, 12, dtype=torch.long)
        mask[1, 9:] = 0
        logits = llm.model(inputs_embeds=inputs, attention_mask=mask, use_cache=False).logits.float()
        chosen = logits[mask.bool()].log_softmax(-1)[:, 3]
        (gradient,) = torch.autograd.grad(chosen.sum(), inputs)
        results.append((chosen.detach(), gradient.float()))
    (plain, plain_gradient), (ours, our_gradient) = results
    assert torch.allclose(plain, ours, atol=0.1)  # scores near 10 are a sixteenth apart in bfloat16
    # bfloat16 rounds differently in each: the gradients point the same way.
    assert torch.cosine_similarity(plain_gradient.flatten(), our_gradient.flatten(), dim=0) > 0.995


def test_full_precision_keeps_the_fused_kernel(llm_folder) -> None:
    llm = load_llm(llm_folder("qwen2"), device="cpu", dtype=torch.float32)
    assert not use_for_training(llm.model)
    assert llm.model.config._attn_implementation == BY_ROW
