"""Losses that training stages share: distillation and contrast of unit vectors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cosine_distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """mean(2 - 2 cos) over all vectors of two tensors (..., D) of unit vectors.

    The distillation loss of UMT, InternVideo2 and Flux-UMT (paper supplement, Table 5): the mean squared
    distance of unit vectors. Computed in float32; the teacher's side carries no gradient.
    """
    return (2 - 2 * (student.float() * teacher.detach().float()).sum(dim=-1)).mean()


def count_alignment(aligned: Tensor, reference: Tensor) -> Tensor:
    """SmoothL1 (beta 1) between unit vectors (B, D): fewer tokens learn from most (paper Table 5, "align").

    aligned: the smaller count's feature through its aligner; reference: the largest count's feature, detached
    here. Both sides are normalised.
    """
    return F.smooth_l1_loss(
        F.normalize(aligned.float(), dim=-1), F.normalize(reference.detach().float(), dim=-1)
    )


def unit(x: Tensor) -> Tensor:
    """Vectors (..., D) at length 1, in float32; zero vectors stay zero."""
    return F.normalize(x.float(), dim=-1)


def mean_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean cosine of unit vectors (..., D), as a figure."""
    with torch.no_grad():
        return (student.float() * teacher.float()).sum(dim=-1).mean()


def contrastive_loss(video: Tensor, text: Tensor, scale: Tensor, ids: Tensor | None = None) -> Tensor:
    """Symmetric InfoNCE of unit vectors (B, D), scores scale * cosine; the "VTC" loss of InternVideo2.

    Pairs of equal `ids` (B,) count as equally right (each row's target is spread over them); without ids,
    pairs of equal texts.
    """
    scores = scale * video @ text.T
    same = (text.detach() @ text.detach().T > 0.999) if ids is None else ids[:, None] == ids[None]
    target = same.float() / same.sum(dim=1, keepdim=True)
    to_text = -(target * scores.log_softmax(dim=1)).sum(dim=1).mean()
    to_video = -(target * scores.T.log_softmax(dim=1)).sum(dim=1).mean()
    return (to_text + to_video) / 2
