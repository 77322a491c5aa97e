"""What a chat model should be able to do in the synthetic world, by name: the rows its results begin with.

One row per ability, from open questions where the words must be right, and the multiple choice as MVBench
counts it (the mean over task types). Each has its 95 % interval and what guessing would give.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from training.command_line import table
from training.evaluation.answer_scoring import NEAR_S, names
from training.evaluation.metrics import Share, mean_interval, wilson
from training.synthetic.question_forms import Question
from training.synthetic.questions import MOST_OBJECTS
from training.synthetic.scene import DIRECTIONS, Scene

NAMED, MOTION = "main object named in a caption", "motion told in a caption"
DIRECTION, COUNT, FIRST = "moving direction", "count, 1 to 4", "which appears first"
TIME = f"time of an event, within {NEAR_S:g} s"
PRESENT, ABSENT = "presence, the answer is yes", "presence, the answer is no"
PRESENCE = "presence, yes or no (balanced)"
CHOICE = "multiple choice, mean over task types"
UNSEEN = "unseen things: category among 8"
# In the order of the table, each with its column's head where the runs are lines.
ABILITIES: Mapping[str, str] = {
    NAMED: "object",
    MOTION: "motion",
    DIRECTION: "direction",
    COUNT: "count",
    FIRST: "first",
    PRESENCE: "yes or no",
    TIME: "time",
    CHOICE: "choice",
    UNSEEN: "unseen",
}


# Easy and hard clips of an ability have rows of their own.
CLIP_PARTS: Mapping[str, tuple[str, Callable[[Scene], bool]]] = {
    "object, clips with one kind of thing": (NAMED, lambda scene: len(scene.shown) == 1),
    "object, clips with two kinds": (NAMED, lambda scene: len(scene.shown) == 2),
    "object, clips with more kinds": (NAMED, lambda scene: len(scene.shown) > 2),
    "direction, clips with one thing": (DIRECTION, lambda scene: len(scene.actors) == 1),
    "direction, clips with several": (DIRECTION, lambda scene: len(scene.actors) > 1),
    "time, clips below 6 s": (TIME, lambda scene: scene.duration_s < 6),
    "time, clips from 6 to 12 s": (TIME, lambda scene: 6 <= scene.duration_s < 12),
    "time, clips from 12 s on": (TIME, lambda scene: scene.duration_s >= 12),
}


@dataclass
class Tally:
    """Right answers and trials of one kind. guessed: right answers to expect of a guess, None if unknown."""

    right: int = 0
    total: int = 0
    guessed: float | None = 0.0

    def add(self, right: bool, chance: float | None = None) -> None:
        """One answer; chance: the probability that a guess is right."""
        self.right, self.total = self.right + right, self.total + 1
        self.guessed = None if chance is None or self.guessed is None else self.guessed + chance

    @property
    def chance(self) -> float | None:
        """Share that guessing gets right."""
        return self.guessed / self.total if self.total and self.guessed is not None else None

    def to_dict(self) -> dict[str, Any]:
        """Share with its interval."""
        low, high = wilson(self.right, self.total)
        share = self.right / self.total if self.total else 0.0
        return described(share, low, high, self.total, self.chance)


def described(share: float, low: float, high: float, n: int, chance: float | None) -> dict[str, Any]:
    """A row of a result file."""
    row = {"accuracy": round(share, 4), "low": round(low, 4), "high": round(high, 4), "n": n}
    return row | ({} if chance is None else {"chance": chance})


def mean_of(tallies: Sequence[Tally]) -> dict[str, Any]:
    """The mean of their shares, each weighing the same, with its interval; at least one is needed."""
    shares = [Share(tally.right, tally.total) for tally in tallies]
    low, high = mean_interval([(share.right, share.total) for share in shares])
    chances = [tally.chance for tally in tallies if tally.chance is not None]
    chance = sum(chances) / len(chances) if len(chances) == len(tallies) else None
    mean = sum(share.value for share in shares) / len(shares)
    return described(mean, low, high, sum(share.total for share in shares), chance)


def ability_of(question: Question, scene: Scene) -> tuple[str, float] | None:
    """The ability that an open question counts for, and the probability that a guess is right; None for none.

    Guesses: one of the four directions, of the numbers, of the things in question; any moment of the video.
    """
    facts = question.facts
    if question.options:
        return None
    if question.task == "moving_direction":
        return DIRECTION, 1 / len(DIRECTIONS)
    if question.task == "count":
        return COUNT, 1 / MOST_OBJECTS
    if question.task == "existence":
        return PRESENT if facts["present"] else ABSENT, 1 / 2
    if question.task == "appearance_order" and "first" in facts:
        # "The dog or the cat?" names the right one, "what appears first?" does not.
        return FIRST, 1 / (2 if names(question.question, facts["first"]) else len(scene.actors))
    if question.task == "localisation":
        near = min(facts["time_s"] + NEAR_S, scene.duration_s) - max(facts["time_s"] - NEAR_S, 0.0)
        return TIME, near / scene.duration_s
    return None


def part_of(ability: str, scene: Scene) -> str | None:
    """The one of CLIP_PARTS that a scene is of; None for an ability without parts."""
    return next(
        (name for name, (whole, holds) in CLIP_PARTS.items() if whole == ability and holds(scene)), None
    )


def ability_rows(tallies: Mapping[str, Tally], choices: Sequence[Tally]) -> dict[str, Any]:
    """Rows by ability, in order. choices: the multiple-choice tallies, one per task type."""
    rows = {name: tally.to_dict() for name, tally in tallies.items()}
    if PRESENT in tallies and ABSENT in tallies:
        rows[PRESENCE] = mean_of([tallies[PRESENT], tallies[ABSENT]])
    if choices:
        rows[CHOICE] = mean_of(choices)
    return {name: rows[name] for name in ABILITIES if name in rows}


def share_cell(row: Mapping[str, Any] | None) -> str | None:
    """A share with its interval: "84.4 [77, 90]"; None for no row."""
    if row is None:
        return None
    return f"{100 * row['accuracy']:.1f} [{100 * row['low']:.0f}, {100 * row['high']:.0f}]"


def chance_cell(row: Mapping[str, Any]) -> str:
    """What guessing gives, as 25 or 12.5; empty where that is unknown."""
    return f"{100 * row['chance']:.1f}".removesuffix(".0") if "chance" in row else ""


def rows_table(first: str, results: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Rows down and runs across, in percent with intervals; then chance and the number of questions."""
    runs = list(results)
    lines: list[list[object]] = []
    for name, row in results[runs[0]].items():
        shares = (share_cell(results[run].get(name)) for run in runs)
        lines.append([name, *shares, chance_cell(row), str(row["n"])])
    return table([first, *runs, "chance", "n"], lines)


def abilities_by_run(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Runs down, abilities across, in percent with intervals; the last lines are chance and the numbers."""
    of_first = next(iter(results.values()))["goals"]
    measured = [name for name in ABILITIES if name in of_first]
    lines: list[list[object]] = [
        [run, *(share_cell(result["goals"].get(name)) for name in measured)]
        for run, result in results.items()
    ]
    lines.append(["chance", *(chance_cell(of_first[name]) for name in measured)])
    lines.append(["n", *(str(of_first[name]["n"]) for name in measured)])
    return table(["run", *(ABILITIES[name] for name in measured)], lines)
