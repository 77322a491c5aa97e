"""EncoderRun: what every table of an encoder shares - encoder, views, journal - and the loop over items."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from encoder.errors import DataError
from llm_bridge.clip_head import TrainedPools
from training.data.examples import Example
from training.evaluation.encoder_input import EncoderInput
from training.evaluation.frozen_encoder import FrozenEncoder
from training.evaluation.journal import Journal, Row, run_blocks
from training.evaluation.views import Views, load_views


@dataclass(frozen=True)
class EncoderRun:
    """One evaluation of an encoder. pools: the pooling heads that were trained; block: items that go through
    the encoder together; workers: threads that decode."""

    encoder: FrozenEncoder
    journal: Journal
    pools: TrainedPools
    views: Views = field(default_factory=Views)
    seed: int = 0
    block: int = 8
    workers: int = 2

    def pooled(self, pixels: Sequence[Tensor], encoder_input: EncoderInput, seed: int) -> Tensor:
        """Pooled features (B, clip_embed_dim) of clips."""
        return self.encoder.pooled(pixels, encoder_input, self.pools, seed)

    def rows(
        self,
        examples: Sequence[Example],
        encoder_input: EncoderInput,
        features: Callable[[Sequence[Tensor], int], Tensor],
        describe: Callable[[Tensor], Row],
    ) -> list[Row]:
        """A row per example. features: (pixels of views, seed) -> (views, D); describe: the features (V, D)
        of an example's views -> what to note. What cannot be read becomes {"missing": reason}."""
        encoder_input.check(self.encoder.config)

        def work(numbers: Sequence[int]) -> list[Row]:
            chosen = [examples[number] for number in numbers]
            loaded = load_views(
                chosen, encoder_input.frames, encoder_input.resolution, self.views, self.workers
            )
            rows: list[Row] = [{"missing": loaded.missing.get(place, "")} for place in range(len(chosen))]
            if loaded.places:
                flat = [pixels for views in loaded.views for pixels in views]
                computed = features(flat, self.seed * 1_000_003 + numbers[0]).cpu()
                per_item = computed.view(len(loaded.places), -1, computed.shape[-1])
                for place, values in zip(loaded.places, per_item, strict=True):
                    rows[place] = describe(values)
            return rows

        ids = [f"{encoder_input}|{example.id}" for example in examples]
        return run_blocks(ids, work, self.journal, block=self.block, label=str(encoder_input))

    def vectors(
        self,
        examples: Sequence[Example],
        encoder_input: EncoderInput,
        features: Callable[[Sequence[Tensor], int], Tensor],
        key: str = "vector",
        over_views: Callable[[Tensor], Tensor] = lambda values: values.mean(dim=0),
    ) -> tuple[list[int], Tensor, dict[str, str]]:
        """(numbers of the examples that could be read, their vectors (N, D), reasons of the others by id).

        key: names the vector in the journal. over_views: (V, D) of an example's views -> (D,). Raises
        DataError when nothing could be read.
        """
        rows = self.rows(examples, encoder_input, features, lambda values: {key: pack(over_views(values))})
        readable = [number for number, row in enumerate(rows) if "missing" not in row]
        missing = {e.id: row["missing"] for e, row in zip(examples, rows, strict=True) if "missing" in row}
        if not readable:
            first = next(iter(missing.values()))
            raise DataError(f"None of the {len(rows)} videos can be read; the first: {first}")
        return readable, unpack([rows[number][key] for number in readable]), missing


def pack(vector: Tensor) -> str:
    """A float32 vector as text, bit for bit."""
    return base64.b64encode(vector.detach().float().cpu().numpy().tobytes()).decode()


def unpack(rows: Sequence[str]) -> Tensor:
    """Packed vectors (N, D)."""
    return torch.stack(
        [torch.frombuffer(bytearray(base64.b64decode(row)), dtype=torch.float32) for row in rows]
    )
