"""Chat models under evaluation: the world and MVBench, on a tiny model, as people run them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from encoder.fluxvit import FluxViT
from encoder.merging import Merging
from llm_bridge.llm import load_llm
from llm_bridge.model import VideoLanguageModel, VLMConfig, assemble
from llm_bridge.projector import ProjectorConfig
from tests.encoder.video import video_files as vf
from tests.llm_bridge.engines.vllm_protocol import serving
from tests.training.synthetic.tiny_world import TINY
from training.data.media import WorldMedia
from training.data.synthetic_source import WorldSource
from training.evaluate import main
from training.evaluation.ability_metrics import NAMED, UNSEEN, abilities_by_run
from training.evaluation.chat_evaluator import ChatEvaluator, Query
from training.evaluation.encoder_input import EncoderInput
from training.evaluation.mvbench import world_items


@pytest.fixture(scope="module")
def model(llm_folder: Callable[[str], Path]) -> VideoLanguageModel:
    torch.manual_seed(0)
    config = VLMConfig(llm=str(llm_folder("qwen2")), projector=ProjectorConfig(32, 64), encoder=TINY)
    return assemble(config, FluxViT(TINY), None, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def saved(model: VideoLanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def cache(cached_world: Path) -> None:
    """Every test uses the small world."""


@pytest.mark.slow
def test_world_command(saved: Path, tmp_path: Path, capsys) -> None:
    arguments = [
        *("world", "--model", str(saved), "--device", "cpu", "--clips", "2", "--budget", "8"),
        *("--preset", "solo", "--out", str(tmp_path / "w.json")),
    ]
    assert main(arguments) == 0
    result = json.loads((tmp_path / "w.json").read_text())
    assert set(result["runs"]) == {"flux 8", "text-only"}
    assert result["inputs"]["flux 8"] == {
        "frames": 8,
        "resolution": 84,
        "K": 8,
        "selector": "flux",
        "optimized": False,
    }
    assert result["inputs"]["text-only"] is None
    assert result["decoding"] == "greedy"
    tasks = result["runs"]["flux 8"]["tasks"]
    assert tasks["caption: motion"]["n"] == 2
    assert tasks["caption: main object"]["chance"] == pytest.approx(1 / 12)
    shown = capsys.readouterr().out
    assert "text-only" in shown
    goals = result["runs"]["flux 8"]["goals"]
    assert goals[NAMED]["n"] == goals[UNSEEN]["n"] == 2
    assert set(goals) == set(result["runs"]["text-only"]["goals"])
    assert all(row["low"] <= row["accuracy"] <= row["high"] and "chance" in row for row in goals.values())
    assert all(name in shown for name in goals)
    # The answers are journaled: a second run computes none, and the figures are the same.
    journal = (tmp_path / "w.journal" / "0.jsonl").read_text()
    assert main(arguments) == 0
    assert (tmp_path / "w.journal" / "0.jsonl").read_text() == journal
    assert json.loads((tmp_path / "w.json").read_text())["runs"] == result["runs"]


@pytest.mark.slow
def test_another_engine_answers_the_same(model: VideoLanguageModel, saved: Path, tmp_path: Path) -> None:
    with serving(load_llm(model.llm.name, device="cpu")) as (address, _):
        results = {}
        for name, engine in (("local", "local"), ("vllm", address)):
            arguments = ["world", "--model", str(saved), "--device", "cpu", "--clips", "1", "--budget", "8"]
            arguments += ["--preset", "solo", "--no-text-only", "--unseen-clips", "0", "--engine", engine]
            assert main([*arguments, "--out", str(tmp_path / f"{name}.json")]) == 0
            results[name] = json.loads((tmp_path / f"{name}.json").read_text())
    assert results["vllm"]["runs"] == results["local"]["runs"]
    assert results["vllm"]["engine"] == "vllm"
    assert "engine" not in results["local"]
    assert results["vllm"]["adapters"] == []


@pytest.mark.slow
def test_budgets_and_selectors_on_the_same_clips(saved: Path, tmp_path: Path) -> None:
    arguments = ["world", "--model", str(saved), "--device", "cpu", "--clips", "2", "--preset", "solo"]
    arguments += ["--compare", "uniform", "random", "--unseen-clips", "0", "--out", str(tmp_path / "w.json")]
    assert main([*arguments, "--budget", "8"]) == 0
    journal = tmp_path / "w.journal" / "0.jsonl"
    before = journal.read_text()
    assert main([*arguments, "--budget", "8", "4"]) == 0
    result = json.loads((tmp_path / "w.json").read_text())
    assert list(result["runs"]) == ["flux 8", "flux 4", "uniform 8", "random 8", "text-only"]
    assert UNSEEN not in result["runs"]["text-only"]["goals"]
    # One more budget asks about its own clips alone.
    added = [json.loads(line)["id"] for line in journal.read_text().removeprefix(before).splitlines()]
    assert added == ["8x84:4|0", "8x84:4|1"]
    lines = abilities_by_run(result["runs"]).splitlines()
    assert [line.split("  ")[0] for line in lines] == ["run", *result["runs"], "chance", "n"]


def test_another_plan_answers_anew(saved: Path, tmp_path: Path) -> None:
    """What the journal holds of one input does not stand for another with as many tokens."""
    arguments = ["world", "--model", str(saved), "--device", "cpu", "--clips", "1", "--preset", "solo"]
    arguments += ["--budget", "8", "--no-text-only", "--unseen-clips", "0", "--out", str(tmp_path / "w.json")]
    journal = tmp_path / "w.journal" / "0.jsonl"
    assert main(arguments) == 0
    assert main([*arguments, "--plan"]) == 0
    inputs = [json.loads(line)["id"] for line in journal.read_text().splitlines()[1:]]
    assert len(set(inputs)) == 2


def test_budgets_by_the_models_own_plan(saved: Path, tmp_path: Path) -> None:
    values = json.loads((saved / "config.json").read_text())
    values["plan_table"] = [{"tokens": 8, "frames": 4, "resolution": 56}]
    planned = tmp_path / "model"
    planned.mkdir()
    for file in saved.iterdir():
        (planned / file.name).write_bytes(file.read_bytes())
    (planned / "config.json").write_text(json.dumps(values))
    arguments = ["world", "--model", str(planned), "--device", "cpu", "--clips", "1", "--budget", "8"]
    assert main([*arguments, "--plan", "--no-text-only", "--out", str(tmp_path / "w.json")]) == 0
    [used] = json.loads((tmp_path / "w.json").read_text())["inputs"].values()
    assert (used["frames"], used["resolution"], used["K"]) == (4, 56, 8)


# -- MVBench ------------------------------------------------------------------------------------------------


def mvbench_files(folder: Path) -> tuple[Path, Path]:
    """Two tasks of three questions; one video is there, one is missing."""
    annotations, videos = folder / "json", folder / "videos"
    annotations.mkdir()
    (videos / "perception" / "videos").mkdir(parents=True)
    vf.write(videos / "perception" / "videos" / "a.mp4", [i / 10 for i in range(20)], size=(96, 64))
    row = {"question": "How many?", "candidates": ["1", "2", "3"], "answer": "2"}
    for task in ("action_count", "state_change"):
        rows = [
            {**row, "video": "a.mp4"},
            {**row, "video": "a.mp4", "answer": "3"},
            {**row, "video": "b.mp4"},
        ]
        (annotations / f"{task}.json").write_text(json.dumps(rows))
    return annotations, videos


def test_mvbench_command_lists_what_is_missing(saved: Path, tmp_path: Path, capsys) -> None:
    annotations, videos = mvbench_files(tmp_path)
    arguments = [
        *("mvbench", "--model", str(saved), "--device", "cpu", "--annotations", str(annotations)),
        *("--videos", str(videos), "--task", "action_count", "state_change", "--setting", "4x56:8"),
        *("--no-text-only", "--out", str(tmp_path / "m.json")),
    ]
    assert main(arguments) == 0
    result = json.loads((tmp_path / "m.json").read_text())
    assert set(result["runs"]) == {"4x56:8, flash", "4x56:8, videochat2"}
    for run in result["runs"].values():
        assert set(run["missing"]) == {"action_count/2", "state_change/2"}
        assert not run["complete"]
        assert run["tasks"]["action_count"]["missing"] == 1
        assert run["tasks"]["action_count"]["answered"] + run["tasks"]["action_count"]["empty"] == 2
        assert run["chance"] == pytest.approx(100 / 3)
    assert "mean over tasks" in capsys.readouterr().out


def test_mvbench_on_the_world(saved: Path, tmp_path: Path) -> None:
    arguments = ["mvbench", "--dataset", "world", "--model", str(saved), "--device", "cpu", "--clips", "2"]
    arguments += ["--prompt", "flash", "--budget", "8", "--no-text-only", "--preset", "solo"]
    out = tmp_path / "m.json"
    assert main([*arguments, "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert {"command", "commit", "machine", "weights", "scenes", "preset", "seed", "interval"} <= set(result)
    # Stopped within a line: only that clip's questions are asked again, and the figures are the same.
    journal = tmp_path / "m.journal" / "0.jsonl"
    whole = journal.read_text()
    journal.write_text(whole[: int(0.8 * len(whole))])
    assert main([*arguments, "--out", str(out)]) == 0
    assert {*journal.read_text().splitlines()} == {*whole.splitlines()}
    [run] = json.loads(out.read_text())["runs"].values()
    assert run == next(iter(result["runs"].values()))
    assert run["complete"] == (run["mean"] is not None)
    assert sum(task["questions"] for task in run["tasks"].values()) == len(
        world_items(WorldSource(split="test", count=2, preset="solo"))
    )


# -- the evaluator ------------------------------------------------------------------------------------------


def test_each_question_stands_alone(model: VideoLanguageModel) -> None:
    world = WorldSource(split="test", count=1).open()
    media = WorldMedia(world, world.sample(0), 0)
    evaluator = ChatEvaluator(model, EncoderInput(4, 56, 8))
    both = list(evaluator.answers(media, 0, [Query("What is there?"), Query("Where does it go?")]))
    assert list(evaluator.answers(media, 0, [Query("Where does it go?")])) == both[1:]


def test_the_given_beginning_of_an_answer_counts(model: VideoLanguageModel) -> None:
    world = WorldSource(split="test", count=1).open()
    media = WorldMedia(world, world.sample(0), 0)
    evaluator = ChatEvaluator(model, EncoderInput(4, 56, 8))
    plain, begun = evaluator.answers(media, 0, [Query("What?"), Query("What?", prefix="Best option:(")])
    assert plain != begun
    with_system = next(iter(evaluator.answers(media, 0, [Query("What?", system="Be brief.")])))
    assert with_system != plain


def test_text_only_sees_nothing(model: VideoLanguageModel) -> None:
    world = WorldSource(split="test", count=2).open()
    text_only = ChatEvaluator(model, None)
    said = [
        list(text_only.answers(WorldMedia(world, world.sample(n), n), n, [Query("What is there?")]))
        for n in range(2)
    ]
    assert said[0] == said[1]


def test_encoder_inputs_reach_the_encoder(model: VideoLanguageModel, monkeypatch) -> None:
    world = WorldSource(split="test", count=1).open()
    media = WorldMedia(world, world.sample(0), 0)
    seen = []
    encode = model.encode

    def spy(pixels, keep, times_s, **selection):
        vision = encode(pixels, keep, times_s, **selection)
        seen.append((tuple(pixels[0].shape), vision.lengths[0], selection["selector"], selection["merge"]))
        return vision

    monkeypatch.setattr(model, "encode", spy)
    for text in ("4x56:8", "8x84:16/random", "8x56:32+vid-tldr"):
        list(ChatEvaluator(model, EncoderInput.parse(text)).answers(media, 0, [Query("?", max_new_tokens=1)]))
    assert seen == [
        ((3, 4, 56, 56), 8, "flux", None),
        ((3, 8, 84, 84), 16, "random", None),
        ((3, 8, 56, 56), 32, "flux", Merging((64, 32))),
    ]


def test_another_adapter_does_not_continue_a_journal(model: VideoLanguageModel, tmp_path: Path) -> None:
    import dataclasses

    from training.evaluation.provenance import about_model

    told = []
    for content in (b"one", b"two"):
        (tmp_path / "adapter_model.safetensors").write_bytes(content)
        model_with = type("M", (), {"tower": model.tower})()
        model_with.llm = dataclasses.replace(model.llm, adapters=(str(tmp_path),))
        told.append(about_model(model_with))
    assert told[0]["adapters"] != told[1]["adapters"]
    assert told[0] == {**told[1], "adapters": told[0]["adapters"]}
    assert about_model(model)["adapters"] == []
