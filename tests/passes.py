"""What happens before every pass of a language model, for tests that slow one down or make it fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

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
