"""A journal of finished items, which survives a stop and is shared by processes.

Items are worked on in blocks of fixed composition. Processes of `accelerate launch` take blocks in turn and
write a journal each; every process reads all of them. So the figures are the same for any number of
processes (which must see one folder), and a second run does only what the first one lacks.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from encoder.errors import DataError

Row = dict[str, Any]


@dataclass(frozen=True)
class Sharing:
    """Which of how many processes this is; one unless started by `accelerate launch` or torchrun."""

    count: int = field(default_factory=lambda: int(os.environ.get("WORLD_SIZE", "1")))
    index: int = field(default_factory=lambda: int(os.environ.get("RANK", "0")))

    @property
    def first(self) -> bool:
        """Whether this process prints and writes the result."""
        return self.index == 0

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            from accelerate import PartialState

            PartialState(cpu=not torch.accelerator.is_available()).wait_for_everyone()


class Journal:
    """Finished items by id in JSON lines, beside the result file. Lines cut short by a stop are dropped.

    header: all that items depend on. Raises DataError when the folder holds items of another evaluation.
    out: the result file; None keeps everything in memory.
    """

    def __init__(self, out: Path | None, header: Mapping[str, Any], sharing: Sharing | None = None) -> None:
        self.sharing = sharing or Sharing()
        self.rows: dict[str, Row] = {}
        self._header = json.loads(json.dumps(header))
        self._folder = None if out is None else out.with_name(out.stem + ".journal")
        if self._folder is None:
            if self.sharing.count > 1:
                raise DataError("Several processes share their items through files: give --out.")
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        self.own = self._folder / f"{self.sharing.index}.jsonl"
        if self.own.exists():
            _drop_cut_line(self.own)
        self.reload()
        if not self.own.exists():
            self._append({"header": self._header})

    def reload(self) -> None:
        """Read what all processes have written."""
        if self._folder is None:
            return
        for path in sorted(self._folder.glob("*.jsonl")):
            header: Any = None
            for line in path.read_text().splitlines():
                try:
                    row = json.loads(line)
                except ValueError:
                    continue
                if "header" in row:
                    header = row["header"]
                    if header != self._header:
                        differing = sorted(
                            key
                            for key in {*header, *self._header}
                            if header.get(key) != self._header.get(key)
                        )
                        raise DataError(
                            f"{self._folder} holds another evaluation (other {', '.join(differing)}): "
                            "choose another --out, or delete it."
                        )
                elif "missing" not in row or row["id"] not in self.rows:
                    self.rows[row["id"]] = row

    def done(self, name: str) -> bool:
        """Whether an item needs no more work; what was missing is looked for again."""
        return name in self.rows and "missing" not in self.rows[name]

    def add(self, rows: Sequence[Row]) -> None:
        """Note finished items, each {"id": ..., ...}."""
        for row in rows:
            if self.rows.get(row["id"]) == row:
                continue
            self.rows[row["id"]] = row
            if self._folder is not None:
                self._append(row)

    def _append(self, row: Mapping[str, Any]) -> None:
        with open(self.own, "a") as file:
            file.write(json.dumps(row) + "\n")


def _drop_cut_line(path: Path) -> None:
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        with open(path, "r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)
    if not path.stat().st_size:
        path.unlink()


def run_blocks(
    ids: Sequence[str],
    work: Callable[[Sequence[int]], Sequence[Row]],
    journal: Journal,
    *,
    block: int | Sequence[range],
    label: str,
) -> list[Row]:
    """Rows of all items in order, from the journal where it has them, else from `work`.

    ids: one per item, all different (DataError). block: how many items go together, or which. work: numbers
    of a block's items -> a row for each, whose "id" is set here; it is always given whole blocks, so that a
    row never depends on what was done before.
    """
    from tqdm.auto import tqdm

    if len(set(ids)) != len(ids):
        twice = next(name for position, name in enumerate(ids) if name in set(ids[:position]))
        raise DataError(f"The annotations name {twice!r} twice: items need names of their own.")
    blocks = block
    if isinstance(blocks, int):
        blocks = [range(start, min(start + blocks, len(ids))) for start in range(0, len(ids), blocks)]
    sharing = journal.sharing
    mine = [
        numbers
        for place, numbers in enumerate(blocks)
        if place % sharing.count == sharing.index and not all(journal.done(ids[n]) for n in numbers)
    ]
    for numbers in tqdm(mine, desc=label, unit="block", disable=not sharing.first or not mine):
        rows = work(numbers)
        journal.add([{"id": ids[n], **row} for n, row in zip(numbers, rows, strict=True)])
    sharing.wait()
    journal.reload()
    missing = [name for name in ids if name not in journal.rows]
    if missing:
        raise DataError(
            f"{len(missing)} items were not worked on, {missing[0]!r} first: do all processes see one folder?"
        )
    return [journal.rows[name] for name in ids]
