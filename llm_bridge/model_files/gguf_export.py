"""Writes a language model of transformers as one GGUF file, adapters merged.

    write_gguf(load_llm(...), "model.gguf", "Q4_0")

Layers of the kinds in ARCHITECTURES, byte-level BPE. The tokenizer goes along twice: in llama.cpp's own
form, and as the whole of tokenizer.json under TOKENIZER, from which it is read back as it was. Types of 16
and 32 bits are written here; smaller ones are made of F32 by llama.cpp, where it is installed (extra: gguf).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from encoder.errors import ConfigError, ModelError
from llm_bridge.model_files.gguf_tokenizer import CONFIG, TOKENIZER

if TYPE_CHECKING:
    from llm_bridge.llm import LanguageModel

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}  # as GGUF calls them
# llama_ftype of llama.h: what llama.cpp calls a mixture of types.
PLAIN = {"F32": 0, "F16": 1, "BF16": 32}
QUANTISED = {
    **{"Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9},
    **{"Q3_K_M": 12, "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_M": 17, "Q6_K": 18},
}
TYPES = (*PLAIN, *QUANTISED)
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # types of tokens


def write_gguf(llm: LanguageModel, path: str | Path, kind: str = "Q8_0") -> Path:
    """Write all of a language model to a new file, or over an old one once it is whole.

    kind: one of TYPES. Raises ConfigError for another one, ModelError for a model that cannot be written.
    """
    path, kind = Path(path), kind.upper()
    check_export(path, kind)
    _check_model(llm)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
        first = Path(scratch) / "first.gguf"
        _write(llm, first, kind if kind in PLAIN else "F32")
        if kind in QUANTISED:
            from llm_bridge.engines.llama_context import quantise

            quantise(first, Path(scratch) / "second.gguf", QUANTISED[kind])
            first = Path(scratch) / "second.gguf"
        os.replace(first, path)
    return path


def check_export(path: Path, kind: str) -> None:
    """Refuses what cannot be written before a model is loaded; raises ConfigError or ModelError."""
    kind = kind.upper()
    if kind not in TYPES:
        raise ConfigError(f"A GGUF file is written as one of {', '.join(TYPES)}, not {kind[:40]}.")
    if path.suffix != ".gguf":
        raise ConfigError(f"{path} must end in .gguf.")
    if not path.parent.is_dir():
        raise ConfigError(f"There is no folder {path.parent}.")
    if kind in QUANTISED:
        from llm_bridge.engines.llama_context import check_installed

        check_installed(f"Writing {kind}")


def _check_model(llm: LanguageModel) -> None:
    config, name = llm.model.config.get_text_config(), llm.name
    if llm.quantize is not None:
        raise ConfigError("A quantised model cannot be written as GGUF: leave out quantize.")
    if config.model_type not in ARCHITECTURES:
        raise ModelError(
            f"{name} is of kind {config.model_type}; {', '.join(ARCHITECTURES)} can be written as GGUF. "
            "Of other kinds, convert_hf_to_gguf.py of llama.cpp makes files."
        )
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        raise ModelError(
            f"{name} scales its positions ({rope['rope_type']}), which is not written as GGUF here."
        )
    if getattr(config, "mlp_bias", False) or getattr(config, "hidden_act", "silu") != "silu":
        raise ModelError(f"{name} has layers of an unusual form, which are not written as GGUF here.")
    if _window(config):
        raise ModelError(f"{name} attends within a window, which is not written as GGUF here.")
    if '"ByteLevel"' not in llm.tokenizer.backend_tokenizer.to_str():
        raise ModelError(
            f"The tokenizer of {name} is no byte-level BPE, so that it is not written as GGUF here."
        )


def _window(config: Any) -> bool:
    """Whether some layers see the last positions only."""
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        return True
    used = getattr(config, "use_sliding_window", config.model_type == "mistral")
    return bool(used and getattr(config, "sliding_window", None))


def _write(llm: LanguageModel, path: Path, kind: str) -> None:
    from gguf import GGUFWriter

    architecture = ARCHITECTURES[llm.model.config.get_text_config().model_type]
    writer = GGUFWriter(path, architecture)
    try:
        _add_settings(writer, llm, kind)
        _add_tokenizer(writer, llm)
        for name, tensor in _tensors(llm, architecture):
            _add_tensor(writer, name, tensor, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _add_settings(writer: Any, llm: LanguageModel, kind: str) -> None:
    config = llm.model.config.get_text_config()
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = getattr(config, "rope_parameters", None) or {}
    writer.add_name(Path(llm.name).name)
    writer.add_file_type(PLAIN[kind])
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(float(rope.get("rope_theta", getattr(config, "rope_theta", 10000.0))))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_string(CONFIG, config.to_json_string(use_diff=False))


def _add_tokenizer(writer: Any, llm: LanguageModel) -> None:
    import json

    tokenizer, size = llm.tokenizer, llm.model.config.get_text_config().vocab_size
    whole = tokenizer.backend_tokenizer.to_str()
    settings = json.loads(whole)
    names: dict[int, tuple[str, int]] = {
        number: (text, NORMAL) for text, number in settings["model"]["vocab"].items()
    }
    for added in settings["added_tokens"]:
        names[added["id"]] = (added["content"], CONTROL if added["special"] else USER_DEFINED)
    listed = [names.get(number, (f"[PAD{number}]", UNUSED)) for number in range(size)]
    merges = [m if isinstance(m, str) else " ".join(m) for m in settings["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_splitting(settings["pre_tokenizer"]))
    writer.add_token_list([text for text, _ in listed])
    writer.add_token_types([number for _, number in listed])
    writer.add_token_merges(merges)
    for name in ("bos", "eos", "pad", "unk"):
        if (number := getattr(tokenizer, f"{name}_token_id", None)) is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id])
    if template := tokenizer.chat_template:
        writer.add_chat_template(template)
    writer.add_string(TOKENIZER, whole)


def _splitting(pre_tokenizer: Any) -> str:
    """llama.cpp's name of how text is split before BPE, by what tells the splittings that it knows apart."""
    import json

    text = json.dumps(pre_tokenizer)
    if r"\\p{N}{1,3}" in text:
        return "llama-bpe"
    if r"\\p{N}" in text:
        return "qwen2"
    return "smollm" if '"Digits"' in text else "gpt-2"


def _tensors(llm: LanguageModel, architecture: str) -> Iterator[tuple[str, Tensor]]:
    """Names and values as llama.cpp wants them."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    config = llm.model.config.get_text_config()
    arch = next(key for key, name in MODEL_ARCH_NAMES.items() if name == architecture)
    known = get_tensor_name_map(arch, config.num_hidden_layers)
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    embedding = llm.model.get_input_embeddings().weight
    for name, tensor in llm.model.state_dict().items():
        if name == "lm_head.weight" and tensor.data_ptr() == embedding.data_ptr():
            continue  # tied
        target = known.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise ModelError(f"{llm.name} has weights that GGUF has no name for: {name[:80]}.")
        if architecture == "llama" and ".q_proj." in name:
            tensor = _paired(tensor, heads)
        elif architecture == "llama" and ".k_proj." in name:
            tensor = _paired(tensor, kv_heads)
        yield target, tensor


def _paired(tensor: Tensor, heads: int) -> Tensor:
    """Rows of a head as llama.cpp turns them: pairs side by side, not half a head apart."""
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


def _add_tensor(writer: Any, name: str, tensor: Tensor, kind: str) -> None:
    from gguf import GGMLQuantizationType

    tensor = tensor.detach().cpu()
    if tensor.dim() < 2 or kind == "F32":  # norms and biases are small and stay exact
        writer.add_tensor(name, tensor.float().contiguous().numpy())
    elif kind == "F16":
        writer.add_tensor(name, tensor.half().contiguous().numpy())
    else:
        raw = tensor.bfloat16().contiguous().view(torch.int16).numpy().view("uint8")
        writer.add_tensor(name, raw, raw_dtype=GGMLQuantizationType.BF16)
