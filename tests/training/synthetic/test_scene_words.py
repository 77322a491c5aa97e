"""Token targets against the scenes they are of; the loss by hand."""

from __future__ import annotations

import random

import pytest
import torch

from encoder.tokens import Grid
from training.data.feature_cache import Features
from training.data.media import WorldMedia
from training.models.token_targets import TokenTargets, clip_losses, scene_targets
from training.synthetic.captions import caption
from training.synthetic.dataset import Sample, World
from training.synthetic.questions import questions
from training.synthetic.scene import Actor, Background, Phase, Pose, Scene, Shot
from training.synthetic.scene_words import BACKGROUND, FIXED_PHRASES, MOTION_WORDS, SceneWords
from training.synthetic.sprites import procedural_bank
from training.synthetic.world_config import WorldConfig

WORLD = World("train", 0, WorldConfig(), procedural_bank())
WORDS = SceneWords(WORLD)


def test_the_clip_says_what_questions_ask() -> None:
    asked = 0
    for sample in map(WORLD.sample, range(200)):
        phrases = WORDS.clip(sample.scene)
        first, moves, count, _, _ = phrases[:FIXED_PHRASES]
        shown = {WORLD.nouns[actor.code].name for actor in sample.scene.actors}
        shown |= {WORLD.nouns[a.becomes].name for a in sample.scene.actors if a.becomes}
        assert set(phrases[FIXED_PHRASES:]) == shown
        assert first in shown
        for question in sample.questions:
            if question.facts.get("first"):
                assert first == question.facts["first"]
                asked += 1
            if question.task == "count":
                assert count == ("one", "two", "three", "four")[question.facts["count"] - 1]
            if question.task == "moving_direction" and question.facts["noun"] == first:
                assert moves == MOTION_WORDS[question.facts["motion"]]
    assert asked > 20


def two_shots() -> tuple[Scene, str, str]:
    code, other = sorted(noun.code for noun in WORLD.pool)[:2]

    def shot(start_s: float, kind: str, sprite: str) -> Shot:
        path = Phase("left", start_s, start_s + 4.0, Pose(0.75, 0.5, 0.3), Pose(0.25, 0.5, 0.3))
        return Shot(start_s, start_s + 4.0, Background(kind, 0), (Actor(sprite, (path,)),))  # type: ignore[arg-type]

    scene = Scene(8.0, (shot(0.0, "sea", code), shot(4.0, "gradient", other)), 0)
    return scene, WORLD.nouns[code].name, WORLD.nouns[other].name


def test_patches_say_the_object_or_the_place() -> None:
    scene, before, after = two_shots()
    found = WORDS.patches(scene, (0.0, 7.9), 8)
    said = [{found.phrases[kind] for kind in frame.unique().tolist()} for frame in found.which]
    assert said == [{f"{before} left", "sea"}, {f"{after} left", BACKGROUND}]
    assert found.phrases[found.which[0, 4, 5]] == f"{before} left"


def test_patches_say_the_second_as_answers_do() -> None:
    scene, before, after = two_shots()
    found = SceneWords(WORLD, seconds=True).patches(scene, (0.2, 3.4, 7.9), 8)
    said = [{found.phrases[kind] for kind in frame.unique().tolist()} for frame in found.which]
    assert said == [
        {f"{before} left start", "sea start"},
        {f"{before} left three", "sea three"},
        {f"{after} left eight", f"{BACKGROUND} eight"},
    ]
    late = SceneWords(WORLD, seconds=True).patches(scene, (21.0,), 8)
    assert set(late.phrases) == {f"{after} left", BACKGROUND}


def test_captions_and_lists_tell_of_the_largest_first() -> None:
    codes = sorted(noun.code for noun in WORLD.pool)[:3]

    def actor(code: str, size: float, appear_s: float) -> Actor:
        pose = Pose(0.5, 0.5, size)
        return Actor(code, (Phase("still", appear_s, 8.0, pose, pose),), appear_s=appear_s)

    actors = (actor(codes[0], 0.5, 3.0), actor(codes[1], 0.2, 0.0), actor(codes[2], 0.3, 0.0))
    scene = Scene(8.0, (Shot(0.0, 8.0, Background("gradient", 0), actors),), 0)
    names = [WORLD.nouns[code].name for code in (codes[2], codes[1], codes[0])]
    told = caption(scene, WORLD.nouns, "train", random.Random(0))
    assert sorted(names, key=told.index) == names
    asked = questions(scene, WORLD.nouns, WORLD.pool, "train", random.Random(0))
    assert [question.facts["shown"] for question in asked if question.task == "object_list"] == [tuple(names)]


def ids_of(phrase: str) -> tuple[int, ...]:
    return tuple(sum(map(ord, word)) for word in phrase.split())


@pytest.mark.parametrize("summary_tokens", [0, 3, 8])
def test_kept_patches_get_their_own_words(summary_tokens: int) -> None:
    scene, before, _ = two_shots()
    media = WorldMedia(WORLD, Sample(scene, "", ()), 0)
    kept = torch.tensor([0, 4 * 8 + 5], dtype=torch.int32)
    grid, times = Grid(2, 8, 8), (0.0, 7.9)
    features = Features(torch.zeros(2, 4), torch.zeros(4), kept, grid, times, 8.0)
    targets = scene_targets(media, features, summary_tokens, WORDS, ids_of)
    places = (summary_tokens, summary_tokens + 1)
    assert targets.patches == ((places[0], ids_of("sea")), (places[1], ids_of(f"{before} left")))
    assert len(targets.summary) == (3 if summary_tokens == 8 else 0)  # neither a count nor a change
    assert all(first < last <= summary_tokens for first, last, _ in targets.shared)
    assert bool(targets.shared) == bool(summary_tokens)


def test_losses_by_hand() -> None:
    scores = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]]))
    targets = TokenTargets(((0, (10,)),), ((2, (10, 12)),), ((0, 2, (11,)),))
    found = clip_losses(scores, targets, {10: 0, 11: 1, 12: 2})
    assert found["summary"].exp().item() == pytest.approx(2.0)
    assert found["patches"].item() == pytest.approx(-(torch.tensor([0.2, 0.6]).log().mean().item()))
    assert found["shared"].exp().item() == pytest.approx(1 / 0.8)
    assert targets.words == {10, 11, 12}
    assert clip_losses(scores, TokenTargets((), (), ()), {}) == {}
