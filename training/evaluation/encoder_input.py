"""EncoderInput: how a clip is shown to an encoder, written `16x168:1024` on command lines.

`FRAMESxRESOLUTION[:TOKENS][/SELECTOR][+vid-tldr]`: `8x224` keeps every token, `16x168:1024/random` keeps 1024
drawn by chance, `16x168:1024+vid-tldr` merges down to 1024 inside the first blocks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

from encoder.budget import InputSpace, Media, Plan, PlanTable
from encoder.config import FluxViTConfig
from encoder.errors import ConfigError
from encoder.merging import vid_tldr_schedule
from encoder.selection import Selector

_FORM = re.compile(r"(\d+)x(\d+)(?::(\d+))?(?:/(\w+))?(\+vid-tldr)?")
SELECTORS: tuple[str, ...] = get_args(Selector)


@dataclass(frozen=True)
class EncoderInput:
    """frames, resolution (pixels per side), tokens to keep (None: all), selector, merging in its place.

    optimized: marks rows of Token Optimization ("+" in the paper's tables).
    """

    frames: int
    resolution: int
    keep: int | None = None
    selector: Selector = "flux"
    merge: bool = False
    optimized: bool = False

    def __post_init__(self) -> None:
        if self.frames < 1 or self.resolution < 1 or (self.keep is not None and self.keep < 1):
            raise ConfigError(f"{self} is not a setting: all numbers must be at least 1.")
        if self.selector not in SELECTORS:
            raise ConfigError(f"A selector is one of {', '.join(SELECTORS)}, not {self.selector!r}.")
        if self.merge and self.keep is None:
            raise ConfigError("Merging needs a number of tokens to merge down to.")

    @staticmethod
    def parse(text: str) -> EncoderInput:
        """The reverse of `str`; raises ConfigError."""
        match = _FORM.fullmatch(text.strip())
        if not match:
            raise ConfigError(
                f"A setting is written FRAMESxRESOLUTION[:TOKENS][/SELECTOR][+vid-tldr], not {text!r}."
            )
        frames, resolution, keep, selector, merge = match.groups()
        return EncoderInput(
            int(frames),
            int(resolution),
            int(keep) if keep else None,
            selector or "flux",  # type: ignore[arg-type]
            bool(merge),
        )

    def __str__(self) -> str:
        keep = "" if self.keep is None else f":{self.keep}"
        selector = "" if self.selector == "flux" else f"/{self.selector}"
        return f"{self.frames}x{self.resolution}{keep}{selector}{'+vid-tldr' if self.merge else ''}"

    @property
    def label(self) -> str:
        """For tables: the tokens, + for Token Optimization, and the input."""
        tokens = "all" if self.keep is None else str(self.keep)
        return f"{tokens}{'+' if self.optimized else ''} ({self})"

    def to_dict(self) -> dict[str, Any]:
        """For result files."""
        return {
            "frames": self.frames,
            "resolution": self.resolution,
            "K": self.keep,
            "selector": "vid-tldr" if self.merge else self.selector,
            "optimized": self.optimized,
        }

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> EncoderInput:
        """The reverse of `to_dict`; other keys are ignored."""
        merge = values["selector"] == "vid-tldr"
        return EncoderInput(
            values["frames"],
            values["resolution"],
            values["K"],
            "flux" if merge else values["selector"],
            merge,
            values["optimized"],
        )

    def patches(self, patch_size: int) -> int:
        """Tokens before selection."""
        return self.frames * (self.resolution // patch_size) ** 2

    def merging(self, patch_size: int) -> tuple[int, ...] | None:
        """For FluxViT's `merge`."""
        if not self.merge or self.keep is None:
            return None
        return vid_tldr_schedule(self.keep, self.patches(patch_size))

    def plan(self, space: InputSpace, media: Media, frames: int) -> Plan:
        """For a clip of so many frames, in the aspect that the tower gives the medium."""
        size = space.size(self.resolution, media)
        plan = Plan(frames, *size, 1, space.cell, space.frames_per_cell)
        return replace(plan, keep=min(self.keep or plan.grid.size, plan.grid.size))

    def check(self, config: FluxViTConfig | InputSpace) -> EncoderInput:
        """Itself; raises ConfigError when the encoder cannot take it."""
        space = InputSpace.of(config)
        if self.resolution % space.cell and self.resolution not in space.sides:
            raise ConfigError(f"{self}: the resolution must be a multiple of {space.cell}, the patch size.")
        return self


def unmasked(counts: Iterable[int], resolution: int, patch_size: int) -> list[EncoderInput]:
    """The upper lines of the paper's tables: as many frames as give each count, none dropped (8 x 224 for
    2048). Counts that no number of frames gives are kept from the next larger input."""
    per_frame = (resolution // patch_size) ** 2
    return [EncoderInput(max(1, -(-count // per_frame)), resolution, count) for count in counts]


def from_plan_table(table: PlanTable) -> list[EncoderInput]:
    """One input per row of a plan table, marked as optimized."""
    return [EncoderInput(row.frames, row.resolution, row.tokens, optimized=True) for row in table.rows]
