"""Gradio is imported without writing type stubs."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest
from gradio.component_meta import create_or_modify_pyi

from app.page.gradio_import import sources_hidden


def test_a_component_whose_source_is_hidden_gets_no_stub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "__init__.py").touch()
    (tmp_path / "parts" / "shown.py").write_text("\nclass Shown:\n    EVENTS = []\n")
    monkeypatch.syspath_prepend(tmp_path)
    shown = importlib.import_module("parts.shown").Shown
    stub = tmp_path / "parts" / "shown.pyi"
    before = inspect.getfile
    with sources_hidden("parts"):
        create_or_modify_pyi(shown, "Shown", [])
        assert not stub.exists()
        assert inspect.getfile(Path) == before(Path)
    assert inspect.getfile is before
    create_or_modify_pyi(shown, "Shown", [])
    assert stub.exists()
