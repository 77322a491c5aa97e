"""Weight files: official FluxViT checkpoints and our own, with a report of every key that does not fit."""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from encoder.config import SIZES, FluxViTConfig, Gelu
from encoder.errors import CheckpointError
from encoder.fluxvit import FluxViT

M = TypeVar("M", bound=nn.Module)
WRAPPERS = ("model", "module", "state_dict")
VISION = "vision_encoder."  # of a model that also holds a text tower
PREFIXES = ("backbone.", "encoder.", "module.", "vision_encoder.")


@dataclass(frozen=True)
class LoadReport:
    """What happened to every key of a weight file."""

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]  # key, in the file, in the model
    left_out: tuple[str, ...] = ()  # of another part of a model that holds an encoder

    @property
    def exact(self) -> bool:
        """Every key of the model was in the file with its shape, and nothing else was."""
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        shapes = [f"{key} (file {in_file}, model {in_model})" for key, in_file, in_model in self.mismatched]
        parts = [
            f"{len(names)} {label}: {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}"
            for label, names in (
                ("missing", self.missing),
                ("unexpected", self.unexpected),
                ("mis-shaped", shapes),
                ("left out", self.left_out),
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
            # The official code keeps its command line beside the weights, in a Namespace of plain values.
            with torch.serialization.safe_globals([argparse.Namespace]):
                state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
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
        if not _is_stored(value):
            raise CheckpointError(f"{path} does not hold all of {str(name)[:80]!r}: it is damaged.")
        tensors[_stripped(str(name)) if strip else str(name)] = value
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors.")
    return tensors


def _stripped(name: str) -> str:
    while prefix := next((p for p in PREFIXES if name.startswith(p)), None):
        name = name.removeprefix(prefix)
    return name


def _is_stored(value: Tensor) -> bool:
    """Whether a file gave a tensor every number it has: one of a few bytes can claim to be of any size."""
    if value.layout is not torch.strided or value.device.type != "cpu":
        return False
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def build(make: Callable[[], M], tensors: Mapping[str, Tensor]) -> M:
    """The module that `make` makes, with these weights; its own first weights are never drawn, which would
    take seconds.

    Raises CheckpointError with the report if they do not fit, before memory is allocated for the sizes that
    a configuration states.
    """
    with torch.device("meta"):
        model = make()
    _check(report(model, tensors))
    model.to_empty(device=torch.get_default_device())
    load_tensors(model, tensors)
    return model


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor], *, strict: bool = True) -> LoadReport:
    """Copy tensors into a model by name; raises CheckpointError with the report if strict and not exact."""
    result = report(model, tensors)
    if strict:
        _check(result)
    model.load_state_dict({key: tensors[key] for key in result.loaded}, strict=False)
    return result


def _check(result: LoadReport) -> None:
    if not result.exact:
        raise CheckpointError(f"The weights do not fit the model: {result}.")


def report(model: nn.Module, tensors: Mapping[str, Tensor]) -> LoadReport:
    """Which of the tensors a model would take, by name and shape."""
    state = model.state_dict()
    mismatched = tuple(
        (key, tuple(tensors[key].shape), tuple(state[key].shape))
        for key in state
        if key in tensors and tensors[key].shape != state[key].shape
    )
    misshaped = {key for key, _, _ in mismatched}
    return LoadReport(
        loaded=tuple(key for key in state if key in tensors and key not in misshaped),
        missing=tuple(key for key in state if key not in tensors),
        unexpected=tuple(key for key in tensors if key not in state),
        mismatched=mismatched,
    )


def infer_config(tensors: Mapping[str, Tensor], gelu: Gelu = "tanh") -> FluxViTConfig:
    """The size whose width and depth a checkpoint has, with its number of classes, pools and aligners.

    Raises CheckpointError when no known size fits.
    """
    numbers = [key.split(".")[1] for key in tensors if key.startswith("blocks.")]
    blocks = {int(number) for number in numbers if number.isdecimal() and len(number) < 4}
    if "cls_token" not in tensors or not tensors["cls_token"].ndim or not blocks:
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
        num_classes=0 if head is None or not head.ndim else head.shape[0],
        num_pools=count("clip_projector"),
        num_aligners=count("final_clip_decoder_for_projs"),
        dual_patch_norm="patch_embed.norm_before.weight" in tensors,
        gpe="gpe_proj.depthwise_conv.weight" in tensors,
        lpe="blocks.0.attn.lpe.depthwise_conv.weight" in tensors,
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
    tensors, left_out = of_encoder(read_tensors(path, strip=False))
    wanted = config or infer_config(tensors, gelu)
    if strict:
        model = build(lambda: FluxViT(wanted), tensors)
        result = report(model, tensors)
    else:
        model = FluxViT(wanted)
        result = load_tensors(model, tensors, strict=False)
    return model, replace(result, left_out=left_out)


def of_encoder(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """(the encoder's tensors by FluxViT's names, names of the others).

    A file of the CLIP stage holds `vision_encoder.*` beside a text tower. One of a single pool and class
    head names them without a number.
    """
    clip = any(name.startswith(VISION) for name in tensors)
    left_out = tuple(name for name in tensors if clip and not name.startswith(VISION))
    found = {}
    for name, value in tensors.items():
        if name not in left_out:
            bare = _stripped(name)
            group, _, rest = bare.partition(".")
            single = group in ("head", "clip_projector") and not rest.split(".")[0].isdecimal()
            found[f"{group}.0.{rest}" if single else bare] = value
    return found, left_out


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
    """Write a safetensors file atomically. Raises OSError when there is no room or no right to."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with atomic_path(path) as temporary:
        try:
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, metadata)
        except SafetensorError as error:  # says in words what the system said
            raise OSError(errno.EIO, str(error), str(path)) from error


def save_json(values: object, path: str | Path) -> None:
    """Write an indented JSON file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n")


def save_model(model: FluxViT, folder: str | Path) -> None:
    """`model.safetensors` and `config.json` in `folder`."""
    save_tensors(model.state_dict(), Path(folder) / "model.safetensors")
    save_json(model.config.to_dict(), Path(folder) / "config.json")


def load_model(folder: str | Path) -> FluxViT:
    """The reverse of `save_model`; raises CheckpointError or ConfigError when it does not fit."""
    folder = Path(folder)
    config = FluxViTConfig.read(folder / "config.json")
    return build(lambda: FluxViT(config), read_tensors(folder / "model.safetensors"))


def weights_hash(*modules: nn.Module) -> str:
    """BLAKE2b over names, shapes, types and bytes of all parameters and buffers: 24 hex digits.

    The same on every device. About 850 MiB/s.
    """
    digest = hashlib.blake2b(digest_size=12)
    for module in modules:
        for name, value in sorted(module.state_dict().items()):
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            content = value.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(memoryview(content.numpy()))
    return digest.hexdigest()
