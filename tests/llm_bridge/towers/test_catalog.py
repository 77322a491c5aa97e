"""The list of stock models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llm_bridge.towers.catalog import CATALOG, PER_PARAMETER, StockEntry, table
from llm_bridge.towers.stock import kinds


def test_every_kind_is_listed_and_every_model_is_of_a_kind() -> None:
    assert {entry.kind for entry in CATALOG} == set(kinds())
    assert len({entry.name for entry in CATALOG}) == len(CATALOG)


@pytest.mark.parametrize(
    ("memory_gib", "words"), [(80, "yes"), (10, "--quantize 4bit"), (14, "--quantize 8bit"), (4, "no")]
)
def test_what_fits_depends_on_the_memory(memory_gib: float, words: str) -> None:
    rows = {row["model"]: row for row in table(memory_gib)}
    assert rows["Qwen/Qwen3-VL-8B-Instruct"]["fits here"] == words


def test_smaller_precisions_take_less() -> None:
    for entry in CATALOG:
        sizes = [entry.memory_gib(name) for name in PER_PARAMETER]
        assert sizes == sorted(sizes, reverse=True)


def _text(dim: int, mlp: int, layers: int, heads: int, kv: int, vocabulary: int) -> dict[str, Any]:
    return {
        "hidden_size": dim,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocabulary,
    }


def _siglip(dim: int, mlp: int, layers: int, heads: int, side: int, patch: int) -> dict[str, Any]:
    return {
        "hidden_size": dim,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "image_size": side,
        "patch_size": patch,
    }


SIGLIP_B, SO400M = _siglip(768, 3072, 12, 12, 512, 16), _siglip(1152, 4304, 27, 16, 384, 14)
ONEVISION = SO400M | {
    "model_type": "siglip_vision_model",
    "num_hidden_layers": 26,
    "vision_use_head": False,
}
QWEN3_SMALL = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "patch_size": 16}
QWEN3_SMALL |= {"deepstack_visual_indexes": [5, 11, 17], "num_position_embeddings": 2304, "num_heads": 16}
QWEN3_LARGE = QWEN3_SMALL | {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304}
QWEN2_5 = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14}
# Shapes of the published config.json: language model, vision model, whether the head is the embedding.
SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "SmolVLM2-256M-Video-Instruct": (_text(576, 1536, 30, 9, 3, 49280), SIGLIP_B, False),
    "SmolVLM2-500M-Video-Instruct": (_text(960, 2560, 32, 15, 5, 49280), SIGLIP_B, False),
    "SmolVLM2-2.2B-Instruct": (_text(2048, 8192, 24, 32, 32, 49280), SO400M, False),
    "Qwen3-VL-2B-Instruct": (_text(2048, 6144, 28, 16, 8, 151936), QWEN3_SMALL, True),
    "Qwen3-VL-4B-Instruct": (_text(2560, 9728, 36, 32, 8, 151936), QWEN3_SMALL, True),
    "Qwen3-VL-8B-Instruct": (_text(4096, 12288, 36, 32, 8, 151936), QWEN3_LARGE, False),
    "Qwen2.5-VL-3B-Instruct": (_text(2048, 11008, 36, 16, 2, 151936), QWEN2_5, True),
    "Qwen2.5-VL-7B-Instruct": (_text(3584, 18944, 28, 28, 4, 152064), QWEN2_5, False),
    "llava-onevision-qwen2-0.5b-ov-hf": (_text(896, 4864, 24, 14, 2, 152000), ONEVISION, True),
    "llava-onevision-qwen2-7b-ov-hf": (_text(3584, 18944, 28, 28, 4, 152128), ONEVISION, False),
}
TEXT_OF_KIND: dict[str, dict[str, Any]] = {
    "smolvlm": {"model_type": "llama", "head_dim": 64},
    "qwen3_vl": {"head_dim": 128},
    "qwen2_5_vl": {},
    "llava_onevision": {"model_type": "qwen2"},
}


@pytest.mark.parametrize("entry", CATALOG, ids=lambda entry: entry.name)
@pytest.mark.quick(3)
def test_sizes_are_those_of_the_published_shapes(entry: StockEntry) -> None:
    """Built without memory, whole and tower have as many parameters as the list says."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    text, vision, tied = SHAPES[entry.name.partition("/")[2]]
    if entry.kind.startswith("qwen"):
        vision = vision | {"out_hidden_size": text["hidden_size"]}
    config = AutoConfig.for_model(
        entry.kind,
        text_config=text | TEXT_OF_KIND[entry.kind] | {"tie_word_embeddings": tied},
        vision_config=vision,
        tie_word_embeddings=tied,
        **({"scale_factor": 4 if vision is SIGLIP_B else 3} if entry.kind == "smolvlm" else {}),
    )
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    tower = kinds()[entry.kind](model, Path("nowhere"), "after")
    assert entry.parameters == round(sum(p.numel() for p in model.parameters()) / 1e6)
    assert entry.vision == round(tower.parameters / 1e6)


def test_a_download_is_as_large_as_the_files() -> None:
    """SmolVLM2 is published in 32 bit."""
    rows = {row["model"].partition("/")[2]: row["download"] for row in table(80)}
    assert rows["SmolVLM2-256M-Video-Instruct"] == "1.0 GB"
    assert rows["SmolVLM2-500M-Video-Instruct"] == "2.0 GB"
    assert rows["SmolVLM2-2.2B-Instruct"] == "9.0 GB"
    assert rows["Qwen3-VL-4B-Instruct"] == "8.9 GB"
