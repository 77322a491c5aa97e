"""Weight files: official FluxViT checkpoints and our own, with a report of every key that does not fit."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from encoder.config import SIZES, FluxViTConfig, Gelu
from encoder.errors import CheckpointError
from encoder.fluxvit import FluxViT

WRAPPERS = ("model", "module", "state_dict")
PREFIXES = ("backbone.", "encoder.", "module.", "vision_encoder.")


@dataclass(frozen=True)
class LoadReport:
    """What happened to every key of a weight file."""

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]  # key, in the file, in the model

    @property
    def exact(self) -> bool:
        """Every key of the model was in the file with its shape, and nothing else was."""
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        shapes = [f"{key} (file {found}, model {wanted})" for key, found, wanted in self.mismatched]
        parts = [
            f"{len(names)} {label}: {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}"
            for label, names in (
                ("missing", self.missing),
                ("unexpected", self.unexpected),
                ("mis-shaped", shapes),
            )
            if names
        ]
        return f"{len(self.loaded)} loaded" + "".join(f"; {part}" for part in parts)


def read_tensors(path: str | Path, *, strip: bool = True) -> dict[str, Tensor]:
    """All tensors of a .safetensors, .pth, .pt or .bin file, unwrapped and without training prefixes.

    strip: whether to drop the prefixes; a checkpoint of a model that holds an encoder keeps its names.
    Never unpickles code. Raises CheckpointError when the file cannot be read or holds no tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"There is no weight file at {path}.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: object = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"Cannot read {path} as weights ({reason}).") from error
    for wrapper in WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not a table of named tensors.")
    tensors = {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            continue
        stripped = str(name)
        while strip and (prefix := next((p for p in PREFIXES if stripped.startswith(p)), None)):
            stripped = stripped.removeprefix(prefix)
        tensors[stripped] = value
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors.")
    return tensors


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor], *, strict: bool = True) -> LoadReport:
    """Copy tensors into a model by name; raises CheckpointError with the report if strict and not exact."""
    own = model.state_dict()
    mismatched = tuple(
        (key, tuple(tensors[key].shape), tuple(own[key].shape))
        for key in own
        if key in tensors and tensors[key].shape != own[key].shape
    )
    bad = {key for key, _, _ in mismatched}
    fitting = {key: tensors[key] for key in own if key in tensors and key not in bad}
    report = LoadReport(
        loaded=tuple(fitting),
        missing=tuple(key for key in own if key not in tensors),
        unexpected=tuple(key for key in tensors if key not in own),
        mismatched=mismatched,
    )
    if strict and not report.exact:
        raise CheckpointError(f"The weights do not fit the model: {report}.")
    model.load_state_dict(fitting, strict=False)
    return report


def infer_config(tensors: Mapping[str, Tensor], gelu: Gelu = "tanh") -> FluxViTConfig:
    """The size whose width and depth a checkpoint has, with its number of classes, pools and aligners.

    Raises CheckpointError when no known size fits.
    """
    blocks = {int(key.split(".")[1]) for key in tensors if key.startswith("blocks.")}
    if "cls_token" not in tensors or not blocks:
        raise CheckpointError("The file is not a FluxViT checkpoint: it has no cls_token or no blocks.")
    dim, depth = tensors["cls_token"].shape[-1], max(blocks) + 1
    for size in SIZES.values():
        if (size.embed_dim, size.depth) == (dim, depth):
            break
    else:
        raise CheckpointError(f"No known FluxViT size is {dim} wide and {depth} blocks deep.")

    def count(group: str) -> int:
        return len({key.split(".")[1] for key in tensors if key.startswith(group + ".")})

    head = tensors.get("head.0.weight")
    return size.replace(
        num_classes=0 if head is None else head.shape[0],
        num_pools=count("clip_projector"),
        num_aligners=count("final_clip_decoder_for_projs"),
        gelu=gelu,
    )


def load_official(
    path: str | Path, *, config: FluxViTConfig | None = None, gelu: Gelu = "tanh", strict: bool = True
) -> tuple[FluxViT, LoadReport]:
    """A FluxViT with the weights of an official file.

    `gelu` is "tanh" by default because released weights were trained with fused kernels whose GELU is the
    tanh form; "erf" is the plain definition (UNVERIFIED on the released files).
    Raises CheckpointError as `read_tensors` and `load_tensors` do.
    """
    tensors = read_tensors(path)
    model = FluxViT(config or infer_config(tensors, gelu))
    return model, load_tensors(model, tensors, strict=strict)


def load_encoder(path: str | os.PathLike[str], gelu: Gelu = "tanh") -> FluxViT:
    """A FluxViT from a folder of ours or an official file, whichever `path` is.

    Raises CheckpointError or ConfigError when it does not fit.
    """
    return load_model(Path(path)) if Path(path).is_dir() else load_official(Path(path), gelu=gelu)[0]


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place only if the block succeeds."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    try:
        yield Path(name)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)  # mkstemp makes files nobody else may read
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def save_tensors(
    tensors: Mapping[str, Tensor], path: str | Path, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file atomically."""
    from safetensors.torch import save_file

    with atomic_path(path) as temporary:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, metadata)


def save_json(values: object, path: str | Path) -> None:
    """Write an indented JSON file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n")


def save_model(model: FluxViT, folder: str | Path) -> None:
    """`model.safetensors` and `config.json` in `folder`."""
    save_tensors(model.state_dict(), Path(folder) / "model.safetensors")
    save_json(model.config.to_dict(), Path(folder) / "config.json")


def load_model(folder: str | Path) -> FluxViT:
    """The reverse of `save_model`."""
    folder = Path(folder)
    model = FluxViT(FluxViTConfig.read(folder / "config.json"))
    load_tensors(model, read_tensors(folder / "model.safetensors"))
    return model
