"""The demo world's held-out clips: what a chat model answers about them, and what its encoder alone tells.

Clips, backgrounds and wordings of the test split were never trained on. A chat model describes every clip
(is the main object named, is its motion told) and answers its questions, open and multiple choice; of things
that training never showed it tells the kind. An encoder names object and motion by the heads that Flux-CLIP
trained, and finds clips by caption and captions by clip.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Any, Literal

import torch
from torch import Tensor

from encoder.errors import DataError
from llm_bridge.text_encoders.text_towers import TextTower
from training.data.examples import Example
from training.data.media import WorldMedia
from training.data.synthetic_examples import WorldExamples
from training.data.synthetic_source import WorldSource
from training.evaluation.ability_metrics import (
    MOTION,
    NAMED,
    PARTS,
    Tally,
    goal_of,
    goal_rows,
    mean_of,
    part_of,
    rows_table,
)
from training.evaluation.action import accuracies
from training.evaluation.alignment import Alignment
from training.evaluation.answer_scoring import agrees, motion_in, names
from training.evaluation.chat_evaluator import Asked, Watcher
from training.evaluation.encoder_input import Setting
from training.evaluation.metrics import Share, retrieval, top_k
from training.evaluation.results import Journal, Row, run_blocks, table
from training.evaluation.retrieval import check_widths
from training.evaluation.run import Run, describe_setting, pack, unpack
from training.synthetic.dataset import Sample, World
from training.synthetic.question_forms import Question
from training.synthetic.question_templates import QUESTIONS
from training.synthetic.scene import Scene

SHOWN = 12
ANSWER_TOKENS = 64  # the longest captions need some fifty


def questions_of(sample: Sample, number: int) -> list[Question]:
    """The caption request, then every question of the sample."""
    asked = QUESTIONS["caption"]["test"]
    return [Question("caption", asked[number % len(asked)], sample.caption), *sample.questions]


def category_of(sample: Sample) -> list[Question]:
    """The question for its kind among 8, where a sample has it: things never named in training have kinds."""
    return [question for question in sample.questions if question.task == "category_of_8"]


def answers_by_number(
    watcher: Watcher,
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
            asked = [Asked(q.question, max_new_tokens=ANSWER_TOKENS) for q in questions(sample, number)]
            media = WorldMedia(world, sample, number)
            rows.append({"answers": list(watcher.answers(media, number, asked))})
        return rows

    rows = run_blocks([f"{label}|{n}" for n in numbers], work, journal, block=1, label=label)
    return {number: row["answers"] for number, row in zip(numbers, rows, strict=True)}


def evaluate_world(
    watcher: Watcher, world: World, first: int, clips: int, journal: Journal
) -> dict[str, Any]:
    """Accuracy by goal and by task over `clips` samples from number `first` on, with some answers to read."""
    numbers = range(first, first + clips)
    return score_world(world, answers_by_number(watcher, world, numbers, questions_of, watcher.key, journal))


def evaluate_unseen(
    watcher: Watcher, world: World, first: int, clips: int, journal: Journal
) -> dict[str, Any]:
    """The row of `UNSEEN` over the next `clips` samples that can be asked for their kind.

    world: of the split "unseen", whose things training never showed.
    """
    numbers = list(islice((n for n in count(first) if category_of(world.sample(n))), clips))
    label = f"unseen {watcher.key}"
    said = answers_by_number(watcher, world, numbers, lambda sample, _: category_of(sample), label, journal)
    tally = Tally()
    for number, [answer] in said.items():
        [question] = category_of(world.sample(number))
        tally.add(agrees(question, answer), 1 / len(question.options))
    return tally.to_dict()


@dataclass
class _Counts:
    """Right answers by task, by goal and by part of a goal."""

    tasks: dict[str, Tally] = field(default_factory=lambda: defaultdict(Tally))
    goals: dict[str, Tally] = field(default_factory=lambda: defaultdict(Tally))
    parts: dict[str, Tally] = field(default_factory=lambda: defaultdict(Tally))

    def add_goal(self, goal: str, scene: Scene, right: bool, chance: float | None) -> None:
        """One answer that counts for a goal, and for the part of it that its clip is of."""
        self.goals[goal].add(right, chance)
        if part := part_of(goal, scene):
            self.parts[part].add(right, chance)


def score_world(world: World, answers: Mapping[int, Sequence[str]]) -> dict[str, Any]:
    """The figures of answers by sample number, each list as `questions_of` asks."""
    counts = _Counts()
    shown: list[dict[str, Any]] = []
    for number, said in answers.items():
        sample = world.sample(number)
        questions = questions_of(sample, number)
        _count_caption(world, sample, said[0], counts)
        for question, answer in zip(questions[1:], said[1:], strict=True):
            right, kind = agrees(question, answer), "choice" if question.options else "open"
            goal = goal_of(question, sample.scene)
            chance = 1 / len(question.options) if question.options else goal[1] if goal else None
            counts.tasks[f"{question.task}, {kind}"].add(right, chance)
            if goal:
                counts.add_goal(goal[0], sample.scene, right, chance)
        if len(shown) < SHOWN:
            rows = [[q.question, q.answer, a] for q, a in zip(questions, said, strict=True)]
            shown.append({"number": number, "asked, expected, answered": rows[:4]})
    choices = [tally for task, tally in sorted(counts.tasks.items()) if task.endswith(", choice")]
    return {
        "goals": goal_rows(counts.goals, choices),
        "parts": {part: counts.parts[part].to_dict() for part in PARTS if part in counts.parts},
        "tasks": {task: tally.to_dict() for task, tally in sorted(counts.tasks.items())},
        "multiple choice, mean over tasks": mean_of(choices)["accuracy"] if choices else None,
        "examples": shown,
    }


def _count_caption(world: World, sample: Sample, text: str, counts: _Counts) -> None:
    """Is the main object named, is its motion told (of clips with one thing that does one)?"""
    actor = sample.scene.actors[0]
    noun = world.nouns[actor.code]
    named, guess = names(text, noun.name, noun.plural), 1 / len(world.pool)
    counts.tasks["caption: main object"].add(named, guess)
    counts.add_goal(NAMED, sample.scene, named, guess)
    if len(sample.scene.actors) == len(actor.motions) == 1:
        told, guess = motion_in(text) == actor.motions[0], 1 / len(world.level.motions)
        counts.tasks["caption: motion"].add(told, guess)
        counts.add_goal(MOTION, sample.scene, told, guess)


def world_table(results: Mapping[str, dict[str, Any]]) -> str:
    """Goals, their parts and tasks down; runs across, in percent with intervals."""
    blocks = (("goal", "goals"), ("part of a goal", "parts"), ("task", "tasks"))
    return "\n\n".join(
        rows_table(head, {run: result[block] for run, result in results.items()}) for head, block in blocks
    )


def answer_share(result: dict[str, Any], kind: Literal["choice", "open"]) -> Share:
    """All multiple-choice, or all open, questions of a result of `score_world`, whatever their task."""
    rows = [row for task, row in result["tasks"].items() if task.endswith(", choice") == (kind == "choice")]
    return Share(sum(round(row["accuracy"] * row["n"]) for row in rows), sum(row["n"] for row in rows))


# -- the encoder alone --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WorldClips:
    """Test clips with the number of their noun and their motion."""

    examples: Sequence[Example]
    labels: dict[str, Tensor]
    counts: dict[str, int]

    @staticmethod
    def of(source: WorldSource) -> WorldClips:
        """All clips of a source; raises DataError when its sprites were never fetched."""
        by_attribute = {"noun": WorldExamples(source, "noun"), "motion": WorldExamples(source, "motion")}
        world = by_attribute["noun"].world
        examples, numbers = [], {name: list[int]() for name in by_attribute}
        classes = {name: part.classes for name, part in by_attribute.items()}
        for number in range(source.first, source.first + source.count):
            sample = world.sample(number)
            actor = sample.scene.actors[0]
            media = WorldMedia(world, sample, number)
            examples.append(Example(f"world-{source.split}-{number}", media, captions=(sample.caption,)))
            numbers["noun"].append(classes["noun"].index(actor.code))
            numbers["motion"].append(classes["motion"].index(str(actor.motions[0])))
        labels = {name: torch.tensor(values) for name, values in numbers.items()}
        return WorldClips(examples, labels, {name: len(part) for name, part in classes.items()})


def pooled_features(run: Run, clips: WorldClips, setting: Setting) -> Tensor:
    """(N, clip_embed_dim) of all clips, on the CPU."""

    def features(pixels: Sequence[Tensor], seed: int) -> Tensor:
        return run.viewer.pooled(pixels, setting, run.pool, seed)

    rows = run.rows(clips.examples, setting, features, lambda _, found: {"vector": pack(found.mean(dim=0))})
    return unpack([row["vector"] for row in rows])


def attribute_scores(alignment: Alignment, clips: WorldClips, pooled: Tensor) -> dict[str, Tensor]:
    """Class scores (N, classes) of noun and motion; raises DataError when a head is for another world."""
    alignment = alignment.to(pooled.device)
    scores = {name: alignment.scores(name, pooled) for name in alignment.heads if name in clips.counts}
    for name, found in scores.items():
        if found.shape[1] != clips.counts[name]:
            raise DataError(
                f"The head for {name} tells {found.shape[1]} classes apart, but this world has "
                f"{clips.counts[name]}: choose the --preset it was trained on."
            )
    return scores


def attribute_hits(run: Run, alignment: Alignment, clips: WorldClips, setting: Setting) -> dict[str, Tensor]:
    """Whether each clip's noun and motion are told right: (N,) bool each."""
    scores = attribute_scores(alignment, clips, pooled_features(run, clips, setting))
    return {name: top_k(found, clips.labels[name], 1) for name, found in scores.items()}


def evaluate_encoder(
    run: Run, alignment: Alignment, tower: TextTower | None, clips: WorldClips, setting: Setting
) -> dict[str, Any]:
    """Accuracy of every attribute head, and retrieval by caption (left out without a tower), at one setting.

    Equal captions count as equally right.
    """
    pooled = pooled_features(run, clips, setting)
    result: dict[str, Any] = {**describe_setting(setting), "n": len(pooled)}
    result["ms_per_clip"] = round(run.viewer.ms(setting), 2)
    for name, scores in attribute_scores(alignment, clips, pooled).items():
        result[name] = {**accuracies(scores, clips.labels[name]), "chance": 1 / clips.counts[name]}
    if tower is not None:
        check_widths(alignment, tower)
        texts = [example.captions[0] for example in clips.examples]
        vectors, video = tower.embed(texts).cpu(), alignment.unit(pooled)
        owner = list(range(len(texts)))
        result["retrieval"] = {}
        for score, dsl in (("plain", False), ("dual softmax", True)):
            ways = retrieval(video, vectors, owner, texts, dsl=dsl, duplicates="equal")
            result["retrieval"][score] = {
                way: {k: share.to_dict() for k, share in by_k.items()} for way, by_k in ways.items()
            }
    return result


def encoder_table(settings: Sequence[Setting], results: Sequence[dict[str, Any]]) -> str:
    """One line per setting, in percent."""
    heads = [name for name in results[0] if isinstance(results[0][name], dict) and "top1" in results[0][name]]
    columns = ["tokens", *heads, "T2V R@1", "R@5", "V2T R@1", "R@5", "T2V R@1, DSL", "ms", "n"]
    lines = []
    for setting, result in zip(settings, results, strict=True):
        line: list[object] = [setting.label, *(100 * result[name]["top1"]["value"] for name in heads)]
        found = result.get("retrieval")
        for score, way, k in (
            ("plain", "T2V", 1),
            ("plain", "T2V", 5),
            ("plain", "V2T", 1),
            ("plain", "V2T", 5),
            ("dual softmax", "T2V", 1),
        ):
            line.append(None if found is None else 100 * found[score][way][f"R@{k}"]["value"])
        lines.append([*line, result.get("ms_per_clip"), result["n"]])
    return table(columns, lines)
