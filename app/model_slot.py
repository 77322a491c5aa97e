"""The place of the model that a page and its API answer with, which may be exchanged while they run.

    slot = ModelSlot(VideoChat(), lambda name, quantize: VideoChat(name, quantize=quantize))
    with slot.using() as chat:
        ...  # this model stays until the end of the block, whatever is loaded meanwhile
    loading = slot.load(choice)

A model is loaded beside the one in use, so that this one goes on answering and stays where the other cannot
be loaded; there must be memory for both. Who holds on to a VideoChat holds on to its memory: hold the slot.
"""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from app.model_choices import Choice, find_choices, weights_bytes
from encoder.errors import ConfigError, FluxChatError, ModelError
from llm_bridge.model_files.checks import free_memory, local_folder
from llm_bridge.model_files.hub import cached_bytes

if TYPE_CHECKING:
    from app.chat import VideoChat

LOG = logging.getLogger("fluxchat")
GIB = 2**30
MEMORY_SHARE = 0.8  # of the free memory, that the weights of one more model may take
POLL_S = 0.1
# Opens a model by a choice's name, and what its weights are quantised to.
Opener = Callable[[str, str | None], "VideoChat"]


@dataclass
class Loading:
    """A model on its way. size: bytes to download first. problem: why it did not come, one sentence."""

    choice: Choice
    size: int = 0
    phase: str = "load"
    problem: str = ""
    begun: float = field(default_factory=time.monotonic)
    done: threading.Event = field(default_factory=threading.Event)
    present: int = 0  # bytes of it that were on the disk before

    @property
    def downloaded(self) -> int:
        """Bytes of the download that are here."""
        if self.phase != "download":
            return self.size
        return min(self.size, max(0, cached_bytes(self.choice.name) - self.present))

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self.begun


class ModelSlot:
    """Holds one VideoChat; `open_model`, where it is given, opens another one. Thread-safe.

    offers_shipped: the first one is another than the shipped model, which is then one of the choices.
    """

    def __init__(
        self, chat: VideoChat, open_model: Opener | None = None, *, offers_shipped: bool = False
    ) -> None:
        self._chat, self._open, self.offers_shipped = chat, open_model, offers_shipped
        self._first = Choice.of(chat)
        self._changed = threading.Condition()
        self._users: Counter[int] = Counter()
        self._loading: Loading | None = None
        self._closed = False
        self.name = ""  # of the choice in use
        self.exchanges = 0

    @staticmethod
    def of(chat: VideoChat | ModelSlot) -> ModelSlot:
        """A slot around a VideoChat; a slot is itself."""
        return chat if isinstance(chat, ModelSlot) else ModelSlot(chat)

    @property
    def chat(self) -> VideoChat:
        """The model in use now; where it must stay for a while, see `using`."""
        return self._chat

    @property
    def loading(self) -> Loading | None:
        """What is being loaded."""
        return self._loading

    @property
    def can_load(self) -> bool:
        """Whether another model can be loaded at all."""
        return self._open is not None

    @contextmanager
    def using(
        self, stop: threading.Event | None = None, *, after_loading: bool = False
    ) -> Iterator[VideoChat]:
        """The model in use, which stays open until the block ends.

        after_loading: wait for one that is being loaded, until `stop` is set.
        """
        with self._changed:
            while after_loading and self._loading is not None and not (stop is not None and stop.is_set()):
                self._changed.wait(POLL_S)
            chat = self._chat
            self._users[id(chat)] += 1
        try:
            yield chat
        finally:
            with self._changed:
                self._users[id(chat)] -= 1
                self._changed.notify_all()

    # -- another one ----------------------------------------------------------------------------------------

    def choices(self) -> list[Choice]:
        """What can be loaded, the one in use included; empty where nothing can."""
        if not self.can_load:
            return []
        return find_choices(self._first, self._chat.device, shipped=self.offers_shipped)

    def choice(self, name: str) -> Choice:
        """The choice of that name; raises ConfigError."""
        for choice in self.choices():
            if choice.name == name:
                return choice
        raise ConfigError(f"There is no model {name[:80]!r} to load here: choose one of the list.")

    def check_room(self, choice: Choice) -> None:
        """Raises ModelError where a model has no room in memory beside the one in use."""
        device = self._chat.device
        free = free_memory(device)
        if choice.memory_bytes > MEMORY_SHARE * free:
            need, used = gib(choice.memory_bytes), gib(weights_bytes(self._chat.model))
            raise ModelError(
                f"{choice.title} needs {need} GiB of memory beside the {used} of the model in use, and "
                f"{gib(free)} GiB are free: end this page and start {choice.start}."
            )

    def load(self, choice: Choice, size: int = 0) -> Loading:
        """Begin to load another model in place of this one, in a thread of its own.

        size: bytes that must be downloaded first. Answers under way end with the old model; what asks `using`
        with `after_loading` waits. Raises ConfigError while another is being loaded, and ModelError where it
        has no room.
        """
        with self._changed:
            if self._loading is not None:
                raise ConfigError(f"{self._loading.choice.title} is being loaded: wait until it is there.")
            self.check_room(choice)
            loading = self._loading = Loading(choice, size, "download" if size else "load")
            loading.present = cached_bytes(choice.name) if size else 0
        threading.Thread(target=self._load, args=(loading,), name="fluxchat-loading", daemon=True).start()
        return loading

    def _load(self, loading: Loading) -> None:
        old = None
        try:
            if loading.size:
                local_folder(loading.choice.name)
                loading.phase = "load"
            old = self._exchange(self.open(loading.choice), loading.choice.name)
        except FluxChatError as error:
            loading.problem = " ".join(str(error).split())
        except Exception:
            LOG.exception("A model could not be loaded")
            loading.problem = (
                f"{loading.choice.title} could not be loaded, for a reason that is in the server's log."
            )
        finally:
            with self._changed:
                self._loading = None
                self._changed.notify_all()
            loading.done.set()
        if old is not None:
            self._free(old)

    def open(self, choice: Choice) -> VideoChat:
        """A model of its own beside the one in use, to be closed by the caller; raises FluxChatError."""
        if self._open is None:
            raise ConfigError("No other model can be loaded here: start the page again with --model.")
        self.check_room(choice)
        return self._open(choice.name, choice.quantize)

    def _exchange(self, new: VideoChat, name: str) -> VideoChat:
        """Put a model into the slot; the one that was there."""
        with self._changed:
            if self._closed:
                new.close()
                raise ModelError("The page has ended.")
            old, self._chat, self.name = self._chat, new, name
            self.exchanges += 1
            return old

    def _free(self, old: VideoChat) -> None:
        """Close a model that was exchanged, once its last answer has ended, and give its memory back."""
        with self._changed:
            while self._users[id(old)] and not self._closed:
                self._changed.wait(POLL_S)
            del self._users[id(old)]
        old.close()
        del old
        collect()

    # -- the rest -------------------------------------------------------------------------------------------

    def forget(self, scope: str) -> None:
        """Drop what is kept for one scope."""
        self._chat.forget(scope)

    def close(self) -> None:
        """Close the model; one that is being loaded is closed when it comes."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._chat.close()

    def __enter__(self) -> ModelSlot:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Beside:
    """A second model beside the one of a slot, loaded in a thread while the block runs and freed at its end.

    Leave no reference to it behind.
    """

    def __init__(self, slot: ModelSlot, choice: Choice) -> None:
        self._pool = ThreadPoolExecutor(1, "fluxchat-loading")
        self._future = self._pool.submit(slot.open, choice)

    def ready(self, seconds: float) -> bool:
        """Whether it is there, or cannot be, within so many seconds."""
        return bool(wait([self._future], seconds).done)

    @property
    def chat(self) -> VideoChat:
        """The model, once it is ready; raises FluxChatError where it could not be loaded."""
        return self._future.result()

    def __enter__(self) -> Beside:
        return self

    def __exit__(self, *_: object) -> None:
        self._future.add_done_callback(_close)
        self._pool.shutdown(wait=False)
        del self._future
        collect()


def _close(future: Future[VideoChat]) -> None:
    if future.exception() is None:
        future.result().close()


def collect() -> None:
    """Give back the memory of what nobody holds any more."""
    gc.collect()
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def gib(size: float) -> str:
    """Bytes in GiB, for people."""
    return f"{size / GIB:.2g}" if size < GIB else f"{size / GIB:.1f}"
