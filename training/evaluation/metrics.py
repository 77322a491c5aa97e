"""Metrics of the tables, as pure functions: shares with intervals, recall at k, dual softmax, top-k accuracy.

Ties are never in our favour: what scores the same as a right answer counts as if it came before it, so that a
model which says the same of everything gets nothing for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from encoder.errors import DataError

KS = (1, 5, 10)
Duplicates = Literal["strict", "equal"]


# The intervals are written out here because SciPy is no dependency of an installation.
def wilson(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share; (0, 1) for no trials."""
    if total == 0:
        return 0.0, 1.0
    share, scale = right / total, 1 + z * z / total
    centre = (share + z * z / (2 * total)) / scale
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / scale
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_interval(shares: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """95 % interval of the mean of independent shares (right, total), each weighing the same.

    MOVER: the distances of each share to its Wilson limits add as squares (Zou and Donner 2008). Raises
    ZeroDivisionError for no shares.
    """
    values = [right / total if total else 0.5 for right, total in shares]
    limits = [wilson(right, total) for right, total in shares]
    mean = sum(values) / len(values)
    below = math.hypot(*(v - low for v, (low, _) in zip(values, limits, strict=True))) / len(values)
    above = math.hypot(*(high - v for v, (_, high) in zip(values, limits, strict=True))) / len(values)
    return max(0.0, mean - below), min(1.0, mean + above)


@dataclass(frozen=True)
class Share:
    """Right ones of all, with the 95 % interval of Wilson."""

    right: int
    total: int

    @property
    def value(self) -> float:
        """0 for no trials."""
        return self.right / self.total if self.total else 0.0

    def to_dict(self) -> dict[str, Any]:
        """For result files."""
        low, high = wilson(self.right, self.total)
        return {"value": round(self.value, 4), "low": round(low, 4), "high": round(high, 4), "n": self.total}

    @staticmethod
    def of(hits: Tensor) -> Share:
        """Of a boolean tensor."""
        return Share(int(hits.sum()), hits.numel())


def best_ranks(scores: Tensor, relevant: Tensor) -> Tensor:
    """Place (from 0) of the best-placed right candidate of each query.

    scores: (Q, C), higher is better; relevant: (Q, C) bool, at least one per query (DataError otherwise).
    The place is the number of wrong candidates that score at least as high.
    """
    if not bool(relevant.any(dim=1).all()):
        raise DataError("A query has no right candidate: recall is not defined for it.")
    best = scores.masked_fill(~relevant, -torch.inf).amax(dim=1, keepdim=True)
    # Written so that a score which is not a number counts against the model.
    return (~(scores < best) & ~relevant).sum(dim=1)


def recalls(ranks: Tensor, ks: Sequence[int] = KS) -> dict[str, Share]:
    """Share of queries whose right candidate is among the first k, by "R@k"."""
    return {f"R@{k}": Share.of(ranks < k) for k in ks}


def dual_softmax(scores: Tensor, scale: float = 1.0) -> Tensor:
    """Query-by-candidate cosines, each times how much its candidate prefers this query: (Q, C) -> (Q, C).

    The published code takes the softmax over queries of unscaled cosines (IV2m, tasks_clip); another `scale`
    makes it sharper (the paper's is UNVERIFIED).
    """
    return scores * (scale * scores).softmax(dim=0)


def relevance(owner: Sequence[int], videos: int, texts: Sequence[str], duplicates: Duplicates) -> Tensor:
    """(texts, videos) bool: text i describes video owner[i]; with "equal", also the videos of equal texts."""
    right = torch.zeros(len(owner), videos, dtype=torch.bool)
    right[torch.arange(len(owner)), torch.tensor(owner)] = True
    if duplicates == "equal":
        groups: dict[str, list[int]] = {}
        for index, text in enumerate(texts):
            groups.setdefault(text, []).append(index)
        for members in groups.values():
            right[members] = right[members].any(dim=0)
    return right


def retrieval(
    video: Tensor,
    text: Tensor,
    owner: Sequence[int],
    texts: Sequence[str],
    *,
    dsl: bool,
    scale: float = 1.0,
    duplicates: Duplicates = "strict",
    ks: Sequence[int] = KS,
) -> dict[str, dict[str, Share]]:
    """Recalls of text to video ("T2V", every text a query) and video to text ("V2T", best of its texts).

    video: (V, D), text: (N, D), unit vectors; owner: the video of each text. duplicates: "strict" counts only
    the text's own video as right, as the published code does; "equal" also videos with the same text.
    """
    cosines = text.float() @ video.float().T
    right = relevance(owner, len(video), texts, duplicates)
    to_video = dual_softmax(cosines, scale) if dsl else cosines
    to_text = dual_softmax(cosines.T, scale) if dsl else cosines.T
    described = right.any(dim=0)
    return {
        "T2V": recalls(best_ranks(to_video, right), ks),
        "V2T": recalls(best_ranks(to_text[described], right.T[described]), ks),
    }


def paired_recalls(video: Tensor, text: Tensor, ks: Sequence[int] = (1, 5)) -> dict[str, float]:
    """Recalls of unit vectors (N, D) whose rows belong together, flat for logs: {"t2v_r1": share, ...}."""
    pairs = range(len(text))
    ways = retrieval(video.cpu(), text.cpu(), pairs, (), dsl=False, ks=ks)
    return {f"{way.lower()}_r{k}": ways[way][f"R@{k}"].value for way in ("V2T", "T2V") for k in ks}


def top_k(scores: Tensor, labels: Tensor, k: int) -> Tensor:
    """Whether the true class is among the first k: scores (B, C), labels (B,) -> (B,) bool."""
    right = torch.nn.functional.one_hot(labels, scores.shape[1]).bool()
    return best_ranks(scores, right) < k
