"""Clips that wait to be encoded: those of one shape are computed in one call, and a bound holds them.

    queue = EncodingQueue(tower, thread)
    looked, familiar = queue.look(clip, plan, "flux")       # from any thread

A clip waits for those before it, never for others to come. One call for several rounds otherwise than one for
each, in the last bits, so that on CPUs, where an answer depends on its question alone, each has its own.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from encoder.budget import Plan
from encoder.errors import ConfigError
from encoder.selection import Selector
from encoder.video.reader import Clip
from llm_bridge.compute_thread import ComputeThread
from llm_bridge.towers.tower import Looked, Tower

TOGETHER = 8  # clips of a call on a GPU
IN_FLIGHT = 16  # clips whose pixels may wait


@dataclass(eq=False)
class _Waiting:
    """A clip that waits; `looked` or `error` is set by its turn."""

    clip: Clip
    pixels: Tensor
    plan: Plan
    selector: Selector
    looked: list[Looked] = field(default_factory=list)
    familiar: bool | None = None
    error: BaseException | None = None

    def __post_init__(self) -> None:
        """kind: what clips of one call have in common."""
        self.kind: Hashable = (tuple(self.pixels.shape), self.plan.key, self.selector)


class EncodingQueue:
    """Encodes clips in a thread. Safe to use from many threads.

    together: most clips of one call; default: 8 on a GPU and 1 on CPUs. in_flight: clips whose pixels are
    held at a time; who asks for more waits. Raises ConfigError for less than one.
    """

    def __init__(
        self, tower: Tower, thread: ComputeThread, together: int | None = None, in_flight: int = IN_FLIGHT
    ) -> None:
        if together is not None and (type(together) is not int or together < 1):
            raise ConfigError(f"encode_batch must be a whole number from 1 up, not {together!r}.")
        default = TOGETHER if tower.device.type != "cpu" else 1
        self.together = (together or default) if tower.shares_calls else 1
        self._tower, self._thread = tower, thread
        self._room = threading.Semaphore(max(in_flight, self.together))
        self._lock = threading.Lock()
        self._waiting: list[_Waiting] = []

    def look(self, clip: Clip, plan: Plan, selector: Selector) -> tuple[Looked, bool | None]:
        """What the tower makes of a clip, and whether it is familiar (see Tower); raises ModelError."""
        with self._room:
            waiting = _Waiting(clip, self._tower.pixels(clip, plan), plan, selector)
            with self._lock:  # in the order of their turns, each of which serves the oldest
                turn = self._thread.submit(self._turn)
                self._waiting.append(waiting)
            turn.result()
        if waiting.error is not None:
            raise waiting.error
        return waiting.looked[0], waiting.familiar

    def select(self, clip: Clip, plan: Plan, selector: Selector) -> Tensor:
        """The cells (K,) that `look` keeps."""
        with self._room:
            return self._thread.run(self._tower.select, self._tower.pixels(clip, plan), plan, selector)

    # -- in the computing thread ----------------------------------------------------------------------------

    def _turn(self) -> None:
        """Encode the clip that waits for longest and others like it, unless an earlier turn took it along."""
        with self._lock:
            oldest = self._waiting[:1]
            batch = [other for other in self._waiting if other.kind == oldest[0].kind][: self.together]
            self._waiting = [other for other in self._waiting if other not in batch]
        if batch and not self._encode(batch) and len(batch) > 1:
            for waiting in batch:  # who fails fails alone
                self._encode([waiting])

    def _encode(self, batch: list[_Waiting]) -> bool:
        """Encode clips in one call; whether that went well, else its error is that of each."""
        try:
            looked = self._tower.look_together(
                [waiting.pixels for waiting in batch],
                batch[0].plan,
                batch[0].selector,
                [waiting.clip.times_s for waiting in batch],
            )
            for waiting, found in zip(batch, looked, strict=True):
                waiting.familiar = self._tower.is_familiar(waiting.clip.frames)
                waiting.looked, waiting.error = [found], None
            if self._tower.device.type != "cpu":
                torch.accelerator.synchronize(self._tower.device)
        except BaseException as error:  # noqa: BLE001 - its asker raises it
            for waiting in batch:
                waiting.error = error
            return False
        return True
