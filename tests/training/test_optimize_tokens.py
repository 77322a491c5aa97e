"""Token Optimization: the searches on known landscapes, and the command on a tiny encoder."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from app import VideoChat
from encoder.budget import PlanRow, PlanTable
from encoder.errors import BudgetError, ConfigError
from encoder.fluxvit import FluxViT
from llm_bridge.model import VLMConfig, assemble
from llm_bridge.projector import ProjectorConfig
from llm_bridge.towers.measured_plans import plan_file
from tests import tiny_video_models
from tests.training.synthetic.tiny_world import TINY, make_encoder
from training.data.synthetic_source import WorldSource
from training.evaluation.heatmap import draw_heatmap
from training.evaluation.metrics import Share
from training.evaluation.token_search import Cell, Grid, Measured, best_cell, full_search, linear_search
from training.optimize_tokens import install, main

# Supplement Table 1's range, with a landscape of its shape: best at many frames and low resolution.
PAPER = Grid((4, 8, 12, 16, 20, 24), (168, 196, 224, 252))


def hill(frames: int, side: int) -> Share:
    """Highest at 16 x 168, falling off smoothly on all sides."""
    return Share(10_000 - 9 * (frames - 16) ** 2 - (side - 168), 10_000)


def test_linear_search_finds_the_hill_with_fewer_evaluations() -> None:
    full, linear = full_search(PAPER, hill), linear_search(PAPER, 1024, hill)
    assert linear.path[0] == (4, 224)  # the paper's start: nothing dropped at K = 1024
    assert full.best == linear.best == (16, 168)
    assert full.evaluations == 24
    # Up at 224: 4 8 12 16 20; then 16 and 20 at 196 and at 168.
    assert linear.path == (
        *((f, 224) for f in (4, 8, 12, 16, 20)),
        *((f, 196) for f in (16, 20)),
        *((f, 168) for f in (16, 20)),
    )


def test_a_plateau_ends_the_climb_and_lower_resolution_that_does_not_gain_ends_the_search() -> None:
    def flat(frames: int, side: int) -> Share:
        return Share(50 + min(frames, 8) - (224 - side), 100)

    found = linear_search(PAPER, 1024, flat)
    assert found.best == (8, 224)
    assert found.path == ((4, 224), (8, 224), (12, 224), (8, 196), (12, 196))


def test_patience_steps_over_a_dip() -> None:
    def dip(frames: int, side: int) -> Share:
        return Share({4: 50, 8: 60, 12: 55, 16: 70}.get(frames, 10), 100)

    grid = Grid(PAPER.frames, (224,))
    assert linear_search(grid, 1024, dip).best == (8, 224)
    assert linear_search(grid, 1024, dip, patience=2).best == (16, 224)
    assert linear_search(grid, 1024, dip, gain=0.2).path == ((4, 224), (8, 224))


@settings(deadline=None, max_examples=60)
@given(values=st.lists(st.integers(0, 100), min_size=24, max_size=24), keep=st.integers(16, 4096))
def test_searches_agree_with_their_own_cells(values: list[int], keep: int) -> None:
    table = dict(zip(PAPER.cells, values, strict=True))

    def measure(frames: int, side: int) -> Share:
        return Share(table[(frames, side)], 100)

    full, linear = full_search(PAPER, measure), linear_search(PAPER, keep, measure)
    assert full.share.right == max(values)
    assert linear.evaluations == len(set(linear.path)) <= full.evaluations
    assert linear.share.right == max(table[cell] for cell in linear.path) <= full.share.right


def test_of_equal_cells_the_cheaper_wins() -> None:
    cells: dict[Cell, Share] = {(8, 224): Share(5, 10), (8, 168): Share(5, 10), (12, 168): Share(4, 10)}
    assert best_cell(cells, PAPER) == (8, 168)


def test_every_cell_is_measured_once() -> None:
    calls: list[Cell] = []

    def measure(frames: int, side: int) -> Share:
        calls.append((frames, side))
        return hill(frames, side)

    measured = Measured(measure)
    linear_search(PAPER, 1024, lambda *cell: measured(cell))
    full_search(PAPER, lambda *cell: measured(cell))
    assert len(calls) == 24


def test_unmasked_cells_and_starts() -> None:
    assert PAPER.unmasked(1024) == [(4, 168), (4, 196), (4, 224)]
    assert PAPER.start(1024) == (4, 224)
    assert PAPER.start(600) == (4, 168)
    assert PAPER.start(64) == (4, 252)  # all inputs exceed it: from the top, since the search goes down


@pytest.mark.parametrize(("frames", "sides"), [((), (56,)), ((8, 4), (56,)), ((4,), (57,)), ((0, 4), (56,))])
def test_wrong_grids(frames: tuple[int, ...], sides: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError):
        Grid(frames, sides)


def test_heatmap_shows_the_grid(tmp_path: Path) -> None:
    cells = {cell: hill(*cell) for cell in PAPER.cells}
    linear = linear_search(PAPER, 1024, hill)
    draw_heatmap(PAPER, 1024, cells, tmp_path / "full.png", title="x", linear=linear)
    part = {cell: cells[cell] for cell in linear.path}
    draw_heatmap(PAPER, 1024, part, tmp_path / "part.png", title="x")
    full, some = (Image.open(tmp_path / name) for name in ("full.png", "part.png"))
    assert full.size == some.size
    assert full.size[0] > 600
    assert full.tobytes() != some.tobytes()


# -- the command --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("run"))


def command(run: Path, out: Path, *more: str) -> list[str]:
    return [
        *("--encoder", str(run / "encoder"), "--alignment", str(run), "--tokens", "32", "16"),
        *("--frames", "4", "8", "--resolutions", "56", "84", "--clips", "6", "--out", str(out), *more),
    ]


@pytest.mark.slow
def test_the_command(run, cached_world, tmp_path, capsys) -> None:
    model = tmp_path / "model"
    model.mkdir()
    config = VLMConfig(llm="x", projector=ProjectorConfig(32, 64), encoder=TINY)
    (model / "config.json").write_text(json.dumps(config.to_dict()))
    out = tmp_path / "out"
    assert main(command(run, out, "--merge", "vid-tldr", "--install", str(model))) == 0
    shown = capsys.readouterr().out
    assert "16, selector" in shown
    assert "32, vid-tldr" in shown

    result = json.loads((out / "result.json").read_text())
    assert result["metric"] == "joint"
    assert [(r["K"], r["by"]) for r in result["runs"]] == [
        (16, "selector"),
        (16, "vid-tldr"),
        (32, "selector"),
        (32, "vid-tldr"),
    ]
    for entry in result["runs"]:
        assert entry["full"]["evaluations"] == entry["grid"] == 4
        assert entry["linear"]["evaluations"] <= 4
        assert len(entry["cells"]) == len(entry["ms"]) == 4
        assert entry["full"]["value"] == max(cell["value"] for cell in entry["cells"].values())
    rows = list(csv.DictReader((out / "grid_32.csv").read_text().splitlines()))
    assert [rows[0][name] for name in ("frames", "resolution", "seen", "kept")] == ["4", "56", "64", "32"]
    assert all(float(r["ms_per_clip"]) > 0 for r in rows)
    assert {path.name for path in out.glob("*.png")} == {
        *("heatmap_16.png", "heatmap_32.png", "heatmap_16_vid-tldr.png", "heatmap_32_vid-tldr.png")
    }

    table = PlanTable.read(out / "plan_table.json")
    assert [row.tokens for row in table.rows] == [16, 32]
    installed = VLMConfig.from_dict(json.loads((model / "config.json").read_text()))
    assert installed.plan_table == table.rows
    best = next(r["best"] for r in result["runs"] if (r["K"], r["by"]) == (32, "selector"))
    assert (table.lookup(32).frames, table.lookup(32).resolution) == (best["frames"], best["resolution"])

    # A second run takes all accuracies from the journal.
    journal = (out / "result.journal" / "0.jsonl").read_bytes()
    assert main(command(run, out, "--merge", "vid-tldr", "--no-times")) == 0
    assert (out / "result.journal" / "0.jsonl").read_bytes() == journal
    again = json.loads((out / "result.json").read_text())
    assert [r["cells"] for r in again["runs"]] == [r["cells"] for r in result["runs"]]


@pytest.mark.slow
def test_an_installed_table_decides_about_budgets(
    run: Path, cached_world: Path, tmp_path: Path, llm_folder
) -> None:
    """From the measured grid to what a VideoChat of that folder samples."""
    model = tmp_path / "model"
    config = VLMConfig(llm=str(llm_folder("qwen2")), projector=ProjectorConfig(32, 64), encoder=TINY)
    assemble(config, FluxViT(TINY), None, device="cpu").save_pretrained(model)
    assert main(command(run, tmp_path / "out", "--no-times", "--install", str(model))) == 0
    table = PlanTable.read(tmp_path / "out" / "plan_table.json")
    clip = [Image.new("RGB", (84, 84), (20 * i, 0, 0)) for i in range(12)]
    with VideoChat(model=model, device="cpu") as chat:
        assert chat.model.plan_table == table
        for budget in (8, 16, 20, 32):
            row, plan = table.lookup(budget), chat.plan(clip, budget)
            assert (plan.frames, plan.height, plan.keep) == (row.frames, row.resolution, budget)
        assert chat.plan(clip, 100).keep == 100
        auto = chat.plan(clip, "auto:0.000001")
        assert (auto.frames, auto.height) == (table.rows[0].frames, table.rows[0].resolution)


def test_a_chat_model_is_judged_by_its_answers(cached_world: Path, tmp_path: Path, llm_folder) -> None:
    config = VLMConfig(llm=str(llm_folder("qwen2")), projector=ProjectorConfig(32, 64), encoder=TINY)
    assemble(config, FluxViT(TINY), None, device="cpu").save_pretrained(tmp_path / "model")
    arguments = ["--model", str(tmp_path / "model"), "--device", "cpu", "--tokens", "8", "--frames", "4"]
    arguments += ["--resolutions", "56", "--clips", "2", "--preset", "solo", "--no-times"]
    arguments += ["--out", str(tmp_path / "out")]
    totals = {}
    for metric in ("choice", "open"):
        assert main([*arguments, "--metric", metric]) == 0
        result = json.loads((tmp_path / "out" / "result.json").read_text())
        assert result["metric"] == f"{metric} questions"
        totals[metric] = result["runs"][0]["cells"]["4x56"]["n"]
    world = WorldSource(split="test", count=2, preset="solo").open()
    questions = [question for number in range(2) for question in world.sample(number).questions]
    choices = sum(bool(question.options) for question in questions)
    # Each clip's caption is asked for the thing and for its motion.
    assert totals == {"choice": choices, "open": len(questions) - choices + 4}


@pytest.mark.parametrize("kind", tiny_video_models.ONE_QUICK)
@pytest.mark.slow
def test_a_stock_model_finds_what_was_measured_for_it(
    kind: str, cached_world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_video_models.make(tmp_path / kind, kind)
    clip = [Image.new("RGB", (224, 224), (20 * i, 0, 0)) for i in range(12)]
    with VideoChat(folder, device="cpu") as chat:
        sides = [str(side) for side in chat.model.tower.space.sides[:2]]
        by_rule = chat.plan(clip, 40)
    out = tmp_path / "out"
    arguments = ["--model", str(folder), "--device", "cpu", "--tokens", "40", "--frames", "1", "2"]
    arguments += ["--resolutions", *sides, "--clips", "1", "--preset", "solo", "--out", str(out)]
    assert main([*arguments, "--install", str(folder)]) == 0
    assert str(folder / "plan_table.json") in capsys.readouterr().out
    [entry] = json.loads((out / "result.json").read_text())["runs"]
    assert len(entry["cells"]) == len(entry["ms"]) == 2 * len(sides)
    assert all(value > 0 for value in entry["ms"].values())
    table = PlanTable.read(folder / "plan_table.json")
    assert table == PlanTable.read(out / "plan_table.json")
    # A table by hand, unlike the rule.
    mine = tmp_path / "mine.json"
    mine.write_text(json.dumps([{"tokens": 40, "frames": 8, "resolution": int(sides[-1])}]))
    with VideoChat(folder, device="cpu") as chat:
        assert chat.model.tower.plan_table == table
        plan = chat.plan(clip, 40)
        assert (plan.frames, plan.keep) == (table.rows[0].frames, min(40, plan.grid.size))
        assert plan != by_rule or entry["best"]["frames"] == by_rule.frames
    with VideoChat(folder, device="cpu", plan=mine) as chat:
        assert chat.plan(clip, 40).frames == 8


def test_where_a_table_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLUXCHAT_CACHE", str(tmp_path / "cache"))
    name = "Qwen/Qwen3-VL-2B-Instruct"
    assert install([PlanRow(64, 8, 224)], name, "before") == plan_file(name, "before")
    assert (
        plan_file(name, "before") == tmp_path / "cache" / "plans" / "Qwen--Qwen3-VL-2B-Instruct.before.json"
    )
    assert PlanTable.read(plan_file(name, "before")).rows == (PlanRow(64, 8, 224),)
    assert plan_file(tmp_path, "after") == tmp_path / "plan_table.json"
    assert plan_file(name, "after") != plan_file(name, "before")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"tokens": 16, "frames": 4, "resolution": 57}], "is not for this model"),
        ([{"tokens": 16, "frames": 10**9, "resolution": 56}], "is not for this model"),
        ([{"tokens": 16, "frames": "4", "resolution": 56}], "whole ones from 1"),
        ([{"tokens": 16, "frames": 0, "resolution": 56}], "whole ones from 1"),
        ({"tokens": 16}, "Cannot read the plan table"),
        ([], "at least one row"),
    ],
)
@pytest.mark.quick(2)
def test_a_table_that_does_not_fit_is_refused(rows: object, words: str, tmp_path: Path) -> None:
    folder = tiny_video_models.make(tmp_path / "model", "llava_onevision")
    (folder / "plan_table.json").write_text(json.dumps(rows))
    with pytest.raises(BudgetError, match=words):
        VideoChat(folder, device="cpu")
    (folder / "plan_table.json").rename(tmp_path / "mine.json")
    with pytest.raises(BudgetError, match=words):
        VideoChat(folder, device="cpu", plan=tmp_path / "mine.json")


@pytest.mark.slow
def test_joint_is_noun_and_motion_on_the_same_clip(run, cached_world, tmp_path) -> None:
    shares = {}
    for metric in ("noun", "motion", "joint"):
        options = ["--search", "linear", "--no-times", "--metric", metric]
        assert main(command(run, tmp_path / metric, *options)) == 0
        [entry] = [
            r for r in json.loads((tmp_path / metric / "result.json").read_text())["runs"] if r["K"] == 32
        ]
        shares[metric] = entry["cells"]["4x56"]["value"]
    assert shares["joint"] <= min(shares["noun"], shares["motion"])


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--start", "5x56"], "cannot start"),
        (["--resolutions", "60"], "multiples of 14"),
        (["--model", "x"], "either --encoder or --model"),
        (["--install", "none"], "Cannot read none"),
        (["--metric", "open"], "use one of joint, noun, motion"),
    ],
)
def test_wrong_use(more, words, run, cached_world, tmp_path, capsys) -> None:
    assert main(command(run, tmp_path / "out", "--no-times", *more)) == 2
    assert words in capsys.readouterr().err
