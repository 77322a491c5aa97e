"""What the server's errors must not tell: where its files are.

scrub = Scrubber({"/srv/models/qwen": "the model"})
scrub("positions but /srv/models/qwen has 1024")   # "positions but the model has 1024"
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

A_FILE = "a file of the server"
# A path goes on to the end of its quotation, or to what ends a word.
_REST = r"(?:[\\/][^\s'\"<>|,;:()]*)?"
_OBJECT = re.compile(r"<[^<>]{0,200} at 0x[0-9a-fA-F]+>")


class Scrubber:
    """Replaces paths in texts. named: what to call certain paths. folders: others, whose files are meant.

    The folders for temporary files, of the user, of the interpreter and of this program always are.
    """

    def __init__(self, named: Mapping[str, str], folders: Iterable[str | Path | None] = ()) -> None:
        usual = [tempfile.gettempdir(), _home(), os.getcwd(), sys.prefix, sys.base_prefix, _program()]
        known = dict.fromkeys(_spellings([*usual, *(str(f) for f in folders if f is not None)]), A_FILE)
        for path, name in named.items():
            known |= dict.fromkeys(_spellings([path]), name)
        self._names = known
        longest_first = sorted(known, key=len, reverse=True)
        self._paths = re.compile(
            r"(?<![\w./])(?:file://)?(" + "|".join(map(re.escape, longest_first)) + rf")(?![\w.-]){_REST}"
        )

    def __call__(self, text: str) -> str:
        """The text without the server's paths, and without addresses of its memory."""
        return _OBJECT.sub("it", self._paths.sub(lambda found: self._names[found[1]], text))


def _spellings(paths: Iterable[str]) -> list[str]:
    """Absolute paths as they are and with their links resolved; none that is the root itself."""
    both = [spelling for path in paths for spelling in (os.path.abspath(path), os.path.realpath(path))]
    return [path for path in both if len(Path(path).parts) > 1]


def _home() -> str:
    return os.path.expanduser("~")


def _program() -> str:
    return str(Path(__file__).resolve().parents[2])
