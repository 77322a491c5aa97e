"""The machine and the versions, as a bug report needs them, whether or not a model can be loaded."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
import tempfile
from typing import Any

from encoder.errors import FluxChatError
from encoder.video import confine
from fluxchat import __version__

LIBRARIES = (
    *("torch", "transformers", "tokenizers", "safetensors", "peft", "gradio", "fastapi", "numpy", "av"),
    *("decord", "pillow", "bitsandbytes", "gguf", "huggingface-hub", "kernels"),
)


def machine_info() -> dict[str, Any]:
    """Versions, the machine and its folders, as texts; never raises for what is missing."""
    info = {
        "fluxchat": __version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "system": f"{platform.platform()}, {platform.machine()}",
        "processors": f"{_processors()} of {os.cpu_count()}",
        "memory": _memory(),
        "accelerator": _accelerator(),
        "cache_folder": _cache_folder(),
        "temporary_folder": _temporary_folder(),
        "default_llm": _default_llm(),
        "sandbox": str(confine.report()),
        "encoding": f"{getattr(sys.stdout, 'encoding', None)}, file names {sys.getfilesystemencoding()}",
    }
    return info | {name: version for name in LIBRARIES if (version := _version(name)) != "not installed"}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> str:
    from llm_bridge.model_files.checks import machine_bytes

    return f"{machine_bytes() / 2**30:.1f} GiB with swap"


def _accelerator() -> str:
    import torch

    if not torch.cuda.is_available():
        return (
            "none" if not torch.accelerator.is_available() else str(torch.accelerator.current_accelerator())
        )
    return ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))


def device_gib() -> tuple[str, float]:
    """What a model would run on, and its memory in GiB."""
    import torch

    from llm_bridge.model_files.checks import machine_bytes

    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0).total_memory / 2**30
    return "CPU", machine_bytes() / 2**30


def _cache_folder() -> str:
    from llm_bridge.assets.cache_dir import cache_dir

    try:
        folder = cache_dir()
    except FluxChatError as error:
        return f"none: {error}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return f"{folder}, can be written"
    except OSError as error:
        return f"{folder}, cannot be written ({error.strerror})"


def _temporary_folder() -> str:
    try:
        return tempfile.gettempdir()
    except OSError as error:
        return f"none ({error.strerror})"


def _default_llm() -> str:
    from llm_bridge.assets.fetch import default_llm_path

    try:
        return str(default_llm_path())
    except FluxChatError as error:
        return str(error)
