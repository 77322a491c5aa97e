"""`fluxchat web`: the ASGI application (API, page, middleware) and the server process.

    serve(VideoChat(trusted=False, limits=WEB_LIMITS), LaunchOptions(port=7860))

Bound to this machine unless credentials are needed. Prints one line on stdout when it is ready, and one on
stderr about its access control. SIGTERM, SIGHUP or Ctrl-C let running answers finish; SIGTERM or
Ctrl-C after that stops them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import webbrowser
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from types import FrameType

import uvicorn
from fastapi import FastAPI

from app.chat import VideoChat
from app.model_slot import ModelSlot
from app.server.gradio_mount import mount_page
from app.server.limits import BodyLimits, Connections
from app.server.options import LaunchOptions, access_summary
from app.server.routes import Api
from app.server.security.access_control import LOCAL, AccessControl
from app.server.security.authentication import Authenticator
from encoder.errors import ConfigError
from encoder.video import confine
from llm_bridge.assets.scratch import ScratchFolder

IDLE_GRACE_S = 2.0  # for idle connections, at shutdown
STOPPED_S = 0.5  # for running answers, after a second signal
END_S = 1.5  # from the second signal to the end of the process, whatever its threads do
SWITCH_S = 1e-3  # thread switch interval: computing threads delay the event loop less than at Python's 5 ms
FILES, SPARE_FILES = 4096, 200  # limit of open files to ask for; those that are not connections


def make_app(chat: VideoChat | ModelSlot, options: LaunchOptions) -> FastAPI:
    """Page and API as one ASGI application; `app.state.api` is its Api.

    chat: in a slot that can, the page offers to load another model where one person alone uses it. Raises
    ConfigError.
    """
    options.check()
    authenticator = Authenticator(options.credentials)
    slot = ModelSlot.of(chat)
    api = Api(slot, options.server, options.library)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        tidying = asyncio.ensure_future(api.tidy())
        try:
            yield
        finally:
            tidying.cancel()
            api.close()

    # FastAPI's own documentation pages load scripts from other hosts.
    app = FastAPI(title="FluxChat", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.api, app.state.sessions = api, None
    api.install(app)
    if options.page:
        app = mount_page(app, slot, api, options)
    hosts = (*LOCAL, *options.hosts) if options.local else options.hosts or None
    app.add_middleware(BodyLimits, limit=options.server.bodies_mib * 2**20, uploads=options.server.uploads)
    app.add_middleware(
        AccessControl,
        authenticator=authenticator,
        hosts=hosts,
        framed=options.public,
        closing=lambda: api.scheduler.draining,
    )
    if options.credentials.needed:
        keys, metrics = authenticator.keys, api.metrics
        metrics.counter("fluxchat_key_requests_total", "Requests by key.", keys.requests, "key")
        metrics.counter(
            "fluxchat_key_refused_total", "Requests past a key's rate or quota.", keys.refusals, "key"
        )
    return app


def bind(host: str, port: int) -> socket.socket:
    """A bound socket; raises ConfigError when the port cannot be bound."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"Cannot listen on {host} port {port} ({reason}): choose another --port."
        ) from error
    return listener


def serve(chat: VideoChat | ModelSlot, options: LaunchOptions, listener: socket.socket | None = None) -> None:
    """Serve until SIGTERM, SIGHUP or Ctrl-C; SIGTERM or Ctrl-C then ends the process within 2 s, whatever its
    threads do.

    listener: a socket of `bind`, to reserve the port before the model is loaded. Raises
    ConfigError, before it starts.
    """
    options.check()
    listener = listener or bind(options.host, options.port)
    files = _raise_file_limit()
    if files is not None:
        total = max(32, min(options.connections.total, files - SPARE_FILES))
        options = replace(options, connections=replace(options.connections, total=total))
    sys.setswitchinterval(SWITCH_S)
    confine.hide_memory()  # keys and clients' questions
    with contextlib.suppress(KeyboardInterrupt), _upload_folder() as tidy:
        server = make_server(chat, options, listener)
        server.before_exit = tidy
        _end_with_the_terminal(server)
        server.run([listener])
        if server.force_exit:  # a normal exit would wait for threads
            server.end(server.status)


def _end_with_the_terminal(server: WebServer) -> None:
    """SIGHUP is as SIGTERM, unless `nohup` has it ignored; a second one cuts no answer.

    A terminal that closes can send two: the shell's and the kernel's.
    """
    hangup = getattr(signal, "SIGHUP", None)  # there is none on Windows
    if hangup is None or threading.current_thread() is not threading.main_thread():
        return

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(hangup, signal.SIG_IGN)
        server.handle_exit(number, frame)

    if signal.getsignal(hangup) is not signal.SIG_IGN:
        signal.signal(hangup, end)


@contextlib.contextmanager
def _upload_folder() -> Iterator[Callable[[], None]]:
    """A folder of this server's own for uploads to the page, unless GRADIO_TEMP_DIR names one.

    Gives the function that deletes it, for a process that exits at once.
    """
    if "GRADIO_TEMP_DIR" in os.environ:
        yield lambda: None
        return
    scratch = ScratchFolder("fluxchat-page-")
    os.environ["GRADIO_TEMP_DIR"] = scratch.path
    try:
        yield scratch.remove
    finally:
        del os.environ["GRADIO_TEMP_DIR"]
        scratch.remove()


def _raise_file_limit() -> int | None:
    """Raise the limit of open files, since each connection is one; the limit, None where there is none."""
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


def make_server(chat: VideoChat | ModelSlot, options: LaunchOptions, listener: socket.socket) -> WebServer:
    """What `serve` runs; its `run([listener])` may be called in another thread, and `should_exit` ends it."""
    slot = ModelSlot.of(chat)
    app = make_app(slot, options)
    connections = Connections(options.connections, options.proxies)
    app.state.api.metrics.gauge("fluxchat_connections", "Open connections.", lambda: len(connections))
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=max(1, round(IDLE_GRACE_S)),
        http=connections.protocol,  # type: ignore[arg-type]
        ws="none",
        forwarded_allow_ips=",".join(options.proxies),
    )
    return WebServer(config, app, slot, options, listener, connections)


class WebServer(uvicorn.Server):
    """uvicorn's server that prints its address, drains on the first signal and exits on the second.

    before_exit: set when the process is the server's own, so that it may be ended: called before it is.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        app: FastAPI,
        slot: ModelSlot,
        options: LaunchOptions,
        listener: socket.socket,
        connections: Connections,
    ) -> None:
        super().__init__(config)
        self._app, self._slot, self._options, self._listener = app, slot, options, listener
        self.api: Api = app.state.api
        self._connections = connections
        self.before_exit: Callable[[], None] | None = None
        self.status = 0  # exit status of the process after a second signal

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        address = _address(self._listener)
        print(f"FluxChat is ready at {address}", flush=True)
        decoders = await asyncio.to_thread(confine.report)
        print(access_summary(self._options, f"decoders of uploads: {decoders}"), file=sys.stderr, flush=True)
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
        self.should_exit = True  # instead of uvicorn's handler, which would raise the signal again at the end

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        draining = asyncio.ensure_future(self._drain())
        while not draining.done() and not self.force_exit:
            await asyncio.sleep(0.05)
        draining.cancel()
        self.api.scheduler.close()
        if self._app.state.sessions is not None:
            threading.Thread(target=self._app.state.sessions.close_all, daemon=True).start()
        loop = asyncio.get_running_loop()
        end = loop.time() + (STOPPED_S if self.force_exit else IDLE_GRACE_S)
        while self._busy and loop.time() < end:
            await asyncio.sleep(0.02)
        self.api.scheduler.abandon()
        if self._busy:  # a thread that cannot be stopped must not keep the process
            self._end_in(IDLE_GRACE_S + END_S, 1)
        await asyncio.sleep(0.05)
        # The connections still open are pages waiting for events; closing them is not an error.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        await super().shutdown(sockets)
        if self.force_exit:  # uvicorn skips the application's lifespan then
            self.api.close()

    async def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + self._options.drain_s
        await self.api.scheduler.drain(self._options.drain_s)
        while self._slot.chat.decoding[2] and loop.time() < end:  # the page's answers
            await asyncio.sleep(0.05)

    @property
    def _busy(self) -> bool:
        return self.api.scheduler.running > 0 or self._slot.chat.decoding[2] > 0

    def _end_in(self, seconds: float, status: int) -> None:
        """End the process after so many seconds, if it is the server's own."""
        if self.before_exit is None:
            return
        timer = threading.Timer(seconds, self.end, [status])
        timer.daemon = True
        timer.start()

    def end(self, status: int) -> None:
        """End the process now, with its decoders and folders, if it is the server's own."""
        if self.before_exit is None:
            return
        self.api.store.close()
        self.before_exit()
        _kill_children()
        os._exit(status)


def _kill_children() -> None:
    """Decoders of this process must not outlive it."""
    with contextlib.suppress(Exception):  # the process exits anyway
        import psutil

        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.send_signal(signal.SIGKILL)


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1" if host == "0.0.0.0" else "::1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
