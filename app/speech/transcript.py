"""What is said in a video, in lines with times: as subtitles, and as text beside the frames.

transcript.srt; transcript.vtt
transcript.text(lambda text: len(tokenizer(text).input_ids), budget=256)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from encoder.video.clock import clock

LEFT_OUT = "[...]"


@dataclass(frozen=True)
class Line:
    """start_s, end_s: in seconds of the whole video."""

    start_s: float
    end_s: float
    text: str


@dataclass(frozen=True)
class Transcript:
    """lines: by time. language: a code as "en"; "" where nothing is said. sound: whether there is any."""

    lines: tuple[Line, ...]
    language: str = ""
    sound: bool = True

    @property
    def srt(self) -> str:
        """As SubRip subtitles."""
        blocks = (
            f"{number}\n{_stamp(line.start_s, ',')} --> {_stamp(line.end_s, ',')}\n{line.text}\n"
            for number, line in enumerate(self.lines, 1)
        )
        return "\n".join(blocks)

    @property
    def vtt(self) -> str:
        """As WebVTT subtitles, their language in the header."""
        escaped = (
            (line, line.text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))
            for line in self.lines
        )
        blocks = (f"{_stamp(line.start_s)} --> {_stamp(line.end_s)}\n{text}\n" for line, text in escaped)
        head = f"WEBVTT\nLanguage: {self.language}\n" if self.language else "WEBVTT\n"
        return "\n".join((head, *blocks))

    def text(self, count: Callable[[str], int], budget: int) -> str:
        """The lines with their times, within a budget of tokens; "" where nothing is said, or fits.

        count: tokens of a text. Of a long transcript lines are left out evenly, and marked so.
        """
        low, high, best = 1, len(self.lines), ""
        while low <= high:
            middle = (low + high) // 2
            text = self._thinned(middle)
            if count(text) <= budget:
                best, low = text, middle + 1
            else:
                high = middle - 1
        return best

    def _thinned(self, kept: int) -> str:
        total = len(self.lines)
        places = [(2 * index + 1) * total // (2 * kept) for index in range(kept)]
        rows = ["What is said in the video:"]
        last = -1
        for place in places:
            if place > last + 1:
                rows.append(LEFT_OUT)
            line = self.lines[place]
            rows.append(f"[{clock(line.start_s)}-{clock(line.end_s)}] {line.text}")
            last = place
        return "\n".join([*rows, *[LEFT_OUT] * (last + 1 < total)])

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @staticmethod
    def of(values: Mapping[str, Any]) -> Transcript:
        """The reverse of `to_dict`."""
        return Transcript(
            tuple(Line(**line) for line in values["lines"]), values["language"], values["sound"]
        )


def _stamp(seconds: float, point: str = ".") -> str:
    """00:01:02.345"""
    whole, thousandths = divmod(round(seconds * 1000), 1000)
    return f"{whole // 3600:02}:{whole // 60 % 60:02}:{whole % 60:02}{point}{thousandths:03}"
