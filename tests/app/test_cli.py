"""The `fluxchat` command as people run it: real processes, real files, exit codes, one line on stderr."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from app.cli import build_parser
from tests import video_files as vf


def fluxchat(*args: object, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "app", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, input=stdin, timeout=120)


def empty(folder: Path) -> Path:
    (folder / "empty.mp4").touch()
    return folder / "empty.mp4"


def text(folder: Path) -> Path:
    (folder / "text.mp4").write_text("not a video")
    return folder / "text.mp4"


def cut(folder: Path) -> Path:
    return vf.truncated(vf.write(folder / "whole.mp4", vf.steady(60)), folder / "cut.mp4", 0.5)


def lying(folder: Path) -> Path:
    return vf.lying_matroska(vf.write(folder / "short.mkv", vf.steady(60)), folder / "lie.mkv", 36_000)


BAD: dict[str, Callable[[Path], Path]] = {
    "missing": lambda folder: folder / "missing.mp4",
    "directory": lambda folder: folder,
    "empty": empty,
    "text": text,
    "cut": cut,
    "audio only": lambda folder: vf.audio_only(folder / "sound.mp4"),
    "20000 pixels": lambda folder: vf.huge(folder / "huge.avi"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_one_line_within_ten_seconds(tmp_path: Path, kind: str) -> None:
    path = BAD[kind](tmp_path)
    start = time.monotonic()
    done = fluxchat("ask", path, "What happens?")
    assert time.monotonic() - start < 10
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.startswith("fluxchat: ")


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--budget", "many"], "budget"),
        (["--budget", "0"], "at least 1"),
        (["--temperature", "-1"], "temperature"),
        (["--max-new-tokens", "0"], "max_new_tokens"),
        (["--model", "nowhere"], "not a FluxChat model"),
        (["--device", "abacus"], "device"),
        (["--llm", "./nowhere"], "no model at"),
    ],
)
def test_a_wrong_option_is_one_line(tmp_path: Path, options: list[str], word: str) -> None:
    video = vf.write(tmp_path / "v.mp4", vf.steady(10))
    done = fluxchat("ask", video, "What?", *options)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert word in done.stderr


def test_an_empty_question_is_refused(tmp_path: Path) -> None:
    done = fluxchat("ask", vf.write(tmp_path / "v.mp4", vf.steady(10)), "  ")
    assert (done.returncode, done.stderr) == (2, "fluxchat: The question is empty: ask something in words.\n")


def test_help_teaches() -> None:
    text = build_parser().format_help()
    for word in ("examples:", "--budget auto:1.5", "estimate", "--quantize"):
        assert word in text
    assert fluxchat("ask", "--help").returncode == 0
    assert fluxchat("dance").returncode == 2


@pytest.fixture(scope="module")
def shipped_example() -> Path:
    found = sorted((Path(__file__).parents[2] / "app" / "pretrained" / "examples").glob("*.mp4"))
    return found[0]


def test_ask_json_with_the_shipped_model(shipped_example: Path) -> None:
    done = fluxchat("ask", shipped_example, "What is in the video?", "--json", "--budget", "64")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["text"]
    assert answer["usage"]["kept_tokens"] == 64
    assert len(answer["kept"][0]["indices"]) == 64
    assert 0 < answer["timings"]["first_token_s"] <= answer["timings"]["total_s"]


def test_chat_reads_questions_and_commands(shipped_example: Path) -> None:
    lines = "What is in the video?\n/budget 32\nWhich way?\n/budget none\n/video nowhere.mp4\n/quit\n"
    done = fluxchat("chat", shipped_example, "--max-new-tokens", "12", stdin=lines)
    assert done.returncode == 0, done.stderr
    assert "32 of" in done.stdout
    assert "! A budget is" in done.stdout
    assert "there is no such file" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_estimate_and_info(shipped_example: Path) -> None:
    price = json.loads(fluxchat("estimate", shipped_example, "--budget", "64", "--json").stdout)
    assert price["kept_tokens"] == 64
    assert price["first_token_s"] > 0
    info = json.loads(fluxchat("info", "--json").stdout)
    assert "SmolLM2-135M-Instruct" in info["llm"]
