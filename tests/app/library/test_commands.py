"""`fluxchat index` and `fluxchat search` on a tiny CLIP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from app import cli
from app.library import player
from app.speech import weights
from encoder.video.reader import probe
from llm_bridge.text_encoders import text_towers
from tests import ROOT
from tests.llm_bridge.text_encoders.tiny_towers import clip_folder


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs a command; (status, standard output, standard error)."""
    clip_folder(tmp_path / "clip")
    monkeypatch.setenv("FLUXCHAT_LIBRARY", str(tmp_path / "index"))
    capsys.readouterr()  # of saving the model

    def run(*args: object) -> tuple[int, str, str]:
        status = cli.main([*map(str, args)])
        out = capsys.readouterr()
        return status, out.out, out.err

    return run


def test_from_a_folder_to_a_clip(command: Any, videos: Path, tmp_path: Path) -> None:
    status, out, err = command("index", videos, "--seconds", 2, "--embedder", tmp_path / "clip")
    assert (status, err) == (0, "")
    assert out == "4 videos indexed (5 clips), 0 unchanged.\n"
    assert command("index", "--check")[:2] == (0, "All is up to date.\n")
    status, out, _ = command("search", "a dog", "--top", 2, "--json", "--clip", tmp_path / "best.mp4")
    assert status == 0
    found = json.loads(out)
    assert [set(hit) for hit in found["hits"]] == [
        {"path", "start_s", "end_s", "score", "thumbnail", "said", "language"}
    ] * 2
    assert all(Path(hit["thumbnail"]).is_file() for hit in found["hits"])
    assert probe(str(tmp_path / "best.mp4")).duration_s >= 1
    lines = command("search", "a dog")[1].splitlines()
    assert len(lines) == 5
    status, out, err = command("search", "a dog", "--clip", tmp_path / "best.mp4")
    assert status == 2
    assert "--force" in err
    out = command("search", "a dog", "--clip", tmp_path / "best.mp4", "--force")[1]
    assert out.splitlines()[-1].startswith(f"{tmp_path / 'best.mp4'}: 0:00")
    assert found["hits"][0]["path"] in lines[0]


def test_what_is_stale_is_said_and_mended(command: Any, videos: Path, tmp_path: Path) -> None:
    (videos / "broken.mp4").touch()
    status, out, _ = command("index", videos, "--embedder", tmp_path / "clip")
    assert status == 1
    assert f"{videos / 'broken.mp4'}: ! " in out
    (videos / "broken.mp4").unlink()
    (videos / "red.mp4").unlink()
    assert "1 file was left out" in command("search", "a dog")[2]
    status, out, _ = command("index", "--check", "--json")
    assert status == 1
    assert {row["what"] for row in json.loads(out)} == {"gone", "unreadable"}
    status, out, _ = command("index", "--repair")
    assert status == 0
    assert "2 dropped" in out
    assert command("index", "--check")[0] == 0


@pytest.mark.slow
def test_a_line_break_in_a_name_breaks_no_line(command: Any, videos: Path, tmp_path: Path) -> None:
    (videos / "red.mp4").rename(videos / "red\nfilm.mp4")
    (videos / "bro\nken.mp4").touch()
    status, out, _ = command("index", videos, "--embedder", tmp_path / "clip")
    assert status == 1
    assert [line.startswith((f"{videos}/", "4 videos")) for line in out.splitlines()] == [True, True]
    assert len(command("search", "a dog")[1].splitlines()) == 4
    assert rf"{videos}/red\nfilm.mp4" in command("search", "a dog")[1]
    (videos / "red\nfilm.mp4").unlink()
    lines = command("index", "--check")[1].splitlines()
    assert sorted(line.split(":")[0] for line in lines[:-1]) == ["gone", "unreadable"]
    for answers in ("map", "ask"):
        asked = [answers, "What?", videos / "bro\nken.mp4", "--out", tmp_path / "answers.jsonl"]
        if answers == "ask":
            asked = ["ask", videos / "bro\nken.mp4", "What?", "--each"]
        status, out, _ = command(*asked)
        assert status == 1
        assert rf"{videos}/bro\nken.mp4: ! " in out
        assert len(out.splitlines()) == {"map": 2, "ask": 1}[answers]


def test_the_best_is_played_at_its_time(
    command: Any, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command("index", videos / "deep er", "--seconds", 2, "--embedder", tmp_path / "clip")
    played: list[list[str]] = []
    monkeypatch.setattr(player.shutil, "which", lambda name: f"/bin/{name}" if name == "mpv" else None)
    monkeypatch.setattr(player.subprocess, "call", lambda words: played.append(words))
    _, out, _ = command("search", "a dog", "--json", "--play")
    best = json.loads(out)["hits"][0]
    assert played == [["/bin/mpv", f"--start={best['start_s']:.2f}", best["path"]]]
    # What opens files by their kind knows none for videos.
    monkeypatch.setattr(player.sys, "platform", "linux")
    monkeypatch.setattr(player.shutil, "which", lambda name: "/bin/false" if name == "xdg-open" else None)
    monkeypatch.setattr(player.subprocess, "call", lambda words, **_: 3)
    status, _, err = command("search", "a dog", "--play")
    assert status == 2
    assert "install mpv" in err
    monkeypatch.setattr(player.shutil, "which", lambda name: None)
    status, _, err = command("search", "a dog", "--play")
    assert status == 2
    assert "install mpv" in err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["index"], "Name the videos"),
        (["index", "--check", "--repair"], "give one of them"),
        (["index", "a.mp4", "--check"], "give no videos"),
        (["index", "a.mp4", "--language", "de"], "go with --speech"),
        (["search", "a dog"], "no library in"),
        (["index", str(ROOT / "app" / "pretrained" / "examples"), "--device", "abacus"], "no device abacus"),
    ],
)
def test_wrong_inputs_are_one_line(command: Any, args: list[str], said: str) -> None:
    status, _, err = command(*args)
    assert status == 2
    assert said in err
    assert err.count("\n") == 1


def test_fetch_text_gets_the_text_tower(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(text_towers, "sentence_tower_path", lambda: tmp_path / "tower")
    assert cli.main(["fetch", "--text"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'tower'}\n"
    monkeypatch.setattr(weights, "fetch_speech_model", lambda model: tmp_path / model.name)
    assert cli.main(["fetch", "--text", "--speech"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'tower'}\n{tmp_path / 'tiny.en'}\n"
    assert cli.main(["fetch", "--speech", "base"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'base'}\n"


def test_nothing_found_is_said(command: Any, videos: Path, tmp_path: Path) -> None:
    command("index", videos / "red.mp4", "--embedder", tmp_path / "clip")
    (videos / "red.mp4").unlink()
    status, out, err = command("search", "a dog")
    assert (status, out) == (0, "")
    assert err.startswith("Nothing was found.\n1 file was left out")
    status, _, err = command("search", "a dog", "--play")
    assert (status, err.splitlines()[-1]) == (
        2,
        "fluxchat: There is no clip to play or cut out: run `fluxchat index --repair`.",
    )
