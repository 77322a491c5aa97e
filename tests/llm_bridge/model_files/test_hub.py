"""Models from the hub, against a hub of our own: the size first, then the files; faults are sentences."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests import ROOT, tiny_video_models

COMMIT = "a" * 40
CLIP = ROOT / "app" / "pretrained" / "examples" / "flying-saucer-left.mp4"


class Hub(BaseHTTPRequestHandler):
    """The few routes of huggingface.co that a download uses."""

    folder: Path

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = self.path.split("?")[0]
        if "gated/model" in path:
            self._send(403, b"{}", {"X-Error-Code": "GatedRepo"}, body)
        elif "tiny/smol" not in path:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
        elif path.startswith("/api/models/tiny/smol/tree"):
            rows = [
                {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": _etag(f)}
                for f in self._files()
            ]
            self._send(200, json.dumps(rows).encode(), {"Content-Type": "application/json"}, body)
        elif path.startswith("/api/models/tiny/smol"):
            rows = [{"rfilename": f.name, "size": f.stat().st_size} for f in self._files()]
            info = {"id": "tiny/smol", "sha": COMMIT, "siblings": rows}
            self._send(200, json.dumps(info).encode(), {"Content-Type": "application/json"}, body)
        else:
            file = self.folder / path.rsplit("/", 1)[1]
            if file.is_file():
                self._send(200, file.read_bytes(), {"ETag": f'"{_etag(file)}"'}, body)
            else:
                self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"}, body)

    def _files(self) -> list[Path]:
        return sorted(file for file in self.folder.iterdir() if file.is_file())

    def _send(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in (headers | {"X-Repo-Commit": COMMIT, "Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


def _etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    Hub.folder = tiny_video_models.make(tmp_path_factory.mktemp("hub") / "smol", "smolvlm")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def environment_of(hub: str, home: Path, *, offline: bool = False) -> dict[str, str]:
    return os.environ | {
        "HF_ENDPOINT": hub,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1" if offline else "0",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }


def ask(hub: str, home: Path, model: str, *, offline: bool = False) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "app", "ask", str(CLIP), "What is it?", "--model", model]
    return subprocess.run(
        [*command, "--budget", "32", "--max-new-tokens", "4"],
        capture_output=True,
        text=True,
        env=environment_of(hub, home, offline=offline),
        cwd=ROOT,
    )


@pytest.mark.slow
def test_a_model_is_downloaded_once_and_its_size_said_first(hub: str, tmp_path: Path) -> None:
    first = ask(hub, tmp_path, "tiny/smol")
    assert first.returncode == 0, first.stderr
    size = sum(file.stat().st_size for file in Hub.folder.iterdir())
    assert f"Downloading tiny/smol, {size / 1e9:.2f} GB, once." in first.stderr
    again = ask(hub, tmp_path, "tiny/smol", offline=True)
    assert again.returncode == 0, again.stderr
    assert "Downloading" not in again.stderr
    assert again.stdout == first.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "offline", "words"),
    [
        ("no/model", False, "no model of that name on the hub"),
        ("gated/model", False, "accept its terms at https://huggingface.co/gated/model"),
        ("tiny/smol", True, "cannot be reached to download it"),
    ],
)
def test_what_cannot_be_had_is_one_sentence(
    hub: str, tmp_path: Path, model: str, offline: bool, words: str
) -> None:
    done = ask(hub, tmp_path, model, offline=offline)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


SERVED = """
from llm_bridge.llm import load_llm
loaded = load_llm("tiny/smol", engine="http://127.0.0.1:9", on_download=lambda *told: print(*told))
print(tuple(loaded.model.get_input_embeddings().weight.shape))
"""


@pytest.mark.slow
def test_for_a_server_elsewhere_the_file_of_the_table_is_downloaded_and_no_other(
    hub: str, llm_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(llm_folder("qwen2"), folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shards = {name: "b" if name == "model.embed_tokens.weight" else "a" for name in weights}
    for shard in "ab":
        own = {name: value for name, value in weights.items() if shards[name] == shard}
        save_file(own, folder / f"{shard}.safetensors")
    index = {"metadata": {}, "weight_map": {name: f"{shard}.safetensors" for name, shard in shards.items()}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    monkeypatch.setattr(Hub, "folder", folder)
    done = subprocess.run(
        [sys.executable, "-c", SERVED],
        capture_output=True,
        text=True,
        env=environment_of(hub, tmp_path / "home"),
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    size = (folder / "b.safetensors").stat().st_size
    shape = tuple(weights["model.embed_tokens.weight"].shape)
    assert done.stdout.splitlines() == [f"tiny/smol {size}", str(shape)]
    assert not list((tmp_path / "home").rglob("a.safetensors"))
