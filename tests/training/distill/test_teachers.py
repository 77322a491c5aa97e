"""Teachers: InternVideo2 against the official outputs and files, and targets kept on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from encoder.errors import BudgetError, CheckpointError, ConfigError
from encoder.positions import interpolate
from encoder.tokens import Grid
from tests.training.distill.tiny_teachers import NARROW, golden, internvideo2, write_stage2
from training.distill.internvideo2 import (
    InternVideo2,
    InternVideo2Config,
    InternVideo2Source,
    InternVideo2Teacher,
    load_internvideo2,
)
from training.distill.teachers import TargetCache, spaced_layers, weights_digest


def everything(clips: int, grid: Grid) -> torch.Tensor:
    return torch.arange(grid.size).expand(clips, grid.size)


def test_internvideo2_equals_the_official_teacher() -> None:
    tensors, values, shapes = golden()
    model = internvideo2()
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == shapes
    pixels = torch.from_numpy(np.random.default_rng(21).standard_normal((2, 3, 4, 56, 56)).astype(np.float32))
    teacher = InternVideo2Teacher(model, values["clip_return_index"])
    grid = Grid(4, 4, 4)
    chosen = everything(2, grid)
    found = teacher.targets(teacher.observe(pixels, grid, chosen), grid, chosen)
    for layer, expected in zip(found.layers, tensors["teacher/z"], strict=True):
        torch.testing.assert_close(layer, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.final, tensors["teacher/final"], atol=1e-5, rtol=0)
    torch.testing.assert_close(found.attention, tensors["teacher/attn"], atol=1e-6, rtol=0)


def test_the_full_model_has_the_official_names_and_size() -> None:
    with torch.device("meta"):
        model = InternVideo2(InternVideo2Config())
    state = model.state_dict()
    _, _, tiny = golden()
    # The tiny case has 8 blocks of 13 tensors, the 1B model 40.
    assert len(state) == len(tiny) + 32 * 13 == 538
    assert set(tiny) <= set(state)
    assert state["pos_embed"].shape == (1, 8 * 16 * 16 + 1, 1408)
    assert state["blocks.39.mlp.fc1.weight"].shape == (6144, 1408)
    assert state["clip_projector.cross_attn.proj.weight"].shape == (768, 1408)
    assert sum(value.numel() for value in state.values()) == 1_020_708_608


def test_layer_pairs_are_those_of_the_distillation() -> None:
    student, teacher = spaced_layers(12, 6, 1), spaced_layers(40, 6, 3.34)
    assert list(zip(student, teacher, strict=True)) == [
        (6, 23),
        (7, 26),
        (8, 29),
        (9, 33),
        (10, 36),
        (11, 39),
    ]
    for wrong in [(6, 7, 1), (12, 6, 0.5), (12, 0, 1)]:
        with pytest.raises(ConfigError):
            spaced_layers(*wrong)


def test_chosen_tokens_carry_their_own_positions() -> None:
    teacher = InternVideo2Teacher(internvideo2(NARROW), (1, 3))
    grid, generator = Grid(6, 6, 6), torch.Generator().manual_seed(0)
    pixels = torch.randn(2, 3, 6, 84, 84, generator=generator)
    chosen = torch.stack(
        [torch.randperm(grid.size, generator=generator)[:50].sort().values for _ in range(2)]
    )
    shuffle = torch.randperm(50, generator=generator)
    plain, mixed = (teacher.observe(pixels, grid, some) for some in (chosen, chosen[:, shuffle]))
    # Attention knows no order: shuffled tokens give shuffled outputs only if positions moved with them.
    torch.testing.assert_close(mixed["attention"], plain["attention"][:, shuffle], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        mixed["layer_1"][:, 1:], plain["layer_1"][:, 1:][:, shuffle], atol=1e-5, rtol=0
    )
    torch.testing.assert_close(mixed["final"], plain["final"], atol=1e-5, rtol=0)
    # And tokens that were not chosen have no part in the rest.
    outside = pixels.clone()
    frame = int(next(i for i in range(6) if i * 36 not in chosen[0]))
    outside[0, :, frame, :14, :14] += 100
    torch.testing.assert_close(teacher.observe(outside, grid, chosen)["final"], plain["final"])


def test_grids_of_equal_size_and_other_shape_have_other_positions() -> None:
    model = internvideo2(NARROW)
    rows = model.pos_embed[0, 1:]
    for grid in (Grid(4, 4, 4), Grid(1, 8, 8), Grid(16, 2, 2)):
        with torch.no_grad():
            out = model(torch.zeros(1, 3, grid.frames, 14 * grid.height, 14 * grid.width), None, (0,))
            bias = model.patch_embed.proj.bias
            x = torch.cat(
                [model.cls_token[0] + model.pos_embed[0, :1], bias + interpolate(rows, model.pos_grid, grid)]
            )
            torch.testing.assert_close(out.hidden[0], model.blocks[0](x[None]), atol=1e-5, rtol=1e-4)
    with pytest.raises(BudgetError, match="multiples of 14"):
        model(torch.zeros(1, 3, 4, 56, 60))


def test_an_official_file_loads_whole(tmp_path: Path) -> None:
    wrote = write_stage2(tmp_path / "teacher.pt")
    found = load_internvideo2(tmp_path / "teacher.pt", InternVideo2Config.from_dict(NARROW))
    assert not found.training
    assert not any(parameter.requires_grad for parameter in found.parameters())
    for name, value in wrote.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name


def test_a_table_of_fewer_frames_is_interpolated_at_loading(tmp_path: Path) -> None:
    wrote = write_stage2(tmp_path / "teacher.pt", frames=2)
    found = load_internvideo2(tmp_path / "teacher.pt", InternVideo2Config.from_dict(NARROW))
    table = wrote.pos_embed[0, 1:33].view(2, 16, 32)
    expected = F.interpolate(table.flatten(1)[None].transpose(1, 2), size=4, mode="linear")[0].T.reshape(
        64, 32
    )
    torch.testing.assert_close(found.pos_embed[0, 1:], expected, atol=1e-6, rtol=0)
    with pytest.raises(CheckpointError, match="32 rows"):
        load_internvideo2(tmp_path / "teacher.pt", InternVideo2Config.from_dict({**NARROW, "pos_height": 5}))


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_a_file_that_does_not_fit_is_refused(tmp_path: Path, change: str) -> None:
    state = internvideo2(NARROW).state_dict()
    if change == "missing":
        del state["blocks.2.attn.q_norm.weight"]
    elif change == "unknown":
        state["blocks.4.norm1.weight"] = torch.ones(32)
    else:
        state["blocks.1.mlp.fc1.bias"] = torch.ones(65)
    torch.save(state, tmp_path / "teacher.pt")
    with pytest.raises(CheckpointError, match=r"blocks\.[124]"):
        load_internvideo2(tmp_path / "teacher.pt", InternVideo2Config.from_dict(NARROW))


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def test_loading_runs_no_code_of_the_file(tmp_path: Path) -> None:
    torch.save({"module": {"cls_token": Bomb(tmp_path / "exploded")}}, tmp_path / "teacher.pt")
    with pytest.raises(CheckpointError, match="Cannot read"):
        load_internvideo2(tmp_path / "teacher.pt", InternVideo2Config())
    assert not (tmp_path / "exploded").exists()


def test_train_mode_is_an_option(tmp_path: Path) -> None:
    write_stage2(tmp_path / "teacher.pt", {**NARROW, "depth": 8})
    grid = Grid(2, 4, 4)
    pixels, chosen = torch.randn(2, 3, 2, 56, 56), everything(2, grid)
    settings = {**NARROW, "depth": 8, "drop_path": 0.6}

    def final(compat: bool, seed: int) -> torch.Tensor:
        source = InternVideo2Source(
            str(tmp_path / "teacher.pt"),
            2,
            1.0,
            settings=settings,
            compat_train_mode=compat,
            precision="fp32",
        )
        torch.manual_seed(seed)
        return source.open().observe(pixels, grid, chosen)["final"]

    assert torch.equal(final(False, 0), final(False, 1))
    assert torch.equal(final(True, 0), final(True, 0))
    assert not torch.allclose(final(True, 0), final(True, 1), atol=1e-3)


def test_half_precision_stays_close(tmp_path: Path) -> None:
    write_stage2(tmp_path / "teacher.pt")
    grid = Grid(4, 4, 4)
    pixels, chosen = torch.randn(1, 3, 4, 56, 56), everything(1, grid)
    layers = []
    for precision in ("fp32", "bf16"):
        source = InternVideo2Source(
            str(tmp_path / "teacher.pt"), 2, 1.0, settings=NARROW, precision=precision
        )
        layers.append(source.open().observe(pixels, grid, chosen)["layer_1"])
    assert layers[1].dtype == torch.float32
    assert (layers[0] * layers[1]).sum(-1).min() > 0.99


def test_wrong_layers_and_patches_are_refused() -> None:
    model = internvideo2(NARROW)
    for layers in [(), (3, 1), (0, 4)]:
        with pytest.raises(ConfigError):
            InternVideo2Teacher(model, layers)
    with pytest.raises(ConfigError, match="patch sizes"):
        InternVideo2Teacher(model, (3,)).observe(
            torch.zeros(1, 3, 2, 56, 56), Grid(2, 8, 8), torch.zeros(1, 4).long()
        )
    with pytest.raises(ConfigError, match="wdith"):
        InternVideo2Config.from_dict({"wdith": 3})


# -- kept targets -------------------------------------------------------------------------------------------


class Counting(InternVideo2Teacher):
    calls = 0

    def observe(self, pixels, grid, chosen):
        self.calls += 1
        return super().observe(pixels, grid, chosen)


def test_targets_are_kept_by_pixels_grid_and_choice(tmp_path: Path) -> None:
    teacher = Counting(internvideo2(NARROW), (1, 3))
    cache, grid = TargetCache(tmp_path, teacher), Grid(2, 4, 4)
    pixels = torch.randn(3, 3, 2, 56, 56)
    chosen = torch.arange(0, 32, 2).expand(3, 16)
    first = cache.observe(pixels, grid, chosen)
    again = TargetCache(tmp_path, teacher).observe(pixels, grid, chosen)
    assert teacher.calls == 1
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    torch.testing.assert_close(
        first["final"], teacher.observe(pixels, grid, chosen)["final"], atol=1e-3, rtol=0
    )
    cache.observe(pixels.flip(0), grid, chosen)  # the same clips in another order
    assert teacher.calls == 2  # the one above, to compare
    for other in ((pixels + 0.1, chosen), (pixels, chosen + 1)):
        before = teacher.calls
        cache.observe(other[0], grid, other[1])
        assert teacher.calls == before + 1
    assert cache.hits == 3
    assert cache.misses == 9


def test_a_damaged_entry_is_made_anew(tmp_path: Path) -> None:
    teacher = Counting(internvideo2(NARROW), (1,))
    cache, grid = TargetCache(tmp_path, teacher), Grid(2, 4, 4)
    pixels, chosen = torch.randn(2, 3, 2, 56, 56), everything(2, grid)
    first = cache.observe(pixels, grid, chosen)
    next(tmp_path.rglob("*.safetensors")).write_bytes(b"half")
    again = cache.observe(pixels, grid, chosen)
    assert teacher.calls == 2
    assert torch.equal(first["layer_0"], again["layer_0"])
    cache.observe(pixels, grid, chosen)
    assert teacher.calls == 2


def test_other_weights_or_settings_share_no_entries() -> None:
    model = internvideo2(NARROW)
    digest = weights_digest(model, (1,))
    assert weights_digest(model, (1,)) == digest
    assert weights_digest(model, (2,)) != digest
    with torch.no_grad():
        model.blocks[3].mlp.fc2.weight.mul_(1.01)
    assert weights_digest(model, (1,)) != digest
