"""Names are one line where people read them, and nothing that is printed steers a terminal."""

import io

import pytest

from app.ask_each import _bar
from app.printed import in_terminal, on_a_line


@pytest.mark.parametrize(
    ("name", "printed"),
    [
        ("clip.mp4", "clip.mp4"),
        ("Übung 日本\u3000語\u00a0\u202f👩\u200d🚀.mp4", "Übung 日本\u3000語\u00a0\u202f👩\u200d🚀.mp4"),
        ("a\nb\r.mp4", r"a\nb\r.mp4"),
        ("\x1b[31mred\x9b.mp4", r"\x1b[31mred\x9b.mp4"),
        ("a\u2028b\u2029\x85.mp4", r"a\u2028b\u2029\x85.mp4"),
        ("gpj.\u202e4pm", r"gpj.\u202e4pm"),
        ("\udcff.mp4", r"\udcff.mp4"),
    ],
)
def test_control_characters_are_written_out(name: str, printed: str) -> None:
    assert on_a_line(name) == printed


def test_an_answer_keeps_its_lines_and_steers_no_terminal() -> None:
    answer = "1.\tÜbung 日本 👩\u200d🚀\n\x1b]0;title\x07\x9b2J\r\u200fabc"
    assert in_terminal(answer) == "1.\tÜbung 日本 👩\u200d🚀\n" + r"\x1b]0;title\x07\x9b2J\r" + "\u200fabc"


def test_a_line_break_does_not_break_the_bar() -> None:
    out = io.StringIO()
    with _bar(out, 0, 2, "a\nb.mp4"):
        pass
    assert "\n" not in out.getvalue()
    assert r"a\nb.mp4" in out.getvalue()
