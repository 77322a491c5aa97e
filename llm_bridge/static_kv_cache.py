"""Decoding in buffers of fixed shape: what a step does is recorded once as a CUDA graph and then replayed.

A decoding step of a small model spends most of its time launching kernels. Its shapes are fixed here: the
rows are rounded up to a power of two, the positions to a multiple of 256, so that few graphs serve all
answers. Each row begins at position 0; a mask made from the rows' lengths hides what lies behind them.
Elsewhere than on CUDA the same step runs without a graph.

    decoder = StaticDecoder(llm, limit)  # bytes of buffers kept beside those in use
    batch = decoder.begin(sequences)     # a DecodingBatch
    logits = batch.step(tokens)

Imported only where it is needed: it loads transformers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from llm_bridge import batch_invariance, grouped_attention
from llm_bridge.kv_cache import Layers
from llm_bridge.lean.build import ROTARY
from llm_bridge.llm import LanguageModel

POSITIONS = 256  # buffers hold a multiple of it
GROWTH = 64  # of which so many are free at least when a batch begins
KEPT = 3  # most sets of buffers, each with its graph, that stay for later batches
ATTENTIONS = ("sdpa", batch_invariance.NAME, grouped_attention.NAME)  # which take a mask of one's own
WARM_UP = 2  # runs before a graph is recorded, in which libraries set themselves up


def is_static(llm: LanguageModel) -> bool:
    """Whether a model's step depends on tokens, positions and a mask alone: every layer attends to all
    positions, none adds rows of its own, and the weights lie on one device as they are."""
    config = llm.model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    whole = kinds == {"full_attention"} and getattr(config, "sliding_window", None) is None
    plain = llm.quantize is None and llm.axes == 1 and not getattr(llm.model, "hf_device_map", None)
    return (
        whole
        and plain
        and not getattr(config, "hidden_size_per_layer_input", None)
        and getattr(config, "_attn_implementation", None) in ATTENTIONS
        and {module.rope_type for module in llm.model.modules() if hasattr(module, "rope_type")} <= ROTARY
        and llm.batches
    )


class _Layer(DynamicLayer):
    """Keys and values (R, heads, capacity, width) of one layer; a step writes each row at its own slot."""

    def __init__(self, keys: Tensor, values: Tensor, rows: Tensor, slots: Tensor) -> None:
        super().__init__()
        self.keys: Tensor
        self.values: Tensor
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values
        self._rows, self._slots = rows, slots

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys[self._rows, :, self._slots] = key_states[:, :, 0]
        self.values[self._rows, :, self._slots] = value_states[:, :, 0]
        return self.keys, self.values


class _Buffers:
    """One set of buffers and the step over them."""

    def __init__(self, llm: LanguageModel, rows: int, capacity: int, like: Layers) -> None:
        device = llm.device
        self.rows, self.capacity = rows, capacity
        self._llm = llm
        self._inputs = torch.zeros(3, rows, dtype=torch.long, device=device)  # tokens, slots, positions
        self._indices = torch.arange(capacity, device=device)
        numbers = torch.arange(rows, device=device)
        # Zeros, since a mask multiplies what it hides by 0.
        self.layers = [
            _Layer(
                keys.new_zeros(rows, keys.shape[1], capacity, keys.shape[3]),
                values.new_zeros(rows, values.shape[1], capacity, values.shape[3]),
                numbers,
                self._inputs[1],
            )
            for keys, values in like
        ]
        self._kv = Cache(layers=list(self.layers))
        self.bytes = rows * capacity * llm.kv_bytes_per_token
        self._graph: Any = None
        self._logits: Tensor | None = None

    def step(self, tokens: Sequence[int], slots: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Logits (R, V), overwritten by the next step."""
        padding = [0] * (self.rows - len(tokens))
        given = torch.tensor([[*values, *padding] for values in (tokens, slots, positions)])
        self._inputs.copy_(given)
        if self._inputs.device.type != "cuda":
            return self._forward()
        if self._graph is None:
            self._record()
        self._graph.replay()
        assert self._logits is not None
        return self._logits

    def _forward(self) -> Tensor:
        tokens, slots, positions = self._inputs
        seen = self._indices <= slots[:, None]
        return self._llm.advance(
            self._kv,
            input_ids=tokens[:, None],
            attention_mask=seen[:, None, None],
            position_ids=positions[:, None],
        )

    def _record(self) -> None:
        """The graph of `_forward`, which reads and writes these buffers whenever it is replayed."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):  # writes what the first replay writes again
                self._forward()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._logits = self._forward()
        self._graph = graph


class StaticDecoder:
    """The buffers of one model, for one batch at a time. limit: bytes of all buffers that are kept, though
    those in use may be larger."""

    def __init__(self, llm: LanguageModel, limit: int) -> None:
        self._llm, self._limit = llm, limit
        if llm.device.type != "cpu":
            grouped_attention.group_heads(llm.model)
        self._kept: OrderedDict[tuple[int, int], _Buffers] = OrderedDict()  # those in use are the last

    def begin(self, sequences: Sequence[Layers]) -> StaticBatch:
        """A batch of answers, per answer keys and values (1, heads, length, width) of each layer; copied.

        Ends the batch before it, whose views may be among the sequences.
        """
        rows = 1 << (len(sequences) - 1).bit_length()
        longest = max(layers[0][0].shape[2] for layers in sequences) + GROWTH
        key = rows, -(-longest // POSITIONS) * POSITIONS
        if self._kept and next(reversed(self._kept)) == key:  # what is written over may be read
            sequences = [tuple((k.clone(), v.clone()) for k, v in layers) for layers in sequences]
        if key not in self._kept:
            self._make_room(rows * key[1] * self._llm.kv_bytes_per_token)
            self._kept[key] = _Buffers(self._llm, *key, like=sequences[0])
        self._kept.move_to_end(key)
        return StaticBatch(self._kept[key], sequences)

    def _make_room(self, wanted: int) -> None:
        while self._kept and (
            len(self._kept) >= KEPT or sum(kept.bytes for kept in self._kept.values()) + wanted > self._limit
        ):
            self._kept.popitem(last=False)


class StaticBatch:
    """The KV caches of B answers, each of its own length, and the step that extends all of them."""

    def __init__(self, buffers: _Buffers, sequences: Sequence[Layers]) -> None:
        self._buffers, self.capacity = buffers, buffers.capacity
        self.lengths = [layers[0][0].shape[2] for layers in sequences]
        for row, layers in enumerate(sequences):
            for layer, (keys, values) in zip(buffers.layers, layers, strict=True):
                layer.keys[row, :, : keys.shape[2]] = keys[0]
                layer.values[row, :, : values.shape[2]] = values[0]

    @property
    def full(self) -> bool:
        """Whether another step needs larger buffers, which is a batch made anew."""
        return max(self.lengths) == self.capacity

    def step(self, tokens: Sequence[int], shifts: Sequence[int] = ()) -> Tensor:
        """Append one token to every answer; logits (B, V) of the next ones, good until the next step.

        shifts: how far each answer's positions run ahead of its length; none by default.
        """
        ahead = shifts or [0] * len(tokens)
        positions = [length + shift for length, shift in zip(self.lengths, ahead, strict=True)]
        logits = self._buffers.step(tokens, self.lengths, positions)
        self.lengths = [length + 1 for length in self.lengths]
        return logits[: len(tokens)]

    def views(self, row: int) -> Layers:
        """Views of one answer's keys and values, good until the next batch; without what a step that failed
        may have added."""
        own = slice(0, self.lengths[row])
        return tuple(
            (layer.keys[row : row + 1, :, own], layer.values[row : row + 1, :, own])
            for layer in self._buffers.layers
        )

    def copies(self, row: int) -> Layers:
        """Copies of one answer's keys and values, which do not change with the buffers."""
        return tuple((keys.clone(), values.clone()) for keys, values in self.views(row))
