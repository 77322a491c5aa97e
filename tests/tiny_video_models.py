"""Tiny stock video models with real tokenizers, in the layouts people load: random, made in seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tests.tiny_llms import TEXT

SPECIAL = {
    "smolvlm": [
        *("<|endoftext|>", "<|im_start|>", "<end_of_utterance>"),
        *("<fake_token_around_image>", "<global-img>", "<image>", "<video>"),
    ]
}
TEMPLATES = {
    # As the hub's SmolVLM2 has it.
    "smolvlm": (
        "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
        "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
        "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
        "{% elif line['type'] == 'image' %}{{ '<image>' }}{% elif line['type'] == 'video' %}{{ '<video>' }}"
        "{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
    )
}
ENDS = {"smolvlm": "<end_of_utterance>"}
KINDS = tuple(TEMPLATES)


def make(
    folder: Path, kind: str, *, scale: float = 0.15, dtype: torch.dtype = torch.float32, **changes: Any
) -> Path:
    """A model folder of one of KINDS.

    scale: of its random weights, large enough that answers differ. changes: to its configuration.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(kind)
    tokenizer.save_pretrained(folder)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL[kind]}
    model = _randomised(MODELS[kind](len(tokenizer), ids, changes), scale).to(dtype)
    model.generation_config.eos_token_id = ids[ENDS[kind]]
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSORS[kind]))
    return folder


def _tokenizer(kind: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = SPECIAL[kind]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token=ENDS[kind],
        pad_token="<|endoftext|>",
        additional_special_tokens=special[1:],
    )
    tokenizer.chat_template = TEMPLATES[kind]
    return tokenizer


def _randomised(model: Any, scale: float) -> Any:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * scale)
            else:
                parameter.add_(noise * 0.05)
    return model.eval()


def _smolvlm(vocabulary: int, ids: dict[str, int], changes: dict[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.for_model(
        "smolvlm",
        text_config=changes.get("text")
        or {
            "model_type": "llama",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "vocab_size": vocabulary,
            "max_position_embeddings": 4096,
            "pad_token_id": 0,
        },
        vision_config=changes.get("vision")
        or {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "image_size": 64,
            "patch_size": 8,
        },
        scale_factor=changes.get("scale_factor", 2),
        image_token_id=ids["<image>"],
    )
    return AutoModelForImageTextToText.from_config(config, dtype=torch.float32)


MODELS = {"smolvlm": _smolvlm}
PROCESSORS: dict[str, dict[str, Any]] = {
    "smolvlm": {
        "image_processor_type": "SmolVLMImageProcessor",
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 1,
        "size": {"longest_edge": 64},
        "max_image_size": {"longest_edge": 64},
        "do_image_splitting": False,
    }
}
