"""What scene scripts are made of: a Stage to draw things, places and times from, and Paths for motions."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from training.synthetic.backgrounds import LANDSCAPES, PLAIN
from training.synthetic.nouns import Noun
from training.synthetic.phrases import PLACES
from training.synthetic.scene import Actor, Background, Motion, Phase, Pose, Scene, Shot
from training.synthetic.world_config import WorldConfig

# Turning them shows nothing.
ROUND = frozenset(
    [
        "apple",
        "basketball",
        "clover",
        "cookie",
        "doughnut",
        "moon",
        "pizza",
        "planet",
        "snowflake",
        "sun",
        "target",
        "tomato",
        "volleyball",
        "ferris wheel",
        "soccer ball",
        "tennis ball",
        "flying saucer",
    ]
)
ROUND_KINDS = frozenset({"circle", "ring"})


@dataclass(frozen=True)
class Stage:
    """What a scene script may draw from."""

    config: WorldConfig
    nouns: tuple[Noun, ...]
    photos: tuple[str, ...]

    def background(self, rng: random.Random) -> Background:
        """A random photograph, landscape or plain backdrop."""
        kinds: list[Sequence[str]] = [tuple(LANDSCAPES), PLAIN]
        if self.photos:
            kinds.append(("photo",))
        kind = rng.choice(rng.choices(kinds, (3, 3, 2)[: len(kinds)])[0])
        photo = rng.choice(self.photos) if kind == "photo" else None
        return Background(kind, rng.getrandbits(32), photo)

    def pick(self, rng: random.Random, count: int) -> list[Noun]:
        """Different nouns."""
        return rng.sample(self.nouns, count)

    def motion(self, rng: random.Random, noun: Noun) -> Motion:
        """A motion that shows on this noun; standing still is rarer than the others."""
        choices = [m for m in self.config.motions if m != "still" and shows(noun, m)]
        if not choices or ("still" in self.config.motions and rng.random() < 0.08):
            return "still"
        return rng.choice(choices)

    def places(self, rng: random.Random, count: int) -> list[Background]:
        """Different backgrounds that have a name."""
        textures = [photo for photo in self.photos if photo in PLACES]
        kinds = rng.sample([*LANDSCAPES, *textures], count)
        return [
            Background(
                "photo" if kind in textures else kind, rng.getrandbits(32), kind if kind in textures else None
            )
            for kind in kinds
        ]

    def flat_shot(
        self,
        rng: random.Random,
        start_s: float,
        end_s: float,
        actors: Sequence[Actor],
        background: Background | None = None,
    ) -> Shot:
        """A shot with the given or a random background, light and (sometimes) pan."""
        pan = (0.0, 0.0)
        # Before a drifting background a thing at rest seems to move, so pans need everything in motion.
        if rng.random() < self.config.pans and not any(_rests(actor) for actor in actors):
            pan = (rng.uniform(-0.12, 0.12), rng.uniform(-0.06, 0.06))
        tone = rng.uniform(0.75, 1.0) if rng.random() < 0.5 else 1.0
        light = (
            (tone, tone * rng.uniform(0.94, 1.0), tone * rng.uniform(0.88, 1.0)) if tone < 1.0 else (1.0,) * 3
        )
        return Shot(start_s, end_s, background or self.background(rng), tuple(actors), pan, light)

    def finish(self, rng: random.Random, duration_s: float, shots: Sequence[Shot]) -> Scene:
        """The scene around the shots, with noise and compression."""
        noise = rng.randint(2, 8) if rng.random() < self.config.noise else 0
        jpeg = rng.randint(25, 75) if rng.random() < self.config.jpeg else None
        return Scene(duration_s, tuple(shots), rng.getrandbits(32), noise, jpeg)

    def duration(self, rng: random.Random, least: float = 2.0) -> float:
        """A length in seconds, short ones more often (log-uniform)."""
        low, high = self.config.duration_s
        low = min(max(low, least), high)
        return round(low * (high / low) ** rng.random(), 2)


def _rests(actor: Actor) -> bool:
    return any(phase.motion == "still" for phase in actor.phases)


def shows(noun: Noun, motion: Motion) -> bool:
    """Whether a motion can be seen on a noun: a ball that spins looks like one that does not."""
    return motion != "spin" or not (noun.name in ROUND or noun.category in ROUND_KINDS)


Cell = tuple[float, float]


@dataclass(frozen=True)
class Path:
    """The geometry that a motion is laid on; one path serves every motion."""

    x: float
    y: float
    size: float
    length: float
    drift: float
    sign: int
    start_angle: float

    @staticmethod
    def draw(rng: random.Random, size: float, cell: Cell | None = None) -> Path:
        """A random path in a cell (None: the frame), long enough to be seen, short enough to stay."""
        if cell is None:
            length = rng.uniform(0.42, 0.64)
            # At the ends of its way four fifths of the object are still in the frame.
            room = max(0.02, 0.5 - 0.3 * size - length / 2)
            x, y = 0.5 + rng.uniform(-room, room), 0.5 + rng.uniform(-room, room)
        else:
            length = rng.uniform(0.32, 0.4)
            x, y = (centre + rng.uniform(-0.03, 0.03) for centre in cell)
        return Path(
            x=x,
            y=y,
            size=size,
            length=length,
            drift=rng.uniform(-0.2, 0.2) * length,
            sign=rng.choice((-1, 1)),
            start_angle=rng.uniform(0, 6.28),
        )

    def phase(self, motion: Motion, start_s: float, end_s: float) -> Phase:
        """The motion along this path between two times."""
        x, y, size, half, drift = self.x, self.y, self.size, self.length / 2, self.drift / 2
        if motion in ("left", "right"):
            step = half if motion == "right" else -half
            return Phase(
                motion, start_s, end_s, Pose(x - step, y - drift, size), Pose(x + step, y + drift, size)
            )
        if motion in ("up", "down"):
            step = half if motion == "down" else -half
            return Phase(
                motion, start_s, end_s, Pose(x - drift, y - step, size), Pose(x + drift, y + step, size)
            )
        middle = Pose(x, y, size)
        if motion == "circle":
            radius, angle = 0.45 * self.length, self.start_angle
            edge = Pose(x + radius * math.cos(angle), y + radius * math.sin(angle), size)
            return Phase(motion, start_s, end_s, edge, edge, radius, float(self.sign), angle)
        if motion in ("toward", "away"):
            near, far = Pose(x, y, min(1.4 * size, 0.62)), Pose(x, y, 0.65 * size)
            return Phase(motion, start_s, end_s, *((far, near) if motion == "toward" else (near, far)))
        turn = 360.0 * self.sign if motion == "spin" else 0.0
        return Phase(motion, start_s, end_s, middle, Pose(x, y, size, turn))
