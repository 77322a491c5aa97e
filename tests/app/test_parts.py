"""Questions about a part of a video: what is seen, what it costs, what is said of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from app.chat import VideoChat
from app.messages import Media, Videos
from encoder.budget import Budget
from encoder.errors import VideoError
from encoder.video.part import Part
from llm_bridge.prompt import Visual, time_sentence
from tests import tiny_video_models
from tests.app.conftest import SHORT, WORLD
from tests.encoder.video.video_files import number_in, steady, write

FEW = {"budget": 32, "max_new_tokens": 3}


@pytest.fixture(scope="module")
def minute(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video of 60 s at 25 frames per second whose frames show their numbers."""
    return write(tmp_path_factory.mktemp("video") / "minute.mp4", steady(1500), size=(96, 64))


def test_frames_are_spread_over_the_part_and_times_are_the_video_s(chat: VideoChat, minute: Path) -> None:
    answer = chat.ask(minute, "What?", start=20, end="0:30", **FEW)
    kept = answer.kept[0]
    assert len(kept.times_s) == len(chat.ask(minute, "What?", **FEW).kept[0].times_s)
    assert all(20 <= time_s < 30 for time_s in kept.times_s)
    assert kept.duration_s == pytest.approx(60, abs=0.1)
    seen = chat.preview(minute, Budget(32, resolution=112), start=20, end=30)
    for frame, time_s in zip(seen.frames, seen.kept.times_s, strict=True):
        assert number_in(frame.numpy()) == pytest.approx(25 * time_s, abs=0.6)


def test_the_budget_is_spent_inside_the_region(chat: VideoChat, minute: Path) -> None:
    region = (0.5, 0.25, 1.0, 0.75)
    kept = chat.ask(minute, "What?", region=region, **FEW).kept[0]
    assert len(kept.indices) == 32
    assert kept.region == region
    for _, left, top, right, bottom in kept.boxes:
        assert 0.5 <= left < right <= 1 + 1e-9
        assert 0.25 <= top < bottom <= 0.75 + 1e-9
    whole, part = chat.preview(minute, 32), chat.preview(minute, 32, region=(0, 0.5, 0.5, 1))
    # The lower left of these pictures is red; the upper half is not.
    assert part.frames[..., 0].float().mean() > 200 > whole.frames[..., 0].float().mean()


def test_each_part_is_encoded_once_and_apart(chat: VideoChat, minute: Path) -> None:
    looks: list[dict[str, Any]] = [
        {},
        {"start": 5, "end": 9},
        {"start": 5, "end": 9.5},
        {"region": (0, 0, 1, 0.5)},
    ]
    made = [chat.look(minute, 32, **part) for part in looks]
    assert len({video.visual.key for video in made}) == 4
    for part, first in zip(looks, made, strict=True):
        again = chat.look(minute, 32, **part)
        assert again.encode_s == 0
        assert torch.equal(again.embedding, first.embedding)
    assert not torch.equal(made[1].embedding, made[0].embedding)


def test_the_prompt_says_which_part_in_the_video_s_time(chat: VideoChat, minute: Path) -> None:
    visual = chat.look(minute, 32, start=20, end=30).visual
    assert time_sentence(visual, "short").endswith("sampled from 20.00 to 30.00 seconds. ")
    assert "lasts for 60.00 seconds" in time_sentence(visual, "short")
    assert f"{visual.times_s[0]:.2f}, " in time_sentence(visual, "long")
    assert time_sentence(Visual(3, "", 9.0, (1.0,)), "short").endswith("sampled from it. ")


def test_a_part_of_a_short_time_has_no_more_frames_than_it_holds(chat: VideoChat, minute: Path) -> None:
    assert chat.plan(minute, "full", start=20, end=20.2).frames <= 5
    assert (
        chat.estimate(minute, "full", start=20, end=20.2).seen_tokens
        < chat.estimate(minute, "full").seen_tokens
    )


def test_a_medium_may_be_a_part_and_others_stay_whole(chat: VideoChat) -> None:
    clip = Media(WORLD, part=Part.of(1, 2))
    kept = chat.ask(Videos(clip, SHORT), "What?", **FEW).kept
    assert all(1 <= time_s < 2 for time_s in kept[0].times_s)
    assert max(kept[1].times_s) > 2
    kept = chat.ask(Videos(clip, SHORT), "What?", start=0, end=0.5, **FEW).kept
    assert all(1 <= time_s < 2 for time_s in kept[0].times_s)
    assert max(kept[1].times_s) < 0.5


def test_an_image_has_regions_and_no_times(chat: VideoChat) -> None:
    image = Image.new("RGB", (80, 40), (255, 0, 0))
    image.paste((0, 0, 255), (40, 0, 80, 40))
    seen = chat.preview(image, 16, region=(0.5, 0, 1, 1))
    assert seen.frames[0, 0, 0].tolist() == [0, 0, 255]
    with pytest.raises(VideoError, match="no times"):
        chat.ask(image, "What?", start=1, end=2, **FEW)


def test_a_follow_up_about_another_part_shows_it_anew(chat: VideoChat, minute: Path) -> None:
    talk = chat.conversation(minute, **FEW)
    assert len(talk.ask("What?").kept) == 1
    second = talk.ask("And there?", start=20, end=30)
    assert [max(kept.times_s) > 30 for kept in second.kept] == [True, False]
    assert second.timings.encode_s > 0
    assert second.usage.cached_tokens > 0  # what was said before is not read again
    third = talk.ask("Still there?", start=20, end=30)
    assert len(third.kept) == 2
    fourth = talk.ask("And in the corner?", start=20, end=30, region=(0, 0, 0.5, 0.5))
    assert [kept.region for kept in fourth.kept][-1] == (0, 0, 0.5, 0.5)
    assert len(talk.ask("What was it?").kept) == 3


def test_a_conversation_about_a_part_from_its_beginning(chat: VideoChat, minute: Path) -> None:
    talk = chat.conversation(minute, start=10, end=12, **FEW)
    for _ in range(2):
        answer = talk.ask("What?")
        assert len(answer.kept) == 1
        assert all(10 <= time_s < 12 for time_s in answer.kept[0].times_s)
    talk.add(WORLD)
    with pytest.raises(VideoError, match="beyond the video's end"):
        talk.ask("What?", start=3000)
    assert len(talk.ask("What?", start=13).kept) == 1 + 1


def test_wrong_parts_are_one_sentence(chat: VideoChat, minute: Path) -> None:
    for options, words in (
        ({"start": 5, "end": 3}, "must be after"),
        ({"start": 70}, "'minute.mp4'.*nothing at 1:10"),
        ({"region": (0, 0, 100, 100)}, "fractions"),
        ({"start": float("nan")}, "cannot be nan"),
    ):
        with pytest.raises(VideoError, match=words):
            chat.ask(minute, "What?", **options, **FEW)
        with pytest.raises(VideoError, match=words):
            chat.estimate(minute, 32, **options)


@pytest.mark.parametrize("kind", ["smolvlm", "qwen3_vl", "qwen2_5_vl", "llava_onevision"])
@pytest.mark.quick(1)
def test_stock_towers_look_at_parts(kind: str, minute: Path, tmp_path: Path) -> None:
    with VideoChat(str(tiny_video_models.make(tmp_path / kind, kind)), device="cpu") as chat:
        whole = chat.preview(minute, 64)
        part = chat.preview(minute, 64, start=20, end=30, region=(0, 0, 0.5, 1))
        assert all(20 <= time_s < 30 for time_s in part.kept.times_s)
        assert max(whole.kept.times_s) > 30
        left, top, right, bottom = part.kept.region
        assert 0 <= left < right <= 0.5
        assert 0 <= top < bottom <= 1
        answer = chat.ask(minute, "What?", start=20, end=30, region=(0, 0, 0.5, 1), **FEW)
        assert answer.kept[0].times_s
        assert all(20 <= time_s < 30 for time_s in answer.kept[0].times_s)
        most = chat.model.tower.space.most_fps
        if most is not None:
            assert chat.plan(minute, "full", start=20, end=26).frames <= max(8, round(6 * most))
