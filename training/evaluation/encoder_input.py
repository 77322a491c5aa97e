"""Setting: how a clip is shown to the encoder, written `16x168:1024`; and the encoder that is shown it.

`FRAMESxRESOLUTION[:TOKENS][/SELECTOR][+vid-tldr]`: `8x224` keeps every token, `16x168:1024/random` keeps 1024
drawn by chance, `16x168:1024+vid-tldr` merges down to 1024 inside the first blocks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from encoder.budget import PlanTable
from encoder.checkpoint import load_encoder, load_tensors, read_tensors
from encoder.config import FluxViTConfig
from encoder.cost import time_ms
from encoder.errors import CheckpointError, ConfigError
from encoder.fluxvit import FluxViT
from encoder.merging import vid_tldr_schedule
from encoder.selection import Selector
from encoder.tokens import VisionTokens
from llm_bridge.llm import default_device

_FORM = re.compile(r"(\d+)x(\d+)(?::(\d+))?(?:/(\w+))?(\+vid-tldr)?")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Setting:
    """frames, resolution (pixels per side), tokens to keep (None: all), selector, merging in its place.

    optimized: marks rows of Token Optimization ("+" in the paper's tables).
    """

    frames: int
    resolution: int
    keep: int | None = None
    selector: Selector = "flux"
    merge: bool = False
    optimized: bool = False

    def __post_init__(self) -> None:
        if self.frames < 1 or self.resolution < 1 or (self.keep is not None and self.keep < 1):
            raise ConfigError(f"{self} is not a setting: all numbers must be at least 1.")
        if self.selector not in get_args(Selector):
            raise ConfigError(f"A selector is one of {', '.join(get_args(Selector))}, not {self.selector!r}.")
        if self.merge and self.keep is None:
            raise ConfigError("Merging needs a number of tokens to merge down to.")

    @staticmethod
    def parse(text: str) -> Setting:
        """The reverse of `str`; raises ConfigError."""
        found = _FORM.fullmatch(text.strip())
        if not found:
            raise ConfigError(
                f"A setting is written FRAMESxRESOLUTION[:TOKENS][/SELECTOR][+vid-tldr], not {text!r}."
            )
        frames, resolution, keep, selector, merge = found.groups()
        return Setting(
            int(frames),
            int(resolution),
            int(keep) if keep else None,
            selector or "flux",  # type: ignore[arg-type]
            bool(merge),
        )

    def __str__(self) -> str:
        keep = "" if self.keep is None else f":{self.keep}"
        selector = "" if self.selector == "flux" else f"/{self.selector}"
        return f"{self.frames}x{self.resolution}{keep}{selector}{'+vid-tldr' if self.merge else ''}"

    @property
    def label(self) -> str:
        """For tables: the tokens, + for Token Optimization, and the input."""
        tokens = "all" if self.keep is None else str(self.keep)
        return f"{tokens}{'+' if self.optimized else ''} ({self})"

    def seen(self, patch_size: int) -> int:
        """Tokens before selection."""
        return self.frames * (self.resolution // patch_size) ** 2

    def merging(self, patch_size: int) -> tuple[int, ...] | None:
        """For FluxViT's `merge`."""
        if not self.merge or self.keep is None:
            return None
        return vid_tldr_schedule(self.keep, self.seen(patch_size))

    def check(self, config: FluxViTConfig) -> Setting:
        """Itself; raises ConfigError when the encoder cannot take it."""
        if self.resolution % config.patch_size:
            raise ConfigError(
                f"{self}: the resolution must be a multiple of {config.patch_size}, the patch size."
            )
        return self


def unmasked(counts: Iterable[int], resolution: int, patch_size: int) -> list[Setting]:
    """The upper lines of the paper's tables: as many frames as give each count, none dropped (8 x 224 for
    2048). Counts that no number of frames gives are kept from the next larger input."""
    per_frame = (resolution // patch_size) ** 2
    return [Setting(max(1, -(-count // per_frame)), resolution, count) for count in counts]


def from_table(table: PlanTable) -> list[Setting]:
    """One setting per row of a plan table, marked as optimized."""
    return [Setting(row.frames, row.resolution, row.tokens, optimized=True) for row in table.rows]


def head_for(keep: int | None, pools: int) -> int:
    """Number of the pooling head for a token count: of three, 0 for 3072, 1 for 2048, 2 for 1024 and fewer,
    whichever is nearest (the order of the released training engine, UNVERIFIED on released weights)."""
    if pools < 3:
        return min(1, pools - 1)
    return 0 if keep is None or keep >= 2560 else 1 if keep >= 1536 else 2


class Viewer:
    """A frozen encoder with its poolings, on one device in one dtype.

    path: a folder or official file of an encoder, or a folder of a whole model, of which the encoder is
    taken. Raises CheckpointError or ConfigError.
    """

    def __init__(self, path: str | Path, device: str | None = None, dtype: str = "fp32") -> None:
        target = torch.device(device) if device else default_device()
        self.encoder = open_encoder(Path(path)).to(target, DTYPES[dtype]).eval().requires_grad_(False)

    @staticmethod
    def of(encoder: FluxViT) -> Viewer:
        """Of an encoder that is loaded and frozen already."""
        viewer = Viewer.__new__(Viewer)
        viewer.encoder = encoder
        return viewer

    @property
    def device(self) -> torch.device:
        """Where pixels go."""
        return self.encoder.cls_token.device

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self.encoder.cls_token.dtype

    @property
    def config(self) -> FluxViTConfig:
        """The encoder's dimensions."""
        return self.encoder.config

    @torch.inference_mode()
    def tokens(self, pixels: Sequence[Tensor], setting: Setting, seed: int = 0) -> VisionTokens:
        """Clips (3, T, H, W) of one shape -> their tokens; the seed decides what "random" keeps."""
        batch = torch.stack(list(pixels)).to(self.device, self.dtype)
        merge = setting.merging(self.config.patch_size)
        generator = torch.Generator().manual_seed(seed)
        keep = None if setting.merge else setting.keep
        return self.encoder(batch, keep, selector=setting.selector, generator=generator, merge=merge)

    def ms(self, setting: Setting) -> float:
        """Fastest of three times that one clip takes, in milliseconds."""
        pixels = [torch.zeros(3, setting.frames, setting.resolution, setting.resolution)]
        return time_ms(lambda: self.tokens(pixels, setting), self.device)

    @torch.inference_mode()
    def pooled(
        self, pixels: Sequence[Tensor], setting: Setting, pool: int | None = None, seed: int = 0
    ) -> Tensor:
        """Pooled features (B, clip_embed_dim) in float32; pool: number of the head, None by token count."""
        head = head_for(setting.keep, self.config.num_pools) if pool is None else pool
        return self.encoder.pool(self.tokens(pixels, setting, seed), head).float()

    @torch.inference_mode()
    def logits(
        self, pixels: Sequence[Tensor], setting: Setting, pool: int | None = None, seed: int = 0
    ) -> Tensor:
        """Class scores (B, num_classes) in float32. Raises ConfigError for an encoder without classes."""
        if not self.config.num_classes:
            raise ConfigError(
                "The encoder has no class heads: train them with `python -m training.finetune`."
            )
        head = head_for(setting.keep, self.config.num_pools) if pool is None else pool
        return self.encoder.classify(self.tokens(pixels, setting, seed), head).float()


def open_encoder(path: Path) -> FluxViT:
    """From an encoder's folder or file, or a model's folder."""
    if (path / "encoder.safetensors").is_file():
        import json

        try:
            values: Any = json.loads((path / "config.json").read_text())["encoder"]
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{path} has encoder.safetensors but no model's config.json.") from error
        model = FluxViT(FluxViTConfig.from_dict(values))
        load_tensors(model, read_tensors(path / "encoder.safetensors"))
        return model
    if not path.exists():
        raise CheckpointError(f"There is no encoder at {path}.")
    return load_encoder(path)
