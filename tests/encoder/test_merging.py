"""vid-TLDR merging against the published code's output, and inside the encoder."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from encoder.config import MICRO
from encoder.errors import BudgetError
from encoder.fluxvit import FluxViT
from encoder.layers import Block, Segment
from encoder.merging import (
    Merging,
    concentration,
    in_raster_order,
    merge_salient,
    merging_block,
    saliency,
    vid_tldr_schedule,
)
from tests import ROOT

GOLDEN = ROOT / "tests" / "data" / "vidtldr_golden.safetensors"
TINY = MICRO.replace(embed_dim=32, depth=3, num_heads=2, pool_heads=2, clip_embed_dim=16)


def golden_input() -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(23)
    x = torch.from_numpy(rng.standard_normal((2, 257, 64)).astype(np.float32))
    attention = torch.from_numpy((2 * rng.standard_normal((2, 4, 257, 257))).astype(np.float32)).softmax(-1)
    return x, attention


def test_golden_saliency_and_merged_tokens() -> None:
    x, attention = golden_input()
    expected = load_file(GOLDEN)
    scores = saliency(-torch.special.entr(attention.mean(1)).sum(-1))
    torch.testing.assert_close(scores, expected["score"][..., 0], atol=1e-4, rtol=0)
    merged, places = merge_salient(x, scores, 129)
    torch.testing.assert_close(merged, expected["merged"], atol=1e-4, rtol=0)
    assert places[:, 0].tolist() == [0, 0]


def test_chunked_concentration_equals_the_whole_attention_matrix() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 3, 300, 8), torch.randn(2, 3, 300, 8)  # more queries than one chunk
    p = (q @ k.transpose(-2, -1) / 8**0.5).softmax(-1).mean(1).double()
    expected = (p * p.log()).sum(-1).float()
    torch.testing.assert_close(concentration(q, k), expected, atol=1e-4, rtol=1e-4)


@settings(deadline=None, max_examples=40)
@given(count=st.integers(2, 40), target=st.integers(1, 45), seed=st.integers(0, 99))
def test_counts_places_and_untouched_tokens(count: int, target: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, count, 4, generator=generator)
    salience = torch.rand(2, count, generator=generator)
    merged, places = merge_salient(x, salience, target)
    # cls may not join, so with an even number of tokens one pair fewer is there than half.
    assert merged.shape[1] == count - max(0, min(count - target, (count - 1) // 2))
    for row in range(2):
        assert len(set(places[row].tolist())) == merged.shape[1]
        assert 0 in places[row]
        before = x[row][places[row]]
        even = places[row] % 2 == 0
        assert torch.equal(merged[row][even], before[even])
    total = x[:, 1::2].sum(1)  # background adds nothing
    torch.testing.assert_close(
        merge_salient(x, torch.zeros(2, count), target)[0][places % 2 == 1].view(2, -1, 4).sum(1),
        total,
        atol=1e-4,
        rtol=0,
    )


@settings(deadline=None, max_examples=20)
@given(count=st.integers(4, 40), seed=st.integers(0, 99))
def test_merging_branch_and_residual_alike_is_merging_their_sum(count: int, seed: int) -> None:
    """The first release merges both by the branch's likeness; one merge of the sum says the same."""
    generator = torch.Generator().manual_seed(seed)
    branch, residual = torch.randn(2, 2, count, 4, generator=generator)
    salience = torch.rand(2, count, generator=generator)
    both, places = merge_salient(branch + residual, salience, count // 2 + 1, metric=branch)
    apart = [merge_salient(part, salience, count // 2 + 1, metric=branch) for part in (branch, residual)]
    assert torch.equal(apart[0][1], apart[1][1])
    assert torch.equal(places, apart[0][1])
    torch.testing.assert_close(both, apart[0][0] + apart[1][0])


def test_equal_tokens_and_attention_stay_finite() -> None:
    scores = saliency(torch.full((1, 6), -1.5))
    assert torch.equal(scores, torch.zeros(1, 6))
    merged, _ = merge_salient(torch.ones(1, 6, 4), scores, 3)
    assert merged.isfinite().all()


@pytest.mark.parametrize(
    ("keep", "targets"), [(1024, (2048, 1536, 1024)), (512, (1024, 512)), (33, (66, 33))]
)
def test_published_schedules(keep: int, targets: tuple[int, ...]) -> None:
    assert vid_tldr_schedule(keep) == targets
    assert vid_tldr_schedule(keep, 4 * keep) == targets


@torch.inference_mode()
def test_schedule_of_a_large_input_reaches_the_target(model: FluxViT) -> None:
    # 8 x 16 = 128 patches: halving twice leaves 32, so that 20 takes a third block.
    assert vid_tldr_schedule(20, 128) == (40, 20, 20)
    assert model(torch.randn(1, 3, 8, 56, 56), merge=vid_tldr_schedule(20, 128)).lengths == [20]


def test_sorting_keeps_tokens_with_their_places() -> None:
    kept = torch.tensor([[4, 1, 9], [7, 0, 2]])
    x = torch.cat([torch.tensor([[-1.0], [-1.0]]), kept.float()], dim=1).flatten()[:, None]
    ordered, places = in_raster_order(x, [Segment(2, 4)], [kept])
    assert ordered.flatten().tolist() == [-1, 1, 4, 9, -1, 0, 2, 7]
    assert places[0].tolist() == [[1, 4, 9], [0, 2, 7]]


@pytest.fixture(scope="module")
def model() -> FluxViT:
    torch.manual_seed(0)
    return FluxViT(TINY).eval()


@torch.inference_mode()
def test_in_the_encoder(model: FluxViT) -> None:
    pixels = torch.randn(2, 3, 8, 56, 56)  # 128 patches
    out = model(pixels, merge=(96, 48))
    assert out.lengths == [48, 48]
    for kept in out.kept:
        assert (kept.diff() > 0).all()
        assert kept.max() < 128
    assert model.pool(out).shape == (2, 16)
    # No less than half goes per block.
    assert model(pixels, merge=(10,)).lengths == [64, 64]
    # Beside the selector: merging starts from what was selected.
    both = model(pixels, 100, merge=(60,))
    selected = model(pixels, 100)
    assert both.lengths == [60, 60]
    assert set(both.kept[0].tolist()) <= set(selected.kept[0].tolist())


@torch.inference_mode()
def test_a_target_not_below_changes_nothing(model: FluxViT) -> None:
    pixels = torch.randn(1, 3, 4, 56, 56)
    plain, merged = model(pixels), model(pixels, merge=(500, 64))
    assert torch.equal(plain.kept[0], merged.kept[0])
    torch.testing.assert_close(plain.packed, merged.packed, atol=1e-5, rtol=0)


@torch.inference_mode()
def test_mixed_batch_equals_each_clip_alone(model: FluxViT) -> None:
    clips = [torch.randn(3, 8, 56, 56), torch.randn(3, 4, 70, 56), torch.randn(3, 8, 56, 56)]
    together = model(clips, [None, 50, 90], merge=(40, 30))
    for index, (clip, keep) in enumerate(zip(clips, [None, 50, 90], strict=True)):
        alone = model([clip], keep, merge=(40, 30))
        assert torch.equal(together.kept[index], alone.kept[0])
        torch.testing.assert_close(together.split()[index], alone.packed, atol=1e-5, rtol=0)


def test_wrong_target(model: FluxViT) -> None:
    with pytest.raises(BudgetError, match="at least 1"):
        model(torch.randn(1, 3, 4, 56, 56), merge=(0,))


@torch.inference_mode()
def test_likeness_is_that_of_the_branch_or_of_the_sum(model: FluxViT) -> None:
    """Two tokens are equal in the branch, two others in the sum: each way joins its own pair."""
    block = copy.deepcopy(model.blocks[0])
    assert isinstance(block, Block)
    x = 3 * torch.eye(7, 32)[None, :, :].repeat(1, 1, 1)
    branch = torch.randn(7, 32, generator=torch.Generator().manual_seed(3))
    branch[2] = branch[3]
    gamma = block.ls1.gamma
    x[0, 4] = x[0, 5] + gamma * (branch[5] - branch[4])  # equal after the branch is added
    block.attn.mix = lambda q, k, v, segments: branch  # type: ignore[method-assign]
    kept = [torch.arange(6)[None]]
    left = {
        by: merging_block(block, x[0], [Segment(1, 7)], kept, 5, by)[2][0][0].tolist()
        for by in ("branch", "sum")
    }
    # Places of patch tokens, one less than those in the sequence.
    assert set(range(6)) - set(left["branch"]) == {1}
    assert set(range(6)) - set(left["sum"]) == {3}


@torch.inference_mode()
def test_released_merging_is_the_default_and_the_other_has_a_name(model: FluxViT) -> None:
    pixels = torch.randn(1, 3, 8, 56, 56, generator=torch.Generator().manual_seed(1))
    default = model(pixels, merge=(96, 48))
    assert torch.equal(default.packed, model(pixels, merge=Merging((96, 48), "branch")).packed)
    by_sum = model(pixels, merge=Merging((96, 48), "sum"))
    assert by_sum.lengths == [48]
    assert not torch.equal(default.kept[0], by_sum.kept[0])
    with pytest.raises(BudgetError, match="branch or sum"):
        model(pixels, merge=Merging((9,), "mean"))  # type: ignore[arg-type]
