"""Checks of model folders that strangers wrote, before a library reads them: none can run code, read files
outside of its folder, or take more memory than its weights need."""

from __future__ import annotations

import contextlib
import math
import os
import re
import stat
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from encoder.errors import FluxChatError, ModelError
from encoder.json_files import MIB, parse_object, read_bytes, read_object
from llm_bridge.model_files.hub import download_bytes, hub_errors

# What a model needs of a hub repository: no code, no copies in other formats.
SETTINGS_FILES = ("*.json", "*.model", "*.txt", "*.jinja")
MODEL_FILES = (*SETTINGS_FILES, "*.safetensors")
NOT_THESE = ("*/*", "consolidated*", "*.fp16.*")
SETTINGS_LIMIT = 16 * MIB  # of a file of settings
VOCABULARY_LIMIT = 512 * MIB  # of tokenizer.json, lists of shards and the like
# Files of settings that libraries read; others in a folder are nobody's.
SETTINGS = {"config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"} | {
    *("added_tokens.json", "adapter_config.json", "preprocessor_config.json", "processor_config.json"),
    *("video_preprocessor_config.json", "chat_template.json"),
}
CODE_OF_ITS_OWN = (
    "it needs code of its own, which is never run: use a model that transformers knows by itself"
)
# What libraries say, by words of theirs, as someone who has the files should hear it.
PLAINLY = {
    "trust_remote_code": CODE_OF_ITS_OWN,
    "ignore_mismatched_sizes": (
        "its weights have other shapes than its config.json says: copy both from one model"
    ),
}
# The largest dimensions of models there are, and a margin.
LARGEST: tuple[tuple[str, int], ...] = (
    (r"layers?$|depth$|n_layer|num_blocks", 2**10),
    (r"heads|experts", 2**13),
    (r"hidden_size$|intermediate_size$|_dim$|^dim$|width$|n_embd$|n_inner$|_rank$|kernel", 2**20),
    (r"vocab_size$", 2**24),
    (r"position|n_ctx|window|seq_len|seq_length", 2**32),
)
DTYPES = re.compile(r"(torch\.)?(auto|half|double|b?float\d+(_\w+)?|u?int\d+)")
QUANTISERS = {"bitsandbytes", "gptq", "awq", "fp8", "compressed-tensors", "mxfp4"}


@contextlib.contextmanager
def refused(what: str) -> Iterator[None]:
    """Turns any error of a library into one ModelError sentence: `what`, and the library's reason.

    what: such as "Cannot load NAME". Panics of libraries in Rust are no Exceptions; they are caught too.
    """
    try:
        yield
    except FluxChatError:
        raise
    except MemoryError as error:
        raise ModelError(f"{what}: there is not enough memory.") from error
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        said = str(error)
        reason = next((plain for words, plain in PLAINLY.items() if words in said), first_line(error))
        raise ModelError(f"{what}: {reason}.") from error


def first_line(error: BaseException) -> str:
    """What an error says, in one short printable line without its full stop."""
    text = "".join(c if c.isprintable() else " " for c in str(error))
    text = " ".join(text.split()).rstrip(".:")
    if isinstance(error, KeyError):
        text = f"it lacks {text}"
    return (text if len(text) <= 200 else text[:200] + " ...") or type(error).__name__


def local_folder(
    name: str | Path, revision: str | None = None, *, patterns: Sequence[str] = MODEL_FILES
) -> Path:
    """A model's folder: `name` itself, or the hub's snapshot of it, without anything that could run.

    patterns: which files of a snapshot; pickled weights come only where there are no others. Raises
    ModelError.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download

    def snapshot(wanted: Sequence[str]) -> Path:
        return Path(
            snapshot_download(
                str(name), revision=revision, allow_patterns=list(wanted), ignore_patterns=list(NOT_THESE)
            )
        )

    with hub_errors(str(name)):
        folder = snapshot(patterns)
        if patterns is MODEL_FILES and not any(folder.glob("*.safetensors")):
            return snapshot(("pytorch_model*.bin", *patterns))
        return folder


def missing_bytes(name: str, revision: str | None = None) -> int:
    """Bytes of a model on the hub that must be downloaded before it can be loaded; raises ModelError."""
    return download_bytes(name, revision, MODEL_FILES, NOT_THESE)


def open_folder(name: str | Path) -> tuple[Path, dict[str, Any]]:
    """A model's folder that `check_folder` passed, and how from_pretrained must read its weights.

    Raises ModelError.
    """
    folder = local_folder(name)
    check_folder(folder)
    weight_bytes(folder)
    return folder, weight_options(folder)


def open_settings(name: str | Path) -> Path:
    """The same for a tokenizer or configuration alone: no weights are downloaded."""
    folder = local_folder(name, patterns=SETTINGS_FILES)
    check_folder(folder)
    return folder


def weight_options(folder: Path) -> dict[str, Any]:
    """How from_pretrained must read a folder: from the disk, and pickles only where there is no other (then
    as numbers only: its `weights_only` is on)."""
    return {"local_files_only": True, "use_safetensors": any(folder.glob("*.safetensors"))}


def check_folder(folder: Path, *, whole: bool = True) -> None:
    """Raises ModelError, in one sentence, for a model folder that no library should read.

    whole: False where not all of its weights are needed.
    Its files must be regular ones that lie in it (or where the hub's cache keeps them); its settings within
    bounds, without names of code to load.
    """
    for file in sorted(folder.iterdir()):
        if file.suffix in {".json", ".safetensors", ".model", ".jinja", ".txt", ".bin", ".gguf"}:
            with _refusing(folder, file.name):
                _check_place(folder, file)
    for file in sorted(folder.glob("*.json")):
        with _refusing(folder, file.name):
            if file.name in SETTINGS:
                _check_settings(read_object(file, limit=SETTINGS_LIMIT, infinity=True), file.name)
            else:
                _check_size(file, VOCABULARY_LIMIT)
    for file in (*folder.glob("*.jinja"), *folder.glob("*.txt")):
        with _refusing(folder, file.name):
            _check_size(file, SETTINGS_LIMIT)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        with _refusing(folder, index.name):
            _check_shards(index, whole)


@contextlib.contextmanager
def _refusing(folder: Path, name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise ModelError(f"Cannot use {name} of the model in {folder}: {reason}.") from error


def _check_place(folder: Path, file: Path) -> None:
    if not stat.S_ISREG(file.stat().st_mode):
        raise ValueError("it is not a regular file")
    if not file.is_symlink():
        return
    home = folder.resolve()
    inside = [home] + ([home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [])
    if not any(file.resolve().is_relative_to(place) for place in inside):
        raise ValueError("it is a link out of the folder; put the file itself there")


def _check_size(file: Path, limit: int) -> None:
    if file.stat().st_size > limit:
        raise ValueError(f"it is larger than {limit / MIB:g} MiB")


def _check_shards(index: Path, whole: bool) -> None:
    shards = parse_object(read_bytes(index, VOCABULARY_LIMIT)).get("weight_map")
    if not isinstance(shards, dict):
        raise ValueError("it has no weight_map")
    for shard in set(map(str, shards.values())):
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ValueError(f"it names {shard[:80]!r}, which is no safetensors file of the folder")
        if whole and not (index.parent / shard).is_file():
            raise ValueError(f"it names {shard[:80]}, which is missing")


def _check_settings(values: Mapping[str, Any], file: str) -> None:
    """Raises ValueError for settings that load code or no model can have; looks into every part of them."""
    parts: list[Any] = [values]
    while parts:
        part = parts.pop()
        if isinstance(part, list):
            parts.extend(item for item in part if isinstance(item, (dict, list)))
            continue
        for key, value in part.items():
            _check_setting(str(key), value, file)
            if isinstance(value, (dict, list)):
                parts.append(value)


def _check_setting(key: str, value: Any, file: str) -> None:
    if key.endswith(("attn_implementation", "experts_implementation", "attn_implementation_internal")):
        named = value.values() if isinstance(value, dict) else [value]
        if any(item is not None and not re.fullmatch(r"\w{0,40}", str(item)) for item in named):
            raise ValueError(f"its {key} names code to download, which is never run; remove that line")
    elif key in ("dtype", "torch_dtype"):
        if isinstance(value, str) and not DTYPES.fullmatch(value):
            raise ValueError(f"its {key} {value[:40]!r} is no number type")
    elif key == "transformers_weights":
        if Path(str(value)).name != value or not value.endswith((".safetensors", ".safetensors.index.json")):
            raise ValueError("its transformers_weights is no safetensors file of the folder")
    elif key == "quantization_config" and isinstance(value, dict):
        method = value.get("quant_method")
        known = method in QUANTISERS or value.get("load_in_8bit") or value.get("load_in_4bit")
        if not known:
            raise ValueError(
                f"it is quantised by {str(method)[:40]!r}; known are {', '.join(sorted(QUANTISERS))}"
            )
    elif file in ("tokenizer_config.json", "special_tokens_map.json", "processor_config.json"):
        if key.endswith("_file") and isinstance(value, str) and Path(value).name != value:
            raise ValueError(f"its {key} names a file outside the folder")
    elif file == "config.json" and isinstance(value, (int, float)) and not isinstance(value, bool):
        for pattern, largest in LARGEST:
            if re.search(pattern, key) and not abs(value) <= largest:
                raise ValueError(f"its {key} is {value:g}, more than the {largest} that any model has")


def weight_bytes(folder: Path) -> int:
    """Bytes of a folder's weights in the files that transformers would read.

    By the safetensors' own tables, or for pickles their files' sizes. Raises ModelError for damaged ones, or
    where there are none.
    """
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(folder.glob("pytorch_model*.bin"))
        if not pickles:
            raise ModelError(f"Cannot load the model in {folder}: it has no model.safetensors.")
        return sum(file.stat().st_size for file in pickles)
    total = 0
    for file in files:
        with _refusing(folder, file.name):
            total += stored_bytes(file)
    return total


def weight_numbers(folder: Path) -> int:
    """How many numbers the weights of a folder are, by the tables of its safetensors; raises ModelError."""
    total = 0
    for file in sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors")):
        with _refusing(folder, file.name):
            table = _tensor_table(file)[0]
            total += sum(math.prod(entry["shape"]) for name, entry in table.items() if name != "__metadata__")
    if not total:
        raise ModelError(f"Cannot load the model in {folder}: it has no model.safetensors.")
    return total


def stored_bytes(file: Path) -> int:
    """Bytes of all tensors of a safetensors file, which must be as long as its table says.

    Raises OSError or ValueError.
    """
    return _tensor_table(file)[1]


def _tensor_table(file: Path) -> tuple[dict[str, Any], int]:
    """The table of a safetensors file, checked, and the bytes of all its tensors."""
    size = file.stat().st_size
    with open(file, "rb") as opened:
        head = opened.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if length > min(size - 8, 100 * MIB):
            raise ValueError("it is cut off, or no safetensors file")
        table = parse_object(opened.read(length))
    end = 0
    for name, entry in table.items():
        if name == "__metadata__":
            continue
        offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
        if not (isinstance(offsets, list) and len(offsets) == 2 and all(isinstance(x, int) for x in offsets)):
            raise ValueError("its table of tensors is damaged")
        shape = entry.get("shape")
        if not (isinstance(shape, list) and all(type(x) is int and x >= 0 for x in shape)):
            raise ValueError("its table of tensors is damaged")
        end = max(end, *offsets)
    if 8 + length + end != size:
        raise ValueError(
            f"it has {size} bytes, its table tells of {8 + length + end}: it is cut off or damaged"
        )
    return table, end


def check_fits(
    config: Any, stored: int | None, *, per_byte: int, itemsize: int | None, what: str, auto_class: Any
) -> None:
    """Raises ModelError for a configuration of a model that is larger than its weights, or than this machine.

    config: of transformers. stored: bytes of its weights, of which each holds at most `per_byte` numbers;
    None before they are there. itemsize: bytes of a number in this machine's memory; None if they are not all
    kept there. auto_class: of transformers, that builds it.
    """
    import torch

    with refused(f"Cannot load {what}"), torch.device("meta"):
        model = auto_class.from_config(config, trust_remote_code=False)
    count = sum(parameter.numel() for parameter in model.parameters())
    if stored is not None and count > 2 * per_byte * (stored + MIB):  # tied weights are stored once
        raise ModelError(
            f"Cannot load {what}: its settings describe {count / 1e6:.0f} million numbers, its weight "
            f"files hold {stored / 1e6:.1f} MB: they do not belong together."
        )
    need, total = count * (itemsize or 0), machine_bytes()
    if need > total:
        raise ModelError(
            f"Cannot load {what}: it needs {need / 2**30:.1f} GiB of memory, this machine has "
            f"{total / 2**30:.1f}: use a smaller model, or quantize='4bit'."
        )


def free_memory(device: Any) -> int:
    """Bytes that can be allocated now on a torch.device."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)


def machine_bytes() -> float:
    """Memory of this machine with its swap, or of the container that this runs in; infinite if unknown."""
    limits = []
    with contextlib.suppress(OSError, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
        limits.append(1024.0 * sum(int(fields[key].split()[0]) for key in ("MemTotal", "SwapTotal")))
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            limits.append(float(Path(file).read_text()))
    if not limits:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            limits.append(float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")))
    return min(limits, default=float("inf"))
