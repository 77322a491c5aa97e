"""`fluxchat mcp`: search_videos and ask_video as tools of the Model Context Protocol, over stdio.

Programs start it and talk to it through its standard input and output. A tool reads videos of the library and
of the named folders, and no other file of the machine.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.chat import VideoChat
from app.library.library import Library
from app.messages import Media
from app.server.media.path_confinement import open_beneath
from encoder.errors import ConfigError, FluxChatError

if TYPE_CHECKING:
    from mcp.server.fastmcp import FastMCP

MOST = 100  # hits of a search
INSTRUCTIONS = (
    "Questions about videos, answered within a token budget. search_videos says where in the library "
    "something is to be seen; ask_video answers a question about a video, or a part of it, from start to end."
)


@dataclass(frozen=True)
class FoundClip:
    """A clip of the library. start, end: seconds. score: cosine of text and clip."""

    path: str
    start: float
    end: float
    score: float


@dataclass(frozen=True)
class VideoTools:
    """What the tools do, and which files they may read. folders: videos under them may be asked about."""

    chat: VideoChat
    library: Library | None = None
    folders: Sequence[Path] = ()

    def search(self, query: str, top: int = 10) -> list[FoundClip]:
        """The clips that fit best; raises FluxChatError."""
        if self.library is None:
            raise ConfigError("There is no library here: start it with fluxchat mcp --library DIR.")
        if not 1 <= top <= MOST:
            raise ConfigError(f"Cannot find {top} clips: ask for 1 to {MOST}.")
        hits = self.library.search(query, top).hits
        return [FoundClip(hit.path, hit.start_s, hit.end_s, round(hit.score, 4)) for hit in hits]

    def ask(self, path: str, question: str, budget: str = "", start: str = "", end: str = "") -> str:
        """An answer about a video that may be read; raises FluxChatError."""
        with self._open(path) as medium:
            part = {"start": start.strip() or None, "end": end.strip() or None}
            answer = self.chat.ask(medium, question, budget=budget.strip() or None, parts=True, **part)
            return answer.text

    @contextmanager
    def _open(self, path: str) -> Iterator[Media]:
        """The video as an open file; the same sentence for all others, whether they are there or not."""
        name = os.path.basename(path)
        if self.library is not None and self.library.holds(path):
            with open(path, "rb") as file:
                yield Media(file, name)
            return
        for folder in self.folders:
            try:
                beneath = open_beneath(folder, path)
            except (OSError, ValueError):
                continue
            with beneath:
                yield Media(beneath, name)
            return
        raise ConfigError(f"{path[:200]!r} is no video of the library or of a folder that may be read.")


def make_server(tools: VideoTools) -> FastMCP[Any]:
    """The server, not started. Raises ConfigError without the package mcp."""
    try:
        from mcp.server.fastmcp import FastMCP
        from mcp.server.fastmcp.exceptions import ToolError
    except ImportError:
        raise ConfigError("fluxchat mcp needs the mcp extra: pip install 'fluxchat[mcp]'.") from None
    server: FastMCP[Any] = FastMCP("fluxchat", INSTRUCTIONS, log_level="ERROR")
    searching = threading.Lock()

    async def search_videos(query: str, top: int = 10) -> list[FoundClip]:
        """Find clips in the library of videos by what they show, the best first.

        Args:
            query: what is to be seen, in words
            top: how many clips, 1 to 100
        """

        def search() -> list[FoundClip]:
            with searching:
                return tools.search(query, top)

        try:
            return await asyncio.to_thread(search)
        except FluxChatError as error:
            raise ToolError(str(error)) from error

    async def ask_video(path: str, question: str, budget: str = "", start: str = "", end: str = "") -> str:
        """Answer a question about a video.

        Args:
            path: a path that search_videos gave, or one in a folder that may be read
            question: what you want to know
            budget: tokens to keep: a number, "full", "auto" or "auto:SECONDS"; empty: the model's own
            start: where the part that is asked about begins: seconds, or "1:02"; empty: at the beginning
            end: where it ends; empty: at the end
        """
        try:
            return await asyncio.to_thread(tools.ask, path, question, budget, start, end)
        except FluxChatError as error:
            raise ToolError(str(error)) from error

    if tools.library is not None:
        server.add_tool(search_videos)
    server.add_tool(ask_video)
    return server


def check_folders(folders: Sequence[str]) -> tuple[Path, ...]:
    """The folders whose videos may be read; raises ConfigError for what is none."""
    paths = tuple(Path(folder).expanduser().absolute() for folder in folders)
    for path in paths:
        if not path.is_dir():
            raise ConfigError(f"{path} is no folder: check the path.")
    return paths
