"""Decoding against transformers' own, stopping, streaming, limits."""

import threading
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from encoder.errors import BudgetError, ConfigError
from llm_bridge.engines.local import SHORTEST_PIECE, LocalAnswer, piece_ends
from llm_bridge.generation import Generation, GenerationStats
from llm_bridge.lean.decoder import LeanBatch
from llm_bridge.llm import LanguageModel
from llm_bridge.prefill import LONGEST_PIECE, LONGEST_PIECE_ON_ACCELERATOR
from llm_bridge.prompt import PLACEHOLDER, Message, Prompt, Visual, render
from llm_bridge.sampling import SamplingParams
from llm_bridge.text_decoder import StreamingDecoder

VISUAL = Visual(6, "clip")


def prompt_and_visual(llm: LanguageModel, seed: int = 0) -> tuple[Prompt, torch.Tensor]:
    embedding = torch.randn(6, llm.hidden_size, generator=torch.Generator().manual_seed(seed))
    return render(llm.tokenizer, [Message.of("user", VISUAL, "What is it?")]), embedding


def test_greedy_equals_transformers(llm: LanguageModel) -> None:
    prompt, visual = prompt_and_visual(llm)
    generation = Generation(llm, prompt, [visual], SamplingParams(max_new_tokens=24))
    text = "".join(generation)
    embeds = LocalAnswer(llm, generation.request).inputs(0, len(prompt))["inputs_embeds"]
    ids = llm.model.generate(
        inputs_embeds=embeds,
        attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
        max_new_tokens=24,
        do_sample=False,
        eos_token_id=sorted(llm.eos_ids),
        pad_token_id=0,
    )[0].tolist()
    ids = [token for token in ids if token not in llm.eos_ids]
    decoder = StreamingDecoder(llm.tokenizer)
    assert text == "".join(map(decoder.push, ids)) + decoder.flush()
    assert generation.stats.completion_tokens == len(ids)
    assert generation.stats.prompt_tokens == len(prompt)


def test_stop_ends_computing_within_one_token(tiny_llm, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = tiny_llm("qwen2")
    prompt, visual = prompt_and_visual(llm)
    stop = threading.Event()
    calls, step = [], LeanBatch.step

    def counted(batch: LeanBatch, *args: Any) -> torch.Tensor:
        calls.append(1)
        return step(batch, *args)

    monkeypatch.setattr(LeanBatch, "step", counted)
    generation = Generation(llm, prompt, [visual], SamplingParams(max_new_tokens=200), stop=stop)
    pieces = iter(generation)
    next(pieces), next(pieces)
    before = len(calls)
    assert before
    stop.set()
    rest = list(pieces)
    assert len(calls) - before <= 1
    assert len(rest) <= 2
    assert generation.stats.finish == "cancelled"


def test_stop_before_the_start_computes_nothing(tiny_llm) -> None:
    llm = tiny_llm("qwen2")
    prompt, visual = prompt_and_visual(llm)
    stop = threading.Event()
    stop.set()
    generation = Generation(llm, prompt, [visual], stop=stop)
    assert list(generation) == []
    assert generation.stats.completion_tokens == 0


def test_sampling_is_repeatable_by_seed(tiny_llm) -> None:
    llm = tiny_llm("llama")
    prompt, visual = prompt_and_visual(llm)

    def sample(seed: int | None) -> str:
        sampling = SamplingParams(max_new_tokens=20, temperature=1.5, top_p=0.95, top_k=50, seed=seed)
        return "".join(Generation(llm, prompt, [visual], sampling))

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) > 1
    sample(None)


def test_length_limit(tiny_llm) -> None:
    llm = tiny_llm("qwen3")
    prompt, visual = prompt_and_visual(llm)
    generation = Generation(llm, prompt, [visual], SamplingParams(max_new_tokens=3))
    list(generation)
    assert generation.stats.completion_tokens <= 3
    assert generation.stats.finish in ("length", "stop")


def test_context_overflow_is_one_sentence(tiny_llm) -> None:
    llm = tiny_llm("qwen2")
    prompt = render(llm.tokenizer, [Message.of("user", Visual(1000, "big"), "x")])
    with pytest.raises(BudgetError, match=r"has 1024: lower the token budget or max_new_tokens by \d+\.$"):
        list(Generation(llm, prompt, [torch.zeros(1000, llm.hidden_size)]))


def test_tokens_that_the_model_lacks_are_one_sentence(tiny_llm) -> None:
    llm = tiny_llm("qwen2")
    prompt, visual = prompt_and_visual(llm)
    for sampling in (SamplingParams(stop_token_ids=(10**9,)), SamplingParams(logit_bias={10**9: 1})):
        with pytest.raises(ConfigError, match="must be token ids below"):
            list(Generation(llm, prompt, [visual], sampling))


def test_sampling_rules_apply_to_answers(tiny_llm) -> None:
    llm = tiny_llm("qwen2")
    prompt, visual = prompt_and_visual(llm)

    def ask(**options: Any) -> GenerationStats:
        generation = Generation(llm, prompt, [visual], SamplingParams(16, **options))
        list(generation)
        return generation.stats

    token = llm.tokenizer("dog", add_special_tokens=False).input_ids[0]
    assert ask(logit_bias={token: 100}).completion_tokens == 16
    stopped = ask(logit_bias={token: 100}, stop_token_ids=[token])
    assert (stopped.completion_tokens, stopped.finish) == (0, "stop")
    delayed = ask(logit_bias={token: 100}, stop_token_ids=[token], min_tokens=5)
    assert (delayed.completion_tokens, delayed.finish) == (5, "stop")


def prompt_of(*parts: int) -> Prompt:
    """Text of a length and, for negative numbers, visuals; every part of text ends as prompts do."""
    ids: list[int] = []
    spans = []
    for part in parts:
        if part < 0:
            spans.append((len(ids), -part))
        ids += [PLACEHOLDER] * -part if part < 0 else [*range(100, 97 + part), 1, 2, 3]
    return Prompt(tuple(ids), tuple(Visual(count, "v") for _, count in spans), tuple(spans))


@pytest.mark.parametrize(
    ("parts", "ends"),
    [
        ((30,), [30]),
        ((5,), [5]),
        ((10, -64, 40), [74, 114]),
        ((10, -64, 40, 30), [74, 114, 144]),
        ((4, -4, 40), [48]),  # too short a beginning
        ((10, -300, 20), [310, 330]),
        ((10, -1024, 20), [256, 512, 768, 1034, 1054]),
        ((900,), [256, 512, 768, 900]),
        ((10, -64, -64, 20), [74, 138, 158]),
        ((20, -30), [50]),
    ],
)
def test_pieces_end_where_prompts_differ(parts: tuple[int, ...], ends: list[int]) -> None:
    assert piece_ends(prompt_of(*parts)) == ends


def test_longer_pieces_end_where_prompts_differ() -> None:
    assert piece_ends(prompt_of(10, -1024, 20), 2048) == [1034, 1054]
    assert piece_ends(prompt_of(10, -5000, 20), 2048) == [2048, 5010, 5030]


@given(
    st.lists(st.integers(-700, 700).filter(lambda n: n < 0 or n > 3), min_size=1, max_size=8),
    st.sampled_from([LONGEST_PIECE, LONGEST_PIECE_ON_ACCELERATOR]),
)
def test_pieces_cover_the_prompt(parts: list[int], longest: int) -> None:
    prompt = prompt_of(*parts, 40)
    ends = piece_ends(prompt, longest)
    lengths = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    assert sum(lengths) == len(prompt)
    assert all(SHORTEST_PIECE <= length <= 1.5 * longest for length in lengths[:-1])
    assert 0 < lengths[-1] <= 1.5 * longest
    assert piece_ends(prompt_of(*parts, 40, 50), longest)[: len(ends)] == ends  # the next turn finds them


@settings(max_examples=60, deadline=None)
@example(text="a\0b", layout="qwen2")
@given(text=st.text(min_size=1, max_size=30), layout=st.sampled_from(["llama", "qwen2"]))
def test_streaming_never_breaks_a_character(tiny_llm, text: str, layout: str) -> None:
    tokenizer = tiny_llm(layout).tokenizer
    ids = tokenizer(text, add_special_tokens=False).input_ids
    whole = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    decoder = StreamingDecoder(tokenizer)
    pieces = [decoder.push(token) for token in ids]
    if "\ufffd" not in whole:
        assert not any("\ufffd" in piece for piece in pieces)
    # What is said must be fit to be asked about: no prompt holds a NUL.
    assert "".join(pieces) + decoder.flush() == whole.replace("\0", "")
