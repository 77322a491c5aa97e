"""FluxViT: state dict, shapes, mixed batches, gradients, precision."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from encoder import layers
from encoder.checkpoint import infer_config, read_tensors, save_tensors
from encoder.config import BASE, LARGE, MICRO, SIZES, SMALL, FluxViTConfig
from encoder.errors import BudgetError, ConfigError
from encoder.fluxvit import FluxViT
from encoder.golden import rule_weights
from encoder.layers import DropPath, Mlp, RMSNorm, Segment, attend
from encoder.positions import interpolate
from encoder.tokens import Grid, VisionTokens
from tests.host_copies import host_copies

TINY = MICRO.replace(embed_dim=32, depth=2, num_heads=2, pool_heads=2, clip_embed_dim=16, num_classes=5)


@pytest.fixture(scope="module")
def tiny() -> FluxViT:
    model = FluxViT(TINY).eval()
    model.load_state_dict(rule_weights(model))
    return model


def pixels(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("config", "count"), [(SMALL, 28_845_948), (BASE, 104_560_380)])
def test_official_state_dict(config, count: int) -> None:
    with torch.device("meta"):
        state = FluxViT(config).state_dict()
    assert len(state) == 246
    assert sum(value.numel() for value in state.values()) == count
    dim = config.embed_dim
    shapes = {
        "pos_embed": (1, config.pos_tokens + 1, dim),
        "patch_embed.norm_before.weight": (588,),
        "gpe_proj.depthwise_conv.weight": (dim, 1, 1, 1, 1),
        "blocks.11.attn.lpe.depthwise_conv.bias": (dim,),
        "clip_projector.2.cross_attn.proj.weight": (768, dim),
        "final_clip_decoder_for_projs.1.norm.bias": (768,),
        "head.0.weight": (400, 768),
    }
    for name, shape in shapes.items():
        assert tuple(state[name].shape) == shape


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("keep", [None, 12, pytest.param(512, marks=pytest.mark.slow)])
@pytest.mark.quick(2)
def test_every_size_runs_at_every_budget_on_meta(name: str, keep: int | None) -> None:
    with torch.device("meta"):
        model = FluxViT(SIZES[name])
        out = model(torch.empty(2, 3, 8, 112, 112), keep)
    assert out.tokens.shape == (2, min(keep or 512, 512), SIZES[name].embed_dim)
    assert LARGE.depth == 24


def test_initial_state_follows_the_paper() -> None:
    model = FluxViT(TINY.replace(layer_scale_init=1e-5))
    assert model.pos_embed.requires_grad
    assert not model.pos_embed[0, 0].any()
    assert (model.gpe_proj.scale == 1).all()
    assert not model.gpe_proj.shift.any()
    attn = model.blocks[0].attn
    assert (attn.lpe.scale == 1).all()
    # At init each block is nearly the identity.
    x = pixels(10, 32)
    from encoder.layers import Segment

    assert (model.blocks[0](x, [Segment(1, 10)]) - x).abs().max() < 1e-3


@settings(max_examples=25, deadline=None)
@given(
    frames=st.integers(1, 9),
    rows=st.integers(1, 5),
    columns=st.integers(1, 5),
    keep=st.integers(1, 60),
    selector=st.sampled_from(["flux", "random", "tube", "uniform"]),
)
def test_exactly_k_tokens_in_raster_order(tiny: FluxViT, frames, rows, columns, keep, selector) -> None:
    with torch.inference_mode():
        out = tiny(pixels(1, 3, frames, rows * 14, columns * 14), keep, selector=selector)
    size = frames * rows * columns
    assert out.lengths == [min(keep, size)]
    assert out.grids == (Grid(frames, rows, columns),)
    kept = out.kept[0]
    assert (kept.diff() > 0).all()
    assert kept.min() >= 0
    assert kept.max() < size
    assert torch.isfinite(out.packed).all()


@settings(max_examples=15, deadline=None)
@given(
    clips=st.lists(
        st.tuples(
            st.integers(1, 8), st.integers(1, 4), st.integers(1, 4), st.one_of(st.none(), st.integers(1, 40))
        ),
        min_size=1,
        max_size=5,
    )
)
def test_mixed_batch_equals_each_clip_alone(tiny: FluxViT, clips) -> None:
    inputs = [pixels(3, t, 14 * h, 14 * w, seed=i) for i, (t, h, w, _) in enumerate(clips)]
    keeps = [keep for *_, keep in clips]
    with torch.inference_mode():
        mixed = tiny(inputs, keeps)
        pooled = tiny.pool(mixed, 0)
        for index, (clip, keep) in enumerate(zip(inputs, keeps, strict=True)):
            alone = tiny(clip[None], keep)
            assert torch.equal(mixed.kept[index], alone.kept[0])
            torch.testing.assert_close(mixed.split()[index], alone.packed, atol=1e-4, rtol=0)
            torch.testing.assert_close(mixed.cls[index], alone.cls[0], atol=1e-4, rtol=0)
            torch.testing.assert_close(pooled[index], tiny.pool(alone, 0)[0], atol=1e-4, rtol=0)


def test_a_clip_alone_equals_the_clip_in_a_batch(tiny: FluxViT) -> None:
    """The official model cannot run a batch of one at all."""
    clips = pixels(2, 3, 8, 84, 84)
    with torch.inference_mode():
        both, alone = tiny(clips, 100), tiny(clips[1:], 100)
    assert torch.equal(both.kept[1], alone.kept[0])
    torch.testing.assert_close(both.split()[1], alone.packed, atol=1e-5, rtol=0)


def test_mixed_batch_takes_the_flops_of_its_clips_alone() -> None:
    """One clip of 2304 tokens and fifteen of 16 take as many operations as alone: nothing is padded."""
    with torch.device("meta"):
        model = FluxViT(MICRO).eval().requires_grad_(False)
        large, small = torch.empty(3, 16, 168, 168), torch.empty(3, 4, 28, 28)

    def flops(clips: list[torch.Tensor]) -> int:
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            model(clips)
        return counter.get_total_flops()

    flops([large, small])  # interpolates the positions of both grids, once
    assert flops([large, *[small] * 15]) == flops([large]) + 15 * flops([small])


@pytest.mark.parametrize("keep", [None, 12, [12, 20]])
@pytest.mark.parametrize("frames", [1, 4])
@pytest.mark.parametrize("how", [{}, {"selector": "evs"}, {"selector": "tube"}, {"merge": [10, 8]}])
@pytest.mark.quick(3)
def test_a_pass_waits_for_no_copy_from_main_memory(
    frames: int, keep: int | list[int] | None, how: dict[str, Any]
) -> None:
    """Neither in training nor where a CUDA graph is recorded, which allows none; the first pass may make its
    constants."""
    with torch.device("meta"):
        model = FluxViT(TINY.replace(drop_path=0.1)).train()
        clips = torch.empty(2, 3, frames, 70, 70)
    model(clips, keep, **how)
    with host_copies() as found:
        model(clips, keep, **how)
    assert not found


def test_copies_from_main_memory_are_seen() -> None:
    with host_copies() as found:
        torch.eye(2).to("meta")
        torch.tensor([1, 2], device="meta")
        torch.ones(2, device="meta") * 2
    assert found == ["aten._to_copy.default", "tensor([1, 2])"]


def test_lengths_attend_together_as_in_turn(tiny: FluxViT, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the kernel for packed lengths, which only CUDA has, replaced by its definition."""
    calls = []

    def varlen(q: Tensor, k: Tensor, v: Tensor, begins: Tensor, ends: Tensor, *longest: int) -> Tensor:
        assert torch.equal(begins, ends)
        assert set(longest) == {int(begins.diff().max())}
        calls.append(len(begins) - 1)
        parts = [part.split(begins.diff().tolist()) for part in (q, k, v)]
        clips = [attend(*(x.transpose(0, 1)[None] for x in clip))[0] for clip in zip(*parts, strict=True)]
        return torch.cat([clip.transpose(0, 1) for clip in clips])

    clips = [pixels(3, 4, 70, 70), pixels(3, 2, 56, 84), pixels(3, 4, 70, 70, seed=1)]
    keep = [20, None, 11]
    expected = tiny(clips, keep)
    monkeypatch.setattr(layers, "attends_packed", lambda *_: True)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen)
    found = tiny(clips, keep)
    assert calls == [3] * TINY.depth
    torch.testing.assert_close(found.packed, expected.packed, atol=1e-5, rtol=1e-5)
    tiny(clips[:1] * 3, 20)
    assert len(calls) == TINY.depth  # one length has its own kernel


def test_static_clip_breaks_ties_in_raster_order(tiny: FluxViT) -> None:
    frame = pixels(1, 3, 1, 28, 28).expand(-1, -1, 8, -1, -1)
    with torch.inference_mode():
        kept = tiny(frame, 12).kept[0]
    # Four groups of two frames of four patches: the first three of each group.
    assert kept.tolist() == [0, 1, 2, 8, 9, 10, 16, 17, 18, 24, 25, 26]


def test_one_frame_is_sampled_over_its_whole_area(tiny: FluxViT) -> None:
    with torch.inference_mode():
        kept = tiny(pixels(1, 3, 1, 112, 112), 16).kept[0]
    assert (kept // 4).tolist() == list(range(16))
    assert set((kept % 8).tolist()) == set((kept // 8).tolist()) == set(range(8))


def test_a_grid_of_equal_size_but_other_shape_is_interpolated(tiny: FluxViT) -> None:
    """The official model takes the raw table whenever the token counts agree."""
    rows = tiny.pos_embed[0, 1:]
    other = Grid(tiny.pos_grid.frames * 4, tiny.pos_grid.height // 2, tiny.pos_grid.width // 2)
    assert other.size == tiny.pos_grid.size
    interpolated = tiny.position_rows(other, torch.arange(other.size)[None])[0]
    assert not torch.allclose(interpolated, tiny.gpe_proj(rows), atol=1e-3)


def test_drop_path_keeps_the_mean_and_rests_in_evaluation() -> None:
    drop = DropPath(0.25)
    y, segments = torch.ones(4000, 1), [Segment(2000, 2)]
    torch.manual_seed(0)
    dropped = drop(y, segments)
    assert sorted(dropped.unique().tolist()) == pytest.approx([0.0, 4 / 3])
    assert torch.equal(dropped[::2], dropped[1::2])  # a clip's tokens share their fate
    assert float(dropped.mean()) == pytest.approx(1.0, abs=0.05)
    assert torch.equal(drop.eval()(y, segments), y)


def test_norms_compute_in_float32() -> None:
    """In half precision, on GPUs without bfloat16, a square of 300 is infinite."""
    x = torch.full((1, 64), 300.0, dtype=torch.float16)
    assert torch.equal(RMSNorm(64).half()(x), torch.ones_like(x))
    assert RMSNorm(64).half().scale(x).item() == pytest.approx(1 / 300, rel=1e-3)


def test_residual_branches_start_smaller_with_depth() -> None:
    torch.manual_seed(0)
    model = FluxViT(MICRO.replace(depth=3))
    for number, block in enumerate(model.blocks):
        for layer in (block.attn.proj, block.mlp.fc2):
            assert layer.weight.std().item() == pytest.approx(0.02 / (2 * (number + 1)) ** 0.5, rel=0.03)


def test_drop_path_grows_with_depth() -> None:
    rates = [block.drop_path.rate for block in FluxViT(TINY.replace(depth=3, drop_path=0.2)).blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2])


def test_positions_that_learn_are_not_remembered() -> None:
    """An optimiser may write to the data itself, which leaves the tensor's version as it was."""
    model = FluxViT(TINY).eval()
    clip = pixels(1, 3, 4, 28, 28)
    with torch.no_grad():
        before = model(clip).packed
        model.pos_embed.data.add_(1.0)
        fresh = FluxViT(TINY).eval()
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(model(clip).packed, fresh(clip).packed)
        assert not torch.equal(model(clip).packed, before)


def test_position_cache_follows_the_weights() -> None:
    model = FluxViT(TINY).eval().requires_grad_(False)
    clip = pixels(1, 3, 4, 28, 28)
    with torch.inference_mode():
        before = model(clip).packed
        assert torch.equal(before, model(clip).packed)
    with torch.no_grad():
        model.pos_embed.add_(1.0)
    with torch.inference_mode():
        after = model(clip).packed
    fresh = FluxViT(TINY).eval()
    fresh.load_state_dict(model.state_dict())
    with torch.inference_mode():
        assert torch.equal(after, fresh(clip).packed)
    assert not torch.equal(before, after)


def test_gradients_reach_every_used_parameter_with_and_without_checkpointing() -> None:
    model = FluxViT(TINY)
    clips = pixels(2, 3, 4, 42, 28)
    gradients = []
    for flag in (False, True):
        model.recompute = "blocks" if flag else "nothing"
        model.zero_grad()
        tokens = model(clips, [7, 20])
        (
            model.classify(tokens, 1).sum()
            + model.align(model.pool(tokens, 1), 0).sum()
            + tokens.packed.square().sum()
        ).backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-5, rtol=1e-4)
    unused = {n for n, _ in model.named_parameters()} - gradients[0].keys()
    assert all(
        n.startswith(
            ("clip_projector.0", "clip_projector.2", "head.0", "head.2", "final_clip_decoder_for_projs.1")
        )
        for n in unused
    )


def test_encode_takes_a_selection_and_returns_layers(tiny: FluxViT) -> None:
    clips = pixels(2, 3, 4, 28, 28)
    chosen = torch.tensor([[0, 3, 9], [1, 2, 15]])
    with torch.inference_mode():
        patches = tiny.embed(clips)
        out = tiny.encode(patches, Grid(4, 2, 2), chosen, layers=(0, 1))
        full = tiny.encode(patches, Grid(4, 2, 2), torch.arange(16).expand(2, -1))
        whole = tiny(clips)
    assert [h.shape for h in out.hidden] == [(8, 32), (8, 32)]
    assert torch.equal(out.hidden[1].view(2, 4, -1)[:, 1:].flatten(0, 1), out.packed)
    assert torch.equal(full.packed, whole.packed)


def test_depth_skips_the_last_blocks(tiny: FluxViT) -> None:
    clips = pixels(1, 3, 2, 28, 28)
    shallow = copy.deepcopy(tiny)
    shallow.blocks = shallow.blocks[:-1]
    with torch.inference_mode():
        assert torch.equal(tiny(clips, depth=-1).packed, shallow(clips).packed)


def test_bf16_autocast_is_close() -> None:
    model = FluxViT(TINY).eval()
    model.load_state_dict(rule_weights(model))
    clips = pixels(1, 3, 4, 56, 56)
    with torch.inference_mode():
        exact = model(clips).packed
        with torch.autocast("cpu", torch.bfloat16):
            cast = model(clips).packed
        low = copy.deepcopy(model).to(torch.bfloat16)(clips.to(torch.bfloat16))
    assert low.packed.dtype == torch.bfloat16
    for other in (cast, low.packed):
        assert ((other.float() - exact).norm() / exact.norm()) < 0.03


def test_drop_path_drops_whole_clips() -> None:
    from encoder.layers import DropPath, Segment

    drop = DropPath(0.5).train()
    torch.manual_seed(0)
    out = drop(torch.ones(200 * 3, 4), [Segment(200, 3)]).view(200, 12)
    assert set(out.unique().tolist()) == {0.0, 2.0}
    assert ((out == out[:, :1]).all(dim=1)).all()
    assert 0.35 < (out[:, 0] > 0).float().mean() < 0.65


@pytest.mark.parametrize(
    ("shape", "keep"), [((1, 3, 4, 30, 28), None), ((1, 3, 4, 28, 28), 0), ((1, 3, 4, 28, 28), [1, 2])]
)
def test_wrong_input_is_one_sentence(tiny: FluxViT, shape, keep) -> None:
    with pytest.raises(BudgetError, match=r"^[A-Z0-9].*[.]$"):
        tiny(torch.zeros(shape), keep)


def test_wrong_dimensions_are_config_errors() -> None:
    for change in ({"num_heads": 5}, {"pool_heads": 7}, {"gelu": "relu"}):
        with pytest.raises(ConfigError):
            TINY.replace(**change)


def test_vision_tokens_split_select_concatenate(tiny: FluxViT) -> None:
    with torch.inference_mode():
        out = tiny(
            [pixels(3, 2, 28, 28), pixels(3, 4, 28, 42)], [3, 5], times_s=[(0.0, 1.0), (0.0, 0.5, 1.0, 1.5)]
        )
    with pytest.raises(ValueError, match="different counts"):
        _ = out.tokens
    again = VisionTokens.concatenate([out.select(0), out.select(1)])
    assert torch.equal(again.packed, out.packed)
    assert again.times_s == out.times_s
    assert out.frame_of(1).tolist() == (out.kept[1] // 6).tolist()
    assert out.to(torch.float64).packed.dtype == torch.float64


def test_a_product_that_autocast_does_not_cast_is_not_used_under_it() -> None:
    """Rows in half precision would meet weights in float32 where a plain ViT is evaluated between steps."""
    mode, mlp = FakeTensorMode(), Mlp(16, 32, "tanh")
    rows = FakeTensor(mode, torch.empty(4, 16, dtype=torch.bfloat16, device="meta"), torch.device("cuda"))
    with torch.no_grad():
        assert mlp._fused(rows)
        torch.set_autocast_enabled("cuda", True)
        try:
            assert not mlp._fused(rows)
        finally:
            torch.set_autocast_enabled("cuda", False)
    assert not mlp._fused(rows)


PLAIN = TINY.replace(dual_patch_norm=False, gpe=False, lpe=False)


@torch.inference_mode()
def test_a_plain_vit_is_the_encoder_without_its_three_parts(tiny: FluxViT) -> None:
    """Its state dict lacks their names, and the rest of the weights give what a ViT by hand gives."""
    plain = FluxViT(PLAIN).eval()
    left_out = set(tiny.state_dict()) - set(plain.state_dict())
    assert {name.split("blocks.")[-1].split(".", 1)[-1] for name in left_out if "lpe" in name} == {
        "attn.lpe.depthwise_conv.weight",
        "attn.lpe.depthwise_conv.bias",
    }
    assert {name for name in left_out if "lpe" not in name} == {
        *("gpe_proj.depthwise_conv.weight", "gpe_proj.depthwise_conv.bias"),
        *("patch_embed.norm.weight", "patch_embed.norm_before.weight"),
    }
    plain.load_state_dict({k: v + 0.01 for k, v in tiny.state_dict().items() if k not in left_out})
    clip = pixels(1, 3, 4, 28, 42)
    x = plain.patch_embed.proj(clip).flatten(2).transpose(1, 2)
    table = plain.position_rows(Grid(4, 2, 3), torch.arange(24)[None])
    torch.testing.assert_close(table[0], interpolate(plain.pos_embed[0, 1:], plain.pos_grid, Grid(4, 2, 3)))
    x = torch.cat([plain.cls_token + plain.pos_embed[:, :1], x + table], dim=1)[0]
    for block in plain.blocks:
        q, k, v = block.attn.qkv(block.norm1(x)).chunk(3, dim=-1)
        heads = [
            part.unflatten(-1, (TINY.num_heads, -1)).transpose(0, 1)
            for part in (block.attn.q_norm(q), block.attn.k_norm(k), v)
        ]
        mixed = F.scaled_dot_product_attention(*heads).transpose(0, 1).flatten(1)
        x = x + block.ls1.gamma * block.attn.proj(mixed)
        x = x + block.ls2.gamma * block.mlp(block.norm2(x))
    torch.testing.assert_close(plain(clip).packed, x[1:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("part", ["dual_patch_norm", "gpe", "lpe"])
def test_each_part_alone_can_be_left_out(tmp_path: Path, part: str) -> None:
    """The rows of the paper's Table 3; a file of such weights says which parts it has."""
    config = MICRO.replace(**{part: False})
    model = FluxViT(config)
    save_tensors(model.state_dict(), tmp_path / "w.safetensors")
    assert infer_config(read_tensors(tmp_path / "w.safetensors")) == config
    model.save_pretrained(tmp_path / "saved")
    loaded = FluxViT.from_pretrained(tmp_path / "saved")
    assert loaded.config == config
    out = loaded(pixels(1, 3, 4, 28, 28), 8)
    out.packed.sum().backward()
    assert out.packed.isfinite().all()
    with pytest.raises(ConfigError, match=f"{part} must be true or false"):
        FluxViTConfig.from_dict({**config.to_dict(), part: "no"})


@pytest.mark.parametrize(("name", "approximate"), [("tanh", "tanh"), ("erf", "none")])
def test_gelu_is_the_one_of_the_settings(name: str, approximate: str) -> None:
    mlp, x = Mlp(4, 8, name), torch.linspace(-3, 3, 12).view(3, 4)
    expected = mlp.fc2(F.gelu(mlp.fc1(x), approximate=approximate))
    assert torch.equal(mlp(x), expected)
    other = F.gelu(mlp.fc1(x), approximate="none" if name == "tanh" else "tanh")
    assert not torch.equal(mlp.fc2(other), expected)
