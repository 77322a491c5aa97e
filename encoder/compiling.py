"""torch.compile for an encoder: what lies between the matrix products becomes a few kernels.

On an H100 in bfloat16 that is half of an encoder's time. Each new size of input or token count is compiled
when it first comes, which takes seconds; after two sizes torch writes one version for all.
"""

from __future__ import annotations

import os
import shutil
import sys

import torch

from encoder.errors import ConfigError
from encoder.fluxvit import FluxViT
from encoder.selection import importance

COMPILERS = {"win32": "cl", "darwin": "clang++"}  # what torch calls where CXX names none; elsewhere g++
VERSIONS = 64  # of a function that torch keeps; beyond, it runs as written


def compile_encoder(encoder: FluxViT) -> FluxViT:
    """The same encoder, whose patch embedding, scores and blocks are compiled from now on; copies are not.

    Raises ConfigError where torch has no compiler to do it with.
    """
    if (lacking := lacking_compiler(encoder.cls_token.device)) is not None:
        raise ConfigError(
            f"The encoder cannot be compiled, since {lacking}: install it, or leave compile out."
        )
    torch._dynamo.config.recompile_limit = max(VERSIONS, torch._dynamo.config.recompile_limit)
    encoder.patch_embed.compile()
    encoder.importance = torch.compile(importance)
    for block in encoder.blocks:
        block.compile()
    return encoder


def lacking_compiler(device: torch.device) -> str | None:
    """What torch.compile would need for a device and does not find, None where nothing is lacking."""
    from torch.utils._triton import has_triton

    if shutil.which(name := os.environ.get("CXX") or COMPILERS.get(sys.platform, "g++")) is None:
        return f"there is no C++ compiler {name}"
    if device.type == "cuda" and not has_triton():
        return "the package triton is not there"
    return None
