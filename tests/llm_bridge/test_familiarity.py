"""The judge of familiarity: its file, its statistics, and that it belongs to one encoder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from encoder.checkpoint import save_tensors, weights_hash
from encoder.errors import CheckpointError
from encoder.fluxvit import FluxViT
from llm_bridge.familiarity import FAMILIARITY, FRAMES, Familiarity, Network, num_statistics, statistics
from llm_bridge.model import VideoLanguageModel
from tests.llm_bridge.tiny_vlm import ENCODER, tiny_vlm


@pytest.fixture(scope="module")
def encoder() -> FluxViT:
    torch.manual_seed(0)
    return FluxViT(ENCODER).eval()


def judge_of(encoder: FluxViT, units: int = 0) -> Familiarity:
    generator, size = torch.Generator().manual_seed(1), num_statistics(encoder)
    weight = torch.randn(size, generator=generator)
    network = None
    if units:
        parts = [torch.randn(shape, generator=generator) for shape in ((size,), (units, size), (units,))]
        outer = torch.randn(units, generator=generator)
        network = Network(parts[0], parts[0].abs() + 1, parts[1].half(), parts[2], outer)
    return Familiarity(weight, 0.25, 236, 3.5, weights_hash(encoder), network)


def clip(frames: int, seed: int = 0, side: int = 40) -> torch.Tensor:
    return torch.randint(0, 256, (frames, side, side, 3), generator=torch.Generator().manual_seed(seed)).to(
        torch.uint8
    )


@settings(max_examples=20, deadline=None)
@given(frames=st.integers(1, 20), height=st.integers(8, 60), width=st.integers(8, 60))
def test_any_video_gives_finite_statistics_of_one_length(
    encoder: FluxViT, frames: int, height: int, width: int
) -> None:
    video = torch.randint(0, 256, (frames, height, width, 3)).to(torch.uint8)
    for fit in ("squash", "crop"):
        found = statistics(encoder, video, fit)  # type: ignore[arg-type]
        assert found.shape == (num_statistics(encoder),)
        assert found.isfinite().all()


def test_they_are_the_means_and_spreads_of_the_tokens(encoder: FluxViT) -> None:
    from encoder.preprocess import preprocess

    video = clip(FRAMES)
    side = 8 * ENCODER.patch_size
    with torch.no_grad():
        vision = encoder(preprocess(video, side, side)[None])
        patches = encoder.embed(preprocess(video, side, side)[None])[0]
    found, width = statistics(encoder, video, "squash"), ENCODER.embed_dim
    torch.testing.assert_close(found[:width], patches.mean(0))
    torch.testing.assert_close(found[width : 2 * width], patches.std(0))
    torch.testing.assert_close(found[-2 * width : -width], vision.packed.mean(0))
    torch.testing.assert_close(found[-width:], vision.packed.std(0))


def test_a_long_video_is_seen_from_beginning_to_end(encoder: FluxViT) -> None:
    video = clip(4)
    torch.testing.assert_close(
        statistics(encoder, video.repeat_interleave(5, 0), "squash"), statistics(encoder, video, "squash")
    )


def test_the_file_comes_back_as_it_was(encoder: FluxViT, tmp_path: Path) -> None:
    judge, path = judge_of(encoder), tmp_path / FAMILIARITY
    judge.save(path)
    found = Familiarity.read(path, encoder)
    assert found is not None
    assert torch.equal(found.weight, judge.weight)
    assert (found.bias, found.things, found.yes_penalty) == (judge.bias, judge.things, judge.yes_penalty)
    assert path.stat().st_size < 4 * num_statistics(encoder) + 1000
    video = clip(3)
    expected = bool(statistics(encoder, video, "squash") @ judge.weight + judge.bias <= 0)
    assert found.is_familiar(encoder, video, "squash") == expected


def test_a_network_beside_the_line_comes_back_too(encoder: FluxViT, tmp_path: Path) -> None:
    judge, path = judge_of(encoder, units=5), tmp_path / FAMILIARITY
    judge.save(path)
    found = Familiarity.read(path, encoder)
    assert found is not None
    assert found.network is not None
    assert judge.network is not None
    assert all(torch.equal(value, vars(judge.network)[name]) for name, value in vars(found.network).items())
    seen = statistics(encoder, clip(3), "squash")
    scaled = (seen - judge.network.centre) / judge.network.spread
    units = [
        torch.nn.functional.gelu(row.float() @ scaled + bias)
        for row, bias in zip(judge.network.inner, judge.network.inner_bias, strict=True)
    ]
    expected = (
        seen @ judge.weight + judge.bias + sum(u * o for u, o in zip(units, judge.network.outer, strict=True))
    )
    torch.testing.assert_close(found.score(seen), expected)


@pytest.mark.parametrize("damage", ["missing", "shape", "not finite"])
def test_a_damaged_network_is_one_sentence(encoder: FluxViT, tmp_path: Path, damage: str) -> None:
    from encoder.checkpoint import read_tensors

    path = tmp_path / FAMILIARITY
    judge_of(encoder, units=5).save(path)
    tensors = read_tensors(path, strip=False)
    if damage == "missing":
        del tensors["network.outer"]
    elif damage == "shape":
        tensors["network.inner"] = tensors["network.inner"][:, 1:]
    else:
        tensors["network.centre"][0] = torch.nan
    save_tensors(tensors, path)
    with pytest.raises(CheckpointError, match=FAMILIARITY):
        Familiarity.read(path, encoder)


def test_it_belongs_to_one_encoder(encoder: FluxViT, tmp_path: Path) -> None:
    judge_of(encoder).save(tmp_path / FAMILIARITY)
    assert Familiarity.read(tmp_path / FAMILIARITY, FluxViT(ENCODER)) is None


@pytest.mark.parametrize("damage", ["missing", "shape", "not finite", "hash", "many", "text"])
def test_a_damaged_file_is_one_sentence(encoder: FluxViT, tmp_path: Path, damage: str) -> None:
    path = tmp_path / FAMILIARITY
    judge_of(encoder).save(path)
    from encoder.checkpoint import read_tensors

    tensors = read_tensors(path, strip=False)
    if damage == "missing":
        del tensors["bias"]
    elif damage == "shape":
        tensors["weight"] = tensors["weight"][None]
    elif damage == "not finite":
        tensors["weight"][0] = torch.nan
    elif damage == "hash":
        tensors["encoder"] = torch.tensor([1000, 2000])
    elif damage == "many":
        tensors["things"] = torch.tensor([1, 2])
    save_tensors(tensors, path)
    if damage == "text":
        path.write_text("nothing of the kind")
    with pytest.raises(CheckpointError, match=FAMILIARITY):
        Familiarity.read(path, encoder)


def test_a_model_keeps_its_judge_while_it_keeps_its_encoder(
    llm_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    model = tiny_vlm(llm_folder("qwen2"))
    assert model.is_familiar(clip(2)) is None
    model.familiarity = judge_of(model.encoder)
    model.save_pretrained(tmp_path / "model")
    again = VideoLanguageModel.from_pretrained(tmp_path / "model", device="cpu", dtype=torch.float32)
    assert again.familiarity is not None
    assert again.is_familiar(clip(2)) == model.is_familiar(clip(2))
    torch.manual_seed(7)
    FluxViT(ENCODER).save_pretrained(tmp_path / "other")
    replaced = VideoLanguageModel.from_pretrained(
        tmp_path / "model", encoder=tmp_path / "other", device="cpu", dtype=torch.float32
    )
    assert replaced.familiarity is None
