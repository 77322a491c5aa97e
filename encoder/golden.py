"""Check the encoder against golden outputs of the official definition.

    python -m encoder.golden FILE.safetensors

Weights and inputs are made by rule from the parameter names and a seed, so no checkpoint is needed. One line
per case with the largest difference; exit status 1 when any exceeds 1e-4 or the kept tokens differ.
"""

from __future__ import annotations

import argparse
import json
import sys
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from encoder.config import BASE, SMALL
from encoder.errors import CheckpointError, FluxChatError
from encoder.fluxvit import FluxViT

TOLERANCE = 1e-4


def rule_weights(model: nn.Module) -> dict[str, Tensor]:
    """Deterministic weights for every name of the model's state dict; `pos_embed` keeps its initial value."""
    weights = {}
    for name, value in model.state_dict().items():
        shape = tuple(value.shape)
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        x = rng.standard_normal(shape).astype(np.float32)
        if name == "pos_embed":
            weights[name] = value
            continue
        if name.endswith("gamma"):
            x = 0.2 + 0.05 * x
        elif (name.endswith("weight") and x.ndim == 1) or name.endswith("depthwise_conv.weight"):
            x = 1 + 0.1 * x
        elif x.ndim == 1 or name == "cls_token":
            x = 0.02 * x
        else:
            x = x / np.sqrt(np.prod(shape[1:]))
        weights[name] = torch.from_numpy(np.asarray(x, dtype=np.float32))
    return weights


def rule_pixels(seed: int, batch: int, frames: int, side: int) -> Tensor:
    """The input of a case, (B, 3, T, S, S): a static picture flickering patch by patch, plus noise."""
    rng = np.random.default_rng(seed)
    patches = side // 14
    base = rng.standard_normal((batch, 3, 1, side, side))
    flicker = rng.uniform(0, 3, (batch, 1, frames, patches, patches)).repeat(14, 3).repeat(14, 4)
    return torch.from_numpy(
        (base * flicker + rng.standard_normal((batch, 3, frames, side, side))).astype(np.float32)
    )


def rule_model(size: str) -> FluxViT:
    """SMALL or BASE with the rule's weights, exact GELU, 400 classes, eval mode."""
    sizes = {"small": SMALL, "base": BASE}
    if size not in sizes:
        raise CheckpointError(
            f"Golden case of unknown size {size!r}: only small and base have official outputs."
        )
    model = FluxViT(sizes[size].replace(gelu="erf", num_classes=400)).eval()
    model.load_state_dict(rule_weights(model))
    return model


@dataclass(frozen=True)
class CaseResult:
    """Largest difference of one case, and whether the same tokens were kept."""

    name: str
    difference: float
    worst: str
    kept_equal: bool

    @property
    def passed(self) -> bool:
        """Within 1e-4 and the same tokens."""
        return self.kept_equal and self.difference <= TOLERANCE

    def __str__(self) -> str:
        kept = "same tokens kept" if self.kept_equal else "OTHER TOKENS KEPT"
        verdict = "ok  " if self.passed else "FAIL"
        return f"{verdict} {self.name}: largest difference {self.difference:.2e} ({self.worst}), {kept}"


@torch.inference_mode()
def check_case(
    model: FluxViT, name: str, case: Mapping[str, int | None], expected: Mapping[str, Tensor]
) -> CaseResult:
    """Run one case and compare everything the file holds of it."""
    frames, side, head, keep = case["T"], case["S"], case["head"], case["keep"]
    assert frames is not None
    assert side is not None
    assert head is not None
    pixels = rule_pixels(int(case["seed"] or 0), int(case["B"] or 1), frames, side)
    # Official counts come from float arithmetic and may fall short of K; the files hold those.
    out = model(pixels, keep, compat_truncation=True)
    kept_equal = True
    if "kept" in expected:
        mask = torch.zeros(len(out), out.grids[0].size, dtype=torch.bool)
        for row, indices in zip(mask, out.kept, strict=True):
            row[indices] = True
        kept_equal = torch.equal(mask, expected["kept"].bool())
    if not kept_equal:
        return CaseResult(name, float("inf"), "kept", False)
    tokens = out.tokens
    outputs = {
        "n_tokens": torch.tensor([tokens.shape[0], tokens.shape[1] + 1, tokens.shape[2]]),
        "tokens_cls": out.cls,
        "tokens_stride64": tokens[:, ::64],
        "tokens_mean": tokens.mean(1),
        "pooled": model.pool(out, head),
        "logits": model.classify(out, head),
    }
    differences = {}
    for key, value in outputs.items():
        if key in expected:
            same_shape = value.shape == expected[key].shape
            gap = (value - expected[key]).abs().max().nan_to_num(float("inf")) if same_shape else None
            differences[key] = float("inf") if gap is None else gap.item()
    worst = max(differences, key=lambda key: differences[key])
    return CaseResult(name, differences[worst], worst, True)


def check_file(path: str | Path) -> list[CaseResult]:
    """Check every case of a golden file, in the file's order; raises CheckpointError when it is not one."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a dict
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"Cannot read {path} as a golden file: {error}.") from error
    results, models = [], {}
    for name in sorted(metadata):
        expected = {k.removeprefix(name + "/"): v for k, v in tensors.items() if k.startswith(name + "/")}
        if not expected:
            continue
        size = name.split("_")[0]
        if size not in models:
            models[size] = rule_model(size)
        results.append(check_case(models[size], name, json.loads(metadata[name]), expected))
    if not results:
        raise CheckpointError(f"{path} holds no golden case of FluxViT.")
    return results


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m encoder.golden", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "file", help="golden outputs, a .safetensors file with one JSON per case in its metadata"
    )
    args = parser.parse_args(argv)
    try:
        results = check_file(args.file)
    except FluxChatError as error:
        print(error, file=sys.stderr)
        return 2
    for result in results:
        print(result)
    return 0 if all(result.passed for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
