"""Options of `fluxchat web`: from the command line and the environment, checked for safety."""

from __future__ import annotations

import importlib.util
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.library.library import Library
from app.server.limits import WEB_LIMITS, ConnectionLimits
from app.server.routes import ServerSettings
from app.server.security.access_control import LOCAL
from app.server.security.authentication import Authenticator, Credentials
from encoder.errors import ConfigError

__all__ = ["WEB_LIMITS", "LaunchOptions", "access_summary", "options_from_args", "parse_login"]


@dataclass(frozen=True)
class LaunchOptions:
    """How to serve. host, port: 0 takes any free port. credentials: who may use it.

    hosts: further host names that requests may carry (behind a proxy). proxies: addresses whose
    X-Forwarded-For is trusted. connections: limits on them. public: bind to other addresses without
    credentials, and allow framing, where another system controls access. examples: (file, question) pairs
    of the page, None for the shipped ones. mcp: offer ask and estimate as MCP tools. page: serve the
    page too. library: every visitor may search it on the page. browser: open the page. drain_s: how long
    answers may go on after SIGTERM.
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
    library: Library | None = None
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
    def for_one(self) -> bool:
        """Whether it serves the person at this machine alone: nobody logs in, no other name leads here."""
        return self.local and not (self.credentials.needed or self.public or self.hosts)

    @property
    def local(self) -> bool:
        """Whether only this machine can connect."""
        if self.host in LOCAL:
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:  # a name says nothing about where it leads
            return False


def parse_login(text: str | None) -> tuple[str, str] | None:
    """USER:PASSWORD as a pair; raises ConfigError when it is neither that nor None."""
    if text is None:
        return None
    user, colon, password = text.partition(":")
    if not (colon and user and password):
        raise ConfigError("--auth must be USER:PASSWORD.")
    return user, password


def options_from_args(args: Any) -> LaunchOptions:
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
            parse_login(args.auth or os.environ.get("FLUXCHAT_AUTH") or None),
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
        library=None if args.library is None else Library(args.library, device=args.device),
        browser=args.browser,
    )
    options.check()
    # These report what is wrong before the model is loaded.
    Authenticator(options.credentials)
    if options.library is not None:
        options.library.ready()
    return options


def access_summary(options: LaunchOptions, *notes: str) -> str:
    """One line about who can connect and which credentials are needed; notes: appended."""
    credentials = (
        f"asks for {options.credentials}" if options.credentials.needed else str(options.credentials)
    )
    binding = "only this machine can connect" if options.local else f"bound to {options.host}"
    return "FluxChat: " + "; ".join((credentials, binding, *notes)) + "."
