"""Tiny language models with real tokenizers, in the layouts people load: made in seconds, random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

TEXT = """\
The dog runs to the left. A red car moves up, then down. How many birds are there? Two birds fly away.
What is in the video? Describe it! A cat sleeps; the sun shines.
User: hello. Assistant: yes, no, maybe (A) (B).
The video lasts for 12.34 seconds, and 8 frames are uniformly sampled from it at 0.50, 1.50 seconds.
Naïve café, größer, señor, 日本語の文字, привет мир, emoji 🐕 🚗 🎈.
Digits 0123456789, "quotes", [brackets], <tags>.
""".splitlines()
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %} {{ m['content'] }}"
    "{{ eos_token }}"
    "{% else %}[INST] {{ m['content'] }} [/INST]{% endif %}{% endfor %}"
)
LAYOUTS = ("llama", "qwen2", "qwen3", "plain")


def make(folder: Path, layout: str, **changes: Any) -> Path:
    """A model folder: "llama" (SentencePiece), "qwen2" and "qwen3" (byte-level BPE, ChatML), or "plain" (no
    chat template). changes: to the model's configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _sentencepiece(folder) if layout == "llama" else byte_level(layout != "plain")
    tokenizer.save_pretrained(folder)
    _model(layout, len(tokenizer), tokenizer, changes).save_pretrained(folder)
    return folder


def byte_level(chat: bool = True) -> Any:
    """A trained byte-level BPE tokenizer, with the ChatML template unless `chat` is False."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token="<|im_end|>" if chat else "<|endoftext|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=special[1:],
    )
    if chat:
        tokenizer.chat_template = CHATML
    return tokenizer


def _sentencepiece(folder: Path) -> Any:
    import sentencepiece
    from transformers import LlamaTokenizer

    (folder / "text.txt").write_text("\n".join(TEXT * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=420,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.98,
        minloglevel=2,
    )
    tokenizer = LlamaTokenizer.from_pretrained(folder)
    tokenizer.chat_template = LLAMA
    return tokenizer


def _model(layout: str, vocabulary: int, tokenizer: Any, changes: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

    kind = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config, "plain": LlamaConfig}[layout]
    settings = {
        "vocab_size": vocabulary,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 1024,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
        **changes,
    }
    torch.manual_seed(sum(map(ord, layout)))
    return AutoModelForCausalLM.from_config(kind(**settings), dtype=torch.float32)
