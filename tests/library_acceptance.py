"""The library as a user has it, in real processes with the shipped model: one JSON line for each check.

    python -m tests.library_acceptance DIR [--clips 200] [--kills 5] [--hours 10] [--only index search]

DIR keeps the clips between runs; the rest in it is made anew. `index` and `map` are killed at random moments
and run again, until there is one row for each clip; `search` looks for described clips; `ray` does the same
with two workers, one of which is killed; `hours` indexes a looped file and asks about it. Memory is the most
that a command and its children had together.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from tests import ROOT
from tests.bench.long_video import loop, minute
from training.synthetic.dataset import World
from training.synthetic.export import export
from training.synthetic.world_config import WorldConfig

QUESTION = "What is in the video, and where does it move?"
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "thing": {"type": "string", "maxLength": 40},
        "moves": {"enum": ["left", "right", "up", "down", "not at all"]},
    },
    "required": ["thing", "moves"],
    "additionalProperties": False,
}
CHECKS = ("index", "search", "map", "ray", "hours")


def fluxchat(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "app", *map(str, arguments)]


class Run:
    """A command in a process of its own. mib: the most memory so far."""

    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        self._watched = psutil.Process(self._process.pid)
        self.mib = 0.0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while self._process.poll() is None:
            try:
                family = [self._watched, *self._watched.children(recursive=True)]
                self.mib = max(self.mib, sum(one.memory_full_info().pss for one in family) / 2**20)
            except (psutil.Error, OSError):
                pass
            time.sleep(0.5)

    def kill(self, begun: Callable[[], bool], rng: random.Random) -> bool:
        """Whether it was killed before its end, at a random moment after it had begun."""
        while not begun() and self._process.poll() is None:
            time.sleep(0.02)
        time.sleep(rng.uniform(0.0, 3.0))
        self._process.kill()
        self._process.communicate()
        return self._process.returncode < 0

    def kill_a_worker(self, begun: Callable[[], bool]) -> int:
        """The process number of an actor of Ray that was killed."""
        while not begun():
            if self._process.poll() is not None:
                raise SystemExit("it ended before a worker was killed")
            time.sleep(0.05)
        actors = [one for one in psutil.process_iter(["cmdline"]) if _is_actor(one.info["cmdline"])]
        actors[0].kill()
        return actors[0].pid

    def end(self) -> str:
        """Its standard output; raises SystemExit where it failed."""
        out = self._process.communicate()[0]
        if self._process.returncode:
            raise SystemExit(f"a command ended with {self._process.returncode}: {out[-500:]}")
        return out


def _is_actor(command: Sequence[str] | None) -> bool:
    return bool(command) and command[0].startswith("ray::") and "MapBatches" in command[0]  # type: ignore[index]


def clip_rows(index: Path) -> Counter[str]:
    """Rows by file, of the only table of clips."""
    import lancedb

    base = lancedb.connect(str(index))
    names = [name for name in base.list_tables(limit=100).tables if name.startswith("clips-")]
    if not names:
        return Counter()
    return Counter(base.open_table(names[0]).search().select(["path"]).to_arrow()["path"].to_pylist())


def check_index(
    clips: list[str], folder: Path, index: Path, kills: int, rng: random.Random
) -> dict[str, Any]:
    shutil.rmtree(index, ignore_errors=True)
    command, grew, start = fluxchat("index", folder, "--library", index), [0], time.monotonic()
    while len(grew) <= kills:

        def begun(before: int = grew[-1]) -> bool:
            versions = list(index.glob("clips-*.lance/_versions/*.manifest"))
            return bool(versions) and sum(clip_rows(index).values()) > before

        if not Run(command).kill(begun, rng):
            break
        grew.append(sum(clip_rows(index).values()))
    last = Run(command)
    last.end()
    found = clip_rows(index)
    return {
        "kills": len(grew) - 1,
        "rows_after_kills": grew[1:],
        "one_row_per_clip": found == Counter(clips),
        "peak_mib": round(last.mib),
        "seconds": round(time.monotonic() - start, 1),
    }


def check_search(captions: dict[str, str], index: Path) -> dict[str, Any]:
    from app.library.library import Library

    library = Library(index, device="cpu")
    asked = list(captions.items())[:20]
    hits = [path in {hit.path for hit in library.search(text, top=3).hits} for path, text in asked]
    return {"asked": len(hits), "among_first_3": sum(hits)}


def valid_rows(out: Path) -> list[str]:
    import jsonschema

    rows = [json.loads(line) for line in out.read_text().splitlines()]
    for row in rows:
        assert row["error"] is None, row
        jsonschema.validate(row["answer"], SCHEMA)
    return [row["file"] for row in rows]


def lines(out: Path) -> int:
    return out.read_bytes().count(b"\n") if out.exists() else 0


def map_command(folder: Path, out: Path, *more: object) -> list[str]:
    schema = out.with_suffix(".schema.json")
    schema.write_text(json.dumps(SCHEMA))
    few = ("--budget", 64, "--max-new-tokens", 48)
    return fluxchat("map", QUESTION, folder, "--out", out, "--schema", schema, *few, *more)


def check_map(clips: list[str], folder: Path, out: Path, kills: int, rng: random.Random) -> dict[str, Any]:
    out.unlink(missing_ok=True)
    command, grew, start = map_command(folder, out), [0], time.monotonic()
    while len(grew) <= kills:
        if not Run(command).kill(lambda before=grew[-1]: lines(out) > before, rng):  # type: ignore[misc]
            break
        grew.append(lines(out))
    last = Run(command)
    last.end()
    return {
        "kills": len(grew) - 1,
        "rows_after_kills": grew[1:],
        "one_valid_row_per_clip": Counter(valid_rows(out)) == Counter(clips),
        "peak_mib": round(last.mib),
        "seconds": round(time.monotonic() - start, 1),
    }


def check_ray(clips: list[str], folder: Path, place: Path) -> dict[str, Any]:
    index, out = place / "ray-index", place / "ray.jsonl"
    shutil.rmtree(index, ignore_errors=True)
    out.unlink(missing_ok=True)
    start = time.monotonic()
    indexing = Run(fluxchat("index", folder, "--library", index, "--ray", "--workers", 2))
    killed = [
        indexing.kill_a_worker(lambda: sum(clip_rows(index).values()) > 20 if index.exists() else False)
    ]
    indexing.end()
    asking = Run(map_command(folder, out, "--ray", "--workers", 2))
    killed.append(asking.kill_a_worker(lambda: lines(out) > 20))
    asking.end()
    return {
        "killed": len(killed),
        "one_row_per_clip": clip_rows(index) == Counter(clips),
        "one_valid_row_per_clip": Counter(valid_rows(out)) == Counter(clips),
        "seconds": round(time.monotonic() - start, 1),
    }


def check_hours(place: Path, hours: float) -> dict[str, Any]:
    """A file of that length beside one of ten minutes: rows, and memory."""
    minute(place / "minute.mp4")
    figures: dict[str, Any] = {}
    for name, minutes in (("short", 10), ("long", round(60 * hours))):
        film, index = place / f"{name}.mp4", place / f"{name}-index"
        shutil.rmtree(index, ignore_errors=True)
        loop(place / "minute.mp4", film, minutes)
        start = time.monotonic()
        indexing = Run(fluxchat("index", film, "--library", index))
        indexing.end()
        seconds, asking = (
            time.monotonic() - start,
            Run(fluxchat("ask", film, "What happens at 7:30?", "--json")),
        )
        said = json.loads(asking.end())
        whole = Run(fluxchat("ask", film, "What happens?", "--json"))
        whole.end()
        figures[name] = {
            "minutes": minutes,
            "rows": sum(clip_rows(index).values()),
            "index_s": round(seconds, 1),
            "index_mib": round(indexing.mib),
            "ask_mib": round(max(asking.mib, whole.mib)),
            "looked_at_s": [round(said["kept"][0]["times_s"][place]) for place in (0, -1)],
        }
        film.unlink()
    return figures


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.library_acceptance")
    parser.add_argument("place", type=Path, metavar="DIR")
    parser.add_argument("--clips", type=int, default=200)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--hours", type=float, default=10.0)
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=CHECKS)
    args = parser.parse_args(argv)
    place, rng = args.place.resolve(), random.Random(0)
    place.mkdir(parents=True, exist_ok=True)
    clips: dict[str, str] = {}
    if {*args.only} - {"hours"}:
        world = World("test", 11, WorldConfig(duration_s=(2.0, 8.0)))
        records = json.loads(export(world, args.clips, place / "world", size=160, fps=8).read_text())
        clips = {str(place / "world" / row["video"]): row["conversations"][1]["value"] for row in records}
    folder, index = place / "world" / "videos", place / "index"
    checks: dict[str, Callable[[], dict[str, Any]]] = {
        "index": lambda: check_index([*clips], folder, index, args.kills, rng),
        "search": lambda: check_search(clips, index),
        "map": lambda: check_map([*clips], folder, place / "answers.jsonl", args.kills, rng),
        "ray": lambda: check_ray([*clips], folder, place),
        "hours": lambda: check_hours(place, args.hours),
    }
    for name in args.only:
        print(json.dumps({"check": name, **checks[name]()}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
