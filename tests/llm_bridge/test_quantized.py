"""Few bits on CPUs: near the weights they stand for, every row by itself, alike through either path."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from encoder.errors import ModelError
from llm_bridge.compute_worker import ComputeWorker
from llm_bridge.generation import Generation
from llm_bridge.kv_cache import kv_from_layers, layers_of
from llm_bridge.llm import LanguageModel, load_llm
from llm_bridge.prompt import Message, Visual, render
from llm_bridge.quantized import (
    GROUP,
    Int4Linear,
    Int8Linear,
    QuantizedLinear,
    joined_product,
    quantize_linear,
)
from llm_bridge.sampling import SamplingParams
from llm_bridge.towers.stock import load_stock
from tests import tiny_llms, tiny_video_models

KINDS = (Int8Linear, Int4Linear)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "error"), [(Int8Linear, 0.012), (Int4Linear, 0.12)])
@pytest.mark.parametrize("bias", [False, True])
def test_products_are_near_those_of_the_weights(
    kind: type[QuantizedLinear], error: float, dtype: torch.dtype, bias: bool
) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(96, 128, bias=bias, dtype=dtype)
    few = kind.of(plain.weight.detach(), plain.bias.detach() if bias else None)  # type: ignore[attr-defined]
    inputs = torch.randn(3, 40, 96, dtype=dtype)  # more positions than int8 multiplies as they are
    for given in (inputs, inputs[:, :5]):
        expected = plain(given).float()
        assert (few(given).float() - expected).norm() / expected.norm() < error + 0.004


@pytest.mark.parametrize("kind", KINDS)
def test_whole_numbers_are_kept_exactly(kind: type[QuantizedLinear]) -> None:
    values = torch.randint(-7, 8, (64, 2 * GROUP), generator=torch.Generator().manual_seed(0)).float()
    values[:, 0::GROUP], values[:, 1::GROUP] = -8.0, 7.0
    if kind is Int8Linear:
        values[:, 0] = 127.0
    few = kind.of(values, None)  # type: ignore[attr-defined]
    torch.testing.assert_close(few(torch.eye(2 * GROUP)), values.T.contiguous(), atol=1e-4, rtol=1e-5)


def test_what_adapters_change_is_not_rounded_away() -> None:
    """Of weights that lie on a grid of 4 bits already, as those of many files do."""
    torch.manual_seed(0)
    before = Int4Linear.of(torch.randn(256, 512), None)(torch.eye(512)).T
    change = 0.03 * torch.randn(256, 512)
    kept = {}
    for merged in (False, True):
        rounded = Int4Linear.of(before + change, None, merged=merged)(torch.eye(512)).T
        kept[merged] = float(((rounded - before) * change).sum() / change.square().sum())
    assert kept[False] < 0.5
    assert kept[True] > 0.8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_do_not_depend_on_their_number(kind: type[QuantizedLinear], dtype: torch.dtype) -> None:
    """The exact sums are near 0, so that another order of summing would show."""
    torch.manual_seed(0)
    half = torch.randn(576, 768)
    few = kind.of(torch.cat((half, half), dim=1).to(dtype), None)  # type: ignore[attr-defined]
    rows = torch.randn(40, 768)
    rows = torch.cat((rows, -rows), dim=1).to(dtype)
    whole = few.product(rows)
    for count in (1, 2, 3, 5, 8, 13):
        assert torch.equal(torch.cat([few.product(part) for part in rows.split(count)]), whole), count


@pytest.mark.parametrize("outputs", [(128, 64, 64), (48, 16, 16)])
@pytest.mark.parametrize("kind", KINDS)
def test_joined_layers_give_their_own_products(kind: type[QuantizedLinear], outputs: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layers = [kind.of(torch.randn(n, 64), torch.randn(n)) for n in outputs]  # type: ignore[attr-defined]
    rows = torch.randn(5, 64)
    expected = [layer.product(rows) for layer in layers]
    assert torch.equal(joined_product(layers)(rows), torch.cat(expected, dim=1))
    assert all(torch.equal(layer.product(rows), own) for layer, own in zip(layers, expected, strict=True))


def generation(llm: LanguageModel, tokens: int, worker: ComputeWorker | None) -> Generation:
    visual = torch.randn(tokens, llm.hidden_size, generator=torch.Generator().manual_seed(tokens))
    prompt = render(llm.tokenizer, [Message.of("user", Visual(tokens, "clip"), "What is it?")])
    return Generation(llm, prompt, [visual], SamplingParams(24), worker=worker)


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_a_quantised_model_answers_alone_as_together(
    quantize: str, llm_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tiny_llms.make(tmp_path / "llm", "qwen2", hidden_size=128, head_dim=32)
    exact = load_llm(folder, device="cpu", dtype=torch.float32)
    llm = load_llm(folder, device="cpu", dtype=torch.float32, quantize=quantize)  # type: ignore[arg-type]
    assert llm.parameters == exact.parameters
    assert llm.identity != exact.identity
    assert type(llm.model.model.layers[0].mlp.up_proj) is (Int8Linear if quantize == "int8" else Int4Linear)
    assert llm.lean is not None
    ids = torch.arange(60)[None]
    with torch.inference_mode():
        scores, expected = (m.model(input_ids=ids, use_cache=False).logits for m in (llm, exact))
        assert 0 < (scores - expected).norm() / expected.norm() < (0.1 if quantize == "int8" else 0.8)
        kv = kv_from_layers(llm.model.config)
        llm.advance(kv, input_ids=ids)
        batch = llm.together([layers_of(kv)])
        torch.testing.assert_close(batch.step([7])[0], llm.step(kv, 7), atol=1e-4, rtol=1e-4)
    alone = ["".join(generation(llm, tokens, None)) for tokens in (3, 40, 17)]
    worker = ComputeWorker(llm)
    streams = [iter(generation(llm, tokens, worker)) for tokens in (3, 40, 17)]
    texts = [next(stream) for stream in streams]
    assert [text + "".join(rest) for text, rest in zip(texts, streams, strict=True)] == alone
    worker.close()


def test_a_stock_models_language_model_is_quantised_and_its_tower_is_not(tmp_path: Path) -> None:
    model = load_stock(tiny_video_models.make(tmp_path, "smolvlm"), device="cpu", quantize="int8")
    assert any(isinstance(module, Int8Linear) for module in model.llm.model.modules())
    assert not any(
        isinstance(module, QuantizedLinear) for part in model.tower._parts for module in part.modules()
    )


def test_what_cannot_be_quantised_is_said(tiny_llm: Callable[[str], LanguageModel]) -> None:
    class OnACard:
        class Table:
            weight = torch.empty(1, device="meta")

        def get_input_embeddings(self) -> Table:
            return self.Table()

    with pytest.raises(ModelError, match="is for CPUs"):
        quantize_linear(OnACard(), "int8")
