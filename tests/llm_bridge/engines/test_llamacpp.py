"""llama.cpp as an engine: the same answers as the local engine on the same weights. `make llamacpp`."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from app.chat import VideoChat
from encoder.errors import ConfigError, ModelError, OutOfMemory
from llm_bridge.compute_worker import ComputeWorker
from llm_bridge.engines import Engine, Request
from llm_bridge.engines.gguf_model import GgufModel
from llm_bridge.engines.llama_context import LlamaContext
from llm_bridge.generation import Generation
from llm_bridge.kv_cache import kv_from_layers
from llm_bridge.llm import LanguageModel, load_llm
from llm_bridge.model import VideoLanguageModel
from llm_bridge.model_files.gguf_export import write_gguf
from llm_bridge.prompt import PLACEHOLDER, Message, Prompt, Visual, render
from llm_bridge.sampling import SamplingParams

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: make llamacpp")
from llm_bridge.engines.llamacpp import LlamaCppEngine

NEAR = 0.05  # distance of the reference's two best scores, within which either may be chosen
LAYOUTS = ("qwen2", "qwen3", "plain")
ROWS = 40


@pytest.fixture(scope="module")
def gguf(
    tiny_llm: Callable[[str], LanguageModel], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """A tiny model's file by layout and type of weights."""
    folder = tmp_path_factory.mktemp("gguf")

    def file(layout: str, kind: str = "F16") -> Path:
        path = folder / f"{layout}-{kind}.gguf"
        return path if path.exists() else write_gguf(tiny_llm(layout), path, kind)

    return file


@pytest.fixture(scope="module")
def native(gguf: Callable[..., Path]) -> Callable[..., GgufModel]:
    """The same loaded into llama.cpp."""
    loaded: dict[tuple[str, str], GgufModel] = {}

    def load(layout: str, kind: str = "F16") -> GgufModel:
        if (layout, kind) not in loaded:
            llm = load_llm(gguf(layout, kind), device="cpu", engine="llamacpp")
            assert isinstance(llm, GgufModel)
            loaded[layout, kind] = llm
        return loaded[layout, kind]

    return load


@pytest.fixture
def engine(native: Callable[..., GgufModel]) -> Iterator[LlamaCppEngine]:
    llm = native("qwen2")
    made = LlamaCppEngine(llm, ComputeWorker(llm))
    yield made
    made.close()
    made.worker.close()


def asked(llm: LanguageModel, number: int = 0, question: str = "What is it?") -> tuple[Prompt, torch.Tensor]:
    """A question about a video of random embeddings, by the video's number."""
    random = torch.Generator().manual_seed(number)
    embedding = torch.randn(ROWS, llm.hidden_size, generator=random)
    return render(llm.tokenizer, [Message.of("user", Visual(ROWS, f"clip {number}"), question)]), embedding


def request(
    engine: LlamaCppEngine, number: int = 0, question: str = "What is it?", **options: Any
) -> Request:
    stop, scope = options.pop("stop", threading.Event()), options.pop("scope", "")
    prompt, embedding = asked(engine.llm, number, question)
    sampling = SamplingParams(**{"max_new_tokens": 24, **options})
    return Request(prompt, [embedding], sampling, stop=stop, scope=scope)


def embedded(llm: LanguageModel, prompt: Prompt, rows: torch.Tensor) -> torch.Tensor:
    """All input embeddings (L, D) of a prompt with one visual."""
    ids = torch.tensor(prompt.ids)
    found = llm.embed(ids.clamp_min(0)).clone()
    found[ids == PLACEHOLDER] = rows.to(found)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["F16", "F32"])
def test_greedy_choices_are_the_local_engines(
    tiny_llm: Callable[[str], LanguageModel], native: Callable[..., GgufModel], layout: str, kind: str
) -> None:
    """100 prompts with visual tokens, each forced on the tokens that transformers chooses."""
    local = tiny_llm(layout)
    if kind == "F16":
        local = replace(local, model=deepcopy(local.model).half().float())
    llm = native(layout, kind)
    context = LlamaContext(llm.weights, cells=512)
    engine = LlamaCppEngine(llm, ComputeWorker(llm), context=context)
    same, gaps = 0, list[float]()
    for number in range(100):
        prompt, rows = asked(local, number, f"What are {number} birds?")
        assert prompt.ids == asked(llm, number, f"What are {number} birds?")[0].ids
        kv = kv_from_layers(local.model.config)
        with torch.inference_mode():
            expected = local.advance(kv, inputs_embeds=embedded(local, prompt, rows)[None])[0]
        answer = engine.start(Request(prompt, [rows]))
        context.rewind(0, 0)
        found = engine._append(answer, 0, 0, len(prompt))
        for place in range(len(prompt), len(prompt) + 8):
            if int(found.argmax()) == int(expected.argmax()):
                same += 1
            else:
                best = expected.topk(2).values
                gaps.append(float(best[0] - best[1]))
            token = int(expected.argmax())
            with torch.inference_mode():
                expected = local.step(kv, token)
            found = context.step([token], [place], [0])[0]
    engine.close()
    assert all(gap <= NEAR for gap in gaps)
    assert same / (same + len(gaps)) >= 0.99


def test_a_follow_up_does_not_compute_the_video_again(engine: LlamaCppEngine) -> None:
    first = engine.start(request(engine))
    ids = list(first)
    assert (first.cached_tokens, len(ids) > 0, first.prefill_s > 0) == (0, True, True)
    again = engine.start(request(engine))
    assert list(again) == ids
    assert again.cached_tokens >= ROWS
    other = engine.start(request(engine, question="How many?"))
    answer = list(other)
    assert other.cached_tokens >= ROWS
    engine.forget()
    fresh = engine.start(request(engine, question="How many?"))
    assert (list(fresh), fresh.cached_tokens) == (answer, 0)
    assert (engine.kept.hits, engine.kept.misses, engine.kept.entries) == (2, 2, 1)


def test_the_next_turn_goes_on_from_the_turn_before(engine: LlamaCppEngine) -> None:
    llm = engine.llm
    question = "What is in the video, and where does it go in the end?"
    prompt, rows = asked(llm, 0, question)
    said = "".join(Generation(llm, prompt, [rows], SamplingParams(max_new_tokens=12), engine=engine))
    turns = [
        Message.of("user", Visual(ROWS, "clip 0"), question),
        Message.of("assistant", said),
        Message.of("user", "Why?"),
    ]
    after = render(llm.tokenizer, turns)
    second = engine.start(Request(after, [rows], SamplingParams(max_new_tokens=12)))
    ids = list(second)
    assert second.cached_tokens >= len(prompt) - 8
    engine.forget()
    assert list(engine.start(Request(after, [rows], SamplingParams(max_new_tokens=12)))) == ids


def test_nothing_kept_for_one_scope_serves_another(engine: LlamaCppEngine) -> None:
    list(engine.start(request(engine, scope="ann")))
    other = engine.start(request(engine, scope="bob"))
    list(other)
    assert other.cached_tokens == 0
    engine.forget("bob")
    again = engine.start(request(engine, scope="ann"))
    list(again)
    assert again.cached_tokens > 0


def test_eight_at_once_are_each_as_alone(engine: LlamaCppEngine) -> None:
    alone = [list(engine.start(request(engine, number))) for number in range(8)]
    engine.forget()
    steps, made, _ = engine.decoding
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda number: list(engine.start(request(engine, number))), range(8)))
    assert together == alone
    now = engine.decoding
    assert now[0] - steps < now[1] - made  # passes were shared
    assert now[2] == 0


def test_two_questions_at_once_share_the_video(engine: LlamaCppEngine) -> None:
    expected = [list(engine.start(request(engine, question=q))) for q in ("What?", "How many birds?")]
    answers = [iter(engine.start(request(engine, question=q))) for q in ("What?", "How many birds?")]
    found = [[next(answer)] for answer in answers]
    for ids, answer in zip(found, answers, strict=True):
        ids += answer
    assert found == expected


def test_drawn_answers_can_be_repeated(engine: LlamaCppEngine) -> None:
    drawn = {seed: list(engine.start(request(engine, temperature=1.5, seed=seed))) for seed in (1, 2)}
    assert drawn[1] != drawn[2]
    assert list(engine.start(request(engine, temperature=1.5, seed=1))) == drawn[1]


def test_a_stop_ends_computing_within_one_token(
    engine: LlamaCppEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, step = [], engine.context.step

    def counted(*args: Any) -> torch.Tensor:
        calls.append(1)
        return step(*args)

    monkeypatch.setattr(engine.context, "step", counted)
    stop = threading.Event()
    answer = engine.start(request(engine, max_new_tokens=200, stop=stop))
    tokens = iter(answer)
    next(tokens), next(tokens)
    before = len(calls)
    stop.set()
    assert len(list(tokens)) <= 1
    assert len(calls) - before <= 1
    assert answer.finish == "cancelled"
    assert list(engine.start(request(engine, stop=stop))) == []
    assert engine.decoding[2] == 0


def test_an_abandoned_answer_leaves(engine: LlamaCppEngine) -> None:
    tokens = iter(engine.start(request(engine, max_new_tokens=200)))
    next(tokens)
    assert engine.decoding[2] == 1
    tokens.close()  # type: ignore[attr-defined]
    assert list(engine.start(request(engine)))
    assert engine.decoding[2] == 0


def small(engine: LlamaCppEngine, cells: int) -> LlamaCppEngine:
    """The engine with a memory of so many positions."""
    context = LlamaContext(engine.llm.weights, cells=cells, sequences=8)
    return LlamaCppEngine(engine.llm, engine.worker, context=context)


def test_kept_prompts_give_way_to_new_ones(engine: LlamaCppEngine) -> None:
    expected = [list(engine.start(request(engine, number))) for number in range(8)]
    engine = small(engine, 256)
    assert [list(engine.start(request(engine, number))) for number in range(8)] == expected
    assert engine.kept.bytes <= 256 * engine.llm.kv_bytes_per_token


def test_the_newest_answer_gives_way_when_memory_is_short(engine: LlamaCppEngine) -> None:
    options = {"max_new_tokens": 120, "min_tokens": 120}
    expected = list(engine.start(request(engine, 1, **options)))
    engine = small(engine, 256)
    first = iter(engine.start(request(engine, 1, **options)))
    found = [next(first)]
    second = iter(engine.start(request(engine, 2, **options)))
    next(second)
    found += first
    assert found == expected
    with pytest.raises(OutOfMemory, match="ask again later"):
        list(second)
    third = iter(engine.start(request(engine, 1, **options)))
    assert list(third) == expected


def test_scores_that_cannot_be_drawn_from_end_one_answer(engine: LlamaCppEngine) -> None:
    everything = tuple(range(engine.llm.weights.vocabulary))
    with pytest.raises(ConfigError, match="leave no token"):
        list(engine.start(request(engine, min_tokens=2, stop_token_ids=everything)))
    assert list(engine.start(request(engine)))


def test_a_closed_engine_says_so(engine: LlamaCppEngine) -> None:
    running = iter(engine.start(request(engine, max_new_tokens=200)))
    next(running)
    engine.close()
    for answer in (running, engine.start(request(engine))):
        with pytest.raises(ModelError, match="closed"):
            list(answer)
    engine.forget()


def test_an_engine_makes_text(engine: LlamaCppEngine) -> None:
    """Through Generation, with an engine of its own too, and the local engine's text on the same file."""
    names: Engine = engine
    assert names.name == "llamacpp"
    prompt, rows = asked(engine.llm)
    generation = Generation(engine.llm, prompt, [rows], SamplingParams(max_new_tokens=24), engine=engine)
    text = "".join(generation)
    assert generation.stats.completion_tokens > 0
    assert text == "".join(Generation(engine.llm, prompt, [rows], generation.sampling))
    local = load_llm(engine.llm.name, device="cpu", dtype=torch.float32)
    assert text == "".join(Generation(local, prompt, [rows], generation.sampling))


def test_quantised_files_are_smaller_and_run(
    gguf: Callable[..., Path], native: Callable[..., GgufModel]
) -> None:
    assert gguf("plain", "Q8_0").stat().st_size < gguf("plain", "F16").stat().st_size
    llm = native("plain", "Q8_0")
    assert llm.stored_as == "Q8_0"
    prompt, rows = asked(llm)
    assert "".join(Generation(llm, prompt, [rows], SamplingParams(max_new_tokens=8, min_tokens=8)))


def test_a_chat_asks_a_file_about_pictures(
    gguf: Callable[..., Path], model: VideoLanguageModel, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    pixels = torch.randint(
        0, 256, (4, 56, 56, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    frames = [Image.fromarray(frame.numpy()) for frame in pixels]
    with VideoChat(tmp_path, llm=str(gguf("qwen2")), device="cpu") as chat:
        info = chat.info()
        assert (info["engine"], info["llm"].rpartition(" ")[2]) == ("llamacpp", "F16")
        first = chat.ask(frames, "What is it?", budget=16, max_new_tokens=8, min_tokens=8)
        again = chat.ask(frames, "What is it?", budget=16, max_new_tokens=8, min_tokens=8)
        assert (first.text, first.usage.cached_tokens) == (again.text, 0)
        assert again.usage.cached_tokens > 0
        assert chat.caches["prefixes"].hits == 1
        assert chat.decoding[2] == 0
        chat.forget()
        assert chat.caches["prefixes"].entries == 0
        assert chat.estimate(frames, 16).prefill_s > 0
    chat.forget()


def damaged(data: bytes, how: str) -> bytes:
    if how == "cut":
        return data[: len(data) // 2]
    if how == "short":
        return data[:-100]
    if how == "no file":
        return b"GGUF" + bytes(100)
    if how == "other width":
        return data.replace(
            b"llama.feed_forward_length\x04\0\0\0\x80", b"llama.feed_forward_length\x04\0\0\0\x70"
        )
    return data.replace(b"blk.1.attn_q.weight", b"blk.9.attn_q.weight")


@pytest.mark.parametrize("how", ["cut", "short", "no file", "other width", "tensor missing"])
def test_a_broken_file_is_refused_in_a_sentence(gguf: Callable[..., Path], tmp_path: Path, how: str) -> None:
    sound = gguf("plain", "F16").read_bytes()
    assert damaged(sound, how) != sound
    (tmp_path / "broken.gguf").write_bytes(damaged(sound, how))
    with pytest.raises(ModelError) as raised:
        load_llm(tmp_path / "broken.gguf", engine="llamacpp")
    text = str(raised.value)
    assert text.startswith("Cannot load the language model")
    assert "\n" not in text
    assert text.endswith(".")


def test_prompts_with_positions_or_layers_of_their_own_are_refused(engine: LlamaCppEngine) -> None:
    prompt, rows = asked(engine.llm)
    with pytest.raises(ConfigError, match="use the engine local"):
        engine.start(Request(prompt, [torch.cat((rows, rows), dim=1)]))
    moved = render(engine.llm.tokenizer, [Message.of("user", Visual(ROWS, "clip"), "What?")], axes=3)
    with pytest.raises(ConfigError, match="use the engine local"):
        engine.start(Request(moved, [rows]))


def test_the_default_engine_of_a_file_is_llamacpp(gguf: Callable[..., Path]) -> None:
    assert isinstance(load_llm(gguf("qwen2"), engine=None), GgufModel)
    assert not isinstance(load_llm(gguf("qwen2"), device="cpu", engine="local"), GgufModel)
    assert not isinstance(load_llm(gguf("qwen2"), device="cpu", quantize="int8", engine=None), GgufModel)
