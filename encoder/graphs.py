"""Encoding in buffers of fixed shape: a pass is recorded once as a CUDA graph and then replayed.

At few tokens an encoder spends its time launching kernels. K and the grid fix every shape of a pass, also the
selection's, so that one recorded pass serves all clips of that grid and K; pruning by a threshold or by what
a codec says cannot do that. A shape is recorded when it comes a second time, since recording takes three
passes. Elsewhere than on CUDA, and for what cannot be recorded, the encoder runs as it is.

    encode = EncoderGraphs(encoder)  # weights do not change from now on
    tokens = encode(pixels, 512)     # as encoder(pixels, 512)
"""

from __future__ import annotations

import copy
import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from encoder.fluxvit import FluxViT, Keep
from encoder.selection import DRAWN
from encoder.tokens import VisionTokens

LOG = logging.getLogger("fluxchat")
KEPT = 8  # shapes recorded at most; the least recently used goes
WARM_UP = 2  # passes before one is recorded, in which libraries set themselves up

_Key = tuple[torch.Size, int | None, str, int | None]


class _Recorded:
    """One pass over buffers of its own; without `graph`, which only CUDA has, it runs anew each time."""

    def __init__(self, encoder: FluxViT, pixels: Tensor, graph: bool, **how: Any) -> None:
        self._encoder, self._how = encoder, how
        self._pixels = pixels.clone()
        self._graph = self._record() if graph else None
        # The pass reads the table where it lies: held here, it is not freed when the cache forgets it.
        self._positions = encoder.position_table(encoder.grid_of(*pixels.shape[2:]))

    def _forward(self) -> VisionTokens:
        return self._encoder(self._pixels, **self._how)

    def _record(self) -> Any:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self._forward()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._vision = self._forward()
        return graph

    def __call__(self, pixels: Tensor) -> VisionTokens:
        self._pixels.copy_(pixels)
        if self._graph is None:
            return self._forward()
        self._graph.replay()
        vision = self._vision  # the next replay writes over it
        kept = tuple(one.clone() for one in vision.kept)
        return replace(vision, packed=vision.packed.clone(), cls=vision.cls.clone(), kept=kept)


class EncoderGraphs:
    """The recorded passes of one encoder in inference, whose weights must not change. Thread-safe.

    most: shapes that stay recorded, each with the memory of its activations. devices: types on which passes
    run in fixed buffers.
    """

    def __init__(self, encoder: FluxViT, most: int = KEPT, devices: Sequence[str] = ("cuda",)) -> None:
        self._encoder, self._most, self._devices = encoder, most, tuple(devices)
        self._passes: OrderedDict[_Key, _Recorded | None] = OrderedDict()  # None: came once
        self._lock = threading.Lock()
        self._failed = False

    def __deepcopy__(self, memo: dict[int, Any]) -> EncoderGraphs:
        return EncoderGraphs(copy.deepcopy(self._encoder, memo), self._most, self._devices)

    @property
    def recorded(self) -> int:
        """How many shapes have a recorded pass."""
        return sum(recorded is not None for recorded in self._passes.values())

    def __call__(
        self,
        pixels: Tensor | Sequence[Tensor],
        keep: Keep = None,
        *,
        selector: str = "flux",
        depth: int | None = None,
        times_s: Sequence[Sequence[float]] | None = None,
        **selection: Any,
    ) -> VisionTokens:
        """As `FluxViT.forward`, which raises what it raises."""
        how = {"keep": keep, "selector": selector, "depth": depth}
        if not self._records(pixels, keep, selector, selection):
            return self._encoder(pixels, times_s=times_s, **how, **selection)
        with self._lock, torch.inference_mode(False), torch.no_grad():
            batch = pixels if isinstance(pixels, Tensor) else torch.stack(list(pixels))
            count = keep[0] if isinstance(keep, Sequence) else keep
            recorded = self._pass((batch.shape, count, selector, depth), batch)
            vision = recorded(batch) if recorded else self._encoder(batch, **how)
        times = None if times_s is None else tuple(tuple(times) for times in times_s)
        return replace(vision, times_s=times)

    def _records(self, pixels: Any, keep: Keep, selector: str, selection: dict[str, Any]) -> bool:
        """Whether every shape of that pass is known beforehand, and its clips share it."""
        if self._failed or self._encoder.cls_token.device.type not in self._devices or selector in DRAWN:
            return False
        if selection.get("merge") is not None or selection.get("compat_truncation"):
            return False
        one_count = not isinstance(keep, Sequence) or (len(keep) == len(pixels) and len(set(keep)) == 1)
        return len(pixels) > 0 and one_count and len({clip.shape for clip in pixels}) == 1

    def _pass(self, key: _Key, batch: Tensor) -> _Recorded | None:
        again = key in self._passes
        recorded = self._passes.setdefault(key, None)
        self._passes.move_to_end(key)
        if again and recorded is None:
            recorded = self._passes[key] = self._recorded(key, batch)
        while len(self._passes) > self._most:
            self._passes.popitem(last=False)
        return recorded

    def _recorded(self, key: _Key, batch: Tensor) -> _Recorded | None:
        _, keep, selector, depth = key
        graph = batch.device.type == "cuda"
        try:
            return _Recorded(self._encoder, batch, graph, keep=keep, selector=selector, depth=depth)
        except RuntimeError as error:  # also torch.OutOfMemoryError: a plain pass needs less
            self._failed = True
            self._passes.clear()
            LOG.warning("Clips are encoded without CUDA graphs from now on: recording one failed (%s)", error)
            return None
