"""FluxChat's front door: what a program imports.

    import fluxchat
    answer = fluxchat.VideoChat().ask("clip.mp4", "What happens?", budget=128)

Importing it loads no model library. The packages behind it have common names (`app`, `encoder`, ...): where a
file of the user's hides one of them, the first use raises an ImportError that says which file is in the way.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from app.answer import Answer
    from app.chat import VideoChat
    from app.messages import Videos
    from encoder.budget import Budget
    from encoder.errors import FluxChatError

__version__ = "0.1.0"
__all__ = ["Answer", "Budget", "FluxChatError", "VideoChat", "Videos", "__version__"]

_HOME = {
    "Answer": "app.answer",
    "Budget": "encoder.budget",
    "FluxChatError": "encoder.errors",
    "VideoChat": "app.chat",
    "Videos": "app.messages",
}
_ROOMS = ("app", "encoder", "llm_bridge")


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fluxchat' has no attribute {name!r}")
    check_rooms()
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


def check_rooms() -> None:
    """Raises ImportError, naming the file, when another module hides one of FluxChat's packages."""
    ours = Path(__file__).resolve().parent
    for room in _ROOMS:
        spec = importlib.util.find_spec(room)
        if spec is None:
            raise ImportError(f"FluxChat's package {room!r} is missing: install FluxChat again.")
        places = [spec.origin] if spec.has_location else list(spec.submodule_search_locations or [])
        place = Path(places[0] or "").resolve() if places else Path()
        if ours not in place.parents:
            raise ImportError(
                f"{place} hides FluxChat's package {room!r}: rename it, or run from another folder."
            )
