"""Budget: how many tokens the encoder may keep, and the frames, resolution and K that it buys.

The default policy walks the anti-diagonal of the paper's Token Optimization table (supplement Table 1): as
many frames as possible, at the lowest trained resolution first, until the patches embedded reach a fixed
multiple of the tokens kept. A table measured on the model at hand (`PlanTable`) takes its place.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Protocol

from encoder.config import FluxViTConfig
from encoder.errors import BudgetError
from encoder.tokens import Grid

# Patches embedded per token kept: 16 x 168^2 at K = 1024 is among the best of supplement Table 1.
OVERSAMPLING = 2.25
MIN_TOKENS = 16


class Media(Protocol):
    """What planning needs to know of a clip: `VideoInfo` and `Clip.info` both have it."""

    @property
    def duration_s(self) -> float: ...

    @property
    def frames(self) -> int | None: ...

    @property
    def kind(self) -> str: ...


@dataclass(frozen=True)
class Plan:
    """What was decided for one clip: sampled frames, input size in pixels, tokens to keep."""

    frames: int
    height: int
    width: int
    keep: int
    patch_size: int = 14

    @property
    def grid(self) -> Grid:
        """Patch grid of the encoder's input."""
        return Grid(self.frames, self.height // self.patch_size, self.width // self.patch_size)

    @property
    def key(self) -> tuple[int, int, int, int]:
        """What distinguishes its result from another plan's on the same clip."""
        return self.frames, self.height, self.width, self.keep

    def __str__(self) -> str:
        return f"{self.frames} frames x {self.height}x{self.width}, {self.keep} of {self.grid.size} tokens"


@dataclass(frozen=True)
class PlanRow:
    """Up to `tokens` kept: sample `frames` at `resolution` x `resolution`."""

    tokens: int
    frames: int
    resolution: int


@dataclass(frozen=True)
class PlanTable:
    """Best input setting per token count, ascending; `training.optimize_tokens` measures one.

    A count between two rows takes the input of the next larger one; see `input_for` for counts beyond all.
    """

    rows: tuple[PlanRow, ...]

    def lookup(self, num_tokens: int) -> PlanRow:
        """The row of the smallest count that is not below `num_tokens`, or the last."""
        return next((row for row in self.rows if row.tokens >= num_tokens), self.rows[-1])

    @staticmethod
    def of(rows: Iterable[PlanRow]) -> PlanTable:
        """Sorted; raises BudgetError when empty."""
        ordered = tuple(sorted(rows, key=lambda row: row.tokens))
        if not ordered:
            raise BudgetError("A plan table needs at least one row.")
        return PlanTable(ordered)

    @staticmethod
    def read(path: str | Path) -> PlanTable:
        """From JSON, a list of {tokens, frames, resolution}; raises BudgetError when it is not that."""
        try:
            return PlanTable.of(PlanRow(**row) for row in json.loads(Path(path).read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise BudgetError(f"Cannot read the plan table {path}: {error}.") from error


def choose_input(num_tokens: int, max_frames: int, config: FluxViTConfig) -> tuple[int, int]:
    """(frames, resolution) for K = num_tokens within the model's trained ranges.

    The most frames, then the highest resolution, whose patches number between K and OVERSAMPLING * K; where
    the ranges hold none, the closest above K, or the largest there is.
    """
    per_side = [side // config.patch_size for side in range(*config.resolution_range)]
    frame_counts = [count for count in range(*config.frames_range) if count <= max_frames] or [max_frames]
    pairs = [(frames, side) for frames in frame_counts for side in per_side]

    def patches(pair: tuple[int, int]) -> int:
        return pair[0] * pair[1] ** 2

    fitting = [pair for pair in pairs if num_tokens <= patches(pair) <= OVERSAMPLING * num_tokens]
    if fitting:
        frames, side = max(fitting)
    else:
        above = [pair for pair in pairs if patches(pair) > num_tokens]
        frames, side = min(above, key=patches) if above else max(pairs, key=patches)
    return frames, side * config.patch_size


@dataclass(frozen=True)
class Budget:
    """How many tokens the encoder may keep: a number, everything, or what fits a latency target.

    frames, resolution: take these instead of what the policy chooses (pixels per side; a clip never gives
    more frames than it has). Raises BudgetError for a count below 1 or a time that is not positive.
    """

    tokens: int | None = 1024
    seconds: float | None = None
    frames: int | None = None
    resolution: int | None = None

    def __post_init__(self) -> None:
        for name in ("tokens", "seconds", "frames", "resolution"):
            value, kind = getattr(self, name), Real if name == "seconds" else Integral
            if value is not None and (isinstance(value, bool) or not isinstance(value, kind)):
                raise BudgetError(f"A budget's {name} must be a number, not {value!r}.")
        if self.tokens is not None and self.tokens < 1:
            raise BudgetError(f"A token budget must be at least 1, not {self.tokens}.")
        if self.seconds is not None and not self.seconds > 0:
            raise BudgetError(f"A latency target must be a positive number of seconds, not {self.seconds}.")
        if self.frames is not None and self.frames < 1:
            raise BudgetError(f"A clip needs at least 1 frame, not {self.frames}.")

    @staticmethod
    def full() -> Budget:
        """Everything: the most frames at the highest trained resolution, no token dropped."""
        return Budget(tokens=None)

    @staticmethod
    def auto(seconds: float = 2.0) -> Budget:
        """As many tokens as reach the first word of the answer within `seconds`, by prediction."""
        return Budget(tokens=None, seconds=seconds)

    @staticmethod
    def of(value: Budget | int | str | None) -> Budget:
        """From what people write: 512, "512", "full", "auto", "auto:1.5"; None is the default."""
        if isinstance(value, Budget):
            return value
        if value is None:
            return Budget()
        text = str(value).strip().lower() if isinstance(value, (Integral, str)) else ""
        if text == "full":
            return Budget.full()
        name, _, seconds = text.partition(":")
        try:
            if name == "auto":
                return Budget.auto(float(seconds.rstrip("s"))) if seconds else Budget.auto()
            return Budget(int(text))
        except ValueError:
            raise BudgetError(
                f"A budget is a number of tokens, 'full', 'auto' or 'auto:SECONDS', not {repr(value)[:80]}."
            ) from None

    def plan(
        self,
        media: Media,
        config: FluxViTConfig,
        *,
        table: PlanTable | None = None,
        predict_s: Callable[[Plan], float] | None = None,
    ) -> Plan:
        """Frames, resolution and K for one clip.

        media: anything with kind, duration_s and frames (None when unknown); a still image gets one frame and
        a clip never more frames than it has. predict_s: seconds to the first word under a plan; `Budget.auto`
        needs it and raises BudgetError without.
        """
        max_frames = 1 if media.kind == "image" else (media.frames or max(range(*config.frames_range)))
        full = self._fixed(_full_plan(max_frames, config), None, max_frames)
        if self.tokens is None and self.seconds is None:
            return full

        def plan(num_tokens: int) -> Plan:
            return self._fixed(_plan(num_tokens, max_frames, config, table), num_tokens, max_frames)

        if self.seconds is None:
            return plan(self.tokens or full.keep)
        if predict_s is None:
            raise BudgetError("Budget.auto needs a model whose speed is known: ask through VideoChat.")
        return _within(self.seconds, full.keep, plan, predict_s)

    def _fixed(self, plan: Plan, num_tokens: int | None, max_frames: int) -> Plan:
        """The plan with this budget's own frames and resolution; num_tokens=None keeps every token."""
        if self.frames is None and self.resolution is None:
            return plan
        side = self.resolution or plan.height
        if side < plan.patch_size or side % plan.patch_size:
            raise BudgetError(f"A resolution must be a multiple of {plan.patch_size} pixels, not {side}.")
        fixed = replace(plan, frames=min(self.frames or plan.frames, max_frames), height=side, width=side)
        patches = fixed.grid.size
        return replace(fixed, keep=patches if num_tokens is None else min(num_tokens, patches))


def _within(
    seconds: float, max_tokens: int, plan: Callable[[int], Plan], predict_s: Callable[[Plan], float]
) -> Plan:
    """The largest multiple of MIN_TOKENS whose prediction meets the target, by bisection; else MIN_TOKENS."""
    low, high = 1, max(1, max_tokens // MIN_TOKENS)
    while low < high:
        middle = (low + high + 1) // 2
        if predict_s(plan(middle * MIN_TOKENS)) <= seconds:
            low = middle
        else:
            high = middle - 1
    return plan(low * MIN_TOKENS)


def _full_plan(max_frames: int, config: FluxViTConfig) -> Plan:
    frames = min(max_frames, max(range(*config.frames_range)))
    side = max(range(*config.resolution_range))
    return Plan(frames, side, side, frames * (side // config.patch_size) ** 2, config.patch_size)


def _plan(num_tokens: int, max_frames: int, config: FluxViTConfig, table: PlanTable | None) -> Plan:
    frames, side = input_for(num_tokens, max_frames, config, table)
    patches = frames * (side // config.patch_size) ** 2
    return Plan(frames, side, side, min(num_tokens, patches), config.patch_size)


def input_for(
    num_tokens: int, max_frames: int, config: FluxViTConfig, table: PlanTable | None
) -> tuple[int, int]:
    """(frames, resolution) for K = num_tokens: what was measured for them, else the policy's.

    Where the table does not apply (K beyond its last row, or a clip with fewer frames than the row needs) its
    input still serves if it has K patches, or no fewer than the policy's.
    """
    policy = choose_input(num_tokens, max_frames, config)
    if table is None:
        return policy
    row = table.lookup(num_tokens)
    measured = min(row.frames, max_frames), row.resolution

    def patches(size: tuple[int, int]) -> int:
        return size[0] * (size[1] // config.patch_size) ** 2

    applies = num_tokens <= row.tokens and row.frames <= max_frames
    return measured if applies or patches(measured) >= min(num_tokens, patches(policy)) else policy
