"""Fitting the score of familiarity: a logistic regression, and a small network that sees what it cannot.

    weight, bias, network = fit_score(features, foreign, strength=0.01, units=32, networks=2)

Each is on the scale of its own spread, and they are added: the regression goes further beyond what was learnt
from, the network is nearer to it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llm_bridge.familiarity import Network

EPOCHS, BATCH = 12, 128
RATE, DECAY, DROPOUT = 2e-3, 0.1, 0.3


def fit_score(
    features: Tensor, foreign: Tensor, *, strength: float, units: int, networks: int, seed: int = 0
) -> tuple[Tensor, float, Network | None]:
    """Weights (F,), bias and network of a score that is high where `foreign` (N,) is 1, on features (N, F).

    strength: see `fit_logistic`. units: of each of so many networks, which become one; none: no network.
    """
    weight, bias = fit_logistic(features, foreign, strength)
    if units * networks < 1:
        return weight, bias, None
    spread = float((features @ weight).std())
    parts = [fit_network(features, foreign, units, seed + number) for number in range(networks)]
    scales = [float(part.score(features).std()) * networks for part in parts]
    network = Network(
        parts[0].centre,
        parts[0].spread,
        torch.cat([part.inner for part in parts]),
        torch.cat([part.inner_bias for part in parts]),
        torch.cat([part.outer / scale for part, scale in zip(parts, scales, strict=True)]),
    )
    return weight / spread, bias / spread, network


def fit_network(features: Tensor, foreign: Tensor, units: int, seed: int = 0) -> Network:
    """A network that tells `foreign` (N,), 0 or 1, by features (N, F); its weights (units, F) in 16 bit."""
    centre, spread = features.mean(0), features.std(0).clamp_min(1e-6)
    scaled, generator = (features - centre) / spread, torch.Generator().manual_seed(seed)
    count, width = features.shape
    batch = min(BATCH, count)
    inner, outer = nn.Linear(width, units), nn.Linear(units, 1)
    for layer in (inner, outer):
        for parameter in layer.parameters():
            nn.init.uniform_(parameter, -(layer.in_features**-0.5), layer.in_features**-0.5, generator)
    parameters = [*inner.parameters(), *outer.parameters()]
    solver = torch.optim.AdamW(parameters, RATE, weight_decay=DECAY)
    steps = EPOCHS * (count // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(solver, RATE, steps)
    for _ in range(EPOCHS):
        order = torch.randperm(count, generator=generator)
        for rows in order[: count // batch * batch].split(batch):
            hidden = nn.functional.gelu(inner(_dropped(scaled[rows], generator)))
            score = outer(_dropped(hidden, generator))[:, 0]
            loss = nn.functional.binary_cross_entropy_with_logits(score, foreign[rows])
            solver.zero_grad()
            loss.backward()
            solver.step()
            schedule.step()
    kept = inner.weight.detach().half(), inner.bias.detach(), outer.weight.detach()[0]
    return Network(centre, spread, *kept)


def _dropped(values: Tensor, generator: torch.Generator) -> Tensor:
    keep = torch.rand(values.shape, generator=generator) >= DROPOUT
    return values * keep / (1 - DROPOUT)


def fit_logistic(features: Tensor, foreign: Tensor, strength: float) -> tuple[Tensor, float]:
    """Weights (F,) and bias of a logistic regression of `foreign` (N,), 0 or 1, on `features` (N, F).

    strength: C of scikit-learn: the larger, the less the weights of standardised features are held back.
    """
    mean, spread = features.mean(0), features.std(0).clamp_min(1e-6)
    scaled = (features - mean) / spread
    weight = torch.zeros(features.shape[1], requires_grad=True)
    bias = torch.zeros((), requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=300, history_size=20, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        fit = torch.nn.functional.binary_cross_entropy_with_logits(scaled @ weight + bias, foreign)
        total = fit + weight.square().sum() / (2 * strength * len(foreign))
        total.backward()
        return total

    solver.step(loss)
    weight, bias = weight.detach() / spread, bias.detach()
    return weight, float(bias - mean @ weight)
