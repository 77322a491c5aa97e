"""Class heads for other classes: rows by name and by number."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from encoder.config import MICRO
from encoder.errors import CheckpointError, ConfigError, DataError
from encoder.fluxvit import FluxViT
from training.models.encoder_source import EncoderSource, read_head_map, slice_heads


def narrow(classes: int) -> FluxViT:
    sizes = {"embed_dim": 32, "depth": 2, "num_heads": 2, "pool_heads": 2, "clip_embed_dim": 16}
    return FluxViT(MICRO.replace(**sizes, num_classes=classes))


def test_all_three_heads_keep_their_rows() -> None:
    old = narrow(5)
    for number, head in enumerate(old.head):
        torch.nn.init.constant_(head.bias, number)
        head.weight.data += torch.arange(5.0)[:, None]
    sliced = slice_heads(old.state_dict(), [3, 0], 3)
    new = narrow(2)
    new.load_state_dict(sliced)
    for number in range(3):
        torch.testing.assert_close(new.head[number].weight, old.head[number].weight[[3, 0]])
        torch.testing.assert_close(new.head[number].bias, torch.full((2,), float(number)))


def test_settings_beside_weights_apply_or_are_refused(tmp_path: Path) -> None:
    old = narrow(5)
    old.config = old.config.replace(drop_path=0.1)
    old.save_pretrained(tmp_path)
    start = EncoderSource(init=str(tmp_path)).build()
    # What the last run dropped is no matter of this one.
    assert {block.drop_path.rate for block in start.blocks} == {0.0}
    settings = {"drop_path": 0.3, "gelu": "erf", "depth": 2}
    changed = EncoderSource(init=str(tmp_path), settings=settings).build()
    assert [block.drop_path.rate for block in changed.blocks] == [0.0, 0.3]
    assert changed.blocks[0].mlp.approximate == "none"
    assert torch.equal(changed.pos_embed, old.pos_embed)
    for wrong, word in (
        ({"settings": {"depth": 3}}, "encoder.settings.depth is 3"),
        ({"settings": {"num_classes": 9}}, "encoder.settings.num_classes is 9"),
        ({"size": "small"}, "encoder.size is 'small'"),
        ({"size": "huge"}, "encoder.size must be one of"),
    ):
        with pytest.raises(ConfigError, match=word):
            EncoderSource(init=str(tmp_path), **wrong).build()


def test_a_single_head_serves_all() -> None:
    weight = torch.arange(12.0).view(4, 3)
    sliced = slice_heads({"head.weight": weight, "head.bias": torch.arange(4.0), "x": weight}, [2], 3)
    assert set(sliced) == {"x", *(f"head.{n}.{k}" for n in range(3) for k in ("weight", "bias"))}
    torch.testing.assert_close(sliced["head.1.weight"], weight[[2]])


def test_maps_by_name_and_by_number(tmp_path: Path) -> None:
    (tmp_path / "k710.txt").write_text("zumba\nplaying guitar\narchery\n")
    assert read_head_map(tmp_path / "k710.txt", ["Archery", '"playing_guitar"']) == [2, 1]
    (tmp_path / "map.json").write_text("[2, 1]")
    assert read_head_map(tmp_path / "map.json", []) == [2, 1]
    with pytest.raises(DataError, match="the first is 'skiing'"):
        read_head_map(tmp_path / "k710.txt", ["archery", "skiing"])
    with pytest.raises(DataError, match="names of the new classes"):
        read_head_map(tmp_path / "k710.txt", [])
    (tmp_path / "bad.json").write_text('{"a": 1}')
    with pytest.raises(DataError, match="list of row numbers"):
        read_head_map(tmp_path / "bad.json", [])
    with pytest.raises(DataError, match="class map"):
        read_head_map(tmp_path / "nowhere.txt", [])


def test_rows_that_are_not_there_are_refused() -> None:
    with pytest.raises(CheckpointError, match="row 5 of a head that has 5 classes"):
        slice_heads(narrow(5).state_dict(), [0, 5], 3)
    with pytest.raises(CheckpointError, match=r"no head\.0\.weight"):
        slice_heads(narrow(0).state_dict(), [0], 3)
