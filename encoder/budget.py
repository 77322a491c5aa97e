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
FEW_FRAMES = 8
LARGEST = 4  # times what a tower was trained with, of an input that was measured


class Media(Protocol):
    """What planning needs to know of a clip: `VideoInfo` and `Clip.info` both have it."""

    @property
    def duration_s(self) -> float: ...

    @property
    def frames(self) -> int | None: ...

    @property
    def kind(self) -> str: ...


@dataclass(frozen=True)
class InputSpace:
    """The inputs that a vision tower takes, from which a budget chooses.

    frames: counts, ascending. sides: pixels per side, ascending; where the tower keeps a video's aspect, of
    the square of the same area. cell: pixels per side of what becomes one token. frames_per_cell: frames that
    one token spans. least_per_frame: tokens that a sampled frame is worth, or fewer frames are sampled.
    most_fps: of sampling, though never below `FEW_FRAMES` frames; None: any. tile: above so many pixels a
    side, then the longer one, a picture is looked at in tiles of that size and once as a whole; 0: never.
    image: the inputs of a still image, where they are others.
    """

    frames: tuple[int, ...]
    sides: tuple[int, ...]
    cell: int
    frames_per_cell: int = 1
    keeps_aspect: bool = False
    least_per_frame: int = 1
    most_fps: float | None = None
    tile: int = 0
    image: InputSpace | None = None

    @staticmethod
    def of(config: FluxViTConfig | InputSpace) -> InputSpace:
        """Of an encoder's trained ranges; an InputSpace as it is."""
        if isinstance(config, InputSpace):
            return config
        frames, sides = range(*config.frames_range), range(*config.resolution_range)
        return InputSpace(tuple(frames), tuple(sides), config.patch_size)

    def tokens(self, frames: int, side: int) -> int:
        """Tokens of a square input before selection."""
        if whole := self.whole_tokens(side):
            return (1 + (side // self.tile) ** 2) * whole
        return -(-frames // self.frames_per_cell) * (side // self.cell) ** 2

    def whole_tokens(self, side: int) -> int:
        """Tokens of the view of the whole that comes with tiles; none of them is ever dropped."""
        return (self.tile // self.cell) ** 2 if 0 < self.tile < side else 0

    def of_kind(self, media: Media) -> InputSpace:
        """The inputs that it takes of a medium."""
        return self.image if media.kind == "image" and self.image is not None else self

    def square(self, frames: int, side: int, keep: int) -> Plan:
        """The plan of a square input."""
        return Plan(frames, side, side, keep, self.cell, self.frames_per_cell)

    def size(self, side: int, media: Media) -> tuple[int, int]:
        """(height, width) in whole cells: a square, or about its area in the aspect of the medium."""
        width, height = getattr(media, "width", 0), getattr(media, "height", 0)
        if self.whole_tokens(side):
            return tiled_size(height or side, width or side, side, self.tile)
        if not self.keeps_aspect or not width or not height:
            return side, side
        cells = side // self.cell
        stretch = (width / height) ** 0.5
        # No more tokens than the square has, so that the price of a side is an upper bound.
        across = min(max(1, round(cells * stretch)), cells**2)
        down = max(1, min(round(cells / stretch), cells**2 // across))
        return down * self.cell, across * self.cell

    def most_frames(self, media: Media) -> int:
        """Frames that can be sampled of a medium."""
        if media.kind == "image":
            return 1
        most = media.frames or self.frames[-1]
        if self.most_fps is not None and media.kind == "video":
            most = min(most, max(FEW_FRAMES, round(self.most_fps * media.duration_s)))
        return most

    @property
    def full(self) -> tuple[int, int]:
        """The most frames and the largest side."""
        return self.frames[-1], self.sides[-1]


def scaled_size(height: int, width: int, longer: int) -> tuple[int, int]:
    """(height, width) of a picture whose longer side becomes `longer`; the shorter one is even."""
    shorter = int(longer * min(height, width) / max(height, width))
    shorter = max(1, shorter + shorter % 2)
    return (shorter, longer) if width >= height else (longer, shorter)


def tiled_size(height: int, width: int, longer: int, tile: int) -> tuple[int, int]:
    """(height, width) in whole tiles of a picture whose longer side becomes `longer`, some tiles."""
    height, width = scaled_size(height, width, longer)
    return -(-height // tile) * tile, -(-width // tile) * tile


@dataclass(frozen=True)
class Plan:
    """What was decided for one clip: sampled frames, input size in pixels, tokens to keep.

    patch_size: pixels per side of what becomes one token. frames_per_cell: frames that one token spans. tile:
    pixels per side of the tiles that an image is cut into; all tokens of the whole are kept beside; 0: none.
    """

    frames: int
    height: int
    width: int
    keep: int
    patch_size: int = 14
    frames_per_cell: int = 1
    tile: int = 0

    @property
    def grid(self) -> Grid:
        """Grid of the tokens before selection."""
        frames = -(-self.frames // self.frames_per_cell)
        if self.tile:
            side = self.tile // self.patch_size
            return Grid(frames, self.tiles[0] * side, self.tiles[1] * side)
        return Grid(frames, self.height // self.patch_size, self.width // self.patch_size)

    @property
    def tiles(self) -> tuple[int, int]:
        """Rows and columns of tiles; (0, 0) where there are none."""
        return (self.height // self.tile, self.width // self.tile) if self.tile else (0, 0)

    @property
    def whole_tokens(self) -> int:
        """Tokens of the view of the whole beside the tiles."""
        return (self.tile // self.patch_size) ** 2 if self.tile else 0

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
            rows = [PlanRow(**row) for row in json.loads(Path(path).read_text())]
            if any(type(value) is not int or value < 1 for row in rows for value in vars(row).values()):
                raise ValueError("its numbers must be whole ones from 1")
            return PlanTable.of(rows)
        except (OSError, ValueError, TypeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise BudgetError(f"Cannot read the plan table {path}: {reason}.") from error

    def check(self, space: InputSpace, name: str | Path) -> PlanTable:
        """Itself; raises BudgetError, which calls it `name`, for an input that a tower does not take."""
        for row in self.rows:
            whole_cells = len(space.sides) > 1 and row.resolution % space.cell == 0
            fits = row.resolution in space.sides or (
                whole_cells and row.resolution <= LARGEST * space.sides[-1]
            )
            if not fits or row.frames > LARGEST * space.frames[-1]:
                raise BudgetError(
                    f"The plan table {name} is not for this model, which does not take {row.frames} frames "
                    f"of {row.resolution} pixels: measure one with `python -m training.optimize_tokens`."
                )
        return self


def choose_input(num_tokens: int, max_frames: int, config: FluxViTConfig | InputSpace) -> tuple[int, int]:
    """(frames, resolution) for K = num_tokens within the model's trained ranges.

    The most frames, then the highest resolution, whose patches number between K and OVERSAMPLING * K; where
    the ranges hold none, the closest above K, or the largest there is.
    """
    space = InputSpace.of(config)
    worth = max(num_tokens // space.least_per_frame, space.frames[0])
    frame_counts = [count for count in space.frames if count <= min(max_frames, worth)] or [max_frames]
    pairs = [(frames, side) for frames in frame_counts for side in space.sides]

    def patches(pair: tuple[int, int]) -> int:
        return space.tokens(*pair)

    fitting = [pair for pair in pairs if num_tokens <= patches(pair) <= OVERSAMPLING * num_tokens]
    if fitting:
        return max(fitting)
    above = [pair for pair in pairs if patches(pair) > num_tokens]
    return min(above, key=patches) if above else max(pairs, key=patches)


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
        config: FluxViTConfig | InputSpace,
        *,
        table: PlanTable | None = None,
        predict_s: Callable[[Plan], float] | None = None,
    ) -> Plan:
        """Frames, resolution and K for one clip.

        media: anything with kind, duration_s and frames (None when unknown); a still image gets one frame and
        a clip never more frames than it has. predict_s: seconds to the first word under a plan; `Budget.auto`
        needs it and raises BudgetError without.
        """
        every = InputSpace.of(config)
        space = every.of_kind(media)
        table = table if space is every else None  # it was measured on videos
        max_frames = space.most_frames(media)
        most = min(max_frames, space.frames[-1]), space.sides[-1]
        full = self._input(space, media, most, max_frames, None)
        if self.tokens is None and self.seconds is None:
            return full

        def plan(num_tokens: int) -> Plan:
            frames, side = input_for(num_tokens, max_frames, space, table)
            if num_tokens < 2 * space.whole_tokens(side):  # the whole would leave the tiles too little
                side = space.tile
            return self._input(space, media, (frames, side), max_frames, num_tokens)

        if self.seconds is None:
            return plan(self.tokens or full.keep)
        if predict_s is None:
            raise BudgetError("Budget.auto needs a model whose speed is known: ask through VideoChat.")
        return _within(self.seconds, full.keep, plan, predict_s)

    def _input(
        self,
        space: InputSpace,
        media: Media,
        chosen: tuple[int, int],
        max_frames: int,
        num_tokens: int | None,
    ) -> Plan:
        """The plan of (frames, side), or of this budget's own ones; num_tokens=None keeps every token."""
        frames, side = min(self.frames or chosen[0], max_frames), self.resolution or chosen[1]
        tile = space.tile if space.whole_tokens(side) else 0
        unit = tile or space.cell
        if side < space.cell or (side % unit and side not in space.sides):
            raise BudgetError(f"A resolution must be a multiple of {unit} pixels, not {side}.")
        plan = Plan(frames, *space.size(side, media), 1, space.cell, space.frames_per_cell, tile)
        patches = plan.grid.size
        if num_tokens is None:
            return replace(plan, keep=patches)
        return replace(plan, keep=min(max(1, num_tokens - plan.whole_tokens), patches))


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


def input_for(
    num_tokens: int, max_frames: int, config: FluxViTConfig | InputSpace, table: PlanTable | None
) -> tuple[int, int]:
    """(frames, resolution) for K = num_tokens: what was measured for them, else the policy's.

    Where the table does not apply (K beyond its last row, or a clip with fewer frames than the row needs) its
    input still serves if it has K patches, or no fewer than the policy's.
    """
    space = InputSpace.of(config)
    policy = choose_input(num_tokens, max_frames, space)
    if table is None:
        return policy
    row = table.lookup(num_tokens)
    measured = min(row.frames, max_frames), row.resolution

    def patches(size: tuple[int, int]) -> int:
        return space.tokens(*size)

    applies = num_tokens <= row.tokens and row.frames <= max_frames
    return measured if applies or patches(measured) >= min(num_tokens, patches(policy)) else policy
