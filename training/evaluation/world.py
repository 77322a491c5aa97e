"""The demo world's held-out clips: what a chat model answers about them, and what its encoder alone tells.

Clips, backgrounds and wordings of the test split were never trained on. A chat model describes every clip
(is the main object named, is its motion told) and answers its questions, open and multiple choice. An encoder
names object and motion by the heads that Flux-CLIP trained, and finds clips by caption and captions by clip.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from encoder.errors import DataError
from training.data.examples import Example, WorldExamples
from training.data.media import WorldMedia
from training.data.world import WorldSource
from training.demo_world.asking import Question
from training.demo_world.wording import QUESTIONS
from training.demo_world.world import Sample, World
from training.evaluation.action import accuracies
from training.evaluation.alignment import Alignment
from training.evaluation.metrics import Share, retrieval, top_k
from training.evaluation.results import Journal, Row, run_blocks, table
from training.evaluation.retrieval import check_widths
from training.evaluation.run import Run, describe_setting, pack, unpack
from training.evaluation.setting import Setting
from training.evaluation.watcher import Asked, Watcher
from training.scoring import agrees, motion_in, names, wilson
from training.text_towers import TextTower

SHOWN = 12


@dataclass
class Tally:
    """Right answers and trials of one task, and what guessing would give."""

    right: int = 0
    total: int = 0
    chance: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Share with its interval."""
        low, high = wilson(self.right, self.total)
        share = self.right / self.total if self.total else 0.0
        rounded = {"accuracy": round(share, 4), "low": round(low, 4), "high": round(high, 4), "n": self.total}
        return rounded | ({} if self.chance is None else {"chance": self.chance})


def questions_of(sample: Sample, number: int) -> list[Question]:
    """The caption request, then every question of the sample."""
    asked = QUESTIONS["caption"]["test"]
    return [Question("caption", asked[number % len(asked)], sample.caption), *sample.questions]


def evaluate_world(
    watcher: Watcher, world: World, first: int, clips: int, label: str, journal: Journal
) -> dict[str, Any]:
    """Accuracy by task over `clips` samples from number `first` on, with some answers to read."""

    def work(numbers: Sequence[int]) -> list[Row]:
        rows: list[Row] = []
        for number in (first + place for place in numbers):
            sample = world.sample(number)
            asked = [Asked(q.question) for q in questions_of(sample, number)]
            media = WorldMedia(world, sample, number)
            rows.append({"answers": list(watcher.answers(media, number, asked))})
        return rows

    ids = [f"{label}|{number}" for number in range(first, first + clips)]
    rows = run_blocks(ids, work, journal, block=1, label=label)
    return score_world(world, {first + place: row["answers"] for place, row in enumerate(rows)})


def score_world(world: World, answers: dict[int, list[str]]) -> dict[str, Any]:
    """The figures of answers by sample number, each list as `questions_of` asks."""
    tallies: dict[str, Tally] = {}
    shown: list[dict[str, Any]] = []

    def count(task: str, right: bool, chance: float | None = None) -> None:
        tally = tallies.setdefault(task, Tally(chance=chance))
        tally.right, tally.total = tally.right + right, tally.total + 1

    for number, said in answers.items():
        sample = world.sample(number)
        questions = questions_of(sample, number)
        actor = sample.scene.actors[0]
        noun = world.nouns[actor.code]
        count("caption: main object", names(said[0], noun.name, noun.plural), 1 / len(world.pool))
        if len(sample.scene.actors) == len(actor.motions) == 1:
            count("caption: motion", motion_in(said[0]) == actor.motions[0], 1 / len(world.level.motions))
        for question, answer in zip(questions[1:], said[1:], strict=True):
            kind = "choice" if question.options else "open"
            chance = 1 / len(question.options) if question.options else None
            count(f"{question.task}, {kind}", agrees(question, answer), chance)
        if len(shown) < SHOWN:
            rows = [[q.question, q.answer, a] for q, a in zip(questions, said, strict=True)]
            shown.append({"number": number, "asked, expected, answered": rows[:4]})
    by_task = {task: tally.to_dict() for task, tally in sorted(tallies.items())}
    choices = [row["accuracy"] for task, row in by_task.items() if task.endswith(", choice")]
    mean = sum(choices) / len(choices) if choices else None
    return {"tasks": by_task, "multiple choice, mean over tasks": mean, "examples": shown}


def world_table(results: dict[str, dict[str, Any]]) -> str:
    """Tasks down, runs across, in percent with intervals."""
    runs = list(results)
    lines: list[list[object]] = []
    for task in results[runs[0]]["tasks"]:
        line: list[object] = [task]
        for run in runs:
            row = results[run]["tasks"][task]
            line.append(f"{100 * row['accuracy']:.1f} [{100 * row['low']:.0f}, {100 * row['high']:.0f}]")
        chance = results[runs[0]]["tasks"][task].get("chance")
        lines.append([*line, "" if chance is None else f"{100 * chance:.0f}"])
    return table(["task", *runs, "chance"], lines)


def choice_share(result: dict[str, Any]) -> Share:
    """All multiple-choice questions of a result of `score_world`, whatever their task."""
    rows = [row for task, row in result["tasks"].items() if task.endswith(", choice")]
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
