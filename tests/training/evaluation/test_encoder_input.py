"""How encoder inputs are written, and which ones the paper's tables use."""

from __future__ import annotations

from pathlib import Path

import pytest

from encoder.budget import PlanTable
from encoder.config import FluxViTConfig
from encoder.errors import ConfigError
from training.evaluation.encoder_input import EncoderInput, from_plan_table, unmasked
from training.evaluation.frozen_encoder import class_pools

MERGED = ["24x252:512+vid-tldr/sum", "24x224:512+vid-tldr=1536,1024,512", "8x56:9+vid-tldr/sum=20,9"]


@pytest.mark.parametrize("text", ["8x224", "16x168:1024", "4x56:9/random", "24x252:512+vid-tldr", *MERGED])
def test_inputs_read_back(text: str) -> None:
    shown = EncoderInput.parse(text)
    assert str(shown) == text
    assert EncoderInput.from_dict(shown.to_dict()) == shown


@pytest.mark.parametrize(
    "text",
    [
        *("", "8", "8x", "0x224", "8x224:0", "8x224/best", "8x224+vid-tldr", "8x224:-1"),
        *("8x224:512+vid-tldr/mean", "8x224:512+vid-tldr=", "8x224:512+vid-tldr=1024,600"),
    ],
)
def test_wrong_inputs(text: str) -> None:
    with pytest.raises(ConfigError):
        EncoderInput.parse(text)


def test_merging_as_published_and_as_asked() -> None:
    assert EncoderInput.parse("24x224:512+vid-tldr").merging(14) == ((1024, 512, 512, 512), "branch")
    asked = EncoderInput.parse("12x224:512+vid-tldr/sum=1536,1024,512")
    assert asked.merging(14) == ((1536, 1024, 512), "sum")
    with pytest.raises(ConfigError, match="no fewer than half of its 6144 tokens, not 1536"):
        EncoderInput.parse("24x224:512+vid-tldr=1536,1024,512").merging(14)


def test_inputs_of_the_paper(tmp_path: Path) -> None:
    assert [str(s) for s in unmasked((2048, 1024, 512), 224, 14)] == [
        "8x224:2048",
        "4x224:1024",
        "2x224:512",
    ]
    (tmp_path / "plan.json").write_text('[{"tokens": 1024, "frames": 16, "resolution": 168}]')
    [plus] = from_plan_table(PlanTable.read(tmp_path / "plan.json"))
    assert plus.label == "1024+ (16x168:1024)"


def test_class_heads_serve_the_counts_they_were_trained_at() -> None:
    counts = (None, 3072, 2048, 1024, 512)
    released = class_pools(FluxViTConfig())
    assert [released.nearest(keep) for keep in counts] == [0, 0, 1, 2, 2]
    assert [class_pools(FluxViTConfig(num_pools=n)).nearest(512) for n in (1, 2)] == [0, 1]
    small = class_pools(FluxViTConfig(head_counts=(192, 128, 64)))
    assert [small.nearest(keep) for keep in (None, 192, 120, 60)] == [0, 0, 1, 2]
    assert class_pools(FluxViTConfig(head_counts=(0, 2048, 0))).nearest(512) == 1
