"""A small corpus of images and videos with captions, and a Flux-CLIP recipe on it."""

from __future__ import annotations

import json
from pathlib import Path

from tests.encoder.video import video_files as vf
from tests.llm_bridge.text_encoders import tiny_towers
from training.clip import ClipRecipe
from training.trainer.recipe import build

COLOURS = (
    *("red", "green", "blue", "gold", "black", "white"),
    *("purple", "orange", "gray", "pink", "navy", "tan"),
)


def make(folder: Path) -> Path:
    """Twelve images, eight videos, their annotations, and the smallest sentence tower."""
    from PIL import Image

    rows: dict[str, list[dict]] = {"image": [], "video": []}
    for number, colour in enumerate(COLOURS):
        picture = Image.new("RGB", (60, 48), colour)
        picture.paste("white", (3 * number, 8, 3 * number + 12, 30))
        picture.save(folder / f"{colour}.png")
        captions = [f"A {colour} picture.", f"All of it is {colour}."]
        rows["image"].append({"image": f"{colour}.png", "captions": captions})
    for number in range(8):
        vf.write(folder / f"{number}.mp4", vf.steady(9 + number), size=(64, 48))
        rows["video"].append({"video": f"{number}.mp4", "caption": f"Bars that begin at {number}."})
    for kind, found in rows.items():
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    tiny_towers.sentence_folder(folder / "tower")
    return folder


def values(corpus: Path, out: Path, **changes) -> dict:
    """A small recipe as plain values; videos of 4 to 6 frames at 56 or 70, images at those sizes."""
    settings = {"embed_dim": 32, "depth": 2, "num_heads": 2, "pool_heads": 2, "clip_embed_dim": 24}
    return {
        "encoder": {"size": "micro", "settings": settings},
        "images": [{"jsonl": str(corpus / "image.jsonl"), "data_root": str(corpus)}],
        "videos": [{"jsonl": str(corpus / "video.jsonl"), "data_root": str(corpus)}],
        "grid": {"frames": [4, 8, 2], "resolutions": [56, 84, 14], "tokens": [64, 160]},
        "augment": {"crop": "multiscale", "flip": 0.5},
        "image_positions": "mean",
        "num_tokens": [16, 32],
        "align_norm": True,
        "text_tower": str(corpus / "tower"),
        "temperature": 0.01,
        "positives": "id",
        "optim": {"lr": 1e-3, "batch_size": 4, "micro_batch": 2, "epochs": 2, "betas": [0.9, 0.98]},
        "loop": {"out": str(out), "precision": "fp32", "checkpoint_every": 1, "keep_checkpoints": 99},
        **changes,
    }


def recipe(corpus: Path, out: Path, **changes) -> ClipRecipe:
    return build(ClipRecipe, values(corpus, out, **changes), "test")


def loop(out: Path, steps: int | None = None) -> dict:
    return {"out": str(out), "precision": "fp32", "checkpoint_every": 1, "max_steps": steps}
