"""The list of stock models."""

from __future__ import annotations

import pytest

from llm_bridge.towers.catalog import CATALOG, PER_PARAMETER, table
from llm_bridge.towers.stock import kinds


def test_every_kind_is_listed_and_every_model_is_of_a_kind() -> None:
    assert {entry.kind for entry in CATALOG} == set(kinds())
    assert len({entry.name for entry in CATALOG}) == len(CATALOG)


@pytest.mark.parametrize(
    ("memory_gib", "words"), [(80, "yes"), (10, "--quantize 4bit"), (14, "--quantize 8bit"), (4, "no")]
)
def test_what_fits_depends_on_the_memory(memory_gib: float, words: str) -> None:
    rows = {row["model"]: row for row in table(memory_gib)}
    assert rows["Qwen/Qwen3-VL-8B-Instruct"]["fits here"] == words


def test_smaller_precisions_take_less() -> None:
    for entry in CATALOG:
        sizes = [entry.memory_gib(name) for name in PER_PARAMETER]
        assert sizes == sorted(sizes, reverse=True)
