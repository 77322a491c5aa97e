"""`fluxchat chat`: a command that fails changes nothing, and says why in one line."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from app.chat import VideoChat
from app.cli import main
from app.long_video import price
from app.messages import Media
from app.terminal import Terminal, converse
from encoder.errors import BudgetError, ConfigError, VideoError
from encoder.video.part import Part
from llm_bridge.generation import Generation
from tests.app.conftest import SHORT, WORLD
from tests.patience import PATIENCE_S, until
from training.synthetic.export import write_video

OPTIONS = {"budget": "16", "max_new_tokens": 4}


def test_a_command_that_fails_changes_nothing(chat: VideoChat, tmp_path: Path) -> None:
    terminal = Terminal(chat, str(SHORT), OPTIONS)
    terminal.ask("What is it?")
    (tmp_path / "empty.mp4").touch()
    for name, value, error, words in (
        ("video", "nowhere.mp4", VideoError, "'nowhere.mp4': there is no such file"),
        ("video", str(tmp_path), VideoError, "directory"),
        ("video", str(tmp_path / "empty.mp4"), VideoError, "empty"),
        ("video", "https://example.com/a.mp4", VideoError, "download"),
        ("video", "", ConfigError, "/video PATH"),
        ("add", "nowhere.mp4", VideoError, "no such file"),
        ("add", "", ConfigError, "/add PATH"),
        ("budget", "", BudgetError, "A budget is"),
        ("budget", "many", BudgetError, "A budget is"),
        ("budget", "0", BudgetError, "at least 1"),
    ):
        before = terminal.conversation, terminal.medium, dict(terminal.options), terminal.conversation.turns
        with pytest.raises(error, match=words):
            terminal.command(name, value)
        now = terminal.conversation, terminal.medium, dict(terminal.options), terminal.conversation.turns
        assert now == before, (name, value)
    with pytest.raises(ConfigError):
        terminal.ask("half \ud83d")
    terminal.ask("And why?")
    assert len(terminal.conversation.turns) == 2


def test_commands(chat: VideoChat, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    terminal = Terminal(chat, None, OPTIONS)
    terminal.introduce()
    with pytest.raises(ConfigError, match="no video yet"):
        terminal.command("estimate", "")
    quoted = tmp_path / "my clip.mp4"
    quoted.write_bytes(SHORT.read_bytes())
    terminal.command("video", f'"{quoted}"')
    terminal.ask("What is it?")
    terminal.command("add", str(WORLD))
    terminal.ask("And this?")
    assert len(terminal.conversation.videos) == 2
    terminal.command("budget", "32")
    terminal.command("new", "")
    assert terminal.conversation.turns == []
    terminal.ask("What is it?")
    terminal.command("help", "")
    with pytest.raises(ConfigError, match=r"no command /dance.*/help"):
        terminal.command("dance", "")
    printed = capsys.readouterr().out
    for words in ("16 of", "32 of", "It comes with the next question", "A new conversation", "/add PATH"):
        assert words in printed


def test_a_whole_session(
    chat: VideoChat, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    odd = os.path.join(tmp_path, "caf\udce9.mp4")
    with open(odd, "wb") as file:
        file.write(SHORT.read_bytes())
    lines = ["What?", "", "/video nowhere.mp4", "What \udcff?", f"/video {odd}", "Why?", "/quit", "never"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    assert converse(chat, str(WORLD), OPTIONS) == 0
    printed = capsys.readouterr().out.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    assert printed.count("\n! ") == 2
    assert "! Cannot read 'nowhere.mp4': there is no such file" in printed
    assert "! The question is not valid Unicode" in printed
    assert printed.count("first word after") == 2
    assert "never" not in printed


def test_saving_loading_exporting_and_parts(
    chat: VideoChat, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    terminal = Terminal(chat, None, OPTIONS)
    with pytest.raises(ConfigError, match="no video yet"):
        terminal.command("part", "1 2")
    terminal.command("video", str(SHORT))
    with pytest.raises(VideoError, match=r"still about all of it\.$"):
        terminal.command("part", "90 99")
    terminal.ask("What is it?")
    terminal.command("part", "0:01 0:02")
    terminal.ask("And there?")
    assert [message.content[0].part.start_s for message in terminal.conversation.messages[::2]] == [0.0, 1.0]
    for value, error in (("1", ConfigError), ("2 1", VideoError), ("a b", VideoError), ("90 99", VideoError)):
        still = r"Questions are still about 0:01 to 0:02\.$" if error is VideoError else None
        with pytest.raises(error, match=still):
            terminal.command("part", value)
    terminal.command("add", str(WORLD))
    terminal.command("save", str(tmp_path / "talk.json"))
    terminal.command("export", str(tmp_path / "talk.md"))
    other = Terminal(chat, None, OPTIONS)
    other.command("load", str(tmp_path / "talk.json"))
    assert other.conversation.turns == terminal.conversation.turns
    assert other.medium is not None
    assert other.medium.part == Part(1.0, 2.0)
    other.command("estimate", "")
    with pytest.raises(ConfigError, match="check the path"):
        other.command("load", str(tmp_path / "none.json"))
    other.command("part", "")
    other.ask("Which one?")
    assert len(other.conversation.turns) == 3
    printed = capsys.readouterr().out
    assert "first word" in printed.split("And there?")[0]
    assert printed.count("It comes with the next question") == 1
    assert "> And there?" in printed


def parts(terminal: Terminal) -> list[list[Part]]:
    """What each question showed."""
    questions = terminal.conversation.messages[::2]
    return [[part.part for part in message.content if isinstance(part, Media)] for message in questions]


def test_questions_are_about_the_part_that_was_said_last(
    chat: VideoChat, capsys: pytest.CaptureFixture[str]
) -> None:
    top = (0.0, 0.0, 1.0, 0.5)
    terminal = Terminal(chat, Media(str(SHORT), part=Part(0.0, 1.0, top)), OPTIONS)
    for times in ("1 2", "1.25 2"):  # before a question, the last one alone
        terminal.command("part", times)
    terminal.ask("What is it?")
    terminal.ask("And what else?")
    terminal.command("part", "")
    terminal.ask("And in all of it?")
    terminal.command("part", "0 1")
    terminal.command("add", str(WORLD))  # all of it, beside that part
    terminal.ask("Which one?")
    terminal.command("part", "1 2")
    terminal.command("part", "0 1")  # what was shown last
    terminal.ask("Why?")
    expected = [[Part(1.25, 2.0, top)], [], [Part(region=top)], [Part(0.0, 1.0, top), Part()], []]
    assert parts(terminal) == expected
    assert "Questions are now about 0:01.2 to 0:02." in capsys.readouterr().out
    terminal.command("new", "")
    terminal.ask("What is it?")
    assert parts(terminal) == [[Part(0.0, 1.0, top)]]


class Keys:
    """Standard input of a person who types lines and Ctrl-C."""

    def __init__(self, *keys: str) -> None:
        self.keys = list(keys)

    def __call__(self, prompt: str = "") -> str:
        key = self.keys.pop(0)
        if key == "^C":
            raise KeyboardInterrupt
        return key


def test_ctrl_c_at_the_prompt_leaves_only_the_second_time(
    chat: VideoChat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    keys = Keys("^C", "What is it?", "^C", "^C", "never")
    monkeypatch.setattr("builtins.input", keys)
    assert converse(chat, str(SHORT), OPTIONS) == 0
    assert keys.keys == ["never"]
    printed = capsys.readouterr().out
    assert printed.count("Ctrl-C again leaves.") == 2
    assert printed.count("first word after") == 1


def test_ctrl_c_stops_an_answer_and_keeps_what_was_said(
    chat: VideoChat, steps: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal(chat, str(SHORT), {**OPTIONS, "max_new_tokens": 200, "min_tokens": 200})
    before = signal.getsignal(signal.SIGINT)

    def press() -> None:  # never before the answer has begun, nor after it
        while len(steps) < 5:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    presses = threading.Thread(target=press, daemon=True)
    presses.start()
    terminal.ask("What is it?")
    presses.join()
    ((_, answer),) = terminal.conversation.turns
    assert answer
    assert len(steps) < 150
    assert signal.getsignal(signal.SIGINT) is before
    terminal.options["max_new_tokens"] = 3
    terminal.conversation.options.update(max_new_tokens=3, min_tokens=0)
    terminal.ask("And why?")
    assert len(terminal.conversation.turns) == 2


def test_ctrl_c_while_a_command_runs_ends_the_command_only(
    chat: VideoChat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.stdin", io.StringIO("/estimate\n/help\n"))
    with monkeypatch.context() as patch:
        patch.setattr(Terminal, "introduce", lambda self: None)
        patch.setattr(chat, "estimate", interrupted)
        assert converse(chat, str(SHORT), OPTIONS) == 0
    printed = capsys.readouterr().out
    assert "! Stopped." in printed
    assert "/export FILE" in printed


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven minutes, a frame a second, of two colours."""
    path = tmp_path_factory.mktemp("long") / "film.mp4"
    colours = [(200, 40, 40), (40, 40, 200)]
    shots = [np.full((32, 32, 3), colours[second // 330], np.uint8) for second in range(660)]
    write_video(path, np.stack(shots), 1)
    return path


def test_a_long_video_is_priced_and_asked_about_in_parts(
    chat: VideoChat, film: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal(chat, str(film), {**OPTIONS, "budget": "64"})
    terminal.introduce()
    whole = str(price(chat, film, 64))
    assert "2 parts" in whole
    assert whole.partition(" about ")[0] in capsys.readouterr().out
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    terminal.ask("What is it?")
    printed = capsys.readouterr().out
    assert printed.index("Part 1 of 2 …") < printed.index("Part 2 of 2 …") < printed.index("first word after")
    assert "64 of" in printed
    terminal.ask("And then?")
    assert "Part" not in capsys.readouterr().out  # it was looked at before
    terminal.command("budget", "16")
    terminal.command("part", "0:10 1:00")
    one, now, part = capsys.readouterr().out.splitlines()
    assert now == "Questions are now about 0:10 to 1:00."
    assert ("1 parts" in one, "4 frames" in part) == (True, "parts" not in part)
    terminal.command("video", str(film))
    assert "1 parts" in capsys.readouterr().out


def test_ctrl_c_between_two_parts_ends_the_answer_only(
    chat: VideoChat, film: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[object] = []
    encode = chat._vision.encode

    def interrupted(*arguments: Any, **options: Any) -> Any:
        looked.append(arguments)
        if len(looked) == 1:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
        return encode(*arguments, **options)

    monkeypatch.setattr(chat._vision, "encode", interrupted)
    monkeypatch.setattr("sys.stdin", io.StringIO("What is it?\nAnd now?\n"))
    assert converse(chat, str(film), {**OPTIONS, "budget": "64"}) == 0
    assert len(looked) == 1 + 2
    printed = capsys.readouterr().out
    assert printed.index("[stopped before the first word]") < printed.index("video tokens")


def test_an_export_shows_the_parts_that_were_looked_at(chat: VideoChat, film: Path, tmp_path: Path) -> None:
    terminal = Terminal(chat, str(film), {**OPTIONS, "budget": "64"})
    terminal.ask("What is it?")
    terminal.command("save", str(tmp_path / "talk.json"))
    terminal.command("new", "")
    terminal.command("load", str(tmp_path / "talk.json"))
    terminal.command("export", str(tmp_path / "talk.md"))
    text = (tmp_path / "talk.md").read_text()
    assert text.count("*film.mp4*") == 2
    assert ", from 0:00 to " in text
    assert len(list((tmp_path / "talk_frames").iterdir())) == price(chat, film, 64).frames


@pytest.mark.parametrize(("kind", "redraws"), [("dumb", False), ("xterm", True)])
def test_a_terminal_that_cannot_write_a_line_anew_gets_no_codes(
    chat: VideoChat,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    redraws: bool,
) -> None:
    monkeypatch.setenv("TERM", kind)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    Terminal(chat, str(SHORT), OPTIONS).ask("What is it?")
    assert ("\x1b" in capsys.readouterr().out) is redraws


def test_an_answer_that_is_stopped_before_its_first_word_has_no_figures(
    chat: VideoChat, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = chat._vision.encode

    def interrupted(*arguments: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return encode(*arguments, **options)

    terminal = Terminal(chat, str(SHORT), OPTIONS)
    monkeypatch.setattr(chat._vision, "encode", interrupted)
    terminal.ask("What did nobody ask before?")
    assert "[stopped before the first word]" in capsys.readouterr().out
    assert terminal.conversation.turns == []


def test_lines_of_a_pipe_are_shown_without_their_control_characters(
    chat: VideoChat, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("What \x1b[31mis\x07 it?\n"))
    assert converse(chat, str(SHORT), OPTIONS) == 0
    assert r"> What \x1b[31mis\x07 it?" in capsys.readouterr().out


def test_an_answer_cannot_steer_the_terminal(
    chat: VideoChat, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Scripted(Generation):
        def __iter__(self) -> Iterator[str]:
            yield "One \x1b]0;title"
            yield "\x07two"

    printed, steering = r"One \x1b]0;title\x07two", "One \x1b]0;title\x07two"
    monkeypatch.setattr("app.chat.Generation", Scripted)
    terminal = Terminal(chat, str(SHORT), OPTIONS)
    terminal.ask("What is it?")
    assert printed in capsys.readouterr().out
    terminal.command("save", str(tmp_path / "talk.json"))
    terminal.command("load", str(tmp_path / "talk.json"))
    assert printed in capsys.readouterr().out
    monkeypatch.setattr("app.cli.open_chat", lambda *_, **__: nullcontext(chat))
    commands = (
        ["ask", str(SHORT), "What?"],
        ["ask", "--each", str(SHORT), "What?"],
        ["chapters", str(SHORT)],
    )
    for command in commands:
        assert main(command) == 0
        assert steering in capsys.readouterr().out  # for another program
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    for command in commands:
        assert main(command) == 0
        assert printed in capsys.readouterr().out


TYPIST = """
import sys
from app.terminal import converse
class Chat:
    name, device = "a model", "cpu"
    def conversation(self, *_, **__):
        return None
sys.exit(converse(Chat(), None, {}))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there are no terminals of this kind")
def test_ctrl_c_takes_back_a_line_that_was_begun() -> None:
    pytest.importorskip("readline")
    import fcntl
    import pty
    import termios

    def own_terminal() -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell has what runs in the background ignore it

    main, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", TYPIST],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env={**os.environ, "TERM": "xterm"},
        preexec_fn=own_terminal,
    )
    os.close(terminal)
    shown = b""

    def wait_for(text: bytes) -> None:
        nonlocal shown
        while text not in shown:
            shown += os.read(main, 1000)
        shown = shown.partition(text)[2]

    def press_ctrl_c() -> None:
        # input() misses one that comes before it sleeps.
        until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_SLEEPING)
        os.write(main, b"\x03")

    try:
        wait_for(b"\n> ")
        os.write(main, b"half a question")
        wait_for(b"half a question")
        press_ctrl_c()
        wait_for(b"> ")
        press_ctrl_c()
        wait_for(b"Ctrl-C again leaves.")
        wait_for(b"> ")
        os.write(main, b"once more")
        wait_for(b"once more")
        press_ctrl_c()
        wait_for(b"> ")
        os.write(main, b"/dance\n")
        wait_for(b"There is no command /dance")
        wait_for(b"> ")
        press_ctrl_c()
        wait_for(b"Ctrl-C again leaves.")
        wait_for(b"> ")
        press_ctrl_c()
        assert process.wait(PATIENCE_S) == 0
    finally:
        process.kill()
        process.wait()
        os.close(main)
