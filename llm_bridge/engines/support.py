"""Which engine runs which language model with which options, and a sentence where none does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from encoder.errors import ConfigError
from llm_bridge.engines.llama_context import check_installed, installed

ADVICE = {
    "adapters": "merge them into the file: fluxchat export --adapters DIR",
    "quantize": "the file has its own types, and fluxchat export --type Q4_1 writes others",
    "device_map": "leave it out",
}


def check_llamacpp(name: str | Path, **options: Any) -> None:
    """Raises ConfigError for what llama.cpp cannot carry. options: as of `load_llm`."""
    if not is_gguf(name):
        raise ConfigError(
            f"The engine llamacpp runs GGUF files, and {name} is none: give one with llm "
            "(fluxchat export writes one)."
        )
    for option, advice in ADVICE.items():
        if options.get(option):
            raise ConfigError(f"The engine llamacpp takes no {option}: {advice}.")
    check_installed("The engine llamacpp")


def takes_llamacpp(name: str | Path, **options: Any) -> bool:
    """Whether llama.cpp is there, and runs a model with these options."""
    return is_gguf(name) and why_local(name, **options) is None


def why_local(name: str | Path, **options: Any) -> str | None:
    """Why a GGUF file is not run by llama.cpp, in a few words; None where it is, and for other models."""
    if not is_gguf(name):
        return None
    for option, advice in ADVICE.items():
        if options.get(option):
            return f"the engine llamacpp takes no {option} ({advice})"
    return None if installed() else "pip install 'fluxchat[gguf]' runs it as it is, by llama.cpp"


def is_gguf(name: str | Path) -> bool:
    """Whether it is a GGUF file, or a folder that holds one and no other model."""
    path = Path(name).expanduser()
    if path.is_dir() and not (path / "config.json").exists():
        return len(list(path.glob("*.gguf"))) == 1
    return path.suffix == ".gguf" and path.is_file()
