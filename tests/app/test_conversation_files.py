"""Conversations as files: what is saved goes on as if nothing had happened; what is exported can be read."""

from __future__ import annotations

import base64
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from app.chat import VideoChat
from app.conversation import Conversation
from app.conversation_files import Frame, Record, Shown, export, load, to_markdown
from app.messages import Media
from encoder.budget import Budget
from encoder.errors import ConfigError, VideoError
from encoder.video.part import Part
from llm_bridge.prompt import Message
from tests.app.conftest import SHORT, WORLD

FEW: dict[str, Any] = {"budget": 32, "max_new_tokens": 4}


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return Path(shutil.copy(SHORT, tmp_path / "my clip.mp4"))


def test_a_saved_conversation_goes_on_where_it_was(chat: VideoChat, clip: Path, tmp_path: Path) -> None:
    talk = chat.conversation(clip, system="Be brief.", **FEW)
    talk.ask("What is it?")
    talk.ask("And there?", start=1, end=2, region=(0, 0, 0.5, 1))
    talk.add(WORLD)
    talk.save(tmp_path / "talk.json")
    again = Conversation.load(chat, tmp_path / "talk.json")
    assert again.turns == talk.turns
    assert again.options == talk.options
    assert [str(video) for video in again.videos] == [str(video) for video in talk.videos]
    one, other = talk.ask("Which one is it?"), again.ask("Which one is it?")
    assert other.text == one.text
    assert other.kept == one.kept
    one, other = talk.ask("And there?", start=1, end=2), again.ask("And there?", start=1, end=2)
    assert len(other.kept) == len(one.kept)
    assert load(chat, tmp_path / "talk.json", budget=16).options["budget"] == 16


def test_every_option_comes_back(chat: VideoChat, clip: Path, tmp_path: Path) -> None:
    options = {"budget": Budget.auto(1.5), "stop_token_ids": (1, 2), "logit_bias": {3: 1.5}, "seed": 7}
    talk = chat.conversation(clip, scope="mine", **options)
    talk.save(tmp_path / "talk.json")
    assert load(chat, tmp_path / "talk.json").options == options  # whose it was is not for a file


def test_a_video_that_is_gone_moved_or_changed(chat: VideoChat, clip: Path, tmp_path: Path) -> None:
    chat.conversation(clip, **FEW).save(tmp_path / "talk.json")
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    shutil.move(clip, moved / clip.name)
    with pytest.raises(VideoError, match=r"'my clip.mp4' of this conversation is gone: put it back at"):
        load(chat, tmp_path / "talk.json")
    shutil.copy(tmp_path / "talk.json", moved)
    assert load(chat, moved / "talk.json").videos == [str(moved / clip.name)]
    shutil.copy(WORLD, clip)
    with pytest.raises(VideoError, match="has changed since it was saved"):
        load(chat, tmp_path / "talk.json")


def test_what_is_no_file_cannot_be_saved(chat: VideoChat, tmp_path: Path) -> None:
    talk = chat.conversation(Image.new("RGB", (32, 32)))
    with pytest.raises(ConfigError, match="it is not a file"):
        talk.save(tmp_path / "talk.json")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="Cannot write"):
        chat.conversation().save(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda values: values.update(format="other"), "not a saved conversation"),
        (lambda values: values.update(version=2), "version 2"),
        (lambda values: values["options"].update(trust=True), "option 'trust'"),
        (lambda values: values["options"].update(budget={"budget": {"tokens": -1}}), "not a conversation"),
        (lambda values: values["messages"].reverse(), "not a conversation"),
        (lambda values: values["messages"].pop(), "not a conversation"),
        (lambda values: values["messages"][0]["content"].append({"medium": 9}), "not a conversation"),
        (lambda values: values["messages"][0]["content"].append({"medium": True}), "not a conversation"),
        (lambda values: values["messages"][0]["content"].append({"text": 3}), "not a conversation"),
        (lambda values: values["media"][0].update(path=3), "not a conversation"),
        (lambda values: values["media"][0]["part"].update(start=-1), "not a conversation"),
        (lambda values: values.pop("media"), "not a conversation"),
        (lambda values: values.update(new=[-1]), "not a conversation"),
    ],
)
def test_a_file_that_is_none_of_ours(
    chat: VideoChat, clip: Path, tmp_path: Path, change: Any, words: str
) -> None:
    talk = chat.conversation(clip, **FEW)
    talk.ask("What is it?")
    path = tmp_path / "talk.json"
    talk.save(path)
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=words) as caught:
        load(chat, path)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_json(chat: VideoChat, tmp_path: Path) -> None:
    for content in (b"", b"[]", b"{", b"\x80", b"[" * 100_000, SHORT.read_bytes()[:999]):
        (tmp_path / "a.json").write_bytes(content)
        with pytest.raises(ConfigError, match=r"Cannot read 'a.json'"):
            load(chat, tmp_path / "a.json")
    with pytest.raises(ConfigError, match="check the path"):
        load(chat, tmp_path / "none.json")


def test_an_export_as_json_holds_the_frames_with_their_times(
    chat: VideoChat, clip: Path, tmp_path: Path
) -> None:
    talk = chat.conversation(clip, **FEW)
    answer = talk.ask("What is it?", start=1, end=3)
    talk.export(tmp_path / "talk.json")
    values = json.loads((tmp_path / "talk.json").read_text())
    medium, question = values["messages"][0]["content"]
    assert question == {"text": "What is it?"}
    assert values["messages"][1]["content"] == [{"text": answer.text}]
    assert [frame["time_s"] for frame in medium["frames"]] == list(answer.kept[0].times_s)
    assert medium["part"]["start_s"] == 1
    picture = Image.open(io.BytesIO(base64.b64decode(medium["frames"][0]["jpeg"])))
    assert picture.format == "JPEG"
    assert picture.width > 100


def test_an_export_as_markdown_shows_the_frames_beside_it(
    chat: VideoChat, clip: Path, tmp_path: Path
) -> None:
    talk = chat.conversation(clip, **FEW)
    answer = talk.ask("What is <b>it</b>?", start=1, end=3, region=(0, 0, 0.5, 1))
    talk.export(tmp_path / "my talk.md")
    text = (tmp_path / "my talk.md").read_text()
    assert "What is &lt;b&gt;it&lt;/b&gt;?" in text
    assert "from 0:01 to 0:03, the box 0, 0, 0.5, 1" in text
    frames = sorted((tmp_path / "my talk_frames").iterdir())
    assert len(frames) == len(answer.kept[0].times_s)
    for frame in frames:
        assert f"](my%20talk_frames/{frame.name})" in text
        assert Image.open(frame).format == "JPEG"
    with pytest.raises(ConfigError, match=r"a .md or a .json file"):
        talk.export(tmp_path / "talk.pdf")


@given(st.text(), st.text())
def test_no_text_becomes_markup(question: str, name: str) -> None:
    record = Record("m", (Message("user", (Shown(name, frames=(Frame(0.5, b"x"),)), question)),))
    text = to_markdown(record)
    assert "<" not in text
    assert text.count("](data:image/jpeg;base64,") == 1
    assert not any(line.startswith("#") for line in text.splitlines()[1:])


def test_a_record_of_another_keeper_is_exported_too(tmp_path: Path) -> None:
    shown = Shown("a.mp4", 9.0, Part.of(1, 2), (Frame(1.5, b"jpeg"),))
    export(
        Record("m", (Message("user", (shown, "What?")), Message.of("assistant", "A dog."))), tmp_path / "a.md"
    )
    assert "A dog." in (tmp_path / "a.md").read_text()
    assert (tmp_path / "a_frames" / "0000.jpg").read_bytes() == b"jpeg"
    assert Media("a").part.whole
