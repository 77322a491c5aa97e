"""The results page: only what was measured, each table with its command; findings stay."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from encoder.errors import DataError
from tests.llm_bridge.text_encoders.tiny_towers import sentence_folder
from tests.training.synthetic.tiny_world import make_cache, make_encoder
from training import evaluate
from training.evaluation.ability_metrics import GOALS
from training.results import SECTIONS, commands, findings, main, page


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of two real commands."""
    folder = tmp_path_factory.mktemp("results")
    run, cache = make_encoder(folder / "run"), make_cache(folder / "cache")
    sentence_folder(folder / "tower")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLUXCHAT_CACHE", str(cache))
        for name, dataset in (("world", []), ("retrieval", ["--dataset", "world"])):
            stem = "world_encoder" if name == "world" else name
            arguments = ["--encoder", str(run / "encoder"), "--alignment", str(run), "--clips", "6"]
            arguments += ["--text-tower", str(folder / "tower"), "--budget", "16"]
            assert evaluate.main([name, *dataset, *arguments, "--out", str(folder / f"{stem}.json")]) == 0
    return folder


def test_tables_with_their_commands_and_sources(results: Path) -> None:
    text = page(results, ["python", "-m", "training.results"])
    told = json.loads((results / "retrieval.json").read_text())
    assert told["command"] in text
    assert f"weights `{told['weights']}`" in text
    share = 100 * told["settings"][0]["scores"]["plain"]["T2V"]["R@1"]["value"]
    assert f"{share:.1f}" in text.split("## Retrieval by caption")[1].split("## ")[0]
    assert text.count("Not measured yet.") == len(SECTIONS) - 2


def test_the_chat_tables_share_one_result(results: Path, tmp_path: Path) -> None:
    rows = {name: {"accuracy": 0.5, "low": 0.4, "high": 0.6, "n": 9, "chance": 0.25} for name in GOALS}
    runs = {
        name: {"goals": rows, "parts": {}, "tasks": {}}
        for name in ("flux 64", "flux 16", "random 64", "blind")
    }
    about = json.loads((results / "retrieval.json").read_text())
    (tmp_path / "world_chat.json").write_text(json.dumps({**about, "runs": runs}))
    first, second = page(tmp_path, ["x"]).split("\n## ")[1:3]
    assert "flux 64" in first
    assert "blind" in first
    assert "flux 16" not in first
    assert [line.split("  ")[0] for line in second.splitlines() if "50.0 [40, 60]" in line] == list(runs)


def test_findings_stay(results: Path) -> None:
    first = page(results, ["x"])
    said = "Finding: as in the paper, the selector\nis far above chance selection."
    edited = first.replace("## Zero-shot action", f"{said}\n\nMore words.\n\n## Zero-shot action")
    assert findings(edited) == {"Retrieval by caption": said}
    second = page(results, ["x"], edited)
    assert said in second.split("## Retrieval by caption")[1].split("## ")[0]
    assert page(results, ["x"], second) == second


def test_tables_stay_when_their_files_are_gone(results: Path, tmp_path: Path) -> None:
    old = page(results, ["x"])
    for gone in (tmp_path, tmp_path / "again"):
        gone.mkdir(exist_ok=True)
        assert page(gone, ["x"], old) == old
    shutil.copy(results / "retrieval.json", tmp_path)
    told = json.loads((tmp_path / "retrieval.json").read_text())
    (tmp_path / "retrieval.json").write_text(json.dumps({**told, "command": "python of another day"}))
    new = page(tmp_path, ["x"], old)
    assert new != old
    assert new.count("python of another day") == 1
    assert new.split("## Classification")[1] == old.split("## Classification")[1]


def test_damaged_results(tmp_path: Path) -> None:
    (tmp_path / "retrieval.json").write_text('{"command": "x"}')
    with pytest.raises(DataError, match=r"retrieval\.json is not a result"):
        page(tmp_path, ["x"])


def test_the_command_writes_the_page_alone(results: Path, tmp_path: Path, capsys) -> None:
    assert main(["--results", str(results), "--page", str(tmp_path / "RESULTS.md")]) == 0
    assert (tmp_path / "RESULTS.md").read_text().startswith("# Results")
    assert f"{len(SECTIONS)} tables" in capsys.readouterr().out


def test_every_command_parses() -> None:
    """What the page would run is what the commands accept."""
    import argparse

    from training.evaluation.options import parser
    from training.optimize_tokens import parser as token_parser

    args = argparse.Namespace(
        model="m",
        clip="c",
        results="r",
        clips=8,
        chat_clips=4,
        tokens=[64, 32],
        chat_tokens=[64, 16],
        chat_preset="full",
        install="m",
        plan=True,
        frames=[8],
        resolutions=None,
        pool=1,
        preset="solo",
        recipe="cpu/clip.yaml",
    )
    found = commands(args)
    assert len(found) == len({section.stem for section in SECTIONS})
    for command in found:
        module, rest = command[1], command[2:]
        known = token_parser() if module == "training.optimize_tokens" else parser(None)
        parsed = known.parse_args(rest)
        assert parsed.recipe == "cpu/clip.yaml"
        assert parsed.out.startswith("r/")
        assert parsed.preset == ("full" if "--model" in rest else "solo")
    chat, forms = (parser(None).parse_args(command[2:]) for command in found[:2])
    assert chat.plan
    assert (chat.budget, chat.compare, forms.budget) == ([64, 16], ["uniform", "random"], [64])
    args.clip = None
    assert [c[2] for c in commands(args)] == ["world", "mvbench"]


def test_a_failing_command_stops(tmp_path: Path, capfd) -> None:
    assert main(["--model", str(tmp_path / "none"), "--results", str(tmp_path)]) == 2
    assert "is not a FluxChat model" in capfd.readouterr().err
