"""The Hugging Face Space: the files that would be pushed run by themselves."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import gradio
import httpx
import pytest
import yaml

from encoder.errors import ConfigError
from llm_bridge.model import VideoLanguageModel
from tests import ROOT
from tests.app.server.serving import answer, ask
from tests.patience import PATIENCE_S


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if sys.version_info < (3, 11):
        pytest.skip("tomllib came with Python 3.11")
    target = tmp_path_factory.mktemp("space")
    subprocess.run([sys.executable, ROOT / "app/integrations/space/build.py", target], check=True, cwd=target)
    return target


def test_the_readme_header_matches_the_package(space: Path) -> None:
    _, header, _ = (space / "README.md").read_text().split("---\n", 2)
    values = yaml.safe_load(header)
    assert values["sdk"] == "gradio"
    assert (space / values["app_file"]).is_file()
    wanted, had = (tuple(map(int, v.split(".")[:2])) for v in (values["sdk_version"], gradio.__version__))
    assert had >= wanted >= (6, 31)
    names = {re.split(r"[>=; ]", line)[0] for line in (space / "requirements.txt").read_text().splitlines()}
    assert {"torch", "transformers", "av", "safetensors"} <= names
    assert "gradio" not in names


def test_build_refuses_a_folder_that_is_not_empty(space: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "app/integrations/space/build.py", space],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 1
    assert "is not empty" in done.stderr


@pytest.mark.slow
def test_the_built_space_runs(space: Path, tiny_model: VideoLanguageModel, tmp_path: Path) -> None:
    tiny_model.save_pretrained(tmp_path / "model")
    env = {
        **os.environ,
        "FLUXCHAT_MODEL": str(tmp_path / "model"),
        "GRADIO_SERVER_PORT": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    which = [sys.executable, "-c", "import app; print(app.__file__)"]
    found = subprocess.run(which, cwd=space, capture_output=True, text=True, check=True).stdout
    assert Path(found.strip()).is_relative_to(space)  # not this repository's
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "app.py"], cwd=space, stdout=subprocess.PIPE, text=True, env=env
    )
    try:
        assert process.stdout is not None
        address = process.stdout.readline().split()[-1]
        assert answer(ask(address, "What?", max_tokens=3)) is not None
        assert "fluxchat-question" in httpx.get(f"{address}/config").text
    finally:
        process.terminate()
        assert process.wait(PATIENCE_S) == 0


def test_a_wrong_login_is_an_error() -> None:
    from app.server.options import parse_login

    with pytest.raises(ConfigError):
        parse_login("nobody")
