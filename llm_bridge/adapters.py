"""LoRA adapters in a loaded language model."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from encoder.checkpoint import read_tensors
from encoder.errors import FluxChatError, ModelError

# What a configuration of peft may say without changing how matrices are merged; all else must be unset.
_WITHOUT_EFFECT = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "inference_mode", "lora_alpha", "lora_dropout"),
        *("megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "revision"),
        *("target_modules", "task_type"),
    }
)
_PREFIX = "base_model.model."


def apply_adapter(model: nn.Module, adapter: str | Path, *, merge: bool) -> Any:
    """The model with an adapter of peft's format, a folder or hub id, in its weights or (merge=False) beside.

    A plain LoRA is merged without peft, whose import takes a second or two.
    Raises ModelError when there is no adapter, or it does not fit the model.
    """
    folder = Path(adapter)
    if folder.exists() and not (folder / "adapter_config.json").exists():
        raise ModelError(f"{adapter} is not an adapter: it has no adapter_config.json.")
    if merge and _merge_plain(model, folder):
        return model
    with quiet_peft():
        from peft import PeftModel
    try:
        with quiet_peft():
            adapted = PeftModel.from_pretrained(model, str(adapter))
    except Exception as error:
        raise ModelError(
            f"The adapter {adapter} does not fit the language model: {first_line(error)}."
        ) from error
    return adapted.merge_and_unload() if merge else adapted


def _merge_plain(model: nn.Module, folder: Path) -> bool:
    """Add scale * B A to the weights that a plain LoRA adapts; False, with nothing done, for others."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = read_tensors(folder / "adapter_model.safetensors")
    except (OSError, ValueError, FluxChatError):
        return False
    if not _is_plain(config):
        return False
    pairs = _pairs(model, tensors, config["r"])
    if pairs is None:
        return False
    scale = config["lora_alpha"] / config["r"]
    with torch.no_grad():
        for weight, a, b in pairs:
            weight += (b.to(weight.device, torch.float32) @ a.to(weight.device, torch.float32)) * scale
    return True


def _is_plain(config: Mapping[str, Any]) -> bool:
    if config.get("peft_type") != "LORA" or config.get("init_lora_weights") not in (True, False):
        return False
    others = config.keys() - _WITHOUT_EFFECT - {"init_lora_weights"}
    return all(not config[key] or (key, config[key]) == ("bias", "none") for key in others)


def _pairs(
    model: nn.Module, tensors: Mapping[str, Tensor], rank: int
) -> list[tuple[Tensor, Tensor, Tensor]] | None:
    """(weight (out, in), A (rank, in), B (out, rank)) of every adapted layer; None when one does not fit."""
    found = []
    for name, a in tensors.items():
        path, end, rest = name.removeprefix(_PREFIX).partition(".lora_A.weight")
        if not end:
            continue
        b = tensors.get(f"{_PREFIX}{path}.lora_B.weight")
        try:
            layer = model.get_submodule(path)
        except AttributeError:
            return None
        if b is None or rest or not isinstance(layer, nn.Linear) or layer.weight.is_meta:
            return None
        rows, columns = layer.weight.shape
        if a.shape != (rank, columns) or b.shape != (rows, rank):
            return None
        found.append((layer.weight, a, b))
    return found if 2 * len(found) == len(tensors) else None


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Around imports and uses of peft: no word about what no user of FluxChat can change.

    It asks for `is_gradient_checkpointing`, which transformers renamed, and brings bitsandbytes along, which
    says that an optional kernel for CPUs is not installed.
    """
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
            yield
    finally:
        logger.setLevel(level)


def first_line(error: BaseException) -> str:
    """What an error says, in one line without its full stop."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
