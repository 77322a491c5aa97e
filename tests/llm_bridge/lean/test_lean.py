"""Lean decoding gives the bits of transformers, alone and together, for each class that it says it takes."""

from pathlib import Path

import pytest
import torch
from torch import nn

from llm_bridge.kv_cache import kv_from_layers, layers_of
from llm_bridge.lean.attend import AttendByRow, AttendMasked
from llm_bridge.lean.build import lean_model
from llm_bridge.lean.decoder import LeanBatch
from llm_bridge.lean.products import PackedProduct
from llm_bridge.llm import LanguageModel, default_dtype, load_llm
from llm_bridge.towers.stock import load_stock
from tests import tiny_families, tiny_video_models

HALF = default_dtype(torch.device("cpu")) == torch.bfloat16  # else this processor emulates it
BFLOAT16 = pytest.mark.skipif(not HALF, reason="this processor emulates bfloat16")
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=BFLOAT16)]
TEXT = ("llama", "qwen2", "qwen2 windowed", "qwen3", "mistral", "mistral windowed", "smollm3")
VIDEO = ("smolvlm", "qwen2_5_vl", "qwen3_vl", "llava_onevision")
QUICK = {("qwen2 windowed", torch.float32), ("qwen3_vl", torch.bfloat16)}  # the others with the slow tests
CASES = [
    pytest.param(
        *(name, dtype),
        marks=[
            *([] if (name, dtype) in QUICK else [pytest.mark.slow]),
            *([BFLOAT16] if dtype == torch.bfloat16 else []),
        ],
    )
    for name in (*TEXT, *VIDEO)
    for dtype in (torch.float32, torch.bfloat16)
]
LENGTHS = 40, 3, 70, 23  # on both sides of the windows
STEPS = 66  # beyond the room that buffers have


def load(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> LanguageModel:
    if name in VIDEO:
        return load_stock(tiny_video_models.make(folder, name), device="cpu", dtype=dtype).llm
    return load_llm(tiny_families.make(folder, name), device="cpu", dtype=dtype)


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_scores_are_those_of_transformers(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    llm = load(tmp_path, name, dtype)
    found = lean_model(llm.model)
    assert found is not None
    near = {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.1}
    shifts = [5, 0, 17, -3] if llm.axes > 1 else [0] * len(LENGTHS)
    with torch.inference_mode():
        kvs, tokens = [], []
        for length in LENGTHS:
            kv = kv_from_layers(llm.model.config)
            logits = llm.advance(kv, input_ids=torch.arange(length)[None] % 97)
            kvs.append(kv)
            tokens.append(int(logits.argmax()))
        together = LeanBatch(*found, [layers_of(kv) for kv in kvs])
        alone = [LeanBatch(*found, [layers_of(kv)]) for kv in kvs]
        same: list[float] = []
        for step in range(STEPS):
            scores = together.step(tokens, shifts)
            single = [
                batch.step([token], [shift])
                for batch, token, shift in zip(alone, tokens, shifts, strict=True)
            ]
            assert torch.equal(scores, torch.cat(single)), f"step {step}"
            expected = torch.stack(
                [
                    llm.step(kv, token, kv.get_seq_length() + shift)
                    for kv, token, shift in zip(kvs, tokens, shifts, strict=True)
                ]
            )
            torch.testing.assert_close(scores, expected, **near)
            same.append(float((scores == expected).float().mean()))
            tokens = expected.argmax(dim=1).tolist()
        if dtype == torch.bfloat16:  # torch leaves products as small as some of these to another kernel
            assert sum(same) / STEPS > 0.8
        for row, kv in enumerate(kvs):
            for (keys, values), (expected_keys, expected_values) in zip(
                together.copies(row), layers_of(kv), strict=True
            ):
                torch.testing.assert_close(keys, expected_keys, **near)
                torch.testing.assert_close(values, expected_values, **near)


@pytest.mark.parametrize(
    "name", ["gemma2", "cohere", "granite", "glm4", "phi3", "olmo2", "gpt2", "qwen3_moe"]
)
def test_other_shapes_are_left_to_transformers(tmp_path: Path, name: str) -> None:
    assert lean_model(load(tmp_path, name).model) is None


def test_what_is_not_as_usual_is_left_to_transformers(tmp_path: Path) -> None:
    class Strange(nn.Linear):
        pass

    llm = load(tmp_path, "llama")
    assert lean_model(llm.model) is not None
    layer = llm.model.model.layers[1]
    layer.mlp.down_proj.__class__ = Strange  # as adapters that are not merged, and quantised layers, are
    assert lean_model(llm.model) is None
    layer.mlp.down_proj.__class__ = nn.Linear
    layer.self_attn.scaling = 1.0
    assert lean_model(llm.model) is None
    layer.self_attn.scaling = layer.self_attn.head_dim**-0.5
    layer._hf_hook = object()  # moves its inputs between devices
    assert lean_model(llm.model) is None


@pytest.mark.parametrize("window", [None, 5])
def test_a_mask_hides_what_rows_do_not_read(window: int | None) -> None:
    torch.manual_seed(0)
    lengths = [3, 9, 12]
    queries, buffer = torch.randn(3, 4, 8), torch.randn(3, 4, 16, 8)
    by_row = AttendByRow(lengths)(queries, buffer, window)
    masked = AttendMasked(torch.tensor(lengths), 16)(queries, buffer, window)
    torch.testing.assert_close(by_row, masked)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_packed_rows_do_not_depend_on_their_number(dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(1536, 576, bias=bias, dtype=dtype)
    inputs = torch.randn(64, 1536, dtype=dtype)
    with torch.inference_mode():
        product = PackedProduct(plain.weight.detach(), None if plain.bias is None else plain.bias.detach())
        whole = product(inputs)
        for rows in (1, 2, 3, 5, 8):
            assert torch.equal(torch.cat([product(part) for part in inputs.split(rows)]), whole), rows
        torch.testing.assert_close(whole, plain(inputs))


def test_weights_are_not_copied_where_memory_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_families.make(tmp_path, "llama")
    size = sum(p.numel() * p.element_size() for p in load_llm(folder, device="cpu").model.parameters())
    monkeypatch.setattr("llm_bridge.llm.free_memory", lambda _: 2 * size - 1)
    assert load_llm(folder, device="cpu").lean is None
    monkeypatch.setattr("llm_bridge.llm.free_memory", lambda _: 2 * size + 1)
    assert load_llm(folder, device="cpu").lean is not None


def test_buffers_that_could_not_grow_are_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = load(tmp_path, "llama")
    kv = kv_from_layers(llm.model.config)
    with torch.inference_mode():
        llm.advance(kv, input_ids=torch.arange(9)[None])
        batch, sound = llm.together([layers_of(kv)]), llm.together([layers_of(kv)])
        while not batch.full:
            assert torch.equal(batch.step([5]), sound.step([5]))
        made, empty = [], LeanBatch._empty

        def once(own: LeanBatch, capacity: int) -> torch.Tensor:
            made.append(capacity)
            if len(made) == 2:
                raise MemoryError("no room")
            return empty(own, capacity)

        monkeypatch.setattr(LeanBatch, "_empty", once)
        with pytest.raises(MemoryError):
            batch.step([5])
        for _ in range(3):
            assert torch.equal(batch.step([5]), sound.step([5]))
