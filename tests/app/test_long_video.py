"""Videos of hours: parts by how much changes, one budget, chapters, a time that is asked about."""

from __future__ import annotations

import json
import os
import threading
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.ask_each import ask_each
from app.chat import VideoChat
from app.cli import main
from app.library.ask_all import LocalAsker
from app.long_video import LONG_S, MOST_PARTS, LongVideo, ask, price
from app.mcp_server import VideoTools
from app.messages import Media
from encoder.errors import ConfigError
from encoder.video.part import Part
from tests.app.conftest import WORLD
from tests.bench.long_video import loop
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
    with pytest.raises(ConfigError, match=r"nothing at 1:23:45: it goes from 0:00 to 13:20"):
        LongVideo(chat, film).ask("What happens at 1:23:45?")
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
    assert ask(chat, film, "What is there?", **options).text == expected
    row = LocalAsker(chat, "What is there?", options).row(str(film))
    assert row is not None
    assert (row.answer, row.error) == (expected, None)
    assert VideoTools(chat, folders=(film.parent,)).ask(film.name, "What is there?", "64")
    assert asked == [2, 2, 2, 2]
    assert LocalAsker(chat, "What is there?", options, part=Part(0, 60)).row(str(film)) is not None
    assert VideoTools(chat, folders=(film.parent,)).ask(film.name, "What?", "64", end="1:00")
    ask(chat, film, "What is there?", start=10, end=60, **options)
    ask(chat, Media(str(film), part=Part(0, 60)), "What is there?", end=700, **options)  # its own part stays
    ask(chat, WORLD, "What is there?", **options)
    assert asked[4:] == [1] * 5


def test_what_is_priced_is_what_is_asked(chat: VideoChat, film: Path) -> None:
    assert price(chat, film, 64) == LongVideo(chat, film).price(64)
    assert price(chat, film, 64, end="1:00") == chat.estimate(film, 64, end="1:00")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
def test_a_pipe_is_read_once(chat: VideoChat, film: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.mp4"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(film.read_bytes(),), daemon=True)
    writer.start()
    answer = ask(chat, pipe, "What is there?", budget=64, max_new_tokens=2)
    writer.join()
    assert len(answer.kept) == 2


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
    assert "broken.mp4" in outcomes[0]["error"]
    assert ask_each(chat, files[1:], "And at 1:23:45?", outcomes.append, **options) == 1
    assert "nothing at 1:23:45" in outcomes[3]["error"]
    assert "answer" in outcomes[4]  # short: a time in the question is not sought
