"""The synthetic world: determinism, honest answers, balance, disjoint splits."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import re
import subprocess
import sys
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encoder.errors import ConfigError, DataError
from tests import ROOT
from training.evaluation.answer_scoring import agrees, seconds_in
from training.synthetic.dataset import Sample, Split, World
from training.synthetic.nouns import load_nouns, of_split, with_article
from training.synthetic.phrases import MOVES, third_person
from training.synthetic.question_templates import QUESTIONS
from training.synthetic.questions import TASKS
from training.synthetic.scene import DIRECTIONS, MOTIONS, opacity_at, pose_at, visible_fraction
from training.synthetic.sprites import SpriteBank, procedural_bank
from training.synthetic.world_config import SCRIPTS, WorldConfig

BANK = procedural_bank()
SPLITS: tuple[Split, ...] = ("train", "test", "unseen")
SHAPES = WorldConfig(nouns=None)


def world(split: Split = "train", seed: int = 0, level: WorldConfig = SHAPES) -> World:
    return World(split, seed, level, BANK)


@pytest.fixture(scope="module")
def many() -> list[Sample]:
    source = world(seed=3)
    return [source.sample(index) for index in range(1500)]


def test_nouns_are_many_and_unseen_ones_spread() -> None:
    nouns = load_nouns()
    train, unseen = of_split(nouns, "train"), of_split(nouns, "unseen")
    assert len(train) >= 150
    assert len({noun.category for noun in train}) >= 8
    assert 20 <= len(unseen) <= 32
    assert len({noun.category for noun in unseen}) >= 8
    assert len({noun.name for noun in nouns}) == len({noun.code for noun in nouns}) == len(nouns)
    assert not {noun.name for noun in train} & {noun.name for noun in unseen}


def test_a_limit_of_nouns_keeps_every_category() -> None:
    nouns = load_nouns()
    limited = of_split(nouns, "train", 60)
    assert len(limited) == 60
    assert {noun.category for noun in limited} == {noun.category for noun in nouns}
    assert limited == of_split(nouns, "train")[:60]


@pytest.mark.parametrize(
    ("name", "said"),
    [("dog", "a dog"), ("owl", "an owl"), ("unicorn", "a unicorn"), ("ice cream", "an ice cream")],
)
def test_articles(name: str, said: str) -> None:
    assert with_article(name) == said


def test_verbs_agree_with_one_object() -> None:
    assert third_person("move to the left") == "moves to the left"
    assert third_person("go up") == "goes up"
    assert third_person("approach the camera") == "approaches the camera"
    assert third_person("do not move") == "does not move"


def test_another_process_gives_the_same_samples() -> None:
    code = (
        "from training.synthetic.dataset import World\n"
        "from training.synthetic.sprites import procedural_bank\n"
        "import hashlib\n"
        "w = World('test', 7, bank=procedural_bank())\n"
        "s = [w.sample(i) for i in range(8)]\n"
        "p = w.render(s[0].scene, [0.5, 1.5], 32, 48).tobytes()\n"
        "print(hashlib.sha256(repr(s).encode() + p).hexdigest())\n"
    )
    root = ROOT
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            cwd=root,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


@settings(max_examples=60, deadline=None)
@given(split=st.sampled_from(SPLITS), seed=st.integers(0, 5), index=st.integers(0, 10**9))
def test_every_sample_is_well_formed(split: Split, seed: int, index: int) -> None:
    source = world(split, seed)
    sample = source.sample(index)
    assert sample == source.sample(index)
    scene = sample.scene
    assert 2.0 <= scene.duration_s <= 20.0
    assert scene.shots[0].start_s == 0.0
    assert scene.shots[-1].end_s == scene.duration_s
    assert 1 <= max(len(shot.actors) for shot in scene.shots) <= 4
    assert sample.caption[0].isupper()
    assert sample.caption.endswith(".")
    names = [source.nouns[actor.code] for actor in scene.actors]
    assert all(noun.name in sample.caption or noun.plural in sample.caption for noun in names)
    wanted = "unseen" if split == "unseen" else "train"
    assert {noun.split for noun in names} == {wanted}
    json.dumps([dict(question.facts) for question in sample.questions])
    for question in sample.questions:
        assert "{" not in question.question + question.answer
        assert (question.answer_index is None) == (not question.options)
        if question.answer_index is not None:
            assert len(set(question.options)) == len(question.options) >= 2
            letter = "ABCDEFGH"[question.answer_index]
            assert question.answer == f"({letter}) {question.options[question.answer_index]}"
            listed = re.findall(r"^\(([A-H])\) (.+)$", question.question, re.MULTILINE)
            assert tuple(text for _, text in listed) == question.options
            assert question.question.startswith("Question: ")
            assert question.question.endswith("Only give the best option.")


@settings(max_examples=60, deadline=None)
@given(index=st.integers(0, 10**6))
def test_objects_are_seen_while_they_are_there(index: int) -> None:
    for shot in world().sample(index).scene.shots:
        for actor in shot.actors:
            times = [shot.start_s + (k + 0.5) / 12 * (shot.end_s - shot.start_s) for k in range(12)]
            there = [time_s for time_s in times if opacity_at(actor, time_s) > 0.6]
            seen = [time_s for time_s in there if visible_fraction(shot, actor, time_s) > 0.5]
            assert there
            assert len(seen) >= 0.7 * len(there)


def test_answers_agree_with_the_geometry(many: list[Sample]) -> None:
    checked: Counter[str] = Counter()
    for sample in many:
        scene = sample.scene
        by_name = {BANK.noun(actor.code).name: actor for actor in scene.actors}
        shown = set(by_name) | {BANK.noun(a.becomes).name for a in scene.actors if a.becomes}
        for question in sample.questions:
            facts = question.facts
            checked[question.task] += 1
            if question.task == "existence":
                assert (facts["noun"] in shown) == facts["present"]
                assert ("yes" in question.answer.lower()) == facts["present"]
            elif question.task == "object_existence":
                assert [name for name in shown if question.answer.endswith(name)] == [facts["noun"]]
                assert sum(option.split(" ", 1)[1] in shown for option in question.options) == 1
            elif question.task == "object_list":
                assert set(facts["shown"]) == shown
                assert agrees(question, question.answer)
                assert not agrees(question, question.answer.replace(facts["shown"][-1], "gap"))
                assert not agrees(question, f"A gap, {question.answer}")  # more than is shown
            elif question.task == "moving_direction":
                actor = by_name[facts["noun"]]
                phase = actor.phases[0]
                dx, dy = phase.end.x - phase.start.x, phase.end.y - phase.start.y
                along, across = (dx, dy) if facts["motion"] in ("left", "right") else (dy, dx)
                assert abs(along) >= 0.3
                assert abs(across) < 0.5 * abs(along)
                assert (along > 0) == (facts["motion"] in ("right", "down"))
                assert facts["motion"] in question.answer
            elif question.task == "count":
                assert facts["count"] == len(scene.actors)
            elif question.task == "moving_count":
                middle, end = (share * scene.duration_s for share in (0.3, 0.7))
                moved = sum(pose_at(a, middle) != pose_at(a, end) for a in scene.actors)
                assert facts["count"] == moved
            elif question.task == "scene_transition":
                assert len(scene.shots) == 2
                if question.options:  # each place as often as the others, each change in both directions
                    ways = {tuple(option.removeprefix("from ").split(" to ")) for option in question.options}
                    assert {(there, here) for here, there in ways} == ways
                    assert len({here for here, _ in ways}) == 4
            elif question.task.startswith("localisation"):
                assert 0.0 < facts["time_s"] < scene.duration_s
                if "part" in facts:
                    assert facts["part"] == int(3 * facts["time_s"] / scene.duration_s)
            elif question.task == "appearance_order" and "order" in facts:
                onsets = [
                    max(a.appear_s, s.start_s)
                    for name in facts["order"]
                    for s in scene.shots
                    for a in s.actors
                    if BANK.noun(a.code).name == name
                ]
                assert onsets == sorted(onsets)
                assert all(b - a >= 0.7 for a, b in pairwise(onsets))
    assert len(checked) == 16
    assert min(checked.values()) >= 50


def test_yes_and_no_are_balanced_for_every_noun_kind(many: list[Sample]) -> None:
    asked = [q for sample in many for q in sample.questions if q.task == "existence" and not q.options]
    share = sum(q.facts["present"] for q in asked) / len(asked)
    assert 0.46 < share < 0.54
    # The name alone must not tell: within each colour yes stays about as likely as no.
    for colour in ("red", "green", "blue", "yellow"):
        present = [q.facts["present"] for q in asked if q.facts["noun"].startswith(colour)]
        assert 0.4 < sum(present) / len(present) < 0.6


def test_letters_and_answers_are_balanced(many: list[Sample]) -> None:
    letters: dict[int, Counter[int]] = {}
    for sample in many:
        for question in sample.questions:
            if question.answer_index is not None:
                letters.setdefault(len(question.options), Counter())[question.answer_index] += 1
    for options, counts in letters.items():
        total = sum(counts.values())
        if total >= 500:
            assert all(abs(counts[k] / total - 1 / options) < 0.05 for k in range(options))
    for task, fact, most in (
        ("moving_direction", "motion", 0.33),
        ("count", "count", 0.35),
        ("moving_count", "count", 0.4),
        ("state_change", "change", 0.35),
        ("localisation_part", "part", 0.45),
    ):
        values = Counter(q.facts[fact] for s in many for q in s.questions if q.task == task and not q.options)
        assert max(values.values()) / sum(values.values()) < most, (task, values)


def test_every_task_is_asked(many: list[Sample]) -> None:
    assert {question.task for sample in many for question in sample.questions} == set(TASKS)


def test_the_right_time_is_no_middle_option(many: list[Sample]) -> None:
    ranks: Counter[int] = Counter()
    for sample in many:
        for question in sample.questions:
            if question.task == "localisation" and question.options:
                seconds = [seconds_in(option) for option in question.options]
                assert None not in seconds
                ranks[sorted(seconds).index(seconds[question.answer_index or 0])] += 1  # type: ignore[type-var]
    assert max(ranks.values()) / sum(ranks.values()) < 0.4


def test_splits_share_no_noun_wording_or_scene() -> None:
    for templates in (*MOVES.values(), *QUESTIONS.values()):
        assert not set(templates["train"]) & set(templates["test"])
        assert len(templates["train"]) >= 3
        assert len(templates["test"]) >= 2
    scenes = {split: {repr(world(split).sample(i).scene) for i in range(40)} for split in SPLITS}
    assert not scenes["train"] & scenes["test"]
    codes = {
        split: {a.code for i in range(200) for a in world(split).sample(i).scene.actors} for split in SPLITS
    }
    assert codes["train"] & codes["test"]
    assert not codes["train"] & codes["unseen"]
    asked = {
        split: {
            q.question
            for i in range(150)
            for q in world(split).sample(i).questions
            if q.task == "existence" and not q.options
        }
        for split in ("train", "test")
    }
    assert not asked["train"] & asked["test"]


def test_siblings_differ_in_motion_alone() -> None:
    source = world(level=WorldConfig.simple())
    for index in range(20):
        family = source.siblings(index, 6)
        assert family[0] == source.sample(index)
        motions = [sample.scene.actors[0].motions[0] for sample in family]
        assert sorted(motions) == sorted(("left", "right", "up", "down", "circle", "toward"))
        still = {
            repr(
                dataclasses.replace(
                    sample.scene,
                    shots=tuple(
                        dataclasses.replace(
                            shot, actors=tuple(dataclasses.replace(a, phases=()) for a in shot.actors)
                        )
                        for shot in sample.scene.shots
                    ),
                )
            )
            for sample in family
        }
        assert len(still) == 1
        times = {(p.start_s, p.end_s) for sample in family for p in sample.scene.actors[0].phases}
        assert len(times) == 1


def test_asking_for_too_many_siblings_names_the_limit() -> None:
    with pytest.raises(ConfigError, match="has 6 motions"):
        world(level=WorldConfig.simple()).siblings(0, 7)


def test_simple_worlds_have_one_moving_object() -> None:
    source = world(level=WorldConfig.simple())
    for index in range(50):
        scene = source.sample(index).scene
        assert len(scene.shots) == 1
        assert len(scene.actors) == 1
        assert scene.duration_s <= 6.0


@pytest.mark.parametrize("plot", SCRIPTS)
@pytest.mark.parametrize("most", [1, 2, 4])
def test_every_plot_works_with_any_number_of_objects(plot: str, most: int) -> None:
    source = world(level=WorldConfig(plots=(plot,), max_objects=most))
    samples = [source.sample(index) for index in range(20)]
    assert all(len(shot.actors) <= most for sample in samples for shot in sample.scene.shots)
    assert all(sample.plot == plot for sample in samples)


@settings(max_examples=30, deadline=None)
@given(motions=st.sets(st.sampled_from(MOTIONS), min_size=1), plot=st.sampled_from(SCRIPTS))
def test_only_the_motions_asked_for_occur(motions: set, plot: str) -> None:
    level = WorldConfig(plots=(plot,), motions=tuple(sorted(motions)))
    source = world(level=level)
    for index in range(5):
        for actor in source.sample(index).scene.actors:
            # A round thing cannot be seen to spin: where that is all there is, it rests.
            assert set(actor.motions) <= motions | {"still"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_objects": 5},
        {"motions": ("sideways",)},
        {"plots": ()},
        {"duration_s": (5.0, 3.0)},
        {"duration_s": (0.5, 3.0)},
        {"size": (0.0, 0.5)},
        {"nouns": 3},
    ],
)
def test_impossible_configurations_are_refused(wrong: dict) -> None:
    with pytest.raises(ConfigError):
        WorldConfig(**wrong)


def test_unknown_splits_and_empty_banks_are_refused() -> None:
    with pytest.raises(ConfigError, match="train, test, unseen"):
        World("validation", bank=BANK)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="at least 8"):
        World("train", bank=SpriteBank(BANK.nouns[:5], BANK.levels, BANK.strips))


def test_worlds_travel_to_worker_processes() -> None:
    source = world()
    assert pickle.loads(pickle.dumps(source)).sample(5) == source.sample(5)


def test_directions_are_motions() -> None:
    assert set(DIRECTIONS) < set(MOTIONS) == set(MOVES)
