"""WorldConfig: how rich a synthetic world is."""

from __future__ import annotations

from dataclasses import dataclass

from encoder.errors import ConfigError
from training.synthetic.scene import MOTIONS, Motion

# The names of the scene scripts (see `scene_scripts`).
SCRIPTS = ("solo", "several", "group", "order", "sequence", "change", "vanish", "cut")


@dataclass(frozen=True)
class WorldConfig:
    """How rich the world is. Durations in seconds, sizes as fractions of the frame's shorter side.

    `nouns` limits how many nouns take part (taken in turn from all categories; None = all of the split),
    `plots` names the scene scripts that may occur and `motions` the motions, `pans`, `noise` and `jpeg` say
    how often (0..1) a scene has them.
    """

    max_objects: int = 4
    motions: tuple[Motion, ...] = MOTIONS
    nouns: int | None = None
    plots: tuple[str, ...] = SCRIPTS
    duration_s: tuple[float, float] = (2.0, 20.0)
    size: tuple[float, float] = (0.3, 0.5)
    pans: float = 0.3
    noise: float = 0.5
    jpeg: float = 0.15

    def __post_init__(self) -> None:
        unknown = sorted({*self.motions} - {*MOTIONS}) + sorted({*self.plots} - {*SCRIPTS})
        if unknown or not self.motions or not self.plots:
            raise ConfigError(
                f"Unknown or missing motions or plots {unknown}: motions are {', '.join(MOTIONS)}; "
                f"plots are {', '.join(SCRIPTS)}."
            )
        if not 1 <= self.max_objects <= 4:
            raise ConfigError(f"max_objects is {self.max_objects}: the world has room for 1 to 4.")
        if not 2.0 <= self.duration_s[0] <= self.duration_s[1]:
            raise ConfigError(
                f"duration_s is {self.duration_s}: give (shortest, longest) of at least 2 seconds."
            )
        if not 0.1 <= self.size[0] <= self.size[1] <= 0.6:
            raise ConfigError(f"size is {self.size}: give (smallest, largest) between 0.1 and 0.6.")
        if self.nouns is not None and self.nouns < 8:
            raise ConfigError(
                f"nouns is {self.nouns}: questions need at least 8 to choose wrong options from."
            )

    @staticmethod
    def simple() -> WorldConfig:
        """A curriculum's first step: one of 60 things, six motions, 2-6 s, no cuts, pans or compression."""
        return WorldConfig(
            max_objects=1,
            motions=("left", "right", "up", "down", "circle", "toward"),
            nouns=60,
            plots=("solo",),
            duration_s=(2.0, 6.0),
            size=(0.3, 0.5),
            pans=0.0,
            jpeg=0.0,
        )

    @staticmethod
    def solo() -> WorldConfig:
        """The second step: one of all things, every motion, 2-10 s, no cuts or pans."""
        return WorldConfig(
            max_objects=1, plots=("solo",), duration_s=(2.0, 10.0), size=(0.28, 0.5), pans=0.0, jpeg=0.1
        )
