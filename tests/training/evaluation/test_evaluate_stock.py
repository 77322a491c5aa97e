"""Stock video models under evaluation: the commands on tiny ones, and their answers against VideoChat's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from app import VideoChat
from encoder.budget import Budget, PlanRow, PlanTable
from llm_bridge.chat_model import load_chat_model
from tests import tiny_video_models
from tests.encoder.video import video_files as vf
from tests.tiny_video_models import KINDS, ONE_QUICK
from training.data.media import FileMedia, WorldMedia
from training.data.synthetic_source import WorldSource
from training.evaluate import main
from training.evaluation.budget_input import BudgetInput
from training.evaluation.chat_evaluator import ChatEvaluator, Query
from training.evaluation.encoder_input import EncoderInput


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("stock")
    return {kind: tiny_video_models.make(root / kind, kind) for kind in KINDS}


@pytest.fixture(autouse=True)
def cache(cached_world: Path) -> None:
    """Every test uses the small world."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ONE_QUICK)
def test_mvbench_by_letters_and_in_open_answers(
    kind: str, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "m.json"
    arguments = ["mvbench", "--dataset", "world", "--model", str(folders[kind]), "--device", "cpu"]
    arguments += ["--clips", "1", "--preset", "solo", "--budget", "40", "--compare", "uniform"]
    assert main([*arguments, "--prompt", "flash", "open", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    labels = ["flux 40", "uniform 40", "text-only"]
    assert list(result["runs"]) == [f"{label}, {form}" for form in ("flash", "open") for label in labels]
    assert all(run["complete"] or run["mean"] is None for run in result["runs"].values())
    assert result["inputs"]["flux 40"]["K"] == 40
    assert result["weights"].endswith(" after")
    journal = (tmp_path / "m.journal" / "0.jsonl").read_text()
    answers = [json.loads(line)["answer"] for line in journal.splitlines()[1:]]
    assert len(set(answers)) > 3
    assert "mean over tasks" in capsys.readouterr().out


@pytest.mark.slow
def test_the_world_and_when_tokens_are_dropped(folders: dict[str, Path], tmp_path: Path) -> None:
    weights = {}
    for stage in ("before", "after"):
        arguments = ["world", "--model", str(folders["qwen3_vl"]), "--device", "cpu", "--select", stage]
        arguments += ["--clips", "1", "--preset", "solo", "--setting", "4x224:30", "--unseen-clips", "0"]
        assert main([*arguments, "--out", str(tmp_path / f"{stage}.json")]) == 0
        result = json.loads((tmp_path / f"{stage}.json").read_text())
        assert set(result["runs"]) == {"4x224:30", "text-only"}
        weights[stage] = result["weights"]
    assert weights["before"] != weights["after"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.quick(1)
def test_what_is_judged_is_what_videochat_answers(kind: str, folders: dict[str, Path]) -> None:
    world = WorldSource(split="test", count=1).open()
    media = WorldMedia(world, world.sample(0), 0)
    model = load_chat_model(folders[kind], device="cpu", dtype=torch.float32)
    side = model.tower.space.sides[0]
    evaluator = ChatEvaluator(model, EncoderInput(4, side, 21))
    questions = ["What is there?", "Where does it go?"]
    judged = list(evaluator.answers(media, 0, [Query(question) for question in questions]))
    with VideoChat(model) as chat:
        budget = Budget(21, frames=4, resolution=side)
        clip = media.load(4, side)
        said = [chat.ask(clip, q, budget=budget, max_new_tokens=24).text.strip() for q in questions]
    assert judged == said
    assert judged[0] != judged[1]


@pytest.mark.parametrize("kind", ONE_QUICK)
def test_by_default_a_clip_is_shown_as_videochat_would(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """A long video, a short one, a part of one and an image, at small and large budgets."""
    model = load_chat_model(folders[kind], device="cpu", dtype=torch.float32)
    long = vf.write(tmp_path / "long.mp4", vf.steady(120, fps=4), size=(96, 64))
    short = vf.write(tmp_path / "short.mp4", vf.steady(6, fps=4), size=(96, 64))
    image = tmp_path / "image.png"
    Image.new("RGB", (150, 90), (200, 90, 40)).save(image)
    cases = [(FileMedia((path,)), {}) for path in (long, short, image)]
    cases.append((FileMedia((long,), 2.0, 5.0), {"start": 2.0, "end": 5.0}))
    plans = set()
    with VideoChat(model) as chat:
        for number, (media, part) in enumerate(cases):
            for keep in (24, 150):
                evaluator = ChatEvaluator(model, BudgetInput(keep))
                [judged] = evaluator.answers(media, number, [Query("What is there?", max_new_tokens=6)])
                said = chat.ask(media.paths[0], "What is there?", budget=keep, max_new_tokens=6, **part)
                assert judged == said.text.strip()
                plan = BudgetInput(keep).open(media, model.tower)[1]
                assert plan == chat.plan(media.paths[0], keep, **part)
                plans.add(plan)
    assert len(plans) >= 3


def test_a_budget_buys_what_the_models_own_table_says(folders: dict[str, Path]) -> None:
    world = WorldSource(split="test", count=1).open()
    media = WorldMedia(world, world.sample(0), 0)
    model = load_chat_model(folders["qwen3_vl"], device="cpu", dtype=torch.float32)
    model.tower.plan_table = PlanTable((PlanRow(60, 4, 128),))
    plan = BudgetInput(60).open(media, model.tower)[1]
    assert (plan.frames, plan.height, plan.width) == (4, 128, 128)


@pytest.mark.slow
def test_the_largest_input_is_had_by_asking(folders: dict[str, Path], tmp_path: Path) -> None:
    arguments = ["world", "--model", str(folders["smolvlm"]), "--device", "cpu", "--no-text-only"]
    arguments += ["--clips", "1", "--preset", "solo", "--budget", "20", "--unseen-clips", "0"]
    used = []
    for more in ([], ["--no-plan"]):
        out = tmp_path / f"{len(used)}.json"
        assert main([*arguments, *more, "--out", str(out)]) == 0
        used.append(json.loads(out.read_text())["inputs"]["flux 20"])
    space = load_chat_model(folders["smolvlm"], device="cpu").tower.space
    assert (used[0]["frames"], used[0]["K"]) == (None, 20)
    assert (used[1]["frames"], used[1]["resolution"]) == space.full


@pytest.mark.parametrize("kind", KINDS)
def test_a_given_beginning_stands_where_an_answer_does(kind: str, folders: dict[str, Path]) -> None:
    """An answer cut in two, its first half given, goes on with its second."""
    world = WorldSource(split="test", count=1).open()
    media = WorldMedia(world, world.sample(0), 0)
    model = load_chat_model(folders[kind], device="cpu", dtype=torch.float32)
    evaluator = ChatEvaluator(model, EncoderInput(4, model.tower.space.sides[0], 21))
    prompt = evaluator._prompt(evaluator._encode(media, 0)[0], Query("What?", prefix="(B"))
    plain = evaluator._prompt(evaluator._encode(media, 0)[0], Query("What?"))
    added = len(prompt) - len(plain)
    assert prompt.ids[: len(plain)] == plain.ids
    following = tuple(range(plain.next_position, plain.next_position + added))
    assert all(axis[len(plain) :] == following for axis in prompt.positions)
    assert prompt.shift == plain.shift
    assert len(next(iter(prompt.positions), prompt.ids)) == len(prompt.ids)


def test_frames_are_no_denser_than_the_model_samples(folders: dict[str, Path]) -> None:
    world = WorldSource(split="test", count=1).open()
    media = WorldMedia(world, world.sample(0), 0)
    model = load_chat_model(folders["qwen3_vl"], device="cpu", dtype=torch.float32)
    asked = EncoderInput(64, 224, 30)
    most = max(8, round(2 * media.load(1, 224).info.duration_s))
    assert most < 64
    assert len(ChatEvaluator(model, asked)._clip(media, asked).frames) == most


def test_wrong_use_is_one_sentence(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["world", "--device", "cpu", "--clips", "1", "--unseen-clips", "0", "--model"]
    cases = [
        ([str(folders["qwen2_5_vl"]), "--select", "before"], "select after it"),
        ([str(folders["smolvlm"]), "--setting", "4x64:8+vid-tldr"], "merges inside FluxViT"),
        ([str(folders["smolvlm"]), "--setting", "4x63:8"], "multiple of 16"),
        ([str(folders["llava_onevision"]), "--setting", "4x42:8"], "takes 56 pixels a side"),
    ]
    for more, words in cases:
        assert main([*base, *more]) == 2
        error = capsys.readouterr().err
        assert words in error.strip().splitlines()[-1]  # those before are of the progress bar
        assert "Traceback" not in error
