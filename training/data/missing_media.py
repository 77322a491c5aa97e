"""Examples that could not be used: named in a file, counted, and too many of them stop the run."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

from encoder.checkpoint import save_json
from encoder.errors import DataError

TOLERATED = 10  # a handful of broken files never stops a run, however short it still is


class MissingMedia:
    """Counts what was tried and what could not be read.

    The first rank writes `out/missing.json` ({id: reason}), another one `out/missing.rank1.json`, so that no
    two processes write one file. What an interrupted run found is kept in the file, but only this run's
    share can stop it. Safe to use from many threads.
    """

    def __init__(self, out: Path, share: float) -> None:
        rank = int(os.environ.get("RANK", "0"))
        self.path = out / ("missing.json" if rank == 0 else f"missing.rank{rank}.json")
        self.share = share
        self.tried = 0
        self.reasons: dict[str, str] = {}
        self._numbers: set[int] = set()
        self._lock = threading.Lock()

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
                save_json({**self._before(), **self.reasons}, self.path)
            broken = len(self.reasons)
        if broken > max(TOLERATED, self.share * self.tried):
            raise DataError(
                f"{broken} of {self.tried} examples cannot be used, more than the allowed share of "
                f"{self.share:g}: see {self.path}; the last is {name}: {reason}"
            )

    def _before(self) -> dict[str, str]:
        try:
            found = json.loads(self.path.read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}
