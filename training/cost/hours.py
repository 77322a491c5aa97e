"""What a recipe costs: multiply-accumulates of the whole run, and GPU hours at a stated utilisation.

    python -m training.cost.hours training/recipes/umt_small.yaml
    python -m training.cost.hours training/recipes/chat_lora.yaml --samples 600000 --gpus 16 --json

Counted by formula from the recipe: no weights, no data, no network, no GPU. The default is eight A100, whose
published bf16 peak is 312 TFLOPS. Decoding, augmentation, evaluation and the optimiser are not counted:
whether the disk and the CPUs keep up decides how much of the peak a run reaches.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from encoder.errors import ConfigError, FluxChatError
from training.cost.recipe_facts import Given
from training.cost.workload import Workload, read_workload

OPERATIONS = 2  # per multiply-accumulate, as TFLOPS count
GIGA = 1e9


@dataclass(frozen=True)
class Machine:
    """gpus of `tflops` each, of which `utilisation` is reached."""

    gpus: int = 8
    tflops: float = 312.0
    utilisation: float = 0.35

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise ConfigError(f"--gpus must be at least 1, not {self.gpus}.")
        if not 0 < self.tflops < math.inf:
            raise ConfigError(f"--tflops must be positive, not {self.tflops}.")
        if not 0 < self.utilisation <= 1:
            raise ConfigError(f"--utilisation must lie above 0 and up to 1, not {self.utilisation}.")

    def gpu_hours(self, macs: float) -> float:
        """Hours on one GPU."""
        return OPERATIONS * macs / (self.tflops * 1e12 * self.utilisation) / 3600


def facts(recipe: Path, work: Workload, machine: Machine) -> dict[str, Any]:
    """Everything the table shows, as plain values."""
    hours = machine.gpu_hours(work.macs)
    return {
        "recipe": str(recipe),
        "stage": work.stage,
        "encoder": {"embed_dim": work.encoder.embed_dim, "depth": work.encoder.depth},
        "epochs": work.epochs,
        "samples_per_epoch": work.samples,
        "batch_size": work.batch,
        "steps": work.steps,
        "parts": [
            {
                "samples": share.kind,
                "part": part.name,
                "forward_gmacs": part.forward / GIGA,
                "backward_gmacs": part.backward / GIGA,
                "share": part.total * share.samples / work.samples / work.macs_per_sample,
            }
            for share in work.shares
            for part in share.parts
        ],
        "gmacs_per_sample": work.macs_per_sample / GIGA,
        "macs": work.macs,
        "gpus": machine.gpus,
        "tflops": machine.tflops,
        "utilisation": machine.utilisation,
        "gpu_hours": hours,
        "hours": hours / machine.gpus,
        "notes": list(work.notes),
    }


def table(found: dict[str, Any]) -> str:
    """The facts as text."""
    width, depth = found["encoder"]["embed_dim"], found["encoder"]["depth"]
    lines = [
        f"{found['recipe']}: {found['stage']}, encoder {width} wide, {depth} blocks",
        f"{found['samples_per_epoch']:,} samples x {found['epochs']:g} epochs = {found['steps']:,} steps of "
        f"{found['batch_size']:,}",
        "",
    ]
    head = ("sample", "part", "forward", "backward", "of the run")
    rows = [
        (
            row["samples"],
            row["part"],
            f"{row['forward_gmacs']:,.2f}",
            f"{row['backward_gmacs']:,.2f}",
            f"{row['share']:.1%}",
        )
        for row in found["parts"]
    ]
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    for row in (head, tuple("-" * width for width in widths), *rows):
        cells = [
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells))
    lines += [
        "Giga multiply-accumulates of one sample; " + f"{found['gmacs_per_sample']:,.2f} on average.",
        "",
        f"{found['macs']:.3g} multiply-accumulates in all: {_hours(found['gpu_hours'])} GPU hours at "
        f"{100 * found['utilisation']:g} % of {found['tflops']:g} TFLOPS, {_hours(found['hours'])} hours on "
        f"{found['gpus']} GPU{'s' if found['gpus'] > 1 else ''}.",
        *(f"Taken for granted: {note}." for note in found["notes"]),
    ]
    return "\n".join(lines)


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.2g}"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m training.cost.hours",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="a recipe of any stage")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change")
    parser.add_argument("--samples", type=int, metavar="N", help="samples in an epoch (the corpora's counts)")
    parser.add_argument("--encoder", metavar="SIZE", help="size of an encoder whose weights are not here")
    parser.add_argument("--text-tokens", type=int, metavar="N", help="tokens of one sample's text")
    parser.add_argument("--gpus", type=int, default=Machine.gpus, help="how many (8)")
    parser.add_argument("--tflops", type=float, default=Machine.tflops, help="peak of one GPU (312)")
    parser.add_argument(
        "--utilisation", type=float, default=Machine.utilisation, help="share of the peak reached (0.35)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_intermixed_args(argv)
    try:
        machine = Machine(args.gpus, args.tflops, args.utilisation)
        given = Given(args.samples, args.encoder, args.text_tokens)
        found = facts(args.recipe, read_workload(args.recipe, args.overrides, given), machine)
    except FluxChatError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(found, indent=2) if args.json else table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
