"""Prompts are computed stretch by stretch: each in a pass of its own, or several that wait in one.

A pass over few positions takes an accelerator as long as it takes to launch its kernels, so that other
prompts are nearly free. Rows of a shared pass are padded: what stands before a stretch on the left, where a
mask hides the padding, the stretch itself on the right, where no position that is kept looks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llm_bridge.kv_cache import Layers, kv_from_layers, layers_of
from llm_bridge.llm import LanguageModel

# In positions. More bring a CPU no speed; an accelerator hardly, while others wait and activations grow.
LONGEST_PIECE, LONGEST_PIECE_ON_ACCELERATOR = 256, 2048
LONGEST_PASS = 8192  # of all rows, padded: by then a pass takes as long as its products


def longest_piece(device: torch.device) -> int:
    """The most positions of a prompt that are computed at once on a device."""
    return LONGEST_PIECE if device.type == "cpu" else LONGEST_PIECE_ON_ACCELERATOR


@dataclass(eq=False)
class Stretch:
    """The positions of one prompt from `start` to `end`, which a pass appends to the KV of those before.

    whole: positions of the prompt. before: makes the KV cache of those before. inputs: makes what the model's
    forward takes for these (see LocalAnswer.inputs). kv: of all up to `end`, and logits (V,) after the last,
    once they are computed. alone: a pass that it shared failed.
    """

    start: int
    end: int
    whole: int
    before: Callable[[], Any]
    inputs: Callable[[], dict[str, Any]]
    stop: threading.Event
    kv: Any = None
    logits: Tensor | None = None
    alone: bool = False

    @property
    def length(self) -> int:
        """How many positions it has."""
        return self.end - self.start

    @property
    def shares(self) -> bool:
        """Whether it may be computed with others now."""
        try:
            return not (self.alone or self.stop.is_set())
        except Exception:  # noqa: BLE001 - it is raised where the stretch is computed by itself
            return False

    def compute(self, llm: LanguageModel) -> None:
        """Compute it by itself."""
        kv = self.before()
        self.logits = llm.advance(kv, **self.inputs())[0]
        self.kv = kv


def fit_together(stretches: Sequence[Stretch]) -> bool:
    """Whether stretches may share a pass: it is bounded, and of a long one most is no padding.

    Where something stands before them, a mask of each position with all before it bounds them further.
    """
    positions = sum(stretch.length for stretch in stretches)
    padded = len(stretches) * max(stretch.length for stretch in stretches)
    if any(stretch.start for stretch in stretches):
        return padded <= LONGEST_PIECE_ON_ACCELERATOR
    return padded <= min(LONGEST_PASS, max(LONGEST_PIECE_ON_ACCELERATOR, 2 * positions))


def compute_together(llm: LanguageModel, stretches: Sequence[Stretch]) -> None:
    """Compute stretches of several prompts in one pass; none of them is changed where it fails."""
    before = max(stretch.start for stretch in stretches)
    kv = kv_from_layers(llm.model.config, _layers_before(stretches, before) if before else ())
    lengths = [stretch.length for stretch in stretches]
    logits = llm.advance_rows(kv, lengths, **_joined_inputs(llm, stretches, before))
    rows: list[list[tuple[Tensor, Tensor]]] = [[] for _ in stretches]
    for layer in kv.layers:
        for row, stretch in enumerate(stretches):
            own = slice(before - stretch.start, before + stretch.length)
            keys, values = (part[row : row + 1, :, own].clone() for part in (layer.keys, layer.values))
            rows[row].append((keys, values))
        layer.keys = layer.values = None  # not all layers twice
    for row, stretch in enumerate(stretches):
        stretch.kv = kv_from_layers(llm.model.config, tuple(rows[row]))
        stretch.logits = logits[row]


def _layers_before(stretches: Sequence[Stretch], length: int) -> Layers:
    """Keys and values (B, heads, length, width) of what stands before each stretch, padded on the left."""
    pasts = {row: layers_of(stretch.before()) for row, stretch in enumerate(stretches) if stretch.start}
    padded = []
    for number, pair in enumerate(next(iter(pasts.values()))):
        # Zeros, since a mask multiplies what it hides by 0.
        keys, values = (x.new_zeros(len(stretches), x.shape[1], length, x.shape[3]) for x in pair)
        for row, layers in pasts.items():
            for buffer, part in zip((keys, values), layers[number], strict=True):
                buffer[row, :, length - part.shape[2] :] = part[0]
        padded.append((keys, values))
    return tuple(padded)


def _joined_inputs(llm: LanguageModel, stretches: Sequence[Stretch], before: int) -> dict[str, Tensor]:
    """What the model's forward takes for several stretches, each padded on the right."""
    given = [stretch.inputs() for stretch in stretches]
    longest = max(stretch.length for stretch in stretches)
    joined: dict[str, Tensor] = {}
    if extra := [inputs.pop("extra") for inputs in given if "extra" in inputs]:
        joined["extra"] = torch.cat(extra)
        none = torch.zeros(1, 0, dtype=torch.bool, device=llm.device)
        joined["places"] = _right_padded([inputs.pop("places", none) for inputs in given], longest)
    if before or any("position_ids" in inputs for inputs in given):
        indices = torch.arange(max(stretch.end for stretch in stretches), device=llm.device)
        positions = [
            inputs.pop("position_ids", indices[stretch.start : stretch.end].expand(llm.axes, 1, -1))
            for inputs, stretch in zip(given, stretches, strict=True)
        ]
        rows = [axes.permute(1, 2, 0) for axes in positions]
        joined["position_ids"] = _right_padded(rows, longest).permute(2, 0, 1)  # (axes, B, L)
    if before:
        seen = torch.arange(before + longest, device=llm.device)
        starts = torch.tensor([before - stretch.start for stretch in stretches], device=llm.device)
        joined["attention_mask"] = (seen >= starts[:, None]).long()
    return joined | {name: _right_padded([inputs[name] for inputs in given], longest) for name in given[0]}


def _right_padded(parts: Sequence[Tensor], length: int) -> Tensor:
    """Tensors (1, n, ...) as the rows of one (B, length, ...), with zeros behind each."""
    padded = parts[0].new_zeros(len(parts), length, *parts[0].shape[2:])
    for row, part in enumerate(parts):
        padded[row, : part.shape[1]] = part[0]
    return padded
