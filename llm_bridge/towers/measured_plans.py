"""Where the measured plan table of a stock video model lies: in its folder; of a hub's, in the cache.

A hub model's own folder is a cache of the hub's client, which may be emptied or shared, so nothing is written
there. A table belongs to a stage too: what is best after the encoder need not be before it.
"""

from __future__ import annotations

import os
from pathlib import Path

from encoder.budget import InputSpace, PlanTable
from llm_bridge.assets.cache_dir import cache_dir
from llm_bridge.towers.tower import Stage


def plan_file(name: str | os.PathLike[str], stage: Stage) -> Path:
    """The file of a model's plan table, there or not. name: folder or hub id."""
    end = "" if stage == "after" else f".{stage}"
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder / f"plan_table{end}.json"
    return cache_dir() / "plans" / f"{str(name).replace('/', '--')}{end}.json"


def measured_plan(name: str | os.PathLike[str], stage: Stage, space: InputSpace) -> PlanTable | None:
    """The plan table that was installed for a model, or None; raises BudgetError for a damaged one."""
    path = plan_file(name, stage)
    return PlanTable.read(path).check(space, path) if path.is_file() else None
