"""The shipped folder: weights copied whole, clips that play, a card whose figures are the measured ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from encoder.budget import PlanRow
from encoder.checkpoint import read_tensors, save_tensors, weights_hash
from encoder.video.reader import probe
from llm_bridge.familiarity import FAMILIARITY, Familiarity, num_statistics
from llm_bridge.model import VideoLanguageModel
from training import chat_stage1, release
from training.data import synthetic_source as world_data
from training.optimize_tokens import install, model_config
from training.synthetic.dataset import World
from training.synthetic.sprites import procedural_bank
from training.synthetic.world_config import WorldConfig


@pytest.fixture
def trained(stage1_recipe: Path, tmp_path: Path) -> Path:
    """A model folder of a short run, of inputs small enough to be quick."""
    out = tmp_path / "run"
    assert chat_stage1.main(["--config", str(stage1_recipe), f"loop.out={out}", "loop.max_steps=1"]) == 0
    config = json.loads((out / "model" / "config.json").read_text())
    config["encoder"].update(frames_range=[4, 6, 2], resolution_range=[56, 70, 14])
    config["default_tokens"] = 16
    (out / "model" / "config.json").write_text(json.dumps(config))
    return out / "model"


@pytest.fixture
def figures(tmp_path: Path) -> Path:
    row = {"accuracy": 0.8642, "low": 0.8, "high": 0.91, "n": 77, "chance": 0.25}
    runs: dict[str, Any] = {
        "flux 16": {"goals": {"which appears first": row}, "tasks": {"caption: main object": row}}
    }
    runs["text-only"] = {"tasks": {}}
    inputs = {"flux 16": {"frames": 4, "resolution": 56, "K": 16}, "text-only": None}
    path = tmp_path / "world.json"
    path.write_text(json.dumps({"runs": runs, "inputs": inputs, "commit": "abc123", "weights": "feed"}))
    return path


@pytest.mark.slow
def test_the_folder_is_whole(
    trained: Path, figures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = procedural_bank()
    monkeypatch.setattr(world_data, "World", lambda split, seed, level: World(split, seed, level, bank))
    # An untrained model gets nothing right; which clips are taken must not hang on that here.
    monkeypatch.setattr(release, "RIGHT", 0)
    monkeypatch.setattr(release, "WRONG", 2)
    out = tmp_path / "pretrained"
    beside = tmp_path / "beside.safetensors"
    save_tensors({"align.weight": torch.zeros(2, 3)}, beside)
    # A run's folder stands for the model in it.
    arguments = ["--model", str(trained.parent), "--figures", str(figures), "--preset", "solo"]
    arguments += ["--out", str(out)]
    assert release.main([*arguments, "--alignment", str(beside)]) == 0
    assert (out / "alignment.safetensors").read_bytes() == beside.read_bytes()
    assert VideoLanguageModel.from_pretrained(out, device="cpu").revision() == (
        VideoLanguageModel.from_pretrained(trained, device="cpu").revision()
    )
    examples = json.loads((out / "examples" / "examples.json").read_text())
    assert len(examples) == 2
    for example in examples:
        info = probe(out / "examples" / example["file"])
        assert (info.codec, info.width) == ("h264", 256)
        assert not example["right"]
    text = (out / "README.md").read_text()
    assert "| **which appears first** | 86.4 [80, 91] |  | 25 | 77 |" in text
    assert "| caption: main object | 86.4 [80, 91] |  | 25 | 77 |" in text
    assert '"flux 16" keeps 16 of the 64 patches of 4 frames at 56 x 56; "text-only" is' in text
    assert "abc123" in text
    assert examples[0]["question"] in text
    assert not list(tmp_path.glob(".release-*"))
    assert "What it takes for its own" not in text
    share = {"share": 0.5, "n": 4}
    judged = dict.fromkeys(("world", "world, unseen things", "foreign"), share)
    judged |= {
        "videos": {"a.mp4": share, "b.mp4": {"share": 1.0, "n": 12}},
        "yes": {"before": share, "after": share, "absurd, real videos": {"share": 0.03, "n": 100}},
    }
    (tmp_path / "judged.json").write_text(json.dumps(judged))
    encoder = VideoLanguageModel.from_pretrained(out, device="cpu").encoder
    judge = Familiarity(torch.ones(num_statistics(encoder)), 0.0, 12, 1.0, weights_hash(encoder))
    judge.save(out / FAMILIARITY)
    assert release.main([*arguments, "--familiarity", str(tmp_path / "judged.json")]) == 0
    text = (out / "README.md").read_text()
    assert "| pieces of 2 real videos | 87.5 % of 16 |" in text
    assert "Asked whether real videos show what none of them does, 3.0 % of 100." in text
    assert (out / FAMILIARITY).exists()  # of the same encoder
    # A plan table in the old folder stays with the same encoder, and goes with another.
    install([PlanRow(16, 4, 56)], str(out), "after")
    assert release.main([*arguments]) == 0
    assert model_config(out).plan_table == (PlanRow(16, 4, 56),)
    weights = read_tensors(trained / "encoder.safetensors")
    save_tensors({name: value + 1 for name, value in weights.items()}, trained / "encoder.safetensors")
    assert release.main([*arguments]) == 0
    assert model_config(out).plan_table == ()
    assert not (out / FAMILIARITY).exists()
    install([PlanRow(32, 4, 56)], str(trained), "after")
    assert release.main([*arguments]) == 0
    assert model_config(out).plan_table == (PlanRow(32, 4, 56),)


def test_examples_of_the_whole_world_ask_about_number_and_order() -> None:
    world = World("test", 0, WorldConfig(), procedural_bank())
    samples = [world.sample(number) for number in range(80)]
    tasks = {
        question.task
        for place in range(len(release.TASKS))
        for sample in samples
        if (question := release.suitable(sample, place, release.TASKS)) is not None
    }
    assert tasks == set(release.TASKS)


def test_a_missing_part_is_one_line_and_leaves_the_old_folder(
    figures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pretrained"
    out.mkdir()
    (out / "README.md").write_text("old")
    assert release.main(["--model", str(tmp_path), "--figures", str(figures), "--out", str(out)]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert (out / "README.md").read_text() == "old"


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "{}", '{"runs": [], "inputs": {}}', '{"runs": {"flux 16": {"tasks": {}}}, "inputs": {}}'],
)
def test_figures_of_something_else_are_one_line_before_anything_is_made(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other.json").write_text(text)
    arguments = ["--model", str(tmp_path), "--figures", str(tmp_path / "other.json")]
    assert release.main([*arguments, "--out", str(tmp_path / "new" / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"{tmp_path}/other.json holds no figures of training.evaluate world --model: ")
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "new").exists()
