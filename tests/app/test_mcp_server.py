"""MCP tools: the real client finds clips and asks about them; no other file can be read through them."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from app.chat import VideoChat
from app.cli import main
from app.library.library import Library
from app.mcp_server import VideoTools, check_folders, make_server
from encoder.errors import ConfigError
from tests import ROOT
from tests.app.conftest import SHORT, WORLD
from tests.app.library.conftest import ColourEmbedder, film

needs_mcp = pytest.mark.skipif(find_spec("mcp") is None, reason="the package mcp is not installed")
needs_lancedb = pytest.mark.skipif(find_spec("lancedb") is None, reason="LanceDB is not installed")


@pytest.fixture
def library(tmp_path: Path) -> Library:
    film(tmp_path / "videos" / "red.mp4", ["red"])
    film(tmp_path / "videos" / "two.mp4", ["white", "blue"])
    library = Library(tmp_path / "index", embedder=ColourEmbedder(), seconds=2)
    library.index([tmp_path / "videos"])
    return library


def talk(tools: VideoTools, conversation: Callable[[Any], Awaitable[None]]) -> None:
    """Connect a client in this process."""
    from mcp.shared.memory import create_connected_server_and_client_session as connected

    async def run() -> None:
        async with connected(make_server(tools)._mcp_server) as client:
            await conversation(client)

    asyncio.run(run())


@needs_mcp
@needs_lancedb
def test_a_client_searches_and_asks_about_what_it_found(chat: VideoChat, library: Library) -> None:
    async def conversation(client: Any) -> None:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
        assert set(tools) == {"search_videos", "ask_video"}
        assert set(tools["search_videos"].inputSchema["required"]) == {"query"}
        assert set(tools["ask_video"].inputSchema["required"]) == {"path", "question"}
        found = await client.call_tool("search_videos", {"query": "blue", "top": 2})
        assert not found.isError
        best, _ = found.structuredContent["result"]
        assert (Path(best["path"]).name, best["start"], best["end"]) == ("two.mp4", 2.0, 4.0)
        asked = {"path": best["path"], "question": "What is there?", "budget": "32", "start": "2", "end": "4"}
        answer = await client.call_tool("ask_video", asked)
        assert not answer.isError
        alone = chat.ask(best["path"], "What is there?", budget=32, start=2, end=4).text
        assert answer.content[0].text == alone

        for name, arguments, sentence in (
            ("search_videos", {"query": " "}, "Say what to look for"),
            ("search_videos", {"query": "red", "top": 101}, "ask for 1 to 100"),
            ("ask_video", {"path": best["path"], "question": "What?", "budget": "x"}, "budget"),
            (
                "ask_video",
                {"path": best["path"], "question": "What?", "start": "99"},
                "beyond the video's end",
            ),
            ("ask_video", {"path": str(SHORT), "question": "What?"}, "no video of the library"),
        ):
            refused = await client.call_tool(name, arguments)
            assert refused.isError
            assert sentence in refused.content[0].text

    talk(VideoTools(chat, library), conversation)


@needs_mcp
def test_without_a_library_there_is_no_search(chat: VideoChat) -> None:
    async def conversation(client: Any) -> None:
        assert [tool.name for tool in (await client.list_tools()).tools] == ["ask_video"]
        answer = await client.call_tool("ask_video", {"path": WORLD.name, "question": "What is there?"})
        assert answer.content[0].text == chat.ask(WORLD, "What is there?").text

    talk(VideoTools(chat, None, (WORLD.parent,)), conversation)


@needs_lancedb
def test_no_file_outside_is_read(chat: VideoChat, library: Library, tmp_path: Path) -> None:
    outside = film(tmp_path / "secret" / "film.mp4", ["red"])
    folder = tmp_path / "open"
    film(folder / "mine.mp4", ["blue"])
    (folder / "way out.mp4").symlink_to(outside)
    tools = VideoTools(chat, library, (folder,))
    assert tools.ask("mine.mp4", "What is there?", "16")
    assert tools.ask(str(folder / "mine.mp4"), "What is there?", "16")
    indexed = tmp_path / "videos" / "red.mp4"
    assert tools.ask(str(indexed), "What is there?", "16")
    for path in (
        str(outside),
        str(folder / "way out.mp4"),
        "../secret/film.mp4",
        f"{tmp_path}/videos/../secret/film.mp4",
        str(library.folder / "library.json"),
        "/etc/passwd",
        "x' OR path LIKE '%",
        "",
        "a\0b",
        str(tmp_path / "nowhere.mp4"),
    ):
        with pytest.raises(ConfigError, match="no video of the library or of a folder"):
            tools.ask(path, "What is there?")
    # What stands in an indexed file's place is another file.
    indexed.unlink()
    indexed.symlink_to(film(tmp_path / "secret" / "other.mp4", ["green", "white"]))
    with pytest.raises(ConfigError, match="no video of the library"):
        tools.ask(str(indexed), "What is there?")


@needs_lancedb
def test_wrong_commands_are_sentences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, sentence in (
        ([], "Say which videos may be read"),
        (["--folder", str(tmp_path / "nowhere")], "is no folder"),
        (["--library", str(tmp_path)], "There is no library"),
    ):
        assert main(["mcp", *arguments]) == 2
        assert sentence in capsys.readouterr().err
    with pytest.raises(ConfigError, match="no folder"):
        check_folders([str(SHORT)])
    monkeypatch.setitem(sys.modules, "mcp", None)
    monkeypatch.setitem(sys.modules, "mcp.server.fastmcp", None)
    with pytest.raises(ConfigError, match=r"pip install 'fluxchat\[mcp\]'"):
        make_server(VideoTools(None))  # type: ignore[arg-type]


@needs_mcp
@pytest.mark.slow
def test_the_command_speaks_to_a_client_over_stdio() -> None:
    from mcp import ClientSession, StdioServerParameters
    from mcp.client.stdio import stdio_client

    arguments = ["-m", "app", "mcp", "--folder", str(WORLD.parent), "--device", "cpu"]
    server = StdioServerParameters(command=sys.executable, args=arguments, cwd=ROOT, env=dict(os.environ))

    async def run() -> None:
        async with stdio_client(server) as streams, ClientSession(*streams) as client:
            await client.initialize()
            asked = {"path": "world.mp4", "question": "What happens?", "budget": "64"}
            answer = await client.call_tool("ask_video", asked)
            assert not answer.isError
            assert answer.content[0].text.strip()
            refused = await client.call_tool("ask_video", {"path": "/etc/passwd", "question": "What?"})
            assert refused.isError

    asyncio.run(run())
