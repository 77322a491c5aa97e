"""Flux-CLIP's command: stored losses, exact resume, two processes as one, recipes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from encoder.errors import ConfigError
from tests.patience import PATIENCE_S
from tests.training.data.clip_corpus import loop, recipe, values
from training import clip
from training.clip import ClipRecipe, ClipStage
from training.trainer.loop import train
from training.trainer.recipe import read_recipe

RECIPES = Path(clip.__file__).parent / "recipes"


def command(path: Path, *arguments: str, launcher: tuple[str, ...] = ()) -> list[dict]:
    """`python -m training.clip` in processes of its own; its lines of metrics."""
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "training.clip", "--config", str(path), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"},
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    out = next(word for word in arguments if word.startswith("loop.out=")).removeprefix("loop.out=")
    return metrics(Path(out))


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_the_command_gives_stored_losses(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(json.dumps(values(corpus, tmp_path / "unused")))
    overrides = ["temperature=0.1", f"loop.out={tmp_path / 'run'}", "loop.max_steps=5"]
    assert clip.main(["--config", str(tmp_path / "recipe.yaml"), *overrides]) == 0
    rows = metrics(tmp_path / "run")
    kinds = ["video" if "contrastive_video" in row else "image" for row in rows]
    assert kinds == ["video", "image", "video", "image", "image"]
    assert [row["loss"] for row in rows] == pytest.approx(LOSSES, rel=1e-2)
    for row, kind in zip(rows, kinds, strict=True):
        assert row["loss"] == pytest.approx(row[f"contrastive_{kind}"])
        assert row["tokens"] in (2 * 16, 2 * 25, 2 * 32)  # an image of 70 x 70 has 25 patches


LOSSES = [0.7129, 1.1123, 0.9583, 1.0074, 0.7097]


@pytest.mark.slow
def test_resuming_is_exact(corpus: Path, tmp_path: Path) -> None:
    whole = ClipStage(recipe(corpus, tmp_path / "whole"))
    losses = train(whole, whole.recipe.optim, whole.recipe.loop).losses
    assert len(losses) == 10
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for step in range(4, 11):
        shutil.rmtree(tmp_path / "cut" / "checkpoints" / f"step_{step:08d}")
    cut = ClipStage(recipe(corpus, tmp_path / "cut"))
    assert train(cut, cut.recipe.optim, cut.recipe.loop, resume=True).losses == losses[3:]
    for name in ("encoder/model.safetensors", "alignment.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.slow
def test_two_processes_train_like_one(corpus: Path, tmp_path: Path) -> None:
    # Images without augmentation: what a clip shows does not depend on its place in a micro-batch.
    changes = {
        "videos": [],
        "augment": {},
        "num_tokens": [8],
        "grid": {"frames": [4, 5, 1], "resolutions": [56, 57, 1], "tokens": [1, 999]},
        "loop": loop(tmp_path / "one", 4),
        "images": [{"jsonl": str(tmp_path / "one_caption.jsonl"), "data_root": str(corpus)}],
    }
    found = [json.loads(line) for line in (corpus / "image.jsonl").read_text().splitlines()]
    rows = [{"image": row["image"], "caption": row["captions"][0]} for row in found]
    (tmp_path / "one_caption.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    optim = {"lr": 1e-3, "batch_size": 4, "micro_batch": 4, "epochs": 2}
    one = ClipStage(recipe(corpus, tmp_path / "one", **changes, optim=optim))
    losses = train(one, one.recipe.optim, one.recipe.loop).losses
    two = values(corpus, tmp_path / "two", **changes, optim={**optim, "micro_batch": 2})
    (tmp_path / "two.yaml").write_text(json.dumps(two))
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29531")
    rows = command(tmp_path / "two.yaml", f"loop.out={tmp_path / 'two'}", launcher=launcher)
    assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-5)
    ours, theirs = (load_file(tmp_path / name / "alignment.safetensors") for name in ("one", "two"))
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-3, atol=1e-5)


def test_held_out_pairs_are_retrieved(corpus: Path, tmp_path: Path) -> None:
    held_out = [{"jsonl": str(corpus / "video.jsonl"), "data_root": str(corpus)}]
    often = {"out": str(tmp_path), "evaluate_every": 1}
    sizes = {"frames": 4, "resolution": 56, "evaluate_clips": 6}
    stage = ClipStage(recipe(corpus, tmp_path, held_out=held_out, loop=often, **sizes))
    found = stage.evaluate()
    assert set(found) == {f"{way}_r{k}_{n}" for way in ("t2v", "v2t") for k in (1, 5) for n in (16, 32)}
    assert all(value in {part / 6 for part in range(7)} for value in found.values())
    assert found["t2v_r5_16"] >= found["t2v_r1_16"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"world": {"count": 8}}, "not on both"),
        ({"siblings": 2}, "go with the world"),
        ({"attribute_weight": 1.0}, "go with the world"),
        ({"pools": [0]}, "one head for each of 2 token counts"),
        ({"temperature": 0.001}, "temperature not below it"),
        ({"num_tokens": [0]}, "at least one token count"),
        ({"train": "head"}, "train must be one of projector, all, not 'head'"),
        ({"positives": "x"}, "positives must be one of text, id"),
    ],
)
def test_impossible_recipes(corpus: Path, tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe(corpus, tmp_path, **changes)


def test_sharding_is_one_error(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="The temperature cannot be sharded"):
        ClipStage(recipe(corpus, tmp_path))


def test_recipes_that_do_not_fit_the_encoder(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="3 pools, no pool 3"):
        ClipStage(recipe(corpus, tmp_path, pool=3))
    grid = {"frames": [4, 5, 1], "resolutions": [64, 65, 1], "tokens": [1, 999], "patch_size": 16}
    with pytest.raises(ConfigError, match="must be 14, the encoder's"):
        ClipStage(recipe(corpus, tmp_path, grid=grid))


# -- the paper's recipes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["small", "base"])
@pytest.mark.parametrize("stage", [1, 2])
def test_the_papers_values(stage: int, size: str) -> None:
    found = read_recipe(ClipRecipe, RECIPES / f"clip_stage{stage}_{size}.yaml")
    optim = found.optim
    assert optim.betas == (0.9, 0.98)
    assert optim.weight_decay == 0.02
    assert len(found.video_grid.pairs()) == 18
    assert found.augment.crop == "multiscale"
    assert (max(found.augment.scales), min(found.augment.scales)) == (1.0, 0.5)
    assert (found.temperature, found.temperature_min) == (0.01 if stage == 1 else None, 0.01)
    assert (found.train, optim.lr, optim.epochs, optim.epochs * optim.warmup_ratio) == (
        ("projector", 4e-4, 3, pytest.approx(0.6)) if stage == 1 else ("all", 2e-5, 1, 0)
    )
    assert optim.batch_size == (2048 if (stage, size) == (2, "base") else 4096)
    assert {data.corpus for data in (*found.images, *found.videos)} == (
        {"cc3m", "cc12m", "webvid10m", "visual_genome", "sbu", "coco"}
        if stage == 1
        else {"smit", "internvid2m", "coco"}
    )
    assert min(len(found.images), len(found.videos)) > 0
