"""Losses against small cases worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from training.trainer.losses import cosine_distillation, count_alignment, mean_cosine, unit


def test_cosine_distillation_by_hand() -> None:
    student = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.6, 0.8], [1.0, 0.0]]])
    teacher = torch.tensor([[[1.0, 0.0], [0.0, -1.0]], [[1.0, 0.0], [0.0, 1.0]]])
    # cosines 1, -1, 0.6, 0: 2 - 2 cos = 0, 4, 0.8, 2
    assert cosine_distillation(student, teacher).item() == pytest.approx(6.8 / 4)
    assert mean_cosine(student, teacher) == pytest.approx(0.6 / 4)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(2, 9))
def test_cosine_distillation_is_the_squared_distance_of_unit_vectors(seed: int, rows: int, dim: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = (F.normalize(torch.randn(rows, dim, generator=generator), dim=-1) for _ in range(2))
    loss = cosine_distillation(a, b).item()
    assert loss == pytest.approx((a - b).square().sum(-1).mean().item(), abs=1e-5)
    assert -1e-6 <= loss <= 4 + 1e-6


def test_the_teacher_gets_no_gradient() -> None:
    student, teacher = torch.ones(2, 3, requires_grad=True), torch.ones(2, 3, requires_grad=True)
    (cosine_distillation(student, teacher) + count_alignment(student, teacher)).backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_count_alignment_by_hand() -> None:
    aligned, reference = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 2.0]])
    # Unit vectors (0.6, 0.8) and (0, 1): differences 0.6 and 0.2, below beta: half the squares, mean of two.
    assert count_alignment(aligned, reference).item() == pytest.approx((0.18 + 0.02) / 2)
    assert count_alignment(5 * reference, reference).item() == 0


def test_unit_vectors() -> None:
    found = unit(torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float16))
    assert found.dtype == torch.float32
    assert found.tolist() == [[pytest.approx(0.6), pytest.approx(0.8)], [0.0, 0.0]]
    assert math.isclose(found[0].norm().item(), 1.0, rel_tol=1e-6)
