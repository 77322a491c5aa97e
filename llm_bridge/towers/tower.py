"""A vision tower: frames and a plan in, the embeddings that the language model reads out.

One file of this folder per kind. What lies outside (prompt, caches, price, page, server, evaluation) knows a
tower by this class alone. A tower says

- which inputs a budget can buy (`space`) and what a plan costs by its own shape (`macs`, `features`, `mib`);
- what it makes of pixels and K: embeddings (M, D) and the cells that were kept (`look`, `select`);
- how they stand in a prompt (`layout`): text between them, and positions of several axes where there are any.

A cell is what becomes one token: a patch of FluxViT, or the patches that a stock tower merges into one
embedding. Selection works on whole cells.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from encoder.budget import InputSpace, Plan, PlanTable
from encoder.cost import Speed, time_ms
from encoder.errors import ConfigError
from encoder.merging import Merging
from encoder.selection import Selector
from encoder.video.reader import Clip
from llm_bridge.familiarity import Familiarity
from llm_bridge.prompt import Stretch, TimeSentence

# When cells are dropped: before the tower's blocks, or after them.
Stage = Literal["before", "after"]


class Looked(NamedTuple):
    """What a tower made of a clip: embedding (M, D), and the kept cells (K,), ascending raster indices.

    M is K, or more where the model always reads something beside the cells.
    """

    embedding: Tensor
    kept: Tensor


class Tower(ABC):
    """A vision tower and its projector, frozen."""

    space: InputSpace
    stage: Stage = "before"
    fit: Literal["squash", "crop"] = "squash"
    plan_table: PlanTable | None = None
    time_form: TimeSentence = "none"
    axes: int = 1  # of the positions of its language model
    familiarity: Familiarity | None = None
    shares_calls: bool = False  # whether several clips of one shape can be computed in one call
    # What its chat template writes for a medium of a kind; empty: media stand in the text of a message.
    marks: dict[str, str] = {}  # noqa: RUF012 - never changed

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where pixels go."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Of pixels and embeddings."""

    @abstractmethod
    def describe(self) -> dict[str, str]:
        """Its parts by name, with kind, size and parameters, for people."""

    def name_with(self, llm: str) -> str:
        """What the model is called, whose language model is `llm`."""
        return llm

    # -- price ----------------------------------------------------------------------------------------------

    @abstractmethod
    def prompt_tokens(self, plan: Plan) -> int:
        """Positions that a plan's embeddings, and the text between them, take in a prompt; an estimate."""

    @abstractmethod
    def features(self, plan: Plan) -> list[float]:
        """What its time is proportional to: constant, embedding, linear and attention work in giga-MACs."""

    @abstractmethod
    def mib(self, plan: Plan) -> float:
        """Peak working memory of a plan, in MiB."""

    def macs(self, plan: Plan) -> int:
        """Multiply-accumulates of a plan."""
        return int(1e9 * sum(self.features(plan)[1:]))

    def measure(self) -> Speed:
        """Time it on a spread of its own inputs and fit `features`; some seconds."""
        rows, times = [], []
        for frames in sorted({self.space.frames[0], min(8, self.space.frames[-1])}):
            for side in sorted({self.space.sides[0], self.space.sides[-1]}):
                tokens = self.space.tokens(frames, side)
                for keep in sorted({max(1, tokens // 8), max(1, tokens // 2)}):
                    plan = self.space.square(frames, side, keep)
                    pixels = torch.zeros(3, frames, side, side)

                    def run(pixels: Tensor = pixels, plan: Plan = plan) -> None:
                        self.look(pixels, plan, "flux")

                    rows.append(self.features(plan))
                    times.append(time_ms(run, self.device, repeats=2))
        return Speed.fit(rows, times)

    @abstractmethod
    def digest(self) -> str:
        """Hash of the weights that it computes with, and when it drops cells where that can be chosen."""

    @abstractmethod
    def fingerprint(self) -> list[Any]:
        """What its speed depends on beside the machine, as plain values."""

    # -- looking --------------------------------------------------------------------------------------------

    @abstractmethod
    def pixels(self, clip: Clip, plan: Plan) -> Tensor:
        """Normalised pixels (3, T, H, W) of a clip's frames."""

    @abstractmethod
    def look(
        self,
        pixels: Tensor,
        plan: Plan,
        selector: Selector,
        times_s: Sequence[float] = (),
        seed: int = 0,
    ) -> Looked:
        """Embeddings of the kept cells; computes, without gradients. seed: of selectors that draw."""

    def look_together(
        self,
        pixels: Sequence[Tensor],
        plan: Plan,
        selector: Selector,
        times_s: Sequence[Sequence[float]],
    ) -> list[Looked]:
        """As `look` of several clips of one shape; in one call where `shares_calls`."""
        return [self.look(clip, plan, selector, times) for clip, times in zip(pixels, times_s, strict=True)]

    def merge(self, pixels: Tensor, merging: Merging, times_s: Sequence[float] = ()) -> Looked:
        """Embeddings of cells that were merged, not dropped.

        Raises ConfigError for a tower that does not merge.
        """
        raise ConfigError("vid-TLDR merges inside FluxViT: leave +vid-tldr out for a stock video model.")

    @abstractmethod
    def select(self, pixels: Tensor, plan: Plan, selector: Selector) -> Tensor:
        """The cells (K,) that `look` keeps, at the least cost."""

    def is_familiar(self, frames: Tensor) -> bool | None:
        """Whether uint8 frames (T, H, W, 3) look like what it was trained on; None when it cannot tell."""
        return None

    def layout(
        self, plan: Plan, kept: Sequence[int], times_s: Sequence[float], duration_s: float
    ) -> tuple[str | Stretch, ...]:
        """How the embeddings stand in a prompt: stretches of them with text between; empty: one stretch.

        kept: cells, ascending. times_s: of the sampled frames, empty for an image.
        """
        return ()
