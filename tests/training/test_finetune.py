"""Fine-tuning: losses by hand, class heads, views, the real command on real videos, exact resume."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml

from encoder.checkpoint import load_encoder
from encoder.config import MICRO
from encoder.errors import CheckpointError, ConfigError, DataError
from encoder.fluxvit import FluxViT
from tests import ROOT
from tests.encoder.video import video_files as vf
from tests.patience import PATIENCE_S
from training import finetune
from training.finetune import FinetuneModel, FinetuneRecipe, FinetuneStage, build_encoder, measure
from training.trainer.loop import train
from training.trainer.recipe import build, read_recipe, read_values

RECIPES = ROOT / "training" / "recipes"
NARROW = {"embed_dim": 32, "depth": 2, "num_heads": 2, "pool_heads": 2, "clip_embed_dim": 16}
# Of the command below; other machines differ in the last digits.
LOSSES = [2.25255, 2.15032, 2.42932, 2.40735, 2.16625, 2.21779]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve videos in a Kinetics-style list: every other one upside down, which is the second class."""
    folder = tmp_path_factory.mktemp("finetune")
    rows = []
    for number in range(12):
        rotate = 180 * (number % 2)
        vf.write(folder / f"{number}.mp4", vf.steady(12 + number), size=(72, 56), rotate=rotate)
        rows.append(f"{number}.mp4 {number % 2}")
    (folder / "train.csv").write_text("\n".join(rows) + "\n")
    (folder / "classes.txt").write_text("upright\nupside down\n")
    return folder


def values(data: Path, out: Path, **changes: Any) -> dict[str, Any]:
    source = {"csv": f"{data}/train.csv", "data_root": str(data), "classes": f"{data}/classes.txt"}
    return {
        "encoder": {"size": "micro", "settings": NARROW},
        "data": [source],
        "held_out": [source],
        "grid": {"frames": [2, 6, 2], "resolutions": [56, 84, 14], "tokens": [48, 100]},
        "augment": {"crop": "resized", "area": [0.5, 1.0], "rand_augment": [9, 0.5]},
        "test": {"frames": 4, "resolution": 56, "clips": 2, "crops": 3, "num_tokens": [48, 8]},
        "num_tokens": [48, 32, 16],
        "optim": {"lr": 5e-3, "batch_size": 4, "micro_batch": 2, "epochs": 2, "layer_decay": 0.75},
        "loop": {"out": str(out), "precision": "fp32", "checkpoint_every": 1, "keep_checkpoints": 99},
        **changes,
    }


def recipe(data: Path, out: Path, **changes: Any) -> FinetuneRecipe:
    return build(FinetuneRecipe, values(data, out, **changes), "test")


def narrow(classes: int, **settings: Any) -> FluxViT:
    torch.manual_seed(0)
    return FluxViT(MICRO.replace(**{**NARROW, "num_classes": classes, **settings}))


# -- losses -------------------------------------------------------------------------------------------------


def test_flux_multi_by_hand(data: Path, tmp_path: Path) -> None:
    config = recipe(data, tmp_path, label_smoothing=0.1)
    stage = FinetuneStage(config)
    encoder, batch = stage.model.eval().encoder, stage.batch(0)
    loss, figures = stage.model(batch)
    pooled = [encoder.pool(encoder(batch.pixels, count), head) for head, count in enumerate((48, 32, 16))]
    wanted = 0.0
    for head, feature in enumerate(pooled):
        logits = encoder.head[head](encoder.fc_norm(feature)).log_softmax(-1)
        picked = logits[torch.arange(2), batch.labels]
        # Smoothing gives 0.1 of the target to all classes alike.
        wanted = wanted - (0.9 * picked + 0.1 * logits.mean(dim=-1)).mean()
    reference = F.normalize(pooled[0], dim=-1)
    for aligner, feature in enumerate(pooled[1:]):
        apart = encoder.align(feature, aligner) - reference
        huber = torch.where(apart.abs() < 1, apart.square() / 2, apart.abs() - 0.5)
        wanted = wanted + huber.mean()
        assert figures[f"align_{(32, 16)[aligner]}"] == pytest.approx(huber.mean().item(), rel=1e-4)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert figures["tokens"] == 2 * (48 + 32 + 16)


def test_alignment_teaches_the_smaller_counts_alone(data: Path, tmp_path: Path) -> None:
    """The largest count's feature is the target: its pool gets no gradient from the alignment."""
    stage = FinetuneStage(recipe(data, tmp_path))
    stage.model.eval()
    with_alignment, _ = stage.model(stage.batch(0))
    with_alignment.backward()
    pool = [p.grad.clone() for p in stage.model.encoder.clip_projector[0].parameters()]
    small = [p.grad.clone() for p in stage.model.encoder.clip_projector[2].parameters()]
    stage.model.zero_grad()
    stage.model.recipe = recipe(data, tmp_path, align_weight=0.0)
    without, _ = stage.model(stage.batch(0))
    without.backward()
    for before, p in zip(pool, stage.model.encoder.clip_projector[0].parameters(), strict=True):
        torch.testing.assert_close(before, p.grad)
    after = [p.grad for p in stage.model.encoder.clip_projector[2].parameters()]
    assert any(not torch.allclose(a, b) for a, b in zip(small, after, strict=True))


def test_flux_single_is_one_pass_on_the_middle_head(data: Path, tmp_path: Path) -> None:
    stage = FinetuneStage(recipe(data, tmp_path, num_tokens=[32]))
    batch = stage.batch(0)
    loss, figures = stage.model.eval()(batch)
    encoder = stage.model.encoder
    logits = encoder.classify(encoder(batch.pixels, 32), 1)
    assert loss.item() == pytest.approx(F.cross_entropy(logits, batch.labels).item(), rel=1e-5)
    assert not any(name.startswith("align") for name in figures)


def test_the_order_of_heads_is_an_option(data: Path, tmp_path: Path) -> None:
    first, last = recipe(data, tmp_path), recipe(data, tmp_path, pools=[2, 1, 0])
    assert [first.head_for(count) for count in (4096, 48, 32, 16, 8)] == [0, 0, 1, 2, 2]
    assert [last.head_for(count) for count in (48, 32, 16, 8)] == [2, 1, 0, 0]
    stage = FinetuneStage(last)
    batch = stage.batch(0)
    found = stage.model.eval().classify(batch.pixels, [48])[48]
    torch.testing.assert_close(found, stage.model.encoder.classify(stage.model.encoder(batch.pixels, 48), 2))


# -- heads --------------------------------------------------------------------------------------------------


def test_an_encoder_of_more_classes_becomes_one_of_fewer(data: Path, tmp_path: Path) -> None:
    old = narrow(3)
    old.save_pretrained(tmp_path / "k3")
    (tmp_path / "names.txt").write_text("other\nupside_down\nupright\n")
    source = {"encoder": {"init": str(tmp_path / "k3")}, "drop_path": 0.2}
    config = recipe(data, tmp_path, heads=str(tmp_path / "names.txt"), **source)
    new = build_encoder(config, ["upright", "upside down"], 2)
    assert new.config.drop_path == 0.2
    for number in range(3):
        torch.testing.assert_close(new.head[number].weight, old.head[number].weight[[2, 1]])
    torch.testing.assert_close(new.blocks[1].attn.qkv.weight, old.blocks[1].attn.qkv.weight)
    # New heads are new; the same are refused when they do not fit.
    fresh = build_encoder(recipe(data, tmp_path, **source), [], 3)
    assert not torch.equal(fresh.head[0].weight, old.head[0].weight)
    kept = build_encoder(recipe(data, tmp_path, heads="same", **source), [], 3)
    torch.testing.assert_close(kept.head[0].weight, old.head[0].weight)
    with pytest.raises(CheckpointError, match="3 classes and the data 2"):
        build_encoder(recipe(data, tmp_path, heads="same", **source), [], 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_tokens": [16, 32]}, "largest first"),
        ({"pools": [0]}, "one value for each of 3"),
        ({"pools": [0, 1, 3]}, "no head 3"),
        ({"num_classes": 7}, "the data name 2 classes"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"repeats": 3}, "multiple of repeats"),
    ],
)
def test_impossible_recipes_are_one_error(
    data: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        FinetuneStage(recipe(data, tmp_path, **changes))


def test_other_classes_held_out_are_refused(data: Path, tmp_path: Path) -> None:
    (tmp_path / "others.txt").write_text("left\nright\n")
    wrong = {"csv": f"{data}/train.csv", "data_root": str(data), "classes": str(tmp_path / "others.txt")}
    with pytest.raises(DataError, match="other classes"):
        FinetuneStage(recipe(data, tmp_path, held_out=[wrong]))


# -- the command --------------------------------------------------------------------------------------------


def command(*arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "training.finetune", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def losses(out: Path) -> list[float]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.slow
def test_the_command_trains_as_it_did_continues_and_tests(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, config = tmp_path / "run", str(tmp_path / "r.yaml")
    Path(config).write_text(yaml.safe_dump(values(data, out)))
    assert finetune.main(["--config", config, "loop.evaluate_every=6"]) == 0
    whole = losses(out)
    assert whole == pytest.approx(LOSSES, rel=2e-3)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    evaluated = next(row for row in rows if "eval/top1_48" in row)
    assert {f"eval/top1_{count}" for count in (48, 32, 16)} <= evaluated.keys()
    assert rows[0]["tokens_per_s"] > 0

    shutil.rmtree(out / "checkpoints" / "step_00000006")
    assert finetune.main(["--config", config, "--resume"]) == 0
    assert losses(out) == whole

    capsys.readouterr()
    assert finetune.main(["--config", config, "--test"]) == 0
    assert "12 videos, 2 clips x 3 crops" in capsys.readouterr().out
    found = json.loads((out / "test.json").read_text())
    encoder = load_encoder(out / "encoder")
    assert encoder.config.num_classes == 2
    again = recipe(data, out)
    held_out = FinetuneStage(again).held_out
    measured = measure(FinetuneModel(encoder, again), held_out, again.test)
    assert {name: found[name] for name in measured.shares()} == measured.shares()
    assert set(measured.top1) == {48, 8}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures, red ones and blue ones: quick to read and to learn."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    rows = []
    for number in range(12):
        Image.new("RGB", (64, 64), ("red", "blue")[number % 2]).save(folder / f"{number}.png")
        rows.append(f"{number}.png {number % 2}")
    (folder / "train.csv").write_text("\n".join(rows) + "\n")
    (folder / "classes.txt").write_text("red\nblue\n")
    return folder


def test_it_learns_and_resumes_exactly(pictures: Path, tmp_path: Path) -> None:
    changes = {
        "optim": {"lr": 3e-3, "batch_size": 6, "micro_batch": 6, "epochs": 10, "layer_decay": 0.9},
        "augment": {},
    }
    whole = recipe(pictures, tmp_path / "whole", **changes)
    stage = FinetuneStage(whole)
    found = train(stage, whole.optim, whole.loop).losses
    assert sum(found[-4:]) < 0.5 * sum(found[:4])
    # At every count, also one that was never trained on.
    assert stage.evaluate() == {f"top{k}_{count}": 1.0 for k in (1, 5) for count in (48, 32, 16)}
    assert measure(stage.model, stage.held_out, whole.test).shares()["top1_8"] == 1.0

    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for step in range(10, 21):
        shutil.rmtree(tmp_path / "cut" / "checkpoints" / f"step_{step:08d}")
    cut = recipe(pictures, tmp_path / "cut", **changes)
    assert train(FinetuneStage(cut), cut.optim, cut.loop, resume=True).losses == found[9:]


def test_rates_of_the_layers_reach_the_optimiser(data: Path, tmp_path: Path) -> None:
    """Two blocks, so layers 0 to 3: Adam's first step moves each weight by its rate."""
    optim = {"lr": 1e-3, "batch_size": 2, "micro_batch": 2, "layer_decay": 0.5, "warmup_ratio": 0.0}
    config = recipe(data, tmp_path, optim={**optim, "clip_grad": None}, drop_path=0.0)
    stage = FinetuneStage(config)
    before = {name: p.detach().clone() for name, p in stage.model.named_parameters()}
    loop = build(type(config.loop), {"out": str(tmp_path), "precision": "fp32", "max_steps": 1}, "loop")
    train(stage, config.optim, loop)
    after = dict(stage.model.named_parameters())
    for name, rate in {
        "encoder.patch_embed.proj.weight": 1 / 8,
        "encoder.blocks.0.mlp.fc1.weight": 1 / 4,
        "encoder.blocks.1.mlp.fc1.weight": 1 / 2,
        "encoder.head.0.weight": 1.0,
    }.items():
        moved = (after[name] - before[name]).abs()
        assert moved[moved > 0].median().item() == pytest.approx(1e-3 * rate, rel=0.02), name


@pytest.mark.slow
def test_two_processes_train_like_one(data: Path, tmp_path: Path) -> None:
    """A real stage over gloo, with heads and pools that a step does not use."""
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text(
            yaml.safe_dump(values(data, tmp_path / name, num_tokens=[32], drop_path=0.0))
        )
    settings = ["loop.max_steps=4", "loop.evaluate_every=4"]
    assert finetune.main(["--config", str(tmp_path / "one.yaml"), *settings]) == 0
    command(
        "--config",
        str(tmp_path / "two.yaml"),
        *settings,
        launcher=(*("-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29531"),),
    )
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    figures = [
        {
            name: value
            for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()
            for name, value in json.loads(line).items()
            if name.startswith(("eval/", "accuracy", "grad_norm"))
        }
        for run in ("one", "two")
    ]
    assert figures[1] == pytest.approx(figures[0], rel=1e-3)


@pytest.mark.parametrize("arguments", [["--config", "nowhere.yaml"], ["--config", "nowhere.yaml", "--test"]])
def test_wrong_commands_are_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert finetune.main(arguments) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_testing_before_training_is_one_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values(data, tmp_path / "run")))
    assert finetune.main(["--config", str(tmp_path / "r.yaml"), "--test"]) == 2
    assert "encoder" in capsys.readouterr().err


# -- recipes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["small", "base"])
@pytest.mark.parametrize("dataset", ["k710", "k400", "coin", "ssv2"])
def test_recipes_hold_table_6(dataset: str, size: str) -> None:
    name = f"finetune_{dataset}_{size}.yaml"
    text = (RECIPES / name).read_text()
    assert text.splitlines()[0] == (
        f"# accelerate launch -m training.finetune --config training/recipes/{name}"
    )
    found = read_recipe(FinetuneRecipe, RECIPES / name)
    optim = found.optim
    epochs = {
        "k710": {"small": 35, "base": 20},
        "k400": {"small": 5, "base": 3},
        "coin": {"small": 40, "base": 25},
    }
    if dataset in epochs:
        assert optim.epochs == epochs[dataset][size]
        warm = 1 if dataset == "k400" else 5
        assert optim.warmup_ratio * optim.epochs == pytest.approx(warm, rel=1e-4)
    assert optim.lr == (5e-4 if dataset == "coin" else 2e-4)
    assert optim.batch_size == (1024 if dataset == "k710" else 512)
    assert (optim.betas, optim.weight_decay, optim.layer_decay) == ((0.9, 0.999), 0.05, 0.75)
    assert (found.drop_path, found.label_smoothing, found.num_tokens) == (0.1, 0.0, (3072, 2048, 1024))
    assert (found.augment.rand_augment, found.augment.erase) == ((9, 0.5), 0.0)
    assert found.augment.flip == (0.0 if dataset == "ssv2" else 0.5)
    assert (found.test.clips, found.test.crops) == ((2, 3) if dataset == "ssv2" else (4, 3))
    assert len(found.grid.pairs()) == 18
    # Every setting that the stage has is written down, here or in what the recipe is based on.
    stated = read_values(RECIPES / name)
    assert {setting.name for setting in fields(FinetuneRecipe)} - stated.keys() <= {
        "num_classes",
        "threads",
    }


def test_the_small_recipe_is_flux_multi_on_the_demo_world() -> None:
    found = read_recipe(FinetuneRecipe, RECIPES / "cpu" / "finetune.yaml")
    assert found.data[0].world is not None
    assert len(found.num_tokens) == 3
