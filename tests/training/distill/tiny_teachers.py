"""Tiny teachers of the true layouts, in files as their publishers lay them out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from encoder.golden import rule_weights
from tests import ROOT
from training.distill.internvideo2 import InternVideo2, InternVideo2Config

GOLDEN = ROOT / "tests" / "data" / "teacher_golden.safetensors"
SETTINGS: dict[str, Any] = {
    "embed_dim": 176,
    "depth": 8,
    "num_heads": 4,
    "mlp_dim": 768,
    "pool_heads": 4,
    "clip_embed_dim": 64,
    "pos_frames": 4,
    "pos_height": 4,
    "pos_width": 4,
    "gelu": "erf",
}
NARROW: dict[str, Any] = {**SETTINGS, "embed_dim": 32, "depth": 4, "mlp_dim": 64, "clip_embed_dim": 24}


def golden() -> tuple[dict[str, torch.Tensor], dict[str, Any], dict[str, list[int]]]:
    """Tensors, constructor values and state-dict shapes of the official teacher's tiny case."""
    with safe_open(GOLDEN, "pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a dict
    return tensors, json.loads(metadata["teacher"]), json.loads(metadata["teacher_keys"])


def internvideo2(settings: dict[str, Any] = SETTINGS) -> InternVideo2:
    """An InternVideo2 with the golden rule's weights."""
    model = InternVideo2(InternVideo2Config.from_dict(settings))
    model.load_state_dict(rule_weights(model))
    return model.eval()


def write_stage2(path: Path, settings: dict[str, Any] = NARROW, frames: int | None = None) -> InternVideo2:
    """The model in a file like the official stage-2 one: wrapped, prefixed, with parts nobody needs.

    frames: of the position table in the file, which is then a slice of the model's.
    """
    model = internvideo2(settings)
    state = {f"vision_encoder.{name}": value for name, value in model.state_dict().items()}
    if frames is not None:
        rows = 1 + frames * settings["pos_height"] * settings["pos_width"]
        state["vision_encoder.pos_embed"] = state["vision_encoder.pos_embed"][:, :rows].clone()
    extra = ("clip_decoder.0.head.weight", "final_clip_decoder.norm.bias", "clip_pos_embed", "img_pos_embed")
    state |= {f"vision_encoder.{name}": torch.ones(3) for name in extra}
    state |= {
        "text_encoder.bert.weight": torch.ones(2),
        "temp": torch.ones(()),
        "itm_head.bias": torch.ones(2),
    }
    torch.save({"module": state, "epoch": 3}, path)
    return model
