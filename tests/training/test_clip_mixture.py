"""Flux-CLIP on images and videos: their order, the gathered loss, what each stage trains, the command."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from encoder.config import MICRO
from encoder.errors import CheckpointError, ConfigError, DataError
from encoder.fluxvit import FluxViT
from tests import video_files as vf
from tests.training import tiny_towers
from training import clip
from training.clip import ClipRecipe, ClipStage
from training.clip_data import Alternation, as_numbers, still_grid
from training.clip_model import ClipBatch, retrieval
from training.config import build, read_recipe
from training.data.grids import FlexibleGrid
from training.gather import gather_rows
from training.loop import train
from training.losses import contrastive_loss

RECIPES = Path(clip.__file__).parent / "recipes"
COLOURS = (
    "red",
    "green",
    "blue",
    "gold",
    "black",
    "white",
    "purple",
    "orange",
    "gray",
    "pink",
    "navy",
    "tan",
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images, eight videos, their annotations, and the smallest sentence tower."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("corpus")
    rows: dict[str, list[dict]] = {"image": [], "video": []}
    for number, colour in enumerate(COLOURS):
        picture = Image.new("RGB", (60, 48), colour)
        picture.paste("white", (3 * number, 8, 3 * number + 12, 30))
        picture.save(folder / f"{colour}.png")
        captions = [f"A {colour} picture.", f"All of it is {colour}."]
        rows["image"].append({"image": f"{colour}.png", "captions": captions})
    for number in range(8):
        vf.write(folder / f"{number}.mp4", vf.steady(9 + number), size=(64, 48))
        rows["video"].append({"video": f"{number}.mp4", "caption": f"Bars that begin at {number}."})
    for kind, found in rows.items():
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    tiny_towers.sentence_folder(folder / "tower")
    return folder


def values(corpus: Path, out: Path, **changes) -> dict:
    """A small recipe as plain values; videos of 4 to 6 frames at 56 or 70, images at those sizes."""
    settings = {"embed_dim": 32, "depth": 2, "num_heads": 2, "pool_heads": 2, "clip_embed_dim": 24}
    return {
        "encoder": {"size": "micro", "settings": settings},
        "images": [{"jsonl": str(corpus / "image.jsonl"), "data_root": str(corpus)}],
        "videos": [{"jsonl": str(corpus / "video.jsonl"), "data_root": str(corpus)}],
        "grid": {"frames": [4, 8, 2], "resolutions": [56, 84, 14], "tokens": [64, 160]},
        "augment": {"crop": "multiscale", "flip": 0.5},
        "image_positions": "mean",
        "keeps": [16, 32],
        "align_norm": True,
        "text_tower": str(corpus / "tower"),
        "temperature": 0.01,
        "positives": "id",
        "optim": {"lr": 1e-3, "batch_size": 4, "micro_batch": 2, "epochs": 2, "betas": [0.9, 0.98]},
        "loop": {"out": str(out), "precision": "fp32", "checkpoint_every": 1, "keep_checkpoints": 99},
        **changes,
    }


def recipe(corpus: Path, out: Path, **changes) -> ClipRecipe:
    return build(ClipRecipe, values(corpus, out, **changes), "test")


# -- order --------------------------------------------------------------------------------------------------


@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 4), st.integers(0, 99))
def test_types_alternate_by_step_and_miss_nothing(images: int, videos: int, per_step: int, seed: int) -> None:
    order = Alternation({"image": images, "video": videos}, per_step, seed)
    assert order.micro_batches == (images + videos) * per_step
    turns = [order.turn(index) for index in range(2 * order.micro_batches)]
    # Every micro-batch of a step, so every rank, has the same type; each type is gone through in order.
    for step in range(0, len(turns), per_step):
        assert len({kind for kind, _ in turns[step : step + per_step]}) == 1
    for kind in ("image", "video"):
        numbers = [number for found, number in turns if found == kind]
        assert numbers == list(range(len(numbers)))
    first = Counter(kind for kind, _ in turns[: order.micro_batches])
    assert first == {"image": images * per_step, "video": videos * per_step}
    # Asked in any order, as by other ranks or after a resume: the same.
    again = Alternation({"image": images, "video": videos}, per_step, seed)
    for index in random.Random(seed).sample(range(len(turns)), len(turns)):
        assert again.turn(index) == turns[index]


def test_the_order_is_mixed_and_differs_by_epoch() -> None:
    order = Alternation({"image": 20, "video": 20}, 1, 0)
    epochs = [[order.turn(40 * epoch + index)[0] for index in range(40)] for epoch in range(2)]
    assert epochs[0] != epochs[1]
    assert sum(a != b for a, b in zip(epochs[0], epochs[0][1:], strict=False)) > 8


def test_images_have_one_frame_at_the_videos_sizes(corpus: Path, tmp_path: Path) -> None:
    assert still_grid(FlexibleGrid()).pairs() == ((1, 168), (1, 196), (1, 224), (1, 252))
    stage = ClipStage(recipe(corpus, tmp_path))
    # 12 images and 8 videos in steps of 4.
    assert stage.micro_batches == (3 + 2) * 2
    batches = [stage.batch(index) for index in range(2 * stage.micro_batches)]
    for batch in batches:
        frames, side = batch.pixels.shape[2:4]
        assert (frames == 1) == (batch.kind == "image")
        assert (frames, side) in {(1, 56), (1, 70), (4, 56), (6, 56), (4, 70), (6, 70)}
        assert batch.text is not None
        assert batch.text.shape == (2, 32)
        assert all(("Bars" in text) == (batch.kind == "video") for text in batch.captions)
    # Both micro-batches of a step have one type and one count.
    for one, other in zip(batches[::2], batches[1::2], strict=True):
        assert (one.kind, one.keep) == (other.kind, other.keep)
    assert {batch.keep for batch in batches} == {16, 32}
    for kind, count in (("image", 12), ("video", 8)):
        seen = [key for batch in batches[:10] if batch.kind == kind for key in batch.ids.tolist()]
        assert len(seen) == len(set(seen)) == count
    # Of an image's two captions both come up over the epochs.
    texts = {text for batch in batches if batch.kind == "image" for text in batch.captions}
    assert {text.startswith("All") for text in texts} == {True, False}
    again = ClipStage(recipe(corpus, tmp_path)).batch(7)
    assert torch.equal(again.pixels, batches[7].pixels)
    assert again.captions == batches[7].captions


def test_without_captions_there_is_one_error(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"image": "red.png", "label": 0}\n' * 4)
    data = [{"jsonl": str(tmp_path / "a.jsonl"), "data_root": str(corpus)}]
    stage = ClipStage(recipe(corpus, tmp_path / "r", images=data, videos=[]))
    with pytest.raises(DataError, match=r"'red.png' has no caption"):
        stage.batch(0)


# -- loss ---------------------------------------------------------------------------------------------------


def test_equal_ids_share_the_target() -> None:
    torch.manual_seed(0)
    video, text = F.normalize(torch.randn(3, 4), dim=-1), F.normalize(torch.randn(3, 4), dim=-1)
    scores = 5 * video @ text.T
    rows, columns = scores.log_softmax(1), scores.T.log_softmax(1)
    want = 0.0
    for logs in (rows, columns):
        # 0 and 2 are about one file: half of the target each.
        want -= (logs[0, 0] + logs[0, 2]) / 2 + logs[1, 1] + (logs[2, 0] + logs[2, 2]) / 2
    loss = contrastive_loss(video, text, torch.tensor(5.0), as_numbers(["x", "y", "x"]))
    assert loss.item() == pytest.approx(want.item() / 6, rel=1e-5)


def test_numbers_of_names_never_change() -> None:
    # Ranks are processes of their own, and Python's hash differs between those.
    assert as_numbers(["", "a", "a"]).tolist() == [
        -5426141060434712860,
        3405396810240292928,
        3405396810240292928,
    ]


def rank_of_two(rank: int, folder: str) -> None:
    """One of two processes: its half of the batch, and what a mean over ranks makes of the gradients."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    loss, gradients = loss_and_gradients(slice(rank * 3, rank * 3 + 3))
    for gradient in gradients:
        dist.all_reduce(gradient)
        gradient /= 2
    torch.save((loss, gradients), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def loss_and_gradients(rows: slice) -> tuple[float, list[torch.Tensor]]:
    """Of the contrastive loss of six pairs, of which this process holds `rows`."""
    torch.manual_seed(0)
    videos, texts = torch.randn(6, 5), torch.randn(6, 4)
    ids = torch.tensor([3, 1, 4, 1, 5, 9])
    image, words = torch.nn.Linear(5, 4), torch.nn.Linear(4, 4)
    scale = torch.nn.Parameter(torch.tensor(2.0))
    video = gather_rows(F.normalize(image(videos[rows]), dim=-1))
    text = gather_rows(F.normalize(words(texts[rows]), dim=-1))
    loss = contrastive_loss(video, text, scale.exp(), gather_rows(ids[rows]))
    loss.backward()
    parameters = [*image.parameters(), *words.parameters(), scale]
    return loss.item(), [p.grad for p in parameters if p.grad is not None]


def test_two_processes_share_one_contrastive_batch(tmp_path: Path) -> None:
    loss, gradients = loss_and_gradients(slice(None))
    torch.multiprocessing.spawn(rank_of_two, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        found, theirs = torch.load(tmp_path / f"rank{rank}.pt")
        assert found == pytest.approx(loss, rel=1e-6)
        for ours, other in zip(gradients, theirs, strict=True):
            torch.testing.assert_close(other, ours, rtol=1e-5, atol=1e-7)


def test_recall_by_hand() -> None:
    text = torch.eye(4)
    video = F.normalize(torch.tensor([[1.0, 0, 0, 0], [2, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 1]]), dim=-1)
    # Clip 1 is nearer to text 0; clip 2 as near to text 3 as to its own.
    found = retrieval(video, text, (1, 2))
    assert found == {"v2t_r1": 0.5, "v2t_r2": 1.0, "t2v_r1": 1.0, "t2v_r2": 1.0}


# -- model --------------------------------------------------------------------------------------------------


def test_stage_one_trains_the_projector_alone(corpus: Path, tmp_path: Path) -> None:
    stage = ClipStage(recipe(corpus, tmp_path, train="projector", pools=[1, 2]))
    trained = {name for name, p in stage.model.named_parameters() if p.requires_grad}
    rest = {"align.0.weight", "align.0.bias", "align.1.weight", "align.1.bias", "log_scale"}
    assert {name for name in trained if not name.startswith("encoder.")} == rest
    assert {".".join(name.split(".")[:3]) for name in trained if name.startswith("encoder.")} == {
        "encoder.clip_projector.1",
        "encoder.clip_projector.2",
    }
    # Dropped paths of a frozen encoder would only be noise.
    assert not stage.model.train().encoder.training
    assert stage.model.align.training
    before = {name: p.detach().clone() for name, p in stage.model.named_parameters()}
    train(stage, stage.recipe.optim, stage.recipe.loop)
    moved = {name for name, p in stage.model.named_parameters() if not torch.equal(p, before[name])}
    # The temperature starts at its lowest and was asked to fall, or rose.
    assert moved | {"log_scale"} == {n for n in trained if not n.endswith("k_bias")} | {"log_scale"} or (
        moved | {"log_scale"} == trained
    )
    saved = load_file(tmp_path / "checkpoints" / "step_00000010" / "trainable.safetensors")
    assert set(saved) == trained


def test_stage_two_continues_stage_one_with_everything(corpus: Path, tmp_path: Path) -> None:
    first = ClipStage(recipe(corpus, tmp_path / "one", train="projector", loop=loop(tmp_path / "one", 2)))
    train(first, first.recipe.optim, first.recipe.loop)
    changes = {
        "encoder": {"init": str(tmp_path / "one" / "encoder")},
        "align_init": str(tmp_path / "one" / "alignment.safetensors"),
        "gradient_checkpointing": True,
    }
    second = ClipStage(recipe(corpus, tmp_path / "two", **changes))
    assert all(p.requires_grad for p in second.model.parameters())
    assert not any("tower" in name for name, _ in second.model.named_parameters())
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], tensor), name
    assert second.model.encoder.config.image_positions == "mean"
    with pytest.raises(CheckpointError, match=r"does not fit the recipe's alignment \(align.weight\)"):
        ClipStage(recipe(corpus, tmp_path / "two", **changes, align_norm=False))


def test_a_trained_text_tower_is_part_of_the_model(corpus: Path, tmp_path: Path) -> None:
    stage = ClipStage(recipe(corpus, tmp_path, train_text=True, loop=loop(tmp_path, 2)))
    assert stage.batch(0).text is None
    name = "model.encoder.layer.0.attention.self.query.weight"
    before = stage.text.state_dict()[name].clone()
    train(stage, stage.recipe.optim, stage.recipe.loop)
    saved = load_file(tmp_path / "text_tower.safetensors")
    assert not torch.equal(saved[name], before)
    assert not any("tower" in key for key in load_file(tmp_path / "alignment.safetensors"))
    checkpoint = load_file(tmp_path / "checkpoints" / "step_00000002" / "trainable.safetensors")
    assert torch.equal(checkpoint[f"text_tower.{name}"], saved[name])


def test_the_temperature_starts_at_its_bound_and_can_leave_it(corpus: Path, tmp_path: Path) -> None:
    model = ClipStage(recipe(corpus, tmp_path)).model
    with torch.no_grad():
        model.log_scale.fill_(9.0)
    torch.manual_seed(0)
    batch = ClipBatch(torch.randn(4, 3, 1, 56, 56), F.normalize(torch.randn(4, 32), dim=-1), {}, 16)
    loss, figures = model(batch)
    assert figures["scale"] == pytest.approx(100.0, rel=1e-5)
    loss.backward()
    # Wrong pairs at so sharp a temperature: it wants to rise, and may.
    assert model.log_scale.grad is not None
    assert model.log_scale.grad.item() > 0


def test_each_count_has_its_pool(corpus: Path, tmp_path: Path) -> None:
    model = ClipStage(recipe(corpus, tmp_path, pools=[2, 0])).model.eval()
    pixels = torch.randn(2, 3, 4, 56, 56)
    for keep, pool in ((16, 2), (32, 0), (48, 1)):
        wanted = model.encoder.pool(model.encoder(pixels, keep), pool)
        torch.testing.assert_close(model.features(pixels, keep), wanted)


def test_positions_of_an_image() -> None:
    torch.manual_seed(0)
    config = (
        clip.EncoderSource("micro", settings={"embed_dim": 32, "num_heads": 2, "pool_heads": 2})
        .build()
        .config
    )
    plain = FluxViT(config)
    mean = FluxViT(config.replace(image_positions="mean"))
    mean.load_state_dict(plain.state_dict())
    same = FluxViT(config.replace(image_positions="mean"))
    same.load_state_dict(plain.state_dict())
    with torch.no_grad():
        table = same.pos_embed[0, 1:].view(config.pos_frames, -1, 32)
        table.copy_(table.mean(0, keepdim=True).expand_as(table))
    pixels = torch.randn(1, 3, 1, 112, 112)
    with torch.no_grad():
        wanted = same(pixels).packed  # all frames alike: interpolation and mean agree
        torch.testing.assert_close(mean(pixels).packed, wanted)
        assert not torch.allclose(plain(pixels).packed, wanted, atol=1e-3)
        video = torch.randn(1, 3, 4, 112, 112)
        torch.testing.assert_close(mean(video).packed, plain(video).packed)
    mean(pixels).packed.sum().backward()
    assert mean.pos_embed.grad is not None
    assert mean.pos_embed.grad[0, 1:].abs().sum() > 0


# -- the command --------------------------------------------------------------------------------------------


def loop(out: Path, steps: int | None = None) -> dict:
    return {"out": str(out), "precision": "fp32", "checkpoint_every": 1, "max_steps": steps}


def command(path: Path, *arguments: str, launcher: tuple[str, ...] = ()) -> list[dict]:
    """`python -m training.clip` in processes of its own; its lines of metrics."""
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "training.clip", "--config", str(path), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"},
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    out = next(word for word in arguments if word.startswith("loop.out=")).removeprefix("loop.out=")
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def test_the_command_gives_stored_losses(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(json.dumps(values(corpus, tmp_path / "unused")))
    overrides = ["temperature=0.1", f"loop.out={tmp_path / 'run'}", "loop.max_steps=5"]
    rows = command(tmp_path / "recipe.yaml", *overrides)
    kinds = ["video" if "contrastive_video" in row else "image" for row in rows]
    assert kinds == ["video", "image", "video", "image", "image"]
    assert [row["loss"] for row in rows] == pytest.approx(LOSSES, rel=1e-2)
    for row, kind in zip(rows, kinds, strict=True):
        assert row["loss"] == pytest.approx(row[f"contrastive_{kind}"])
        assert row["tokens"] in (2 * 16, 2 * 25, 2 * 32)  # an image of 70 x 70 has 25 patches


LOSSES = [0.0]


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


def test_two_processes_train_like_one(corpus: Path, tmp_path: Path) -> None:
    # Images without augmentation: what a clip shows does not depend on its place in a micro-batch.
    changes = {
        "videos": [],
        "augment": {},
        "keeps": [8],
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
    stage = ClipStage(recipe(corpus, tmp_path, held_out=held_out, frames=4, resolution=56, evaluate_clips=6))
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
        ({"pools": [0]}, "one head for each of 2 keeps"),
        ({"temperature": 0.001}, "temperature not below it"),
        ({"keeps": [0]}, "at least one token count"),
        ({"train": "head"}, "train must be one of projector, all, not 'head'"),
        ({"positives": "x"}, "positives must be one of text, id"),
    ],
)
def test_impossible_recipes(corpus: Path, tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe(corpus, tmp_path, **changes)


def test_recipes_that_do_not_fit_the_encoder(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="3 pools, no pool 3"):
        ClipStage(recipe(corpus, tmp_path, pool=3))
    grid = {"frames": [4, 5, 1], "resolutions": [64, 65, 1], "tokens": [1, 999], "patch_size": 16}
    with pytest.raises(ConfigError, match="the encoder's, 14"):
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
    assert (found.temperature, found.temperature_min) == (0.01, 0.01)
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
