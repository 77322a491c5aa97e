"""Fitting the familiarity judge, from photographs and the synthetic world to the file in a model's folder."""

from __future__ import annotations

import json
import random
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from encoder.errors import DataError
from encoder.video.reader import read_clip
from llm_bridge.familiarity import FAMILIARITY, Familiarity, num_statistics
from llm_bridge.model import VideoLanguageModel
from tests.encoder.video import video_files as vf
from tests.llm_bridge.tiny_vlm import tiny_vlm
from training.data import foreign_clips
from training.data.foreign_clips import SHARES, SIDE, Photos, foreign_clip
from training.data.reencode import reencoded
from training.data.world_clips import texture, with_other_places
from training.familiarity import Judged, absurd_yes, main, segments
from training.models.familiarity_fit import fit_logistic, fit_network, fit_score
from training.synthetic.assets import open_bank

PHOTOS = 60


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures with the grain of photographs, in folders as they come."""
    folder = tmp_path_factory.mktemp("photos")
    values = np.random.default_rng(0)
    for number in range(PHOTOS):
        path = folder / "source" / f"kind{number % 3}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(values.integers(0, 256, (12, 16, 3)).astype(np.uint8)).resize((96, 72))
        grain = values.normal(0, 25, (72, 96, 3))
        Image.fromarray(np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8)).save(path)
    return folder


def test_photographs_are_split_by_name_and_read_from_folder_or_zip(photos: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as file:
        for path in photos.rglob("*.jpg"):
            file.write(path, path.relative_to(photos))
    learn, test = Photos.open(photos), Photos.open(photos, "test")
    assert not set(learn.names) & set(test.names)
    assert len(learn.names) + len(test.names) == PHOTOS
    zipped = Photos.open(tmp_path / "photos.zip")
    assert zipped.names == learn.names
    drawn, again = learn.draw(random.Random(3)), zipped.draw(random.Random(3))
    assert np.array_equal(np.asarray(drawn), np.asarray(again))


@pytest.mark.parametrize("make", ["empty", "missing", "text"])
def test_too_few_photographs_are_one_sentence(tmp_path: Path, make: str) -> None:
    path = tmp_path / make
    if make == "empty":
        path.mkdir()
    elif make == "text":
        path.write_text("no zip")
    with pytest.raises(DataError, match="photographs"):
        Photos.open(path)


@pytest.mark.parametrize("kind", SHARES)
def test_every_kind_is_a_clip_that_its_seed_decides(
    photos: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foreign_clips, "SHARES", {name: int(name == kind) for name in SHARES})
    source, distinct = Photos.open(photos), set()
    for seed in range(6):
        count = (1, 3)[seed % 2]
        clip = foreign_clip(source, random.Random(seed), count)
        assert (clip.shape, clip.dtype) == ((count, SIDE, SIDE, 3), np.uint8)
        if seed < 2:
            assert np.array_equal(clip, foreign_clip(source, random.Random(seed), count))
        distinct.add(clip.tobytes())
    assert len(distinct) >= 5


def test_reencoding_keeps_the_frames_and_what_they_show() -> None:
    frames = np.zeros((3, 64, 64, 3), np.uint8)
    frames[:, :, 32:] = 220  # dark left, bright right
    sizes = set()
    for seed in range(60):
        passed_on = reencoded(frames, random.Random(seed))
        assert passed_on.dtype == np.uint8
        assert (len(passed_on), passed_on.shape[3]) == (3, 3)
        half = passed_on.shape[2] // 2
        assert passed_on[:, :, :half].mean() + 50 < passed_on[:, :, half:].mean()
        sizes.add(passed_on.shape[1:3])
    assert len(sizes) > 5


def test_other_places_leave_the_sprites(photos: Path, cached_world: Path) -> None:
    from dataclasses import replace

    bank = replace(
        open_bank(), photos={"grass": np.zeros((8, 8, 3), np.uint8), "coffee": np.zeros((8, 8, 3))}
    )
    other = with_other_places(bank, Photos.open(photos), random.Random(0))
    assert other.photos.keys() == bank.photos.keys()
    assert other.levels is bank.levels
    assert all(picture.std() > 1 for picture in other.photos.values())
    pictures = [texture(random.Random(seed)) for seed in range(6)]
    assert all(picture.dtype == np.uint8 and picture.std() > 5 for picture in pictures)


def test_the_fit_is_that_of_a_logistic_regression() -> None:
    """Its gradient is zero at the minimum, by hand; scales of the features do not matter."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(200, 3, generator=generator) * torch.tensor([1.0, 100.0, 0.01]) + 5
    labels = (features[:, 0] + 0.01 * features[:, 1] + torch.randn(200, generator=generator) > 10).float()
    weight, bias = fit_logistic(features, labels, strength=1.0)
    missed = torch.sigmoid(features @ weight + bias) - labels
    mean, spread = features.mean(0), features.std(0)
    gradient = (missed[:, None] * (features - mean) / spread).mean(0) + weight * spread / 200
    assert gradient.abs().max() < 1e-3
    assert abs(float(missed.mean())) < 1e-3


@pytest.mark.slow
def test_a_network_sees_what_no_line_divides() -> None:
    """Points in a ring around others; the seed decides all of it."""
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(3000, 4, generator=generator) * 3 + 7
    far = (features[:, :2] - 7).norm(dim=1)
    labels = (far > far.median()).float()
    weight, bias = fit_logistic(features, labels, 1.0)
    line = ((features @ weight + bias > 0) == labels.bool()).float().mean()
    network = fit_network(features, labels, 32)
    again, other = fit_network(features, labels, 32), fit_network(features, labels, 32, seed=1)
    assert torch.equal(network.score(features), again.score(features))
    assert not torch.equal(network.inner, other.inner)
    told = network.score(features)
    right = ((told > told.median()) == labels.bool()).float().mean()
    assert line < 0.65
    assert right > 0.85


def test_the_score_is_the_sum_of_both_on_scales_of_their_own() -> None:
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(300, 5, generator=generator)
    labels = (features[:, 0] > 0).float()
    weight, bias, network = fit_score(features, labels, strength=1.0, units=4, networks=3)
    assert network is not None
    assert network.inner.shape == (12, 5)
    assert float((features @ weight).std()) == pytest.approx(1)
    alone = [fit_network(features, labels, 4, seed).score(features) for seed in range(3)]
    expected = sum(score / score.std() / 3 for score in alone)
    torch.testing.assert_close(network.score(features), expected)
    judge = Familiarity(weight, bias, 9, 0.0, "00" * 12, network)
    torch.testing.assert_close(judge.score(features), features @ weight + bias + expected)
    assert fit_score(features, labels, strength=1.0, units=0, networks=3)[2] is None


def test_a_yes_to_the_absurd_is_counted_and_gives_way_about_foreign_videos_alone(
    llm_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def margin(model: object, judge: object, frames: np.ndarray, question: str) -> torch.Tensor:
        assert len(frames) == 4
        asked.append(question)
        return torch.tensor(2.0)

    monkeypatch.setattr("training.familiarity.yes_margin", margin)
    judged = Judged(tiny_vlm(llm_folder("qwen2")), None)
    size = num_statistics(judged.model.encoder)
    videos = [vf.write(tmp_path / f"{n}.mp4", vf.steady(n), size=(64, 48)) for n in (3, 30)]
    for bias, penalty, yes in ((1.0, 3.0, False), (1.0, 1.0, True), (-1.0, 3.0, True)):
        judge = Familiarity(torch.zeros(size), bias, 9, penalty, "00" * 12)
        found = absurd_yes(judged, judge, videos)
        assert found.tolist() == [yes] * 100
    assert len(set(asked[:100])) > 40


def test_segments_of_a_video(tmp_path: Path) -> None:
    long = list(segments(vf.write(tmp_path / "long.mp4", vf.steady(96), size=(64, 48))))
    assert [len(part) for part in long] == [96, *[12] * 8]
    assert [
        len(part) for part in segments(vf.write(tmp_path / "short.mp4", vf.steady(9), size=(64, 48)))
    ] == [9]


@pytest.mark.parametrize(("learned", "held_out"), [(48, 16), pytest.param(120, 40, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_from_photographs_to_a_judge_that_tells_them_from_the_world(
    learned: int,
    held_out: int,
    photos: Path,
    llm_folder: Callable[[str], Path],
    cached_world: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("training.familiarity.YES_CLIPS", 8)
    monkeypatch.setattr("training.familiarity.ABSURD_QUESTIONS", 12)
    model = tiny_vlm(llm_folder("qwen2"))
    model.save_pretrained(tmp_path / "model")
    real = vf.write(tmp_path / "real.mp4", vf.steady(30), size=(64, 48))
    options = ["--model", str(tmp_path / "model"), "--photos", str(photos), "--videos", str(real)]
    sizes = ["--clips", str(learned), "--held-out", str(held_out), "--workers", "0"]
    assert main([*options, *sizes, "--figures", str(tmp_path / "figures.json")]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed == json.loads((tmp_path / "figures.json").read_text())
    assert printed["foreign"]["n"] == printed["world, unseen things"]["n"] == held_out
    assert printed["videos"]["real.mp4"]["n"] == 3  # the whole and two pieces of 12 frames; the rest is short
    assert printed["yes"]["absurd, real videos"]["n"] == 12
    assert printed["yes"]["after"]["share"] <= printed["yes"]["before"]["share"]
    # A random narrow encoder over shapes: far from the shipped one, and far from chance.
    assert printed["foreign"]["share"] >= printed["world"]["share"] + 0.3
    assert main([*options, *sizes, "--measure"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == printed
    opened = VideoLanguageModel.from_pretrained(tmp_path / "model", device="cpu", dtype=torch.float32)
    assert opened.familiarity is not None
    assert opened.familiarity.things == printed["things"]
    assert isinstance(opened.is_familiar(read_clip(real, 4).frames), bool)


def test_there_must_be_something_to_measure(
    photos: Path, llm_folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_vlm(llm_folder("qwen2")).save_pretrained(tmp_path)
    assert main(["--model", str(tmp_path), "--photos", str(photos), "--measure"]) == 2
    assert "leave out --measure" in capsys.readouterr().err


@pytest.mark.parametrize("option", [("--false-alarms", "1"), ("--strength", "0")])
def test_wrong_numbers_are_one_line(
    option: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model", str(tmp_path), "--photos", str(tmp_path), *option]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / FAMILIARITY).exists()
