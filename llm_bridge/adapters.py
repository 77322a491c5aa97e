"""LoRA adapters in a loaded language model."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from encoder.checkpoint import read_tensors
from encoder.errors import FluxChatError, ModelError
from encoder.json_files import read_object
from llm_bridge.model_files.checks import check_folder, first_line, local_folder, refused, stored_bytes

# Settings of peft that do not change how matrices are merged; of a plain LoRA all others are unset.
_WITHOUT_EFFECT = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "inference_mode", "lora_alpha", "lora_dropout"),
        *("megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "revision"),
        *("target_modules", "task_type"),
    }
)
# All settings that are allowed: others of peft import modules, read files or reshape the model.
_KNOWN = _WITHOUT_EFFECT | {
    *("alpha_pattern", "bias", "ensure_weight_tying", "exclude_modules", "fan_in_fan_out"),
    *("init_lora_weights",),
    *("layers_pattern", "layers_to_transform", "lora_bias", "modules_to_save", "rank_pattern"),
    *("target_parameters", "trainable_token_indices", "use_dora", "use_qalora", "use_rslora"),
}
_PREFIX = "base_model.model."
_PLAIN_NAME = re.compile(r"([\w.^$\\|]{1,400}\*?){1,3}")  # no regular expression of it backtracks without end
LARGEST_RANK = 4096
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def apply_adapter(model: nn.Module, adapter: str | Path, *, merge: bool) -> Any:
    """The model with an adapter of peft's format, a folder or hub id, in its weights or (merge=False) beside.

    A plain LoRA is merged without peft, whose import takes a second or two. Nothing that an adapter names is
    imported or downloaded. Raises ModelError when there is no adapter, or it does not fit the model.
    """
    folder = Path(adapter)
    if folder.exists() and not (folder / CONFIG).exists():
        raise ModelError(f"{adapter} is not an adapter: it has no {CONFIG}.")
    with refused(f"Cannot get the adapter {adapter}"):
        folder = local_folder(str(adapter), patterns=(CONFIG, WEIGHTS))
    read_adapter_config(folder)  # before peft is imported
    if merge and merge_plain_lora(model, folder):
        return model
    with quiet_peft():
        from peft import PeftModel
    with refused(f"The adapter {adapter} does not fit the language model"), quiet_peft():
        settings = peft_config(folder)
        # peft only warns of layers that the file has nothing for, whose matrices are then random.
        warnings.filterwarnings("error", message=".*missing adapter keys")
        try:
            adapted = PeftModel.from_pretrained(model, str(folder), config=settings, use_safetensors=True)
        except UserWarning as error:
            raise ModelError(
                f"The adapter {adapter} does not fit the language model: its layers have other names."
            ) from error
    return adapted.merge_and_unload() if merge else adapted


def peft_config(folder: Path) -> Any:
    """An adapter's configuration as peft's object, with plain names instead of regular expressions.

    Raises ModelError as `read_adapter_config` does.
    """
    from peft import LoraConfig

    config = read_adapter_config(folder)
    settings = LoraConfig.from_pretrained(str(folder))
    if isinstance(config.get("target_modules"), str) and config["target_modules"] != "all-linear":
        settings.target_modules = _adapted(read_tensors(folder / WEIGHTS))
    return settings


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The settings of adapter_config.json; raises ModelError, in one sentence, for one that is refused.

    That is: another kind than LoRA, settings that import a module or read another file, weights as pickles.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ModelError(f"The adapter in {folder} cannot be used: it has no {name}.")
    check_folder(folder)
    try:
        config = read_object(folder / CONFIG)
        stored_bytes(folder / WEIGHTS)
        _check_config(config)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"The adapter in {folder} does not fit the language model: {first_line(error)}."
        ) from error
    return config


def _check_config(config: Mapping[str, Any]) -> None:
    """Raises ValueError for a configuration that is not of a LoRA, or does more than one."""
    if config.get("peft_type") != "LORA":
        raise ValueError(f"it is of kind {str(config.get('peft_type'))[:40]!r}, only LORA is known")
    if strange := sorted(key for key in config.keys() - _KNOWN if config[key]):
        raise ValueError(f"its setting {strange[0][:60]!r} is not known here")
    if not isinstance(config.get("init_lora_weights", True), bool):
        raise ValueError("its init_lora_weights must be true or false: convert it to plain LoRA")
    patterns = {key: config.get(f"{key}_pattern") or {} for key in ("rank", "alpha")}
    for key, pattern in patterns.items():
        if not isinstance(pattern, dict) or not all(map(_PLAIN_NAME.fullmatch, pattern)):
            raise ValueError(f"its {key}_pattern holds more than names of layers")
    for key in ("exclude_modules", "layers_pattern"):
        if isinstance(config.get(key), str) and not _PLAIN_NAME.fullmatch(config[key]):
            raise ValueError(f"its {key} holds more than names of layers")
    for rank in (config.get("r"), *patterns["rank"].values()):
        if not isinstance(rank, int) or isinstance(rank, bool) or not 0 < rank <= LARGEST_RANK:
            raise ValueError(f"its rank is {rank!r:.40}, not a number from 1 to {LARGEST_RANK}")
    for alpha in (config.get("lora_alpha"), *patterns["alpha"].values()):
        if not isinstance(alpha, (int, float)) or isinstance(alpha, bool):
            raise ValueError(f"its lora_alpha is {alpha!r:.40}, not a number")


def _adapted(tensors: Mapping[str, Tensor]) -> set[str]:
    """Paths of the layers that have matrices."""
    return {name.removeprefix(_PREFIX).partition(".lora_")[0] for name in tensors if ".lora_" in name}


def merge_plain_lora(model: nn.Module, folder: Path) -> bool:
    """Add scale * B A to the weights that a plain LoRA adapts; False, with nothing done, for others."""
    config = read_adapter_config(folder)
    if not _is_plain(config):
        return False
    try:
        tensors = read_tensors(folder / WEIGHTS)
    except FluxChatError:
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
    pairs = []
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
        pairs.append((layer.weight, a, b))
    return pairs if 2 * len(pairs) == len(tensors) else None


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Suppresses warnings of peft and bitsandbytes that no user of FluxChat can act on.

    peft reads `is_gradient_checkpointing`, which transformers renamed, and imports bitsandbytes, which warns
    that an optional kernel for CPUs is not installed.
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


def without_adapters(model: Any) -> Any:
    """The model itself, without adapters that are not merged."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
