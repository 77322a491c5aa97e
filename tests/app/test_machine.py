"""A machine that is not ideal: one line, or going on without what is missing."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app import cli
from app.about import machine_info
from app.estimate import Calibration
from app.page.settings import Settings
from encoder.errors import FluxChatError
from llm_bridge.assets import cache_dir
from llm_bridge.model import VideoLanguageModel
from tests.patience import PATIENCE_S

GOOD: dict[str, Any] = {
    "decode": {"weights": [1.0, 2.0, 0.0]},
    "encode": {"weights": [1, 2.0, 0.0, 3.0]},
    "prefill": {"weights": [0.5, 0.1, 0.0]},
}


def test_a_calibration_is_what_it_was() -> None:
    assert Calibration.of(GOOD).encode.weights == (1.0, 2.0, 0.0, 3.0)


@pytest.mark.parametrize(
    "weights",
    [
        *(["a", "b", "c"], [1.0], [], [1.0] * 4, [0.0, 0.0, 0.0], [-1.0, 2.0, 3.0], [True, 1.0, 1.0], None),
        *([float("nan"), 1.0, 1.0], [float("inf"), 1.0, 1.0], [1e300, 1.0, 1.0], [[1.0], 1.0, 1.0], "abc", 5),
    ],
)
def test_numbers_that_were_never_measured_are_no_calibration(weights: object) -> None:
    with pytest.raises((ValueError, TypeError, KeyError)):
        Calibration.of({**GOOD, "prefill": {"weights": weights}})


@pytest.mark.parametrize(
    "values", [{}, {"decode": GOOD["decode"]}, {**GOOD, "later": {}}, {**GOOD, "decode": []}]
)
def test_another_versions_calibration_is_none(values: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError, KeyError)):
        Calibration.of(values)


def test_speeds_that_cannot_be_kept_are_measured_each_time(
    tiny_model: VideoLanguageModel, measured_speeds: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured_speeds.write_text("")
    monkeypatch.setattr(Calibration, "measure", lambda model: Calibration.of(GOOD))
    cache_dir._warn_once.cache_clear()
    assert Calibration.load_or_measure(tiny_model) == Calibration.load_or_measure(tiny_model)


PRINTING = "import app.cli as c; c.run_fetch = lambda _: print('{}') or 0; exit(c.main(['fetch']))"


# -- the command line ----------------------------------------------------------------------------------------


def raising(error: BaseException) -> Callable[[object], int]:
    def run(_: object) -> int:
        raise error

    return run


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "/some/file"),
        FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']"),
        FileNotFoundError(errno.ENOENT, "No such file or directory"),
        MemoryError(),
    ],
)
def test_what_the_machine_refuses_is_one_line(
    error: BaseException, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "run_fetch", raising(error))
    monkeypatch.setattr(cli, "_discard_output", lambda: None)
    assert cli.main(["fetch"]) == 2
    said = capfd.readouterr().err
    assert said.startswith("fluxchat: This machine refuses: ")
    assert said.count("\n") == 1


def test_a_full_disk_behind_standard_output_is_one_line() -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    code = PRINTING.format("xxx")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True, timeout=PATIENCE_S
        )
    assert done.returncode == 2
    assert done.stderr == "fluxchat: This machine refuses: No space left on device.\n"


def test_a_reader_that_has_enough_is_no_fault() -> None:
    code = PRINTING.format("xxx")
    reads, writes = os.pipe()
    os.close(reads)
    with open(writes, "w") as closed:
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=closed, stderr=subprocess.PIPE, text=True, timeout=PATIENCE_S
        )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_terminal_that_knows_few_letters_shows_the_others_as_question_marks() -> None:
    code = (
        "import app.cli as c; c.run_fetch = lambda _: print('caf\\xe9 \\U0001f415') or 0; c.main(['fetch'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert (done.stdout, done.stderr) == ("caf? ?\n", "")


# -- what a bug report needs ---------------------------------------------------------------------------------


def test_info_works_without_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FLUXCHAT_CACHE", str(tmp_path / "none"))
    assert cli.main(["info", "--json", "--device", "cpu"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["model"].startswith("cannot be loaded: The language model ")
    assert "run `fluxchat fetch` once" in told["default_llm"]
    assert told["python"]
    assert told["transformers"]
    assert not (tmp_path / "none" / "SmolLM2-135M-Instruct").exists()


def test_info_says_which_folders_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLUXCHAT_CACHE", str(tmp_path / "file" / "cache"))
    told = machine_info()
    assert "cannot be written (Not a directory)" in told["cache_folder"]
    assert all(isinstance(value, str) and value.isprintable() for value in told.values())


@pytest.mark.parametrize(
    "change",
    [
        *({"tokens": "many"}, {"frames": "x"}, {"resolution": None}, {"auto": True, "seconds": "soon"}),
        *(
            {"temperature": "hot"},
            {"max_new_tokens": float("inf")},
            {"system": None},
            {"tokens": float("nan")},
        ),
    ],
)
def test_controls_that_hold_no_numbers_are_one_sentence(change: dict[str, Any]) -> None:
    plain: dict[str, Any] = {"tokens": 64, "auto": False, "seconds": 1.0, "selector": "flux"}
    settings = Settings(**{**plain, "frames": "by budget", "resolution": "by budget", **change})
    with pytest.raises(FluxChatError, match=r"must be [^\n]*\.$"):
        settings.options()
