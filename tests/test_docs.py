"""What README and docs/ name exists: commands and options, make targets, modules, paths, Python names."""

from __future__ import annotations

import glob
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from itertools import chain
from pathlib import Path

import pytest
import yaml

import fluxchat
from app.cli import build_parser
from tests import ROOT

TEXTS = sorted(
    [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "training/README.md")]
    + list((ROOT / "docs").rglob("*.md"))
)
ROOMS = "app|encoder|llm_bridge|training|tests|docs"
each_text = pytest.mark.parametrize("text", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))


def blocks(text: Path, language: str) -> list[str]:
    """The text's fenced code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text.read_text(), flags=re.DOTALL | re.MULTILINE)


def commands(text: Path, program: str) -> Iterator[list[str]]:
    """Arguments of each line of the console blocks that runs `program`, without what is behind a pipe."""
    lines = chain.from_iterable(block.replace("\\\n", " ").splitlines() for block in blocks(text, "console"))
    for line in lines:
        if found := re.search(rf"(?:^|[|$]\s*){program} ([^|]*)", line):
            yield shlex.split(found[1], comments=True)


def is_module(name: str) -> bool:
    """Whether `python -m NAME` finds something to run."""
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__main__.py").exists()


@each_text
def test_commands_take_the_options_that_are_named(text: Path) -> None:
    for arguments in commands(text, "fluxchat"):
        if "--help" not in arguments:
            build_parser().parse_args(arguments)  # a wrong one raises SystemExit, and says what is wrong


@each_text
def test_modules_exist(text: Path) -> None:
    content = text.read_text()
    for name in set(re.findall(r"-m ((?:app|llm_bridge|tests|training)(?:\.[a-z_0-9]+)*)(?![.\w])", content)):
        assert is_module(name), f"{text.name} runs python -m {name}"
    for name in set(re.findall(r"`((?:llm_bridge|tests|training)\.[a-z_0-9]+)", content)):
        path = ROOT.joinpath(*name.split("."))
        assert path.is_dir() or path.with_suffix(".py").exists(), f"{text.name} names {name}"


@each_text
def test_make_targets_exist(text: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", text.read_text(), flags=re.MULTILINE))
    assert named <= targets


@each_text
def test_paths_exist(text: Path) -> None:
    content = text.read_text()
    for name in set(re.findall(rf"(?<![\w/.:-])(?:{ROOMS})/[\w./*{{}},-]*", content)):
        for path in braces(name.rstrip(".,")):
            assert glob.glob(str(ROOT / path)), f"{text.name} names {path}"
    for name in set(re.findall(r"\btest_\w+\.py", content)):
        assert list((ROOT / "tests").rglob(name)), f"{text.name} names {name}"


def braces(name: str) -> list[str]:
    """As a shell expands a{b,c}."""
    if not (found := re.search(r"\{([^{}]*)\}", name)):
        return [name]
    return [
        path
        for part in found[1].split(",")
        for path in braces(name[: found.start()] + part + name[found.end() :])
    ]


@each_text
def test_links_lead_somewhere(text: Path) -> None:
    for link in re.findall(r"\]\(([^)\s#]+)", text.read_text()):
        assert ":" in link or (text.parent / link).exists(), f"{text.name} links {link}"


@each_text
def test_python_examples_compile(text: Path) -> None:
    for block in blocks(text, "python"):
        compile(block, str(text), "exec")
        for names in re.findall(r"^from fluxchat import (.*)$", block, flags=re.MULTILINE):
            assert set(re.split(r",\s*", names)) <= set(fluxchat.__all__)


def test_stages_take_the_recipes_and_settings_that_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    stages = set()
    for text in TEXTS:
        lines = "".join(blocks(text, "console")).replace("\\\n", " ").splitlines()
        for stage, options in re.findall(
            r"-m training\.(\w+) +(--config training/[^#\n]*)", "\n".join(lines)
        ):
            arguments = [option for option in options.split() if option != "--test"]
            status = import_module(f"training.{stage}").main([*arguments, "--print"])
            assert status == 0, f"{text.name}, {stage} {options}: {capsys.readouterr().err}"
            stages.add(stage)
    assert {"umt", "finetune", "clip", "projector_warmup", "chat_stage1", "chat_lora"} <= stages


def test_routes_and_fields_of_the_http_reference_exist() -> None:
    text = (ROOT / "docs" / "reference" / "http.md").read_text()
    server = "\n".join(path.read_text() for path in (ROOT / "app" / "server").rglob("*.py"))
    for route in re.findall(r"`(?:GET|POST|DELETE) (/[^`]*)`", text):
        assert f'"{route}"' in server, route
    fields = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`[^|]*) \| [vhs]", text, flags=re.MULTILINE)))
    assert {"token_budget", "selector", "top_k"} <= set(fields)
    for field in fields:
        assert re.search(rf"^    {field}: ", server, flags=re.MULTILINE), field


def test_the_recipe_of_the_training_guide_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from training.chat_stage1 import Stage1Recipe
    from training.trainer.recipe import read_recipe

    [block] = blocks(ROOT / "docs" / "how-to" / "train.md", "yaml")
    recipe = yaml.safe_load(block)
    recipe["base"] = str(ROOT / recipe["base"])
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(recipe))
    assert read_recipe(Stage1Recipe, tmp_path / "my.yaml").loop.out == recipe["loop"]["out"]


@pytest.mark.slow
def test_the_pages_build_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocstrings")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "VideoChat" in (tmp_path / "reference" / "fluxchat.html").read_text()
    assert "select_flux" in (tmp_path / "reference" / "encoder.html").read_text()
