"""Which tokens stay: the group-dynamic selector of FluxViT and its ablation baselines, as pure functions.

Every function returns ascending raster indices (frame, row, column), so tokens stay in time order.
Nothing here carries gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from encoder.errors import BudgetError
from encoder.tokens import Grid

Selector = Literal["flux", "random", "tube", "uniform", "evs"]
Importance = Callable[[Tensor, list[int], float], Tensor]
DRAWN: tuple[Selector, ...] = ("random", "tube")  # by a generator

GOLDEN = 40503  # the golden ratio's fractional part, in 1 / 2**16


def group_frames(frames: int) -> list[int]:
    """Frames per group, e.g. 16 -> [4, 4, 4, 4].

    Four groups when divisible by four, else two; the released code's rule, except that every group gets at
    least two frames (T = 4 -> two groups, T <= 3 -> one) and an odd T is split with the longer group first.
    """
    if frames % 4 == 0 and frames >= 8:
        count = 4
    elif frames >= 4:
        count = 2
    else:
        count = 1
    longer = -(-frames // count)
    return [longer] * (frames - count * (longer - 1)) + [longer - 1] * (count * longer - frames)


def quotas(keep: int, groups: list[int], per_frame: int, *, compat_truncation: bool = False) -> list[int]:
    """Tokens to keep in each group, proportional to its frames, summing to exactly `keep`.

    `compat_truncation` gives the released code's count, int((1 - ratio) * group tokens), whose float
    arithmetic often loses one token per group (24 x 224^2 at 2048 keeps 2044).
    """
    frames = sum(groups)
    if compat_truncation:
        ratio = 1 - keep / (frames * per_frame)
        return [int((1 - ratio) * (size * per_frame)) for size in groups]
    edges = [0]
    for size in groups:
        edges.append(edges[-1] + size)
    return [keep * after // frames - keep * before // frames for before, after in pairwise(edges)]


def importance(patches: Tensor, groups: list[int], p: float = 2.0) -> Tensor:
    """How much each patch changed since the previous frame of its group.

    patches: (B, T, L, C) embeddings after the second norm of the patch embedding, before positions.
    Returns (B, T, L) float32: the p-norm of the difference; the first frame of a group takes the value of
    the second, and is 0 in a group of one frame.
    """
    scores = []
    for group in patches.float().split(groups, dim=1):
        if group.shape[1] == 1:
            scores.append(group.new_zeros(group.shape[:3]))
            continue
        change = torch.linalg.vector_norm(group[:, 1:] - group[:, :-1], ord=p, dim=-1)
        scores.append(torch.cat([change[:, :1], change], dim=1))
    return torch.cat(scores, dim=1)


def select_flux(
    patches: Tensor,
    grid: Grid,
    keep: int,
    *,
    p: float = 2.0,
    compat_truncation: bool = False,
    scores_of: Importance = importance,
) -> Tensor:
    """Group-dynamic selection: in each group of frames, the patches that changed most.

    patches: (B, T*L, C). scores_of: `importance`, or a compiled one. Returns (B, keep). Ties (always between
    the first two frames of a group, and everywhere in a static clip) go to the lower raster index, on every
    device. A single frame has no change to rank by and is sampled uniformly instead.
    """
    if grid.frames == 1:
        return select_uniform(patches.shape[0], grid, keep, patches.device)
    groups = group_frames(grid.frames)
    per_frame = grid.height * grid.width
    counts = quotas(keep, groups, per_frame, compat_truncation=compat_truncation)
    scores = scores_of(patches.unflatten(1, (grid.frames, per_frame)), groups, p)
    kept, offset = [], 0
    for group, count in zip(scores.split(groups, dim=1), counts, strict=True):
        order = group.flatten(1).sort(dim=1, descending=True, stable=True).indices
        kept.append(order[:, :count].sort(dim=1).values + offset)
        offset += group.shape[1] * per_frame
    return torch.cat(kept, dim=1)


def select_random(
    batch: int, grid: Grid, keep: int, device: torch.device, generator: torch.Generator | None = None
) -> Tensor:
    """`keep` patches of each clip drawn without replacement: (B, keep)."""
    draw_on = generator.device if generator is not None else device
    scores = torch.rand(batch, grid.size, generator=generator, device=draw_on)
    return scores.argsort(dim=1)[:, :keep].sort(dim=1).values.to(device)


def select_tube(
    batch: int, grid: Grid, keep: int, device: torch.device, generator: torch.Generator | None = None
) -> Tensor:
    """The same random places in every frame (a tube), `keep` in all: (B, keep).

    Where `keep` is not a multiple of the frames, the first frames take one more place.
    """
    per_frame = grid.height * grid.width
    draw_on = generator.device if generator is not None else device
    places = torch.rand(batch, per_frame, generator=generator, device=draw_on).argsort(dim=1).to(device)
    counts = [keep // grid.frames + (frame < keep % grid.frames) for frame in range(grid.frames)]
    kept = [places[:, :count] + frame * per_frame for frame, count in enumerate(counts)]
    return torch.cat(kept, dim=1).sort(dim=1).values


def select_uniform(batch: int, grid: Grid, keep: int, device: torch.device) -> Tensor:
    """One patch of each of `keep` equal stretches of the raster: (B, keep).

    Where in its stretch goes by the golden ratio: at equal distances, a width that the distance divides would
    leave all patches in a few columns.
    """
    number = torch.arange(keep, device=device)
    first, end = number * grid.size // keep, (number + 1) * grid.size // keep
    place = number * GOLDEN % 2**16 * (end - first) // 2**16
    return (first + place).expand(batch, keep)


def select_evs(patches: Tensor, grid: Grid, keep: int) -> Tensor:
    """Efficient Video Sampling (arXiv 2510.14624): the first frame, then what is least like the frame before.

    patches: (B, T*L, C), by their cosine. Returns (B, keep); ties go to the lower raster index.
    """
    frames = patches.float().unflatten(1, (grid.frames, grid.height * grid.width))
    change = 1 - torch.cosine_similarity(frames[:, 1:], frames[:, :-1], dim=-1)
    first = torch.full_like(frames[:, :1, :, 0], torch.inf)
    order = torch.cat([first, change], dim=1).flatten(1).sort(dim=1, descending=True, stable=True).indices
    return order[:, :keep].sort(dim=1).values


def select(
    patches: Tensor,
    grid: Grid,
    keep: int | None,
    *,
    selector: Selector = "flux",
    generator: torch.Generator | None = None,
    compat_truncation: bool = False,
    scores_of: Importance = importance,
) -> Tensor:
    """Kept raster indices (B, K), ascending; all of them when `keep` is None or not below the grid's size.

    patches: (B, T*L, C). scores_of: see `select_flux`. Raises BudgetError for `keep` < 1 or an unknown
    selector.
    """
    batch, device = patches.shape[0], patches.device
    if keep is not None and keep < 1:
        raise BudgetError(f"A token budget must be at least 1, not {keep}.")
    if keep is None or keep >= grid.size:
        return torch.arange(grid.size, device=device).expand(batch, grid.size)
    with torch.no_grad():
        if selector == "flux":
            return select_flux(patches, grid, keep, compat_truncation=compat_truncation, scores_of=scores_of)
        if selector == "random":
            return select_random(batch, grid, keep, device, generator)
        if selector == "tube":
            return select_tube(batch, grid, keep, device, generator)
        if selector == "uniform":
            return select_uniform(batch, grid, keep, device)
        if selector == "evs":
            return select_evs(patches, grid, keep)
    raise BudgetError(f"Unknown selector {selector!r}: choose one of {', '.join(get_args(Selector))}.")
