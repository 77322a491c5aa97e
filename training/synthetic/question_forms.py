"""Question, and the Asker that words one in open and in MVBench's multiple-choice form."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from training.synthetic.nouns import Noun, Nouns, with_article
from training.synthetic.phrases import Wording, sentence
from training.synthetic.question_templates import FILMS, QUESTIONS
from training.synthetic.scene import Actor, Scene, Shot


@dataclass(frozen=True)
class Question:
    """One question about a video.

    `question` is the whole text to ask; with `options` it is the multiple-choice prompt, `answer` then reads
    "(B) left" and `answer_index` is 1. `facts` holds what the answer must agree with, as plain values: for
    example {"motion": "left"}, {"count": 3}, {"time_s": 4.2}, {"noun": "dog", "present": True}.
    """

    task: str
    question: str
    answer: str
    options: tuple[str, ...] = ()
    answer_index: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


def kind_phrase(category: str) -> str:
    """A category as an answer: "an animal", but "food"."""
    return category if category in ("food", "clothing") else with_article(category)


def multiple_choice(question: str, options: Sequence[str]) -> str:
    """The prompt of MVBench for a question and its options."""
    letters = "".join(f"({chr(65 + i)}) {option}\n" for i, option in enumerate(options))
    return f"Question: {question}\nOption:\n{letters}Only give the best option."


@dataclass(frozen=True)
class Asker:
    """What is needed to ask about a scene: names, the nouns wrong options come from, wording and chance."""

    scene: Scene
    nouns: Nouns
    pool: tuple[Noun, ...]
    wording: Wording
    rng: random.Random

    def text(self, template: str, **words: str) -> str:
        """One of the wordings of a question."""
        words_of = self.rng.choice(QUESTIONS[template][self.wording])
        if self.wording == "train" and "video" in words_of:
            words_of = words_of.replace("video", self.rng.choice(FILMS))
        return words_of.format(**words)

    def open(self, task: str, text: str, answer: str, **facts: Any) -> Question:
        """The open form; the answer is a sentence."""
        return Question(task, text, sentence(answer), facts=facts)

    def choice(
        self, task: str, text: str, right: str, wrong: Sequence[str], among: int = 4, **facts: Any
    ) -> Question:
        """The multiple-choice form with `among` options at most, in random order."""
        others = [option for option in dict.fromkeys(wrong) if option != right]
        options = [right, *self.rng.sample(others, min(among - 1, len(others)))]
        self.rng.shuffle(options)
        index = options.index(right)
        prompt = multiple_choice(text, options)
        return Question(task, prompt, f"({chr(65 + index)}) {right}", tuple(options), index, facts)

    def both(
        self, task: str, text: str, right: str, wrong: Sequence[str], answer: str | None = None, **facts: Any
    ) -> Iterator[Question]:
        """The open form (answered by `answer`, else by the right option) and the multiple-choice form."""
        yield self.open(task, text, answer or right, **facts)
        yield self.choice(task, text, right, wrong, **facts)

    def maybe(self, share: float) -> bool:
        """True in the given share of cases."""
        return self.rng.random() < share

    def name(self, code: str) -> str:
        """The name of a sprite."""
        return self.nouns[code].name

    @cached_property
    def shown(self) -> tuple[str, ...]:
        """The codes of everything that can be seen at some time, as captions tell of it."""
        return self.scene.shown

    @cached_property
    def unique(self) -> list[tuple[Shot, Actor]]:
        """The actors that their name alone identifies."""
        codes = [actor.code for actor in self.scene.actors]
        return [(s, a) for s in self.scene.shots for a in s.actors if codes.count(a.code) == 1]

    def absent(self, count: int) -> list[Noun]:
        """Nouns that are not shown, about half of them of a kind that is."""
        missing = [noun for noun in self.pool if noun.code not in self.shown]
        kind = self.nouns[self.rng.choice(self.scene.actors).code].category
        near = [noun for noun in missing if noun.category == kind]
        picked = self.rng.sample(near, min(len(near), sum(self.rng.random() < 0.5 for _ in range(count))))
        rest = [noun for noun in missing if noun not in picked]
        return picked + self.rng.sample(rest, count - len(picked))
