"""The two choices of Flux-UMT: which tokens the teacher sees, and which of those the student sees.

choice = select(patches, grid, 2048)                       # encoder.selection: the teacher's
places = student_choices(attention, (2048, 1536, 1024))    # among the teacher's
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from encoder.errors import BudgetError

StudentChoice = Literal["multinomial", "top"]


def visible_count(tokens: int, mask_ratio: float) -> int:
    """Tokens left visible, N - int(ratio * N): 410 of 2048 at 0.8 (InternVideo2's distillation).

    Raises BudgetError when none is left.
    """
    count = tokens - int(mask_ratio * tokens)
    if not 0 <= mask_ratio < 1 or count < 1:
        raise BudgetError(f"A mask ratio of {mask_ratio} leaves none of {tokens} tokens.")
    return count


def student_choices(
    attention: Tensor, counts: Sequence[int], how: StudentChoice = "multinomial", *, nested: bool = True
) -> list[Tensor]:
    """Per count, the places (B, K) among a teacher's N tokens that the student sees, ascending.

    attention: (B, N), not negative. "multinomial" draws without replacement in proportion to it, as the
    InternVideo2 distillation does; "top" takes the largest (ties to the lower place). Which of them Flux-UMT
    uses is UNVERIFIED. nested: the counts share one draw, so a smaller choice lies inside a larger one;
    otherwise each count draws anew (UNVERIFIED too; "top" is always nested). A count not below N takes all.
    """
    if min(counts, default=0) < 1:
        raise BudgetError(f"Student token counts must be at least 1, not {list(counts)}.")
    tokens = attention.shape[1]
    order: Tensor | None = None
    chosen = []
    for count in counts:
        if count >= tokens:
            chosen.append(torch.arange(tokens, device=attention.device).expand(len(attention), tokens))
            continue
        if order is None or not (nested or how == "top"):
            order = _ranking(attention, how)
        chosen.append(order[:, :count].sort(dim=1).values)
    return chosen


def _ranking(attention: Tensor, how: StudentChoice) -> Tensor:
    """(B, N) -> places in the order in which they are taken."""
    weights = attention.detach().float()
    if how == "top":
        return weights.sort(dim=1, descending=True, stable=True).indices
    # Zeros would leave too few to draw; at the smallest normal number they still come last.
    smallest = torch.finfo(torch.float32).tiny
    scaled = weights / weights.amax(dim=1, keepdim=True).clamp(min=smallest)
    return torch.multinomial(scaled.clamp(min=smallest), weights.shape[1])


def take(tokens: Tensor, places: Tensor) -> Tensor:
    """(B, N, D), (B, K) -> (B, K, D)."""
    return tokens.gather(1, places.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
