"""The synthetic world as fetched, in small: coloured shapes under the names of real nouns."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from encoder.checkpoint import save_tensors
from encoder.config import MICRO
from encoder.fluxvit import FluxViT
from tests import ROOT
from training.synthetic.nouns import load_nouns, of_split
from training.synthetic.sprites import LEVELS, SHAPES, Strip, draw_shape, pyramid, write_bank

NOUNS = 12
TINY = MICRO.replace(
    embed_dim=32,
    depth=2,
    num_heads=2,
    pool_heads=2,
    clip_embed_dim=16,
    frames_range=(4, 10, 4),
    resolution_range=(56, 98, 28),
)


def make_cache(folder: Path) -> Path:
    """A cache folder ($FLUXCHAT_CACHE) whose world has a dozen nouns of each split and no photographs."""
    chosen = [noun for split in ("train", "unseen") for noun in of_split(load_nouns(), split, NOUNS)]  # type: ignore[arg-type]
    colours = [(220, 45, 45), (50, 170, 70), (50, 90, 220)]
    sprites = [draw_shape(SHAPES[i % len(SHAPES)], colours[i % 3]) for i in range(len(chosen))]
    (folder / "world" / "photos").mkdir(parents=True)
    strips = {noun.code: (Strip(i, 1, 0.0), Strip(i, 1, 0.0)) for i, noun in enumerate(chosen)}
    write_bank(folder / "world", strips, pyramid(sprites, LEVELS))
    return folder


def make_encoder(folder: Path, nouns: int = NOUNS, motions: int = 9, text_dim: int = 32) -> Path:
    """What a training.clip run leaves: encoder/ and alignment.safetensors."""
    torch.manual_seed(0)
    model = FluxViT(replace(TINY, num_classes=0))
    model.save_pretrained(folder / "encoder")
    tensors = {"log_scale": torch.tensor(2.0)}
    for name, width in (("align", text_dim), ("attributes.noun", nouns), ("attributes.motion", motions)):
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = torch.randn(width, 16), torch.randn(width)
    save_tensors(tensors, folder / "alignment.safetensors")
    return folder


def command(*arguments: object, cache: Path | None = None, **variables: str) -> subprocess.Popen[str]:
    """A real command of the project, started."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    if cache is not None:
        environment["FLUXCHAT_CACHE"] = str(cache)
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment,
    )
