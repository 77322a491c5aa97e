"""Losses one after the other: each goes backward before the next goes forward, so that the activations of one
alone are in memory. The gradients are those of the sum of the losses.

turns = InTurn(patches, model.parameters())
for kept in choices:
    turns.add(loss_of(turns.shared, kept))   # computes gradients, and frees what they needed
turns.loss().backward()                      # hands them out
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from encoder.errors import ConfigError


class _HandOut(torch.autograd.Function):
    """A number whose gradients are known: backward multiplies them by what it is given."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, gradients: list[Tensor | None], *inputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        return total.clone()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, []
        return None, None, *(None if g is None else g * outer[0].to(g.dtype) for g in gradients)


class InTurn:
    """shared: what all losses start from, (...), computed once; its own graph goes backward at the end.

    Raises ConfigError for parameters that are shared out among processes (FSDP), which are whole in
    the wrapper's own forward and backward only.
    """

    def __init__(self, shared: Tensor, parameters: Iterable[nn.Parameter]) -> None:
        learnt: list[Tensor] = [p for p in parameters if p.requires_grad]
        if any(hasattr(p, "to_local") for p in learnt):
            raise ConfigError("passes_in_turn needs whole parameters: use it with DDP, or leave it out.")
        self.shared = shared.detach().requires_grad_(shared.requires_grad)
        self._total = torch.zeros((), device=shared.device)
        self._of = ([self.shared] if shared.requires_grad else []) + learnt
        self._inputs = ([shared] if shared.requires_grad else []) + learnt
        self._gradients: list[Tensor | None] = [None] * len(self._of)

    def add(self, loss: Tensor) -> None:
        """Gradients of one loss; its graph is freed."""
        found = torch.autograd.grad(loss, self._of, allow_unused=True)
        for place, new in enumerate(found):
            old = self._gradients[place]
            if new is not None:
                self._gradients[place] = new if old is None else old + new
        self._total += loss.detach()

    def loss(self) -> Tensor:
        """The sum of the losses, with their gradients."""
        return _HandOut.apply(self._total, self._gradients, *self._inputs)
