"""Damaged and hostile files of every kind: each ends in an answer or one sentence, in time, leaving nothing.

    python -m tests.bench.fuzz --files 600 --seed 0       all, and a JSON line; status 1 if anything broke
    python -m tests.bench.fuzz --seed 0 --only 17         one of them again

Small real files are changed (bits, sizes, cuts, splices, repeats, names) and read: videos and pictures by
`probe` and `read_clip`, as the user's own and as a stranger's; model folders, GGUF files and adapters by
`load_llm`; request bodies by the API.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import logging
import os
import random
import shutil
import struct
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from encoder.errors import FluxChatError
from encoder.video import reader
from tests import tiny_llms
from tests.bench.common import arguments, environment, print_json
from tests.encoder.video import video_files as vf

WALL_S = 30.0
GROWTH_MIB = 768.0
KINDS = ("media",) * 14 + ("model",) * 2 + ("gguf", "adapter", "body", "body")
BOUNDARIES = (0, 1, 127, 128, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)
NUMBERS: tuple[Any, ...] = (
    *(0, -1, 1, 2**31, 2**63, 10**30, 1e308, -0.5, "", "x", "\0", "\ud800", None, True, [], {}),
    *([[]] * 2, {"a": {}}, "../../x", "a" * 10_000, float("nan"), float("inf")),
)


class Fuzz:
    """The material, the mutations, and what one file ends in.

    work: an empty folder. Temporary files of what is tested go to `work/tmp`, which must stay empty.
    """

    def __init__(self, work: Path, seed: int, kinds: Sequence[str] = KINDS) -> None:
        self.work, self.seed, self.kinds = work, seed, kinds
        self.tmp = work / "tmp"
        self.tmp.mkdir(parents=True)
        self.media = _media(work)
        self.model = tiny_llms.make(work / "model", "qwen2")
        self.adapter = _adapter(work / "adapter")
        self.gguf = _gguf()
        self.client: Any = None
        self.others = set(_children())  # who runs the fuzz may have children of its own
        self.stores: set[str] = set()
        self.outcomes: Counter[str] = Counter()
        self.violations: list[str] = []
        self.slowest = (0.0, -1, "")

    def run(self, index: int) -> str:
        """Make file `index` of this seed and read it; returns how it ended, and counts it."""
        rng = random.Random(f"{self.seed}/{index}")
        kind = rng.choice(KINDS)
        if kind not in self.kinds:
            return ""
        start = time.monotonic()
        ended = getattr(self, f"_{kind}")(rng)
        took = time.monotonic() - start
        self.slowest = max(self.slowest, (round(took, 2), index, kind))
        faults = [what for what in ended if what.startswith("FAULT")]
        if took > WALL_S:
            faults.append(f"FAULT: took {took:.0f} s")
        faults += self._left_behind()
        self.violations += [f"--seed {self.seed} --only {index} ({kind}): {fault}" for fault in faults]
        for what in ended:
            self.outcomes[f"{kind}: {what.split(':')[0]}"] += 1
        return "; ".join([kind, *ended, *faults])

    def _left_behind(self) -> list[str]:
        """Processes and temporary files that should be gone."""
        faults = []
        reader.close_idle_workers()  # trusted decoders wait some seconds for the next file
        deadline = time.monotonic() + 5
        while (children := set(_children()) - self.others) and time.monotonic() < deadline:
            time.sleep(0.02)
        if children:
            faults.append(f"FAULT: child processes {sorted(children)} remain")
        if left := [path for path in self.tmp.iterdir() if path.name not in self.stores]:
            faults.append(f"FAULT: temporary files remain: {[path.name for path in left[:3]]}")
            for path in left:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        return faults

    def _try(self, read: Callable[[], object]) -> str:
        try:
            read()
        except FluxChatError as error:
            return self._judge(str(error))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is a finding
            return f"FAULT: {type(error).__name__}: {str(error)[:200]!r}"
        return "answer"

    def _judge(self, text: str) -> str:
        wrong = [
            *(["of several lines or unprintable"] if not text.isprintable() else []),
            *([f"{len(text)} characters long"] if len(text) >= 400 else []),
            *(["a traceback"] if "Traceback" in text or 'File "' in text else []),
            *(["naming a temporary file"] if str(self.tmp) in text else []),
            *(["no sentence"] if not text.endswith((".", "?")) or len(text) < 12 else []),
        ]
        return f"FAULT: an error {', '.join(wrong)}: {text[:300]!r}" if wrong else "sentence"

    # -- kinds ----------------------------------------------------------------------------------------------

    def _media(self, rng: random.Random) -> list[str]:
        from encoder.video.reader import probe, read_clip

        source = rng.choice(self.media)
        suffix = source.suffix if rng.random() < 0.8 else rng.choice([path.suffix for path in self.media])
        path = self.work / f"case{suffix}"
        path.write_bytes(mutated(source.read_bytes(), rng, [other.read_bytes() for other in self.media]))

        def read(trusted: bool) -> None:
            probe(path, trusted=trusted)
            read_clip(path, 4, trusted=trusted)

        return [self._try(functools.partial(read, trusted)) for trusted in (True, False)]

    def _model(self, rng: random.Random) -> list[str]:
        folder = Path(shutil.copytree(self.model, self.work / "case-model"))
        try:
            name = rng.choice(["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
            _spoil(folder / name, rng)
            return [self._load(folder)]
        finally:
            shutil.rmtree(folder)

    def _adapter(self, rng: random.Random) -> list[str]:
        folder = Path(shutil.copytree(self.adapter, self.work / "case-adapter"))
        try:
            _spoil(folder / rng.choice(["adapter_config.json", "adapter_model.safetensors"]), rng)
            return [self._load(self.model, adapters=[folder])]
        finally:
            shutil.rmtree(folder)

    def _gguf(self, rng: random.Random) -> list[str]:
        path = self.work / "case.gguf"
        path.write_bytes(mutated(self.gguf, rng, [self.gguf]))
        return [self._load(path)]

    def _load(self, path: Path, **options: Any) -> str:
        import torch

        from llm_bridge.llm import load_llm

        def load() -> None:
            llm = load_llm(path, device="cpu", dtype=torch.float32, **options)
            llm.tokenizer("A dog runs.")

        return self._try(load)

    def _body(self, rng: random.Random) -> list[str]:
        import httpx

        if self.client is None:
            self.client = _client(self.model)
            self.stores = {path.name for path in self.tmp.iterdir()}  # of the server, while it lives
        content: list[Any] = [{"type": "text", "text": "What moves?"}]
        if rng.random() < 0.5:
            content.insert(0, {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}})
        body: Any = {
            **{"model": "fluxchat", "messages": [{"role": "user", "content": content}], "max_tokens": 2},
            **{"temperature": 0, "top_p": 1, "seed": 1, "stream": False, "token_budget": 16, "stop": ["x"]},
        }
        _change_value(body, rng)
        data = json.dumps(body).encode()
        if rng.random() < 0.3:
            data = mutated(data, rng, [data])
        try:
            with _logging_off():
                reply: httpx.Response = self.client.post(
                    "/v1/chat/completions", content=data, headers={"Content-Type": "application/json"}
                )
            if reply.status_code == 200:
                return ["answer"]
            said = reply.json()["error"]["message"]
        except Exception as error:  # noqa: BLE001 - whatever it is, it is a finding
            return [f"FAULT: {type(error).__name__}: {str(error)[:200]!r}"]
        if not 400 <= reply.status_code < 500:
            return [f"FAULT: status {reply.status_code}: {said[:200]!r}"]
        return [self._judge(said)]


# -- mutations -----------------------------------------------------------------------------------------------


def mutated(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """The bytes with one to three kinds of damage; `others` are spliced in."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        data = rng.choice(MUTATIONS)(bytearray(data or b"\0"), rng, others)
    return data


def _flips(data: bytearray, rng: random.Random, _: Sequence[bytes]) -> bytes:
    for _again in range(rng.choice((1, 4, 32, 256))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def _cut(data: bytearray, rng: random.Random, _: Sequence[bytes]) -> bytes:
    return bytes(data[: rng.randrange(len(data))])


def _splice(data: bytearray, rng: random.Random, others: Sequence[bytes]) -> bytes:
    other = rng.choice(list(others)) or b"\0"
    start = rng.randrange(len(other))
    at = rng.randrange(len(data))
    return bytes(data[:at] + other[start : start + rng.randrange(1, 4096)] + data[at:])


def _repeat(data: bytearray, rng: random.Random, _: Sequence[bytes]) -> bytes:
    start, size = rng.randrange(len(data)), rng.choice((4, 64, 1024, 65536))
    return bytes(data[:start] + data[start : start + size] * rng.randrange(2, 20) + data[start + size :])


def _header(data: bytearray, rng: random.Random, _: Sequence[bytes]) -> bytes:
    for _again in range(rng.choice((1, 3, 8))):
        data[rng.randrange(min(256, len(data)))] = rng.randrange(256)
    return bytes(data)


def _sizes(data: bytearray, rng: random.Random, _: Sequence[bytes]) -> bytes:
    """A field of 1, 2, 4 or 8 bytes, most often near the front, holds a number at a boundary."""
    width, code = rng.choice(((1, "B"), (2, "H"), (4, "I"), (8, "Q")))
    at = rng.randrange(rng.choice((64, 1024, len(data))))
    value = rng.choice(BOUNDARIES) & (1 << 8 * width) - 1
    data[at : at + width] = struct.pack(rng.choice("<>") + code, value)
    return bytes(data)


def _zeros(data: bytearray, rng: random.Random, _: Sequence[bytes]) -> bytes:
    start = rng.randrange(len(data))
    data[start : start + rng.choice((1, 16, 4096))] = bytes(rng.choice((1, 16, 4096)))
    return bytes(data)


def _noise(data: bytearray, rng: random.Random, _: Sequence[bytes]) -> bytes:
    return bytes(data[: rng.choice((0, 16, 64))]) + rng.randbytes(rng.choice((0, 16, 4096)))


MUTATIONS = (_flips, _cut, _splice, _repeat, _header, _sizes, _zeros, _noise)


def _spoil(file: Path, rng: random.Random) -> None:
    """Damage a file of a model folder: JSON most often in one of its values."""
    if file.suffix == ".json" and rng.random() < 0.7:
        values = json.loads(file.read_text())
        _change_value(values, rng)
        file.write_text(json.dumps(values))
    else:
        data = file.read_bytes()
        file.write_bytes(mutated(data, rng, [data]))


def _change_value(values: Any, rng: random.Random) -> None:
    """Another value, or none, somewhere in nested JSON."""
    places: list[tuple[Any, Any]] = []
    stack = [values]
    while stack:
        part = stack.pop()
        for key in part if isinstance(part, dict) else range(len(part)):
            places.append((part, key))
            if isinstance(part[key], (dict, list)):
                stack.append(part[key])
    part, key = rng.choice(places)
    if rng.random() < 0.2:
        del part[key]
    elif rng.random() < 0.1 and isinstance(part, dict):
        part[f"{key}_2"] = rng.choice(NUMBERS)
    else:
        part[key] = rng.choice(NUMBERS)


# -- material ------------------------------------------------------------------------------------------------


def _media(work: Path) -> list[Path]:
    import av
    from PIL import Image

    folder = work / "media"
    folder.mkdir()
    made = []
    for container, encoder, form, codec in vf.FORMATS:
        if encoder in av.codecs_available and encoder not in ("libx265", "libsvtav1"):
            path = folder / f"{codec}.{container}"
            made.append(vf.write(path, vf.steady(8), encoder=encoder, pix_fmt=form, size=(64, 48)))
    pictures = [Image.fromarray(vf.numbered(number, 64, 48)) for number in range(3)]
    for suffix in ("png", "jpg", "webp", "bmp"):
        pictures[0].save(folder / f"still.{suffix}")
        made.append(folder / f"still.{suffix}")
    pictures[0].save(folder / "moving.webp", save_all=True, append_images=pictures[1:], duration=100)
    return [*made, folder / "moving.webp"]


def _adapter(folder: Path) -> Path:
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{prefix}.lora_A.weight": torch.ones(4, 64), f"{prefix}.lora_B.weight": torch.ones(64, 4)}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": True}))
    return folder


def _gguf() -> bytes:
    """A well-formed table of a llama without all of its tensors: enough to be walked."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    numbers = {"block_count": 2, "embedding_length": 64, "feed_forward_length": 128, "context_length": 256}
    entries = [text("general.architecture") + struct.pack("<I", 8) + text("llama")]
    entries += [text(f"llama.{key}") + struct.pack("<II", 4, value) for key, value in numbers.items()]
    entries += [
        text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 3) + text("a") + text("b") + text("c")
    ]
    tensor = text("token_embd.weight") + struct.pack("<IQQIQ", 2, 64, 3, 0, 0)
    table = struct.pack("<4sIQQ", b"GGUF", 3, 1, len(entries)) + b"".join(entries) + tensor
    return table + bytes(-len(table) % 32 + 64 * 3 * 4)


def _client(llm: Path) -> Any:
    """A client of the API's routes in this process, with a tiny model behind them."""
    import torch
    from fastapi import FastAPI
    from starlette.testclient import TestClient

    from app.chat import VideoChat
    from app.server.routes import Api
    from encoder.config import MICRO
    from encoder.fluxvit import FluxViT
    from llm_bridge.model import VLMConfig, assemble
    from llm_bridge.projector import ProjectorConfig

    encoder = MICRO.replace(embed_dim=32, depth=2, num_heads=2, pool_heads=2, clip_embed_dim=16)
    config = VLMConfig(
        llm=str(llm), projector=ProjectorConfig(32, 64, norm=True), encoder=encoder, default_tokens=16
    )
    model = assemble(config, FluxViT(encoder), None, device="cpu", dtype=torch.float32)
    app = FastAPI()
    Api(VideoChat(model, trusted=False)).install(app)
    return TestClient(app, raise_server_exceptions=True)


def _children() -> list[int]:
    """Processes that this one started and that are still there (Linux; elsewhere none are seen)."""
    found: list[int] = []
    for task in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += map(int, task.read_text().split())
    return found


def _resident_mib() -> float:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    except OSError:
        return 0.0


@contextlib.contextmanager
def _logging_off() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def fuzz(
    files: Sequence[int],
    seed: int,
    work: Path,
    say: Callable[[str], None] = lambda _: None,
    kinds: Sequence[str] = KINDS,
) -> dict[str, Any]:
    """Read the files of these numbers that are of `kinds`; the figures, with a list of violations that should
    be empty."""
    before = tempfile.tempdir, os.environ.get("TMPDIR")
    case = Fuzz(work, seed, kinds)
    tempfile.tempdir = os.environ["TMPDIR"] = str(case.tmp)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            start, base = time.monotonic(), 0.0
            for done, index in enumerate(files, 1):
                ended = case.run(index)
                if "FAULT" in ended or len(files) < 10:
                    say(f"{index}: {ended}")
                if done == 40:
                    base = _resident_mib()  # everything is imported
                if done % 25 == 0:
                    say(
                        f"{done} of {len(files)}, {time.monotonic() - start:.0f} s, {_resident_mib():.0f} MiB"
                    )
    finally:
        tempfile.tempdir = before[0]
        os.environ.pop("TMPDIR") if before[1] is None else os.environ.update(TMPDIR=before[1])
    growth = _resident_mib() - base if base else 0.0
    if growth > GROWTH_MIB:
        case.violations.append(f"memory grew by {growth:.0f} MiB")
    return {
        "files": len(files),
        "seed": seed,
        "outcomes": dict(sorted(case.outcomes.items())),
        "slowest_s": case.slowest,
        "growth_mib": round(growth),
        "violations": case.violations,
    }


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; 1 when anything broke."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.fuzz", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--files", type=int, default=600, metavar="N", help="how many (600)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="which (0)")
    parser.add_argument("--only", type=int, metavar="I", help="this one of them")
    parser.add_argument(
        "--kinds", nargs="+", default=KINDS, choices=sorted(set(KINDS)), help="of these (all)"
    )
    args = arguments(parser, argv, files=3)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    files = range(args.files) if args.only is None else [args.only]
    with tempfile.TemporaryDirectory(prefix="fuzz-") as work:
        result = fuzz(files, args.seed, Path(work) / "w", _say, args.kinds)
    print_json({"bench": "fuzz", **environment(), **result}, smallest=args.smallest)
    return 1 if result["violations"] else 0


if __name__ == "__main__":
    sys.exit(main())
