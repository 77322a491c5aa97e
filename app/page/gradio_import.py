"""Imports Gradio sooner: without the type stubs that it makes anew at each import.

Gradio parses the source of every component as often as the component has methods, and writes a `.pyi` file
beside itself where it may (its `create_or_modify_pyi`); only editors read those. It leaves a component alone
whose source file cannot be told, which is what it is told here, of its own components only.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def sources_hidden(package: str) -> Iterator[None]:
    """`inspect.getfile` raises OSError for what a package defines, as for what was never in a file."""
    getfile = inspect.getfile

    def getfile_elsewhere(thing: Any) -> str:
        if str(getattr(thing, "__module__", "")).partition(".")[0] == package:
            raise OSError(f"{thing} is of {package}")
        return getfile(thing)

    inspect.getfile = getfile_elsewhere  # type: ignore[assignment]
    try:
        yield
    finally:
        inspect.getfile = getfile


with sources_hidden("gradio"):
    import gradio

__all__ = ["gradio"]
