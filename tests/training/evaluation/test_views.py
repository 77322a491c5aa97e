"""Tests on several clips and crops: where they lie, how they are averaged, how ranks share the videos."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.encoder.video import video_files as vf
from training.data.examples import Example, ListExamples
from training.data.media import FileMedia
from training.evaluation.views import ViewConfig, Views, load_views, square_crops, view_accuracy


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six videos whose frames are numbered."""
    folder = tmp_path_factory.mktemp("views")
    for number in range(6):
        vf.write(folder / f"{number}.mp4", vf.steady(12 + number), size=(72, 56))
    return folder


@given(frames=st.integers(1, 32), clips=st.integers(1, 8))
def test_clips_lie_inside_every_segment_in_order(frames: int, clips: int) -> None:
    moments = [Views(clips).moments(clip, frames) for clip in range(clips)]
    for segment in range(frames):
        places = [m[segment] for m in moments]
        assert segment / frames < places[0]
        assert places == sorted(places)
        assert places[-1] < (segment + 1) / frames
    assert Views().moments(0, frames) == pytest.approx([(i + 0.5) / frames for i in range(frames)])


def test_crops_are_squares_from_end_to_end() -> None:
    wide = torch.arange(2 * 4 * 10 * 3, dtype=torch.uint8).view(2, 4, 10, 3)
    left, middle, right = square_crops(wide, 3)
    assert torch.equal(left, wide[:, :, :4])
    assert torch.equal(middle, wide[:, :, 3:7])
    assert torch.equal(right, wide[:, :, 6:])
    assert torch.equal(square_crops(wide, 1)[0], middle)
    tall = wide.transpose(1, 2)
    assert torch.equal(square_crops(tall, 3)[2], tall[:, 6:])


def test_views_of_a_video(data: Path) -> None:
    config = ViewConfig(frames=4, resolution=56, clips=2, crops=3)
    views = config.load(Example("0", FileMedia((data / "0.mp4",)), 0))
    assert views.shape == (6, 3, 4, 56, 56)
    # Other moments show other numbers, other crops other parts.
    assert not torch.equal(views[0], views[3])
    assert not torch.equal(views[0], views[2])


def test_probabilities_are_averaged_not_logits(data: Path) -> None:
    """Two views: one is sure of class 1, one leans to class 0. Means of logits and probabilities differ."""
    examples = ListExamples([Example("a", FileMedia((data / "0.mp4",)), 0)], ("x", "y"))
    logits = torch.tensor([[0.0, 8.0], [5.0, -1.0]])
    mean_of_logits, mean_of_probabilities = logits.mean(0), logits.softmax(-1).mean(0)
    assert mean_of_logits.argmax() == 1
    assert mean_of_probabilities.argmax() == 1
    logits = torch.tensor([[0.0, 20.0], [3.0, 0.0], [3.0, 0.0]])
    assert logits.mean(0).argmax() == 1
    assert logits.softmax(-1).mean(0).argmax() == 0
    found = view_accuracy(
        lambda pixels: {7: logits}, examples, ViewConfig(frames=2, resolution=28, clips=1, crops=3)
    )
    assert found.shares() == {"top1_7": 1.0, "top5_7": 1.0}


def test_ranks_share_the_videos_and_call_the_model_equally_often(data: Path) -> None:
    items = [Example(str(n), FileMedia((data / f"{n}.mp4",)), n % 2) for n in range(5)]
    items.append(Example("lost", FileMedia((data / "lost.mp4",)), 0))
    items.append(Example("bare", FileMedia((data / "5.mp4",)), None))
    examples = ListExamples(items, ("x", "y"))
    calls = dict.fromkeys(range(3), 0)

    def on(rank: int):
        def classify(pixels: torch.Tensor) -> dict[int, torch.Tensor]:
            calls[rank] += 1
            return {9: torch.tensor([[1.0, 0.0]]).expand(len(pixels), -1)}

        config = ViewConfig(frames=2, resolution=28, clips=1, crops=1)
        return view_accuracy(classify, examples, config, rank=rank, ranks=3)

    parts = [on(rank) for rank in range(3)]
    assert set(calls.values()) == {1}  # three videos each, in one call
    total = parts[0].merged(parts[1:])
    assert total.videos == 5
    assert total.shares()["top1_9"] == pytest.approx(3 / 5)
    assert set(total.unreadable) == {"lost", "bare"}


# -- loading -------------------------------------------------------------------------------------------------


def test_moments_of_clips() -> None:
    assert Views(1).moments(0, 4) == [0.125, 0.375, 0.625, 0.875]
    assert [Views(3).moments(clip, 1)[0] for clip in range(3)] == [0.25, 0.5, 0.75]


def test_three_squares_along_the_longer_side() -> None:
    wide = torch.arange(10).view(1, 1, 10, 1).expand(2, 4, 10, 3)
    assert [crop[0, 0, :, 0].tolist() for crop in square_crops(wide, 3)] == [
        [0, 1, 2, 3],
        [3, 4, 5, 6],
        [6, 7, 8, 9],
    ]
    tall = wide.transpose(1, 2)
    assert [tuple(crop.shape) for crop in square_crops(tall, 3)] == [(2, 4, 4, 3)] * 3


def test_views_of_a_real_video_and_a_missing_one(tmp_path: Path) -> None:
    vf.write(tmp_path / "a.mp4", [i / 10 for i in range(24)], size=(96, 64))
    examples = [
        Example("a", FileMedia((tmp_path / "a.mp4",))),
        Example("b", FileMedia((tmp_path / "b.mp4",))),
    ]
    loaded = load_views(examples, 4, 56, Views(2, 3), workers=2)
    assert loaded.places == [0]
    assert [tuple(v.shape) for v in loaded.views[0]] == [(3, 4, 56, 56)] * 6
    assert "no such file" in loaded.missing[1]
    # The crops of one clip differ, and so do the clips.
    assert not torch.equal(loaded.views[0][0], loaded.views[0][2])
    assert not torch.equal(loaded.views[0][0], loaded.views[0][3])
