"""HTML fragments of the page: cost line, strip of frames, shelf of media, answer statistics, time links."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import replace
from difflib import SequenceMatcher
from html import escape
from itertools import groupby
from urllib.parse import quote, unquote

from PIL import Image
from torch import Tensor

from app.answer import Answer, KeptTokens
from app.estimate import Estimate
from app.long_video import Chapter, LongEstimate
from app.page.overlay import data_url, kept_mask, paint
from app.page.sessions import Media
from encoder.video.clock import clock as exact
from encoder.video.reader import read_clip

_COUNTING = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
    "twenty",
)
_CLOCK = r"(?:\d{1,2}:[0-5]\d|\d{1,3}):[0-5]\d(?:\.\d+)?"
# "0:07", "1:02.5", "7 s", "7.5 seconds", "3 sec", "three seconds"; not "10:30 pm"'s day or "16:9" followed by
# more digits; a colon may follow.
_TIME = re.compile(
    rf"(?<![\w:.#])(?:({_CLOCK})|(\d+(?:\.\d+)?)\s?(?:s|secs?|seconds?)"
    rf"|(?<!-)((?i:{'|'.join(_COUNTING)})) seconds?)(?!\w|[:.]\d)"
)

# "0:03 to 0:05", "0:03–0:05", "3 to 5 seconds", "3-5 s", "3 s to 5 s", and with "and" after "between".
_UNIT = r"\s?(?:s|secs?|seconds?)"
_TO = r"(?:\s*[-–—]\s*|\s+(?:to|until|and)\s+)"
_INTERVAL = re.compile(
    rf"(?<![\w:.#])(?:(?P<from>{_CLOCK}){_TO}(?P<to>{_CLOCK})"
    rf"|(?P<low>\d+(?:\.\d+)?)(?:{_UNIT})?{_TO}(?P<high>\d+(?:\.\d+)?){_UNIT})(?!\w|[:.]\d)"
)


def clock(seconds: float, *, tenths: bool = False) -> str:
    """7.4 -> "0:07", or "0:07.4"; 5025 -> "1:23:45"."""
    units = int(seconds * 10 + 0.5) if tenths else int(seconds + 0.5) * 10
    minutes, rest = divmod(units, 600)
    hours, minutes = divmod(minutes, 60)
    whole = f"{hours}:{minutes:02d}" if hours else f"{minutes}"
    return f"{whole}:{rest // 10:02d}" + (f".{rest % 10}" if tenths else "")


def link_times(text: str, duration_s: float, *, html: bool = False) -> str:
    """Markdown (or HTML) in which every time within the video is a link that moves the player there.

    An interval ("0:03 to 0:05", "3-5 seconds") is one link, which plays that piece: #t=3,5.
    """

    def interval(match: re.Match[str]) -> str:
        start, end = _seconds_of(match["from"] or match["low"]), _seconds_of(match["to"] or match["high"])
        if not start < end <= duration_s:
            return single(match[0])
        return written(match[0], f"{start:g},{end:g}")

    def single(part: str) -> str:
        return _TIME.sub(link, part)

    def written(words: str, at: str) -> str:
        return f'<a href="#t={at}">{words}</a>' if html else f"[{words}](#t={at})"

    def link(match: re.Match[str]) -> str:
        clock_time, seconds, word = match.groups()
        at = _COUNTING.index(word.lower()) if word else _seconds_of(clock_time or seconds)
        return match[0] if at > duration_s else written(match[0], f"{at:g}")

    done, pieces = 0, []
    for match in _INTERVAL.finditer(text):
        pieces += [single(text[done : match.start()]), interval(match)]
        done = match.end()
    return "".join(pieces) + single(text[done:])


def _seconds_of(words: str) -> float:
    """ "1:02.5" and "62.5" as seconds."""
    minutes, _, seconds = words.rpartition(":")
    hours, _, minutes = minutes.rpartition(":")
    return 3600 * int(hours or 0) + 60 * int(minutes or 0) + float(seconds)


def said_alone(text: str, others: Sequence[str], duration_s: float) -> str:
    """An answer as HTML, its times linked; words that none of the other answers has there are marked."""
    words = re.findall(r"\S+\s*|\s+", text)
    bare = [_bare(word) for word in words]
    shared = [not others] * len(words)
    for other in others:
        matcher = SequenceMatcher(None, bare, [_bare(word) for word in other.split()], autojunk=False)
        for block in matcher.get_matching_blocks():
            shared[block.a : block.a + block.size] = [True] * block.size
    pieces = []
    for same, group in groupby(zip(shared, words, strict=True), key=lambda pair: pair[0]):
        piece = "".join(word for _, word in group)
        linked = link_times(escape(piece), duration_s, html=True)
        pieces.append(linked if same else f"<mark>{linked}</mark>")
    return "".join(pieces)


def _bare(word: str) -> str:
    return word.strip().strip(".,;:!?\"'()").lower()


def thoughts(text: str) -> str:
    """What a model thought before it answered, folded; nothing for nothing."""
    if not text.strip():
        return ""
    lines = escape(text.strip()).replace("\n", "<br>")
    return f'<details class="fc-thoughts"><summary>Thoughts</summary>{lines}</details>\n\n'


def strip(seen: Sequence[tuple[Tensor, KeptTokens]], medium: int, *, side: int, label: str) -> str:
    """A row of frames with dropped patches dimmed; each is a button that moves the player to its time.

    seen: frames, uint8 (T, H, W, 3), and what is kept of them: of a video, or of each part of a long one.
    medium: place of the video in the conversation. side: pixels of a picture.
    """
    cells = [cell for frames, kept in seen for cell in _cells(frames, kept, medium, side)]
    return f'<div class="fc-frames" role="group" aria-label="{escape(label)}">{"".join(cells)}</div>'


def _cells(frames: Tensor, kept: KeptTokens, medium: int, side: int) -> list[str]:
    counts = kept_mask(kept).sum(axis=(1, 2))
    tenths = kept.duration_s < 60
    cells = []
    for index, picture in enumerate(paint(frames, kept)):
        image = f'<img src="{data_url(picture, side)}" alt="" draggable="false">'
        if not kept.times_s:
            cells.append(f'<span class="fc-frame">{image}<span>{counts[index]} tokens</span></span>')
            continue
        at = clock(kept.times_s[index], tenths=tenths)
        cells.append(
            f'<button type="button" class="fc-frame" data-seek="{kept.times_s[index]:.3f}" '
            f'data-medium="{medium}" title="Go to {at}: {counts[index]} tokens kept">{image}'
            f"<span>{at} <i>{counts[index]}</i></span></button>"
        )
    return cells


def long_note(text: str) -> str:
    """What is said of a long video, and a button that lists its chapters."""
    return f'<p class="fc-note">{escape(text)} <button type="button" data-chapters>List chapters</button></p>'


def chapters(found: Sequence[Chapter], medium: int, *, phase: str = "") -> str:
    """Chapters of a long video, each a button that moves the player to where it begins.

    phase: what is done for the next one.
    """
    rows = "".join(
        f'<li><button type="button" data-seek="{one.start_s:.3f}" data-medium="{medium}">'
        f"<b>{clock(one.start_s)}</b> {escape(one.text)}</button></li>"
        for one in found
    )
    note = "".join(f'<p class="fc-note">{_code(one.note)}</p>' for one in found if one.note)
    stop = '<button type="button" data-chapters-stop>Stop</button>'
    waiting = f'<p class="fc-phase" role="status">{escape(phase)} … {stop}</p>' if phase else ""
    return f'<h2>Chapters</h2>{note}<ol class="fc-chapters">{rows}</ol>{waiting}'


def _code(text: str) -> str:
    """A text whose `marks` become code."""
    return re.sub("`([^`]*)`", r"<code>\1</code>", escape(text.strip()))


def presets(choices: Sequence[tuple[str, int, Sequence[Estimate]]], chosen: int | None) -> str:
    """The price in plain words: a button for each choice, with its seconds and share of the frames' detail.

    choices: name, tokens per video, and the estimates for all videos, none where there is no video yet.
    """
    buttons = []
    for name, tokens, estimates in choices:
        facts = ""
        if estimates:
            wait, detail = sum(e.first_token_s for e in estimates), _detail(estimates)
            facts = f" <small>{_about(wait)} · {detail} of detail</small>"
        pressed = "true" if tokens == chosen else "false"
        buttons.append(
            f'<button type="button" data-preset="{tokens}" aria-pressed="{pressed}"><b>{name}</b>{facts}'
            "</button>"
        )
    return f'<div class="fc-presets" role="group" aria-label="How closely to look">{"".join(buttons)}</div>'


def _detail(estimates: Sequence[Estimate]) -> str:
    """Kept patches of all that the sampled frames have, as a percentage."""
    return f"{100 * sum(e.kept_tokens for e in estimates) / sum(e.seen_tokens for e in estimates):.0f} %"


def _about(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"


def cost_line(estimates: Sequence[Estimate], seconds: float | None = None) -> str:
    """The figures behind the price of a question: sums over all videos of the conversation.

    seconds: the latency target, to say when it cannot be met.
    """
    first = estimates[0]
    kept, seen = sum(e.kept_tokens for e in estimates), sum(e.seen_tokens for e in estimates)
    wait = sum(e.first_token_s for e in estimates)
    parts = [e.parts for e in estimates if isinstance(e, LongEstimate)]
    shapes = {(e.frames, e.height, e.width) for e in estimates}
    many = f"{len(estimates)} × " if len(estimates) > 1 else ""
    if parts:
        first, many = replace(first, frames=first.frames // parts[0]), f"{parts[0]} × "
    shape = f"{first.frames} × {first.width}×{first.height}" if len(shapes) == 1 else "various sizes"
    facts = [
        ("parts × frames × size" if parts else "frames × size", f"{many}{shape}"),
        ("tokens kept", f"<b>{kept}</b> of {seen}"),
        ("of the detail", _detail(estimates)),
        ("into the LLM", f"{sum(e.llm_tokens for e in estimates)} tokens"),
        ("to compute", f"{sum(e.encoder_gmacs + e.llm_gmacs for e in estimates):.3g} GMACs"),
        ("to first word", f"≈ <b>{wait:.2f} s</b>"),
        ("memory", f"{sum(e.peak_mib for e in estimates):.0f} MiB"),
    ]
    if parts:
        survey_s = sum(e.survey_s for e in estimates if isinstance(e, LongEstimate))
        facts.insert(6, ("of it to find the parts", f"{survey_s:.2f} s"))
    cells = " ".join(
        f'<span class="fc-fact"><span>{value}</span> <small>{name}</small></span>' for name, value in facts
    )
    missed = seconds is not None and wait > seconds
    note = (
        f'<p class="fc-note">The least this model can do takes longer than {seconds:g} s here.</p>'
        if missed
        else ""
    )
    return f'<div class="fc-cost">{cells}</div>{note}'


def notice(text: str) -> str:
    """A quiet sentence in place of figures."""
    return f'<p class="fc-note">{escape(text)}</p>'


def problem(text: str, command: str = "") -> str:
    """An error as one sentence, announced to screen readers, with a way to dismiss it.

    command: what solves it, to copy.
    """
    line = f"<code>{escape(command)}</code>{copy_button(command)}" if command else ""
    return (
        f'<div class="fc-problem" role="alert"><p>{escape(text)}{line and " This converts it:"}</p>{line}'
        '<button type="button" class="fc-close" data-dismiss aria-label="Dismiss">×</button></div>'
    )


def copy_button(text: str) -> str:
    """A button that copies a text."""
    return f'<button type="button" class="fc-copy" data-copy="{escape(text)}">Copy</button>'


FILES = "/gradio_api/file="  # the page's server gives uploads there


def file_address(path: str) -> str:
    """Where the page's server has an upload, from its root; safe in an attribute."""
    return escape(f"{FILES}{quote(path)}")


def path_of(address: object) -> str:
    """The path that `file_address` was made of; "" for what is no address."""
    return unquote(address.removeprefix(FILES)) if isinstance(address, str) else ""


def made(path: str, name: str, text: str) -> str:
    """A file that was made for the visitor, which the page's script saves. text: what it says of it."""
    return (
        f'<a hidden data-made="{secrets.token_hex(4)}" data-told="{escape(text)}" '
        f'href="{file_address(path)}" download="{escape(name)}"></a>'
    )


def taken(question: str, number: int) -> str:
    """Tells the page's script that a question was taken, as its box held it. number: grows."""
    return f'<div hidden data-taken="{escape(question)}" data-number="{number}"></div>'


def shelf(media: Sequence[Media], shown: int, revision: int = 0) -> str:
    """The videos and images of the conversation, with buttons to show and to remove each. revision: grows,
    so that the browser knows an older shelf that comes late."""
    items = []
    for index, medium in enumerate(media):
        name = escape(medium.name)
        length = "image" if medium.is_image else clock(medium.info.duration_s)
        current = ' aria-current="true"' if index == shown else ""
        part = medium.part
        chosen = escape(json.dumps({"start": part.start_s, "end": part.end_s, "region": part.region}))
        kind = "image" if medium.is_image else "video"
        items.append(
            f'<span class="fc-medium"{current} data-kind="{kind}" data-src="{file_address(medium.path)}" '
            f'data-seconds="{medium.info.duration_s:g}" data-part="{chosen}" data-turn="{medium.turn}">'
            f'<button type="button" data-show title="Show {name}">'
            f"<b>{index + 1}</b> {name} <i>{length}</i></button>"
            f'<button type="button" data-remove aria-label="Remove {name}">×</button></span>'
        )
    hidden = "" if items else " hidden"
    return (
        '<div class="fc-shelf" role="group" aria-label="Videos and images" '
        f'data-revision="{revision}"{hidden}>{"".join(items)}</div>'
    )


def part_chips(media: Sequence[Media], *, clearable: bool = False) -> str:
    """What of the videos and images a question is about, where that is not all; empty otherwise."""
    chips = []
    for medium in media:
        if medium.part.whole:
            continue
        end = clock(medium.info.duration_s) if medium.part.end_s is None else exact(medium.part.end_s)
        name = [escape(medium.name)] if len(media) > 1 else []
        times = [f"{exact(medium.part.start_s)} – {end}"] if medium.part.timed else []
        box = ["a box of the picture"] if medium.part.region else []
        button = (
            f'<button type="button" data-whole="{file_address(medium.path)}" '
            f'aria-label="Ask about all of {escape(medium.name)}">×</button>'
        )
        chips.append(
            f'<span class="fc-chip">{" · ".join(name + times + box)}{button if clearable else ""}</span>'
        )
    return f'<div class="fc-chips">{"".join(chips)}</div>' if chips else ""


def suggestions(questions: Sequence[str]) -> str:
    """Questions to ask with one click."""
    buttons = "".join(
        f'<button type="button" data-suggest="{escape(question)}">{escape(question)}</button>'
        for question in questions
    )
    return f'<div class="fc-suggestions" role="group" aria-label="Suggested questions">{buttons}</div>'


def examples(pairs: Sequence[tuple[str, str]]) -> str:
    """Cards of videos to start from, each with its question; reads one frame of each file."""
    cards = []
    for index, (path, question) in enumerate(pairs):
        frame = read_clip(path, 1, max_side=240).frames[0].numpy()
        cards.append(
            f'<button type="button" class="fc-example" data-example="{index}" '
            f'aria-label="Example: {escape(question)}">'
            f'<img src="{data_url(Image.fromarray(frame), 240)}" alt="">'
            f"<span>{escape(question)}</span></button>"
        )
    return f'<h2>Start from an example</h2><div class="fc-examples">{"".join(cards)}</div>'


def evidence(answer: Answer, strips: Sequence[str], predicted_s: float | None) -> str:
    """What an answer rests on, in one line that opens: the frames with their kept patches, tokens, times."""
    usage, times = answer.usage, answer.timings
    looked = f"looked at {usage.kept_tokens} of {usage.seen_tokens} patches · " if usage.seen_tokens else ""
    head = f"{looked}{_seconds(times.first_token_s)}"
    if answer.finish == "cancelled":
        head += " · stopped"
    return (
        f'<details class="fc-details"><summary>{head}</summary>{"".join(strips)}'
        f"{small_print(answer, predicted_s)}</details>"
    )


def small_print(answer: Answer, predicted_s: float | None = None) -> str:
    """Tokens and times of an answer in one line. predicted_s: to the first word, as it was foretold."""
    usage, times = answer.usage, answer.timings
    facts = []
    if predicted_s is not None:
        facts.append(f"foretold {predicted_s:.2f} s, took {times.first_token_s:.2f} s to the first word")
    if usage.seen_tokens:
        facts.append(f"{usage.kept_tokens} of {usage.seen_tokens} tokens kept")
        facts += [f"decode {_seconds(times.decode_s)}", f"encode {_seconds(times.encode_s)}"]
    facts.append(f"prefill {_seconds(times.prefill_s)}")
    if usage.cached_tokens:
        facts.append(f"{usage.cached_tokens} of {usage.prompt_tokens} prompt tokens reused")
    facts += [f"first word {_seconds(times.first_token_s)}", f"{times.tokens_per_s:.0f} tokens/s"]
    if answer.finish != "stop":
        facts.append({"cancelled": "stopped", "length": "cut at the longest answer"}[answer.finish])
    return f'<div class="fc-small">{" · ".join(facts)}</div>'


def _seconds(value: float) -> str:
    return "reused" if value < 5e-4 else f"{1000 * value:.0f} ms" if value < 1 else f"{value:.1f} s"
