"""Small cache files: whatever is in them or in the way, they are read, ignored or done without."""

from __future__ import annotations

import json
import logging
import os
import pwd
from pathlib import Path

import pytest

from encoder.errors import ModelError
from llm_bridge.assets import cache_dir as module
from llm_bridge.assets.cache_dir import cache_dir, read_cached, write_cached


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLUXCHAT_CACHE", str(tmp_path / "cache"))
    module._warn_once.cache_clear()
    return tmp_path / "cache"


def doubled(values: dict[str, int]) -> int:
    return 2 * values["n"]


def test_what_is_written_is_read(cache: Path) -> None:
    assert read_cached("some/n.json", doubled) is None
    write_cached("some/n.json", {"n": 4})
    assert read_cached("some/n.json", doubled) == 8
    assert [file.name for file in (cache / "some").iterdir()] == ["n.json"]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\xff\x80",
        b"[]",
        b"{}",
        b'{"m": 1}',
        b'{"n": NaN}',
        b'{"n": null}',
        b"[" * 99_999,
        b"4" * 2**21,
    ],
)
def test_rubbish_is_ignored(cache: Path, data: bytes) -> None:
    cache.mkdir()
    (cache / "n.json").write_bytes(data)
    assert read_cached("n.json", doubled) is None


def test_something_else_in_the_way_is_no_fault(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    (cache / "n.json").mkdir(parents=True)
    os.mkfifo(cache / "pipe.json")
    (cache / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        for name in ("n.json", "pipe.json", "file/n.json"):
            assert read_cached(name, doubled) is None
        for name in ("n.json", "file/n.json", "file/m.json"):
            write_cached(name, {"n": 1})
    assert 1 <= len(caplog.records) <= 2  # once for each reason
    assert sorted(path.name for path in cache.iterdir()) == ["file", "n.json", "pipe.json"]


def test_a_full_disk_is_no_fault(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cached("n.json", {"n": 1})

    def full(self: Path, text: str) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    write_cached("n.json", {"n": 2})
    monkeypatch.undo()
    assert json.loads((cache / "n.json").read_text()) == {"n": 1}
    assert [path.name for path in cache.iterdir()] == ["n.json"]


def test_the_folder_is_where_the_user_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLUXCHAT_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_dir() == tmp_path / ".cache" / "fluxchat"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_dir() == tmp_path / ".cache" / "fluxchat"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "fluxchat"
    monkeypatch.setenv("FLUXCHAT_CACHE", "~/own")
    assert cache_dir() == tmp_path / "own"


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(uid)

    for name in ("FLUXCHAT_CACHE", "HOME", "XDG_CACHE_HOME", "USER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(ModelError, match="set FLUXCHAT_CACHE"):
        cache_dir()
    assert read_cached("n.json", doubled) is None
    write_cached("n.json", {})
