"""How the tests share a machine."""

import os

import pytest
import torch


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="this process has all cores")
def test_a_worker_computes_on_one_core() -> None:
    assert torch.get_num_threads() == int(os.environ["OMP_NUM_THREADS"])
