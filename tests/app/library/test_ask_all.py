"""One question about many videos: exactly one row for each, whatever happens to the files and the process."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from app import cli
from app.ask_each import ask_each
from app.chat import VideoChat
from app.library.answers import AnswerFile, AnswerRow, check_out
from app.library.ask_all import LocalAsker, MapReport, ask_all
from app.library.video_files import find_videos
from app.speech.listener import Listener
from encoder.errors import ConfigError, DataError, FluxChatError, OutOfMemory
from tests import ROOT
from tests.app.library.conftest import film
from tests.app.speech.conftest import ToldModel
from tests.patience import until

QUESTION = "What is it?"
FEW: dict[str, Any] = {"budget": "16", "max_new_tokens": 3}
SEEN = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "count": {"type": "integer", "maximum": 99}},
    "required": ["name", "count"],
    "additionalProperties": False,
}


def mapped(chat: VideoChat, out: Path, *sources: Path, force: bool = False, **options: Any) -> MapReport:
    asker = LocalAsker(chat, options.pop("question", QUESTION), {**FEW, **options})
    with AnswerFile(out, as_values="schema" in options) as answers:
        return ask_all(asker, find_videos(sources), answers, force=force)


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()]


def names(out: Path) -> Counter[str]:
    return Counter(Path(row["file"]).name for row in rows(out))


def test_a_row_per_video_and_only_what_changed_is_asked_again(
    chat: VideoChat, videos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "answers.jsonl"
    assert mapped(chat, out, videos) == MapReport(answered=4)
    first = out.read_bytes()
    assert all(row["answer"] and row["error"] is None for row in rows(out))
    assert mapped(chat, out, videos) == MapReport(unchanged=4)
    assert out.read_bytes() == first
    os.utime(videos / "green.mp4", (1, 1))  # touched only
    film(videos / "red.mp4", ["white", "blue"])
    film(videos / "new.mp4", ["green"])
    before = {row["file"]: row for row in rows(out)}
    assert mapped(chat, out, videos) == MapReport(answered=2, unchanged=3)
    assert names(out) == Counter(["red.mp4", "green.mp4", "blue.mp4", "it's two.mp4", "new.mp4"])
    after = {row["file"]: row for row in rows(out)}
    assert [path for path in before if before[path] != after[path]] == [str(videos / "red.mp4")]
    (videos / "blue.mp4").unlink()  # what was said of it stays
    assert mapped(chat, out, videos).unchanged == 4
    assert names(out)["blue.mp4"] == 1
    assert list(tmp_path.glob(".*")) == []


def test_answers_are_those_of_ask(chat: VideoChat, videos: Path, tmp_path: Path) -> None:
    mapped(chat, tmp_path / "a.jsonl", videos)
    for row in rows(tmp_path / "a.jsonl"):
        assert row["answer"] == chat.ask(row["file"], QUESTION, **FEW).text


def test_what_cannot_be_read_is_a_row_and_is_asked_again(
    chat: VideoChat, videos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "answers.jsonl"
    (videos / "broken.mp4").write_bytes(b"no video")
    (tmp_path / "list.txt").write_text("videos/gone.mp4\n")
    report = mapped(chat, out, videos, tmp_path / "list.txt")
    assert report.answered == 4
    failed = {Path(path).name: why for path, why in report.failed.items()}
    assert sorted(failed) == ["broken.mp4", "gone.mp4"]
    said = {Path(row["file"]).name: row for row in rows(out)}
    assert len(said) == len(rows(out)) == 6
    for name, why in failed.items():
        assert (said[name]["answer"], said[name]["error"]) == (None, why)
        assert "\n" not in why
    film(videos / "broken.mp4", ["white"])
    report = mapped(chat, out, videos, tmp_path / "list.txt")
    assert (report.answered, len(report.failed)) == (1, 1)
    assert len(rows(out)) == 6


def test_with_a_schema_every_answer_is_valid_or_an_error(
    chat: VideoChat, videos: Path, tmp_path: Path
) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    pytest.importorskip("llguidance", reason="the extra json is not installed")
    out = tmp_path / "answers.jsonl"
    for number in range(12):
        film(videos / f"{number}.mp4", ["red", "green", "blue", "white"][: 1 + number % 4])
    assert mapped(chat, out, videos, schema=SEEN, max_new_tokens=60) == MapReport(answered=16)
    for row in rows(out):
        jsonschema.validate(row["answer"], SEEN)
    report = mapped(chat, tmp_path / "cut.jsonl", videos, schema=SEEN)
    assert len(report.failed) == 16
    assert all("cut off" in row["error"] and row["answer"] is None for row in rows(tmp_path / "cut.jsonl"))


def test_parquet_holds_the_same_and_goes_on(chat: VideoChat, videos: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    pytest.importorskip("llguidance", reason="the extra json is not installed")
    (videos / "broken.mp4").touch()
    for options in ({}, {"schema": {"const": ["é", 1]}, "max_new_tokens": 20}):
        lines, table = (tmp_path / f"{len(options)}.{kind}" for kind in ("jsonl", "parquet"))
        mapped(chat, lines, videos, **options)
        mapped(chat, table, videos / "red.mp4", **options)
        report = mapped(chat, table, videos, **options)
        assert (report.unchanged, report.answered, len(report.failed)) == (1, 3, 1)
        found = {row["file"]: row for row in parquet.read_table(table).to_pylist()}
        for row in rows(lines):
            if options and row["answer"] is not None:
                assert json.loads(found[row["file"]].pop("answer")) == row.pop("answer") == ["é", 1]
            assert found[row["file"]] == row
        assert len(found) == 5
        assert mapped(chat, table, videos, **options).unchanged == 4
    assert list(tmp_path.glob(".*")) == []


def test_the_beginning_of_a_row_is_dropped(chat: VideoChat, videos: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    mapped(chat, out, videos)
    whole = out.read_bytes()
    for cut in (len(whole) - 1, whole.rindex(b"\n", 0, -1) + 3, 4):
        out.write_bytes(whole[:cut])
        report = mapped(chat, out, videos)
        assert report.answered == (4 if cut == 4 else 1)
        assert sorted(map(str, rows(out))) == sorted(map(str, map(json.loads, whole.splitlines())))


def test_another_question_is_refused_unless_forced(chat: VideoChat, videos: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    mapped(chat, out, videos)
    before = out.read_bytes()
    for other in ({"question": "Why?"}, {"budget": "32"}, {"max_new_tokens": 4}):
        with pytest.raises(ConfigError, match=r"another question.* add --force"):
            mapped(chat, out, videos, **other)
    assert out.read_bytes() == before
    assert mapped(chat, out, videos, question="Why?", force=True).answered == 4
    assert {row["question"] for row in rows(out)} == {"Why?"}


@pytest.mark.parametrize("text", ["notes of mine\n", '{"file": "a", "answer": 1}\n', "mine", "[" * 100_000])
def test_a_file_of_others_is_never_written(chat: VideoChat, videos: Path, tmp_path: Path, text: str) -> None:
    out = tmp_path / "answers.jsonl"
    out.write_text(text)
    with pytest.raises(DataError, match=r"Line 1 of .* name another"):
        mapped(chat, out, videos)
    assert out.read_text() == text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_new_tokens": 10**6}, "lower max_new_tokens, which is 1000000"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"think": True}, "does not think"),
        ({"system": "word " * 5000}, "too long"),
        ({"budget": "many"}, "budget"),
        ({"speech": True, "language": "tlh"}, "no language 'tlh'"),
    ],
)
def test_options_that_fit_no_video_are_one_sentence_before_any_is_opened(
    chat: VideoChat, options: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "_listener", Listener(model=ToldModel([])))
    with pytest.raises(FluxChatError, match=said):
        LocalAsker(chat, QUESTION, options)
    with pytest.raises(FluxChatError, match=said):
        ask_each(chat, ["gone.mp4"], QUESTION, print, **options)


def test_two_runs_at_once_end_in_a_sentence(chat: VideoChat, videos: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    with AnswerFile(out), pytest.raises(ConfigError, match="Another process is writing"):
        mapped(chat, out, videos)
    assert mapped(chat, out, videos).answered == 4


def test_a_full_disk_keeps_what_was_answered(chat: VideoChat, videos: Path, tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    out = tmp_path / "answers.jsonl"
    mapped(chat, out, videos / "red.mp4")
    asker = LocalAsker(chat, QUESTION, FEW)
    with AnswerFile(out) as answers:
        answers._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115 - closed with the answers
        with pytest.raises(DataError, match=r"no space left.* are kept"):
            ask_all(asker, find_videos([videos]), answers)
    assert names(out) == Counter(["red.mp4"])
    assert mapped(chat, out, videos).answered == 3


def test_who_finds_no_memory_is_asked_again_alone(
    chat: VideoChat, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask, busy = chat.ask, threading.Semaphore(0)

    def short(video: Any, question: str, **options: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            raise OutOfMemory("There was not enough memory.")
        busy.release()
        return ask(video, question, **options)

    monkeypatch.setattr(chat, "ask", short)
    assert mapped(chat, tmp_path / "a.jsonl", videos) == MapReport(answered=4)
    assert busy.acquire(timeout=0)


class Twice:
    """Hands each row over twice, as workers do that die in between."""

    question, asked = QUESTION, "a"

    def rows(self, paths: Any) -> Iterator[AnswerRow]:
        for path in (*paths, *paths):
            yield AnswerRow(path, QUESTION, "yes", None, None, 1, 2, "", "a")


def test_a_row_that_comes_twice_is_one(tmp_path: Path) -> None:
    with AnswerFile(tmp_path / "a.jsonl") as answers:
        ask_all(Twice(), ["a", "b"], answers)
    assert names(tmp_path / "a.jsonl") == Counter("ab")


def test_a_name_that_is_no_unicode(tmp_path: Path) -> None:
    path = os.fsdecode(b"/videos/\xff.mp4")
    other = os.fsdecode(b"/videos/\xfe.mp4")
    for out in (tmp_path / "a.jsonl", tmp_path / "a.parquet"):
        for _ in range(2):  # its row is known again
            with AnswerFile(out) as answers:
                ask_all(Twice(), [path, other], answers)
        with AnswerFile(out) as answers:
            assert sorted(row.file for row in answers.rows()) == sorted([path, other])


def test_a_run_that_is_refused_leaves_nothing_beside_its_output(tmp_path: Path) -> None:
    """Rows that lay beside it would be taken for its own once it is moved away or written anew."""
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    out = tmp_path / "a.parquet"
    with AnswerFile(out) as answers:
        ask_all(Twice(), ["a"], answers)
    another = Twice()
    another.asked = "b"
    with pytest.raises(ConfigError, match="another question"), AnswerFile(out) as answers:
        ask_all(another, ["a"], answers)
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]
    table = parquet.read_table(out)
    for name, wrong in (("size", ["x"]), ("file", [None]), ("answer", [7])):
        column = table.schema.get_field_index(name)
        other = table.set_column(column, name, arrow.array(wrong))
        parquet.write_table(other.replace_schema_metadata({"fluxchat.answers": "values"}), out)
        with pytest.raises(DataError, match="name another output"), AnswerFile(out):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]


def test_outputs_are_checked_first(tmp_path: Path) -> None:
    for wrong in (tmp_path / "a.csv", tmp_path / "none" / "a.jsonl"):
        with pytest.raises(ConfigError):
            check_out(wrong)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_pipes_are_waited_for_by_nobody(chat: VideoChat, tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.mp4"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(ConfigError, match="name a file"):
        check_out(tmp_path / "a.jsonl")
    (tmp_path / "list.txt").write_bytes(b"a.mp4\nb\0.mp4\n")
    report = mapped(chat, tmp_path / "b.jsonl", tmp_path / "list.txt")
    assert report.answered == 0
    assert sorted(why.split("': ")[1] for why in report.failed.values()) == [
        "it is no regular file; check the path.",
        "its path has a nul character; check the path.",
    ]


def test_the_command(
    chat: VideoChat,
    videos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cli, "open_chat", lambda args, **_: nullcontext(chat))
    out = tmp_path / "answers.jsonl"
    few = ["--budget", "16", "--max-new-tokens", "3"]
    assert cli.main(["map", QUESTION, str(videos), "--out", str(out), *few]) == 0
    assert capsys.readouterr().out == f"{out}: 4 answered, 0 were there.\n"
    (videos / "broken.mp4").touch()
    assert cli.main(["map", QUESTION, str(videos), "--out", str(out), "--json", *few]) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["unchanged"], list(report["failed"])) == (4, [str(videos / "broken.mp4")])
    wrong = {
        "Answers go into": ["--out", str(tmp_path / "a.csv")],
        "Cannot read the schema": ["--out", str(out), "--schema", "none.json"],
        "videos at once": ["--out", str(out), "--at-once", "0"],
        "another question": ["--out", str(out), "--budget", "32"],
        "A budget is": ["--out", str(out), "--budget", "many"],
    }
    for said, options in wrong.items():
        assert cli.main(["map", QUESTION, str(videos), *options]) == 2
        err = capsys.readouterr().err
        assert said in err
        assert err.count("\n") == 1


MAP = """
import json, sys, time
from pathlib import Path
from app.chat import VideoChat
from app.library.answers import AnswerFile
from app.library.ask_all import LocalAsker, ask_all
from app.library.video_files import find_videos
from tests.llm_bridge.tiny_vlm import tiny_vlm
llm, folder, out, schema, most = sys.argv[1:]
class Stops(AnswerFile):
    added = 0
    def add(self, row):
        while self.added >= int(most):  # until it is killed
            time.sleep(1)
        super().add(row)
        self.added += 1
with Stops(Path(out), as_values=True) as answers, VideoChat(tiny_vlm(Path(llm))) as chat:
    options = {"budget": 16, "max_new_tokens": 60, "schema": json.loads(schema)}
    ask_all(LocalAsker(chat, "What is it?", options), find_videos([folder]), answers)
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_killed_at_random_moments_it_goes_on_to_200_valid_lines(
    tmp_path: Path, llm_folder: Any, kind: str
) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    pytest.importorskip("llguidance", reason="the extra json is not installed")
    random.seed(0)
    folder, out = tmp_path / "videos", tmp_path / f"answers.{kind}"
    kept = out if kind == "jsonl" else tmp_path / f".{out.name}.rows.jsonl"
    for number in range(200):
        film(folder / f"{number:03}.mp4", random.choices(["red", "green", "blue", "white"], k=1 + number % 3))
    command = [sys.executable, "-c", MAP, str(llm_folder("qwen2")), str(folder), str(out), json.dumps(SEEN)]
    grew = [0]

    def lines() -> int:
        return kept.read_bytes().count(b"\n") if kept.exists() else 0

    for _ in range(5):  # of 200 rows
        process = subprocess.Popen([*command, str(random.randint(3, 35))], cwd=ROOT)
        until(lambda process=process: process.poll() is not None or lines() > grew[-1])  # type: ignore[misc]
        time.sleep(random.uniform(0.0, 0.5))
        assert process.poll() is None, "it ended before it was killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
        grew.append(lines())
    assert grew == sorted(grew)
    assert 0 < grew[-1] < 200  # it was killed at work
    subprocess.run([*command, "200"], cwd=ROOT, check=True)
    with AnswerFile(out) as answers:
        found = list(answers.rows())
    assert Counter(row.file for row in found) == Counter(find_videos([folder]))
    for row in found:
        assert row.error is None
        jsonschema.validate(row.answer, SEEN)
