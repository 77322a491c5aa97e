"""What happens before every pass of a language model, for tests that slow one down or make it fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
from torch import Tensor

from llm_bridge.lean.decoder import LeanBatch
from llm_bridge.llm import LanguageModel


@contextmanager
def before_each_pass(llm: LanguageModel, act: Callable[[], object]) -> Iterator[None]:
    """Call a function before each pass: of the model's own code, and of the lean one, which no hook sees."""

    def hook(*_: object) -> None:
        act()

    def acting_step(batch: LeanBatch, tokens: Sequence[int], shifts: Sequence[int] = ()) -> Tensor:
        act()
        return step(batch, tokens, shifts)

    step, handle = LeanBatch.step, llm.model.register_forward_pre_hook(hook)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LeanBatch, "step", acting_step)
        try:
            yield
        finally:
            handle.remove()
