"""The vLLM engine with a real server: `make vllm`, or where FLUXCHAT_VLLM_PYTHON has vLLM."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import psutil
import pytest
import torch

from encoder.errors import ConfigError, ModelError
from llm_bridge.engines.vllm import VllmEngine
from llm_bridge.engines.vllm_server import VllmServer, default_python
from llm_bridge.llm import LanguageModel, load_llm
from tests import tiny_llms
from tests.llm_bridge.engines.test_vllm import asked, local

PYTHON = os.environ.get("FLUXCHAT_VLLM_PYTHON")
real = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not PYTHON, reason="no vLLM here: make vllm"),
]
OPTIONS = ["--enforce-eager", "--max-model-len", "1024"]
pytestmark = pytest.mark.xdist_group("vllm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # vLLM's attention on CPUs knows heads of 32 and more.
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    return tiny_llms.make(tmp_path_factory.mktemp("tiny"), "qwen2", **sizes)


@pytest.fixture(scope="module")
def llm(folder: Path) -> LanguageModel:
    return load_llm(folder, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[VllmServer]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        with VllmServer(folder, python=default_python(), dtype="float32", options=OPTIONS) as started:
            yield started


@pytest.fixture
def engine(llm: LanguageModel, server: VllmServer) -> Iterator[VllmEngine]:
    made = VllmEngine(llm, [server.address])
    yield made
    made.close()


class TestReal:
    pytestmark = real

    def test_sixteen_at_once_answer_as_the_local_engine(self, llm: LanguageModel, engine: VllmEngine) -> None:
        requests = [asked(llm, clip, max_new_tokens=24) for clip in range(16)]
        requests += [replace(request, first_bias={local(llm, request)[0][0]: -100.0}) for request in requests]
        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(lambda request: list(engine.start(request)), requests))
        assert answers == [local(llm, request)[0] for request in requests]

    def test_answers_follow_a_schema_as_those_of_the_local_engine(
        self, llm: LanguageModel, engine: VllmEngine
    ) -> None:
        properties = {
            "kind": {"enum": ["dog", "cat"]},
            "count": {"type": "integer", "maximum": 9, "minimum": 0},
        }
        schema = {
            "type": "object",
            "properties": properties,
            "required": ["kind", "count"],
            "additionalProperties": False,
        }
        requests = [asked(llm, clip, schema=schema, max_new_tokens=60) for clip in range(4)]
        answers = [list(engine.start(request)) for request in requests]
        assert answers == [local(llm, request)[0] for request in requests]
        for answer in answers:
            found = json.loads(llm.tokenizer.decode(answer))
            assert found["kind"] in ("dog", "cat")
            assert found["count"] in range(10)

    def test_another_question_does_not_prefill_the_video_again(
        self, llm: LanguageModel, engine: VllmEngine
    ) -> None:
        def question(words: str, scope: str = "") -> int:
            embedding = torch.randn(300, llm.hidden_size, generator=torch.Generator().manual_seed(77))
            request = asked(llm, question=words)
            before, after = request.prompt.spans[0][0], sum(request.prompt.spans[0])
            ids = (*request.prompt.ids[:before], *[-1] * 300, *request.prompt.ids[after:])
            visual = replace(request.prompt.visuals[0], tokens=300, key=f"long {scope}")
            prompt = replace(request.prompt, ids=ids, visuals=(visual,), spans=((before, 300),))
            tokens = engine.start(replace(request, prompt=prompt, visuals=[embedding], scope=scope))
            list(tokens)
            return tokens.cached_tokens

        assert question("What is it?") == 0
        assert question("And where?") >= 256
        assert question("And where?", scope="another") == 0

    def test_a_stop_frees_the_server(self, llm: LanguageModel, engine: VllmEngine) -> None:
        request = asked(llm, max_new_tokens=900, min_tokens=900)
        tokens = iter(engine.start(request))
        next(tokens)
        request.stop.set()
        list(tokens)
        running = 1.0
        for _ in range(300):
            lines = httpx.get(f"{engine.addresses[0]}/metrics").text.splitlines()
            running = sum(float(line.split()[-1]) for line in lines if "num_requests_running{" in line)
            if running == 0:
                break
            threading.Event().wait(0.1)
        assert running == 0

    def test_a_question_that_is_too_long_is_one_sentence(
        self, llm: LanguageModel, engine: VllmEngine
    ) -> None:
        with pytest.raises(ModelError, match=r"The vLLM server at \S+ says: [^\n]*1024"):
            list(engine.start(asked(llm, max_new_tokens=5000)))

    def test_an_answer_outlives_its_server(
        self, folder: Path, llm: LanguageModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        settings = {"python": default_python(), "dtype": "float32", "options": OPTIONS}
        first = VllmServer(folder, **settings)  # type: ignore[arg-type]
        engine = VllmEngine(llm, [first.address], patience_s=300.0)
        request = asked(llm, max_new_tokens=200, min_tokens=200)
        tokens = iter(engine.start(request))
        answer = [next(tokens) for _ in range(3)]
        os.killpg(first.process.pid, signal.SIGKILL)
        rest = threading.Thread(target=lambda: answer.extend(tokens))
        rest.start()
        port = int(first.address.rsplit(":", 1)[1])
        first.close()
        with VllmServer(folder, port=port, **settings):  # type: ignore[arg-type]
            rest.join()
        assert answer == local(llm, request)[0]
        engine.close()

    def test_a_folder_without_a_model_is_one_sentence(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="did not start") as raised:
            VllmServer(tmp_path, python=default_python())
        assert "\n" not in str(raised.value)


def test_without_vllm_it_is_one_sentence(folder: Path) -> None:
    with pytest.raises(ConfigError, match="has no vLLM: install it"):
        VllmServer(folder, python=sys.executable)
    with pytest.raises(ConfigError, match="Cannot run"):
        VllmServer(folder, python="/nowhere/python")


FAKE = """
import os, subprocess, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(os.environ["OMP_WAIT_POLICY"].encode())

    def log_message(self, *_):
        pass

computing = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
with open(os.environ["FAKE_PIDS"], "w") as file:
    file.write(f"{os.getpid()} {computing.pid}")
HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""
STARTER = """
import sys, time
from llm_bridge.engines.vllm_server import VllmServer
server = VllmServer("any", python=sys.executable)
print(server.address, flush=True)
time.sleep(600)
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file in which a stand-in for vLLM writes its process id and that of one which it starts."""
    package = tmp_path / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").touch()
    (package / "api_server.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("FAKE_PIDS", str(tmp_path / "pids"))
    yield tmp_path / "pids"
    for pid in map(int, (tmp_path / "pids").read_text().split() if (tmp_path / "pids").exists() else ()):
        if running(pid):  # a test has failed
            os.kill(pid, signal.SIGKILL)


def running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for_end(pids: list[int]) -> bool:
    for _ in range(300):
        if not any(running(pid) for pid in pids):
            return True
        threading.Event().wait(0.1)
    return False


def test_a_server_ends_when_it_is_closed(fake: Path) -> None:
    with VllmServer("any", python=sys.executable) as server:
        pids = [int(pid) for pid in fake.read_text().split()]
        assert all(running(pid) for pid in pids)
        assert httpx.get(f"{server.address}/health").status_code == 200
    assert wait_for_end(pids)


def test_its_threads_sleep_while_they_wait_unless_told_otherwise(
    fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    with VllmServer("any", python=sys.executable) as server:
        assert httpx.get(server.address).text == "passive"
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    with VllmServer("any", python=sys.executable) as server:
        assert httpx.get(server.address).text == "active"


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.slow
def test_a_server_ends_with_the_process_that_started_it(fake: Path, sign: signal.Signals) -> None:
    starter = subprocess.Popen([sys.executable, "-c", STARTER], stdout=subprocess.PIPE)
    assert starter.stdout is not None
    assert starter.stdout.readline().startswith(b"http://")
    pids = [int(pid) for pid in fake.read_text().split()]
    assert all(running(pid) for pid in pids)
    starter.send_signal(sign)
    starter.communicate()
    assert wait_for_end(pids)


def test_what_a_server_said_is_told_where_it_does_not_start(fake: Path, tmp_path: Path) -> None:
    (tmp_path / "vllm" / "entrypoints" / "openai" / "api_server.py").write_text("raise OSError('no room')")
    with pytest.raises(ModelError, match="did not start for any: OSError: no room"):
        VllmServer("any", python=sys.executable)
