"""A server under mixed load for minutes: does its memory stay flat, does it leave anything behind?

    python -m tests.bench.soak [--clients 8] [--seconds 240] [--model DIR] [--smallest]

Starts `fluxchat web` (a tiny model unless one is given) with two API keys and a temporary folder of its own.
The clients send whole and streamed questions, broken-off ones, uploads by every door, rubbish, questions
through the page's API, requests of other sites' pages, wrong and worn-out keys. Beside them, /healthz is
asked ten times a second. Memory is that of the server and its children. Prints one JSON line; exit status 1
when memory grew by more than 10 % after the warm-up (the first third), an answer was wrong, /healthz took
more than a second, or a process or a file stayed behind.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
from gradio_client import Client, handle_file

from encoder.config import MICRO
from encoder.fluxvit import FluxViT
from llm_bridge.model import VLMConfig, assemble
from llm_bridge.projector import ProjectorConfig
from tests import tiny_llms
from tests.app.server.serving import answer, ask, question, upload
from tests.bench.common import arguments, environment, print_json
from tests.encoder.video import video_files as vf

KINDS = ("whole", "stream", "broken off", "upload", "rubbish", "page", "page upload", "foreign", "keys")
KEY, WORN = "the-clients-key", "a-key-of-few-requests"
HEADERS = {"Authorization": f"Bearer {KEY}"}
HEALTH_S = 1.0  # /healthz answers within
GROWTH = 0.10
GONE_S = 15.0  # for what is still being cleaned up


def tiny_model(folder: Path) -> Path:
    """A small saved model."""
    encoder = MICRO.replace(embed_dim=32, depth=2, num_heads=2, pool_heads=2, clip_embed_dim=16)
    llm = str(tiny_llms.make(folder / "llm", "qwen2"))
    config = VLMConfig(llm=llm, projector=ProjectorConfig(32, 64), encoder=encoder, default_tokens=32)
    torch.manual_seed(0)
    assemble(config, FluxViT(encoder), None, device="cpu", dtype=torch.float32).save_pretrained(
        folder / "model"
    )
    return folder / "model"


class Load:
    """What the clients do, and whether the answers were right."""

    def __init__(self, address: str, videos: list[Path]) -> None:
        self.address, self.videos = address, videos
        self.done: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.stop = threading.Event()
        self.expected = {
            video.name: answer(ask(address, "What?", video.name, headers=HEADERS, max_tokens=8))
            for video in videos
        }

    def client(self, seed: int) -> None:
        """One client until `stop`."""
        chance = random.Random(seed)
        page = Client(self.address, headers=HEADERS, verbose=False)
        while not self.stop.is_set():
            kind, video = chance.choice(KINDS), chance.choice(self.videos)
            try:
                getattr(self, kind.replace(" ", "_"))(video, chance, page)
                self.done[kind] += 1
            except Exception as error:  # noqa: BLE001 - a soak reports, it does not end
                self.wrong.append(f"{kind}: {error!r}"[:300])
        page.close()

    def whole(self, video: Path, chance: random.Random, _: Client) -> None:
        """One question, one object."""
        user = f"user {chance.randrange(8)}"
        self._check(video, answer(self._ask(video.name, max_tokens=8, user=user)))

    def stream(self, video: Path, *_: Any) -> None:
        """The same as events."""
        response = self._ask(video.name, max_tokens=8, stream=True)
        if not response.text.endswith("data: [DONE]\n\n"):
            self.wrong.append(f"stream: {response.text[-200:]}")

    def broken_off(self, video: Path, chance: random.Random, _: Client) -> None:
        """A client that leaves in the middle of a long answer."""
        body = question("Describe it!", video.name, max_tokens=400, stream=True, temperature=1.0)
        url = f"{self.address}/v1/chat/completions"
        with httpx.stream("POST", url, json=body, headers=HEADERS, timeout=60) as response:
            for _, _line in zip(range(chance.randrange(1, 8)), response.iter_lines(), strict=False):
                pass

    def upload(self, video: Path, *_: Any) -> None:
        """An upload, a question about it, and its end."""
        file = upload(self.address, video, **HEADERS)
        self._check(video, answer(self._ask(file, max_tokens=8)))
        httpx.delete(f"{self.address}/v1/files/{file}", headers=HEADERS, timeout=60).raise_for_status()

    def rubbish(self, _: Path, chance: random.Random, __: Client) -> None:
        """What cannot be decoded."""
        files = {"file": ("x.mp4", chance.randbytes(chance.randrange(1, 100_000)))}
        url = f"{self.address}/v1/files"
        status = httpx.post(url, files=files, headers=HEADERS, timeout=60).status_code
        if status != 400:
            self.wrong.append(f"rubbish: {status}")

    def page(self, video: Path, _: random.Random, page: Client) -> None:
        """The page's own API."""
        text, facts = page.predict(handle_file(str(video)), "What?", "32", api_name="/ask")
        if not text or facts["usage"]["kept_tokens"] != 32:
            self.wrong.append(f"page: {facts}")

    def page_upload(self, video: Path, chance: random.Random, _: Client) -> None:
        """An upload to the page that is looked at again, and one that is cut off."""
        url, files = f"{self.address}/gradio_api/upload", {"files": (video.name, video.read_bytes())}
        [path] = httpx.post(url, files=files, headers=HEADERS, timeout=60).json()
        got = httpx.get(f"{self.address}/gradio_api/file={path}", headers=HEADERS, timeout=60)
        if got.content != files["files"][1]:
            self.wrong.append(f"page upload: {got.status_code}")

        def cut() -> Iterator[bytes]:
            yield b'--b\r\nContent-Disposition: form-data; name="files"; filename="x"\r\n\r\n'
            yield chance.randbytes(chance.randrange(1, 500_000))
            raise BrokenPipeError

        headers = {**HEADERS, "Content-Type": "multipart/form-data; boundary=b"}
        with contextlib.suppress(BrokenPipeError):
            httpx.post(url, content=cut(), headers=headers, timeout=60)

    def foreign(self, _: Path, chance: random.Random, __: Client) -> None:
        """What a page of another site makes a browser send."""
        path = chance.choice(("/v1/files", "/gradio_api/upload", "/gradio_api/queue/join", "/v1/models"))
        headers = {**HEADERS, "Origin": "http://evil.example", "Content-Type": "text/plain"}
        status = httpx.post(f"{self.address}{path}", content=b"{}", headers=headers, timeout=60).status_code
        if status != 403:
            self.wrong.append(f"foreign: {path} {status}")

    def keys(self, video: Path, chance: random.Random, _: Client) -> None:
        """A wrong key, and one that may ask a few times a minute only."""
        guess = {"Authorization": f"Bearer {chance.random()}", "X-Forwarded-For": _address(chance)}
        status = ask(self.address, "What?", headers=guess, max_tokens=2).status_code
        if status not in (401, 429):
            self.wrong.append(f"a wrong key: {status}")
        worn = {"Authorization": f"Bearer {WORN}"}
        sent = ask(self.address, "What?", headers=worn, max_tokens=2)
        if sent.status_code not in (200, 429) or (
            sent.status_code == 429 and "Retry-After" not in sent.headers
        ):
            self.wrong.append(f"a worn key: {sent.status_code}")

    def watch(self, took: list[float]) -> None:
        """Ask for the server's health until `stop`; how long each answer took."""
        port = int(self.address.rpartition(":")[2])
        while not self.stop.wait(0.1):
            began = time.monotonic()
            connection = HTTPConnection("127.0.0.1", port, timeout=60)  # a new one each time, as probes have
            try:
                connection.request("GET", "/healthz")
                if connection.getresponse().status != 200:
                    self.wrong.append("/healthz is not well")
            except OSError as error:
                self.wrong.append(f"/healthz: {error!r}")
            finally:
                connection.close()
            took.append(time.monotonic() - began)

    def _ask(self, video: str, **options: Any) -> httpx.Response:
        return ask(self.address, "What?", video, headers=HEADERS, **options)

    def _check(self, video: Path, text: str) -> None:
        if text != self.expected[video.name]:
            self.wrong.append(f"{video.name}: {text}")


def _address(chance: random.Random) -> str:
    return ".".join(str(chance.randrange(1, 255)) for _ in range(4))


def memory_mib(process: psutil.Process) -> float:
    """Resident memory of a process and its children."""
    total = 0
    for member in (process, *process.children(recursive=True)):
        try:
            total += member.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total / 2**20


def soak(seconds: float, folder: Path, model: Path | None = None, clients: int = 8) -> dict[str, Any]:
    """Run the load of so many clients; what happened, with `problems`, a list that should be empty."""
    model, media, temp = model or tiny_model(folder), folder / "media", folder / "temp"
    media.mkdir()
    temp.mkdir()
    videos = [vf.write(media / f"{n}.mp4", vf.steady(10 + 5 * n), size=(96 + 16 * n, 64)) for n in range(4)]
    command = [sys.executable, "-W", "ignore", "-m", "app", "web", "--no-browser", "--port", "0"]
    command += ["--model", str(model), "--media-root", str(media), "--cache-mib", "64"]
    keys = folder / "keys"
    keys.write_text(f"clients {KEY}\nworn {WORN} rate=6\n")
    command += ["--api-keys", str(keys)]
    env = {**os.environ, "TMPDIR": str(temp)}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    try:
        assert server.stdout is not None
        load = Load(server.stdout.readline().split()[-1], videos)
        process = psutil.Process(server.pid)
        health: list[float] = []
        threads = [threading.Thread(target=load.client, args=(seed,)) for seed in range(clients)]
        threads.append(threading.Thread(target=load.watch, args=(health,)))
        for thread in threads:
            thread.start()
        samples = []
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(min(1.0, seconds / 40))
            samples.append(memory_mib(process))
        load.stop.set()
        for thread in threads:
            thread.join(120)
        problems = load.wrong[:10]
        left = _settle(lambda: _commands(process))
        problems += [f"a process stayed: {line}" for line in left]
        server.send_signal(signal.SIGTERM)
        status = server.wait(120)
        if status:
            problems.append(f"the server ended with {status}")
        stayed = _settle(lambda: sorted(path.name for path in temp.iterdir()))
        problems += [f"a file stayed: {name}" for name in stayed]
    finally:
        server.kill()
        server.wait()
    third = len(samples) // 3
    early, late = statistics.median(samples[third : 2 * third]), statistics.median(samples[2 * third :])
    if late > (1 + GROWTH) * early:
        problems.append(f"memory grew from {early:.0f} to {late:.0f} MiB")
    if max(health) > HEALTH_S:
        problems.append(f"/healthz took {max(health):.2f} s")
    ordered = sorted(health)
    return {
        "clients": clients,
        "seconds": seconds,
        "healthz_ms": {
            "n": len(ordered),
            "median": round(1e3 * statistics.median(ordered), 1),
            "p99": round(1e3 * ordered[int(0.99 * (len(ordered) - 1))], 1),
            "max": round(1e3 * ordered[-1], 1),
        },
        "done": dict(load.done),
        "memory_mib": {"middle": round(early, 1), "end": round(late, 1), "peak": round(max(samples), 1)},
        "growth": round(late / early - 1, 4),
        "problems": problems,
    }


def _commands(process: psutil.Process) -> list[list[str]]:
    """How the children of a process were started; one that has just ended is none."""
    found = []
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            found.append(child.cmdline()[:3])
    return found


def _settle(look: Any) -> list[Any]:
    """What is still there after a while."""
    end = time.monotonic() + GONE_S
    while (found := look()) and time.monotonic() < end:
        time.sleep(0.2)
    return list(found)


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--clients", type=int, default=8, help="at a time (8)")
    parser.add_argument("--seconds", type=float, default=240, help="of load (240)")
    parser.add_argument("--model", type=Path, help="a saved model (default: a tiny one)")
    args = arguments(parser, argv, clients=2, seconds=4)
    with tempfile.TemporaryDirectory() as folder:
        result = soak(args.seconds, Path(folder), args.model, args.clients)
    print_json({"bench": "soak", **environment(), **result}, smallest=args.smallest)
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
