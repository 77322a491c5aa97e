"""Chat stage 1 as one of several processes: `python -m tests.training.chat_processes OUT ARGUMENTS...`.

Writes the gradients of the first step, before they are clipped, to OUT, and which ranks kept the recipe to
OUT.ranks. With SHARDED set, the processes share
out the model as training/recipes/accelerate/fsdp.yaml does.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from encoder.checkpoint import save_tensors
from tests.training.trainer.toy_stage import shard_on_cpu
from training import chat_stage1
from training.trainer import loop
from training.trainer.distributed import whole


def keep_gradients(path: Path) -> None:
    """Note what the first step's gradients are."""
    update = loop._Run.update

    def noting(run, *args, **kwargs):
        found = {n: whole(p.grad) for n, p in run._plain.named_parameters() if p.grad is not None}
        if run.accelerator.is_main_process and not path.exists():
            save_tensors(found, path)
        return update(run, *args, **kwargs)

    loop._Run.update = noting


def note_who_keeps_the_recipe(path: Path) -> None:
    """Note the ranks, one a line."""
    keep = loop.keep_recipe

    def noting(recipe) -> None:
        with path.open("a") as file:
            file.write(f"{os.environ['RANK']}\n")
        keep(recipe)

    loop.keep_recipe = noting


if __name__ == "__main__":
    keep_gradients(Path(sys.argv[1]))
    note_who_keeps_the_recipe(Path(f"{sys.argv[1]}.ranks"))
    if os.environ.get("SHARDED"):
        shard_on_cpu(["Block"])
    sys.exit(chat_stage1.main(sys.argv[2:]))
