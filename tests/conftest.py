"""Fixtures that several rooms use."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.leftovers import pytest_sessionfinish, pytest_sessionstart  # noqa: F401 - hooks of every run

LONG = ("tests/app/page/", "tests/app/test_", "tests/app/server/", "tests/llm_bridge/")
# Libraries must not try the network, and tests share the machine's cores. Torch must not be imported yet: it
# reads its number of threads once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The tests and the many processes they start would compile every module anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    # One core each, and temporary files of its own: tests look whether any stayed behind.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["TMPDIR"] = tempfile.mkdtemp(prefix=f"pytest-{worker}-")
    tempfile.tempdir = None
    atexit.register(shutil.rmtree, os.environ["TMPDIR"], ignore_errors=True)


gc.disable()  # until all is collected: what is imported stays

# The same examples in every run, however slow the machine is; others: --hypothesis-profile default.
settings.register_profile(
    "same", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("same")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse names with an address, which differ from worker to worker. What takes longest goes first, so
    that no worker is left alone with it. Cases beyond those that `quick` counts are slow."""
    named = [item.nodeid for item in items if " at 0x" in item.nodeid]
    if named:
        raise pytest.UsageError(f"Give this test's parameters ids of their own: {named[0]}")
    items.sort(key=lambda item: not item.nodeid.startswith(LONG))
    seen: Counter[str] = Counter()
    for item in items:
        if (quick := item.get_closest_marker("quick")) and not item.get_closest_marker("slow"):
            name = item.nodeid.partition("[")[0]
            seen[name] += 1
            if seen[name] > quick.args[0]:
                item.add_marker("slow")


def pytest_collection_finish() -> None:
    """What was imported stays: the garbage collector need not look through it again and again."""
    gc.enable()
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def llm_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny language model by layout, made once."""
    from tests import tiny_llms  # imports torch

    made: dict[str, Path] = {}

    def folder(layout: str) -> Path:
        if layout not in made:
            made[layout] = tiny_llms.make(tmp_path_factory.mktemp(layout), layout)
        return made[layout]

    return folder
