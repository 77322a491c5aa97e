"""The goals of the demo world: what counts for them, and what guessing gives."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.training.synthetic.tiny_world import make_cache
from training.data.synthetic_source import WorldSource
from training.evaluation.ability_metrics import (
    COUNT,
    DIRECTION,
    FIRST,
    GOALS,
    MOTION,
    NAMED,
    PARTS,
    PRESENCE,
    TIME,
    UNSEEN,
    goal_of,
)
from training.evaluation.synthetic import answer_share, questions_of, score_world


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLUXCHAT_CACHE", str(make_cache(tmp_path_factory.mktemp("cache"))))
        yield


def test_right_answers_get_full_marks() -> None:
    source = WorldSource(split="test", count=30)
    world = source.open()
    answers = {}
    for number in range(30):
        answers[number] = [q.answer for q in questions_of(world.sample(number), number)]
    result = score_world(world, answers)
    rows = {task: row["accuracy"] for task, row in result["tasks"].items() if "caption" not in task}
    assert set(rows.values()) == {1.0}
    assert list(result["goals"]) == [goal for goal in GOALS if goal != UNSEEN]
    for goal in set(GOALS) - {NAMED, MOTION, UNSEEN}:
        row = result["goals"][goal]
        assert (row["accuracy"], row["high"]) == (1.0, 1.0)
        assert 0 < row["chance"] < 1
    assert {len(sample.scene.shown) for sample in map(world.sample, range(30))} >= {1, 2, 3}
    for goal in (NAMED, DIRECTION, TIME):  # parts are of clips, none left out, none counted twice
        parts = [row["n"] for part, row in result["parts"].items() if PARTS[part][0] == goal]
        assert len(parts) > 1
        assert sum(parts) == result["goals"][goal]["n"]
    share = answer_share(result, "choice")
    assert (share.right, share.total) == (share.total, sum("?" in q for q in _choices(world, 30)))
    everything = sum(len(said) for said in answers.values())
    # Besides the questions, the caption counts twice where it tells one motion.
    told = result["tasks"]["caption: motion"]["n"]
    assert answer_share(result, "open").total == everything - share.total + told
    wrong = score_world(world, {n: ["nothing"] * len(said) for n, said in answers.items()})
    assert answer_share(wrong, "choice").right == 0
    assert len(wrong["examples"]) == 12


def test_guessing_gets_what_chance_says() -> None:
    world = WorldSource(split="test", count=1).open()
    goals: dict[str, set[float]] = {}
    for number in range(60):
        sample = world.sample(number)
        for question in sample.questions:
            if (found := goal_of(question, sample.scene)) is not None:
                goals.setdefault(found[0], set()).add(round(found[1], 4))
    assert goals[DIRECTION] == goals[COUNT] == {0.25}
    assert goals[FIRST] >= {0.5, round(1 / 3, 4)}
    assert max(goals[TIME]) <= 1
    # Always saying yes is worth half, however many questions have that answer.
    always_yes = {n: ["yes" for _ in questions_of(world.sample(n), n)] for n in range(60)}
    presence = score_world(world, always_yes)["goals"][PRESENCE]
    assert (presence["accuracy"], presence["chance"]) == (0.5, 0.5)


def _choices(world, count: int) -> list[str]:
    return [q.question + "?" for n in range(count) for q in world.sample(n).questions if q.options]
