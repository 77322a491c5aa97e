"""The synthetic world as examples: captions, labels, and conversations asked as a dataset says."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from encoder.errors import ConfigError
from training.data.examples import Conversation, Example, Turn
from training.data.media import WorldMedia
from training.data.synthetic_source import WorldSource
from training.synthetic.dataset import Sample, World
from training.synthetic.phrases import sentence
from training.synthetic.question_forms import Question
from training.synthetic.question_templates import QUESTIONS
from training.synthetic.questions import TASKS

WorldLabel = Literal["noun", "motion"]
ChooseBy = Literal["letter", "words"]


@dataclass(frozen=True)
class Asking:
    """How the world is asked.

    turns: questions per sample, asked in one conversation. captions: chance that one of them is for a
    description. choices: share of multiple-choice questions. choose_by: how these are answered, by "letter"
    as MVBench asks, "(B) left", or with the "words" of the option alone, "Left." rounds: how often everything
    is asked anew, in other words and with other options, before `turns` questions are picked. task_weights:
    how likely questions of a task are to be picked, 1 for those that are not named.
    independent: the turns of an example are conversations of their own about its media: no answer sees
    another (see llm_bridge.packing).
    """

    turns: int = 1
    captions: float = 0.5
    choices: float = 0.3
    rounds: int = 1
    task_weights: dict[str, float] = field(default_factory=dict)
    choose_by: ChooseBy = "letter"
    independent: bool = False

    def __post_init__(self) -> None:
        for name in ("turns", "rounds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if unknown := sorted(set(self.task_weights) - set(TASKS)):
            raise ConfigError(
                f"task_weights names the unknown task {unknown[0]!r}: known are {', '.join(TASKS)}."
            )
        if not all(weight > 0 for weight in self.task_weights.values()):
            raise ConfigError("task_weights must be positive.")


@dataclass(frozen=True)
class WorldExamples:
    """Samples of the world with captions, and the first actor's noun or motion as label.

    asking: for conversations, None leaves them out.
    """

    source: WorldSource
    label: WorldLabel = "noun"
    asking: Asking | None = None
    _world: list[World] = field(default_factory=list, compare=False)
    _labels: dict[str, int] = field(default_factory=dict, compare=False)

    @property
    def world(self) -> World:
        """The open world; raises DataError when its sprites were never fetched."""
        if not self._world:
            self._world.append(self.source.open())
        return self._world[0]

    @property
    def classes(self) -> tuple[str, ...]:
        """Sprite codes in order, or motions."""
        if self.label == "noun":
            return tuple(sorted({noun.code for noun in self.world.pool}))
        return tuple(str(motion) for motion in self.world.level.motions)

    def __len__(self) -> int:
        return self.source.count

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = self.source.first + index
        sample = self.world.sample(number)
        if not self._labels:
            self._labels.update({name: value for value, name in enumerate(self.classes)})
        actor = sample.scene.actors[0]
        name = actor.code if self.label == "noun" else str(actor.motions[0])
        return Example(
            f"world-{self.source.split}-{number}",
            WorldMedia(self.world, sample, number),
            self._labels.get(name),
            (sample.caption,),
            conversations=() if self.asking is None else self._talks(sample, number, self.asking),
        )

    def _talks(self, sample: Sample, number: int, asking: Asking) -> tuple[Conversation, ...]:
        rng = random.Random(f"{self.source.seed}/{number}/turns")
        turns = _pick(self._questions(sample, number, asking), asking, rng)
        requests = QUESTIONS["caption"]["train" if self.source.split == "train" else "test"]
        if rng.random() < asking.captions:
            turns[rng.randrange(len(turns))] = (rng.choice(requests), sample.caption)
        return tuple((turn,) for turn in turns) if asking.independent else (tuple(turns),)

    def _questions(self, sample: Sample, number: int, asking: Asking) -> list[Question]:
        """All that may be asked, the same thing in the same words once."""
        again = (self.world.ask_again(sample, number, turn) for turn in range(1, asking.rounds))
        different = {(q.question, q.answer): q for questions in (sample.questions, *again) for q in questions}
        return list(different.values())


def _pick(questions: Sequence[Question], asking: Asking, rng: random.Random) -> list[Turn]:
    """`asking.turns` questions with their answers, picked at random."""
    drawn = _shuffle(questions, asking, rng)
    open_forms = [(q.question, q.answer) for q in drawn if not q.options]
    choices = [(q.question, _chosen(q, asking)) for q in drawn if q.options]
    picked = []
    for _ in range(min(asking.turns, len(open_forms) + len(choices))):
        choose = rng.random() < asking.choices and choices
        picked.append((choices if choose or not open_forms else open_forms).pop())
    return picked


def _shuffle(questions: Sequence[Question], asking: Asking, rng: random.Random) -> list[Question]:
    """In random order, those of large weight rather later, as weighted sampling without replacement draws
    them from the end (Efraimidis and Spirakis 2006)."""
    weights = asking.task_weights
    return sorted(questions, key=lambda question: rng.random() ** (1 / weights.get(question.task, 1)))


def _chosen(question: Question, asking: Asking) -> str:
    """The answer to a multiple-choice question."""
    if asking.choose_by == "letter":
        return question.answer
    return sentence(question.options[question.answer_index or 0])
