"""Flux-CLIP on images and videos: their order, the gathered loss, what each stage trains."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from encoder.config import MICRO
from encoder.errors import CheckpointError
from encoder.fluxvit import FluxViT
from llm_bridge.clip_head import TrainedPools, read_clip_head
from tests.training.data.clip_corpus import COLOURS, loop, recipe
from training.clip import ClipStage
from training.data.clip_batches import Alternation, as_numbers, still_grid
from training.data.flexible_grids import FlexibleGrid
from training.evaluation.metrics import paired_recalls
from training.models.clip_model import ClipBatch
from training.trainer.distributed import gather_rows
from training.trainer.loop import train
from training.trainer.losses import contrastive_loss

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
        assert (one.kind, one.num_tokens) == (other.kind, other.num_tokens)
    assert {batch.num_tokens for batch in batches} == {16, 32}
    for kind, count in (("image", 12), ("video", 8)):
        seen = [key for batch in batches[:10] if batch.kind == kind for key in batch.ids.tolist()]
        assert len(seen) == len(set(seen)) == count
    # Of an image's two captions both come up over the epochs.
    texts = {text for batch in batches if batch.kind == "image" for text in batch.captions}
    assert {text.startswith("All") for text in texts} == {True, False}
    again = ClipStage(recipe(corpus, tmp_path)).batch(7)
    assert torch.equal(again.pixels, batches[7].pixels)
    assert again.captions == batches[7].captions


def test_media_without_a_caption_are_skipped_and_named(corpus: Path, tmp_path: Path) -> None:
    rows = [{"image": f"{colour}.png", "caption": colour} for colour in COLOURS[:8]]
    rows[3] = {"image": "gold.png", "label": 0}
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = [{"jsonl": str(tmp_path / "a.jsonl"), "data_root": str(corpus)}]
    stage = ClipStage(recipe(corpus, tmp_path / "r", images=data, videos=[]))
    texts = {text for index in range(4) for text in stage.batch(index).captions}
    assert texts == set(COLOURS[:8]) - {"gold"}
    assert json.loads((tmp_path / "r" / "missing.json").read_text()) == {"gold.png": "It has no caption."}


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


@pytest.mark.slow
def test_two_processes_share_one_contrastive_batch(tmp_path: Path) -> None:
    loss, gradients = loss_and_gradients(slice(None))
    torch.multiprocessing.spawn(rank_of_two, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        found, theirs = torch.load(tmp_path / f"rank{rank}.pt")
        assert found == pytest.approx(loss, rel=1e-6)
        for ours, other in zip(gradients, theirs, strict=True):
            torch.testing.assert_close(other, ours, rtol=1e-4, atol=1e-6)


def test_recall_by_hand() -> None:
    text = torch.eye(4)
    video = F.normalize(torch.tensor([[1.0, 0, 0, 0], [2, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 1]]), dim=-1)
    # Clip 1 is nearer to text 0; clip 2 as near to text 3 as to its own.
    found = paired_recalls(video, text, (1, 2))
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
    weights = [f"encoder.clip_projector.{pool}.cross_attn.v.weight" for pool in (1, 2)]
    assert {"align.0.weight", "align.1.weight", *weights} <= moved <= trained
    saved = load_file(tmp_path / "checkpoints" / "step_00000010" / "trainable.safetensors")
    assert set(saved) == trained


def test_stage_two_continues_stage_one_with_everything(corpus: Path, tmp_path: Path) -> None:
    first = ClipStage(recipe(corpus, tmp_path / "one", train="projector", loop=loop(tmp_path / "one", 2)))
    train(first, first.recipe.optim, first.recipe.loop)
    changes = {
        "encoder": {"init": str(tmp_path / "one" / "encoder")},
        "align_init": str(tmp_path / "one" / "alignment.safetensors"),
        "gradient_checkpointing": True,
        "temperature": None,
    }
    second = ClipStage(recipe(corpus, tmp_path / "two", **changes))
    assert all(p.requires_grad for p in second.model.parameters())
    assert not any("tower" in name for name, _ in second.model.named_parameters())
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], tensor), name
    warmer = ClipStage(recipe(corpus, tmp_path / "two", **{**changes, "temperature": 0.2}))
    assert warmer.model.log_scale.exp().item() == pytest.approx(5.0)
    assert second.model.encoder.config.image_positions == "mean"
    with pytest.raises(CheckpointError, match=r"does not fit the recipe's CLIP head \(align.weight\)"):
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


def test_the_alignment_says_which_pools_were_trained(corpus: Path, tmp_path: Path) -> None:
    for number, (changes, wanted) in enumerate(
        [
            ({"pool": 0}, TrainedPools(0)),
            ({"pools": [2, 0], "num_tokens": [16, 32]}, TrainedPools(1, {16: 2, 32: 0})),
        ]
    ):
        stage = ClipStage(recipe(corpus, tmp_path / str(number), **changes))
        stage.finish(tmp_path / str(number))
        assert read_clip_head(tmp_path / str(number)).pools == wanted
    assert [wanted.nearest(keep) for keep in (8, 16, 30, 64, None)] == [2, 2, 0, 0, 0]


def test_positions_of_an_image() -> None:
    torch.manual_seed(0)
    config = MICRO.replace(embed_dim=32, num_heads=2, pool_heads=2)
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
