"""World: an endless, seeded source of scenes with captions, questions and answers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from encoder.errors import ConfigError, DataError
from training.synthetic.assets import open_bank
from training.synthetic.captions import caption
from training.synthetic.nouns import NounSplit, of_split
from training.synthetic.phrases import Wording
from training.synthetic.question_forms import Question
from training.synthetic.questions import questions
from training.synthetic.render import render
from training.synthetic.scene import Motion, Scene
from training.synthetic.scene_scripts import SCENE_SCRIPTS, solo
from training.synthetic.sprites import SpriteBank
from training.synthetic.stage import Stage, shows
from training.synthetic.world_config import WorldConfig

Split = Literal["train", "test", "unseen"]
LEAST_NOUNS = 8
# Photographs that training never shows.
TEST_PHOTOS = frozenset({"astronaut", "camera", "gravel"})


@dataclass(frozen=True)
class Sample:
    """One video: its description, a caption, questions with answers; plot: the scene script it follows."""

    scene: Scene
    caption: str
    questions: tuple[Question, ...]
    plot: str = "solo"


class World:
    """Videos by number: (split, seed, index, level, bank) fix a sample, in any process.

    Splits: "train"; "test": same nouns, other scenes, photographs and wordings; "unseen": nouns never
    trained on, test wordings. `level` says how rich the world is. `bank` defaults to the converted sprites
    of this machine (DataError when they were never fetched). `nouns` maps sprite codes to nouns, `pool`
    holds those that take part.
    """

    def __init__(
        self, split: Split, seed: int = 0, level: WorldConfig | None = None, bank: SpriteBank | None = None
    ) -> None:
        if split not in get_args(Split):
            raise ConfigError(f"Unknown split {split!r}: use one of {', '.join(get_args(Split))}.")
        self.split, self.seed, self.level = split, seed, level or WorldConfig()
        self.bank = bank or open_bank()
        kind: NounSplit = "unseen" if split == "unseen" else "train"
        pool = of_split(self.bank.nouns, kind, self.level.nouns)
        if len(pool) < LEAST_NOUNS:
            raise DataError(
                f"The sprite bank has only {len(pool)} {kind} nouns: the world needs at least {LEAST_NOUNS}."
            )
        photos = tuple(
            name for name in sorted(self.bank.photos) if (name in TEST_PHOTOS) == (split != "train")
        )
        self.nouns = {noun.code: noun for noun in self.bank.nouns}
        self.pool = pool
        self._stage = Stage(self.level, pool, photos)

    def sample(self, index: int) -> Sample:
        """Sample number `index` (0, 1, 2, ... without end)."""
        plot = self._rng(index, "plot").choice(self.level.plots)
        scene = SCENE_SCRIPTS[plot](self._stage, self._rng(index, "scene"), self._rng(index, "motion"))
        return self._describe(scene, plot, self._rng(index, "words"))

    def siblings(self, index: int, n: int) -> list[Sample]:
        """`n` samples of one object that differ in its motion alone: same background, size, times.

        The first is `sample(index)` when that follows the script "solo". Raises ConfigError when the world
        has fewer than `n` motions that show on the object.
        """
        first = solo(self._stage, self._rng(index, "scene"), self._rng(index, "motion"))
        noun = self.nouns[first.actors[0].code]
        others: list[Motion] = [
            m for m in self.level.motions if m != first.actors[0].motions[0] and shows(noun, m)
        ]
        if n > 1 + len(others):
            raise ConfigError(
                f"{n} siblings asked for, but {noun.name!r} has {1 + len(others)} motions here."
            )
        self._rng(index, "siblings").shuffle(others)
        samples = [self._describe(first, "solo", self._rng(index, "words"))]
        for motion in others[: n - 1]:
            scene = solo(self._stage, self._rng(index, "scene"), self._rng(index, "motion"), motion)
            samples.append(self._describe(scene, "solo", self._rng(index, f"words {motion}")))
        return samples

    def ask_again(self, sample: Sample, index: int, turn: int) -> tuple[Question, ...]:
        """The questions of sample number `index` in other words and with other options, anew per turn."""
        return self._ask(sample.scene, self._rng(index, f"words again {turn}"))

    def render(self, scene: Scene, times_s: Sequence[float], height: int, width: int) -> np.ndarray:
        """The frames of a scene with this world's sprites: uint8 (T, height, width, 3), RGB."""
        return render(scene, times_s, height, width, self.bank)

    def _describe(self, scene: Scene, plot: str, rng: random.Random) -> Sample:
        text = caption(scene, self.nouns, self.wording, rng)
        return Sample(scene, text, self._ask(scene, rng), plot)

    def _ask(self, scene: Scene, rng: random.Random) -> tuple[Question, ...]:
        return questions(scene, self.nouns, self._stage.nouns, self.wording, rng)

    @property
    def wording(self) -> Wording:
        """Which templates it asks with."""
        return "train" if self.split == "train" else "test"

    def _rng(self, index: int, purpose: str) -> random.Random:
        # A string seed is hashed the same way in every process.
        return random.Random(f"{self.split}/{self.seed}/{index}/{purpose}")
