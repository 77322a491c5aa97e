"""What all commands share: help from the docstring, one line for an error, tables."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from encoder.errors import DataError
from training.command_line import command_parser, run_command, table

MODULES = ("evaluate", "optimize_tokens", "plots", "results", "release", "synthetic.__main__")


@pytest.mark.parametrize("name", MODULES)
def test_help_names_the_command_and_is_its_docstring(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(f"training.{name}")
    with pytest.raises(SystemExit, match="0"):
        module.main(["--help"])
    text = capsys.readouterr().out
    assert f"usage: python -m training.{name.removesuffix('.__main__')} " in text
    assert module.__doc__.strip().splitlines()[0] in text


def test_a_command_gets_its_words_and_its_errors_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    parser = command_parser("training.x", "Does x.")
    parser.add_argument("--y", type=int)
    words = []
    assert run_command(parser, lambda args: words.extend(args.command_line), ["--y", "3"]) == 0
    assert words == ["python", "-m", "training.x", "--y", "3"]

    def fail(args: object) -> None:
        raise DataError("It cannot be read.")

    assert run_command(parser, fail, []) == 2
    assert capsys.readouterr().err == "It cannot be read.\n"


def test_a_file_that_cannot_be_written_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(args: object) -> None:
        (tmp_path / "none" / "result.json").write_text("{}")

    assert run_command(command_parser("training.x", "Does x."), write, []) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"Cannot read or write {tmp_path}/none/result.json: No such file or directory; ")

    def ask(args: object) -> None:
        raise ConnectionRefusedError(111, "Connection refused")

    with pytest.raises(ConnectionRefusedError):
        run_command(command_parser("training.x", "Does x."), ask, [])


@pytest.mark.parametrize(
    "words",
    [
        ["evaluate", "classify", "--dataset", "k400", "--encoder", "e", "--limit", "-1"],
        ["evaluate", "classify", "--dataset", "k400", "--encoder", "e", "--clips-per-video", "0"],
        ["evaluate", "world", "--model", "m", "--unseen-clips", "-1"],
        ["evaluate", "world", "--encoder", "e", "--block", "0"],
        ["evaluate", "world", "--model", "m", "--clips", "0"],
        ["evaluate", "world", "--model", "m", "--nouns", "0"],
        ["evaluate", "world", "--encoder", "e", "--pool", "-1"],
        ["evaluate", "world", "--encoder", "e", "--budget", "-1"],
        ["optimize_tokens", "--encoder", "e", "--tokens", "8", "--out", "o", "--patience", "0"],
        ["optimize_tokens", "--encoder", "e", "--out", "o", "--tokens", "0"],
        ["optimize_tokens", "--encoder", "e", "--tokens", "8", "--out", "o", "--frames", "0"],
        ["optimize_tokens", "--encoder", "e", "--tokens", "8", "--out", "o", "--resolutions", "-14"],
        ["results", "--clips", "-1"],
        ["results", "--chat-clips", "-1"],
        ["results", "--tokens", "-1"],
        ["results", "--chat-tokens", "0"],
        ["results", "--frames", "-4"],
        ["results", "--resolutions", "0"],
        ["results", "--pool", "-1"],
        ["familiarity", "--model", "m", "--photos", "p", "--clips", "7"],
        ["familiarity", "--model", "m", "--photos", "p", "--held-out", "-8"],
        ["familiarity", "--model", "m", "--photos", "p", "--units", "-1"],
        ["familiarity", "--model", "m", "--photos", "p", "--workers", "-1"],
    ],
)
def test_counts_below_the_least_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    command, *arguments = words
    with pytest.raises(SystemExit, match="2"):
        importlib.import_module(f"training.{command}").main(arguments)
    assert f"argument {words[-2]}: must be at least " in capsys.readouterr().err


def test_table_columns() -> None:
    rows = [["x", 1.25], ["long", None]]
    assert table(["a", "b"], rows) == "a       b\nx     1.2\nlong    -"
    assert table(["a", "b"], [["x", "yes"]], left=2, rule=True).splitlines() == ["a  b  ", "-  ---", "x  yes"]
