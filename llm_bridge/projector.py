"""The projector: from kept vision tokens to embeddings that the language model reads.

`mlp` maps every kept token; `merge` first averages them down to a fixed number per frame (VideoChat-Flash's
`tome16_mlp_hd64`). Which one the paper's chat table used is UNVERIFIED; both are options.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from encoder.checkpoint import load_tensors
from encoder.errors import CheckpointError, ConfigError
from encoder.tokens import VisionTokens
from llm_bridge.tome import merge_tokens


@dataclass(frozen=True)
class ProjectorConfig:
    """in_dim: encoder width. out_dim: language model width. layers: linear layers, a GELU between two.

    norm: LayerNorm in front. tokens_per_frame, merge_heads: for kind "merge" (16 per frame, and the number of
    heads over which tokens are averaged before they are compared). summary_tokens: embeddings made of each
    clip's pooled feature, summary_dim wide, and put before those of its tokens; 0 for none. The pooled
    feature of a contrastively trained encoder describes the clip as a whole. time_periods: n adds a time
    embedding to each token: a linear map, initialised to zero, of sine and cosine of its frame's time in
    seconds at periods of 2, 4, ... 2^n; 0 leaves times to the prompt. Not of the paper.
    """

    in_dim: int
    out_dim: int
    kind: Literal["mlp", "merge"] = "mlp"
    layers: int = 2
    norm: bool = False
    tokens_per_frame: int = 16
    merge_heads: int = 6
    summary_tokens: int = 0
    summary_dim: int = 0
    time_periods: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("mlp", "merge"):
            raise ConfigError(f"A projector is 'mlp' or 'merge', not {self.kind!r}.")
        if self.layers < 1:
            raise ConfigError(f"A projector needs at least one layer, not {self.layers}.")
        if self.summary_tokens and not self.summary_dim:
            raise ConfigError("summary_tokens need summary_dim, the width of the pooled feature.")
        if self.time_periods < 0:
            raise ConfigError(f"time_periods must not be negative, not {self.time_periods}.")
        if self.time_periods and self.kind == "merge":
            raise ConfigError("time_periods go with kind 'mlp': merged tokens are of several moments.")
        if self.kind == "merge" and self.in_dim % self.merge_heads:
            raise ConfigError(f"in_dim {self.in_dim} must be a multiple of merge_heads {self.merge_heads}.")

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> ProjectorConfig:
        """From plain values; raises ConfigError on unknown keys."""
        known = {field.name for field in dataclasses.fields(ProjectorConfig)}
        if unknown := set(values) - known:
            raise ConfigError(f"Unknown projector setting {sorted(unknown)}: known are {sorted(known)}.")
        return ProjectorConfig(**values)


class Projector(nn.Module):
    """VisionTokens -> one (M, D) tensor per clip, in order of time."""

    def __init__(self, config: ProjectorConfig) -> None:
        super().__init__()
        self.config = config
        self.norm = nn.LayerNorm(config.in_dim) if config.norm else nn.Identity()
        steps: list[nn.Module] = [nn.Linear(config.in_dim, config.out_dim)]
        for _ in range(config.layers - 1):
            steps += [nn.GELU(), nn.Linear(config.out_dim, config.out_dim)]
        self.mlp = nn.Sequential(*steps)
        self.time: nn.Linear | None = None
        if config.time_periods:
            self.time = nn.Linear(2 * config.time_periods, config.out_dim, bias=False)
            nn.init.zeros_(self.time.weight)
        self.summary: nn.Module | None = None
        if config.summary_tokens:
            width = config.summary_tokens * config.out_dim
            self.summary = nn.Sequential(
                nn.LayerNorm(config.summary_dim),
                nn.Linear(config.summary_dim, config.out_dim),
                nn.GELU(),
                nn.Linear(config.out_dim, width),
            )

    def planned_tokens(self, keep: int, frames: int) -> int:
        """M for a clip of `frames` frames of which `keep` tokens were kept."""
        return self.config.summary_tokens + self._tokens(keep, frames)

    def _tokens(self, keep: int, frames: int) -> int:
        return keep if self.config.kind == "mlp" else min(keep, self.config.tokens_per_frame * frames)

    def forward(self, vision: VisionTokens) -> list[Tensor]:
        """Embeddings (M_i, out_dim) of every clip; clips never influence each other."""
        tokens, lengths = vision.packed, vision.lengths
        if self.config.kind == "merge":
            merged = [self._merge(vision, index) for index in range(len(vision))]
            tokens, lengths = torch.cat(merged), [len(part) for part in merged]
        embedded = self.mlp(self.norm(tokens))
        if self.time is not None:
            seconds = torch.cat([vision.seconds_of(clip) for clip in range(len(vision))])
            embedded = embedded + self.time(time_waves(seconds, self.config.time_periods).to(embedded))
        projected = list(embedded.split(lengths))
        if self.summary is None:
            return projected
        assert vision.summary is not None
        summaries = self.summary(vision.summary).unflatten(1, (self.config.summary_tokens, -1))
        return [torch.cat(pair) for pair in zip(summaries, projected, strict=True)]

    def _merge(self, vision: VisionTokens, index: int) -> Tensor:
        one = vision.select(index)
        target = self._tokens(one.lengths[0], one.grids[0].frames)
        return merge_tokens(one.packed[None], target, self.config.merge_heads, one.kept[0][None])[0]


def time_waves(seconds: Tensor, periods: int) -> Tensor:
    """(N,) seconds -> (N, 2 * periods): sine, then cosine, at periods of 2, 4, ... seconds."""
    lengths = 2.0 ** torch.arange(1, periods + 1, device=seconds.device)
    angles = 2 * math.pi * seconds[:, None] / lengths
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def load_llava_projector(projector: Projector, tensors: Mapping[str, Tensor]) -> None:
    """Load LLaVA-style weights, keys ending in `mm_projector.0.weight` or `mm_projector.mlp.0.weight`.

    Raises CheckpointError naming every key that is missing, unexpected or mis-shaped.
    """
    renamed = {}
    for key, value in tensors.items():
        _, separator, rest = key.partition("mm_projector.")
        if separator:
            renamed["mlp." + rest.removeprefix("mlp.")] = value
    if not renamed:
        raise CheckpointError("The file holds no mm_projector weights.")
    load_tensors(projector, renamed)
