"""The tokenizer that a GGUF file holds as a whole, beside llama.cpp's form of it: the same ids, at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llm_bridge.model_files.gguf_header import gguf_values

TOKENIZER = "tokenizer.huggingface.json"  # GGUF's own name for the text of a tokenizer.json
CONFIG = "transformers.config.json"  # a name of ours for that of a config.json


def whole_tokenizer(path: Path) -> Any:
    """The tokenizer of a file, None where it has it only in llama.cpp's form.

    Raises OSError or ValueError for a damaged file, and what `tokenizers` raises for a damaged text.
    """
    values = gguf_values(path)
    if not isinstance(text := values.get(TOKENIZER), str):
        return None
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer.from_str(text)
    special: dict[str, str] = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        number = values.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(number, int) and (token := raw.id_to_token(number)) is not None:
            special[f"{name}_token"] = token
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, clean_up_tokenization_spaces=False, **special)
    if isinstance(template := values.get("tokenizer.chat_template"), str):
        tokenizer.chat_template = template
    return tokenizer
