"""Prompts that wait are computed in one pass, and are those computed alone, whoever fails or stops."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from encoder.errors import OutOfMemory
from llm_bridge import prefill
from llm_bridge.compute_worker import ComputeWorker
from llm_bridge.engines import local
from llm_bridge.engines.local import LocalAnswer, piece_ends
from llm_bridge.generation import Generation
from llm_bridge.kv_cache import PrefixCache, layers_of
from llm_bridge.llm import LanguageModel, load_llm
from llm_bridge.prefill import Stretch, fit_together, longest_piece
from tests import tiny_families
from tests.llm_bridge.conftest import ONE_QUICK
from tests.llm_bridge.test_compute_worker import QUESTIONS, Strange, generation, prefilled, read
from tests.patience import PATIENCE_S, until

EVERYONE = range(len(QUESTIONS))
Prefilled = tuple[Any, "Tensor | None"]


@pytest.fixture(params=ONE_QUICK)
def llm(request: pytest.FixtureRequest, tiny_llm: Callable[[str], LanguageModel]) -> LanguageModel:
    return tiny_llm(request.param)


@pytest.fixture
def qwen2(tiny_llm: Callable[[str], LanguageModel]) -> LanguageModel:
    return tiny_llm("qwen2")


@contextmanager
def worker_of(llm: LanguageModel, max_batch: int = 8, **options: Any) -> Iterator[ComputeWorker]:
    worker = ComputeWorker(llm, max_batch, prefill_together=True, **options)
    try:
        yield worker
    finally:
        worker.close()


def while_held(worker: ComputeWorker, functions: Sequence[Callable[[], Any]]) -> list[Future[Any]]:
    """What functions return or raise that ask the computing thread for something, in this order, before it
    does anything for any of them."""
    go = threading.Event()
    with ThreadPoolExecutor(len(functions)) as pool:
        worker.submit(go.wait, PATIENCE_S)
        until(lambda: worker._jobs.qsize() == 0)
        try:
            futures = []
            for count, function in enumerate(functions, 1):
                futures.append(pool.submit(function))
                until(lambda count=count: worker._jobs.qsize() == count)  # type: ignore[misc]
        finally:
            go.set()
        return futures


def prefill_of(running: Generation, worker: ComputeWorker) -> Callable[[], Prefilled]:
    answer = LocalAnswer(running.llm, running.request, worker)
    return lambda: answer.prefill(piece_ends(running.prompt))


@contextmanager
def head_rows(llm: LanguageModel) -> Iterator[list[int]]:
    """How many positions' scores each pass of transformers makes meanwhile."""
    rows: list[int] = []
    handle = llm.model.get_output_embeddings().register_forward_hook(
        lambda _, __, logits: rows.append(logits.numel() // logits.shape[-1])
    )
    try:
        yield rows
    finally:
        handle.remove()


def assert_same(found: Prefilled, expected: Prefilled) -> None:
    assert found[1] is not None
    assert expected[1] is not None
    torch.testing.assert_close(found[1], expected[1], atol=2e-4, rtol=1e-4)
    for pair, own in zip(layers_of(found[0]), layers_of(expected[0]), strict=True):
        torch.testing.assert_close(pair, own, atol=1e-4, rtol=1e-4)


def test_together_equals_alone(llm: LanguageModel) -> None:
    """Scores, keys and values; first and later pieces; fewer passes than pieces."""
    expected = [prefilled(generation(llm, i, None)) for i in EVERYONE]
    pieces = sum(len(piece_ends(generation(llm, i, None).prompt)) for i in EVERYONE)
    with worker_of(llm) as worker:
        jobs = [prefill_of(generation(llm, i, worker), worker) for i in EVERYONE]
        for found, own in zip(while_held(worker, jobs), expected, strict=True):
            assert_same(found.result(), own)
        assert worker.prefills <= pieces - len(QUESTIONS) + 1  # the first pieces share one


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_answers_are_those_alone(llm: LanguageModel, temperature: float) -> None:
    alone = [read(generation(llm, i, None, temperature=temperature)) for i in EVERYONE]
    with worker_of(llm, max_batch=4) as worker:
        for order in (list(EVERYONE), list(EVERYONE)[::-1]):
            jobs = [generation(llm, i, worker, temperature=temperature) for i in order]
            found = [f.result() for f in while_held(worker, [lambda job=job: read(job) for job in jobs])]  # type: ignore[misc]
            assert [text for text, _ in found] == [alone[i][0] for i in order]
            assert [stats.finish for _, stats in found] == [alone[i][1].finish for i in order]
        assert worker.active == 0


def test_later_pieces_share_a_pass_too(llm: LanguageModel) -> None:
    """Questions about videos whose prefixes are kept, of unlike lengths, with one that is new."""
    prefixes = PrefixCache(2**26, llm.kv_bytes_per_token)
    kept = [i for i in EVERYONE if QUESTIONS[i][0] > 16]
    with worker_of(llm) as worker:
        for i in kept:
            read(generation(llm, i, worker, prefixes))
        expected = [read(generation(llm, i, None, more=" Why?"))[0] for i in (*kept, 0)]
        before = worker.prefills
        jobs = [generation(llm, i, worker, prefixes, more=" Why?") for i in (*kept, 0)]
        found = [f.result() for f in while_held(worker, [lambda job=job: read(job) for job in jobs])]  # type: ignore[misc]
        assert worker.prefills - before == 1
    assert [text for text, _ in found] == expected
    assert [stats.cached_tokens > 0 for _, stats in found] == [True] * len(kept) + [False]


def test_pieces_computed_together_are_kept(qwen2: LanguageModel) -> None:
    prefixes = PrefixCache(2**26, qwen2.kv_bytes_per_token)
    with worker_of(qwen2) as worker:
        jobs = [generation(qwen2, i, worker, prefixes) for i in EVERYONE]
        for future in while_held(worker, [partial(read, job) for job in jobs]):
            future.result()
        for i in (1, 3, 5):
            text, stats = read(generation(qwen2, i, worker, prefixes, more=" Why?"))
            assert stats.cached_tokens >= QUESTIONS[i][0]
            assert text == read(generation(qwen2, i, None, more=" Why?"))[0]


@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize("how", ["stops", "cannot be asked"])
def test_one_that_stopped_while_it_waited(qwen2: LanguageModel, how: str, place: int) -> None:
    expected = [prefilled(generation(qwen2, i, None)) for i in (1, 3, 5)]
    bad = generation(qwen2, 4, None)
    bad.stop = stop = Strange()
    running = [generation(qwen2, i, None) for i in (1, 3, 5)]
    running.insert(place, bad)
    stop.broken = how != "stops"
    stop.set()
    with worker_of(qwen2) as worker, head_rows(qwen2) as rows:
        futures = while_held(worker, [prefill_of(one, worker) for one in running])
        assert rows[0] == 3
        if stop.broken:
            with pytest.raises(ValueError, match="no such stop"):
                futures.pop(place).result()
        else:
            assert futures.pop(place).result()[1] is None
        for future, own in zip(futures, expected, strict=True):
            assert_same(future.result(), own)


@pytest.mark.parametrize("place", [0, 2])
def test_one_that_fails_fails_alone(
    qwen2: LanguageModel, place: int, caplog: pytest.LogCaptureFixture
) -> None:
    expected = [prefilled(generation(qwen2, i, None)) for i in (1, 3, 5)]
    running = [generation(qwen2, i, None) for i in (1, 3, 5)]
    bad = generation(qwen2, 4, None)
    bad.visuals = [visual[:, :-1] for visual in bad.visuals]
    running.insert(place, bad)
    with worker_of(qwen2) as worker, caplog.at_level(logging.WARNING, "fluxchat"):
        futures = while_held(worker, [prefill_of(one, worker) for one in running])
        with pytest.raises(RuntimeError, match="shape"):
            futures.pop(place).result()
        for future, own in zip(futures, expected, strict=True):
            assert_same(future.result(), own)
        assert "4 prompts are computed in turn" in caplog.text
        assert read(generation(qwen2, 0, worker))[0] == read(generation(qwen2, 0, None))[0]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), MemoryError("no room")])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.quick(2)
def test_a_pass_without_memory_is_made_again_for_each(
    qwen2: LanguageModel, error: BaseException, layer: int
) -> None:
    """With KV before the pieces too, which the failed pass leaves as it was; it is not tried with fewer."""
    failed: list[int] = []
    prefixes = PrefixCache(2**26, qwen2.kv_bytes_per_token)
    expected = [read(generation(qwen2, i, None, more=" Why?"))[0] for i in (1, 3, 5)]

    def large(_: torch.nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if len(arguments[0]) > 1 and arguments[0].shape[1] > 1:
            failed.append(len(arguments[0]))
            raise error

    with worker_of(qwen2) as worker:
        for i in (1, 3):
            read(generation(qwen2, i, worker, prefixes))
        handle = qwen2.model.model.layers[layer].register_forward_pre_hook(large)
        try:
            jobs = [generation(qwen2, i, worker, prefixes, more=" Why?") for i in (1, 3, 5)]
            futures = while_held(worker, [partial(read, job) for job in jobs])
            assert [future.result()[0] for future in futures] == expected
        finally:
            handle.remove()
    assert failed == [3]


@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_without_room_is_told_so_and_no_other(qwen2: LanguageModel, place: int) -> None:
    """The longest alone has none; two of the others have it together, three have not."""
    expected = [prefilled(generation(qwen2, 0, None))] * 3
    running = [generation(qwen2, 0, None) for _ in range(3)]
    running.insert(place, generation(qwen2, 3, None))
    limit = int(2.5 * len(running[-1].prompt)) * qwen2.kv_bytes_per_token
    assert len(running[place].prompt) * qwen2.kv_bytes_per_token > limit
    with worker_of(qwen2, kv_limit=limit) as worker:
        futures = while_held(worker, [prefill_of(one, worker) for one in running])
        with pytest.raises(OutOfMemory, match="ask again later"):
            futures.pop(place).result()
        for future, own in zip(futures, expected, strict=True):
            assert_same(future.result(), own)
        pieces = len(piece_ends(running[-1].prompt))
        assert pieces == 1
        assert worker.prefills == 2


def test_the_order_is_that_of_arrival(qwen2: LanguageModel) -> None:
    """Prompts that cannot join are computed in their turn, and others are not put off by those that can."""
    done: list[int] = []
    with worker_of(qwen2, max_batch=2) as worker:

        def ask(number: int) -> None:
            answer = LocalAnswer(qwen2, generation(qwen2, 0, None).request, worker)
            compute = answer._prefill_piece

            def noted(stretch: Stretch) -> Prefilled:
                done.append(number)
                return compute(stretch)

            answer._prefill_piece = noted  # type: ignore[method-assign]
            answer.prefill(piece_ends(answer.prompt))

        def something(number: int) -> None:
            worker.run(done.append, number)

        functions = [partial(something if n in (1, 3) else ask, n) for n in range(6)]
        for future in while_held(worker, functions):
            future.result()
    assert done == [0, 2, 1, 3, 4, 5]


def test_the_head_makes_one_score_for_each_prompt(qwen2: LanguageModel) -> None:
    with worker_of(qwen2) as worker, head_rows(qwen2) as rows:
        jobs = [prefill_of(generation(qwen2, i, worker), worker) for i in (0, 2)]
        for future in while_held(worker, jobs):
            future.result()
    assert rows == [2]


@pytest.mark.parametrize("options", [{}, {"prefill_together": False}])
def test_on_a_cpu_each_is_computed_alone_unless_it_is_asked_for(
    qwen2: LanguageModel, options: dict[str, Any]
) -> None:
    worker = ComputeWorker(qwen2, **options)
    jobs = [prefill_of(generation(qwen2, 0, worker), worker) for _ in range(3)]
    found = [future.result() for future in while_held(worker, jobs)]
    worker.close()
    assert worker.prefills == 3
    kv, logits = prefilled(generation(qwen2, 0, None))
    for other, scores in found:
        assert torch.equal(scores, logits)
        for pair, own in zip(layers_of(other), layers_of(kv), strict=True):
            assert all(map(torch.equal, pair, own))


def stretch(length: int, start: int = 0) -> Stretch:
    return Stretch(start, start + length, start + length, lambda: None, lambda: {}, threading.Event())


@pytest.mark.parametrize(
    ("lengths", "start", "fit"),
    [
        ([290] * 28, 0, True),
        ([290] * 29, 0, False),  # longer than a pass may be
        ([2048, 1500, 2048], 0, True),
        ([2048, 20], 0, True),
        ([2048, 20, 20, 20], 0, False),  # most of it would be padding
        ([500, 20, 20, 20], 0, True),  # which costs nothing in a short one
        ([32] * 64, 1000, True),
        ([32] * 65, 1000, False),
        ([1024, 1025], 1000, False),
    ],
)
def test_a_pass_is_bounded(lengths: list[int], start: int, fit: bool) -> None:
    assert fit_together([*map(stretch, lengths[:-1]), stretch(lengths[-1], start)]) is fit


def test_the_pieces_of_an_accelerator_are_longer(
    qwen2: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert longest_piece(torch.device("cpu")) == prefill.LONGEST_PIECE
    assert longest_piece(torch.device("cuda")) == prefill.LONGEST_PIECE_ON_ACCELERATOR
    monkeypatch.setattr(local, "longest_piece", lambda _: 50)
    prefixes = PrefixCache(2**26, qwen2.kv_bytes_per_token)
    with worker_of(qwen2) as worker:
        running = generation(qwen2, 3, worker, prefixes)
        text, _ = read(running)
        assert worker.prefills == len(piece_ends(running.prompt, 50)) > len(piece_ends(running.prompt))
        again = generation(qwen2, 3, worker, prefixes, more=" Why?")
        text = read(again)[0]
        assert again.stats.cached_tokens >= QUESTIONS[3][0]
    assert text == read(generation(qwen2, 3, None, more=" Why?"))[0]


def test_states_are_kept_where_questions_part_at_every_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "longest_piece", lambda _: 50)
    llm = load_llm(tiny_families.make(tmp_path, "lfm2"), device="cpu", dtype=torch.float32)
    running = generation(llm, 3, None)
    answer = LocalAnswer(llm, running.request, prefixes=PrefixCache(2**26, llm.kv_bytes_per_token))
    ends = piece_ends(running.prompt, 50)
    visual = sum(running.prompt.spans[0])
    assert ends[0] < visual in ends
    answer.prefill(ends)
    kept = [end for end, piece in zip(ends, answer._pieces, strict=True) if piece.states is not None]
    assert kept == [end for end in ends if end >= visual]
