"""Every family of the table keeps its row's promises; those that are refused are refused in one sentence."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from encoder.errors import ModelError
from llm_bridge import families
from llm_bridge.compute_worker import ComputeWorker, SequenceState
from llm_bridge.engines.local import LocalAnswer, piece_ends
from llm_bridge.families import FAMILIES, family_of
from llm_bridge.generation import Generation, GenerationStats
from llm_bridge.kv_cache import PrefixCache
from llm_bridge.llm import LanguageModel, load_llm
from llm_bridge.prefill import LONGEST_PIECE
from llm_bridge.prompt import IGNORE, Message, Visual, render
from llm_bridge.sampling import SamplingParams
from llm_bridge.text_decoder import StreamingDecoder
from tests import tiny_families
from tests.llm_bridge.test_prefill import while_held, worker_of
from tests.llm_bridge.tiny_vlm import answered, tiny_vlm, vision_of
from tests.patience import PATIENCE_S

REFUSED = [t for family in FAMILIES if family.refused for t in family.model_types]
# One of each way to remember, and one with a table of embeddings in each layer.
QUICK = ("gemma3_text", "lfm2", "gemma3n_text")
USABLE = [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
    for name in (*tiny_families.SETTINGS, *tiny_families.VARIANTS)
    if name not in REFUSED
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = tiny_families.make(tmp_path_factory.mktemp("family"), name)
        return made[name]

    return make


@pytest.fixture(params=USABLE, scope="module")
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def llm(name: str, folder: Callable[[str], Path]) -> LanguageModel:
    return load_llm(folder(name), device="cpu", dtype=torch.float32)


@pytest.fixture
def worker(llm: LanguageModel) -> Iterator[ComputeWorker]:
    made = ComputeWorker(llm, max_batch=4)
    yield made
    made.close()


def generation(
    llm: LanguageModel,
    turns: list[str],
    prefixes: PrefixCache | None = None,
    worker: ComputeWorker | None = None,
    tokens: int = 40,
    answer: int = 12,
) -> Generation:
    """A question after earlier turns; the first one shows a visual longer than the tiny windows."""
    visual = torch.randn(tokens, llm.hidden_size, generator=torch.Generator().manual_seed(tokens))
    messages = [
        Message.of(
            "user" if i % 2 == 0 else "assistant", *([Visual(tokens, f"{tokens}")] if not i else []), text
        )
        for i, text in enumerate(turns)
    ]
    prompt = render(llm.tokenizer, messages)
    return Generation(llm, prompt, [visual], SamplingParams(answer), prefixes, worker=worker)


def read(running: Generation) -> tuple[str, GenerationStats]:
    return "".join(running), running.stats


def whole_logits(llm: LanguageModel, running: Generation) -> torch.Tensor:
    """The last logits (V,) of a prompt that the model reads at once, without a cache."""
    ids = torch.tensor([running.prompt.ids])
    with torch.inference_mode():
        return llm.model(
            inputs_embeds=LocalAnswer(llm, running.request).inputs(0, len(running.prompt))["inputs_embeds"],
            use_cache=False,
            **llm.beside_embeddings(ids),
        ).logits[0, -1]


def test_embeddings_of_tokens_are_read_as_the_tokens(llm: LanguageModel) -> None:
    ids = torch.arange(3, 60)[None]
    with torch.inference_mode():
        expected = llm.model(input_ids=ids, use_cache=False).logits
        embeds = llm.embed(ids[0])[None]
        found = llm.model(inputs_embeds=embeds, use_cache=False, **llm.beside_embeddings(ids)).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tokens", [40, LONGEST_PIECE + 200])
def test_a_prompt_in_pieces_is_the_whole_prompt(llm: LanguageModel, tokens: int) -> None:
    running = generation(llm, ["What is it?"], tokens=tokens)
    ends = piece_ends(running.prompt) if llm.memory != "whole" else [len(running.prompt)]
    assert len(ends) > 1
    _, found = LocalAnswer(llm, running.request).prefill(ends)
    expected = whole_logits(llm, running)
    torch.testing.assert_close(found, expected, atol=1e-3 * float(expected.abs().max()), rtol=1e-3)


def greedy_ids(llm: LanguageModel, running: Generation, count: int) -> list[int]:
    """Greedy tokens of the model by itself: with its own cache where it keeps states, else without any."""
    embeds = LocalAnswer(llm, running.request).inputs(0, len(running.prompt))["inputs_embeds"]
    ids: list[int] = []
    with torch.inference_mode():
        if llm.memory == "states":
            kv = DynamicCache(config=llm.model.config)
            scores = llm.advance(kv, inputs_embeds=embeds)
            while len(ids) < count and (best := int(scores.argmax())) not in llm.eos_ids:
                ids.append(best)
                scores = llm.advance(kv, input_ids=torch.tensor([[best]]))
            return ids
        while len(ids) < count:
            beside = llm.beside_embeddings(torch.tensor([[*running.prompt.ids, *ids]]))
            given = torch.cat((embeds, llm.embed(ids)[None]), dim=1) if ids else embeds
            best = int(llm.model(inputs_embeds=given, use_cache=False, **beside).logits[0, -1].argmax())
            if best in llm.eos_ids:
                break
            ids.append(best)
    return ids


def test_greedy_answers_are_those_of_transformers(llm: LanguageModel) -> None:
    running = generation(llm, ["What is it?"])
    text, stats = read(running)
    ids = greedy_ids(llm, running, 12)
    decoder = StreamingDecoder(llm.tokenizer)
    assert text == "".join(map(decoder.push, ids)) + decoder.flush()
    assert stats.completion_tokens == len(ids) > 0


@pytest.mark.quick(1)
def test_answers_with_a_cache_are_those_without(llm: LanguageModel) -> None:
    prefixes = PrefixCache(2**26, llm.kv_bytes_per_token)
    script = [["What is it?"], ["Where does it go?"], ["What is it?", "A dog.", "Why?"], ["What is it?"]]
    reused = []
    for turns in script:
        expected, _ = read(generation(llm, turns))
        found, stats = read(generation(llm, turns, prefixes))
        assert found == expected
        reused.append(stats.cached_tokens)
    assert reused[0] == 0
    assert all(tokens >= 40 for tokens in reused[1:])  # a second question computes its own words


@pytest.mark.quick(1)
def test_an_answer_among_others_is_the_one_alone(
    llm: LanguageModel, worker: ComputeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [(["What is it?"], 40), (["How many birds are there?"], 3), (["Describe it!"], 90)]
    alone = [read(generation(llm, turns, tokens=tokens, answer=20))[0] for turns, tokens in asked]
    joined, join = threading.Barrier(len(asked)), worker.join

    def join_with_others(*args: Any, **options: Any) -> SequenceState:
        sequence = join(*args, **options)
        joined.wait(PATIENCE_S)  # none goes on before all are there
        return sequence

    monkeypatch.setattr(worker, "join", join_with_others)
    with ThreadPoolExecutor(len(asked)) as pool:
        jobs = [generation(llm, t, worker=worker, tokens=tokens, answer=20) for t, tokens in asked]
        together = list(pool.map(read, jobs))
    assert [text for text, _ in together] == alone
    family = family_of(llm.model.config)
    assert family is not None
    assert (worker.steps < worker.made) is family.batches


@pytest.mark.quick(1)
def test_a_prompt_computed_among_others_is_the_one_alone(llm: LanguageModel) -> None:
    """First pieces, then others behind kept ones; beyond the tiny windows."""
    asked = [(["What is it?"], 40), (["How many birds are there?"], 3), (["Describe it!"], 90)]
    prefixes = PrefixCache(2**26, llm.kv_bytes_per_token)
    family = family_of(llm.model.config)
    assert family is not None
    with worker_of(llm) as worker:
        for more in ("", " Why?"):
            turns = [([*earlier, text + more], tokens) for (*earlier, text), tokens in asked]
            alone = [read(generation(llm, t, tokens=tokens))[0] for t, tokens in turns]
            jobs = [generation(llm, t, prefixes, worker, tokens=tokens) for t, tokens in turns]
            before = worker.prefills
            futures = while_held(worker, [partial(read, job) for job in jobs])
            assert [future.result()[0] for future in futures] == alone
        assert (worker.prefills - before == 1) is family.batches  # all that was not kept


def test_the_training_loss_is_the_models_own(name: str, folder: Callable[[str], Path]) -> None:
    model = tiny_vlm(folder(name))
    vision = vision_of(model, [5, 9])
    prompts = [answered(model, 5, "A dog."), answered(model, 9, "It moves to the left, then up.")]
    losses, counts = [], []
    for prompt, visual in zip(prompts, model.project(vision), strict=True):
        ids, labels = torch.tensor([prompt.ids]), torch.tensor([prompt.labels])
        embedded = model.llm.embed(ids.clamp_min(0)[0])[None]
        start, length = prompt.spans[0]
        embedded[0, start : start + length] = visual
        beside = model.llm.beside_embeddings(ids)
        losses.append(model.language_model(inputs_embeds=embedded, labels=labels, **beside).loss)
        counts.append(int((labels[:, 1:] != IGNORE).sum()))
    own = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    torch.testing.assert_close(model.loss(prompts, vision), own, atol=1e-4, rtol=1e-4)


def test_a_stop_ends_an_answer(llm: LanguageModel) -> None:
    running = generation(llm, ["What is it?"], answer=200)
    pieces = iter(running)
    next(pieces)
    running.stop.set()
    assert len(list(pieces)) <= 2
    assert running.stats.finish == "cancelled"


def test_the_memory_is_that_of_the_table(llm: LanguageModel) -> None:
    family = family_of(llm.model.config)
    assert family is not None
    assert llm.memory == family.memory


def test_every_family_of_the_table_is_tested() -> None:
    tested = {*tiny_families.SETTINGS, "gemma3", "gemma3n", "gemma4", "llama4", "qwen3_5", "falcon_mamba"}
    listed = {model_type for family in FAMILIES for model_type in family.model_types}
    assert listed == tested


@pytest.mark.parametrize(
    "model_type", [t if t == "falcon_h1" else pytest.param(t, marks=pytest.mark.slow) for t in REFUSED]
)
def test_a_family_that_answers_wrongly_is_refused(model_type: str, folder: Callable[[str], Path]) -> None:
    if model_type not in tiny_families.SETTINGS:
        pytest.skip("the tiny model is that of its sibling")
    with pytest.raises(
        ModelError, match=r"^Cannot use the language model .*: .*\. Llama, .* work\.$"
    ) as found:
        load_llm(folder(model_type), device="cpu", dtype=torch.float32)
    assert "\n" not in str(found.value)


def test_a_family_that_is_not_listed_is_tried(
    folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(families, "_BY_TYPE", {})
    assert load_llm(folder("gemma3_text"), device="cpu", dtype=torch.float32).memory == "positions"
    assert load_llm(folder("lfm2"), device="cpu", dtype=torch.float32).memory == "whole"
    for model_type in ("falcon_h1", "gemma3n_text"):
        with pytest.raises(ModelError, match="reads embeddings"):
            load_llm(folder(model_type), device="cpu", dtype=torch.float32)


def test_the_page_is_the_table() -> None:
    page = Path(__file__).parents[2] / "docs" / "reference" / "language-models.md"
    assert page.read_text() == families.markdown(), "run: python -m llm_bridge.families > " + page.name
