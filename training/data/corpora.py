"""The paper's corpora: what each is, how many clips to expect, and how to obtain it (corpora.yaml)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from encoder.errors import ConfigError
from training.trainer.recipe import build

TOLERANCE = 0.05  # copies of web corpora differ by a few per cent


@dataclass(frozen=True)
class Corpus:
    """One corpus. clips: media per split; gb: size on disk, None where it depends on the copy."""

    what: str
    media: str
    clips: dict[str, int]
    classes: int | None
    gb: float | None
    format: str
    stages: tuple[str, ...]
    obtain: str
    licence: str


@cache
def corpora() -> dict[str, Corpus]:
    """All corpora by name."""
    path = Path(__file__).with_name("corpora.yaml")
    return {
        name: build(Corpus, values, f"{path.name}: {name}")
        for name, values in yaml.safe_load(path.read_text()).items()
    }


def compare(name: str, found: int) -> str:
    """What a count says about a corpus: which split it is, or how far it is from the nearest one.

    Raises ConfigError for a corpus that is not in the list.
    """
    known = corpora()
    if name not in known:
        raise ConfigError(f"There is no corpus {name!r}: known are {', '.join(known)}.")
    share = {split: found / count for split, count in known[name].clips.items()}
    split = min(share, key=lambda split: max(share[split], 1 / max(share[split], 1e-9)))
    expected = known[name].clips[split]
    if abs(found - expected) <= TOLERANCE * expected:
        return f"as expected of {name}, {split} ({expected:,})"
    return f"{100 * found / expected:.3g} % of {name}, {split} ({expected:,})"
