"""How encoder inputs are written, and which ones the paper's tables use."""

from __future__ import annotations

from pathlib import Path

import pytest

from encoder.budget import PlanTable
from encoder.errors import ConfigError
from training.evaluation.encoder_input import EncoderInput, from_plan_table, unmasked
from training.evaluation.frozen_encoder import pooling_head


@pytest.mark.parametrize("text", ["8x224", "16x168:1024", "4x56:9/random", "24x252:512+vid-tldr"])
def test_inputs_read_back(text: str) -> None:
    shown = EncoderInput.parse(text)
    assert str(shown) == text
    assert EncoderInput.from_dict(shown.to_dict()) == shown


@pytest.mark.parametrize(
    "text", ["", "8", "8x", "0x224", "8x224:0", "8x224/best", "8x224+vid-tldr", "8x224:-1"]
)
def test_wrong_inputs(text: str) -> None:
    with pytest.raises(ConfigError):
        EncoderInput.parse(text)


def test_inputs_of_the_paper(tmp_path: Path) -> None:
    assert [str(s) for s in unmasked((2048, 1024, 512), 224, 14)] == [
        "8x224:2048",
        "4x224:1024",
        "2x224:512",
    ]
    (tmp_path / "plan.json").write_text('[{"tokens": 1024, "frames": 16, "resolution": 168}]')
    [plus] = from_plan_table(PlanTable.read(tmp_path / "plan.json"))
    assert plus.label == "1024+ (16x168:1024)"
    assert [pooling_head(keep, 3) for keep in (None, 3072, 2048, 1024, 512)] == [0, 0, 1, 2, 2]
    assert (pooling_head(512, 2), pooling_head(512, 1)) == (1, 0)
