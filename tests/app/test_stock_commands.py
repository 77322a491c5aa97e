"""The commands on a stock video model of each kind: what a user types, and one sentence for a fault."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from app.cli import main
from tests import tiny_llms, tiny_video_models
from tests.app.conftest import WORLD
from tests.tiny_video_models import KINDS, ONE_QUICK


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("stock")
    return {kind: tiny_video_models.make(root / kind, kind) for kind in KINDS}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ONE_QUICK)
@pytest.mark.usefixtures("measured_speeds")  # of a tower other than FluxViT
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


def _internvl(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "internvl"}))
    return "is a 'internvl' model, which cannot be shown videos here"


def _cut(folder: Path) -> str:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5000])
    return "it is cut off or damaged"


def _no_tokenizer(folder: Path) -> str:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    return "it has no tokenizer.json"


def _other_shapes(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 96
    (folder / "config.json").write_text(json.dumps(config))
    return "its weights have other shapes than its config.json says"


def _half_a_config(folder: Path) -> str:
    (folder / "config.json").write_text('{"model_type": "smolvlm", ')
    return "cannot read its config.json"


@pytest.mark.parametrize("kind", ["smolvlm", "qwen3_vl"])
@pytest.mark.parametrize("harm", [_internvl, _cut, _no_tokenizer, _other_shapes, _half_a_config])
def test_a_folder_that_cannot_be_used_says_why(
    kind: str,
    harm: Callable[[Path], str],
    folders: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = Path(shutil.copytree(folders[kind], tmp_path / "model"))
    words = harm(folder)
    assert main(["ask", str(WORLD), "What?", "--model", str(folder), "--device", "cpu"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("fluxchat: ")
    assert words in error


def test_a_language_model_alone_is_no_video_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_llms.make(tmp_path / "text", "qwen2")
    assert main(["ask", str(WORLD), "What?", "--model", str(folder)]) == 2
    assert "is a 'qwen2' model, which cannot be shown videos here" in capsys.readouterr().err


def test_what_cannot_be_shown_videos_is_not_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    loaded: list[object] = []
    monkeypatch.setattr("llm_bridge.towers.stock.open_settings", lambda name: tmp_path)
    monkeypatch.setattr("llm_bridge.towers.stock.load_pretrained", lambda *a, **k: loaded.append(a))
    assert main(["ask", str(WORLD), "What?", "--model", "someone/Llama-8B"]) == 2
    assert "someone/Llama-8B is a 'llama' model" in capsys.readouterr().err
    assert not loaded
