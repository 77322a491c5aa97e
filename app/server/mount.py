"""The page inside the server's application, with what gradio leaves open when it is mounted closed.

Launched, gradio takes as input only files that were uploaded to it. Mounted, it skips that check (6.31): any
file of the machine could be named as a video. It also fetches whatever public URL a request names.
"""

from __future__ import annotations

import asyncio
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from fastapi import FastAPI, Request

from app.chat import SHIPPED, VideoChat
from app.server.download import download
from app.server.media import MediaStore
from app.server.page_door import PageDoor, PageUploads
from app.server.routes import Server

if TYPE_CHECKING:
    from app.server.launch import LaunchOptions


def mount_page(app: FastAPI, chat: VideoChat, server: Server, options: LaunchOptions) -> FastAPI:
    """The application with the page at its root; its uploads go to the server's store."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    import gradio
    from gradio.utils import get_upload_folder

    from app.page.events import build, page_options

    folder, limit = get_upload_folder(), options.server.upload_mib * 2**20
    page = build(
        chat,
        options.examples,
        workers=options.server.slots,
        store=server.store,
        login=options.credentials.needed,
    )
    uploads = PageUploads(server.store, folder, limit)
    app.router.add_route("/gradio_api/upload", uploads.upload, ["POST"])
    app.router.add_route("/gradio_api/upload_progress", uploads.progress, ["GET"])
    mounted = gradio.mount_gradio_app(
        app,
        page,
        "/",
        server_name=options.host,
        server_port=options.port,
        # The guard has let in who comes here.
        auth_dependency=_name if options.credentials.needed else None,
        allowed_paths=[],
        blocked_paths=[str(SHIPPED.parents[1])],
        show_error=False,
        max_file_size=limit,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=options.mcp,
        **page_options(),
    )
    lock(page, server.store, options.server.url_hosts, limit)
    mount: Any = mounted.routes[-1]
    mount.app = PageDoor(mount.app, server.store, folder, options.server.url_hosts, mcp=options.mcp)
    app.state.sessions = page.sessions  # type: ignore[attr-defined]
    return mounted


def _name(request: Request) -> str | None:
    name: str | None = request.scope.get("fluxchat.name")
    return name


def lock(page: Any, store: MediaStore, hosts: Sequence[str], max_bytes: int) -> None:
    """Take only uploads as files, and URLs of `hosts` only; leave files to our own decoders."""
    from gradio import processing_utils

    # Gradio would run ffmpeg over what a stranger uploaded, outside of the sandbox.
    processing_utils.ffmpeg_installed = lambda: False
    page.has_launched = True  # what gradio's check of paths asks for
    for block in page.blocks.values():
        if hasattr(block, "async_move_resource_to_block_cache"):
            block.async_move_resource_to_block_cache = _Fetcher(block, store, hosts, max_bytes)


class _Fetcher:
    """Brings what a request names into one component's cache."""

    def __init__(self, block: Any, store: MediaStore, hosts: Sequence[str], max_bytes: int) -> None:
        self._block, self._usual = block, block.async_move_resource_to_block_cache
        self._store, self._hosts, self._max_bytes = store, hosts, max_bytes

    async def __call__(self, source: str | Path | None) -> str | None:
        if source is None or not str(source).lower().startswith(("http://", "https://")):
            found: str | None = await self._usual(source)
            return found
        if (upload := self._upload(str(source))) is not None:
            return upload
        content = await asyncio.to_thread(download, str(source), self._hosts, self._max_bytes)
        stored = await asyncio.to_thread(self._store.add, io.BytesIO(content), "video", page=self._cache())
        return stored.path

    def _upload(self, url: str) -> str | None:
        """The upload that a URL stands for, as MCP tools name it; the host may be that of a proxy."""
        _, found, named = urlsplit(url).path.partition("/gradio_api/file=")
        if not found:
            return None
        path = os.path.realpath(unquote(named))
        inside = path.startswith(os.path.join(os.path.realpath(self._cache()), ""))
        return path if inside and os.path.isfile(path) else None

    def _cache(self) -> str:
        os.makedirs(self._block.GRADIO_CACHE, exist_ok=True)
        return str(self._block.GRADIO_CACHE)
