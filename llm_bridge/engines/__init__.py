"""What runs the language model; prompt, towers, page, server and evaluation do not know which one."""

from llm_bridge.engines.engine import Engine, Request, TokenStream
from llm_bridge.engines.local import LocalEngine

__all__ = ["Engine", "LocalEngine", "Request", "TokenStream"]
