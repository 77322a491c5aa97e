"""Fixtures that several rooms use."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import tiny_llms
from tests.leftovers import pytest_sessionfinish, pytest_sessionstart  # noqa: F401 - hooks of every run

# Libraries must not try the network, and tests share the machine's cores.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    # One core each, and temporary files of its own: tests look whether any stayed behind.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["TMPDIR"] = tempfile.mkdtemp(prefix=f"pytest-{worker}-")
    tempfile.tempdir = None
    atexit.register(shutil.rmtree, os.environ["TMPDIR"], ignore_errors=True)


@pytest.fixture(scope="session")
def llm_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny language model by layout, made once."""
    made: dict[str, Path] = {}

    def folder(layout: str) -> Path:
        if layout not in made:
            made[layout] = tiny_llms.make(tmp_path_factory.mktemp(layout), layout)
        return made[layout]

    return folder
