"""Commands about training data.

    python -m training.data check training/recipes/chat_stage1.yaml
    python -m training.data check RECIPE datasets.0.data_root=/mnt/data --sample 200
    python -m training.data check RECIPE --speed
    python -m training.data corpora [NAME]

`check` looks for every file that a recipe's datasets name, decodes a sample of them, and prints what is
missing or unreadable: exit status 0 when all is there or what is missing stays within the recipe's
`max_missing`, 2 otherwise.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from encoder.errors import ConfigError
from training.command_line import command_parser, run_command
from training.data.check import check_dataset, find_datasets, report, verdict
from training.data.corpora import corpora
from training.data.speed import report_speed
from training.trainer.recipe import check_stage, read_values

ALLOWED = 0.01  # as the stages' own default


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = command_parser("training.data", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="is a recipe's data there and readable?")
    check.add_argument("recipe", metavar="RECIPE", help="a recipe of any stage")
    check.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change")
    check.add_argument("--sample", type=int, default=32, metavar="N", help="files to decode per dataset (32)")
    check.add_argument("--files", type=int, metavar="N", help="look for at most N files per dataset (all)")
    check.add_argument(
        "--speed", action="store_true", help="measure clips a second, against what an H100 would train on"
    )
    listing = commands.add_parser("corpora", help="the paper's corpora and how to obtain them")
    listing.add_argument("name", nargs="?", help="one of them, in full")
    return run_command(parser, run, argv)


def run(args: argparse.Namespace) -> int:
    """The subcommand; returns the exit status."""
    if args.command == "corpora":
        return list_corpora(args.name)
    return check_recipe(args.recipe, args.overrides, args.sample, args.files, speed=args.speed)


def check_recipe(
    recipe: str, overrides: Sequence[str], sample: int, most: int | None, *, speed: bool = False
) -> int:
    """Check all datasets of a recipe and print the table; returns the exit status."""
    from tqdm.auto import tqdm

    if sample < 0 or (most is not None and most < 1):
        raise ConfigError("--sample must be at least 0 and --files at least 1.")
    values = read_values(recipe, overrides)
    datasets = list(find_datasets(values))
    if not datasets:
        raise ConfigError(f"{recipe} names no dataset.")
    allowed = values.get("max_missing", ALLOWED)
    allowed = float(allowed) if isinstance(allowed, (int, float)) else ALLOWED
    stage = values.get("stage")
    if stage is not None:
        check_stage(stage, str(stage), recipe)
    findings = []
    for where, dataset in datasets:
        with tqdm(unit="file", leave=False, mininterval=0.5, disable=None) as bar:

            def tell(done: int, total: int, what: str, bar: tqdm = bar, where: str = where) -> None:
                bar.total, bar.desc = total, f"{where}: {what}"
                bar.update(done - bar.n)

            findings.append(check_dataset(where, dataset, sample, most, tell, stage))
    print(report(findings, allowed))
    if stage is None:
        print("\nThe recipe names no stage: labels, captions and answers were not looked for.")
    if speed:
        print("\n".join(report_speed(recipe, overrides, values, datasets, max(1, sample))))
    verdicts = [verdict(found, allowed) for found in findings]
    wrong = sum(word not in ("ok", "tolerable") for word in verdicts)
    print(
        f"\nNot fit for training: {wrong} of {len(findings)} (max_missing is {allowed:g})."
        if wrong
        else "\nAll datasets can be used."
    )
    return 2 if wrong else 0


def list_corpora(name: str | None) -> int:
    """Print the corpora, or one of them in full."""
    known = corpora()
    if name is not None:
        if name not in known:
            raise ConfigError(f"There is no corpus {name!r}: known are {', '.join(known)}.")
        for key, value in vars(known[name]).items():
            print(f"{key + ':':9} {value if isinstance(value, str) else json.dumps(value)}")
        return 0
    width = max(map(len, known))
    for key, corpus in known.items():
        clips = ", ".join(f"{split} {count:,}" for split, count in corpus.clips.items())
        print(f"{key:{width}}  {corpus.media}; {clips}\n{'':{width}}  {corpus.what}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
