"""Flexible grids: how many frames at which resolution the micro-batch with a given number has.

    FlexibleGrid().draw(seed=0, index=7)   # (F, R)

The paper draws one pair for each batch on each rank (supplement Tables 5 and 7).
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from encoder.errors import ConfigError


@dataclass(frozen=True)
class FlexibleGrid:
    """Pairs of frames and resolution whose patch count lies in `tokens`, both ends included.

    frames, resolutions: (start, stop, step), half-open like `range`. The defaults are the paper's ranges and
    threshold: 18 pairs; tokens (2048, 6144) give 27 (the paper's Table 4 has it as the worse choice). The
    released fine-tuning scripts use (6, 26, 2), (112, 364, 28), (2048, 6144): 41 pairs. Raises ConfigError
    for empty ranges, sides that are no multiple of the patch, or when no pair is left.
    """

    frames: tuple[int, int, int] = (4, 26, 2)
    resolutions: tuple[int, int, int] = (168, 280, 28)
    tokens: tuple[int, int] = (2048, 4096)
    patch_size: int = 14

    def __post_init__(self) -> None:
        for name, values in (("frames", self.frames), ("resolutions", self.resolutions)):
            start, stop, step = values
            if start < 1 or step < 1 or stop <= start:
                raise ConfigError(f"{name} must be (start, stop, step) with 1 <= start < stop, not {values}.")
        if self.patch_size < 1:
            raise ConfigError(f"patch_size must be at least 1, not {self.patch_size}.")
        if wrong := [r for r in range(*self.resolutions) if r % self.patch_size]:
            raise ConfigError(f"A resolution of {wrong[0]} is no multiple of the patch of {self.patch_size}.")
        if not self.pairs():
            raise ConfigError(
                f"No pair of frames {self.frames} and resolutions {self.resolutions} has from "
                f"{self.tokens[0]} to {self.tokens[1]} tokens."
            )

    @staticmethod
    def fixed(frames: int, resolution: int, patch_size: int = 14) -> FlexibleGrid:
        """Always the same (F, R)."""
        count = frames * (resolution // patch_size) ** 2
        return FlexibleGrid(
            (frames, frames + 1, 1), (resolution, resolution + 1, 1), (count, count), patch_size
        )

    def count(self, frames: int, resolution: int) -> int:
        """Patches of a clip."""
        return frames * (resolution // self.patch_size) ** 2

    def pairs(self) -> tuple[tuple[int, int], ...]:
        """All (F, R) that may be drawn, by resolution, then frames."""
        least, most = self.tokens
        return tuple(
            (frames, resolution)
            for resolution in range(*self.resolutions)
            for frames in range(*self.frames)
            if least <= self.count(frames, resolution) <= most
        )

    def check_patch(self, patch_size: int) -> None:
        """Raises ConfigError when an encoder has patches of another size."""
        if patch_size != self.patch_size:
            raise ConfigError(f"grid.patch_size must be {patch_size}, the encoder's.")

    @property
    def most_tokens(self) -> int:
        """Patches of the largest pair."""
        return max(self.count(*pair) for pair in self.pairs())

    def draw(self, seed: int, index: int) -> tuple[int, int]:
        """(F, R) of micro-batch `index`: uniform over the pairs, as the released code's rejection is.

        A pure function, so that a resumed run draws the same; ranks differ since their indices do.
        """
        return random.Random(f"{seed}/{index}/grid").choice(self.pairs())
