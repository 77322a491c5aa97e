"""The one loader: which example stands where in an epoch, and which takes its place when it cannot be used.

    loader = Loader(source, seed=0, out="runs/mine", stride=8, need="caption")
    example, clip = loader.usable(epoch, position, lambda example: example.media.load(8, 224))

Everything is a function of the seed, the position and which examples can be used, so ranks, threads and a
resumed run agree.
"""

from __future__ import annotations

import atexit
import json
import math
import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from encoder.checkpoint import save_json
from encoder.errors import DataError, VideoError
from training.data.examples import Example, ExampleSource, Need

T = TypeVar("T")
TOLERATED = 10  # a handful of broken files never stops a run, however short it still is


class Loader:
    """Examples of a source by their place in an epoch.

    stride: places between an example that cannot be used and the one tried instead, so that the batch has
    none twice. window: see `epoch_order`; None asks the source. need: examples without it cannot be used.
    max_missing: share of such examples that stops the run. Raises DataError for an empty source.
    """

    def __init__(
        self,
        source: ExampleSource,
        seed: int,
        *,
        out: str | Path,
        stride: int,
        max_missing: float = 0.01,
        window: int | None = None,
        need: Need | None = None,
    ) -> None:
        if not len(source):
            raise DataError("The dataset holds no examples.")
        self.source, self.need = source, need
        self.missing = MissingMedia(Path(out), max_missing)
        self._seed, self._stride = seed, stride
        self._window = window if window is not None else getattr(source, "window", None)
        self._ordered: tuple[int, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.source)

    def order(self, epoch: int) -> Tensor:
        """Numbers of the examples in the order of an epoch, int64 (count,)."""
        ordered = self._ordered
        if ordered is None or ordered[0] != epoch:
            ordered = (epoch, epoch_order(len(self), self._seed, epoch, self._window))
            self._ordered = ordered
        return ordered[1]

    def usable(
        self, epoch: int, position: int, use: Callable[[Example], T], number: int | None = None
    ) -> tuple[Example, T]:
        """The example at a place of the epoch (or `number`), or the next that can be used, and what `use`
        makes of it.

        use: raises VideoError or OSError for an example that cannot be used, which is named in the run's
        missing.json. Raises DataError when there are too many of those.
        """
        order = self.order(epoch)
        turns = len(order) // math.gcd(
            self._stride, len(order)
        )  # until the strides are back where they began
        name = problem = ""
        for attempt in range(len(order)):
            if attempt or number is None:
                number = int(order[(position + attempt * self._stride + attempt // turns) % len(order)])
            self.missing.count()
            name = f"number {number}"
            try:
                example = self.source[number]
                name = example.id
                if lacking := example.lacks(self.need):
                    raise VideoError(lacking)
                return example, use(example)
            except (VideoError, OSError) as error:  # a disk may fail between two looks
                problem = str(error)
                self.missing.report(number, name, problem)
        raise DataError(
            f"None of the {len(order)} examples can be used, {name!r} since: {problem} "
            f"All are in {self.missing.path}."
        )


def epoch_order(count: int, seed: int, epoch: int, window: int | None = None) -> Tensor:
    """Numbers 0..count-1 in the order of an epoch, int64 (count,).

    window: shuffle blocks of this many neighbours and then inside each block, so that a tar shard or a disk
    is read block by block; None shuffles everything.
    """
    generator = torch.Generator().manual_seed(seed * 7919 + epoch)
    if window is None or window >= count:
        return torch.randperm(count, generator=generator)
    blocks = -(-count // window)
    parts = []
    for block in torch.randperm(blocks, generator=generator).tolist():
        size = min(window, count - block * window)
        parts.append(block * window + torch.randperm(size, generator=generator))
    return torch.cat(parts)


class MissingMedia:
    """Counts what was tried and what could not be read.

    The first rank writes `out/missing.json` ({id: reason}), another one `out/missing.rank1.json`, so that no
    two processes write one file. What an interrupted run found is kept in the file, but only this run's
    share can stop it. The file is written for each of the first few, then once they are a tenth more, and at
    the end. Safe to use from many threads.
    """

    def __init__(self, out: Path, share: float) -> None:
        rank = int(os.environ.get("RANK", "0"))
        self.path = out / ("missing.json" if rank == 0 else f"missing.rank{rank}.json")
        self.share = share
        self.tried = 0
        self.reasons: dict[str, str] = {}
        self._numbers: set[int] = set()
        self._written = 0
        self._lock = threading.Lock()
        atexit.register(_flush, weakref.ref(self))

    def count(self) -> None:
        """One more was tried."""
        with self._lock:
            self.tried += 1

    def report(self, number: int, name: str, reason: str) -> None:
        """Example `number` cannot be used; raises DataError when they have become too many.

        name: what the file calls it; several of one name are told apart by their numbers.
        """
        with self._lock:
            if number not in self._numbers:
                self._numbers.add(number)
                name = name if name not in self.reasons else f"{name} (number {number})"
                self.reasons[name] = reason
            broken = len(self.reasons)
            too_many = broken > max(TOLERATED, self.share * self.tried)
            if too_many or broken <= TOLERATED or broken >= 1.1 * self._written:
                self._write()
        if too_many:
            raise DataError(
                f"{broken} of {self.tried} examples cannot be used, more than the allowed share of "
                f"{self.share:g}: see {self.path}; the last is {name}: {reason}"
            )

    def flush(self) -> None:
        """Write what the file lacks."""
        with self._lock:
            self._write()

    def _write(self) -> None:
        if len(self.reasons) > self._written:
            save_json({**self._before(), **self.reasons}, self.path)
            self._written = len(self.reasons)

    def _before(self) -> dict[str, str]:
        try:
            found = json.loads(self.path.read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}


def _flush(missing: weakref.ref[MissingMedia]) -> None:
    """At the end of the process, of whose folder a test may have disposed."""
    if (kept := missing()) is not None and kept.path.parent.is_dir():
        kept.flush()
