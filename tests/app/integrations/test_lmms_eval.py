"""The lmms-eval plugin behind the harness's interface, which a stand-in plays where it is not installed."""

from __future__ import annotations

import importlib
import sys
import types
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from app.chat import VideoChat
from encoder.errors import ConfigError
from tests import ROOT, tiny_video_models
from tests.app.conftest import SHORT, WORLD

MODULE = "app.integrations.lmms_eval"


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The plugin's module over the base class of lmms-eval 0.7.3, as far as it is used."""

    class Hook:
        def __init__(self) -> None:
            self.noted: list[Any] = []

        def add_partial(self, attribute: str, request: Any, answer: str) -> None:
            self.noted.append((attribute, request, answer))

    class Base:
        is_simple = True

        def __init__(self) -> None:
            self.cache_hook, self.task_dict = Hook(), {}

    modules = {name: types.ModuleType(name) for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model")}
    modules["lmms_eval.api.model"].lmms = Base  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    yield importlib.import_module(MODULE)
    sys.modules.pop(MODULE, None)


@pytest.fixture(scope="module")
def saved(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model.save_pretrained(folder)
    return folder


def request(document: dict[str, Any], **generation: Any) -> Any:
    return SimpleNamespace(args=(document["question"], generation, lambda d: d["visuals"], 0, "task", "test"))


def test_answers_are_those_of_videochat(plugin: Any, saved: Path) -> None:
    model = plugin.FluxChat(model=str(saved), device="cpu", budget=32)
    document = {"question": "What is in the video?", "visuals": [str(WORLD)]}
    model.task_dict = {"task": {"test": [document]}}
    [answer] = model.generate_until([request(document, max_new_tokens=6, temperature=0, do_sample=False)])
    with VideoChat(saved, device="cpu") as chat:
        expected = chat.ask(str(WORLD), document["question"], budget=32, max_new_tokens=6).text
    assert answer == expected
    assert model.cache_hook.noted[0][2] == answer
    assert (model.rank, model.world_size) == (0, 1)


def test_a_stock_video_model_answers(plugin: Any, tmp_path: Path) -> None:
    folder = tiny_video_models.make(tmp_path / "qwen3_vl", "qwen3_vl")
    model = plugin.FluxChat(model=str(folder), device="cpu", select="before", budget=40)
    document = {"question": "What is in the video?", "visuals": [str(WORLD)]}
    model.task_dict = {"task": {"test": [document]}}
    [answer] = model.generate_until([request(document, max_new_tokens=6)])
    with VideoChat(folder, device="cpu", select="before") as chat:
        expected = chat.ask(str(WORLD), document["question"], budget=40, max_new_tokens=6).text
    assert answer == expected.strip() != ""


def test_a_judged_answer_has_no_note(plugin: Any, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A harness scores the model's own words."""
    model = plugin.FluxChat(model=str(saved), budget="16")
    asked: list[dict[str, Any]] = []
    ask = model.chat.ask

    def noted(*args: Any, **options: Any) -> Any:
        asked.append(options)
        return ask(*args, **options)

    monkeypatch.setattr(model.chat, "ask", noted)
    model.task_dict = {"task": {"test": {0: {"question": "What?", "visuals": [str(SHORT)]}}}}
    model.generate_until([request(model.task_dict["task"]["test"][0], max_new_tokens=4)])
    assert [options["hedge"] for options in asked] == [False]


def test_documents_without_pictures_and_with_two_videos(plugin: Any, saved: Path) -> None:
    model = plugin.FluxChat(model=str(saved), device="cpu", budget=16)
    documents = [
        {"question": "Hi?", "visuals": []},
        {"question": "Which one?", "visuals": [str(WORLD), str(SHORT)]},
    ]
    for document in documents:
        model.task_dict = {"task": {"test": [document]}}
        [answer] = model.generate_until([request(document, max_new_tokens=3)])
        assert isinstance(answer, str)


def test_many_pictures_are_one_video(plugin: Any) -> None:
    pictures = [Image.new("RGB", (20, 20)) for _ in range(9)]
    assert [len(video) for video in plugin.as_videos(pictures)] == [9]
    assert len(plugin.as_videos(pictures[:3])) == 3
    assert plugin.as_videos(["a.mp4"]) == ["a.mp4"]


def test_generation_settings(plugin: Any) -> None:
    assert plugin.sampling({"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "num_beams": 1}) == {
        "max_new_tokens": 16
    }
    assert plugin.sampling({"temperature": 0.7, "do_sample": False}) == {"max_new_tokens": 128}
    drawn = plugin.sampling({"temperature": 0.7, "top_p": 0.9})
    assert (drawn["temperature"], drawn["top_p"], drawn["seed"]) == (0.7, 0.9, 0)
    drawn = plugin.sampling({"temperature": 1, "top_k": 40, "min_p": 0.1, "repetition_penalty": 1.1})
    assert (drawn["top_k"], drawn["min_p"], drawn["repetition_penalty"]) == (40, 0.1, 1.1)
    assert plugin.sampling({"temperature": 0, "top_k": 40}) == {"max_new_tokens": 128}


def test_stop_words(plugin: Any) -> None:
    assert plugin.cut("(A) left\nand more", ["\n\n", "\n"]) == "(A) left"
    assert plugin.cut("all of it", "") == "all of it"


@pytest.mark.parametrize("arguments", [{"colour": "red"}, {"batch_size": 4}])
def test_wrong_arguments(plugin: Any, saved: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        plugin.FluxChat(model=str(saved), **arguments)


def test_the_entry_point_is_declared() -> None:
    """What pyproject.toml declares is what the harness looks for."""
    declared = (ROOT / "pyproject.toml").read_text()
    target = f"{MODULE}:manifest"
    assert f'[project.entry-points."lmms_eval.models"]\nfluxchat = "{target}"\n' in declared
    assert all(e.value == target for e in entry_points(group="lmms_eval.models") if e.name == "fluxchat")
