"""Searching a library from the page. The browser knows a hit by its place only: it never names a file.

found = LibrarySearch(library).find("a dog catches a disc")
results(found, turn)                                 # HTML
"""

from __future__ import annotations

import base64
import threading
from html import escape
from pathlib import Path

from app.library.library import Found, Hit, Library
from encoder.errors import ConfigError, FluxChatError
from encoder.video.clock import clock

TOP = 24
LONGEST = 500  # characters of what is looked for
LEFT_OUT = "left out, gone or changed since: <code>fluxchat index --repair</code>."


class LibrarySearch:
    """The library of a page, searched by one visitor at a time. Its sentences name no folder."""

    def __init__(self, library: Library) -> None:
        self._library, self._lock = library, threading.Lock()

    def has(self, hit: Hit) -> bool:
        """Whether a hit's file is still what was indexed; no link that has taken its place is."""
        try:
            with self._lock:
                return self._library.holds(hit.path)
        except FluxChatError:
            return False

    def find(self, text: str) -> Found:
        """What fits a text best; raises FluxChatError."""
        if len(text) > LONGEST:
            raise ConfigError(f"That is too long: look for at most {LONGEST} characters.")
        try:
            with self._lock:
                return self._library.search(text, TOP)
        except FluxChatError as error:
            folder = str(self._library.folder)
            told = str(error).replace(f"library {folder}", "library").replace(folder, "the library's folder")
            raise ConfigError(told) from error


def results(found: Found, turn: int) -> str:
    """Hits as buttons with picture, name, time and score. turn: which search they belong to."""
    rows = "".join(_row(index, hit) for index, hit in enumerate(found.hits))
    said = f"{len(found.hits)} clips, the best first." if found.hits else "Nothing is in the library yet."
    count = len(found.left_out)
    stale = f" {count} file{'s were' if count > 1 else ' was'} {LEFT_OUT}" if count else ""
    return f'<div data-found="{turn}"><p class="fc-note">{said}{stale}</p><ol>{rows}</ol></div>'


def failed(sentence: str, turn: int) -> str:
    """Why a search found nothing."""
    return f'<div data-found="{turn}"><p class="fc-note fc-failed">{escape(sentence)}</p></div>'


def _row(index: int, hit: Hit) -> str:
    name = escape(Path(hit.path).name.encode("utf-8", "replace").decode())
    times = f"{clock(hit.start_s)} – {clock(hit.end_s)}" if hit.end_s else "picture"
    return (
        f'<li><button type="button" data-hit="{index}">{_picture(hit)}<span><b>{name}</b>'
        f"<small>{times} · {hit.score:.3f}</small></span></button></li>"
    )


def _picture(hit: Hit) -> str:
    try:
        content = Path(hit.thumbnail or "").read_bytes()
    except OSError:  # a library that cannot be written has none
        return "<i></i>"
    return f'<img src="data:image/jpeg;base64,{base64.b64encode(content).decode()}" alt="">'


def dialog() -> str:
    """The search box in its dialog, and where its hits appear."""
    return (
        '<dialog id="fluxchat-find" aria-labelledby="fluxchat-find-title">'
        '<h2 id="fluxchat-find-title">Search the library</h2><form role="search">'
        f'<input type="search" maxlength="{LONGEST}" placeholder="a dog catches a disc" '
        'aria-label="What to look for" autocomplete="off"><button type="submit">Search</button></form>'
        '<p class="fc-note" role="status"></p><div class="fc-hits"></div>'
        '<button type="button" class="fc-close" data-find-close aria-label="Close">×</button></dialog>'
    )


def opener() -> str:
    """What opens it, in the page's head."""
    return (
        '<button type="button" data-find aria-haspopup="dialog" aria-label="Search the library">'
        '<svg viewBox="0 0 24 24" aria-hidden="true"><path d="M10.5 4a6.5 6.5 0 1 0 0 13 6.5 6.5 0 0 0 0-13z'
        'M15.5 15.5L20 20"/></svg><span>Search the library</span></button>'
    )
