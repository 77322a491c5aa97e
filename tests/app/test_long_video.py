"""Videos of hours: parts by how much changes, one budget, chapters, a time that is asked about."""

from __future__ import annotations

import json
import os
import threading
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from app.answer import Answer
from app.ask_each import ask_each
from app.chat import VideoChat
from app.cli import main
from app.library.ask_all import LocalAsker
from app.long_video import LONG_S, MOST_PARTS, LongVideo, price
from app.mcp_server import VideoTools
from app.messages import Media, Videos
from encoder.errors import ConfigError, VideoError
from encoder.video.part import Part
from encoder.video.reader import read_clip
from llm_bridge.prompt import Message
from tests.app.conftest import WORLD
from tests.app.server.serving import ask, data_url, question, running
from tests.bench.long_video import loop, per_hour
from training.synthetic.export import write_video

COLOURS = [(220, 30, 30), (30, 220, 30), (30, 30, 220), (220, 220, 30)]


def picture(colour: tuple[int, int, int]) -> np.ndarray:
    return np.full((32, 32, 3), colour, np.uint8)


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """800 s, a frame a second: 500 s of red, 200 s of green, then a colour each ten seconds."""
    path = tmp_path_factory.mktemp("long") / "film.mp4"
    shots = [COLOURS[0]] * 500 + [COLOURS[1]] * 200 + [COLOURS[second // 10 % 4] for second in range(100)]
    write_video(path, np.stack([picture(colour) for colour in shots]), 1)
    return path


def test_parts_are_short_where_much_changes(chat: VideoChat, film: Path) -> None:
    video = LongVideo(chat, film)
    assert video.is_long
    parts = [medium.part for medium in video.parts(8)]
    assert (parts[0].start_s, parts[-1].end_s) == (0.0, 800.0)
    assert all(one.end_s == two.start_s for one, two in pairwise(parts))
    lengths = [part.end_s - part.start_s for part in parts if part.end_s is not None]
    assert min(lengths) > 0
    assert (
        sum(part.start_s >= 650 for part in parts) >= 4
    )  # an eighth of the time, at least half of the parts
    assert lengths[0] > 3 * lengths[-1]


def test_a_video_in_which_nothing_changes_has_equal_parts(chat: VideoChat, tmp_path: Path) -> None:
    path = tmp_path / "still.mp4"
    write_video(path, np.stack([picture((90, 90, 90))] * 700), 1)
    edges = [medium.part.start_s for medium in LongVideo(chat, path).parts(4)]
    assert edges == pytest.approx([0, 175, 350, 525], abs=15)


def test_one_budget_is_shared_and_priced_before(chat: VideoChat, film: Path) -> None:
    video = LongVideo(chat, film)
    price = video.price(128)
    answer = video.ask("What is there?", 128, max_new_tokens=4)
    assert (price.parts, len(answer.kept)) == (4, 4)
    assert answer.usage.kept_tokens == price.kept_tokens <= 128
    assert sum(kept.grid.frames for kept in answer.kept) == price.frames
    assert 0 < price.survey_s < price.first_token_s
    times = [time_s for kept in answer.kept for time_s in kept.times_s]
    assert times == sorted(times)
    assert (times[0] < 200, times[-1] > 700) == (True, True)
    assert video.price(10_000).parts <= MOST_PARTS
    assert len(video.ask("What is there?", 1, max_new_tokens=1).kept) == 1


@pytest.mark.parametrize(
    ("question", "low", "high"),
    [
        ("What happens at 12:00?", 705, 735),
        ("What happens at 0:05?", 0, 20),
        ("And between 0:10 and 1:30?", 10, 90),
        ("What is there at 0:12:00.5, please", 705.5, 735.5),
    ],
)
def test_a_time_in_the_question_is_looked_at_alone(
    chat: VideoChat, film: Path, question: str, low: float, high: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(VideoChat, "frames_at", None)  # there is no survey
    answer = LongVideo(chat, film).ask(question, 64, max_new_tokens=2)
    [kept] = answer.kept
    assert low <= min(kept.times_s) < max(kept.times_s) <= high


def test_a_time_that_is_not_there_is_a_sentence(chat: VideoChat, film: Path) -> None:
    said = "There is nothing at 1:23:45 in the video, which goes from 0:00 to 13:20: "
    answer = LongVideo(chat, film).ask("What happens at 1:23:45?", 64, max_new_tokens=2)
    assert answer.note == said + "the answer is about all of it."
    assert answer.text.startswith(answer.note + "\n\n")
    assert times_of(answer) == times_of(LongVideo(chat, film).ask("What happens?", 64, max_new_tokens=2))
    plain = LongVideo(chat, film).ask("What happens at 1:23:45?", 64, max_new_tokens=2, hedge=False)
    assert [plain.note, answer.text.endswith(plain.text)] == ["", True]
    part = LongVideo(chat, Media(str(film), part=Part(0, 700)))
    sum_of_two = part.ask("Add up 12:30 and 13:45.", 64, max_new_tokens=2)
    assert "nothing at 12:30 in the video, which goes from 0:00 to 11:40" in sum_of_two.note
    short = chat.ask(WORLD, "What happens at 12:30?", parts=True, budget=64, max_new_tokens=2)
    assert short.note.startswith("There is nothing at 12:30 in the video, which goes from 0:00 to 0:")
    again = Message.of("assistant", "It turns."), Message.of("user", "And at 0:02?")
    asked = Message.of("user", Media(str(WORLD)), "At 12:30?")
    pieces = list(chat.stream_messages([asked, *again], parts=True, budget=64, max_new_tokens=2))
    assert "nothing at" not in "".join(pieces)
    assert LongVideo(chat, film)._named("Is its aspect 16:9 or 4:3?") is None


def test_chapters_begin_where_the_picture_changes(chat: VideoChat, tmp_path: Path) -> None:
    path = tmp_path / "three.mp4"
    shots = [COLOURS[0]] * 250 + [COLOURS[2]] * 150 + [COLOURS[1]] * 300
    write_video(path, np.stack([picture(colour) for colour in shots]), 1)
    chapters = list(LongVideo(chat, path).chapters(3, 16, max_new_tokens=4))
    assert [chapter.start_s for chapter in chapters] == pytest.approx([0, 250, 400], abs=2)
    assert [chapter.end_s for chapter in chapters] == pytest.approx([250, 400, 700], abs=2)
    assert all(chapter.text for chapter in chapters)
    assert str(chapters[0]).startswith("0:00-4:")
    with pytest.raises(ConfigError, match="ask for 1 to 100"):
        list(LongVideo(chat, path).chapters(0))


def test_a_part_of_a_long_video_is_asked_about_in_parts_too(chat: VideoChat, film: Path) -> None:
    video = LongVideo(chat, Media(str(film), part=Part(50, 700, (0, 0, 0.5, 1))))
    parts = [medium.part for medium in video.parts(2)]
    assert (parts[0].start_s, parts[-1].end_s, parts[0].region) == (50, 700, (0, 0, 0.5, 1))
    assert not LongVideo(chat, Media(str(film), part=Part(0, LONG_S - 1))).is_long
    assert not LongVideo(chat, WORLD).is_long


def test_memory_does_not_grow_with_length(chat: VideoChat, film: Path, tmp_path: Path) -> None:
    minute = tmp_path / "minute.mp4"
    write_video(minute, np.stack([picture(COLOURS[second // 15]) for second in range(60)]), 1)
    held: list[int] = []
    glance = chat.frames_at

    def watched(*arguments: Any) -> Any:
        frames = glance(*arguments)
        held.append(frames.nbytes)
        return frames

    chat.frames_at = watched  # type: ignore[method-assign]
    most = []
    for minutes in (20, 600):
        path = tmp_path / f"{minutes}.mp4"
        loop(minute, path, minutes)
        video = LongVideo(chat, path)
        assert video.info.duration_s == pytest.approx(60 * minutes, abs=2)
        held.clear()
        answer = video.ask("What is there?", 128, max_new_tokens=2)
        most.append((max(held), len(held), sum(kept.grid.size for kept in answer.kept)))
    assert most[0] == most[1]


def test_the_command_asks_in_parts_and_lists_chapters(
    chat: VideoChat, film: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("app.cli.open_chat", lambda args: nullcontext(chat))
    assert main(["ask", str(film), "What is there?", "--budget", "64", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["kept"]) == 2
    assert main(["ask", str(film), "What is there?", "--end", "1:00", "--budget", "64", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["kept"]) == 1
    assert main(["ask", str(film), str(WORLD), "What is there?", "--each", "--budget", "64", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["price"].get("parts") for row in rows] == [2, None]
    assert main(["estimate", str(film), "--budget", "64", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parts"] == 2
    assert main(["chapters", str(film), "--count", "2", "--budget", "16", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["start_s"] for row in rows] == pytest.approx([0, rows[0]["end_s"]])
    assert rows[-1]["end_s"] == 800


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collects of each answer how many videos, or parts of one, it looked at."""
    counts: list[int] = []
    answering = VideoChat.ask

    def counting(self: VideoChat, *arguments: Any, **options: Any) -> Any:
        answer = answering(self, *arguments, **options)
        counts.append(len(answer.kept))
        return answer

    monkeypatch.setattr(VideoChat, "ask", counting)
    return counts


def test_every_caller_asks_in_parts(chat: VideoChat, film: Path, asked: list[int]) -> None:
    options: dict[str, Any] = {"budget": 64, "max_new_tokens": 4}
    expected = LongVideo(chat, film).ask("What is there?", **options).text
    assert chat.ask(film, "What is there?", parts=True, **options).text == expected
    row = LocalAsker(chat, "What is there?", options).row(str(film))
    assert row is not None
    assert (row.answer, row.error) == (expected, None)
    assert VideoTools(chat, folders=(film.parent,)).ask(film.name, "What is there?", "64")
    assert asked == [2, 2, 2, 2]
    assert LocalAsker(chat, "What is there?", options, part=Part(0, 60)).row(str(film)) is not None
    assert VideoTools(chat, folders=(film.parent,)).ask(film.name, "What?", "64", end="1:00")
    chat.ask(film, "What is there?", parts=True, start=10, end=60, **options)
    minute = Media(str(film), part=Part(0, 60))
    chat.ask(minute, "What is there?", parts=True, end=700, **options)  # its own part stays
    chat.ask(WORLD, "What is there?", parts=True, **options)
    chat.ask(film, "What is there?", **options)
    assert asked[4:] == [1] * 6


def test_what_is_priced_is_what_is_asked(chat: VideoChat, film: Path) -> None:
    assert price(chat, film, 64) == LongVideo(chat, film).price(64)
    assert price(chat, film, 64, end="1:00") == chat.estimate(film, 64, end="1:00")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
@pytest.mark.parametrize("parts", [2, 1])
def test_a_pipe_is_read_once(chat: VideoChat, film: Path, tmp_path: Path, parts: int) -> None:
    pipe = tmp_path / "pipe.mp4"
    os.mkfifo(pipe)
    content = (film if parts == 2 else WORLD).read_bytes()
    writer = threading.Thread(target=pipe.write_bytes, args=(content,), daemon=True)
    writer.start()
    answer = chat.ask(pipe, "What is there?", parts=True, budget=64, max_new_tokens=2)
    writer.join()
    assert len(answer.kept) == parts


def times_of(answer: Answer) -> list[list[int]]:
    """First and last second of each thing that was looked at."""
    return [[int(kept.times_s[0]), int(kept.times_s[-1])] for kept in answer.kept]


def test_a_follow_up_question_computes_its_own_words_only(
    chat: VideoChat, film: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = chat.conversation(film, parts=True, budget=64, max_new_tokens=4)
    first = talk.ask("What is there?")
    monkeypatch.setattr(VideoChat, "frames_at", None)  # the survey is kept
    second = talk.ask("And then?")
    assert times_of(second) == times_of(first)
    assert second.usage.cached_tokens >= first.usage.prompt_tokens
    third = talk.ask("What is it at 12:00?")
    assert times_of(third)[:2] == times_of(first)
    assert [times_of(third)[2][0] >= 705, times_of(third)[2][1] <= 735] == [True, True]
    assert third.usage.cached_tokens >= second.usage.prompt_tokens
    fourth = talk.ask("What is it at 1:23:45?")
    assert fourth.note.startswith("There is nothing at 1:23:45")
    fifth = talk.ask("And then?")
    assert [times_of(fifth), fifth.note] == [times_of(fourth), ""]
    assert fifth.usage.cached_tokens >= fourth.usage.prompt_tokens


def test_after_a_question_about_a_time_all_of_it_is_shown(chat: VideoChat, film: Path) -> None:
    talk = chat.conversation(film, parts=True, budget=64, max_new_tokens=4)
    first = talk.ask("What is it at 0:30?")
    assert len(first.kept) == 1
    second = talk.ask("And what happens in all?")
    assert times_of(second)[0] == times_of(first)[0]
    assert len(second.kept) == 3
    assert second.usage.cached_tokens >= first.usage.prompt_tokens
    talk.add(WORLD)
    third = talk.ask("Which one has a globe, at 0:01?")
    assert times_of(third)[:3] == times_of(second)
    assert len(third.kept) == 4
    history = [("It was 23:59.", "Yes.")]  # a time that is nowhere in it
    assert len(chat.ask(film, "What?", history=history, parts=True, budget=64, max_new_tokens=2).kept) == 2


def test_several_videos_and_clips_in_memory_are_looked_at_as_one_each(chat: VideoChat, film: Path) -> None:
    options: dict[str, Any] = {"parts": True, "budget": 64, "max_new_tokens": 2}
    assert len(chat.ask(Videos(film, film), "Which one?", **options).kept) == 2
    clip = read_clip(film, 4)
    assert clip.info.duration_s >= LONG_S
    assert len(chat.ask(clip, "What is it at 0:30?", **options).kept) == 1


def test_what_a_survey_found_is_kept_for_its_scope(chat: VideoChat, film: Path) -> None:
    options: dict[str, Any] = {"parts": True, "budget": 64, "max_new_tokens": 1}
    chat.ask(film, "What?", scope="one", **options)
    chat.ask(film, "What?", scope="two", **options)
    assert chat.surveys.stats.entries == 2
    chat.forget("one")
    assert chat.surveys.stats.entries == 1


def test_the_api_looks_at_a_long_video_in_parts(
    chat: VideoChat, film: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[tuple[float, float]] = []
    encode = chat._vision.encode

    def watched(video: Any, *rest: Any, **options: Any) -> Any:
        looked.append(video.part.range_s(video.info))
        return encode(video, *rest, **options)

    monkeypatch.setattr(chat._vision, "encode", watched)
    few = {"token_budget": 64, "max_tokens": 4}
    with running(chat) as (address, _), httpx.Client(base_url=address) as client:
        body = question("What is there?", data_url(film), **few)
        first = client.post("/v1/chat/completions", json=body).json()
        parts = looked[:]
        assert [len(parts), parts[0][0], parts[-1][1]] == [2, 0, 800]
        assert first["usage"]["kept_tokens"] == 64
        body["messages"] += [
            {"role": "assistant", "content": first["choices"][0]["message"]["content"]},
            {"role": "user", "content": "And then?"},
        ]
        second = client.post("/v1/chat/completions", json=body).json()
        assert looked == parts * 2
        cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert cached >= first["usage"]["prompt_tokens"]
        looked.clear()
        assert ask(address, "What is there?", data_url(film), parts=False, **few).status_code == 200
        assert looked == [(0, 800)]
        looked.clear()
        assert ask(address, "What is it at 12:00?", data_url(film), **few).status_code == 200
        assert looked == [(705, 735)]
        absent = ask(address, "What is it at 1:23:45?", data_url(film), **few)
        assert [absent.status_code, "nothing at 1:23:45" in absent.text] == [200, True]
        assert ask(address, "What?", data_url(film), parts="no", **few).json()["error"]["param"] == "parts"


def test_errors_and_progress_name_the_video_not_its_parts(chat: VideoChat, film: Path) -> None:
    told: list[tuple[str, int, int]] = []
    chat.ask(film, "What?", parts=True, budget=64, max_new_tokens=1, progress=lambda *what: told.append(what))
    gone = Message.of("user", Media("gone.mp4"), "What?"), Message.of("assistant", "Nothing.")
    with pytest.raises(VideoError, match=r"video 1 of 2 \('gone.mp4'\)"):
        list(chat.stream_messages([*gone, Message.of("user", Media(str(film)), "And here?")], parts=True))
    assert told == [("decode", 0, 1), ("encode", 0, 1)] * 2 + [("prefill", 0, 1)]


def test_a_long_video_that_fails_is_a_line_and_ends_nothing(
    chat: VideoChat, film: Path, tmp_path: Path
) -> None:
    content = bytearray(film.read_bytes())
    start = content.index(b"mdat")
    end = start - 4 + int.from_bytes(content[start - 4 : start], "big")
    begin = start + (end - start) // 4
    content[begin:end] = bytes(end - begin)  # only the first pictures are there
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(content)
    assert LongVideo(chat, broken).is_long
    outcomes: list[dict[str, Any]] = []
    files = [str(broken), str(film), str(WORLD)]
    options: dict[str, Any] = {"budget": 64, "max_new_tokens": 2}
    assert ask_each(chat, files, "What is there?", outcomes.append, **options) == 1
    assert [outcome["file"] for outcome in outcomes] == files
    assert ["error" in outcome for outcome in outcomes] == [True, False, False]
    assert outcomes[0]["error"].startswith("Cannot read 'broken.mp4'")
    assert ask_each(chat, files[1:], "And at 1:23:45?", outcomes.append, **options) == 0
    assert "nothing at 1:23:45" in outcomes[3]["answer"]
    assert "nothing at 1:23:45" in outcomes[4]["answer"]  # of a short one too


def test_the_benchmark_says_seconds_per_hour() -> None:
    ten = {"parts": {"first_token_s": 2.0}, "decode": {"decode_s": 1.0}}
    assert per_hour({10: ten}) == {"parts": 12.0, "decode": 6.0}
    figures = per_hour({130: {"parts": {"first_token_s": 6.5}}, 10: ten})
    assert figures == {"parts": 3.0, "decode": 6.0, "parts_each_hour_more": 2.25}
