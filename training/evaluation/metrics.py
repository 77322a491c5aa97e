"""Metrics of the tables, as pure functions: recall at k, dual softmax, top-k accuracy, MVBench letters.

Ties are never in our favour: what scores the same as a right answer counts as if it came before it, so that a
model which says the same of everything gets nothing for it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from encoder.errors import DataError
from training.evaluation.answer_scoring import wilson

KS = (1, 5, 10)
Duplicates = Literal["strict", "equal"]


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
        "T2V": recalls(best_ranks(to_video, right)),
        "V2T": recalls(best_ranks(to_text[described], right.T[described])),
    }


def top_k(scores: Tensor, labels: Tensor, k: int) -> Tensor:
    """Whether the true class is among the first k: scores (B, C), labels (B,) -> (B,) bool."""
    right = torch.nn.functional.one_hot(labels, scores.shape[1]).bool()
    return best_ranks(scores, right) < k


# -- MVBench ------------------------------------------------------------------------------------------------

_REMOVED = ';/[]"{}()=+\\_->@<`,?!'


def letter_flash(text: str) -> str | None:
    """The option letter by the rule of the lmms-eval task that VideoChat-Flash uses: "C. ..." at the start,
    else the first letter from A to E that stands alone once punctuation is gone, in either case.

    So "a dog" answers A; that is the published rule.
    """
    stripped = text.strip()
    if found := re.match(r"([A-Ea-e])\.\s*\S", stripped):
        return found.group(1).upper()
    cleaned = stripped.translate(str.maketrans(_REMOVED + "\n\t", " " * (len(_REMOVED) + 2)))
    cleaned = re.sub(r"\.(?!\d)", "", cleaned).strip(" '")
    found = re.search(r"\b([A-Ea-e])\b", cleaned)
    return found.group(1).upper() if found else None


def letter_videochat2(text: str) -> str | None:
    """The option letter of a completion of "Best option:(": the letter it begins with."""
    found = re.match(r"\s*\(?\s*([A-Ea-e])\b", text)
    return found.group(1).upper() if found else None


@dataclass(frozen=True)
class TaskScore:
    """One task of MVBench. empty: answers without any text, which the published share leaves out."""

    right: int
    answered: int
    empty: int

    @property
    def percent(self) -> float | None:
        """100 * right / answered, None when nothing was."""
        return 100 * self.right / self.answered if self.answered else None


def mvbench_scores(rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, TaskScore], float | None]:
    """Scores by task of rows {task, answer, letter, truth}, and the mean over tasks with answers."""
    tasks: dict[str, TaskScore] = {}
    for row in rows:
        old = tasks.get(row["task"], TaskScore(0, 0, 0))
        empty = not row["answer"].strip()
        right = not empty and row["letter"] == row["truth"]
        tasks[row["task"]] = TaskScore(old.right + right, old.answered + (not empty), old.empty + empty)
    percents = [score.percent for score in tasks.values() if score.percent is not None]
    return tasks, sum(percents) / len(percents) if percents else None
