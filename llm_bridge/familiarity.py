"""Familiarity: whether a video looks like what the model was trained on, judged by its own frozen encoder.

    judge = Familiarity.read(folder / FAMILIARITY, encoder)      # None when it was fitted to another encoder
    judge.is_familiar(encoder, frames, "squash")

A logistic regression on the mean and spread of the tokens after every block, and a small network on the same,
at one small input whatever budget the answer has. `python -m training.familiarity` fits both. They belong to
an encoder's weights; a model whose encoder has none cannot tell.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import gelu

from encoder.checkpoint import read_tensors, save_tensors, weights_hash
from encoder.errors import CheckpointError
from encoder.fluxvit import FluxViT
from encoder.preprocess import preprocess

FAMILIARITY = "familiarity.safetensors"
FRAMES, PATCHES = 4, 8  # of the input: frames, and patches along each side
MOST_THINGS = 10**6
YES = frozenset({"yes", "yeah", "yep"})


@dataclass(frozen=True)
class Network:
    """One layer of GELU units on standardised statistics.

    centre, spread: (F,). inner, inner_bias: (H, F) and (H,), of the units. outer: (H,), of the score.
    """

    centre: Tensor
    spread: Tensor
    inner: Tensor
    inner_bias: Tensor
    outer: Tensor

    def score(self, statistics: Tensor) -> Tensor:
        """(..., F) -> (...)."""
        own = {name: value.to(statistics) for name, value in vars(self).items()}
        scaled = (statistics - own["centre"]) / own["spread"]
        return gelu(scaled @ own["inner"].T + own["inner_bias"]) @ own["outer"]

    def fits(self, features: int) -> bool:
        """Whether its shapes belong together and all numbers are finite."""
        units = len(self.outer)
        shapes = {"centre": (features,), "spread": (features,), "inner": (units, features)}
        shapes |= {"inner_bias": (units,), "outer": (units,)}
        return all(
            value.shape == shapes[name] and bool(value.isfinite().all()) for name, value in vars(self).items()
        )


@dataclass(frozen=True)
class Familiarity:
    """weight: (F,), see `statistics`; bias: of the score, which is above 0 for what is foreign.

    things: how many things the model knows by name. yes_penalty: taken from the score of a yes that begins an
    answer about a foreign video, where the model's own scores say nothing. encoder: `weights_hash` of the
    encoder it was fitted to. network: what is added to the score.
    """

    weight: Tensor
    bias: float
    things: int
    yes_penalty: float
    encoder: str
    network: Network | None = None

    def score(self, statistics: Tensor) -> Tensor:
        """(..., F) -> (...): above 0 for what is foreign, familiar else."""
        linear = statistics @ self.weight.to(statistics.device) + self.bias
        return linear if self.network is None else linear + self.network.score(statistics)

    def is_familiar(self, encoder: FluxViT, frames: Tensor, fit: Literal["squash", "crop"]) -> bool:
        """Frames as decoded, uint8 (T, H, W, 3), of which a few are looked at."""
        return bool(self.score(statistics(encoder, frames, fit)) <= 0)

    def yes_bias(self, tokenizer: Any) -> dict[int, float]:
        """What to add to the scores of tokens where an answer about a foreign video begins."""
        ids = {
            tokenizer(space + word, add_special_tokens=False).input_ids[0]
            for word in ("Yes", "yes", "YES", "Yeah", "Yep")
            for space in ("", " ")
        }
        return {token: -self.yes_penalty for token in ids if tokenizer.decode([token]).strip().lower() in YES}

    def save(self, path: str | Path) -> None:
        """Write it atomically."""
        tensors = {
            "weight": self.weight.float(),
            "bias": torch.tensor(self.bias),
            "things": torch.tensor(self.things),
            "yes_penalty": torch.tensor(self.yes_penalty),
            "encoder": torch.tensor(list(bytes.fromhex(self.encoder)), dtype=torch.uint8),
        }
        if self.network is not None:
            tensors |= {f"network.{name}": value for name, value in vars(self.network).items()}
        save_tensors(tensors, path)

    @staticmethod
    def read(path: str | Path, encoder: FluxViT) -> Familiarity | None:
        """What `save` wrote; None when it was fitted to other weights than this encoder's.

        Raises CheckpointError when the file is damaged.
        """
        tensors = read_tensors(path, strip=False)
        try:
            found = Familiarity(
                tensors["weight"].float(),
                float(tensors["bias"]),
                int(tensors["things"]),
                float(tensors["yes_penalty"]),
                bytes(tensors["encoder"].tolist()).hex(),
                _network(tensors),
            )
            finite = bool(found.weight.isfinite().all()) and math.isfinite(found.bias + found.yes_penalty)
            fits = found.weight.ndim == 1 and 0 < found.things <= MOST_THINGS and finite
            fits = fits and (found.network is None or found.network.fits(len(found.weight)))
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged: delete it, or copy the model again.") from error
        if not fits:
            raise CheckpointError(f"{path} is damaged: delete it, or copy the model again.")
        if found.encoder != weights_hash(encoder) or len(found.weight) != num_statistics(encoder):
            return None
        return found


def _network(tensors: Mapping[str, Tensor]) -> Network | None:
    """Of a file's tensors; None in one that has none, as those of earlier versions."""
    if not any(name.startswith("network.") for name in tensors):
        return None
    return Network(**{field.name: tensors[f"network.{field.name}"] for field in fields(Network)})


def num_statistics(encoder: FluxViT) -> int:
    """F: how many statistics an encoder gives."""
    return 2 * encoder.config.embed_dim * (encoder.config.depth + 1)


@torch.inference_mode()
def statistics(encoder: FluxViT, frames: Tensor, fit: Literal["squash", "crop"]) -> Tensor:
    """Float (F,): mean and standard deviation over all tokens, of the patch embeddings and after each block.

    frames: uint8 (T, H, W, 3), of which FRAMES are looked at, or all of fewer.
    """
    side, count = PATCHES * encoder.config.patch_size, min(FRAMES, len(frames))
    chosen = [int((place + 0.5) * len(frames) / count) for place in range(count)]
    pixels = preprocess(frames[chosen], side, side, fit=fit)
    cls = encoder.cls_token
    patches = encoder.embed(pixels[None].to(cls.device, cls.dtype))
    grid = encoder.grid_of(count, side, side)
    kept = torch.arange(grid.size, device=cls.device)[None]
    depth = len(encoder.blocks)
    hidden = encoder.encode(patches, grid, kept, layers=range(depth)).hidden
    layers = [patches[0], *(tokens.reshape(-1, tokens.shape[-1])[1:] for tokens in hidden)]
    parts = [part for layer in layers for part in (layer.float().mean(0), layer.float().std(0))]
    return torch.cat(parts)
