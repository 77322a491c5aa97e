"""Warm start and summary tokens: the loss by hand, the command, and that stage 1 goes on from its result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from app.chat import VideoChat
from encoder.errors import ConfigError
from llm_bridge.projector import ProjectorConfig
from tests.training.synthetic.tiny_world import make_cache
from training import chat_stage1
from training import projector_warmup as projector_warmup
from training.projector_warmup import word_loss
from training.trainer.recipe import read_recipe


def test_word_loss_by_hand() -> None:
    table = torch.eye(4)
    visual = torch.tensor([[5.0, 0.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0]])
    said, near = word_loss(visual, torch.tensor([0, 1]), table, 1.0)
    # Each word has a token of its own direction: cosine 1 with it and 0 with the three others.
    assert said.item() == pytest.approx(-torch.tensor([1.0, 0, 0, 0]).log_softmax(0)[0].item(), rel=1e-5)
    assert near.item() == pytest.approx(0.0, abs=1e-6)
    worse, far = word_loss(visual, torch.tensor([0, 2]), table, 1.0)
    assert worse > said
    assert far.item() == pytest.approx(0.5)  # the second token is at a right angle to both words


@pytest.mark.slow
def test_the_command_learns_and_stage_one_starts_from_it(
    stage1_recipe: Path, llava_json: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "projector_warmup.yaml"
    text = stage1_recipe.read_text().replace("projector: {norm: true}", "projector: {summary_tokens: 2}")
    recipe.write_text(text + "negatives: 16\n")
    records = (
        f"datasets=[{{json_path: {llava_json}, data_root: {llava_json.parent}, sampling_strategy: first:12}}]"
    )
    out = tmp_path / "warm"
    assert projector_warmup.main(["--config", str(recipe), f"loop.out={out}", records]) == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    words = [row["words"] for row in rows if "words" in row]
    assert sum(words[-3:]) < sum(words[:3])

    stage1 = tmp_path / "stage1.yaml"
    stage1.write_text(text)
    options = [f"model.projector_init={out / 'model'}", f"loop.out={tmp_path / 'one'}", "loop.max_steps=1"]
    assert chat_stage1.main(["--config", str(stage1), *options, "optim.lr=1e-9"]) == 0
    before, after = (load_file(p / "model" / "projector.safetensors") for p in (out, tmp_path / "one"))
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)
    assert any(name.startswith("summary.") for name in before)

    with VideoChat(tmp_path / "one" / "model", device="cpu") as chat:
        answer = chat.ask(llava_json.parent / "3.mp4", "What is it?", budget=16, max_new_tokens=4)
        assert answer.usage.kept_tokens == 16
        assert answer.usage.visual_tokens == 18


WORLD = "datasets=[{world: {count: 64}, turns: 3, independent: true}]"


@pytest.mark.slow
def test_tokens_learn_the_words_of_scenes_and_stage_one_asks_in_branches(
    stage1_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLUXCHAT_CACHE", str(make_cache(tmp_path / "cache")))
    recipe = tmp_path / "projector_warmup.yaml"
    text = stage1_recipe.read_text().replace("projector: {norm: true}", "projector: {summary_tokens: 8}")
    scenes = text.replace("template: chat\n", "") + "negatives: 16\nwords: scene\n"
    recipe.write_text(scenes)
    out = tmp_path / "warm"
    assert (
        projector_warmup.main(["--config", str(recipe), f"loop.out={out}", WORLD, "loop.max_steps=12"]) == 0
    )
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for kind in ("summary", "patches", "shared"):
        said = [row[kind] for row in rows if kind in row]
        assert sum(said[-3:]) < sum(said[:3])

    recipe.write_text(text)
    options = [f"model.projector_init={out / 'model'}", f"loop.out={tmp_path / 'one'}", "loop.max_steps=2"]
    assert chat_stage1.main(["--config", str(recipe), *options, WORLD]) == 0
    stage = chat_stage1.Stage1(read_recipe(chat_stage1.Stage1Recipe, recipe, [*options, WORLD]))
    assert all(len(prompt.branches) == 3 for prompt in stage.batch(0).prompts)


def test_words_of_scenes_need_the_world(stage1_recipe: Path, tmp_path: Path, capsys) -> None:
    recipe = tmp_path / "projector_warmup.yaml"
    recipe.write_text(stage1_recipe.read_text().replace("template: chat\n", "") + "words: scene\n")
    assert projector_warmup.main(["--config", str(recipe), f"loop.out={tmp_path / 'out'}"]) == 2
    assert "need datasets of the synthetic world" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["template=chat", "max_length=256", "pull=2.0"])
def test_words_of_scenes_refuse_what_shapes_text(stage1_recipe: Path, tmp_path: Path, given: str) -> None:
    recipe = tmp_path / "projector_warmup.yaml"
    recipe.write_text(stage1_recipe.read_text().replace("template: chat\n", "") + "words: scene\n")
    read_recipe(projector_warmup.ProjectorWarmupRecipe, recipe)
    with pytest.raises(ConfigError, match=f"does not read {given.split('=')[0]}: leave it out"):
        read_recipe(projector_warmup.ProjectorWarmupRecipe, recipe, [given])


def test_summary_tokens_need_a_width() -> None:
    with pytest.raises(ConfigError, match="summary_dim"):
        ProjectorConfig(32, 64, summary_tokens=2)
