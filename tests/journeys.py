"""How many files a reader meets on the way of a question or of a training step.

    python -m tests.journeys                    this tree
    python -m tests.journeys --against 4fa82f9  beside a commit, checked out into a temporary worktree

A journey is run once to warm up, so that imports and caches do not count, then with a profiler on all
threads: files of the project entered, functions entered, and switches, which are consecutive calls of one
thread into another file. Files of the decoding child are counted apart. Also files, lines and import circles
of the tree. Needs the shipped model's language model (`fluxchat fetch`); no network. The last line is one
JSON.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("app", "encoder", "llm_bridge", "training")
JOURNEYS = {
    "question": "question to first token",
    "umt": "one Flux-UMT step",
    "stage1": "one stage-1 step",
    "selection": "selection",
}
STEPS = 6  # of a training journey: the first is the warm-up, the others are counted
MODULES = {"umt": "umt", "stage1": "chat_stage1"}
STUDENT = {"embed_dim": 32, "depth": 2, "num_heads": 2, "pool_heads": 2, "clip_embed_dim": 16}
# How older trees call the setting `num_tokens` of a recipe.
NUM_TOKENS = {"umt": "counts", "stage1": "keeps"}


# -- the recorder: runs in a process of the tree that is measured -------------------------------------------


def prefixes(tree: Path) -> tuple[str, ...]:
    """What the paths of the tree's shipped files begin with."""
    return tuple(str(tree / room) + os.sep for room in ROOMS)


class Recorder:
    """Counts calls into files of `tree` on all threads while `on` is true."""

    def __init__(self, tree: Path) -> None:
        self.prefixes = prefixes(tree)
        self.on = False
        self.start()

    def start(self) -> None:
        """Begin a new count."""
        self.files: set[str] = set()
        self.functions: set[CodeType] = set()
        self.switches = 0
        self.last: dict[int, str] = {}  # by thread: the file of the last call

    def install(self) -> None:
        """Listen to this thread and to those that begin later."""
        threading.setprofile(self)
        sys.setprofile(self)

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        """What `sys.setprofile` calls."""
        code = frame.f_code
        if event != "call" or not self.on or not code.co_filename.startswith(self.prefixes):
            return
        if code.co_name in ("<module>", "<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>"):
            return
        thread = threading.get_ident()
        self.switches += self.last.get(thread, code.co_filename) != code.co_filename
        self.last[thread] = code.co_filename
        self.files.add(code.co_filename)
        self.functions.add(code)

    def counts(self) -> dict[str, Any]:
        """Files, functions and switches since `start`."""
        return {
            "files": len(self.files),
            "functions": len(self.functions),
            "switches": self.switches,
            "names": sorted(self.files),
        }


IN_CHILD = """
import os, sys
def importing(frame):
    while frame is not None:
        if frame.f_code.co_name == "<module>" and frame.f_back is not None:
            return True
        frame = frame.f_back
    return False
def listen(frame, event, _, last=[""]):
    name = frame.f_code.co_filename
    if event == "call" and name != last[0] and name.startswith({prefixes!r}) and not importing(frame):
        last[0] = name
        os.write({pipe}, name.encode() + b"\\n")
sys.setprofile(listen)
"""


@contextlib.contextmanager
def decoding_children(tree: Path) -> Iterator[Callable[[], set[str]]]:
    """Profiles Python children too; yields a function: the files they entered since it was last called."""
    reading, writing = os.pipe()
    names: set[str] = set()
    original = subprocess.Popen

    def read() -> None:
        with open(reading, encoding="utf-8") as lines:
            for line in lines:
                names.add(line.strip())

    def entered() -> set[str]:
        time.sleep(0.5)  # what the child has written is read by then
        found = set(names)
        names.clear()
        return found

    class Listening(original):  # type: ignore[type-arg, misc]
        def __init__(self, command: Any, **options: Any) -> None:
            if isinstance(command, list) and "-c" in command:
                code = command.index("-c") + 1
                listener = IN_CHILD.format(prefixes=prefixes(tree), pipe=writing)
                command = [*command[:code], f"{listener}\n{command[code]}", *command[code + 1 :]]
                options["pass_fds"] = (*options.get("pass_fds", ()), writing)
            super().__init__(command, **options)

    threading.Thread(target=read, daemon=True).start()
    subprocess.Popen = Listening  # type: ignore[misc]
    try:
        yield entered
    finally:
        subprocess.Popen = original  # type: ignore[misc]
        os.close(writing)


def question(recorder: Recorder, tree: Path) -> dict[str, Any]:
    """`VideoChat().stream` on an example until its first piece, after a question about another one.

    The shortest of three: a decoding child that was idle for seconds has ended, and a new one is begun.
    """
    found = []
    with decoding_children(tree) as children:
        from app import VideoChat

        first, *examples = sorted((tree / "app").rglob("examples/*.mp4"))
        with VideoChat(device="cpu") as chat:
            chat.ask(first, "What is it?", max_new_tokens=2)
            for example in examples[:3]:
                children()
                recorder.start()
                recorder.on = True
                pieces = iter(chat.stream(example, "What is it doing?", max_new_tokens=2))
                next(pieces)
                recorder.on = False
                in_child = children()
                found.append(
                    recorder.counts() | {"child_files": len(in_child), "child_names": sorted(in_child)}
                )
                for _ in pieces:
                    pass
    return min(found, key=lambda counts: (counts["child_files"], counts["switches"]))


def selection(recorder: Recorder) -> dict[str, Any]:
    """`select` on 16 frames of 8 x 8 patches."""
    import torch

    from encoder.selection import select
    from encoder.tokens import Grid

    patches, grid = torch.randn(1, 16 * 64, 32), Grid(16, 8, 8)
    select(patches, grid, 256)
    recorder.start()
    recorder.on = True
    select(patches, grid, 256)
    recorder.on = False
    return recorder.counts()


def step(recorder: Recorder, journey: str, recipe: Path) -> dict[str, Any]:
    """What lies between the optimizer's steps: files and functions entered, the median of the switches."""
    from importlib import import_module

    from torch.optim.optimizer import register_optimizer_step_post_hook

    windows: list[dict[str, Any]] = []

    def between(*_: object) -> None:
        if recorder.on:
            windows.append(recorder.counts())
            recorder.switches = 0
        else:  # the first step was the warm-up
            recorder.start()
            recorder.on = True

    main = import_module(f"training.{MODULES[journey]}").main
    with contextlib.redirect_stdout(sys.stderr):
        hook = register_optimizer_step_post_hook(between)
        status = main(["--config", str(recipe)])
        recorder.on = False
        hook.remove()
    if status or not windows:
        raise SystemExit(f"{recipe.name} did not train: exit status {status}.")
    return windows[-1] | {"switches": int(median(window["switches"] for window in windows))}


def measure(tree: Path, journey: str, recipe: Path) -> dict[str, Any]:
    """One journey in this process, whose imports come from `tree`."""
    recorder = Recorder(tree)
    recorder.install()
    if journey == "question":
        return question(recorder, tree)
    if journey == "selection":
        return selection(recorder)
    return step(recorder, journey, recipe)


# -- what training journeys learn from: made once, by this tree, for both -----------------------------------


def prepare(folder: Path) -> None:
    """A tiny encoder, language model, teacher, and eight videos with labels and captions."""
    import torch

    from encoder.config import MICRO
    from encoder.fluxvit import FluxViT
    from tests import tiny_llms
    from tests.encoder.video import video_files
    from tests.training.distill.tiny_teachers import write_stage2

    torch.manual_seed(0)
    FluxViT(MICRO.replace(**STUDENT)).save_pretrained(folder / "encoder")
    tiny_llms.make(folder / "llm", "qwen2")
    write_stage2(folder / "teacher.pt")
    rows, talks = [], []
    for number in range(8):
        video_files.write(folder / f"{number}.mp4", video_files.steady(12 + number), size=(72, 56))
        rows.append(f"{number}.mp4 {number % 2}")
        talk = [
            {"from": "human", "value": "<image>\nWhat is it?"},
            {"from": "gpt", "value": f"Bars: {number}."},
        ]
        talks.append({"id": str(number), "video": f"{number}.mp4", "conversations": talk})
    (folder / "train.csv").write_text("\n".join(rows) + "\n")
    (folder / "talks.json").write_text(json.dumps(talks))


def recipe_text(journey: str, folder: Path, tree: Path) -> str:
    """The recipe of a training journey, in the words of `tree`."""
    from tests.training.distill.tiny_teachers import NARROW

    loop = {"out": tempfile.mkdtemp(dir=folder), "precision": "fp32"}
    recipe: dict[str, Any] = {
        "optim": {"lr": 1e-3, "batch_size": 4, "micro_batch": 4, "epochs": STEPS},
        "loop": {**loop, "max_steps": STEPS, "checkpoint_every": 1000},
    }
    if journey == "umt":
        teacher = {"weights": str(folder / "teacher.pt"), "count": 2, "interval": 1.5, "settings": NARROW}
        recipe |= {
            "teacher": {"internvideo2": {**teacher, "precision": "fp32"}},
            "encoder": {"size": "micro", "settings": {**STUDENT, "depth": 4}},
            "data": [{"csv": str(folder / "train.csv"), "data_root": str(folder)}],
            "grid": {"frames": [2, 10, 2], "resolutions": [42, 84, 14], "tokens": [36, 72]},
            "augment": {"crop": "multiscale", "flip": 0.5},
            "teacher_tokens": 36,
            "num_tokens": [36, 24, 12],
        }
    else:
        recipe |= {
            "model": {"encoder": str(folder / "encoder"), "llm": str(folder / "llm")},
            "datasets": [{"json_path": str(folder / "talks.json"), "data_root": str(folder)}],
            "frames": 4,
            "resolution": 56,
            "num_tokens": [8, 16],
            "template": "chat",
        }
    if "num_tokens: tuple" not in (tree / "training" / "umt.py").read_text():
        recipe[NUM_TOKENS[journey]] = recipe.pop("num_tokens")
    if (tree / "fluxchat.py").exists():  # trees before it have recipes without a stage
        recipe["stage"] = MODULES[journey]
    return json.dumps(recipe)  # which is YAML, too


# -- the tree itself ----------------------------------------------------------------------------------------


def modules(tree: Path) -> dict[str, Path]:
    """Shipped modules by dotted name."""
    paths = [path for room in ROOMS for path in (tree / room).rglob("*.py")]
    paths += [tree / "fluxchat.py"] if (tree / "fluxchat.py").exists() else []
    found = {}
    for path in paths:
        parts = path.relative_to(tree).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path, known: set[str], *, lazy: bool) -> set[str]:
    """Modules of `known` that a file imports while it is imported itself. lazy: also those in functions and
    under TYPE_CHECKING."""

    def statements(nodes: list[ast.stmt]) -> Iterator[ast.stmt]:
        for node in nodes:
            yield node
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                yield from statements(node.orelse)
            elif isinstance(node, (ast.If, ast.Try, ast.With, ast.ClassDef)):
                for name in ("body", "orelse", "finalbody"):
                    yield from statements(getattr(node, name, []))

    parsed = ast.parse(path.read_text())
    names: set[str] = set()
    for node in ast.walk(parsed) if lazy else statements(parsed.body):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= inner & known or {node.module}
    return names & known


def circles(tree: Path, *, lazy: bool) -> list[list[str]]:
    """Groups of modules that import each other, directly or through others."""
    files = modules(tree)
    known = set(files)
    edges = {name: imported(path, known, lazy=lazy) for name, path in files.items()}
    reach: dict[str, set[str]] = {}
    for name in files:
        ahead, seen = list(edges[name]), set()
        while ahead:
            if (other := ahead.pop()) not in seen:
                seen.add(other)
                ahead += edges[other]
        reach[name] = seen
    groups = {frozenset({name} | {o for o in reach[name] if name in reach[o]}) for name in files}
    return sorted(sorted(group) for group in groups if len(group) > 1)


def describe(tree: Path) -> dict[str, int]:
    """Files, lines and import circles of what ships."""
    files = modules(tree).values()
    return {
        "files": len(files),
        "lines": sum(len(path.read_text().splitlines()) for path in files),
        "folders": len({path.parent for path in files}),
        "import circles": len(circles(tree, lazy=False)),
        "with imports in functions and for types": len(circles(tree, lazy=True)),
    }


# -- the command --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def checked_out(revision: str) -> Iterator[Path]:
    """A worktree of a commit, for as long as it is needed."""
    git = ["git", "-C", str(ROOT), "worktree"]
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder).resolve() / "tree"
        added = subprocess.run([*git, "add", "-q", "--detach", str(tree), revision], capture_output=True)
        if added.returncode:
            raise SystemExit(f"There is no commit {revision} here that git can check out: name another.")
        try:
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def travel(tree: Path, names: list[str], folder: Path, listed: bool) -> dict[str, Any]:
    """All figures of a tree; each journey runs in a process of its own."""
    result: dict[str, Any] = {"tree": describe(tree)}
    for name in names:
        command = [sys.executable, str(Path(__file__).resolve()), "--measure", name]
        command += ["--tree", str(tree)]
        if name in MODULES:
            recipe = folder / f"{name}.yaml"
            recipe.write_text(recipe_text(name, folder, tree))
            command += ["--recipe", str(recipe)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{JOURNEYS[name]} in {tree} failed:\n{done.stderr[-2000:]}")
        result[name] = json.loads(done.stdout.splitlines()[-1])
        for kind in ("names", "child_names"):
            files = [Path(file).relative_to(tree).as_posix() for file in result[name].pop(kind, ())]
            if listed and files:
                print(f"{JOURNEYS[name]}, {kind.replace('_', ' ')}: {' '.join(files)}")
    return result


def table(results: dict[str, dict[str, Any]], names: list[str]) -> str:
    """The figures of all trees, one journey a line."""
    lines = [f"| journey | {' | '.join(f'files, functions, switches: {tree}' for tree in results)} |"]
    lines.append("|---" * (1 + len(results)) + "|")
    for name in names:
        cells = []
        for found in (result[name] for result in results.values()):
            child = f" (+{found['child_files']} in the decoding child)" if "child_files" in found else ""
            cells.append(f"{found['files']}{child}, {found['functions']}, {found['switches']}")
        lines.append(f"| {JOURNEYS[name]} | {' | '.join(cells)} |")
    first = next(iter(results.values()))["tree"]
    for what in first:
        lines.append(f"| {what} | {' | '.join(str(r['tree'][what]) for r in results.values())} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.journeys", description=__doc__.splitlines()[0])
    parser.add_argument("--tree", type=Path, default=ROOT, help="folder to measure (default: this tree)")
    parser.add_argument("--against", metavar="REV", help="a commit to measure beside it")
    parser.add_argument("--only", nargs="+", choices=JOURNEYS, default=list(JOURNEYS), help="some journeys")
    parser.add_argument("--list", action="store_true", help="also the names of the files")
    parser.add_argument("--measure", choices=JOURNEYS, help=argparse.SUPPRESS)
    parser.add_argument("--recipe", type=Path, default=Path(), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    tree = args.tree.resolve()
    if not (tree / "encoder").is_dir():
        parser.error(f"{args.tree} holds no tree of FluxChat: name a folder with encoder/ in it")
    if args.measure:
        sys.path[0] = str(tree)  # in place of this file's folder
        print(json.dumps(measure(tree, args.measure, args.recipe)))
        return 0
    with tempfile.TemporaryDirectory() as data, contextlib.ExitStack() as stack:
        trees = {"now": tree}
        if args.against:
            trees[args.against] = stack.enter_context(checked_out(args.against))
        if {"umt", "stage1"} & set(args.only):
            prepare(Path(data))
        results = {name: travel(place, args.only, Path(data), args.list) for name, place in trees.items()}
    print(table(results, args.only))
    print(json.dumps({"journeys": results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
