"""Writes a language model, adapters merged, as a folder that transformers and vLLM read.

write_folder(load_llm(name, adapters=[...], dtype=torch.bfloat16), "merged")
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from encoder.errors import ConfigError
from llm_bridge.assets.scratch import ScratchFolder
from llm_bridge.model_files.bars import without_bars

if TYPE_CHECKING:
    from llm_bridge.llm import LanguageModel

TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def write_folder(llm: LanguageModel, folder: str | Path) -> Path:
    """Write settings, tokenizer and weights into a new folder, which is there once it is whole.

    Raises ConfigError for a quantised model, and for a folder that cannot be made.
    """
    folder = Path(folder)
    check_folder_export(folder)
    if llm.quantize is not None:
        raise ConfigError("A quantised model cannot be written as a folder: leave out quantize.")
    scratch = ScratchFolder(f".{folder.name}.", folder.parent)
    try:
        inner = Path(scratch.path) / "model"
        write_into(llm, inner)
        os.rename(inner, folder)
    finally:
        scratch.remove()
    return folder


def write_into(llm: LanguageModel, folder: Path) -> None:
    """Write a language model's files into a folder."""
    with without_bars():
        llm.model.save_pretrained(folder)
    llm.tokenizer.save_pretrained(folder)
    mode = (folder / "config.json").stat().st_mode
    for file in folder.glob("*.safetensors"):  # which safetensors lets its owner alone read
        file.chmod(mode)


def check_folder_export(folder: Path, kind: str = "BF16") -> None:
    """Refuses what cannot be written, before a model is loaded; raises ConfigError."""
    if kind.upper() not in TYPES:
        raise ConfigError(
            f"A folder is written as one of {', '.join(TYPES)}, not {kind[:40]}: a name that ends in .gguf "
            "makes a GGUF file."
        )
    if folder.exists():
        raise ConfigError(f"{folder} is there already: choose another name.")
    if not folder.parent.is_dir():
        raise ConfigError(f"There is no folder {folder.parent}.")
