"""Teachers of Flux-UMT behind one interface, and their targets kept on disk.

A teacher looks at a batch of clips and at the tokens chosen for it (raster indices into the student's patch
grid, whatever that is) and gives per-layer targets of those tokens, one target of the whole clip, and an
attention that ranks the tokens. Beside this file: InternVideo2 (internvideo2.py), and image encoders that
look at every frame by itself (image_teachers.py, efficientnet.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from encoder.checkpoint import read_tensors, save_tensors
from encoder.errors import CheckpointError, ConfigError
from encoder.tokens import Grid

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES: Mapping[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


@dataclass(frozen=True)
class TeacherTargets:
    """layers: per layer, ascending, unit vectors (B, N, D) of the chosen tokens, or (B, 1+N, D) with cls
    first where the teacher has one for the clip; final: unit vector (B, F); attention: (B, N), not negative,
    not necessarily of sum one."""

    layers: tuple[Tensor, ...]
    final: Tensor
    attention: Tensor


class Teacher(Protocol):
    """What Flux-UMT needs of a teacher.

    layer_dims: width of each layer's targets; final_dim: width of the final one; has_cls: layer targets start
    with a cls token; dense: what it observes does not depend on the choice of tokens; fingerprint: differs
    when the weights or settings differ.
    """

    layer_dims: tuple[int, ...]
    final_dim: int
    has_cls: bool
    dense: bool
    fingerprint: str

    def to(self, device: torch.device) -> Any:
        """Move the weights."""
        ...

    def patches(self, pixels: Tensor, grid: Grid) -> Tensor:
        """Own patch embeddings (B, T*h*w, C) before positions, for a selection driven by the teacher."""
        ...

    def observe(self, pixels: Tensor, grid: Grid, chosen: Tensor) -> dict[str, Tensor]:
        """The costly part, whose results can be kept: named tensors, clips first.

        pixels (B, 3, T, H, W) ImageNet-normalised; grid: the student's patches of them; chosen (B, N).
        """
        ...

    def targets(self, observed: Mapping[str, Tensor], grid: Grid, chosen: Tensor) -> TeacherTargets:
        """The cheap part: targets of the chosen tokens from what was observed."""
        ...


def spaced_layers(depth: int, count: int, interval: float) -> tuple[int, ...]:
    """Block indices depth - int(interval * i) - 1 for i < count, ascending (the released code's rule).

    40 blocks at interval 3.34 give 23, 26, 29, 33, 36, 39; a student's last six of 12 (interval 1) 6 ... 11.
    Raises ConfigError when they do not fit into the depth.
    """
    layers = tuple(depth - int(interval * index) - 1 for index in reversed(range(count)))
    if not layers or layers[0] < 0 or len(set(layers)) < count:
        raise ConfigError(f"{count} layers at interval {interval} do not fit into {depth} blocks.")
    return layers


def weights_digest(model: nn.Module, *settings: object) -> str:
    """Short digest of a model's names, shapes and a sample of its values, and of its settings."""
    digest = hashlib.blake2b(repr(settings).encode(), digest_size=16)
    for name, value in model.state_dict().items():
        digest.update(f"{name}{tuple(value.shape)}".encode())
        if value.is_meta:  # a model without weights, whose work is counted (training.cost)
            continue
        # A stride through the tensor: changed weights show, and a 1B model takes no time.
        digest.update(value.flatten()[:: max(1, value.numel() // 64)].float().cpu().numpy().tobytes())
    return digest.hexdigest()


# -- kept targets -------------------------------------------------------------------------------------------


class TargetCache:
    """What a teacher observed, one file per clip, keyed by the clip's pixels, the grid and the choice.

    The pixels are the media after cropping, flipping and sampling, so augmented clips never share an entry.
    Values are stored, and used at first sight too, as float16: a run with a warm cache is bit-equal to one
    with a cold. InternVideo2-1B takes 35 MB per clip at 2048 tokens and 6 layers: a cache is for small
    teachers, and for choices that do not move (`selection: teacher`, or a dense teacher).
    """

    def __init__(self, folder: str | Path, teacher: Teacher) -> None:
        self.folder = Path(folder)
        self.teacher = teacher
        self.hits = self.misses = 0

    def keys(self, pixels: Tensor, grid: Grid, chosen: Tensor) -> list[str]:
        """One key per clip of (B, 3, T, H, W)."""
        keys = []
        for clip, choice in zip(pixels.cpu(), chosen.cpu(), strict=True):
            digest = hashlib.blake2b(f"{self.teacher.fingerprint}{tuple(grid)}".encode(), digest_size=20)
            digest.update(clip.contiguous().numpy().tobytes())
            if not self.teacher.dense:
                digest.update(choice.contiguous().numpy().tobytes())
            keys.append(digest.hexdigest())
        return keys

    def observe(self, pixels: Tensor, grid: Grid, chosen: Tensor) -> dict[str, Tensor]:
        """`teacher.observe`, from disk when every clip of the batch is there.

        One absent clip makes the teacher look at the whole batch, so that what is computed, to the last bit,
        does not depend on what happened to be kept; clips that are there are still taken from disk.
        """
        paths = [self.folder / key[:2] / f"{key}.safetensors" for key in self.keys(pixels, grid, chosen)]
        kept = [self._read(path) for path in paths]
        self.hits += sum(entry is not None for entry in kept)
        self.misses += sum(entry is None for entry in kept)
        if any(entry is None for entry in kept):
            fresh = self.teacher.observe(pixels, grid, chosen)
            for index, path in enumerate(paths):
                if kept[index] is None:
                    kept[index] = {name: value[index].half().cpu() for name, value in fresh.items()}
                    save_tensors(kept[index] or {}, path)
        entries = [entry for entry in kept if entry is not None]
        return {
            name: torch.stack([entry[name] for entry in entries]).to(pixels.device, torch.float32)
            for name in entries[0]
        }

    @staticmethod
    def _read(path: Path) -> dict[str, Tensor] | None:
        if not path.is_file():
            return None
        try:
            return read_tensors(path)
        except CheckpointError:  # damaged: computed anew
            return None
