"""VideoChat as programs use it: answers, caches, streams, conversations, threads, prices, errors."""

import io
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from app.chat import VideoChat, Videos
from app.estimate import Calibration
from encoder import compiling
from encoder.budget import Budget
from encoder.cost import Speed
from encoder.errors import BudgetError, ConfigError, FluxChatError, ModelError, OutOfMemory, VideoError
from encoder.video.reader import read_clip
from llm_bridge.model import VideoLanguageModel
from tests.app.conftest import SHORT, WORLD


def text_of(chat: VideoChat, *args, **options) -> str:
    return chat.ask(*args, max_new_tokens=16, **options).text


def test_an_answer_says_what_it_took(chat: VideoChat) -> None:
    answer = chat.ask(WORLD, "What is shown?", budget=48, max_new_tokens=8)
    assert answer.usage.kept_tokens == answer.usage.visual_tokens == 48
    assert answer.usage.seen_tokens > 48
    assert answer.usage.prompt_tokens > 48
    assert answer.usage.cached_tokens == 0
    assert 1 <= answer.usage.completion_tokens <= 8
    kept = answer.kept[0]
    assert len(kept.indices) == 48
    assert list(kept.indices) == sorted(set(kept.indices))
    assert max(kept.indices) < kept.grid.size
    assert len(kept.times_s) == kept.grid.frames
    assert kept.duration_s == pytest.approx(30.03, abs=0.05)
    timings = answer.timings
    assert 0 < timings.decode_s + timings.encode_s < timings.first_token_s <= timings.total_s
    assert answer.to_dict()["usage"]["kept_tokens"] == 48
    assert str(answer) == answer.text


def test_the_answer_comes_from_the_video(chat: VideoChat) -> None:
    assert text_of(chat, WORLD, "What is shown?") != text_of(chat, VIDEO_OF_NOISE, "What is shown?")
    assert text_of(chat, WORLD, "What is shown?") == text_of(chat, WORLD, "What is shown?")


VIDEO_OF_NOISE = torch.randint(
    0, 255, (12, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
)


def test_follow_ups_neither_decode_nor_encode_nor_prefill_again(chat: VideoChat) -> None:
    chat.ask(WORLD, "What is shown?", max_new_tokens=4)
    seen = []
    handle = chat.model.encoder.register_forward_hook(lambda *_: seen.append(1))
    try:
        second = chat.ask(WORLD, "And why?", max_new_tokens=4)
    finally:
        handle.remove()
    assert not seen
    assert second.timings.decode_s == second.timings.encode_s == 0
    assert second.usage.cached_tokens >= second.usage.visual_tokens


def test_cached_answers_equal_fresh_ones(tiny_model: VideoLanguageModel) -> None:
    questions = ["What is shown?", "Where does it go?", "How many are there?"]
    with VideoChat(tiny_model) as kept:
        cached = [text_of(kept, WORLD, q, history=[("Hi", "Hello.")]) for q in questions]
        assert kept.caches["prefixes"].hits >= 2
    for question, expected in zip(questions, cached, strict=True):
        with VideoChat(tiny_model) as fresh:
            assert text_of(fresh, WORLD, question, history=[("Hi", "Hello.")]) == expected


def test_another_budget_or_selector_is_another_look(chat: VideoChat) -> None:
    first = chat.ask(WORLD, "What?", budget=32, max_new_tokens=2)
    other = chat.ask(WORLD, "What?", budget=33, max_new_tokens=2)
    random = chat.ask(WORLD, "What?", budget=33, selector="random", max_new_tokens=2)
    assert (first.usage.kept_tokens, other.usage.kept_tokens) == (32, 33)
    assert other.kept[0].indices != random.kept[0].indices
    assert other.timings.encode_s > 0
    assert random.timings.encode_s > 0


def test_same_name_other_content_is_another_video(chat: VideoChat, tmp_path: Path) -> None:
    path = tmp_path / "v.mp4"
    path.write_bytes(WORLD.read_bytes())
    first = text_of(chat, path, "What is shown?")
    path.write_bytes(SHORT.read_bytes())
    answer = chat.ask(path, "What is shown?", max_new_tokens=16)
    assert answer.timings.decode_s > 0
    assert answer.kept[0].duration_s < 10
    assert text_of(chat, WORLD, "What is shown?") == first


def test_every_kind_of_source(chat: VideoChat, tmp_path: Path) -> None:
    image = Image.new("RGB", (80, 60), "red")
    image.save(tmp_path / "red.png")
    clip = read_clip(SHORT, 8)
    for source in (
        str(SHORT),
        SHORT.read_bytes(),
        io.BytesIO(SHORT.read_bytes()),
        image,
        [image, image],
        tmp_path / "red.png",
        clip,
    ):
        answer = chat.ask(source, "What?", max_new_tokens=2)
        assert answer.usage.kept_tokens > 0
    assert chat.ask(tmp_path / "red.png", "What?", max_new_tokens=2).kept[0].times_s == ()
    assert chat.ask(None, "Who are you?", max_new_tokens=2).usage.visual_tokens == 0


def test_several_videos_in_one_question(chat: VideoChat) -> None:
    answer = chat.ask(
        Videos([SHORT, WORLD, Image.new("RGB", (64, 64))]), "Which?", budget=20, max_new_tokens=2
    )
    assert [len(kept.indices) for kept in answer.kept] == [20, 20, 20]
    assert answer.usage.visual_tokens == 60


SEEN = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "count": {"type": "integer", "maximum": 99}},
    "required": ["name", "count"],
    "additionalProperties": False,
}


def test_an_answer_that_follows_a_schema(chat: VideoChat) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    pytest.importorskip("llguidance", reason="the extra json is not installed")
    answer = chat.ask(SHORT, "What?", budget=32, schema=SEEN)
    jsonschema.validate(answer.json(), SEEN)
    assert answer.finish == "stop"
    cut = chat.ask(SHORT, "What?", budget=32, schema=SEEN, max_new_tokens=3)
    assert cut.finish == "length"
    with pytest.raises(ModelError, match="cut off before its JSON was complete"):
        cut.json()
    with pytest.raises(ConfigError, match="cannot be enforced"):
        chat.stream(SHORT, "What?", schema={"not": {}})  # at once
    with pytest.raises(ModelError, match="not JSON"):
        replace(answer, text="a dog").json()
    with pytest.raises(ModelError, match="stopped before"):
        replace(answer, finish="cancelled").json()


def test_conversation_remembers(chat: VideoChat) -> None:
    talk = chat.conversation(SHORT, budget=32, max_new_tokens=8)
    first = talk.ask("What is it?")
    second = talk.ask("Why?")
    assert [question for question, _ in talk.turns] == ["What is it?", "Why?"]
    assert second.usage.prompt_tokens > first.usage.prompt_tokens
    assert second.usage.cached_tokens >= first.usage.prompt_tokens
    direct = chat.ask(SHORT, "Why?", budget=32, max_new_tokens=8, history=[("What is it?", first.text)])
    assert direct.text == second.text
    talk.add(WORLD)
    assert talk.ask("And this one?").usage.visual_tokens == 64


def test_stream_gives_the_same_text_and_stops(chat: VideoChat) -> None:
    whole = chat.ask(SHORT, "What?", max_new_tokens=40)
    stream = chat.stream(SHORT, "What?", max_new_tokens=40)
    with pytest.raises(FluxChatError, match="iterate"):
        _ = stream.answer
    assert "".join(stream).strip() == whole.text == stream.answer.text
    stopped = chat.stream(SHORT, "What?", max_new_tokens=400)
    pieces = []
    for piece in stopped:
        pieces.append(piece)
        stopped.stop()
    assert stopped.answer.finish == "cancelled"
    assert stopped.answer.usage.completion_tokens <= 3
    assert stopped.answer.text == "".join(pieces).strip()


def test_a_stream_left_early_frees_its_place(chat: VideoChat) -> None:
    pieces = iter(chat.stream(SHORT, "What?", max_new_tokens=400))
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert chat.ask(SHORT, "What?", max_new_tokens=4).usage.cached_tokens > 0


def test_threads_get_the_answers_they_get_alone(tiny_model: VideoLanguageModel) -> None:
    jobs = [(video, question) for question in ("What?", "Why?") for video in (SHORT, WORLD)]
    alone = []
    for video, question in jobs:
        with VideoChat(tiny_model) as chat:
            alone.append(text_of(chat, video, question))
    with VideoChat(tiny_model) as chat, ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda job: text_of(chat, *job), jobs * 2)) == alone * 2


def test_stopping_from_another_thread(chat: VideoChat) -> None:
    stream = chat.stream(SHORT, "What?", max_new_tokens=800)
    timer = threading.Timer(0.3, stream.stop)
    timer.start()
    list(stream)
    timer.join()
    assert stream.answer.finish in ("cancelled", "stop")


def test_the_price_grows_with_the_budget(chat: VideoChat, measured_speeds: Path) -> None:
    prices = [chat.estimate(WORLD, budget) for budget in (16, 128, "full")]
    assert [p.kept_tokens for p in prices[:2]] == [16, 128]
    for name in ("encoder_gmacs", "llm_gmacs", "share_of_full", "first_token_s", "peak_mib"):
        values = [getattr(price, name) for price in prices]
        assert values == sorted(values), name
    assert prices[-1].share_of_full == pytest.approx(1)
    assert "tokens kept" in str(prices[0])
    assert len(list((measured_speeds / "calibration").iterdir())) == 1
    fast = chat.plan(WORLD, Budget.auto(1e-6))
    slow = chat.plan(WORLD, "auto:1000")
    assert fast.keep < slow.keep


@pytest.mark.parametrize("measured_on_a_machine_so_many_times_slower", [8.0, 1 / 8])
def test_a_calibration_that_no_longer_holds_is_replaced(
    tiny_model: VideoLanguageModel,
    measured_speeds: Path,
    monkeypatch: pytest.MonkeyPatch,
    measured_on_a_machine_so_many_times_slower: float,
) -> None:
    monkeypatch.setattr("app.estimate.prefill_ms", lambda _, tokens: 5.0 + 0.1 * tokens)  # whatever else runs
    monkeypatch.setattr("llm_bridge.towers.flux.calibrate_encoder", lambda *_: Speed((1.0, 1.0, 1.0, 1.0)))
    monkeypatch.setattr("app.estimate.measure_decode", lambda: Speed((1.0, 1.0, 1.0)))
    now = Calibration.load_or_measure(tiny_model).prefill.milliseconds([1.0, 64.0, 64.0**2])
    [path] = (measured_speeds / "calibration").iterdir()
    values = json.loads(path.read_text())
    values["prefill"]["weights"] = [measured_on_a_machine_so_many_times_slower * now, 0.0, 0.0]
    path.write_text(json.dumps(values))
    again = Calibration.load_or_measure(tiny_model)
    assert again.prefill.weights != tuple(values["prefill"]["weights"])
    assert json.loads(path.read_text())["prefill"]["weights"] == list(again.prefill.weights)
    assert Calibration.load_or_measure(tiny_model) == again  # which holds


@pytest.mark.parametrize(
    ("video", "question", "options", "kind"),
    [
        ("nowhere.mp4", "What?", {}, VideoError),
        (SHORT, "  ", {}, ConfigError),
        (SHORT, 5, {}, ConfigError),
        (SHORT, "What?", {"budget": "lots"}, BudgetError),
        (SHORT, "What?", {"budget": 5000, "max_new_tokens": 900}, BudgetError),
        (SHORT, "What?", {"selector": "best", "budget": 9}, BudgetError),
        (SHORT, "What?", {"temperature": -2}, ConfigError),
        (object(), "What?", {}, VideoError),
    ],
)
def test_wrong_input_is_one_sentence(chat: VideoChat, video, question, options, kind) -> None:
    with pytest.raises(kind) as caught:
        chat.ask(video, question, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": 1}, "model must be a path or a name, not a int"),
        ({"llm": ""}, "llm is empty"),
        ({"encoder": 1}, "encoder must be a path"),
        ({"plan": 1}, "plan must be a path"),
        ({"speech_model": 1}, "speech_model must be a path"),
        ({"dtype": "flo"}, "no dtype 'flo'"),
        ({"dtype": "nn"}, "no dtype 'nn'"),
        ({"dtype": 1}, "no dtype 1"),
        ({"cache_mib": "x"}, "cache_mib must be a whole number from 0 up"),
        ({"batch": 0}, "batch must be a whole number from 1 up, not 0"),
        ({"limits": 1}, "limits must be Limits"),
    ],
)
def test_wrong_arguments_are_one_sentence_before_anything_is_loaded(
    options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        VideoChat(**options)


def test_closed_and_missing_models(tiny_model: VideoLanguageModel, tmp_path: Path) -> None:
    chat = VideoChat(tiny_model)
    chat.close()
    with pytest.raises(ModelError, match="closed"):
        chat.ask(SHORT, "What?")
    with pytest.raises(ModelError, match="not a FluxChat model"):
        VideoChat(tmp_path)
    with pytest.raises(ConfigError, match="no device abacus"):
        VideoChat(tmp_path, device="abacus")
    with pytest.raises(ConfigError, match="no device meta"):
        VideoChat(tmp_path, encoder_device="meta")


def test_an_encoder_is_compiled_where_that_is_asked_for(
    tiny_model: VideoLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    monkeypatch.setattr(compiling, "compile_encoder", asked.append)
    VideoChat(tiny_model).close()
    assert not asked
    VideoChat(tiny_model, compiled=True).close()
    assert asked == [tiny_model.encoder]
    monkeypatch.undo()
    monkeypatch.setattr(compiling, "lacking_compiler", lambda device: "nothing compiles here")
    with pytest.raises(ConfigError, match=r"nothing compiles here: install it, or leave compile out\.$"):
        VideoChat(tiny_model, compiled=True)


def test_memory_of_the_caches_is_bounded(tiny_model: VideoLanguageModel) -> None:
    with VideoChat(tiny_model, cache_mib=1) as chat:
        for index in range(12):
            frames = torch.full((8, 32, 32, 3), index * 20, dtype=torch.uint8)
            chat.ask(frames, "What?", budget=64, max_new_tokens=1)
            assert chat.caches["videos"].bytes <= 2**19
            assert chat.caches["prefixes"].bytes <= 2**19


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee the documentation"),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes.\nat alloc"
        ),
    ],
)
def test_too_little_memory_is_one_sentence(
    tiny_model: VideoLanguageModel, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    with VideoChat(tiny_model) as chat:
        talk = chat.conversation(SHORT, budget=16, max_new_tokens=4)
        handle = chat.model.llm.model.register_forward_pre_hook(fails)
        try:
            for ask in (lambda: chat.ask(SHORT, "What?", budget=16), lambda: talk.ask("What?")):
                with pytest.raises(OutOfMemory, match="not enough memory") as caught:
                    ask()
                assert "\n" not in str(caught.value)
        finally:
            handle.remove()
        assert talk.ask("What?").text is not None


def test_other_failures_are_not_called_memory(tiny_model: VideoLanguageModel) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("shapes differ")

    handle = tiny_model.llm.model.register_forward_pre_hook(fails)  # a model that other tests use, too
    try:
        with VideoChat(tiny_model) as chat, pytest.raises(RuntimeError, match="shapes differ"):
            chat.ask(None, "What?")
    finally:
        handle.remove()
