"""FluxChat: ask questions about videos within the token budget you choose.

from app import VideoChat
print(VideoChat().ask("clip.mp4", "What happens?", budget=256).text)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from app.answer import Answer
    from app.chat import Media, Message, VideoChat, Videos
    from app.estimate import Estimate

__all__ = ["Answer", "Estimate", "Media", "Message", "VideoChat", "Videos"]


def __getattr__(name: str) -> Any:
    # Imported on first use: `import app` itself must cost nothing.
    if name in __all__:
        import app.chat

        return getattr(app.chat, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
