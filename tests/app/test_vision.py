"""Looking at videos: each file is probed, decoded and encoded once, and never taken for another one."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from app import vision
from app.chat import VideoChat
from encoder.errors import ConfigError, ModelError
from encoder.video.reader import probe
from llm_bridge.chat_model import load_chat_model
from llm_bridge.model import VideoLanguageModel
from tests.app.conftest import SHORT, WORLD


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Sources that were probed, in order."""
    calls: list[Any] = []

    def counted(source: Any, **options: Any) -> Any:
        calls.append(source)
        return probe(source, **options)

    monkeypatch.setattr(vision, "probe", counted)
    return calls


@pytest.mark.parametrize("age_s", [0, 60])
def test_a_file_is_probed_once(
    chat: VideoChat, tmp_path: Path, probes: list[Any], monkeypatch: pytest.MonkeyPatch, age_s: float
) -> None:
    path = tmp_path / "v.mp4"
    path.write_bytes(SHORT.read_bytes())
    now = time.time() + age_s
    monkeypatch.setattr("encoder.video.digest.time.time", lambda: now)
    infos = [chat.probe(path) for _ in range(3)]
    assert infos[0] == infos[1] == infos[2]
    assert probes == [path]


def test_a_file_written_again_within_the_clock_s_step_is_another(
    chat: VideoChat, tmp_path: Path, probes: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "v.mp4"
    path.write_bytes(SHORT.read_bytes())
    monkeypatch.setattr("app.vision.file_state", lambda _: None)  # too young for the system to tell
    first = chat.probe(path)
    path.write_bytes(WORLD.read_bytes())
    assert chat.probe(path).digest != first.digest
    assert len(probes) == 2


def test_an_encoded_video_is_one_object_with_all_of_it(chat: VideoChat) -> None:
    encoded = chat.look(SHORT, 48)
    assert encoded.embedding.shape == (48, chat.model.llm.hidden_size)
    assert encoded.visual.tokens == 48
    assert encoded.visual.times_s == encoded.kept.times_s
    assert len(encoded.kept.indices) == 48
    assert encoded.decode_s > 0
    assert encoded.encode_s > 0
    again = chat.look(SHORT, 48)
    assert again.embedding is encoded.embedding
    assert (again.decode_s, again.encode_s) == (0, 0)


def test_a_scope_sees_nothing_of_another(chat: VideoChat) -> None:
    chat.look(SHORT, 48, scope="a")
    assert chat.look(SHORT, 48, scope="b").encode_s > 0
    chat.forget("a")
    assert chat.look(SHORT, 48, scope="b").encode_s == 0
    assert chat.look(SHORT, 48, scope="a").encode_s > 0


def test_an_encoder_on_another_device_has_a_thread_of_its_own(
    tiny_model: VideoLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []
    monkeypatch.setattr("app.vision._same_place", lambda _: False)
    with VideoChat(tiny_model, encode_batch=2) as chat:
        look = chat._vision._tower.look

        def noted(*args: Any) -> Any:
            threads.append(threading.current_thread().name)
            return look(*args)

        monkeypatch.setattr(chat._vision._tower, "look", noted)
        assert chat.ask(SHORT, "What?", budget=20, max_new_tokens=2).usage.kept_tokens == 20
        assert threads == ["fluxchat-encode"]
        own = chat._vision._own_thread
    assert own is not None
    with pytest.raises(ModelError, match="was closed"):
        own.run(int)


def test_an_encoder_goes_to_its_own_device(tiny_model: VideoLanguageModel, tmp_path: Path) -> None:
    tiny_model.save_pretrained(tmp_path)
    moved = load_chat_model(tmp_path, device="cpu", dtype=torch.bfloat16, encoder_device="meta")
    assert moved.tower.device.type == "meta"
    assert moved.tower.dtype == torch.bfloat16  # as everywhere but on CPUs
    assert moved.llm.device.type == "cpu"


def test_a_stock_model_s_encoder_stays_with_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="leave encoder_device out"):
        load_chat_model("HuggingFaceTB/SmolVLM2-256M-Video-Instruct", encoder_device="cpu")
