"""Tiny stock video models with real tokenizers, in the layouts people load: random, made in seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_llms import TEXT

QWEN_TOKENS = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
]
SPECIAL = {
    "qwen3_vl": QWEN_TOKENS,
    "qwen2_5_vl": QWEN_TOKENS,
    "llava_onevision": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"],
    "smolvlm": [
        *("<|endoftext|>", "<|im_start|>", "<end_of_utterance>"),
        *("<fake_token_around_image>", "<global-img>", "<image>", "<video>"),
    ],
}
# A turn as the hub's Qwen-VL models have it.
QWEN_TURN = (
    "{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% elif part['type'] == 'video' %}{{ '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}"
)
QWEN_END = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
TEMPLATES = {
    # As the hub's: media before the words of a message.
    "llava_onevision": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>' }}{% endif %}"
        "{% endfor %}{% for part in message['content'] %}{% if part['type'] == 'video' %}{{ '<video>' }}"
        "{% endif %}{% endfor %}{% for part in message['content'] %}{% if part['type'] == 'text' %}"
        "{{ '\n' + part['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>' }}{% endfor %}" + QWEN_END
    ),
    "qwen2_5_vl": (
        "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
        + QWEN_TURN
        + "{% endfor %}"
        + QWEN_END
    ),
    "qwen3_vl": "{% for message in messages %}" + QWEN_TURN + "{% endfor %}" + QWEN_END,
    # As the hub's SmolVLM2 has it.
    "smolvlm": (
        "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
        "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
        "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
        "{% elif line['type'] == 'image' %}{{ '<image>' }}{% elif line['type'] == 'video' %}{{ '<video>' }}"
        "{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
    ),
}
ENDS = {
    "smolvlm": "<end_of_utterance>",
    "qwen3_vl": "<|im_end|>",
    "qwen2_5_vl": "<|im_end|>",
    "llava_onevision": "<|im_end|>",
}
KINDS = tuple(TEMPLATES)
# For tests that take seconds for each kind: one always, the others with the slow tests.
ONE_QUICK = ["smolvlm", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind != "smolvlm")]


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


def _qwen_text(vocabulary: int, **rope: Any) -> dict[str, Any]:
    return {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": vocabulary,
        "max_position_embeddings": 4096,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [2, 3, 3],
            **rope,
        },
    }


def _qwen_ids(ids: dict[str, int]) -> dict[str, int]:
    names = {"image_token": "image_pad", "video_token": "video_pad"}
    names |= {"vision_start_token": "vision_start", "vision_end_token": "vision_end"}
    return {f"{name}_id": ids[f"<|{token}|>"] for name, token in names.items()}


def _qwen3_vl(vocabulary: int, ids: dict[str, int], changes: dict[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.for_model(
        "qwen3_vl",
        text_config=_qwen_text(vocabulary, mrope_interleaved=True) | {"head_dim": 16},
        vision_config={
            "depth": 4,
            "hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 64,
            "out_hidden_size": 64,
            "patch_size": 16,
            "deepstack_visual_indexes": [0, 1, 2],
            "num_position_embeddings": 64,
        },
        **_qwen_ids(ids),
    )
    return AutoModelForImageTextToText.from_config(config, dtype=torch.float32)


def _qwen2_5_vl(vocabulary: int, ids: dict[str, int], changes: dict[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.for_model(
        "qwen2_5_vl",
        text_config=_qwen_text(vocabulary) | {"eos_token_id": ids["<|im_end|>"], "bos_token_id": None},
        vision_config={
            "depth": 4,
            "hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 64,
            "out_hidden_size": 64,
            "patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [1, 3],
            "tokens_per_second": 20,  # so that times reach beyond the text behind them
        },
        **_qwen_ids(ids),
    )
    return AutoModelForImageTextToText.from_config(config, dtype=torch.float32)


def _llava_onevision(vocabulary: int, ids: dict[str, int], changes: dict[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.for_model(
        "llava_onevision",
        text_config={
            "model_type": "qwen2",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": vocabulary,
            "max_position_embeddings": 4096,
        },
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "image_size": 56,  # an odd number of patches, as 384 pixels of the hub's are
            "patch_size": 8,
            "vision_use_head": False,
        },
        image_token_index=ids["<image>"],
        video_token_index=ids["<video>"],
        image_grid_pinpoints=[[56, 56]],
    )
    return AutoModelForImageTextToText.from_config(config, dtype=torch.float32)


MODELS = {
    "smolvlm": _smolvlm,
    "qwen3_vl": _qwen3_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "llava_onevision": _llava_onevision,
}
PROCESSORS: dict[str, dict[str, Any]] = {
    "smolvlm": {
        "image_processor_type": "SmolVLMImageProcessor",
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 1,
        "size": {"longest_edge": 64},
        "max_image_size": {"longest_edge": 64},
        "do_image_splitting": False,
    },
    "qwen3_vl": {
        "image_processor_type": "Qwen2VLImageProcessor",
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        # A square of 96 becomes one of 224.
        "size": {"shortest_edge": 220**2, "longest_edge": 224**2},
    },
    "qwen2_5_vl": {
        "image_processor_type": "Qwen2VLImageProcessor",
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "size": {"shortest_edge": 220**2, "longest_edge": 224**2},
    },
    "llava_onevision": {
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "size": {"height": 56, "width": 56},
        "image_grid_pinpoints": [[56, 56]],
    },
}
