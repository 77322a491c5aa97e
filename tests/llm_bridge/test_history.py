"""A greedy answer depends on its question only: not on what was asked before, on caches, or on the batch."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llm_bridge.generation import Generation
from llm_bridge.kv_cache import PrefixCache
from llm_bridge.llm import LanguageModel, load_llm
from llm_bridge.model import VideoLanguageModel
from llm_bridge.prompt import Message, Visual, render
from llm_bridge.sampling import SamplingParams
from tests.bench.history import answer, conversations, tiny
from tests.llm_bridge.test_batch_invariance import DTYPES


@pytest.mark.slow
@pytest.mark.parametrize(("count", "cache_tokens"), [(20, 1000), (40, 4000)])
def test_random_conversations_get_the_answers_they_get_alone(count: int, cache_tokens: int) -> None:
    result = tiny(count, seed=1, threads=4, cache_tokens=cache_tokens)
    assert result["differing"] == 0
    assert result["questions"] > count
    assert result["cached_cached"] > 0.4 * result["prompt_cached"]
    assert 0 < result["cached_batched"] < result["cached_cached"]  # some was dropped and computed again
    assert result["steps"] < result["made"]


def first_scores(llm: LanguageModel, generation: Generation) -> Tensor:
    """The scores that the first token of an answer is chosen by."""
    seen: list[Tensor] = []
    handle = llm.model.register_forward_hook(lambda _, __, output: seen.append(output.logits[0, -1].clone()))
    try:
        list(generation)
    finally:
        handle.remove()
    return seen[-1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_have_the_same_bits_whatever_was_asked_before(
    llm_folder: Callable[[str], Path], dtype: torch.dtype
) -> None:
    llm = load_llm(llm_folder("qwen2"), device="cpu", dtype=dtype)
    prefixes = PrefixCache(1 << 30, llm.kv_bytes_per_token)
    visual = torch.randn(200, llm.hidden_size, generator=torch.Generator().manual_seed(0)).to(dtype)
    first = Message.of("user", Visual(200, "v", 3.0, (1.0, 2.0)), "What is it?")
    turns = [
        (first,),
        (Message.of("user", Visual(200, "v", 3.0, (1.0, 2.0)), "What is it doing? " * 9),),
        (first, Message.of("assistant", "A dog."), Message.of("user", "Why?")),
        (first, Message.of("assistant", "A cat. " * 30), Message.of("user", "Why does it run?")),
        (first,),
    ]
    reused = 0
    for length in (12, 1, 1):  # after answers of several tokens first
        for messages in turns:
            prompt = render(llm.tokenizer, messages)
            with_cache = Generation(llm, prompt, [visual], SamplingParams(length), prefixes)
            if length > 1:
                list(with_cache)
                continue
            found = first_scores(llm, with_cache)
            assert torch.equal(found, first_scores(llm, Generation(llm, prompt, [visual], SamplingParams(1))))
            reused += with_cache.stats.cached_tokens >= 200
    assert reused == 2 * len(turns)


def test_follow_ups_find_all_of_the_prompt_before(tiny_llm: Callable[[str], LanguageModel]) -> None:
    llm = tiny_llm("qwen2")
    prefixes = PrefixCache(1 << 30, llm.kv_bytes_per_token)
    talk = next(talk for talk in conversations(50, 3, (64,)) if len(talk) == 4)
    before = 0
    for question in talk:
        _, _, cached, length = answer(llm, question, prefixes, None)
        assert cached == before
        before = length


def test_a_video_is_seen_the_same_whatever_was_seen_before(model: VideoLanguageModel) -> None:
    clips = [torch.randn(3, 4, 28, 28, generator=torch.Generator().manual_seed(i)) for i in range(4)]

    @torch.inference_mode()
    def look(index: int) -> Tensor:
        keep = (5, 8, 11, 16)[index]
        vision = model.encode([clips[index]], [keep], [(0.0, 1.0, 2.0, 3.0)])
        return model.project(vision)[0]

    alone = [look(index) for index in range(4)]
    order = [3, 1, 0, 2, 2, 0, 3, 1]
    with ThreadPoolExecutor(3) as pool:
        again = list(pool.map(look, order))
    assert all(torch.equal(found, alone[index]) for index, found in zip(order, again, strict=True))
