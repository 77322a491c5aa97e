"""Caches: bounded, shared safely, and never changing an answer."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm_bridge.generation import Generation, GenerationStats
from llm_bridge.kv_cache import ByteLRU, Piece, PrefixCache
from llm_bridge.llm import LanguageModel, load_llm
from llm_bridge.prompt import Message, Visual, render
from llm_bridge.sampling import SamplingParams
from tests import tiny_llms
from tests.llm_bridge.conftest import ONE_QUICK

MIB = 2**20


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 40)), max_size=40), st.integers(0, 100))
def test_lru_stays_within_its_bytes(puts: list[tuple[int, int]], limit: int) -> None:
    cache: ByteLRU[int] = ByteLRU(limit, lambda size: size)
    for key, size in puts:
        cache.put(key, size)
        assert cache.stats.bytes <= limit
        assert cache.get(key) == (size if size <= limit else None)


def test_least_recently_used_goes_first() -> None:
    cache: ByteLRU[int] = ByteLRU(3, lambda _: 1)
    for key in "abc":
        cache.put(key, 1)
    cache.get("a")
    cache.put("d", 1)
    assert cache.get("b") is None
    assert cache.get("a") == 1


@pytest.fixture(params=ONE_QUICK)
def llm(request: pytest.FixtureRequest, tiny_llm: Callable[[str], LanguageModel]) -> LanguageModel:
    return tiny_llm(request.param)


def embedding(llm: LanguageModel, key: str) -> torch.Tensor:
    return torch.randn(30, llm.hidden_size, generator=torch.Generator().manual_seed(sum(map(ord, key))))


def ask(
    llm: LanguageModel, key: str, turns: list[str], prefixes: PrefixCache | None
) -> tuple[str, GenerationStats]:
    messages = [
        Message.of("user" if i % 2 == 0 else "assistant", *([Visual(30, key)] if i == 0 else []), text)
        for i, text in enumerate(turns)
    ]
    prompt = render(llm.tokenizer, messages)
    generation = Generation(llm, prompt, [embedding(llm, key)], SamplingParams(max_new_tokens=12), prefixes)
    return "".join(generation), generation.stats


def test_answers_with_cache_equal_those_without(llm: LanguageModel) -> None:
    prefixes = PrefixCache(64 * MIB, llm.kv_bytes_per_token)
    script = [
        ("a", ["What is it?"]),
        ("a", ["Where does it go?"]),
        ("b", ["What is it?"]),
        ("a", ["What is it?", "A dog.", "Why?"]),
        ("a", ["What is it?", "A dog.", "Why?"]),
        ("b", ["What is it?", "A cat.", "And then?", "Nothing.", "Are you sure?"]),
    ]
    cached = 0
    for key, turns in script:
        expected, _ = ask(llm, key, turns, None)
        found, stats = ask(llm, key, turns, prefixes)
        assert found == expected
        cached += stats.cached_tokens >= 30
    assert cached == 4  # every question after the first about its video


def test_follow_up_prefills_only_the_new_words(tiny_llm) -> None:
    llm = tiny_llm("qwen2")
    prefixes = PrefixCache(64 * MIB, llm.kv_bytes_per_token)
    ask(llm, "a", ["What is it?"], prefixes)
    lengths: list[int] = []
    handle = llm.model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(
            (kwargs.get("inputs_embeds", kwargs.get("input_ids"))).shape[1]
        ),
        with_kwargs=True,
    )
    try:
        _, stats = ask(llm, "a", ["Where to?"], prefixes)
    finally:
        handle.remove()
    assert lengths[0] == stats.prompt_tokens - stats.cached_tokens < 30


def test_the_bound_in_bytes_holds(tiny_llm) -> None:
    llm = tiny_llm("qwen2")
    prefixes = PrefixCache(90 * llm.kv_bytes_per_token, llm.kv_bytes_per_token)
    for key in "abcd":
        ask(llm, key, ["What is it?"], prefixes)
        assert 0 < prefixes.stats.bytes <= 90 * llm.kv_bytes_per_token
    prefixes.clear()
    assert prefixes.stats.bytes == 0


def test_threads_get_the_answers_they_get_alone(tiny_llm) -> None:
    llm = tiny_llm("qwen2")
    prefixes = PrefixCache(64 * MIB, llm.kv_bytes_per_token)
    jobs = [(key, [question]) for question in ("What?", "Where to?", "How many?") for key in "abab"]
    expected = [ask(llm, key, turns, None)[0] for key, turns in jobs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda job: ask(llm, *job, prefixes)[0], jobs))
    assert found == expected


def test_a_window_is_reused_as_a_whole(tmp_path) -> None:
    folder = tiny_llms.make(
        tmp_path, "qwen2", use_sliding_window=True, sliding_window=16, max_window_layers=0, layer_types=None
    )
    llm = load_llm(folder, device="cpu", dtype=torch.float32)
    prefixes = PrefixCache(64 * MIB, llm.kv_bytes_per_token)
    for question, reused in (("What?", False), ("Where to?", True)):
        expected, _ = ask(llm, "a", [question], None)
        found, stats = ask(llm, "a", [question], prefixes)
        assert found == expected
        assert (stats.cached_tokens >= 30) is reused


def test_states_count_for_the_bound() -> None:
    state = {0: {"conv_states": {0: torch.zeros(100)}, "is_initialized": True}}
    pieces = [Piece(piece(20).layers, state), piece(20)]
    prefixes = PrefixCache(10**9, 1)
    prefixes.put(range(40), [20, 40], pieces)
    assert prefixes.stats.bytes == 40 + 400
    prefixes.clear()
    assert prefixes.stats.bytes == 0


def piece(length: int) -> Piece:
    return Piece(((torch.zeros(1, 1, length, 2), torch.zeros(1, 1, length, 2)),))


def test_many_begin_with_the_same_pieces() -> None:
    prefixes = PrefixCache(10**9, 1)
    pieces = [piece(20), piece(30)]
    prefixes.put(range(60), [20, 50, 60], pieces)
    for _ in range(2):
        found = prefixes.take(range(70), [20, 50])
        assert [id(one) for one in found] == [id(one) for one in pieces]
    assert prefixes.stats.entries == 2


@pytest.mark.parametrize(
    ("keys", "ends", "scope", "count"),
    [
        ([*range(50), 99], [20, 50], "a", 2),
        ([*range(49), 99], [20, 50], "a", 1),  # another last key
        ([1, *range(1, 50)], [20, 50], "a", 0),  # another first key, before the same second piece
        (range(50), [19, 50], "a", 0),  # cut elsewhere: another kernel may have rounded otherwise
        (range(50), [20, 49], "a", 1),
        (range(50), [50], "a", 0),
        (range(50), [20, 50], "b", 0),
    ],
)
def test_a_piece_is_found_by_all_before_it(
    keys: Sequence[int], ends: list[int], scope: str, count: int
) -> None:
    prefixes = PrefixCache(10**9, 1)
    prefixes.put(range(50), [20, 50], [piece(20), piece(30)], "a")
    assert len(prefixes.take(keys, ends, scope)) == count


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4), st.booleans()), max_size=30), st.integers(0, 200)
)
def test_prefixes_stay_within_their_bytes_and_keep_no_orphans(
    asked: list[tuple[int, int, bool]], limit: int
) -> None:
    prefixes = PrefixCache(limit, 1)
    for first, count, put in asked:
        keys, ends = [first, *range(1000, 1000 + 100)], [20 * (i + 1) for i in range(count)]
        if put:
            prefixes.put(keys, ends, [piece(20) for _ in ends])
        else:
            prefixes.take(keys, ends)
        assert prefixes.stats.bytes == 20 * prefixes.stats.entries <= limit
    reached = sum(
        len(prefixes.take([first, *range(1000, 1000 + 100)], [20, 40, 60, 80])) for first in range(4)
    )
    assert reached == prefixes.stats.entries


def test_clearing_a_scope_leaves_the_others() -> None:
    prefixes = PrefixCache(10**9, 1)
    for scope in ("a", "b"):
        prefixes.put(range(20), [20], [piece(20)], scope)
    prefixes.clear("a")
    assert not prefixes.take(range(20), [20], "a")
    assert prefixes.take(range(20), [20], "b")
    assert prefixes.stats.bytes == 20
