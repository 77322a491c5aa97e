"""Decoding in buffers of fixed shape gives the same answers; what a graph would record is run eagerly."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llm_bridge import static_kv_cache
from llm_bridge.compute_worker import ComputeWorker
from llm_bridge.generation import Generation
from llm_bridge.grouped_attention import NAME, attention_by_group, group_heads
from llm_bridge.kv_cache import layers_of
from llm_bridge.llm import LanguageModel, load_llm
from llm_bridge.static_kv_cache import StaticDecoder, is_static
from tests.llm_bridge.test_compute_worker import QUESTIONS, generation, prefilled, read
from tests.patience import PATIENCE_S

LAYOUTS = ("qwen2", *(pytest.param(layout, marks=pytest.mark.slow) for layout in ("llama", "qwen3")))
LIMIT = 2**30


@pytest.fixture(params=LAYOUTS)
def llm(request: pytest.FixtureRequest, tiny_llm: Callable[[str], LanguageModel]) -> LanguageModel:
    return tiny_llm(request.param)


def read_all(jobs: Sequence[Generation]) -> list[str]:
    """The answers, each read in a thread of its own, which cannot hold the tests up for ever."""
    texts: dict[int, str] = {}
    threads = [
        threading.Thread(target=lambda n=n, job=job: texts.update({n: read(job)[0]}), daemon=True)  # type: ignore[misc]
        for n, job in enumerate(jobs)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=PATIENCE_S)
        assert not thread.is_alive(), "an answer does not end"
    return [texts[n] for n in range(len(jobs))]


@pytest.mark.parametrize(
    ("positions", "temperature"),
    [
        (16, 1.3),
        *(pytest.param(*pair, marks=pytest.mark.slow) for pair in ((16, 0.0), (256, 0.0), (256, 1.3))),
    ],
)
def test_answers_are_those_of_the_growing_cache(
    llm: LanguageModel, monkeypatch: pytest.MonkeyPatch, temperature: float, positions: int
) -> None:
    """Answers join, leave and outgrow their buffers (of 16 positions more) meanwhile."""
    monkeypatch.setattr(static_kv_cache, "POSITIONS", positions)
    monkeypatch.setattr(static_kv_cache, "GROWTH", 8)
    everyone = range(len(QUESTIONS))
    alone = [read(generation(llm, i, None, temperature=temperature))[0] for i in everyone]
    worker = ComputeWorker(llm, max_batch=4, static=True)
    assert worker._static is not None
    for _ in range(2):
        jobs = [generation(llm, i, worker, temperature=temperature) for i in everyone]
        assert read_all(jobs) == alone
    assert read(generation(llm, 0, worker, temperature=temperature))[0] == alone[0]  # a row by itself
    assert worker._static is not None  # no step failed
    worker.close()


def test_scores_of_rows_of_other_lengths(llm: LanguageModel) -> None:
    decoder, kvs, last = StaticDecoder(llm, LIMIT), [], []
    with torch.inference_mode():
        for index in (0, 1, 3):
            kv, scores = prefilled(generation(llm, index, None))
            kvs.append(kv)
            last.append(scores)
        batch = decoder.begin([layers_of(kv) for kv in kvs])
        tokens = [int(scores.argmax()) for scores in last if scores is not None]
        for step in range(20):
            found = batch.step(tokens)
            expected = torch.stack([llm.step(kv, token) for kv, token in zip(kvs, tokens, strict=True)])
            torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4, msg=f"step {step}")
            tokens = expected.argmax(dim=1).tolist()
        for row, kv in enumerate(kvs):
            for (keys, values), layer in zip(batch.copies(row), kv.layers, strict=True):
                torch.testing.assert_close(keys, layer.keys, atol=1e-4, rtol=1e-4)
                torch.testing.assert_close(values, layer.values, atol=1e-4, rtol=1e-4)


def test_a_step_has_the_shapes_and_addresses_of_the_one_before(llm: LanguageModel) -> None:
    """What a graph needs: the same kernels on the same memory, whoever is in the batch, and no value read."""
    decoder = StaticDecoder(llm, LIMIT)
    shapes: list[list[tuple[int, ...]]] = []
    addresses: list[list[int]] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            assert "_local_scalar_dense" not in str(func), "a value was read, which a graph cannot do"
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                shapes[-1].append(tuple(result.shape))
            return result

    with torch.inference_mode():
        for lengths in ((20, 33, 7), (50, 12, 40), (9, 9)):  # three rows, or two, of four
            heads, width = _heads(llm)
            kvs = [
                tuple(
                    (torch.randn(1, heads, n, width), torch.randn(1, heads, n, width))
                    for _ in range(_depth(llm))
                )
                for n in lengths
            ]
            batch = decoder.begin(kvs)
            batch.step([3] * len(lengths))  # the first step fills tables of the model
            for _ in range(2):
                shapes.append([])
                buffers = batch._buffers
                addresses.append([layer.keys.data_ptr() for layer in buffers.layers])
                with Watch():
                    buffers._forward()
    assert shapes[0] == shapes[1] == shapes[2] == shapes[3]
    assert addresses[0] == addresses[1] == addresses[2] == addresses[3]
    assert addresses[4] != addresses[0]  # two rows have buffers of their own
    assert len(decoder._kept) == 2


def _heads(llm: LanguageModel) -> tuple[int, int]:
    config = llm.model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_key_value_heads, width


def _depth(llm: LanguageModel) -> int:
    return int(llm.model.config.num_hidden_layers)


def test_buffers_of_few_shapes_are_kept(llm: LanguageModel) -> None:
    decoder = StaticDecoder(llm, LIMIT)
    heads, width = _heads(llm)

    def kv(length: int) -> tuple[tuple[Tensor, Tensor], ...]:
        return tuple((torch.zeros(1, heads, length, width),) * 2 for _ in range(_depth(llm)))

    for rows in (1, 2, 3, 4, 5, 8):
        assert decoder.begin([kv(5)] * rows).capacity == 256
    assert list(decoder._kept) == [(2, 256), (4, 256), (8, 256)]
    assert decoder.begin([kv(193)]).capacity == 512  # room to grow counts


def test_a_batch_may_be_made_of_views_of_the_one_before(llm: LanguageModel) -> None:
    """In the same buffers, the rows in another order."""
    decoder = StaticDecoder(llm, LIMIT)
    heads, width = _heads(llm)
    kvs = [
        tuple((torch.randn(1, heads, n, width), torch.randn(1, heads, n, width)) for _ in range(_depth(llm)))
        for n in (9, 30)
    ]
    first = decoder.begin(kvs)
    again = decoder.begin([first.views(1), first.views(0)])
    assert again._buffers is first._buffers
    for row, kv in zip((1, 0), kvs, strict=True):
        for found, expected in zip(again.views(row), kv, strict=True):
            assert torch.equal(found[0], expected[0])
            assert torch.equal(found[1], expected[1])


def test_kept_buffers_have_a_limit(llm: LanguageModel) -> None:
    heads, width = _heads(llm)
    kv = tuple((torch.zeros(1, heads, 5, width),) * 2 for _ in range(_depth(llm)))
    decoder = StaticDecoder(llm, 6 * 256 * llm.kv_bytes_per_token)
    for rows in (1, 2, 4):
        decoder.begin([kv] * rows)
    assert list(decoder._kept) == [(2, 256), (4, 256)]
    decoder.begin([kv] * 8)  # more than the limit: by itself
    assert list(decoder._kept) == [(8, 256)]


def test_models_with_windows_or_positions_of_other_kinds_decode_as_before(
    tiny_llm: Callable[[str], LanguageModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = tiny_llm("llama")
    assert is_static(llm)
    config, rotary = llm.model.config, llm.model.model.rotary_emb
    for thing, name, value in (
        (config, "sliding_window", 64),
        (config, "_attn_implementation", "eager"),  # adds a mask, where this one says what is seen
        (rotary, "rope_type", "dynamic"),  # reads the longest position
    ):
        with monkeypatch.context() as changed:
            changed.setattr(thing, name, value, raising=False)
            assert not is_static(llm), name
            assert ComputeWorker(llm, static=True)._static is None
    assert ComputeWorker(llm)._static is None  # on a CPU there is nothing to record


def test_a_model_that_cannot_be_recorded_goes_on_without(
    tiny_llm: Callable[[str], LanguageModel],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    llm = tiny_llm("qwen2")
    expected = read(generation(llm, 1, None))[0]

    def fail(self: object) -> Tensor:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr("llm_bridge.static_kv_cache._Buffers._forward", fail)
    worker = ComputeWorker(llm, static=True)
    with caplog.at_level(logging.WARNING, "fluxchat"):
        assert read_all([generation(llm, 1, worker)]) == [expected]
    assert worker._static is None
    assert [record.getMessage() for record in caplog.records] == [
        "Answers are decoded without CUDA graphs from now on, since a step failed: "
        "RuntimeError: operation not permitted when stream is capturing"
    ]
    assert read_all([generation(llm, 1, worker)]) == [expected]
    worker.close()


@pytest.mark.parametrize("groups", [1, 3, 9])
def test_heads_of_a_group_attend_as_if_keys_were_repeated(groups: int) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 9, 1, 8), torch.randn(2, groups, 7, 8), torch.randn(2, groups, 7, 8)
    seen = torch.arange(7) < torch.tensor([[4], [7]])
    repeat = 9 // groups
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1), seen[:, None, None], scale=0.3
    )
    found, _ = attention_by_group(torch.nn.Identity(), q, k, v, seen[:, None, None], scaling=0.3)
    torch.testing.assert_close(found.transpose(1, 2), expected)


def test_a_model_that_attends_by_group_says_the_same(llm_folder: Callable[[str], Path]) -> None:
    llm = load_llm(llm_folder("qwen2"), device="cpu", dtype=torch.float32)
    config = llm.model.config
    assert config.num_key_value_heads < config.num_attention_heads
    expected = [read(generation(llm, index, None))[0] for index in (1, 3, 5)]
    llm.model.set_attn_implementation("sdpa")
    assert group_heads(llm.model)
    assert config._attn_implementation == NAME
    assert is_static(llm)
    worker = ComputeWorker(llm, max_batch=4, static=True)
    assert read_all([generation(llm, index, worker) for index in (1, 3, 5)]) == expected
    assert worker._static is not None  # no step failed
    worker.close()
