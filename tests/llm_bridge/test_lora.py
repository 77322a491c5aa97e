"""LoRA's linear layers in matrix products alone: the numbers and gradients of peft's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from llm_bridge.lora import lora_linear, use_for_training


def adapted(dtype: torch.dtype = torch.bfloat16, **settings: Any) -> nn.Module:
    from peft import LoraConfig, get_peft_model  # here: it takes seconds, and every run collects this

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 64), nn.SiLU(), nn.Linear(64, 32, bias=False)).to(dtype)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"], init_lora_weights=False, **settings)
    made: nn.Module = get_peft_model(model, config)  # type: ignore[arg-type]
    return made


def test_gradients() -> None:
    shapes = [(2, 3, 5), (7, 5), (7,), (2, 5), (7, 2)]
    x, weight, bias, a, b = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    for trained in (x, a, b):
        trained.requires_grad_(True)
    expected = x @ weight.T + bias + 0.5 * (x @ a.T @ b.T)
    torch.testing.assert_close(lora_linear(x, weight, bias, a, b, 0.5), expected)
    assert torch.autograd.gradcheck(lambda x, a, b: lora_linear(x, weight, bias, a, b, 0.5), (x, a, b))


def test_equals_peft_within_rounding() -> None:
    plain = adapted()
    fused = copy.deepcopy(plain)
    assert use_for_training(fused) == 2
    assert plain.state_dict().keys() == fused.state_dict().keys()
    x, results = torch.randn(6, 10, 48, dtype=torch.bfloat16), []
    for model in (plain, fused):
        own = x.clone().requires_grad_(True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(own)
        out.float().square().sum().backward()
        results.append([out, own.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    for wanted, got in zip(*results, strict=True):
        assert wanted.dtype == got.dtype
        assert (wanted - got).float().norm() < 0.02 * wanted.float().norm()


def test_without_the_adapter_it_is_the_base() -> None:
    model = adapted()
    use_for_training(model)
    x = torch.randn(3, 48, dtype=torch.bfloat16)
    with model.disable_adapter():  # type: ignore[operator]
        bare = model(x)
    assert not torch.equal(bare, model(x))
    assert torch.equal(bare, model.unload()(x))  # type: ignore[operator]


@pytest.mark.parametrize(
    "settings", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}, {"dtype": torch.float32}]
)
def test_other_adapters_are_left_to_peft(settings: dict[str, Any]) -> None:
    assert use_for_training(adapted(**settings)) == 0
