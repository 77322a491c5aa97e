"""The results page: written from stored files alone, each table with its command; findings stay."""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
from pathlib import Path

import pytest
from PIL import Image

from encoder.errors import DataError
from tests.llm_bridge.text_encoders.tiny_towers import sentence_folder
from tests.training.synthetic.tiny_world import make_encoder
from training import evaluate, optimize_tokens, plots
from training.evaluation.ability_metrics import ABILITIES
from training.results import NOT_MEASURED, PAGE, SECTIONS, STORE, commands, main, page, sections, store


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, world_cache: Path) -> Path:
    """Results of two real commands."""
    folder = tmp_path_factory.mktemp("results")
    run = make_encoder(folder / "run")
    sentence_folder(folder / "tower")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLUXCHAT_CACHE", str(world_cache))
        for name, dataset in (("world", []), ("retrieval", ["--dataset", "world"])):
            stem = "world_encoder" if name == "world" else name
            arguments = ["--encoder", str(run / "encoder"), "--alignment", str(run), "--clips", "6"]
            arguments += ["--text-tower", str(folder / "tower"), "--budget", "16"]
            assert evaluate.main([name, *dataset, *arguments, "--out", str(folder / f"{stem}.json")]) == 0
    return folder


def test_the_committed_page_is_made_of_the_committed_files(tmp_path: Path) -> None:
    shutil.copytree(PAGE.parent / STORE, tmp_path / STORE)
    assert main(["--page", str(tmp_path / PAGE.name)]) == 0
    assert (tmp_path / PAGE.name).read_bytes() == PAGE.read_bytes()
    assert NOT_MEASURED not in PAGE.read_text()


@pytest.mark.parametrize("stem", sorted({section.stem for section in SECTIONS}))
def test_the_commands_on_the_page_are_commands_of_today(stem: str) -> None:
    command = json.loads((PAGE.parent / STORE / f"{stem}.json").read_text())["command"]
    assert command in PAGE.read_text()
    python, flag, module, *arguments = shlex.split(command)
    assert (python, flag) == ("python", "-m")
    parsers = {"training.evaluate": evaluate.parser, "training.optimize_tokens": optimize_tokens.parser}
    parsers["training.plots"] = plots.parser
    parsers[module]().parse_args(arguments)


def test_tables_with_their_commands_and_sources(results: Path) -> None:
    text = page(results)
    result = json.loads((results / "retrieval.json").read_text())
    assert result["command"] in text
    assert f"weights `{result['weights']}`" in text
    share = 100 * result["settings"][0]["scores"]["plain"]["T2V"]["R@1"]["value"]
    assert f"{share:.1f}" in text.split("## Retrieval by caption")[1].split("## ")[0]
    assert text.count(NOT_MEASURED) == len(SECTIONS) - 2


@pytest.mark.parametrize("without_video", ["text-only", "blind"])
def test_the_chat_tables_share_one_result(results: Path, tmp_path: Path, without_video: str) -> None:
    rows = {name: {"accuracy": 0.5, "low": 0.4, "high": 0.6, "n": 9, "chance": 0.25} for name in ABILITIES}
    runs = {
        name: {"goals": rows, "parts": {}, "tasks": {}}
        for name in ("flux 64", "flux 16", "random 64", without_video)
    }
    about = json.loads((results / "retrieval.json").read_text())
    (tmp_path / "world_chat.json").write_text(json.dumps({**about, "runs": runs}))
    first, second = page(tmp_path).split("\n## ")[1:3]
    assert "flux 64" in first
    assert without_video in first
    assert "flux 16" not in first
    assert [line.split("  ")[0] for line in second.splitlines() if "50.0 [40, 60]" in line] == list(runs)


def test_findings_stand_below_their_tables(results: Path, tmp_path: Path) -> None:
    folder = tmp_path / STORE
    store(results, folder)
    finding = "Finding: as in the paper, the selector\nis far above chance selection.\n\nMore words."
    (folder / "findings.md").write_text(f"# Findings\n\n## Retrieval by caption\n\n{finding}\n")
    assert sections(page(folder))["Retrieval by caption"].endswith(f"\n\n{finding}")
    assert page(folder).count("Finding:") == 1


def test_tables_stay_when_the_folder_of_a_run_is_gone(results: Path, tmp_path: Path, capsys) -> None:
    target = tmp_path / "RESULTS.md"
    assert main(["--results", str(results), "--page", str(target)]) == 0
    old = target.read_text()
    assert f"{len(SECTIONS)} tables" in capsys.readouterr().out
    assert main(["--results", str(tmp_path / "gone"), "--page", str(target)]) == 0
    assert target.read_text() == old
    again = tmp_path / "again"
    again.mkdir()
    result = json.loads((results / "retrieval.json").read_text())
    (again / "retrieval.json").write_text(json.dumps({**result, "command": "python of another day"}))
    assert main(["--results", str(again), "--page", str(target)]) == 0
    new = target.read_text()
    assert new.count("python of another day") == 1
    assert new.split("## Zero-shot")[1] == old.split("## Zero-shot")[1]
    assert (
        sections(new)["What the encoder tells by itself"] == sections(old)["What the encoder tells by itself"]
    )


def test_pictures_are_stored_beside_their_result(results: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "tokens").mkdir(parents=True)
    shutil.copy(PAGE.parent / STORE / "tokens" / "result.json", run / "tokens" / "result.json")
    (run / "tokens" / "heatmap_64.png").write_bytes(b"picture")
    (run / "tokens" / "grid_64.csv").write_text("")
    store(run, tmp_path / STORE)
    assert {path.name for path in (tmp_path / STORE / "tokens").iterdir()} == {
        "result.json",
        "heatmap_64.png",
    }
    assert f"![heatmap_64]({STORE}/tokens/heatmap_64.png)" in page(tmp_path / STORE)


@pytest.mark.slow
def test_norms_are_drawn_from_the_stored_result(tmp_path: Path) -> None:
    folder = tmp_path / STORE
    (folder / "norms").mkdir(parents=True)
    shutil.copy(PAGE.parent / STORE / "norms" / "result.json", folder / "norms" / "result.json")
    assert main(["--page", str(tmp_path / "RESULTS.md")]) == 0
    drawn = {path.name for path in (folder / "norms").glob("*.png")}
    assert drawn == {path.name for path in (PAGE.parent / STORE / "norms").glob("*.png")}
    for name in drawn:
        assert Image.open(folder / "norms" / name).size[0] > 600
        assert f"({STORE}/norms/{name})" in (tmp_path / "RESULTS.md").read_text()


def test_damaged_results(tmp_path: Path) -> None:
    (tmp_path / "retrieval.json").write_text('{"command": "x"}')
    with pytest.raises(DataError, match=r"retrieval\.json is not a result"):
        page(tmp_path)


def test_no_page_without_results(tmp_path: Path, capsys) -> None:
    assert main(["--page", str(tmp_path / "RESULTS.md")]) == 2
    assert "no result files" in capsys.readouterr().err
    assert not (tmp_path / "RESULTS.md").exists()


def test_measuring_needs_a_folder(capsys) -> None:
    assert main(["--model", "m"]) == 2
    assert "--results" in capsys.readouterr().err


def test_every_command_parses() -> None:
    """What would be measured is what the commands accept."""
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
    lines = commands(args)
    assert len(lines) == len({section.stem for section in SECTIONS if section.needs != "runs"})
    for command in lines:
        module, rest = command[1], command[2:]
        known = optimize_tokens.parser() if module == "training.optimize_tokens" else evaluate.parser()
        parsed = known.parse_args(rest)
        assert parsed.recipe == "cpu/clip.yaml"
        assert parsed.out.startswith("r/")
        assert parsed.preset == ("full" if "--model" in rest else "solo")
    chat, forms = (evaluate.parser().parse_args(command[2:]) for command in lines[:2])
    assert chat.plan
    assert (chat.budget, chat.compare, forms.budget) == ([64, 16], ["uniform", "random"], [64])
    args.clip = None
    assert [c[2] for c in commands(args)] == ["world", "mvbench"]


@pytest.mark.slow
def test_a_failing_command_stops(tmp_path: Path, capfd) -> None:
    assert main(["--model", str(tmp_path / "none"), "--results", str(tmp_path)]) == 2
    assert "is not a FluxChat model" in capfd.readouterr().err
