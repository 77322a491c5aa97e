"""Decoding beside others gives the bits of decoding alone, on CPUs."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from llm_bridge.batch_invariance import RowInvariantLinear, left_padding, make_batch_invariant
from llm_bridge.compute_worker import ComputeWorker
from llm_bridge.engines.local import LocalAnswer, piece_ends
from llm_bridge.generation import Generation
from llm_bridge.kv_cache import layers_of
from llm_bridge.llm import LanguageModel, default_dtype, load_llm
from llm_bridge.own_kv import OwnKV
from llm_bridge.prompt import Message, Visual, render
from llm_bridge.sampling import SamplingParams
from tests import tiny_llms

STEPS = 32
VISUAL_TOKENS = (3, 40, 1, 120, 17, 64, 90, 8)
HALF = default_dtype(torch.device("cpu")) == torch.bfloat16  # else this processor emulates it
DTYPES = [
    pytest.param(torch.float32, marks=[pytest.mark.slow] if HALF else []),
    pytest.param(
        torch.bfloat16, marks=pytest.mark.skipif(not HALF, reason="this processor emulates bfloat16")
    ),
]


@pytest.fixture(params=["llama", pytest.param("qwen2", marks=pytest.mark.slow)])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    # Wide enough inside that oneDNN divides the sums of a single row.
    return tiny_llms.make(tmp_path / "llm", request.param, intermediate_size=1536)


def generation(llm: LanguageModel, index: int, worker: ComputeWorker | None) -> Generation:
    tokens = VISUAL_TOKENS[index]
    visual = torch.randn(tokens, llm.hidden_size, generator=torch.Generator().manual_seed(index))
    words = "What is in the video? " * (1 + index % 3)
    prompt = render(llm.tokenizer, [Message.of("user", Visual(tokens, f"clip {index}"), words)])
    return Generation(llm, prompt, [visual], SamplingParams(STEPS), worker=worker)


def without_lean(llm: LanguageModel) -> LanguageModel:
    """The same decoded by transformers, as models of other shapes are."""
    llm.__dict__["lean"] = None
    return llm


@pytest.mark.parametrize("lean", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.quick(1)
def test_scores_have_the_same_bits(folder: Path, dtype: torch.dtype, lean: bool) -> None:
    llm = load_llm(folder, device="cpu", dtype=dtype)
    if not lean:
        without_lean(llm)
    assert (llm.lean is not None) is lean
    kvs, tokens = [], []
    with torch.inference_mode():
        for index in range(len(VISUAL_TOKENS)):
            alone = generation(llm, index, None)
            kv, scores = LocalAnswer(llm, alone.request).prefill(piece_ends(alone.prompt))
            kvs.append(kv)
            assert scores is not None
            tokens.append(int(scores.argmax()))
        shared = llm.together([layers_of(kv) for kv in kvs])
        own = [OwnKV(llm, kv) for kv in kvs]
        for step in range(STEPS):
            together = shared.step(tokens)
            single = [kv.step(token) for token, kv in zip(tokens, own, strict=True)]
            assert torch.equal(together, torch.stack(single)), f"step {step}"
            tokens = together.argmax(dim=1).tolist()


@pytest.mark.parametrize("dtype", DTYPES)
def test_answers_are_the_same(folder: Path, dtype: torch.dtype) -> None:
    llm = load_llm(folder, device="cpu", dtype=dtype)
    everyone = range(len(VISUAL_TOKENS))
    alone = ["".join(generation(llm, i, None)) for i in everyone]
    worker = ComputeWorker(llm, max_batch=5)
    with ThreadPoolExecutor(len(everyone)) as pool:
        together = list(pool.map("".join, [generation(llm, i, worker) for i in everyone]))
    worker.close()
    assert together == alone
    assert worker.steps < worker.made


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_linear_rows_do_not_depend_on_their_number(dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    plain = torch.nn.Linear(1536, 576, bias=bias, dtype=dtype)
    inputs = torch.randn(64, 1, 1536, dtype=dtype)
    expected = plain(inputs).detach()
    plain.__class__ = RowInvariantLinear
    with torch.inference_mode():
        whole = plain(inputs)
        for rows in (1, 2, 3, 5, 8):
            assert torch.equal(torch.cat([plain(part) for part in inputs.split(rows)]), whole), rows
        assert plain(inputs[0, 0]).shape == (576,)
    torch.testing.assert_close(whole, expected)
    assert plain(inputs).requires_grad


def test_left_padding_is_read_from_the_mask() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]).bool()[:, None, None]
    assert left_padding(mask) == [2, 0]
    assert left_padding(torch.tensor([[1, 0, 1, 1]]).bool()[:, None, None]) is None
    assert left_padding(torch.zeros(1, 1, 1, 4)) is None


def test_another_attention_is_left_alone(folder: Path) -> None:
    llm = load_llm(folder, device="cpu", dtype=torch.float32)
    llm.model.set_attn_implementation("eager")
    assert not make_batch_invariant(llm.model)
    assert llm.model.config._attn_implementation == "eager"
