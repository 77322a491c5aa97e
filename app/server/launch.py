"""The page and the API on one port, with the locks that belong to them.

    serve(VideoChat(trusted=False, limits=WEB_LIMITS), port=7860)

Bound to this machine unless people must log in. One line on stdout when it is ready, one on stderr that says
what guards it; SIGTERM lets the answers that are being made finish, a second one ends them.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import ipaddress
import logging
import os
import signal
import socket
import sys
import threading
import webbrowser
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from app.chat import VideoChat
from app.scratch import ScratchFolder
from app.server.gradio_mount import mount_page
from app.server.limits import BodyLimits, ConnectionLimits, Connections
from app.server.routes import Server, ServerSettings
from app.server.security.access_control import LOCAL, AccessControl
from app.server.security.authentication import Authenticator, Credentials
from encoder.errors import ConfigError
from encoder.video import confine
from encoder.video.reader import Limits

# What a stranger's upload may cost.
WEB_LIMITS = Limits(
    seconds=20.0, max_pixels=8192 * 4320, max_duration_s=3600.0, max_bytes=200 * 2**20, memory_mib=2048
)
GONE_S = 2.0  # for connections that stay open without a question
STOPPED_S = 0.5  # for answers that were told to stop at once
END_S = 1.5  # from the second signal to the end of the process, whatever its threads do
SWITCH_S = 1e-3  # what a computing thread may keep the event loop waiting, a fifth of Python's own
FILES, SPARE_FILES = 4096, 200  # open files to ask the system for, and those that are no connections


@dataclass(frozen=True)
class LaunchOptions:
    """How to serve. host, port: 0 takes any free port. credentials: who may use it.

    hosts: further names it may be asked by (behind a proxy). proxies: addresses whose X-Forwarded-For is
    believed. connections: bounds on them. public: bind elsewhere without a login, for places that have their
    own, and may show the page in a frame. examples: (file, question) pairs of the page, None for the
    shipped ones. mcp: offer ask and estimate as MCP tools. page: serve the page too. browser: open it.
    drain_s: how long a SIGTERM lets answers go on.
    """

    host: str = "127.0.0.1"
    port: int = 7860
    credentials: Credentials = field(default_factory=Credentials)
    server: ServerSettings = field(default_factory=ServerSettings)
    hosts: tuple[str, ...] = ()
    proxies: tuple[str, ...] = ("127.0.0.1",)
    connections: ConnectionLimits = field(default_factory=ConnectionLimits)
    public: bool = False
    examples: Sequence[tuple[str, str]] | None = None
    mcp: bool = False
    page: bool = True
    browser: bool = False
    drain_s: float = 30.0

    def check(self) -> None:
        """Raises ConfigError for what would be unsafe or cannot work."""
        if not self.local and not self.credentials.needed and not self.public:
            raise ConfigError(
                f"Binding to {self.host} lets others in: add --auth USER:PASSWORD, --api-key KEY or "
                "--api-keys FILE, or stay on 127.0.0.1."
            )
        if self.server.media_root is not None and not self.server.media_root.is_dir():
            raise ConfigError(f"The media root {self.server.media_root} is not a folder.")
        if self.mcp and importlib.util.find_spec("mcp") is None:
            raise ConfigError("--mcp needs the mcp extra: pip install 'fluxchat[mcp]'.")

    @property
    def local(self) -> bool:
        """Whether only this machine can connect."""
        if self.host in LOCAL:
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:  # a name says nothing about where it leads
            return False


def make_app(chat: VideoChat, options: LaunchOptions) -> FastAPI:
    """Page and API as one ASGI application; `app.state.server` is the API's Server.

    Raises ConfigError.
    """
    options.check()
    authenticator = Authenticator(options.credentials)
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
    app.state.server, app.state.sessions = server, None
    server.install(app)
    if options.page:
        app = mount_page(app, chat, server, options)
    hosts = (*LOCAL, *options.hosts) if options.local else options.hosts or None
    app.add_middleware(BodyLimits, limit=options.server.bodies_mib * 2**20, uploads=options.server.uploads)
    app.add_middleware(
        AccessControl,
        authenticator=authenticator,
        hosts=hosts,
        framed=options.public,
        closing=lambda: server.scheduler.draining,
    )
    if options.credentials.needed:
        keys, metrics = authenticator.keys, server.metrics
        metrics.counter("fluxchat_key_requests_total", "Requests by key.", keys.requests, "key")
        metrics.counter(
            "fluxchat_key_refused_total", "Requests past a key's rate or quota.", keys.refusals, "key"
        )
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
    """Serve until SIGTERM or Ctrl-C; a second one ends the process within 2 s, whatever its threads do.

    listener: a socket of `bind`, when it was wanted before the model. Raises ConfigError, before it starts.
    """
    options.check()
    listener = listener or bind(options.host, options.port)
    files = _more_files()
    if files is not None:
        total = max(32, min(options.connections.total, files - SPARE_FILES))
        options = replace(options, connections=replace(options.connections, total=total))
    sys.setswitchinterval(SWITCH_S)
    confine.hide_memory()  # keys and other people's questions
    with contextlib.suppress(KeyboardInterrupt), _own_uploads() as tidy:
        server = make_server(chat, options, listener)
        server.ends_with = tidy
        server.run([listener])
        if server.force_exit:  # Python's own end would wait for threads and take a model's memory apart
            server.end(server.status)


@contextlib.contextmanager
def _own_uploads() -> Iterator[Callable[[], None]]:
    """A folder for uploads to the page, unless one is given: gradio's is shared by all its programs.

    Gives what deletes it, for a process that ends at once.
    """
    if "GRADIO_TEMP_DIR" in os.environ:
        yield lambda: None
        return
    scratch = ScratchFolder("page")
    os.environ["GRADIO_TEMP_DIR"] = scratch.path
    try:
        yield scratch.remove
    finally:
        del os.environ["GRADIO_TEMP_DIR"]
        scratch.remove()


def _more_files() -> int | None:
    """Ask for more open files, each connection being one; how many there may be, None where nobody says."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= FILES:
        return FILES
    wanted = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (ValueError, OSError):
        return int(soft)
    return int(wanted)


def make_server(chat: VideoChat, options: LaunchOptions, listener: socket.socket) -> _Server:
    """What `serve` runs; its `run([listener])` may be called in another thread, and `should_exit` ends it."""
    app = make_app(chat, options)
    connections = Connections(options.connections, options.proxies)
    app.state.server.metrics.gauge("fluxchat_connections", "Open connections.", lambda: len(connections))
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=max(1, round(GONE_S)),
        http=connections.protocol,  # type: ignore[arg-type]
        ws="none",
        forwarded_allow_ips=",".join(options.proxies),
    )
    return _Server(config, app, chat, options, listener, connections)


class _Server(uvicorn.Server):
    """uvicorn that says when it is ready and drains when told to end; a second signal ends it at once.

    ends_with: set when the process is the server's own, so that it may be ended: what must be done before.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        app: FastAPI,
        chat: VideoChat,
        options: LaunchOptions,
        listener: socket.socket,
        connections: Connections,
    ) -> None:
        super().__init__(config)
        self._app, self._chat, self._options, self._listener = app, chat, options, listener
        self._api: Server = app.state.server
        self._connections = connections
        self.ends_with: Callable[[], None] | None = None
        self.status = 0  # the process's, when it was told twice to end

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        address = _address(self._listener)
        print(f"FluxChat is ready at {address}", flush=True)
        decoders = await asyncio.to_thread(confine.report)
        print(guard_line(self._options, f"decoders of uploads: {decoders}"), file=sys.stderr, flush=True)
        if self._options.browser:
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()

    async def on_tick(self, counter: int) -> bool:
        if counter % 10 == 0:  # once a second
            self._connections.sweep()
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit and not self.force_exit:
            self.force_exit, self.status = True, 128 + sig
            self._end_in(END_S, 128 + sig)
        self.should_exit = True  # not passed on to uvicorn, which would raise the signal again at the end

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        draining = asyncio.ensure_future(self._drain())
        while not draining.done() and not self.force_exit:
            await asyncio.sleep(0.05)
        draining.cancel()
        self._api.scheduler.close()
        if self._app.state.sessions is not None:
            threading.Thread(target=self._app.state.sessions.close_all, daemon=True).start()
        loop = asyncio.get_running_loop()
        end = loop.time() + (STOPPED_S if self.force_exit else GONE_S)
        while self._busy and loop.time() < end:
            await asyncio.sleep(0.02)
        self._api.scheduler.abandon()
        if self._busy:  # a thread that cannot be stopped must not keep the process
            self._end_in(GONE_S + END_S, 1)
        await asyncio.sleep(0.05)
        # What is still open now are pages waiting for news; that they are cut off is no error.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        await super().shutdown(sockets)
        if self.force_exit:  # uvicorn leaves out the application's own end then
            self._api.close()

    async def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + self._options.drain_s
        await self._api.scheduler.drain(self._options.drain_s)
        while self._chat.decoding[2] and loop.time() < end:  # the page's answers
            await asyncio.sleep(0.05)

    @property
    def _busy(self) -> bool:
        return self._api.scheduler.running > 0 or self._chat.decoding[2] > 0

    def _end_in(self, seconds: float, status: int) -> None:
        """End the process then, if it is still there and ours."""
        if self.ends_with is None:
            return
        timer = threading.Timer(seconds, self.end, [status])
        timer.daemon = True
        timer.start()

    def end(self, status: int) -> None:
        """End the process now, with its decoders and folders, if it is ours."""
        if self.ends_with is None:
            return
        self._api.store.close()
        self.ends_with()
        _kill_children()
        os._exit(status)


def _kill_children() -> None:
    """Decoders of this process must not outlive it."""
    with contextlib.suppress(Exception):  # the process ends whatever happens
        import psutil

        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.send_signal(signal.SIGKILL)


def guard_line(options: LaunchOptions, *notes: str) -> str:
    """What guards this server, in one line; notes: more of it."""
    who = f"asks for {options.credentials}" if options.credentials.needed else str(options.credentials)
    where = "only this machine can connect" if options.local else f"bound to {options.host}"
    return "FluxChat: " + "; ".join((who, where, *notes)) + "."


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
    if min(args.parallel, args.upload_mib, args.store_mib) < 1 or min(args.queue, args.cache_mib) < 0:
        raise ConfigError(
            "--parallel, --upload-mib and --store-mib must be at least 1, --queue and --cache-mib at least 0."
        )
    if min(args.max_connections, args.connections_per_address) < 1:
        raise ConfigError("--max-connections and --connections-per-address must be at least 1.")
    if not 0 <= args.port < 65536:
        raise ConfigError(f"A port lies between 0 and 65535: --port cannot be {args.port}.")
    options = LaunchOptions(
        host=args.host,
        port=args.port,
        credentials=Credentials(
            args.api_key or os.environ.get("FLUXCHAT_API_KEY") or None,
            login_of(args.auth or os.environ.get("FLUXCHAT_AUTH") or None),
            None if args.api_keys is None else Path(args.api_keys),
        ),
        server=ServerSettings(
            slots=args.parallel,
            queue=args.queue,
            media_root=None if args.media_root is None else Path(args.media_root),
            url_hosts=tuple(args.allow_url_host),
            upload_mib=args.upload_mib,
            store_mib=max(args.store_mib, args.upload_mib),
        ),
        hosts=tuple(args.allow_host),
        proxies=tuple(args.proxy),
        connections=ConnectionLimits(args.max_connections, args.connections_per_address),
        mcp=args.mcp,
        browser=args.browser,
    )
    options.check()
    Authenticator(options.credentials)  # a file of keys that is wrong is said before the model is loaded
    return options
