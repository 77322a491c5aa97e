"""The nouns of the synthetic world: what each sprite is called, its category, and who may see it."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Literal

NOUNS_FILE = Path(__file__).parent / "nouns.csv"

NounSplit = Literal["train", "unseen"]


@dataclass(frozen=True)
class Noun:
    """One thing of the world.

    `code` names the sprite (Unicode code points in hex, joined by "-"), `name` is what people say ("dog"),
    `category` one of about a dozen kinds, `split` is "unseen" for nouns that training never shows.
    """

    code: str
    name: str
    plural: str
    category: str
    split: NounSplit

    @property
    def indefinite(self) -> str:
        """The noun with its article: "a dog", "an elephant"."""
        return with_article(self.name)


Nouns = Mapping[str, Noun]  # by code


def with_article(name: str) -> str:
    """`name` after "a" or "an", by the sound of its first letters ("a unicorn")."""
    vowel = name[0] in "aeiou" and not name.startswith(("uni", "eu", "use"))
    return f"{'an' if vowel else 'a'} {name}"


def load_nouns(path: Path = NOUNS_FILE) -> tuple[Noun, ...]:
    """All nouns of the committed list, in file order."""
    with path.open(newline="", encoding="utf-8") as file:
        return tuple(
            Noun(
                row["code"],
                row["noun"],
                row["plural"],
                row["category"],
                "unseen" if row["split"] == "unseen" else "train",
            )
            for row in csv.DictReader(file)
        )


def of_split(nouns: tuple[Noun, ...], split: NounSplit, limit: int | None = None) -> tuple[Noun, ...]:
    """The nouns of a split, taken in turn from every category so that a limit keeps all categories."""
    by_category: dict[str, list[Noun]] = {}
    for noun in nouns:
        if noun.split == split:
            by_category.setdefault(noun.category, []).append(noun)
    turns = zip_longest(*by_category.values())
    mixed = [noun for turn in turns for noun in turn if noun is not None]
    return tuple(mixed[:limit])
