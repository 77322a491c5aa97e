"""LoRA through its command: what it trains, that the adapter loads and changes answers, exact resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from app.chat import VideoChat
from llm_bridge.model import VideoLanguageModel
from tests.training.synthetic.tiny_world import make_cache
from tests.training.test_chat_steps import assert_same_direction, gradients, records
from training import chat_lora, chat_stage1
from training.chat_lora import LoraRecipe, LoraStage
from training.trainer.recipe import read_recipe


@pytest.fixture(scope="module")
def stage1(stage1_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder from a short stage 1."""
    out = tmp_path_factory.mktemp("lora") / "stage1"
    assert chat_stage1.main(["--config", str(stage1_recipe), f"loop.out={out}", "loop.max_steps=2"]) == 0
    return out / "model"


@pytest.fixture(scope="module")
def recipe(stage1: Path, llava_json: Path) -> Path:
    path = stage1.parent / "chat_lora.yaml"
    path.write_text(f"""
start: {stage1}
lora: {{rank: 4, alpha: 8, dropout: 0.1}}
datasets: [{{json_path: {llava_json}, data_root: {llava_json.parent}}}]
frames: 4
resolution: 56
num_tokens: [8, 16]
bucket: 3
optim: {{lr: 2e-2, batch_size: 4, micro_batch: 2, epochs: 4}}
loop: {{out: {path.parent / "out"}, precision: fp32, checkpoint_every: 2, keep_checkpoints: 20}}
""")
    return path


@pytest.fixture(scope="module")
def finished(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("lora_run") / "run"
    assert chat_lora.main(["--config", str(recipe), f"loop.out={out}"]) == 0
    return out


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_the_loss_falls(finished: Path) -> None:
    found = losses(finished)
    assert len(found) == 14
    assert sum(found[-3:]) < 0.85 * sum(found[:3])


def test_adapter_and_projector_are_trained_and_nothing_else(finished: Path, stage1: Path) -> None:
    trained = load_file(finished / "checkpoints" / "step_00000014" / "trainable.safetensors")
    assert any("lora_B" in name for name in trained)
    assert all("lora_" in name or name.startswith("model.projector.") for name in trained)
    before, after = (load_file(f / "encoder.safetensors") for f in (stage1, finished / "model"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_result_answers_with_its_adapter(finished: Path, llava_json: Path) -> None:
    video, folder = llava_json.parent / "3.mp4", finished / "model"
    bare = finished.parent / "bare"
    shutil.copytree(folder, bare, ignore=shutil.ignore_patterns("adapter"))
    options = {"budget": 16, "max_new_tokens": 8}
    with VideoChat(folder, device="cpu") as chat:
        answer = chat.ask(video, "What is it?", **options).text
    with VideoChat(bare, device="cpu", adapters=[folder / "adapter"]) as chat:
        assert chat.ask(video, "What is it?", **options).text == answer
    tuned = VideoLanguageModel.from_pretrained(folder, device="cpu")
    plain = VideoLanguageModel.from_pretrained(bare, device="cpu")
    assert tuned.revision() != plain.revision()
    weights = [model.language_model.state_dict() for model in (tuned, plain)]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


@pytest.mark.slow
def test_resume_is_bit_equal(finished: Path, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    for step in range(7, 15):
        shutil.rmtree(out / "checkpoints" / f"step_{step:08d}", ignore_errors=True)
    assert chat_lora.main(["--config", str(recipe), f"loop.out={out}", "--resume"]) == 0
    assert losses(out) == losses(finished)


def test_the_projector_can_stay_frozen(recipe: Path, tmp_path: Path) -> None:
    stage = LoraStage(read_recipe(LoraRecipe, recipe, ["train_projector=false", f"loop.out={tmp_path}"]))
    names = [name for name, parameter in stage.model.named_parameters() if parameter.requires_grad]
    assert names
    assert all("lora_" in name for name in names)


def test_an_adapter_goes_on_learning(
    finished: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = finished / "model"
    again = ["--config", str(recipe), f"start={model}", f"loop.out={tmp_path}", "loop.max_steps=1"]
    assert chat_lora.main([*again, "optim.lr=1e-9", "lora.dropout=0"]) == 0
    before, after = (
        load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (model, tmp_path / "model")
    )
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)
    stage = LoraStage(read_recipe(LoraRecipe, recipe, [f"start={finished}", "lora.dropout=0"]))
    batch = stage.batch(0)
    plain, merged = (
        VideoLanguageModel.from_pretrained(model, device="cpu", tuned=tuned).loss(batch.prompts, batch.vision)
        for tuned in (False, True)
    )
    # Merged into weights of half precision, it is rounded.
    assert abs(stage.model(batch)[0] - merged) < 0.1 * abs(plain - merged)
    assert chat_lora.main([*again, "lora.rank=8"]) == 2
    assert "rank 4 and alpha 8, the recipe says 8 and 8" in capsys.readouterr().err


def test_checkpointing_changes_neither_loss_nor_gradients(recipe: Path, tmp_path: Path) -> None:
    found = []
    for flag in ("false", "true"):
        overrides = [f"gradient_checkpointing={flag}", "lora.dropout=0", f"loop.out={tmp_path}"]
        stage = LoraStage(read_recipe(LoraRecipe, recipe, overrides))
        stage.model.train()
        loss, _ = stage.model(stage.batch(0))
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in stage.model.parameters() if p.requires_grad)])
    assert all(torch.equal(plain, checkpointed) for plain, checkpointed in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("start=/nowhere", "not a FluxChat model"),
        ("lora.targets=[no_such_layer]", "lora.targets does not fit"),
        ("lora.rank=0", "at least 1"),
        ("quantize=2bit", "must be one of"),
    ],
)
def test_wrong_recipes_end_in_one_line(
    recipe: Path, tmp_path: Path, override: str, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat_lora.main(["--config", str(recipe), f"loop.out={tmp_path / 'x'}", override]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert word in said


WORLD = "datasets=[{world: {count: 64}, turns: 2, independent: true}]"


@pytest.mark.slow
def test_visual_tokens_stay_near_what_they_show(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLUXCHAT_CACHE", str(make_cache(tmp_path / "cache")))
    options = [WORLD, "scene_words=0.5", "optim.lr=5e-3", "loop.max_steps=12"]
    assert chat_lora.main(["--config", str(recipe), f"loop.out={tmp_path / 'out'}", *options]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    losses_of_patches = [row["patches"] for row in rows]
    assert sum(losses_of_patches[-3:]) < 0.95 * sum(losses_of_patches[:3])
    for row in rows:
        parts = sum(row.get(name, 0.0) for name in ("summary", "patches", "shared"))
        assert row["loss"] == pytest.approx(row["answers"] + 0.5 * parts, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["scene_words=0.5"], "need datasets of the synthetic world"),
        (["scene_words=-1"], "must not be negative"),
        (["scene_words=1", "train_projector=false"], "they need train_projector"),
    ],
)
def test_words_of_scenes_that_cannot_be_learnt(
    recipe: Path, tmp_path: Path, capsys, options, sentence
) -> None:
    assert chat_lora.main(["--config", str(recipe), f"loop.out={tmp_path / 'out'}", *options]) == 2
    assert sentence in capsys.readouterr().err


def test_the_words_of_a_steps_clips_count_alike_however_it_is_cut(
    recipe: Path, llava_json: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records of text alone leave micro-batches with one clip, two or none."""
    monkeypatch.setenv("FLUXCHAT_CACHE", str(make_cache(tmp_path / "cache")))
    mixed = records(tmp_path / "rows.json", videos=0, texts=16)
    options = [
        f"datasets=[{{world: {{count: 16}}, turns: 1}}, {{json_path: {mixed}}}]",
        *("scene_words=0.5", "lora.dropout=0", "num_tokens=[8]", "optim.batch_size=8", "bucket=4"),
        f"loop.out={tmp_path / 'out'}",
    ]
    found, clips = [], []
    for micro in (8, 2):
        stage = LoraStage(read_recipe(LoraRecipe, recipe, [*options, f"optim.micro_batch={micro}"]))
        stage.model._table.negatives = 200_000  # all words, since which ones are drawn depends on the batch
        batches = [stage.batch(index) for index in range(8 // micro)]
        clips.append([len(getattr(batch, "targets", ())) for batch in batches])
        found.append(gradients(stage, 8 // micro))
    assert sum(clips[1]) == clips[0][0]
    assert len(set(clips[1])) > 1
    assert_same_direction(found[1], found[0])
