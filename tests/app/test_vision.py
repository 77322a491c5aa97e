"""Looking at videos: each file is probed, decoded and encoded once, and never taken for another one."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from app import vision
from app.chat import VideoChat
from encoder.video.reader import probe
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
