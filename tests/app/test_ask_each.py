"""One question about each of many files: a line per file, whatever becomes of the others."""

from __future__ import annotations

import io
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from app import cli
from app.ask_each import ask_each, terminal
from app.chat import VideoChat
from encoder.video.part import Part
from tests.app.conftest import SHORT, WORLD

FEW: dict[str, Any] = {"budget": "32", "max_new_tokens": 3}


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def command(chat: VideoChat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command on the tiny model; (status, standard output, standard error)."""
    monkeypatch.setattr(cli, "open_chat", lambda args: chat)

    def run(*args: object) -> tuple[int, str, str]:
        status = cli.main([*map(str, args), "--budget", "32", "--max-new-tokens", "3"])
        out = capsys.readouterr()
        return status, out.out, out.err

    return run


def test_a_line_per_file_and_a_status_that_tells(command: Any, tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    files = [SHORT, tmp_path / "empty.mp4", WORLD, "gone.mp4"]
    status, out, err = command("ask", *files, "What is it?", "--each", "--json")
    assert status == 1
    assert err == ""
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["file"] for row in rows] == list(map(str, files))
    assert all(row["question"] == "What is it?" for row in rows)
    assert "empty" in rows[1]["error"]
    assert "no such file" in rows[3]["error"]
    for row in (rows[0], rows[2]):
        assert row["price"]["kept_tokens"] == row["actual"]["kept_tokens"] == 32
        assert row["price"]["first_token_s"] > 0
        assert row["actual"]["total_s"] > 0
        assert isinstance(row["answer"], str)


def test_all_well_is_status_0_and_words_without_json(command: Any) -> None:
    status, out, _ = command("ask", SHORT, WORLD, "What is it?", "--each")
    assert status == 0
    assert [line.split(": ")[0] for line in out.splitlines() if ".mp4: " in line] == [str(SHORT), str(WORLD)]


def test_without_each_several_videos_are_one_question(command: Any) -> None:
    status, out, _ = command("ask", SHORT, WORLD, "Which one?", "--json")
    assert status == 0
    assert len(json.loads(out)["kept"]) == 2


def test_a_question_from_standard_input(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("What is it?\n"))
    _, out, _ = command("ask", SHORT, "-", "--each", "--json")
    assert json.loads(out)["question"] == "What is it?"
    monkeypatch.setattr("sys.stdin", io.StringIO(" \n"))
    status, _, err = command("ask", SHORT, "-")
    assert (status, "question is empty" in err) == (2, True)
    status, _, err = command("ask", "-", "-")
    assert (status, "one thing" in err) == (2, True)
    status, _, err = command("ask", "-", "What?", "--each")
    assert (status, "--each needs files" in err) == (2, True)


def test_parts_of_each(command: Any) -> None:
    status, out, _ = command("ask", SHORT, WORLD, "What?", "--each", "--json", "--start", "0:10", "--end", 12)
    rows = [json.loads(line) for line in out.splitlines()]
    assert status == 1
    assert "beyond the video's end" in rows[0]["error"]
    assert "answer" in rows[1]


def test_a_bar_on_a_terminal_leaves_no_trace(chat: VideoChat) -> None:
    screen = Screen()
    outcomes: list[dict[str, Any]] = []
    failed = ask_each(
        chat, [str(SHORT), "gone.mp4"], "What?", outcomes.append, part=Part.of(0, 1), progress=screen, **FEW
    )
    assert (failed, len(outcomes)) == (1, 2)
    assert "1 of 2" in screen.getvalue()
    assert screen.getvalue().endswith("\r")
    assert terminal(screen) is screen
    assert terminal(io.StringIO()) is None


def test_with_a_schema_the_answer_is_its_value_or_an_error(
    chat: VideoChat, command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("llguidance", reason="the extra json is not installed")
    monkeypatch.setattr(cli, "open_chat", lambda args: nullcontext(chat))
    schema = tmp_path / "schema.json"
    schema.write_text('{"enum": [[true, false]]}')
    status, out, _ = command("ask", SHORT, "What?", "--each", "--json", "--schema", schema)
    assert (status, "cut off" in json.loads(out)["error"]) == (1, True)  # three tokens
    status, _, err = command("ask", SHORT, "What?", "--json", "--schema", schema)
    assert (status, "cut off" in err) == (2, True)
    schema.write_text('{"const": 7}')
    _, out, _ = command("ask", SHORT, "What?", "--each", "--json", "--schema", schema)
    assert json.loads(out)["answer"] == 7
    assert command("ask", SHORT, "What?", "--schema", schema)[1] == "7\n"
    for wrong, said in (("[1]", "Cannot read the schema"), ('{"not": {}}', "cannot be enforced")):
        schema.write_text(wrong)
        status, _, err = command("ask", SHORT, "What?", "--schema", schema)
        assert (status, said in err, err.count("\n")) == (2, True, 1)
