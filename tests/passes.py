"""Random language models held in hand: what happens before every pass, and answers that do not end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from llm_bridge.llm import LanguageModel


@contextmanager
def before_each_pass(llm: LanguageModel, act: Callable[[], object]) -> Iterator[None]:
    """Call a function before each pass. All are those of transformers meanwhile: no hook sees a lean one."""

    def hook(*_: object) -> None:
        act()

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(llm.__dict__, "lean", None)
        handle = llm.model.register_forward_pre_hook(hook)
        try:
            yield
        finally:
            handle.remove()


@contextmanager
def slow_passes(llm: LanguageModel) -> Iterator[None]:
    """Every pass takes half a second: there is a minute to stop an answer of 128 tokens."""
    with before_each_pass(llm, lambda: time.sleep(0.5)):
        yield


@contextmanager
def held(llm: LanguageModel) -> Iterator[None]:
    """No pass begins until the block is left."""
    go = threading.Event()
    with before_each_pass(llm, go.wait):
        try:
            yield
        finally:
            go.set()


def never_ends(llm: LanguageModel) -> None:
    """Answers go on until they are stopped or as long as allowed: a random model may end anywhere.

    Where it ends differs between processors, and no test may depend on it. Call it before the first answer.
    """
    with torch.no_grad():  # a logit of zero is never the best of hundreds of random ones
        llm.model.get_output_embeddings().weight[sorted(llm.eos_ids)] = 0
