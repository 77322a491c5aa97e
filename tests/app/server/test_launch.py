"""`fluxchat web` as people start it: real processes, one line, signals, refusals; the page's own API."""

from __future__ import annotations

import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from gradio_client import Client, handle_file

from app.chat import VideoChat
from app.cli import build_parser, main
from app.server.options import WEB_LIMITS, LaunchOptions, options_from_args, parse_login
from app.server.security.authentication import Credentials
from encoder.errors import ConfigError
from encoder.video import confine
from llm_bridge.model import VideoLanguageModel
from tests.app.server.serving import answer, ask, running
from tests.encoder.video import video_files as vf
from tests.patience import PATIENCE_S, until

READY = re.compile(r"FluxChat is ready at (http://127\.0\.0\.1:\d+)\n")


@pytest.fixture(scope="module")
def folder(tiny_model: VideoLanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model, where a training stage would put it."""
    made = tmp_path_factory.mktemp("stage")
    tiny_model.save_pretrained(made / "model")
    return made


@contextmanager
def web(
    *args: object, before: Callable[[], object] | None = None, **env: str
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """(process, address) of a `fluxchat web` that is ready. before: called in the process first."""
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "app",
        "web",
        "--no-browser",
        "--port",
        "0",
        *map(str, args),
    ]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **env},
        preexec_fn=before,
    )
    assert process.stdout is not None
    lines: queue.Queue[str] = queue.Queue()
    threading.Thread(target=lambda: lines.put(process.stdout.readline()), daemon=True).start()  # type: ignore[union-attr]
    try:
        line = lines.get(timeout=PATIENCE_S)
        found = READY.fullmatch(line)
        assert found is not None, (line, process.poll())
        yield process, found[1]
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """(exit status, what else it printed, errors)"""
    out, errors = process.communicate(timeout=PATIENCE_S)
    return process.returncode, out, errors


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_one_line_then_answers_and_a_signal_drains(folder: Path, tmp_path: Path, name: str) -> None:
    video = vf.write(tmp_path / "v.mp4", vf.steady(10))
    with (
        web("--projector", folder, "--media-root", tmp_path, TMPDIR=str(tmp_path)) as (process, address),
        ThreadPoolExecutor(1) as pool,
        # An open page.
        httpx.stream("GET", f"{address}/gradio_api/heartbeat/abc") as heartbeat,
    ):
        assert heartbeat.status_code == 200
        assert httpx.get(f"{address}/healthz").json() == {"status": "ok"}
        assert "fluxchat-question" in httpx.get(f"{address}/config").text
        expected = answer(ask(address, "What?", "v.mp4", max_tokens=200, temperature=0.5, seed=1))
        assert len(list(tmp_path.glob("fluxchat-files-*"))) == 1
        until(lambda: "fluxchat_running 0" in httpx.get(f"{address}/metrics").text)
        late = pool.submit(ask, address, "What?", "v.mp4", max_tokens=200, temperature=0.5, seed=1)
        while "fluxchat_running 1" not in httpx.get(f"{address}/metrics").text and not late.done():
            time.sleep(0.01)
        process.send_signal(getattr(signal, name))
        if name == "SIGHUP":  # bash sends it, and the kernel does
            time.sleep(0.05)
            process.send_signal(signal.SIGHUP)
        assert answer(late.result()) == expected
        status, out, errors = ended(process)
    assert (status, out) == (0, "")
    decoders = f"decoders of uploads: {confine.report()}"
    assert errors == f"FluxChat: nobody has to log in; only this machine can connect; {decoders}.\n"
    assert [path.name for path in tmp_path.glob("fluxchat-*")] == []
    assert video.exists()


@pytest.mark.slow
def test_nohup_keeps_it(folder: Path) -> None:
    with web("--model", folder, before=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) as (
        process,
        address,
    ):
        process.send_signal(signal.SIGHUP)
        assert httpx.get(f"{address}/v1/models").status_code == 200
        process.send_signal(signal.SIGTERM)
        assert ended(process)[0] == 0


def test_secrets_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    args = build_parser().parse_args(["web", "--host", "0.0.0.0"])
    with pytest.raises(ConfigError, match="--api-key"):
        options_from_args(args)
    monkeypatch.setenv("FLUXCHAT_API_KEY", "k")
    monkeypatch.setenv("FLUXCHAT_AUTH", "ann:secret")
    assert options_from_args(args).credentials == Credentials("k", ("ann", "secret"))


@pytest.mark.slow
def test_a_process_with_secrets_of_the_environment_ends_by_ctrl_c(folder: Path) -> None:
    secrets = {"FLUXCHAT_API_KEY": "k", "FLUXCHAT_AUTH": "ann:secret"}
    with web("--model", folder, "--host", "0.0.0.0", **secrets) as (process, address):
        assert httpx.get(f"{address}/v1/models").status_code == 401
        assert httpx.get(f"{address}/v1/models", headers={"Authorization": "Bearer k"}).status_code == 200
        assert httpx.get(f"{address}/config").status_code == 401
        # Bound to all addresses, it is asked for by any name.
        assert httpx.get(f"{address}/healthz", headers={"Host": "chat.example"}).status_code == 200
        process.send_signal(signal.SIGINT)
        status, out, errors = ended(process)
    assert (status, out) == (0, "")
    decoders = f"decoders of uploads: {confine.report()}"
    assert errors == f"FluxChat: asks for an API key or a login; bound to 0.0.0.0; {decoders}.\n"


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (["--host", "0.0.0.0"], "add --auth USER:PASSWORD"),
        (["--host", "::"], "add --auth USER:PASSWORD"),
        (["--auth", "nobody"], "must be USER:PASSWORD"),
        (["--media-root", "nowhere"], "not a folder"),
        (["--port", "99999"], "--port cannot be 99999"),
        (["--api-keys", "nowhere"], "cannot be read"),
        (["--api-keys", __file__], "Line 1 of"),
        (["--max-connections", "0"], "must be at least 1"),
        (["--store-mib", "0"], "must be at least 1"),
        (["--model", "nowhere"], "not a FluxChat model"),
    ],
)
def test_invalid_options_are_refused(args: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["web", "--port", "0", *args]) == 2
    out, errors = capsys.readouterr()
    assert out == ""
    assert len(errors.splitlines()) == 1
    assert word in errors


def test_a_port_in_use_is_one_line_before_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("app.chat.VideoChat.__init__", lambda *_, **__: pytest.fail("the model was loaded"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["web", "--port", str(taken.getsockname()[1])]) == 2
    out, errors = capsys.readouterr()
    assert (out, len(errors.splitlines())) == ("", 1)
    assert "choose another --port" in errors


def test_options_in_python() -> None:
    with pytest.raises(ConfigError):
        LaunchOptions(host="192.168.0.1").check()
    LaunchOptions(host="192.168.0.1", credentials=Credentials(login=("a", "b"))).check()
    LaunchOptions(host="0.0.0.0", public=True).check()
    LaunchOptions(host="0.0.0.0", credentials=Credentials("key")).check()
    assert parse_login("a:b:c") == ("a", "b:c")
    assert parse_login(None) is None


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["web", "--help"])
    text = capsys.readouterr().out
    for word in (
        "--no-browser",
        "--media-root",
        "--quantize 4bit",
        "curl",
        "token_budget",
        "FLUXCHAT_AUTH",
        "sha256:",
    ):
        assert word in text


@pytest.mark.slow
def test_gradio_client_asks_and_estimates(tiny_model: VideoLanguageModel, tmp_path: Path) -> None:
    video = vf.write(tmp_path / "v.mp4", vf.steady(10))
    with (
        VideoChat(tiny_model, trusted=False, limits=WEB_LIMITS) as chat,
        running(chat, LaunchOptions(examples=[])) as (address, _),
    ):
        client = Client(address, verbose=False, download_files=tmp_path)
        text, facts = client.predict(handle_file(str(video)), "What moves?", "32", api_name="/ask")
        with VideoChat(tiny_model) as alone:
            assert text == alone.ask(video, "What moves?", budget=32).text
        assert facts["usage"]["kept_tokens"] == 32
        price = client.predict(handle_file(str(video)), "16", api_name="/estimate")
        assert price["kept_tokens"] == 16
        assert price["first_token_s"] > 0
        bad = tmp_path / "bad.mp4"
        bad.write_bytes(b"nothing" * 100)
        with pytest.raises(Exception, match="Cannot read"):
            client.predict(handle_file(str(bad)), "", api_name="/estimate")
        names = set(client.view_api(return_format="dict")["named_endpoints"])
        assert names == {"/ask", "/estimate"}
        client.close()
