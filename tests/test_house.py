"""The rules of the house: who may import whom, and what an import may cost."""

import ast
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests import ROOT
from tests.journeys import circles, main

ROOMS = {
    "encoder": set(),
    "llm_bridge": {"encoder"},
    "training": {"encoder", "llm_bridge"},
    "app": {"encoder", "llm_bridge"},
}
ENCODER_LIBRARIES = {"torch", "numpy", "safetensors", "av", "decord", "PIL"}


@cache
def read(path: Path) -> tuple[list[ast.Import | ast.ImportFrom], set[str]]:
    """The imports of a module, and the names that it has at its top, those in `if` and `try` included."""
    found: list[ast.Import | ast.ImportFrom] = []
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found.append(node)
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return found, names


def imports(path: Path) -> set[str]:
    found = set()
    for node in read(path)[0]:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif node.module:
            assert node.level == 0, f"{path} uses a relative import"
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_direction_of_imports(room: str) -> None:
    for path in (ROOT / room).rglob("*.py"):
        rooms = imports(path) & (set(ROOMS) | {"tests"})
        assert rooms <= ROOMS[room] | {room}, f"{path.relative_to(ROOT)} imports {rooms}"


def test_the_encoder_knows_only_torch_and_pixels() -> None:
    for path in (ROOT / "encoder").rglob("*.py"):
        foreign = imports(path) - set(sys.stdlib_module_names) - ENCODER_LIBRARIES - {"encoder"}
        assert not foreign, f"{path.relative_to(ROOT)} imports {foreign}"


def test_no_modules_import_each_other() -> None:
    assert circles(ROOT, lazy=False) == []


@pytest.mark.parametrize("room", [*ROOMS, "tests"])
def test_imports_inside_functions_name_what_exists(room: str) -> None:
    """Those of a benchmark or of a rare path run late: a renamed module would be missed there."""
    for path in (ROOT / room).rglob("*.py"):
        for node in read(path)[0]:
            if not isinstance(node, ast.ImportFrom) or (node.module or "").split(".")[0] not in [
                *ROOMS,
                "tests",
            ]:
                continue
            place = ROOT.joinpath(*str(node.module).split("."))
            file = place.with_suffix(".py") if place.with_suffix(".py").exists() else place / "__init__.py"
            where = f"{path.relative_to(ROOT)}, line {node.lineno}"
            assert file.exists(), f"{where} imports {node.module}"
            known = read(file)[1]
            for alias in node.names:
                inside = (place / f"{alias.name}.py").exists() or (place / alias.name).is_dir()
                lazy = "__getattr__" in known  # names that are made when they are asked for
                assert alias.name in known or inside or lazy, f"{where} imports {alias.name}"


@pytest.mark.parametrize("options", [["--tree", "nowhere"], ["--against", "nowhere", "--only", "selection"]])
def test_a_journey_through_nowhere_is_one_line(options: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(options)
    said = f"{ended.value} {capfd.readouterr().err}"
    assert "nowhere" in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_journey_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "selection"]) == 0
    measured = json.loads(capsys.readouterr().out.splitlines()[-1])["journeys"]["now"]["selection"]
    assert 1 <= measured["files"] <= 2
    assert measured["functions"] >= 5  # select_flux and what it calls


@pytest.mark.parametrize("room", ROOMS)
def test_importing_a_room_loads_no_heavy_library(room: str) -> None:
    heavy = ["torch", "transformers", "gradio", "decord", "av", "accelerate", "peft", "bitsandbytes"]
    code = f"import sys, {room}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_docker_gets_what_it_copies() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    copied = {name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]}
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied <= allowed
    assert all((ROOT / name).exists() for name in allowed)
    assert {*ROOMS, "fluxchat.py"} <= copied


def test_nothing_names_a_machine() -> None:
    files = subprocess.run(
        ["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=True
    ).stdout.split()
    for name in files:
        path = ROOT / name
        if (
            path.suffix in {".py", ".md", ".yaml", ".toml", ".txt", ""}
            and path.is_file()
            and path != Path(__file__)
        ):
            text = path.read_text(errors="ignore")
            for word in ("/work/", "/root/", "../shared"):
                assert word not in text, f"{name} mentions {word}"
