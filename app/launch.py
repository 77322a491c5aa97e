"""The page and the API on one port, with the locks that belong to them.

    serve(VideoChat(trusted=False, limits=WEB_LIMITS), port=7860)

Bound to this machine unless people must log in. One line on stdout when it is ready; SIGTERM lets the answers
that are being made finish.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import os
import socket
import threading
import webbrowser
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from app.chat import VideoChat
from app.guard import LOCAL, Credentials, Guard
from app.mount import mount_page
from app.scratch import ScratchFolder
from app.server import Server, ServerSettings
from encoder.errors import ConfigError
from encoder.video import Limits

# What a stranger's upload may cost.
WEB_LIMITS = Limits(
    seconds=20.0, max_pixels=8192 * 4320, max_duration_s=3600.0, max_bytes=200 * 2**20, memory_mib=2048
)
GONE_S = 2.0  # for connections that stay open without a question


@dataclass(frozen=True)
class LaunchOptions:
    """How to serve. host, port: 0 takes any free port. credentials: who may use it.

    hosts: further names it may be asked by (behind a proxy). public: bind elsewhere without a login, for
    places that have their own. examples: (file, question) pairs of the page, None for the shipped ones.
    mcp: offer ask and estimate as MCP tools. page: serve the page too. browser: open it. drain_s: how long a
    SIGTERM lets answers go on.
    """

    host: str = "127.0.0.1"
    port: int = 7860
    credentials: Credentials = field(default_factory=Credentials)
    server: ServerSettings = field(default_factory=ServerSettings)
    hosts: tuple[str, ...] = ()
    public: bool = False
    examples: Sequence[tuple[str, str]] | None = None
    mcp: bool = False
    page: bool = True
    browser: bool = False
    drain_s: float = 30.0

    def check(self) -> None:
        """Raises ConfigError for what would be unsafe or cannot work."""
        if not self.local and self.credentials.login is None and not self.public:
            raise ConfigError(
                f"Binding to {self.host} lets others in: add --auth USER:PASSWORD, or stay on 127.0.0.1."
            )
        if self.server.media_root is not None and not self.server.media_root.is_dir():
            raise ConfigError(f"The media root {self.server.media_root} is not a folder.")
        if self.mcp and importlib.util.find_spec("mcp") is None:
            raise ConfigError("--mcp needs the mcp extra: pip install 'fluxchat[mcp]'.")

    @property
    def local(self) -> bool:
        """Whether only this machine can connect."""
        return self.host in LOCAL or self.host.startswith("127.")


def make_app(chat: VideoChat, options: LaunchOptions) -> FastAPI:
    """Page and API as one ASGI application; `app.state.server` is the API's Server."""
    options.check()
    server = Server(chat, options.server)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        tidying = asyncio.ensure_future(server.tidy())
        try:
            yield
        finally:
            tidying.cancel()
            server.close()

    # The usual documentation pages load scripts from elsewhere.
    app = FastAPI(title="FluxChat", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.server = server
    server.install(app)
    if options.page:
        app = mount_page(app, chat, options)
    hosts = (*LOCAL, *options.hosts) if options.local else options.hosts or None
    app.add_middleware(Guard, credentials=options.credentials, hosts=hosts)
    return app


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; raises ConfigError when it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
    except (OSError, OverflowError) as error:
        found.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"Cannot listen on {host} port {port} ({reason}): choose another --port."
        ) from error
    return found


def serve(chat: VideoChat, options: LaunchOptions, listener: socket.socket | None = None) -> None:
    """Serve until SIGTERM or Ctrl-C. listener: a socket of `bind`, when it was wanted before the model.

    Raises ConfigError before anything starts.
    """
    options.check()
    listener = listener or bind(options.host, options.port)
    with contextlib.suppress(KeyboardInterrupt), _own_uploads():
        make_server(chat, options, listener).run([listener])


@contextlib.contextmanager
def _own_uploads() -> Iterator[None]:
    """A folder for uploads to the page, unless one is given: gradio's is shared by all its programs."""
    if "GRADIO_TEMP_DIR" in os.environ:
        yield
        return
    scratch = ScratchFolder("page")
    os.environ["GRADIO_TEMP_DIR"] = scratch.path
    try:
        yield
    finally:
        del os.environ["GRADIO_TEMP_DIR"]
        scratch.remove()


def make_server(chat: VideoChat, options: LaunchOptions, listener: socket.socket) -> uvicorn.Server:
    """What `serve` runs; its `run([listener])` may be called in another thread, and `should_exit` ends it."""
    app = make_app(chat, options)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=max(1, round(GONE_S)),
        limit_concurrency=1024,
    )
    return _Server(config, app.state.server, chat, options, listener)


class _Server(uvicorn.Server):
    """uvicorn that says when it is ready and drains when told to end; a second signal ends it at once."""

    def __init__(
        self,
        config: uvicorn.Config,
        api: Server,
        chat: VideoChat,
        options: LaunchOptions,
        listener: socket.socket,
    ) -> None:
        super().__init__(config)
        self._api, self._chat, self._options, self._listener = api, chat, options, listener

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        address = _address(self._listener)
        print(f"FluxChat is ready at {address}", flush=True)
        if self._options.browser:
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True  # not passed on to uvicorn, which would raise the signal again at the end

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        draining = asyncio.ensure_future(self._drain())
        while not draining.done() and not self.force_exit:
            await asyncio.sleep(0.05)
        draining.cancel()
        self._api.scheduler.close()
        # What is still open now are pages waiting for news; that they are cut off is no error.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        await super().shutdown(sockets)

    async def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + self._options.drain_s
        await self._api.scheduler.drain(self._options.drain_s)
        while self._chat.decoding[2] and loop.time() < end:  # the page's answers
            await asyncio.sleep(0.05)


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1" if host == "0.0.0.0" else "::1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def login_of(text: str | None) -> tuple[str, str] | None:
    """USER:PASSWORD as a pair; raises ConfigError when it is neither that nor None."""
    if text is None:
        return None
    user, colon, password = text.partition(":")
    if not (colon and user and password):
        raise ConfigError("--auth must be USER:PASSWORD.")
    return user, password


def options_of(args: Any) -> LaunchOptions:
    """The options of `fluxchat web`; secrets may come from FLUXCHAT_AUTH and FLUXCHAT_API_KEY instead.

    Raises ConfigError.
    """
    if min(args.parallel, args.upload_mib) < 1 or min(args.queue, args.cache_mib) < 0:
        raise ConfigError(
            "--parallel and --upload-mib must be at least 1, --queue and --cache-mib at least 0."
        )
    if not 0 <= args.port < 65536:
        raise ConfigError(f"A port lies between 0 and 65535: --port cannot be {args.port}.")
    options = LaunchOptions(
        host=args.host,
        port=args.port,
        credentials=Credentials(
            args.api_key or os.environ.get("FLUXCHAT_API_KEY") or None,
            login_of(args.auth or os.environ.get("FLUXCHAT_AUTH") or None),
        ),
        server=ServerSettings(
            slots=args.parallel,
            queue=args.queue,
            media_root=None if args.media_root is None else Path(args.media_root),
            url_hosts=tuple(args.allow_url_host),
            upload_mib=args.upload_mib,
        ),
        hosts=tuple(args.allow_host),
        mcp=args.mcp,
        browser=args.browser,
    )
    options.check()
    return options
