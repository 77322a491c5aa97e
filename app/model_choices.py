"""The models that can be loaded on this machine: the one that was there first, the shipped one, those on
disk, those of the catalog that fit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from encoder.errors import FluxChatError
from llm_bridge.assets.fetch import default_llm_path
from llm_bridge.model_files.checks import check_folder, weight_numbers
from llm_bridge.model_files.hub import cached_models
from llm_bridge.towers.catalog import CATALOG, GIB, StockEntry
from llm_bridge.towers.stock import kinds, stock_kind

if TYPE_CHECKING:
    import torch

    from app.chat import VideoChat
    from llm_bridge.chat_model import ChatModel


SHIPPED_NAME = "shipped"  # of the model that comes without --model, beside another that was there first
SHIPPED_TITLE = "The shipped model"


@dataclass(frozen=True)
class Choice:
    """A model that can be loaded.

    name: what --model takes; "" for the one that was there first, SHIPPED_NAME for the shipped one.
    memory_bytes: of its weights, as they are loaded here. quantize: to what, so that it fits; None to leave
    them. on_disk: nothing is to be downloaded. entry: of the catalog, if it is in it.
    """

    name: str
    title: str
    memory_bytes: int
    on_disk: bool = True
    quantize: str | None = None
    entry: StockEntry | None = None

    @staticmethod
    def of(chat: VideoChat) -> Choice:
        """The model that is loaded, to come back to it."""
        return Choice("", chat.name, weights_bytes(chat.model))

    @property
    def start(self) -> str:
        """What starts a page with it, in the words of a sentence."""
        if not self.name:
            return "it again as before"
        return "`fluxchat web`" if self.name == SHIPPED_NAME else f"`fluxchat web --model {self.name}`"


def weights_bytes(model: ChatModel) -> int:
    """Bytes of a loaded model's weights."""
    parts: list[Any] = [model.llm.model, *vars(model.tower).values()]
    held: dict[int, int] = {}
    for part in parts:
        for tensor in part.parameters() if hasattr(part, "parameters") and callable(part.parameters) else ():
            held[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
    return sum(held.values())


def find_choices(first: Choice, device: torch.device, *, shipped: bool = False) -> list[Choice]:
    """All that can be loaded: `first`, the shipped one where asked for and fetched, the video models in the
    hub's cache, and the catalog."""
    from app.about import device_gib
    from llm_bridge.llm import default_dtype

    catalog = {entry.name: entry for entry in CATALOG if entry.kind in kinds()}
    itemsize, memory = default_dtype(device).itemsize, device_gib()[1]
    here = {name: numbers for name, folder in cached_models() if (numbers := _numbers(folder)) is not None}
    found = [first]
    if shipped and (numbers := _shipped_numbers()) is not None:
        found.append(Choice(SHIPPED_NAME, SHIPPED_TITLE, numbers * itemsize))
    for name in (*here, *(name for name in catalog if name not in here)):
        entry, title = catalog.get(name), name.split("/")[-1]
        best = "bf16" if entry is None else entry.fits(memory)
        if entry is not None and best not in (None, "bf16"):
            size = round(entry.memory_gib(best) * GIB)
            found.append(Choice(name, title, size, name in here, best, entry))
        elif name in here:
            found.append(Choice(name, title, here[name] * itemsize, entry=entry))
        elif entry is not None and best is not None:
            found.append(Choice(name, title, entry.parameters * 10**6 * itemsize, False, None, entry))
    return found


def _shipped_numbers() -> int | None:
    """Numbers in the shipped model's weights; None where its language model was not fetched, or not whole."""
    from app.chat import SHIPPED

    try:
        return weight_numbers(default_llm_path()) + weight_numbers(SHIPPED)
    except FluxChatError:
        return None


def _numbers(folder: Path) -> int | None:
    """Numbers in the weights of a stock video model's folder; None where it is none, or not whole."""
    if stock_kind(folder) is None:
        return None
    try:
        check_folder(folder)
        return weight_numbers(folder)
    except FluxChatError:
        return None
