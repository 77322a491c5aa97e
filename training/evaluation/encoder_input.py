"""EncoderInput: how a clip is shown to an encoder, written `16x168:1024` on command lines.

`FRAMESxRESOLUTION[:TOKENS][/SELECTOR][+vid-tldr]`: `8x224` keeps every token, `16x168:1024/random` keeps 1024
drawn by chance, `16x168:1024+vid-tldr` merges down to 1024 inside the first blocks. `+vid-tldr/sum` measures
likeness on the residual sum and not on the attention branch, and `+vid-tldr=1536,1024,512` names what each of
the first blocks leaves (both in encoder.merging).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

from encoder.budget import InputSpace, Media, Plan, PlanTable
from encoder.config import FluxViTConfig
from encoder.errors import ConfigError
from encoder.merging import MergeBy, Merging, vid_tldr_schedule
from encoder.selection import Selector

_FORM = re.compile(r"(\d+)x(\d+)(?::(\d+))?(?:/(\w+))?(?:\+(vid-tldr.*))?")
_MERGE = re.compile(r"vid-tldr(?:/(branch|sum))?(?:=(\d+(?:,\d+)*))?")
SELECTORS: tuple[str, ...] = get_args(Selector)


@dataclass(frozen=True)
class VidTldr:
    """by: what likeness is measured on; targets: tokens after each of the first blocks, () as published."""

    by: MergeBy = "branch"
    targets: tuple[int, ...] = ()

    @staticmethod
    def parse(text: str) -> VidTldr:
        """`vid-tldr[/branch or /sum][=TARGETS]`, the reverse of `str`; raises ConfigError."""
        match = _MERGE.fullmatch(text)
        if not match:
            raise ConfigError(f"Merging is written vid-tldr[/branch or /sum][=1536,1024,512], not {text!r}.")
        by, targets = match.groups()
        return VidTldr(
            "sum" if by == "sum" else "branch", tuple(map(int, targets.split(","))) if targets else ()
        )

    def __str__(self) -> str:
        by = "" if self.by == "branch" else f"/{self.by}"
        return f"vid-tldr{by}{'=' + ','.join(map(str, self.targets)) if self.targets else ''}"


@dataclass(frozen=True)
class EncoderInput:
    """frames, resolution (pixels per side), tokens to keep (None: all), selector, merging in its place.

    optimized: marks rows of Token Optimization ("+" in the paper's tables).
    """

    frames: int
    resolution: int
    keep: int | None = None
    selector: Selector = "flux"
    merge: VidTldr | None = None
    optimized: bool = False

    def __post_init__(self) -> None:
        if self.frames < 1 or self.resolution < 1 or (self.keep is not None and self.keep < 1):
            raise ConfigError(f"{self} is not a setting: all numbers must be at least 1.")
        if self.selector not in SELECTORS:
            raise ConfigError(f"A selector is one of {', '.join(SELECTORS)}, not {self.selector!r}.")
        if self.merge and self.keep is None:
            raise ConfigError("Merging needs a number of tokens to merge down to.")
        if self.merge and self.merge.targets and self.merge.targets[-1] != self.keep:
            raise ConfigError(
                f"{self}: merging must end at {self.keep} tokens, not {self.merge.targets[-1]}."
            )

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
            VidTldr.parse(merge) if merge else None,
        )

    def __str__(self) -> str:
        keep = "" if self.keep is None else f":{self.keep}"
        selector = "" if self.selector == "flux" else f"/{self.selector}"
        return f"{self.frames}x{self.resolution}{keep}{selector}{f'+{self.merge}' if self.merge else ''}"

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
            "selector": str(self.merge) if self.merge else self.selector,
            "optimized": self.optimized,
        }

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> EncoderInput:
        """The reverse of `to_dict`; other keys are ignored."""
        selector = values["selector"]
        merge = VidTldr.parse(selector) if selector.startswith("vid-tldr") else None
        return EncoderInput(
            values["frames"],
            values["resolution"],
            values["K"],
            "flux" if merge else selector,
            merge,
            values["optimized"],
        )

    def patches(self, patch_size: int) -> int:
        """Tokens before selection."""
        return self.frames * (self.resolution // patch_size) ** 2

    def merging(self, patch_size: int) -> Merging | None:
        """For FluxViT's `merge`; raises ConfigError where halving per block cannot follow the targets."""
        if not self.merge or self.keep is None:
            return None
        patches = self.patches(patch_size)
        left = patches
        for target in self.merge.targets:
            if left > target and left - left // 2 > target:
                raise ConfigError(
                    f"{self}: a block can leave no fewer than half of its {left} tokens, not {target}."
                )
            left = min(left, target)
        targets = self.merge.targets or vid_tldr_schedule(self.keep, patches)
        return Merging(targets, self.merge.by)

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
