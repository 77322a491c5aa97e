"""The synthetic world's held-out clips: what a chat model answers about them.

Clips, backgrounds and wordings of the test split were never trained on. The model describes every clip (is
the main object named, is its motion named) and answers its questions, open and multiple choice; of things
that training never showed it names the kind.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Any, Literal

from training.data.media import WorldMedia
from training.evaluation.ability_metrics import (
    CLIP_PARTS,
    MOTION,
    NAMED,
    Tally,
    ability_of,
    ability_rows,
    mean_of,
    part_of,
    rows_table,
)
from training.evaluation.answer_scoring import agrees, motion_in, names
from training.evaluation.chat_evaluator import ChatEvaluator, Query
from training.evaluation.journal import Journal, Row, run_blocks
from training.evaluation.metrics import Share
from training.synthetic.dataset import Sample, World
from training.synthetic.question_forms import Question
from training.synthetic.question_templates import QUESTIONS
from training.synthetic.scene import Scene

EXAMPLES = 12  # answers to read in a result file
ANSWER_TOKENS = 64  # the longest captions need some fifty


def questions_of(sample: Sample, number: int) -> list[Question]:
    """The caption request, then every question of the sample."""
    requests = QUESTIONS["caption"]["test"]
    return [Question("caption", requests[number % len(requests)], sample.caption), *sample.questions]


def category_of(sample: Sample) -> list[Question]:
    """The question for its kind among 8, where a sample has it: things never named in training have kinds."""
    return [question for question in sample.questions if question.task == "category_of_8"]


def answers_by_number(
    evaluator: ChatEvaluator,
    world: World,
    numbers: Sequence[int],
    questions: Callable[[Sample, int], Sequence[Question]],
    label: str,
    journal: Journal,
) -> dict[int, list[str]]:
    """What is answered about each sample. label: names this run and these questions in the journal."""

    def work(places: Sequence[int]) -> list[Row]:
        rows: list[Row] = []
        for number in (numbers[place] for place in places):
            sample = world.sample(number)
            queries = [
                Query(question.question, max_new_tokens=ANSWER_TOKENS)
                for question in questions(sample, number)
            ]
            media = WorldMedia(world, sample, number)
            rows.append({"answers": list(evaluator.answers(media, number, queries))})
        return rows

    rows = run_blocks([f"{label}|{n}" for n in numbers], work, journal, block=1, label=label)
    return {number: row["answers"] for number, row in zip(numbers, rows, strict=True)}


def evaluate_world(
    evaluator: ChatEvaluator, world: World, first: int, clips: int, journal: Journal
) -> dict[str, Any]:
    """Accuracy by ability and task over `clips` samples from number `first` on, with some answers to read."""
    numbers = range(first, first + clips)
    return score_world(
        world, answers_by_number(evaluator, world, numbers, questions_of, evaluator.key, journal)
    )


def evaluate_unseen(
    evaluator: ChatEvaluator, world: World, first: int, clips: int, journal: Journal
) -> dict[str, Any]:
    """The row of `UNSEEN` over the next `clips` samples that can be asked for their kind.

    world: of the split "unseen", whose things training never showed.
    """
    numbers = list(islice((n for n in count(first) if category_of(world.sample(n))), clips))
    label = f"unseen {evaluator.key}"
    answers = answers_by_number(
        evaluator, world, numbers, lambda sample, _: category_of(sample), label, journal
    )
    tally = Tally()
    for number, [answer] in answers.items():
        [question] = category_of(world.sample(number))
        tally.add(agrees(question, answer), 1 / len(question.options))
    return tally.to_dict()


@dataclass
class _Counts:
    """Right answers by task, by ability, and by part of the clips that an ability is measured on."""

    tasks: dict[str, Tally] = field(default_factory=lambda: defaultdict(Tally))
    abilities: dict[str, Tally] = field(default_factory=lambda: defaultdict(Tally))
    parts: dict[str, Tally] = field(default_factory=lambda: defaultdict(Tally))

    def add_ability(self, ability: str, scene: Scene, right: bool, chance: float | None) -> None:
        """One answer that counts for an ability, and for the part of its clips that this one is of."""
        self.abilities[ability].add(right, chance)
        if part := part_of(ability, scene):
            self.parts[part].add(right, chance)


def score_world(world: World, answers: Mapping[int, Sequence[str]]) -> dict[str, Any]:
    """The figures of answers by sample number, each list as `questions_of` asks."""
    counts = _Counts()
    examples: list[dict[str, Any]] = []
    for number, texts in answers.items():
        sample = world.sample(number)
        questions = questions_of(sample, number)
        _count_caption(world, sample, texts[0], counts)
        for question, answer in zip(questions[1:], texts[1:], strict=True):
            right, kind = agrees(question, answer), "choice" if question.options else "open"
            ability = ability_of(question, sample.scene)
            chance = 1 / len(question.options) if question.options else ability[1] if ability else None
            counts.tasks[f"{question.task}, {kind}"].add(right, chance)
            if ability:
                counts.add_ability(ability[0], sample.scene, right, chance)
        if len(examples) < EXAMPLES:
            rows = [[q.question, q.answer, a] for q, a in zip(questions, texts, strict=True)]
            examples.append({"number": number, "asked, expected, answered": rows[:4]})
    choices = [tally for task, tally in sorted(counts.tasks.items()) if task.endswith(", choice")]
    return {
        "goals": ability_rows(counts.abilities, choices),
        "parts": {part: counts.parts[part].to_dict() for part in CLIP_PARTS if part in counts.parts},
        "tasks": {task: tally.to_dict() for task, tally in sorted(counts.tasks.items())},
        "multiple choice, mean over tasks": mean_of(choices)["accuracy"] if choices else None,
        "examples": examples,
    }


def _count_caption(world: World, sample: Sample, text: str, counts: _Counts) -> None:
    """Is the main object named, is its motion named (of clips with one thing that does one)?"""
    actor = sample.scene.actors[0]
    noun = world.nouns[actor.code]
    named, guess = names(text, noun.name, noun.plural), 1 / len(world.pool)
    counts.tasks["caption: main object"].add(named, guess)
    counts.add_ability(NAMED, sample.scene, named, guess)
    if len(sample.scene.actors) == len(actor.motions) == 1:
        right, guess = motion_in(text) == actor.motions[0], 1 / len(world.level.motions)
        counts.tasks["caption: motion"].add(right, guess)
        counts.add_ability(MOTION, sample.scene, right, guess)


def world_table(results: Mapping[str, dict[str, Any]]) -> str:
    """Abilities, parts of their clips and tasks down; runs across, in percent with intervals."""
    # "goals" is what result files have called abilities from the first version on.
    blocks = (("ability", "goals"), ("ability on some clips", "parts"), ("task", "tasks"))
    return "\n\n".join(
        rows_table(head, {run: result[block] for run, result in results.items()}) for head, block in blocks
    )


def answer_share(result: dict[str, Any], kind: Literal["choice", "open"]) -> Share:
    """All multiple-choice, or all open, questions of a result of `score_world`, whatever their task."""
    rows = [row for task, row in result["tasks"].items() if task.endswith(", choice") == (kind == "choice")]
    return Share(sum(round(row["accuracy"] * row["n"]) for row in rows), sum(row["n"] for row in rows))
