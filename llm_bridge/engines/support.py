"""Which engine runs which language model with which options, and a sentence where none does.

An engine is asked for by its name, or by the addresses of vLLM servers, with commas between.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from encoder.errors import ConfigError
from llm_bridge.engines.engine import EngineName
from llm_bridge.engines.llama_context import check_installed, installed
from llm_bridge.engines.vllm_server import check_vllm_installed, default_python

LLAMACPP_ADVICE = {
    "adapters": "merge them into the file: fluxchat export --adapters DIR",
    "quantize": "the file has its own types, and fluxchat export --type Q4_0 writes others",
    "device_map": "leave it out",
}
VLLM_ADVICE = {
    "quantize": "start a server with vLLM's own --quantization, and give its address as engine",
    "device_map": "start a server with --tensor-parallel-size, and give its address as engine",
}


def chosen_engine(name: str | Path, engine: str | None, **options: Any) -> EngineName:
    """The engine that a language model gets with these options of `load_llm`.

    Raises ConfigError for what an engine cannot carry, before anything is loaded.
    """
    if engine is None:
        return "llamacpp" if takes_llamacpp(name, **options) else "local"
    if engine == "vllm" or is_address(engine):
        check_vllm(name, engine, **options)
        return "vllm"
    if engine == "llamacpp":
        check_llamacpp(name, **options)
        return "llamacpp"
    if engine != "local":
        known = ", ".join(get_args(EngineName))
        raise ConfigError(f"There is no engine {engine[:60]!r}: take {known}, or http://host:8000.")
    return "local"


def is_address(engine: str) -> bool:
    """Whether it says where servers are, and not an engine's name."""
    return "://" in engine


def check_vllm(name: str | Path, engine: str, **options: Any) -> None:
    """Raises ConfigError for what vLLM cannot carry. options: as of `load_llm`."""
    if is_gguf(name):
        raise ConfigError(
            f"The engine vllm runs model folders and hub ids, and {name} is a GGUF file: give the model that "
            "it was made of."
        )
    _refuse("vllm", VLLM_ADVICE, options)
    if not is_address(engine):
        check_vllm_installed(default_python())


def check_llamacpp(name: str | Path, **options: Any) -> None:
    """Raises ConfigError for what llama.cpp cannot carry. options: as of `load_llm`."""
    if not is_gguf(name):
        raise ConfigError(
            f"The engine llamacpp runs GGUF files, and {name} is none: give one with llm "
            "(fluxchat export writes one)."
        )
    _refuse("llamacpp", LLAMACPP_ADVICE, options)
    check_installed("The engine llamacpp")


def _refuse(engine: EngineName, advice: Mapping[str, str], options: Mapping[str, Any]) -> None:
    if (option := _first_given(advice, options)) is not None:
        raise ConfigError(f"The engine {engine} takes no {option}: {advice[option]}.")


def _first_given(advice: Mapping[str, str], options: Mapping[str, Any]) -> str | None:
    """The first option that was given and that there is advice against."""
    return next((option for option in advice if options.get(option)), None)


def takes_llamacpp(name: str | Path, **options: Any) -> bool:
    """Whether llama.cpp is there, and runs a model with these options."""
    return is_gguf(name) and why_local(name, **options) is None


def why_local(name: str | Path, **options: Any) -> str | None:
    """Why a GGUF file is not run by llama.cpp, in a few words; None where it is, and for other models."""
    if not is_gguf(name):
        return None
    if (option := _first_given(LLAMACPP_ADVICE, options)) is not None:
        return f"the engine llamacpp takes no {option} ({LLAMACPP_ADVICE[option]})"
    return None if installed() else "pip install 'fluxchat[gguf]' runs it as it is, by llama.cpp"


def is_gguf(name: str | Path) -> bool:
    """Whether it is a GGUF file, or a folder that holds one and no other model."""
    path = Path(name).expanduser()
    if path.is_dir() and not (path / "config.json").exists():
        return len(list(path.glob("*.gguf"))) == 1
    return path.suffix == ".gguf" and path.is_file()
