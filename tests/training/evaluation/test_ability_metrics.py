"""Ability metrics: what counts for them, and what guessing gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from training.data.synthetic_source import WorldSource
from training.evaluation.ability_metrics import (
    ABILITIES,
    CLIP_PARTS,
    COUNT,
    DIRECTION,
    FIRST,
    MOTION,
    NAMED,
    PRESENCE,
    TIME,
    UNSEEN,
    ability_of,
)
from training.evaluation.synthetic_chat import answer_share, questions_of, score_world


@pytest.fixture(autouse=True)
def cache(cached_world: Path) -> None:
    """Every test uses the small world."""


def test_right_answers_get_full_marks() -> None:
    source = WorldSource(split="test", count=30)
    world = source.open()
    answers = {}
    for number in range(30):
        answers[number] = [q.answer for q in questions_of(world.sample(number), number)]
    result = score_world(world, answers)
    rows = {task: row["accuracy"] for task, row in result["tasks"].items() if "caption" not in task}
    assert set(rows.values()) == {1.0}
    assert list(result["goals"]) == [ability for ability in ABILITIES if ability != UNSEEN]
    for ability in set(ABILITIES) - {NAMED, MOTION, UNSEEN}:
        row = result["goals"][ability]
        assert (row["accuracy"], row["high"]) == (1.0, 1.0)
        assert 0 < row["chance"] < 1
    assert {len(sample.scene.shown) for sample in map(world.sample, range(30))} >= {1, 2, 3}
    for ability in (NAMED, DIRECTION, TIME):  # parts are of clips, none left out, none counted twice
        parts = [row["n"] for part, row in result["parts"].items() if CLIP_PARTS[part][0] == ability]
        assert len(parts) > 1
        assert sum(parts) == result["goals"][ability]["n"]
    share = answer_share(result, "choice")
    assert (share.right, share.total) == (share.total, sum("?" in q for q in _choices(world, 30)))
    everything = sum(len(texts) for texts in answers.values())
    # Besides the questions, the caption counts twice where it tells one motion.
    told = result["tasks"]["caption: motion"]["n"]
    assert answer_share(result, "open").total == everything - share.total + told
    wrong = score_world(world, {n: ["nothing"] * len(texts) for n, texts in answers.items()})
    assert answer_share(wrong, "choice").right == 0
    assert len(wrong["examples"]) == 12


def test_guessing_gets_what_chance_says() -> None:
    world = WorldSource(split="test", count=1).open()
    chances: dict[str, set[float]] = {}
    for number in range(60):
        sample = world.sample(number)
        for question in sample.questions:
            if (ability := ability_of(question, sample.scene)) is not None:
                chances.setdefault(ability[0], set()).add(round(ability[1], 4))
    assert chances[DIRECTION] == chances[COUNT] == {0.25}
    assert chances[FIRST] >= {0.5, round(1 / 3, 4)}
    assert max(chances[TIME]) <= 1
    # Always saying yes is worth half, however many questions have that answer.
    always_yes = {n: ["yes" for _ in questions_of(world.sample(n), n)] for n in range(60)}
    presence = score_world(world, always_yes)["goals"][PRESENCE]
    assert (presence["accuracy"], presence["chance"]) == (0.5, 0.5)


def _choices(world, count: int) -> list[str]:
    return [q.question + "?" for n in range(count) for q in world.sample(n).questions if q.options]
