"""Names and answers that people read in a terminal: a name is one line, and neither can steer the terminal.

print(f"{on_a_line(path)}: ...")
"""

from __future__ import annotations

import sys
import unicodedata
from typing import TYPE_CHECKING

from encoder.video.clock import clock

if TYPE_CHECKING:
    from encoder.video.protocol import CutPart

# Control characters, line and paragraph separators, lone surrogates; and what turns the direction of writing.
_CATEGORIES = {"Cc", "Zl", "Zp", "Cs"}
_TURNING = set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def on_a_line(name: object) -> str:
    r"""A name, or a sentence with names, in which such characters are written as \n, \x1b or \u202e."""
    return "".join(_escaped(c) if _is_control(c) else c for c in str(name))


def in_terminal(answer: str) -> str:
    r"""An answer in which control characters other than \n and \t are written as \x1b."""
    return "".join(_escaped(c) if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in answer)


def printable(answer: str) -> str:
    """The same where the output is a terminal; a file or another program gets the answer as it is."""
    return in_terminal(answer) if sys.stdout is not None and sys.stdout.isatty() else answer


def cut_line(out: str, part: CutPart) -> str:
    """What is told of a part that was cut out into a file."""
    sound = "with its sound" if part.sound else "without sound"
    return f"{on_a_line(out)}: {clock(part.start_s)} to {clock(part.end_s)}, {sound}"


def _is_control(character: str) -> bool:
    return unicodedata.category(character) in _CATEGORIES or character in _TURNING


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()
