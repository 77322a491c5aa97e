"""Token Optimization (supplement section 1.1): which frames and resolution are best at a fixed K.

The full grid measures every input. The linear search starts small, raises the frames until accuracy no longer
rises, then trades resolution for frames as long as that gains; it needs a fraction of the evaluations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from encoder.errors import ConfigError
from training.evaluation.metrics import Share

Cell = tuple[int, int]  # (frames, resolution)
Measure = Callable[[int, int], Share]


@dataclass(frozen=True)
class Grid:
    """Inputs that may be tried, ascending, in patches of `patch_size`.

    frames_per_cell: frames that one token spans. native: resolutions that need be no multiple of the patch.
    """

    frames: tuple[int, ...]
    resolutions: tuple[int, ...]
    patch_size: int = 14
    frames_per_cell: int = 1
    native: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("frames", "resolutions"):
            values = getattr(self, name)
            if not values or list(values) != sorted(set(values)) or values[0] < 1:
                raise ConfigError(f"{name} must be ascending numbers from 1, not {list(values)}.")
        if any(side % self.patch_size for side in self.resolutions if side not in self.native):
            raise ConfigError(f"Resolutions must be multiples of {self.patch_size}, the patch size.")

    @property
    def cells(self) -> list[Cell]:
        """All of them, row by row of one resolution."""
        return [(frames, side) for side in self.resolutions for frames in self.frames]

    def patches(self, cell: Cell) -> int:
        """Tokens of an input before selection."""
        return -(-cell[0] // self.frames_per_cell) * (cell[1] // self.patch_size) ** 2

    def unmasked(self, keep: int) -> list[Cell]:
        """Inputs of which nothing is dropped."""
        return [cell for cell in self.cells if self.patches(cell) <= keep]

    def start(self, keep: int) -> Cell:
        """Where the search begins: the fewest frames and, of the resolutions, the one whose input comes
        closest to K tokens without exceeding it (4 x 224 at 1024). Where even the lowest exceeds it, the
        highest, since the search only ever lowers the resolution."""
        frames = self.frames[0]
        fitting = [side for side in self.resolutions if self.patches((frames, side)) <= keep]
        return frames, max(fitting, default=self.resolutions[-1])


@dataclass
class Measured:
    """A measure that remembers: every cell is evaluated once; `cells` holds them in order of first use."""

    measure: Measure
    cells: dict[Cell, Share] = field(default_factory=dict)

    def __call__(self, cell: Cell) -> Share:
        if cell not in self.cells:
            self.cells[cell] = self.measure(*cell)
        return self.cells[cell]


@dataclass(frozen=True)
class SearchResult:
    """The best cell of a search, its share, and every cell it evaluated in order."""

    best: Cell
    share: Share
    path: tuple[Cell, ...]

    @property
    def evaluations(self) -> int:
        """How many cells were measured."""
        return len(self.path)


def best_cell(cells: dict[Cell, Share], grid: Grid) -> Cell:
    """The highest share; of equal ones the input with fewest tokens."""
    return max(cells, key=lambda cell: (cells[cell].value, -grid.patches(cell)))


def full_search(grid: Grid, measure: Measure) -> SearchResult:
    """Every cell."""
    measured = Measured(measure)
    for cell in grid.cells:
        measured(cell)
    best = best_cell(measured.cells, grid)
    return SearchResult(best, measured.cells[best], tuple(measured.cells))


def linear_search(
    grid: Grid,
    keep: int,
    measure: Measure,
    *,
    gain: float = 0.0,
    patience: int = 1,
    start: Cell | None = None,
) -> SearchResult:
    """Raise frames to the plateau, then lower the resolution while that, with more frames, still gains.

    gain: an accuracy counts as higher only from this much on (0.002 is 0.2 points). patience: steps without
    gain that end a climb. start: default as in `Grid.start`.
    """
    if gain < 0 or patience < 1:
        raise ConfigError("gain must not be negative, and patience at least 1.")
    measured = Measured(measure)
    first, side = start or grid.start(keep)
    if first not in grid.frames or side not in grid.resolutions:
        raise ConfigError(f"The search cannot start at {first}x{side}: the grid has no such input.")

    def climb(frames: int, side: int) -> Cell:
        """Best cell of a row from `frames` on, giving up after `patience` steps without gain."""
        best, idle = (frames, side), 0
        measured(best)
        for more in [count for count in grid.frames if count > frames]:
            if measured((more, side)).value > measured(best).value + gain:
                best, idle = (more, side), 0
            else:
                idle += 1
                if idle >= patience:
                    break
        return best

    best = climb(first, side)
    for lower in reversed([other for other in grid.resolutions if other < side]):
        challenger = climb(best[0], lower)
        if measured(challenger).value <= measured(best).value + gain:
            break
        best = challenger
    # What was measured on the way may be better by less than `gain`.
    best = best_cell(measured.cells, grid)
    return SearchResult(best, measured.cells[best], tuple(measured.cells))
