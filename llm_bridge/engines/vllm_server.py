"""A vLLM server for one language model, started here and ended with the block, or with this process.

with VllmServer("Qwen/Qwen2.5-7B-Instruct") as server:
    engine = VllmEngine(llm, [server.address])
"""

from __future__ import annotations

import atexit
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from types import TracebackType

from encoder.errors import ConfigError, ModelError
from llm_bridge.engines import ended_with
from llm_bridge.openmp import WAITING

PATIENCE_S = 1800.0  # a large model is downloaded first
ENDED_S = 20.0  # what a server may take to end
TOLD_S = 2.0
# What holds answers to schemas here too; vLLM's own choice lets them run on in blanks.
SCHEMAS = ("--structured-outputs-config", '{"backend": "guidance"}')


class VllmServer:
    """Starts `python -m vllm.entrypoints.openai.api_server`; ready when made, ended by `close`.

    model: folder or hub id of a language model. python: an interpreter that has vLLM. port: 0 takes a free
    one. dtype: as vLLM names it. options: more of its own. Raises ConfigError where vLLM is not installed,
    ModelError with vLLM's own last words where it does not start.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        python: str = sys.executable,
        port: int = 0,
        dtype: str = "auto",
        options: Sequence[str] = (),
    ) -> None:
        check_vllm_installed(python)
        port = port or _free_port()
        self.address = f"http://127.0.0.1:{port}"
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open as long as the server runs
        command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", dtype, "--enable-prompt-embeds"]
        command += ["--enable-prefix-caching", "--enable-prompt-tokens-details", *SCHEMAS, *options]
        self.process = subprocess.Popen(
            # Through a process that looks whether this one still runs: what is killed ends nothing itself.
            [python, "-I", ended_with.__file__, str(os.getpid()), *command],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # with the processes that it starts, it is ended as one
            env={**WAITING, **os.environ},
        )
        self._at_close: list[Callable[[], object]] = []
        atexit.register(self.close)
        try:
            self._wait(str(model))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> VllmServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def at_close(self, act: Callable[[], object]) -> None:
        """What is done once the server has ended."""
        self._at_close.append(act)

    def close(self) -> None:
        """End the server and the processes that it started; a second time does nothing."""
        if self._log.closed:
            return
        atexit.unregister(self.close)
        for sign in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, sign)
            except (ProcessLookupError, PermissionError):
                break
            try:
                self.process.wait(ENDED_S)
            except subprocess.TimeoutExpired:
                continue
        self.process.wait()
        self._log.close()
        while self._at_close:
            self._at_close.pop()()

    def _wait(self, model: str) -> None:
        begun = told = time.monotonic()
        while self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.address}/health", timeout=2):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
            now = time.monotonic()
            if now - told > TOLD_S and sys.stderr.isatty():
                print(
                    f"\rStarting vLLM for {model}: {now - begun:.0f} s ", end="", file=sys.stderr, flush=True
                )
                told = now
            if now - begun > PATIENCE_S:
                raise ModelError(
                    f"vLLM did not start within {PATIENCE_S / 60:.0f} minutes: {self._last_words()}."
                )
        raise ModelError(f"vLLM did not start for {model}: {self._last_words()}.")

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().splitlines() if line.strip()]
        errors = [line for line in lines if "Error: " in line and "root cause" not in line]
        return (errors or lines or ["it said nothing"])[-1][-300:].rstrip(".")


def check_vllm_installed(python: str) -> None:
    """Raises ConfigError where an interpreter has no vLLM: one sentence."""
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    try:
        tried = subprocess.run([python, "-c", code], stdin=subprocess.DEVNULL, capture_output=True)
    except OSError as error:
        raise ConfigError(
            f"Cannot run {python} ({error.strerror}): name the Python that has vLLM."
        ) from error
    if tried.returncode:
        raise ConfigError(
            f"{python} has no vLLM: install it there (pip install vllm), name another Python with "
            "FLUXCHAT_VLLM_PYTHON, or give the address of a running server."
        )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def default_python() -> str:
    """The interpreter that starts vLLM: FLUXCHAT_VLLM_PYTHON, or this one."""
    return os.environ.get("FLUXCHAT_VLLM_PYTHON") or sys.executable
