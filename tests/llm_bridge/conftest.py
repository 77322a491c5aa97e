"""Tiny parts of every layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llm_bridge.llm import LanguageModel, load_llm
from llm_bridge.model import VideoLanguageModel
from tests.llm_bridge.tiny_vlm import tiny_vlm
from tests.tiny_llms import LAYOUTS


@pytest.fixture(scope="session")
def tiny_llm(llm_folder: Callable[[str], Path]) -> Callable[[str], LanguageModel]:
    """A loaded tiny language model by layout."""
    loaded: dict[str, LanguageModel] = {}

    def load(layout: str) -> LanguageModel:
        if layout not in loaded:
            loaded[layout] = load_llm(llm_folder(layout), device="cpu", dtype=torch.float32)
        return loaded[layout]

    return load


# For tests that decode: one layout always, the others with the slow tests.
ONE_QUICK = [
    layout if layout == "qwen2" else pytest.param(layout, marks=pytest.mark.slow) for layout in LAYOUTS
]


@pytest.fixture(params=LAYOUTS)
def llm(request: pytest.FixtureRequest, tiny_llm: Callable[[str], LanguageModel]) -> LanguageModel:
    """Every layout in turn."""
    return tiny_llm(request.param)


@pytest.fixture
def model(llm_folder: Callable[[str], Path]) -> VideoLanguageModel:
    """A tiny model of all parts."""
    return tiny_vlm(llm_folder("qwen2"))
