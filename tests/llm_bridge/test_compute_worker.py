"""Answers decoded together are those decoded alone, whoever joins, leaves or stops meanwhile."""

import os
import select
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from encoder.errors import ModelError, OutOfMemory
from llm_bridge.compute_worker import ComputeWorker
from llm_bridge.engines.local import LocalAnswer, piece_ends
from llm_bridge.generation import Generation, GenerationStats
from llm_bridge.kv_cache import PrefixCache, kv_from_layers, layers_of
from llm_bridge.lean.step import LeanLayer
from llm_bridge.llm import LanguageModel, load_llm
from llm_bridge.prompt import Message, Visual, render
from llm_bridge.sampling import Leading, Sampler, SamplingParams
from llm_bridge.text_decoder import StreamingDecoder
from tests import tiny_llms
from tests.llm_bridge.conftest import ONE_QUICK
from tests.patience import PATIENCE_S

QUESTIONS = [
    (3, "What is it?", 40),
    (40, "How many birds are there?", 25),
    (1, "Describe it!", 9),
    (120, "Where does the red car move?", 60),
    (17, "A cat sleeps; the sun shines. What is in the video?", 1),
    (64, "And then?", 33),
]


@pytest.fixture(params=ONE_QUICK)
def llm(request: pytest.FixtureRequest, tiny_llm: Callable[[str], LanguageModel]) -> LanguageModel:
    return tiny_llm(request.param)


@pytest.fixture
def worker(llm: LanguageModel) -> Iterator[ComputeWorker]:
    made = ComputeWorker(llm, max_batch=4)  # fewer than there are questions
    yield made
    made.close()


def generation(
    llm: LanguageModel,
    index: int,
    worker: ComputeWorker | None,
    prefixes: PrefixCache | None = None,
    temperature: float = 0.0,
    more: str = "",
) -> Generation:
    tokens, text, longest = QUESTIONS[index]
    visual = torch.randn(tokens, llm.hidden_size, generator=torch.Generator().manual_seed(index))
    prompt = render(llm.tokenizer, [Message.of("user", Visual(tokens, f"clip {index}"), text + more)])
    sampling = SamplingParams(longest, temperature, seed=index)
    return Generation(llm, prompt, [visual], sampling, prefixes, worker=worker)


def prefilled(generation: Generation) -> tuple[Any, torch.Tensor | None]:
    return LocalAnswer(generation.llm, generation.request).prefill(piece_ends(generation.prompt))


def read(generation: Generation) -> tuple[str, GenerationStats]:
    return "".join(generation), generation.stats


@pytest.mark.parametrize("temperature", [0.0, 1.3])
@pytest.mark.quick(1)
def test_together_equals_alone(llm: LanguageModel, worker: ComputeWorker, temperature: float) -> None:
    everyone = range(len(QUESTIONS))
    alone = [read(generation(llm, i, None, temperature=temperature)) for i in everyone]
    with ThreadPoolExecutor(len(QUESTIONS)) as pool:
        for _ in range(3):  # another order of arrival each time
            jobs = [generation(llm, i, worker, temperature=temperature) for i in everyone]
            together = list(pool.map(read, jobs))
            assert [text for text, _ in together] == [text for text, _ in alone]
            for (_, found), (_, expected) in zip(together, alone, strict=True):
                assert (found.completion_tokens, found.finish) == (
                    expected.completion_tokens,
                    expected.finish,
                )
    assert worker.steps < worker.made  # some steps did serve several
    assert worker.active == 0


def test_scores_equal_those_alone(llm: LanguageModel) -> None:
    """Numbers, not only the best token: several rows of different lengths over twelve steps."""
    kvs, last = [], []
    with torch.inference_mode():
        for index in (0, 1, 3):
            alone = generation(llm, index, None)
            kv, scores = prefilled(alone)
            kvs.append(kv)
            last.append(scores)
        shared = llm.together([layers_of(kv) for kv in kvs])
        tokens = [int(scores.argmax()) for scores in last]
        for step in range(80):  # past the room that the buffers are made with
            if shared.full:
                shared = llm.together([shared.views(row) for row in range(3)])
            found = shared.step(tokens)
            expected = torch.stack(
                [
                    llm.model(input_ids=torch.tensor([[t]]), past_key_values=kv, use_cache=True).logits[0, -1]
                    for t, kv in zip(tokens, kvs, strict=True)
                ]
            )
            torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4, msg=f"step {step}")
            tokens = expected.argmax(dim=1).tolist()
        for row, kv in enumerate(kvs):
            for (keys, values), layer in zip(
                layers_of(kv_from_layers(llm.model.config, shared.copies(row))), kv.layers, strict=True
            ):
                torch.testing.assert_close(keys, layer.keys, atol=1e-4, rtol=1e-4)
                torch.testing.assert_close(values, layer.values, atol=1e-4, rtol=1e-4)


def test_kv_prefixes_survive_sharing(llm: LanguageModel, worker: ComputeWorker) -> None:
    prefixes = PrefixCache(2**26, llm.kv_bytes_per_token)
    everyone = range(len(QUESTIONS))
    expected = [read(generation(llm, i, None, more=" Why?"))[0] for i in everyone]
    with ThreadPoolExecutor(len(QUESTIONS)) as pool:
        list(pool.map(read, [generation(llm, i, worker, prefixes) for i in everyone]))
        again = list(pool.map(read, [generation(llm, i, worker, prefixes, more=" Why?") for i in everyone]))
    assert [text for text, _ in again] == expected
    for index, (_, stats) in enumerate(again):
        assert stats.cached_tokens >= (QUESTIONS[index][0] if QUESTIONS[index][0] >= 16 else 0)


def test_a_stop_ends_one_answer_and_no_other(tiny_llm: Callable[[str], LanguageModel]) -> None:
    llm = tiny_llm("qwen2")
    worker = ComputeWorker(llm)
    expected, stats = read(generation(llm, 3, None))
    assert stats.completion_tokens > 8
    stopped, other = generation(llm, 3, worker), generation(llm, 3, worker)
    first, second = iter(stopped), iter(other)
    next(first), next(second)
    steps = worker.steps
    stopped.stop.set()
    assert len(list(first)) <= 2
    assert stopped.stats.finish == "cancelled"
    assert worker.steps - steps <= 1
    list(second)
    assert read(generation(llm, 3, worker))[0] == expected
    assert worker.active == 0


def test_an_abandoned_answer_leaves(tiny_llm: Callable[[str], LanguageModel]) -> None:
    llm = tiny_llm("qwen2")
    worker = ComputeWorker(llm)
    pieces = iter(generation(llm, 3, worker))
    next(pieces)
    assert worker.active == 1
    pieces.close()  # type: ignore[attr-defined]
    assert worker.active == 0


def test_a_slow_reader_holds_nobody_up(tiny_llm: Callable[[str], LanguageModel]) -> None:
    """One reader never asks for its second piece; the others finish nevertheless, and it can go on later."""
    llm = tiny_llm("qwen2")
    worker = ComputeWorker(llm, max_batch=2)
    expected = read(generation(llm, 3, None))[0]
    slow = iter(generation(llm, 3, worker))
    pieces = [next(slow)]
    with ThreadPoolExecutor(4) as pool:
        texts = list(pool.map(read, [generation(llm, i, worker) for i in (0, 1, 2, 5)]))
    assert [text for text, _ in texts] == [read(generation(llm, i, None))[0] for i in (0, 1, 2, 5)]
    assert "".join([*pieces, *slow]) == expected


def no_room(_: torch.Tensor) -> None:
    raise MemoryError("no room")


def broken(_: torch.Tensor) -> None:
    raise RuntimeError("broken")


@contextmanager
def failing(llm: LanguageModel, layer: int, fault: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """Call a function with the hidden rows (B, width) before a layer's last product, in every step."""
    assert llm.lean is not None
    layers = cast(list[LeanLayer], llm.lean[0].layers)
    sound = layers[layer]

    def product(rows: torch.Tensor) -> torch.Tensor:
        fault(rows)
        return sound.down(rows)

    layers[layer] = replace(sound, down=product)
    try:
        yield
    finally:
        layers[layer] = sound


def begin(
    llm: LanguageModel, worker: ComputeWorker, prefixes: PrefixCache | None, *indices: int
) -> list[Iterator[str]]:
    """Answers that are in the batch and whose first piece is read."""
    streams = [iter(generation(llm, i, worker, prefixes)) for i in indices]
    for stream in streams:
        next(stream)
    return streams


def test_a_lasting_error_reaches_every_answer_as_its_own(tiny_llm: Callable[[str], LanguageModel]) -> None:
    llm = tiny_llm("qwen2")
    worker = ComputeWorker(llm)
    prefixes = PrefixCache(2**26, llm.kv_bytes_per_token)
    streams = begin(llm, worker, prefixes, 1, 3)
    errors = []
    with failing(llm, 0, broken):
        for stream in streams:
            with pytest.raises(RuntimeError, match="broken") as raised:
                list(stream)
            errors.append(raised.value)
    assert errors[0] is not errors[1]
    assert (worker.active, prefixes.stats.entries) == (0, 0)
    assert read(generation(llm, 0, worker))[0] == read(generation(llm, 0, None))[0]


@pytest.mark.parametrize("layer", [0, 1])
def test_a_pass_that_fails_once_changes_no_answer(
    tiny_llm: Callable[[str], LanguageModel], layer: int
) -> None:
    """Between two layers too, when the shared buffers of the first have the new token and the others' not."""
    llm = tiny_llm("qwen2")
    worker = ComputeWorker(llm)
    everyone = (1, 3, 5)
    expected = [read(generation(llm, i, None))[0] for i in everyone]
    streams = [iter(generation(llm, i, worker)) for i in everyone]
    texts = [next(stream) for stream in streams]
    for index, stream in enumerate(streams):
        texts[index] += next(stream)  # they share buffers by now

    failures = []

    def fails_once(_: torch.Tensor) -> None:
        if not failures:
            failures.append(1)
            raise MemoryError("no room")

    steps, made = worker.steps, worker.made
    with failing(llm, layer, fails_once):
        for index, stream in enumerate(streams):
            texts[index] += "".join(stream)
    assert failures
    assert texts == expected
    assert worker.steps - steps == worker.made - made > 3  # decoded in turn from then on
    assert worker.active == 0


def test_a_row_whose_own_pass_fails_ends_alone(tiny_llm: Callable[[str], LanguageModel]) -> None:
    llm = tiny_llm("qwen2")
    worker = ComputeWorker(llm)
    expected = [read(generation(llm, i, None))[0] for i in (3, 5)]
    streams = [iter(generation(llm, i, worker)) for i in (1, 3, 5)]
    texts = [next(stream) for stream in streams]
    alone: list[int] = []

    def fail(rows: torch.Tensor) -> None:
        if len(rows) == 1:
            alone.append(1)
        if len(alone) < 2:  # in the shared pass, and when the first of the answers is tried by itself
            raise RuntimeError("broken")

    with failing(llm, 1, fail), pytest.raises(RuntimeError, match="broken"):
        list(streams[0])
    assert [first + "".join(rest) for first, rest in zip(texts[1:], streams[1:], strict=True)] == expected


def test_the_newest_answer_gives_way_when_memory_is_short(tiny_llm: Callable[[str], LanguageModel]) -> None:
    llm = tiny_llm("qwen2")
    worker = ComputeWorker(llm)
    expected = read(generation(llm, 1, None))[0]
    streams = [iter(generation(llm, i, worker)) for i in (1, 3, 5)]
    texts = [next(stream) for stream in streams]

    def small(_: torch.Tensor) -> None:
        if worker.active > 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    with failing(llm, 1, small):
        assert texts[0] + "".join(streams[0]) == expected
        for stream in streams[1:]:
            with pytest.raises(OutOfMemory, match="ask again later"):
                list(stream)
    assert worker.active == 0


def test_keys_and_values_are_bounded_while_answers_are_made(tiny_llm: Callable[[str], LanguageModel]) -> None:
    llm = tiny_llm("qwen2")
    expected, stats = read(generation(llm, 3, None))
    half = stats.prompt_tokens + stats.completion_tokens // 2
    assert half > stats.prompt_tokens
    positions = stats.prompt_tokens + stats.completion_tokens
    assert 3 * stats.prompt_tokens > 2 * positions + 4
    worker = ComputeWorker(llm, kv_limit=(2 * positions + 4) * llm.kv_bytes_per_token)
    streams = [iter(generation(llm, 3, worker)) for _ in range(3)]
    texts = [next(stream) for stream in streams[:2]]
    with pytest.raises(OutOfMemory, match="ask again later"):
        next(streams[2])  # its prompt has no room beside the others
    assert [text + "".join(rest) for text, rest in zip(texts, streams, strict=False)] == [expected] * 2
    worker = ComputeWorker(llm, kv_limit=2 * half * llm.kv_bytes_per_token)
    streams = [iter(generation(llm, 3, worker)) for _ in range(2)]
    texts = [next(stream) for stream in streams]
    assert texts[0] + "".join(streams[0]) == expected
    with pytest.raises(OutOfMemory, match="ask again later"):
        list(streams[1])  # it had grown beyond what there is for both


class Strange(threading.Event):
    """A stop that cannot be asked any more once it is broken."""

    broken = False

    def is_set(self) -> bool:
        if self.broken:
            raise ValueError("no such stop")
        return super().is_set()


@pytest.mark.parametrize("what", ["stop", "scores", "choice"])
def test_a_failing_choice_ends_one_answer_and_no_other(
    tiny_llm: Callable[[str], LanguageModel], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = tiny_llm("qwen2")
    worker = ComputeWorker(llm)
    prefixes = PrefixCache(2**26, llm.kv_bytes_per_token)
    expected = [read(generation(llm, i, None))[0] for i in (1, 5)]
    bad = generation(llm, 3, worker, prefixes)
    bad.stop = stop = Strange()
    streams = [iter(bad), *(iter(generation(llm, i, worker)) for i in (1, 5))]
    texts = [next(stream) for stream in streams]
    sequence = worker.sequences[0]
    stop.broken = what == "stop"
    sampler, choose = sequence.sampler, Sampler.__call__

    def fail(self: Sampler, logits: torch.Tensor, first: Leading | None = None) -> int:
        if self is not sampler:
            return choose(self, logits, first)
        return choose(self, logits * float("nan")) if what == "scores" else 1 // 0

    if what != "stop":
        monkeypatch.setattr(Sampler, "__call__", fail)
    for index in (1, 2):
        texts[index] += "".join(streams[index])
    error = {"stop": ValueError, "scores": ModelError, "choice": ZeroDivisionError}[what]
    with pytest.raises(error):
        list(streams[0])
    assert texts[1:] == expected
    assert (worker.active, prefixes.stats.entries) == (0, 0)


def test_who_joins_while_a_step_fails_is_computed(tiny_llm: Callable[[str], LanguageModel]) -> None:
    llm = tiny_llm("qwen2")
    worker = ComputeWorker(llm, max_batch=2)
    expected = read(generation(llm, 5, None))[0]
    streams = begin(llm, worker, None, 1, 3)
    inside, joined = threading.Event(), threading.Event()

    def fail(_: torch.Tensor) -> None:
        inside.set()
        joined.wait(PATIENCE_S)
        raise RuntimeError("broken")

    with ThreadPoolExecutor(2) as pool, failing(llm, 0, fail):
        failed = pool.submit(list, streams[0])
        assert inside.wait(PATIENCE_S)
        late = generation(llm, 5, None)
        kv, scores = prefilled(late)
        assert scores is not None
        waiting = pool.submit(worker.join, kv, scores, late.sampling, late.stop)
        joined.set()
        row = waiting.result(30)
        failed.exception(30)
    decoder = StreamingDecoder(llm.tokenizer)
    assert "".join(map(decoder.push, row)) + decoder.flush() == expected


def test_a_row_that_nobody_computes_is_an_error(tiny_llm: Callable[[str], LanguageModel]) -> None:
    llm = tiny_llm("qwen2")
    worker = ComputeWorker(llm)
    stream = begin(llm, worker, None, 3)[0]
    worker.run(worker.remove, worker.sequences[0])
    with pytest.raises(ModelError, match="given up"):
        list(stream)


def test_closing_ends_answers_with_a_sentence(tiny_llm: Callable[[str], LanguageModel]) -> None:
    llm = tiny_llm("qwen2")
    worker = ComputeWorker(llm)
    prefixes = PrefixCache(2**26, llm.kv_bytes_per_token)
    streams = begin(llm, worker, prefixes, 1, 3)
    worker.close()
    worker.close()
    errors = []
    for stream in [*streams, iter(generation(llm, 5, worker))]:
        with pytest.raises(ModelError, match="closed") as raised:
            list(stream)
        errors.append(raised.value)
    assert len({id(error) for error in errors}) == 3
    assert prefixes.stats.entries == 0
    assert worker.active == 0


def test_closing_while_many_ask_leaves_nobody_waiting(tiny_llm: Callable[[str], LanguageModel]) -> None:
    llm = tiny_llm("qwen2")
    for seed in range(3):
        worker = ComputeWorker(llm, max_batch=3)
        started = threading.Barrier(7)

        def ask(index: int, worker: ComputeWorker = worker, started: threading.Barrier = started) -> bool:
            started.wait(PATIENCE_S)
            try:
                while True:
                    list(generation(llm, index, worker))
            except ModelError as error:
                return "closed" in str(error)

        with ThreadPoolExecutor(6) as pool:
            results = [pool.submit(ask, index) for index in range(6)]
            started.wait(PATIENCE_S)
            for _ in range(seed):
                read(generation(llm, 2, worker))
            worker.close()
            assert all(result.result(60) for result in results)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_forked_process_is_told_that_it_cannot_compute(tiny_llm: Callable[[str], LanguageModel]) -> None:
    llm = tiny_llm("qwen2")
    worker = ComputeWorker(llm)
    prefixes = PrefixCache(2**26, llm.kv_bytes_per_token)
    running = begin(llm, worker, prefixes, 3)[0]
    reading, writing = os.pipe()
    with prefixes._lock:  # as another thread may hold it
        child = os.fork()
        if child == 0:
            said = []
            for stream in (iter(generation(llm, 1, worker, prefixes)), running):
                try:
                    list(stream)
                except ModelError as error:
                    said.append(str(error))
            worker.close()
            os.write(writing, "|".join(said).encode())
            os._exit(0)
    os.close(writing)
    ready, _, _ = select.select([reading], [], [], 60)
    if not ready:
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert ready
    first, second = os.read(reading, 4096).decode().split("|")
    os.close(reading)
    assert first == second
    assert "forked" in first
    assert list(running)  # the parent goes on


def test_an_interrupted_reader_leaves_others_their_step(
    tiny_llm: Callable[[str], LanguageModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = tiny_llm("qwen2")
    worker = ComputeWorker(llm)
    expected = read(generation(llm, 1, None))[0]
    asks = worker._go_on

    def interrupted() -> None:
        monkeypatch.setattr(worker, "_go_on", asks)
        raise KeyboardInterrupt

    monkeypatch.setattr(worker, "_go_on", interrupted)
    with pytest.raises(KeyboardInterrupt):
        read(generation(llm, 0, worker))
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(read, generation(llm, 1, worker))
        try:
            assert other.result(20)[0] == expected
        finally:
            worker.close()  # or the reader waits on


def test_a_model_that_forgets_decodes_in_turn(tmp_path: Path) -> None:
    """A sliding window cannot be shared; answers are right all the same."""
    folder = tiny_llms.make(
        tmp_path / "m", "qwen2", use_sliding_window=True, sliding_window=24, max_window_layers=0
    )
    llm = load_llm(folder, device="cpu", dtype=torch.float32)
    worker = ComputeWorker(llm)
    alone = [read(generation(llm, i, None))[0] for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(read, [generation(llm, i, worker) for i in range(4)]))
    assert [text for text, _ in together] == alone


def test_many_threads_joining_at_random(tiny_llm: Callable[[str], LanguageModel]) -> None:
    llm = tiny_llm("qwen3")
    worker = ComputeWorker(llm, max_batch=3)
    prefixes = PrefixCache(2**22, llm.kv_bytes_per_token)
    alone = [read(generation(llm, i, None))[0] for i in range(len(QUESTIONS))]
    wrong: list[str] = []

    def reader(seed: int) -> None:
        random = torch.Generator().manual_seed(seed)
        for _ in range(6):
            index = int(torch.randint(len(QUESTIONS), (), generator=random))
            job = generation(llm, index, worker, prefixes)
            if torch.rand((), generator=random) < 0.3:
                pieces = iter(job)
                next(pieces, None)
                job.stop.set()
                list(pieces)
            elif "".join(job) != alone[index]:
                wrong.append(QUESTIONS[index][1])

    threads = [threading.Thread(target=reader, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert wrong == []
    assert worker.active == 0
