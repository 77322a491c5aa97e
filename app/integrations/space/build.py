"""Put the files of a Hugging Face Space together: what to push, nothing else.

python app/integrations/space/build.py build/space
"""

import shutil
import sys
from pathlib import Path

import tomllib

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
ROOMS = ("app", "encoder", "llm_bridge")
PREINSTALLED = ("gradio",)  # what the Space's own image has, in the version that README.md names


def requirements(project: Path) -> list[str]:
    """The package's dependencies without those of the Space's image."""
    wanted = tomllib.loads(project.read_text())["project"]["dependencies"]
    return [line for line in wanted if not line.startswith(PREINSTALLED)]


def build(target: Path) -> None:
    """Write the Space into `target`, which must not exist or be empty."""
    if target.exists() and any(target.iterdir()):
        raise SystemExit(f"{target} is not empty: choose another folder.")
    target.mkdir(parents=True, exist_ok=True)
    for room in ROOMS:
        shutil.copytree(ROOT / room, target / room, ignore=shutil.ignore_patterns("__pycache__", "space"))
    for name in ("LICENSE", "NOTICE", "fluxchat.py"):
        shutil.copy(ROOT / name, target)
    for name in ("README.md", "app.py"):
        shutil.copy(HERE / name, target)
    (target / "requirements.txt").write_text("\n".join(requirements(ROOT / "pyproject.toml")) + "\n")


if __name__ == "__main__":
    build(Path(sys.argv[1] if len(sys.argv) > 1 else "build/space"))
