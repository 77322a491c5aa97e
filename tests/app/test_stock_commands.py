"""The commands on a stock video model of each kind: what a user types, and one sentence for a fault."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from app.cli import main
from tests import tiny_video_models
from tests.app.conftest import WORLD
from tests.tiny_video_models import KINDS


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("stock")
    return {kind: tiny_video_models.make(root / kind, kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_the_commands(
    kind: str, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model", str(folders[kind]), "--device", "cpu"]
    picture = tmp_path / "a.png"
    Image.new("RGB", (300, 200), (200, 30, 30)).save(picture)
    for medium in (WORLD, picture):
        capsys.readouterr()
        asked = ["ask", str(medium), "What is it?", "--budget", "20", "--max-new-tokens", "3", "--json"]
        assert main([*asked, *model]) == 0
        usage = json.loads(capsys.readouterr().out)["usage"]
        assert 0 < usage["kept_tokens"] <= 20
        assert main(["estimate", str(medium), "--budget", "20", "--json", *model]) == 0
        assert json.loads(capsys.readouterr().out)["kept_tokens"] == usage["kept_tokens"]
    assert main(["info", "--json", *model]) == 0
    assert json.loads(capsys.readouterr().out)["select"] == "after the encoder"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--llm", "a/b"], "leave out llm and encoder"),
        (["--encoder", "x.pth"], "leave out llm and encoder"),
        (["--plan", "nowhere.json"], "No such file or directory."),
        (["--think"], "does not think before it answers"),
        (["--adapters", "nowhere/at/all"], "adapter"),
        (["--budget", "0"], "at least 1"),
    ],
)
def test_faults_are_one_sentence(
    kind: str,
    options: list[str],
    words: str,
    folders: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["ask", str(WORLD), "What?", "--model", str(folders[kind]), "--device", "cpu", *options]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("fluxchat: ")
    assert words in error
