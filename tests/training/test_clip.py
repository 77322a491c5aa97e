"""Flux-CLIP: its loss by hand, its command for a few steps, exact resume."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from encoder.errors import ConfigError
from encoder.fluxvit import FluxViT
from training import clip
from training.clip import ClipRecipe, ClipStage
from training.data import synthetic_source as world_data
from training.models import clip_model
from training.synthetic.dataset import World
from training.synthetic.sprites import procedural_bank
from training.trainer.loop import train
from training.trainer.losses import contrastive_loss
from training.trainer.recipe import LoopConfig, OptimConfig, build


class LetterTower:
    """Texts to unit vectors by their words, without a language model."""

    dim = 16

    def embed(self, texts) -> torch.Tensor:
        rows = []
        for text in texts:
            generators = [torch.Generator().manual_seed(sum(map(ord, word))) for word in text.lower().split()]
            rows.append(sum(torch.randn(self.dim, generator=g) for g in generators))
        return F.normalize(torch.stack(rows), dim=-1)


@pytest.fixture(autouse=True)
def shapes_and_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Coloured shapes for sprites and the letter tower for MiniLM: nothing fetched."""
    bank = procedural_bank()
    monkeypatch.setattr(world_data, "World", lambda split, seed, level: World(split, seed, level, bank))
    monkeypatch.setattr(clip, "World", lambda split, seed, level: World(split, seed, level, bank))
    monkeypatch.setattr(clip, "open_tower", lambda *_, **__: LetterTower())


def recipe(out: Path, **changes) -> ClipRecipe:
    values = {
        "encoder": {
            "size": "micro",
            "settings": {"embed_dim": 32, "depth": 2, "num_heads": 2, "pool_heads": 2},
        },
        "world": {"count": 64, "preset": "simple", "nouns": None},
        "frames": 4,
        "resolution": 56,
        "num_tokens": [8, 16],
        "siblings": 2,
        "attribute_weight": 1.0,
        "evaluate_clips": 8,
        "optim": {"lr": 3e-3, "batch_size": 8, "micro_batch": 8, "epochs": 2},
        "loop": {"out": str(out), "precision": "fp32", "checkpoint_every": 1, "keep_checkpoints": 99},
        **changes,
    }
    return build(ClipRecipe, values, "test")


def test_contrastive_loss_by_hand() -> None:
    video = torch.eye(2)
    text = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    # Scores are the scale on the diagonal and 0 elsewhere.
    expected = -math.log(math.exp(3) / (math.exp(3) + 1))
    assert contrastive_loss(video, text, torch.tensor(3.0)).item() == pytest.approx(expected, rel=1e-5)
    same = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    # Two equal captions: the best a model can do is to share, log 2.
    assert contrastive_loss(same, same, torch.tensor(50.0)).item() == pytest.approx(math.log(2), rel=1e-5)


def test_contrastive_loss_counts_both_directions() -> None:
    """Rows and columns of the scores differ."""
    torch.manual_seed(0)
    video, text = (F.normalize(torch.randn(5, 8), dim=-1) for _ in range(2))
    scores, right = 10 * video @ text.T, torch.arange(5)
    rows, columns = F.cross_entropy(scores, right), F.cross_entropy(scores.T, right)
    assert abs(rows - columns) > 0.01
    found = contrastive_loss(video, text, torch.tensor(10.0))
    torch.testing.assert_close(found, (rows + columns) / 2)


def test_siblings_sit_side_by_side(tmp_path: Path) -> None:
    stage = ClipStage(recipe(tmp_path))
    batch = stage.batch(0)
    assert batch.pixels.shape == (8, 3, 4, 56, 56)
    noun, motion = batch.labels["noun"], batch.labels["motion"]
    assert torch.equal(noun[::2], noun[1::2])
    assert (motion[::2] != motion[1::2]).all()
    again = stage.batch(0)
    assert torch.equal(batch.pixels, again.pixels)
    assert batch.num_tokens == again.num_tokens
    assert {stage.batch(i).num_tokens for i in range(8)} == {8, 16}


@pytest.mark.slow
def test_training_runs_learns_and_resumes_exactly(tmp_path: Path) -> None:
    first = recipe(tmp_path / "whole")
    whole = train(ClipStage(first), first.optim, first.loop).losses
    assert len(whole) == 16
    assert sum(whole[-4:]) < sum(whole[:4])
    encoder = FluxViT.from_pretrained(tmp_path / "whole" / "encoder")
    assert encoder.config.embed_dim == 32

    import shutil

    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for step in range(6, 17):
        shutil.rmtree(tmp_path / "cut" / "checkpoints" / f"step_{step:08d}")
    second = recipe(tmp_path / "cut")
    assert train(ClipStage(second), second.optim, second.loop, resume=True).losses == whole[5:]


def test_evaluation_covers_every_count_and_selector(tmp_path: Path) -> None:
    found = ClipStage(recipe(tmp_path)).evaluate()
    assert set(found) == {
        f"{name}_{selector}_{keep}"
        for name in ("noun", "motion")
        for selector in ("flux", "random")
        for keep in (8, 16)
    }
    assert all(0 <= share <= 1 for share in found.values())


@pytest.mark.parametrize(
    "arguments", [["--config", "nowhere.yaml"], ["--config", "training/recipes/cpu/clip.yaml", "x"]]
)
def test_wrong_commands_are_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert clip.main(arguments) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_the_alignment_is_saved(tmp_path: Path) -> None:
    done = recipe(
        tmp_path,
        optim={"lr": 1e-3, "batch_size": 8, "micro_batch": 8},
        loop={"out": str(tmp_path / "r"), "max_steps": 1, "precision": "fp32"},
    )
    train(ClipStage(done), done.optim, done.loop)
    from safetensors.torch import load_file

    names = load_file(tmp_path / "r" / "alignment.safetensors").keys()
    assert {"align.weight", "log_scale", "attributes.noun.weight"} <= set(names)
    rows = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert math.isfinite(rows[0]["loss"])


def test_patch_labels_are_learned_from_the_kept_tokens(tmp_path: Path) -> None:
    done = recipe(tmp_path, patch_weight=1.0, siblings=1, world={"count": 64, "preset": "full"})
    stage = ClipStage(done)
    batch = stage.batch(0)
    assert batch.patches["noun"].shape == (8, 4, 4, 4)
    stage.model.settings = replace(stage.model.settings, patch_weight=0.0)
    loss, found = stage.model(batch)
    figures = {name: float(value) for name, value in found.items()}
    assert {"patch_noun", "patch_motion", "count", "first", "change", "event"} <= set(figures)
    stage.model.settings = replace(stage.model.settings, patch_weight=1.0)
    assert stage.model(batch)[0].item() == pytest.approx(
        loss.item() + figures["patch_noun"] + figures["patch_motion"], rel=1e-5
    )
    tokens = stage.model.encoder(batch.pixels, batch.num_tokens)
    scores = stage.model.patches["noun"](tokens.packed).log_softmax(dim=1)
    by_hand = [
        -scores[row * batch.num_tokens + place, batch.patches["noun"][row].flatten()[kept]].item()
        for row in range(8)
        for place, kept in enumerate(tokens.kept[row])
    ]
    assert figures["patch_noun"] == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-4)


def test_patches_without_an_object_can_count_less() -> None:
    scores = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0]])
    labels = torch.tensor([0, 1])
    wrong = [-scores[row].log_softmax(dim=0)[row].item() for row in range(2)]
    found = clip_model.label_loss(scores, labels, torch.tensor([0.25, 1.0, 1.0]))
    assert found.item() == pytest.approx((0.25 * wrong[0] + wrong[1]) / 1.25)
    with pytest.raises(ConfigError, match="patch_background"):
        ClipRecipe(
            optim=OptimConfig(lr=1e-3, batch_size=8, micro_batch=8),
            loop=LoopConfig(out="x"),
            patch_background=0.0,
        )


def test_labels_without_an_answer_count_for_nothing() -> None:
    scores = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    one = clip_model.label_loss(scores[:1], torch.tensor([0]))
    assert clip_model.label_loss(scores, torch.tensor([0, -100])) == one
    assert clip_model.label_loss(scores, torch.tensor([-100, -100])) == 0
    assert clip_model.hits(scores, torch.tensor([1, -100])) == (0, 1)
    shares = torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    assert clip_model.hits(scores, shares) == (1, 2)
