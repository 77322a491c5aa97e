"""Run: what every table of an encoder shares - encoder, views, journal - and the loop over items."""

from __future__ import annotations

import base64
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from training.data.examples import Example
from training.evaluation.encoder_input import Setting, Viewer
from training.evaluation.results import (
    Journal,
    Row,
    commit,
    machine,
    run_blocks,
    weights_hash,
)
from training.evaluation.views import Views, load_block

DECODER = "auto (decord for trusted files, else PyAV)"


@dataclass(frozen=True)
class Run:
    """One evaluation of an encoder. pool: number of the pooling head, None by token count; block: items that
    go through the encoder together; workers: threads that decode."""

    viewer: Viewer
    journal: Journal
    views: Views = field(default_factory=Views)
    pool: int | None = None
    seed: int = 0
    block: int = 8
    workers: int = 2

    def rows(
        self,
        examples: Sequence[Example],
        setting: Setting,
        features: Callable[[Sequence[Tensor], int], Tensor],
        describe: Callable[[Example, Tensor], Row],
    ) -> list[Row]:
        """A row per example. features: (pixels of views, seed) -> (views, D); describe: an example and its
        views' features (V, D) -> what to note. What cannot be read becomes {"missing": reason}."""
        setting.check(self.viewer.config)

        def work(numbers: Sequence[int]) -> list[Row]:
            chosen = [examples[number] for number in numbers]
            loaded = load_block(chosen, setting, self.views, self.workers)
            rows: list[Row] = [{"missing": loaded.missing.get(place, "")} for place in range(len(chosen))]
            if loaded.places:
                flat = [pixels for views in loaded.views for pixels in views]
                found = features(flat, self.seed * 1_000_003 + numbers[0]).cpu()
                per_item = found.view(len(loaded.places), -1, found.shape[-1])
                for place, values in zip(loaded.places, per_item, strict=True):
                    rows[place] = describe(chosen[place], values)
            return rows

        ids = [f"{setting}|{example.id}" for example in examples]
        return run_blocks(ids, work, self.journal, block=self.block, label=str(setting))


def header(viewer: Viewer, views: Views, pool: int | None, seed: int, **more: Any) -> dict[str, Any]:
    """What every row depends on."""
    return {
        "weights": weights_hash(viewer.encoder),
        "dtype": str(viewer.dtype).removeprefix("torch."),
        "views": str(views),
        "fit": views.fit,
        "pool": "by tokens" if pool is None else pool,
        "seed": seed,
        **more,
    }


def provenance(command: Sequence[str], device: torch.device, recipe: str | None = None) -> dict[str, Any]:
    """What a result file says besides its figures and its header."""
    return {
        "command": shlex.join(command),
        "commit": commit(),
        "recipe": recipe,
        "decoder": DECODER,
        "machine": machine(device),
    }


def describe_setting(setting: Setting) -> dict[str, Any]:
    """A setting for result files."""
    return {
        "frames": setting.frames,
        "resolution": setting.resolution,
        "K": setting.keep,
        "selector": "vid-tldr" if setting.merge else setting.selector,
        "optimized": setting.optimized,
    }


def setting_of(described: Mapping[str, Any]) -> Setting:
    """The reverse of `describe_setting`."""
    merge = described["selector"] == "vid-tldr"
    return Setting(
        described["frames"],
        described["resolution"],
        described["K"],
        "flux" if merge else described["selector"],
        merge,
        described["optimized"],
    )


def split_missing(examples: Sequence[Example], rows: Sequence[Row]) -> tuple[list[int], dict[str, str]]:
    """Numbers of the examples that could be read, and reasons of the others by id."""
    present = [number for number, row in enumerate(rows) if "missing" not in row]
    gone = {e.id: row["missing"] for e, row in zip(examples, rows, strict=True) if "missing" in row}
    return present, gone


def pack(vector: Tensor) -> str:
    """A float32 vector as text, bit for bit."""
    return base64.b64encode(vector.detach().float().cpu().numpy().tobytes()).decode()


def unpack(rows: Sequence[str]) -> Tensor:
    """Packed vectors (N, D)."""
    return torch.stack(
        [torch.frombuffer(bytearray(base64.b64decode(row)), dtype=torch.float32) for row in rows]
    )
