"""FluxViT: a video transformer that runs on as many tokens as it is given.

Patches are embedded, the selector keeps K of them, and only those enter the blocks: a dropped token costs
nothing later. The definition follows the released model (arXiv 2503.14237) tensor by tensor; where that fails
(batch of one, T = 4, odd T, non-square input, grids of equal size but other shape) this one works.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from encoder.config import FluxViTConfig
from encoder.errors import BudgetError
from encoder.layers import Aligner, AttentionPool, Block, ChannelAffine, PatchEmbed, Segment
from encoder.merging import NO_MERGING, Merging, in_raster_order, merging_block
from encoder.positions import PositionCache, interpolate, sin_cos_3d
from encoder.selection import Importance, Selector, importance, select
from encoder.tokens import Grid, VisionTokens

Keep = int | None | Sequence[int | None]
# What backward computes again: nothing, what costs no matrix product (norms, GELU, LayerScale), or all of a
# block.
Recompute = Literal["nothing", "cheap", "blocks"]
_ATEN = torch.ops.aten
# Results that are kept where the cheap ones are not.
COSTLY = [
    _ATEN.mm.default,
    _ATEN.addmm.default,
    _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_efficient_attention.default,
    _ATEN._scaled_dot_product_cudnn_attention.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
]


class FluxViT(nn.Module):
    """The encoder. Parameter names and shapes are those of the released S and B checkpoints.

    A copy of a compiled one, and one that was pickled, is not compiled.
    Raises ConfigError for inconsistent dimensions (see FluxViTConfig).
    """

    def __init__(self, config: FluxViTConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.embed_dim
        self.pos_grid = Grid(config.pos_frames, config.pos_height, config.pos_width)
        self.recompute: Recompute = "nothing"
        self.importance: Importance = importance
        self._position_cache = PositionCache()

        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(sin_cos_3d(dim, self.pos_grid))
        self.gpe_proj = ChannelAffine(dim) if config.gpe else None
        self.patch_embed = PatchEmbed(dim, config.patch_size, dual_norm=config.dual_patch_norm)
        blocks = [
            Block(
                dim,
                config.num_heads,
                config.mlp_dim,
                config.gelu,
                config.layer_scale_init,
                config.drop_path * index / max(config.depth - 1, 1),
                lpe=config.lpe,
            )
            for index in range(config.depth)
        ]
        self.blocks = nn.ModuleList(blocks)
        self.clip_projector = nn.ModuleList(
            AttentionPool(dim, config.pool_heads, config.clip_embed_dim) for _ in range(config.num_pools)
        )
        self.fc_norm = nn.LayerNorm(config.clip_embed_dim)
        heads = config.num_pools if config.num_classes else 0
        self.head = nn.ModuleList(nn.Linear(config.clip_embed_dim, config.num_classes) for _ in range(heads))
        self.final_clip_decoder_for_projs = nn.ModuleList(
            Aligner(config.clip_embed_dim, config.clip_embed_dim) for _ in range(config.num_aligners)
        )
        self._init_weights()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "importance": importance}

    def _init_weights(self) -> None:
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        with torch.no_grad():
            for index, block in enumerate(b for b in self.blocks if isinstance(b, Block)):
                # Residual branches shrink with depth, so that their sum keeps its variance.
                block.attn.proj.weight.div_((2 * (index + 1)) ** 0.5)
                block.mlp.fc2.weight.div_((2 * (index + 1)) ** 0.5)

    def grid_of(self, frames: int, height: int, width: int) -> Grid:
        """Patch grid of an input; raises BudgetError unless the sides are multiples of the patch size."""
        size = self.config.patch_size
        if height % size or width % size or not (frames and height and width):
            raise BudgetError(
                f"Input is {frames} frames of {height} x {width}: sides must be multiples of {size}."
            )
        return Grid(frames, height // size, width // size)

    def embed(self, pixels: Tensor) -> Tensor:
        """Patch embeddings before selection and positions: (B, 3, T, H, W) -> (B, T*L, C)."""
        return self.patch_embed(pixels).flatten(1, 2)

    def position_table(self, grid: Grid) -> Tensor:
        """Positions (T*L, C) of a grid, before GPE: interpolated, and kept for the next time where frozen."""
        rows = self.pos_embed[0, 1:]
        if grid.frames == 1 and self.config.image_positions == "mean":
            still = rows.view(*self.pos_grid, -1).mean(dim=0).flatten(0, 1)
            return interpolate(still, self.pos_grid._replace(frames=1), grid)
        if self.pos_embed.requires_grad:  # it may change between two calls, without a new version
            return interpolate(rows, self.pos_grid, grid)
        return self._position_cache.get(rows, self.pos_grid, grid)

    def position_rows(self, grid: Grid, kept: Tensor) -> Tensor:
        """Position rows (b, K, C) of the kept tokens: interpolated, gathered, then GPE on those alone."""
        table = self.position_table(grid)
        # Interpolation weights sum to one, so a per-channel affine map commutes with them.
        return table[kept] if self.gpe_proj is None else self.gpe_proj(table[kept])

    def _enter(self, patches: Tensor, grid: Grid, kept: Tensor) -> Tensor:
        """Selected, positioned tokens with cls in front: (b, n, C), (b, K) -> (b, 1+K, C)."""
        if kept.shape[1] < patches.shape[1]:
            patches = patches.gather(1, kept.unsqueeze(-1).expand(-1, -1, patches.shape[-1]))
        tokens = patches + self.position_rows(grid, kept).to(patches.dtype)
        cls = (self.cls_token + self.pos_embed[:, :1]).to(patches.dtype)
        return torch.cat([cls.expand(len(tokens), -1, -1), tokens], dim=1)

    def _recomputing(self, block: nn.Module, x: Tensor, segments: list[Segment]) -> Tensor:
        """A block that keeps less for the backward pass, as `recompute` says."""
        if self.recompute == "blocks":
            return checkpoint(block, x, segments, use_reentrant=False)
        keeping = partial(create_selective_checkpoint_contexts, COSTLY)
        return checkpoint(_casting_anew, block, x, segments, use_reentrant=False, context_fn=keeping)

    def forward(
        self,
        pixels: Tensor | Sequence[Tensor],
        keep: Keep = None,
        *,
        selector: Selector = "flux",
        generator: torch.Generator | None = None,
        compat_truncation: bool = False,
        depth: int | None = None,
        times_s: Sequence[Sequence[float]] | None = None,
        merge: Sequence[int] | Merging | None = None,
    ) -> VisionTokens:
        """Encode clips, keeping K tokens of each.

        pixels: (B, 3, T, H, W) normalised, or a sequence of (3, T, H, W) whose grids may differ.
        keep: K for all clips or one per clip; None, or a K not below the grid's size, keeps every token.
        depth: run only the first so many blocks (negative counts from the end: -1 skips the last).
        times_s: presentation times of each clip's frames, handed through.
        merge: tokens to leave after each of the first blocks by vid-TLDR merging, or a Merging (see there);
        `kept` then holds the raster indices of the tokens that others were merged into.
        Raises BudgetError for K < 1, a wrong number of K, or sides that are not multiples of the patch size.
        """
        clips = list(pixels)
        num_tokens = list(keep) if isinstance(keep, Sequence) else [keep] * len(clips)
        if len(num_tokens) != len(clips):
            raise BudgetError(
                f"{len(num_tokens)} token budgets were given for {len(clips)} clips: give one for each."
            )
        merging = Merging.of(merge)
        grids = [self.grid_of(*clip.shape[1:]) for clip in clips]

        # Clips of one grid and one K share every kernel call.
        groups: dict[tuple[Grid, int], list[int]] = {}
        for index, (grid, count) in enumerate(zip(grids, num_tokens, strict=True)):
            bounded = grid.size if count is None else min(count, grid.size)
            groups.setdefault((grid, bounded), []).append(index)
        patches, kept = [], []
        for (grid, count), members in groups.items():
            whole = isinstance(pixels, Tensor) and len(members) == len(clips)
            z = self.embed(pixels if whole else torch.stack([clips[i] for i in members]))  # type: ignore[arg-type]
            patches.append(z)
            kept.append(
                select(
                    z.detach(),
                    grid,
                    count,
                    selector=selector,
                    generator=generator,
                    compat_truncation=compat_truncation,
                    scores_of=self.importance,
                )
            )
        sharing = list(groups.values())
        return self._encode(list(groups), sharing, patches, kept, depth, times_s, merging=merging)

    def encode(
        self,
        patches: Tensor,
        grid: Grid,
        kept: Tensor,
        *,
        depth: int | None = None,
        layers: Sequence[int] = (),
    ) -> VisionTokens:
        """The blocks alone, on patch embeddings (B, T*L, C) and raster indices of the tokens to keep (B, K).

        Training stages use it to run several selections on one embedding, or a teacher's selection.
        layers: block indices whose packed outputs (cls first in each clip) are returned in `hidden`.
        """
        keys = [(grid, kept.shape[1])]
        return self._encode(keys, [list(range(len(patches)))], [patches], [kept], depth, None, layers)

    def _encode(
        self,
        keys: list[tuple[Grid, int]],
        members: list[list[int]],
        patches: list[Tensor],
        kept: list[Tensor],
        depth: int | None,
        times_s: Sequence[Sequence[float]] | None,
        layers: Sequence[int] = (),
        merging: Merging = NO_MERGING,
    ) -> VisionTokens:
        """Blocks over the packed tokens of all groups, then back to the order of the clips."""
        entered = [
            self._enter(z, grid, chosen) for (grid, _), z, chosen in zip(keys, patches, kept, strict=True)
        ]
        segments = [Segment(*group.shape[:2]) for group in entered]
        flat = [group.flatten(0, 1) for group in entered]
        x = flat[0] if len(flat) == 1 else torch.cat(flat)
        recomputes = self.recompute != "nothing" and torch.is_grad_enabled()
        hidden = []
        for index, block in enumerate(self.blocks[:depth]):
            if index < len(merging.targets):
                assert isinstance(block, Block)
                x, segments, kept = merging_block(
                    block, x, segments, kept, merging.targets[index], merging.by
                )
                continue
            x = self._recomputing(block, x, segments) if recomputes else block(x, segments)
            if index in layers:
                hidden.append(x)
        if merging.targets:
            x, kept = in_raster_order(x, segments, kept)

        packed: dict[int, Tensor] = {}
        cls: dict[int, Tensor] = {}
        chosen: dict[int, Tensor] = {}
        grids: dict[int, Grid] = {}
        sequences = x.split([segment.clips * segment.length for segment in segments])
        if len(segments) == 1:  # already in order: views, no copies
            tokens = x.view(*segments[0], -1)
            return VisionTokens(
                packed=tokens[:, 1:].flatten(0, 1),
                cls=tokens[:, 0],
                kept=tuple(kept[0]),
                grids=(keys[0][0],) * segments[0].clips,
                times_s=_as_times(times_s),
                hidden=tuple(hidden),
            )
        for (grid, _), indices, sequence, choice in zip(keys, members, sequences, kept, strict=True):
            for index, tokens, clip_kept in zip(
                indices, sequence.view(len(indices), -1, x.shape[-1]), choice, strict=True
            ):
                packed[index], cls[index] = tokens[1:], tokens[0]
                chosen[index], grids[index] = clip_kept, grid
        order = range(len(packed))
        return VisionTokens(
            packed=torch.cat([packed[i] for i in order]),
            cls=torch.stack([cls[i] for i in order]),
            kept=tuple(chosen[i] for i in order),
            grids=tuple(grids[i] for i in order),
            times_s=_as_times(times_s),
            hidden=tuple(hidden),
        )

    def pool(self, tokens: VisionTokens, head: int = 1) -> Tensor:
        """Attention pooling number `head` over cls and tokens: (B, clip_embed_dim).

        Head 0 serves the largest token count, 1 the middle, 2 the least (the released training engine's
        order; UNVERIFIED on released weights, whose evaluation scripts name the reverse for 0 and 2).
        """
        pool = self.clip_projector[head]
        by_length: dict[int, list[int]] = {}
        for index, length in enumerate(tokens.lengths):
            by_length.setdefault(length, []).append(index)
        parts = tokens.split()
        pooled: dict[int, Tensor] = {}
        for indices in by_length.values():
            batch = torch.stack([torch.cat([tokens.cls[i : i + 1], parts[i]]) for i in indices])
            pooled.update(zip(indices, pool(batch), strict=True))
        return torch.stack([pooled[i] for i in range(len(tokens))])

    def classify(self, tokens: VisionTokens, head: int = 1) -> Tensor:
        """Logits (B, num_classes) of class head number `head`."""
        return self.head[head](self.fc_norm(self.pool(tokens, head)))

    def align(self, pooled: Tensor, aligner: int) -> Tensor:
        """Unit-length projection (B, clip_embed_dim) of a pooled feature, for self-distillation."""
        return self.final_clip_decoder_for_projs[aligner](pooled)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` into `folder`, atomically."""
        from encoder.checkpoint import save_model

        save_model(self, folder)

    @staticmethod
    def from_pretrained(folder: str | Path) -> FluxViT:
        """Read what `save_pretrained` wrote; raises CheckpointError or ConfigError when it does not fit."""
        from encoder.checkpoint import load_model

        return load_model(folder)


def _casting_anew(block: nn.Module, x: Tensor, segments: list[Segment]) -> Tensor:
    """A block without autocast's cache of weights: backward must see the same casts as forward did."""
    device = x.device.type
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    with torch.autocast(device, dtype, enabled=enabled, cache_enabled=False):
        return block(x, segments)


def _as_times(times_s: Sequence[Sequence[float]] | None) -> tuple[tuple[float, ...], ...] | None:
    return None if times_s is None else tuple(tuple(times) for times in times_s)
