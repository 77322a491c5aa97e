"""The engine that computes in this process: prefills what the prefix cache lacks, then decodes.

A prompt is prefilled in pieces whose ends depend on it alone (see `piece_ends`) and on the kind of device,
and only whole pieces are reused. So every kernel sees the same shapes and values whatever was asked before,
and gives the same bits; but for pieces that accelerators compute together, since they wait (see prefill.py).
KV of decoded tokens is not bit-equal to prefilled KV: a follow-up question prefills the last answer.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llm_bridge.engines.engine import Request
from llm_bridge.kv_cache import CacheStats, Piece, PrefixCache, joined, kv_from_layers
from llm_bridge.llm import LanguageModel
from llm_bridge.own_kv import OwnKV
from llm_bridge.prefill import LONGEST_PIECE, Stretch, longest_piece
from llm_bridge.prompt import PLACEHOLDER, Prompt
from llm_bridge.sampling import FinishReason, Sampler

if TYPE_CHECKING:
    from llm_bridge.compute_worker import ComputeWorker

SHORTEST_PIECE = 16  # positions
MARK = 3  # the last ids of a prompt that are taken for the words that begin an answer


class LocalEngine:
    """Runs a language model of transformers.

    worker: computes for several answers, each read in a thread of its own; None computes in the reader's.
    prefixes: KV to start from; the prompts' KV is added.
    """

    name = "local"

    def __init__(
        self, llm: LanguageModel, worker: ComputeWorker | None = None, prefixes: PrefixCache | None = None
    ) -> None:
        self._llm, self._worker, self._prefixes = llm, worker, prefixes

    @property
    def kept(self) -> CacheStats:
        """Prompts that are kept for follow-up questions."""
        return CacheStats(0, 0, 0, 0) if self._prefixes is None else self._prefixes.stats

    @property
    def decoding(self) -> tuple[int, int, int]:
        """Forward passes that made tokens, the tokens made, and the answers being made now."""
        worker = self._worker
        return (0, 0, 0) if worker is None else (worker.steps, worker.made, worker.active)

    def forget(self, scope: str | None = None) -> None:
        """Drop what is kept for follow-up questions, of one scope or all."""
        if self._prefixes is not None:
            self._prefixes.clear(scope)

    def start(self, request: Request) -> LocalAnswer:
        """An answer to be read."""
        return LocalAnswer(self._llm, request, self._worker, self._prefixes)

    def close(self) -> None:
        """Answers being made end with a ModelError; what was kept for others is dropped."""
        if self._worker is not None:
            self._worker.close()
        if self._prefixes is not None:
            self._prefixes.clear()


def piece_ends(prompt: Prompt, longest: int = LONGEST_PIECE) -> list[int]:
    """Where the pieces end that a prompt is prefilled in; the last one is its length.

    At the end of each visual and where an answer begins, of earlier turns too, so that another question about
    the same video and the next turn of a conversation find all of what they have in common with this one.
    longest: positions of a piece that was cut for its length.
    """
    mark = prompt.ids[-MARK:]
    wanted = {start + count for start, count in prompt.spans} | {len(prompt)}
    if PLACEHOLDER not in mark:
        wanted.update(
            end for end in range(len(mark), len(prompt)) if prompt.ids[end - len(mark) : end] == mark
        )
    ends, last = [], 0
    for end in sorted(wanted):
        if end - last < SHORTEST_PIECE and end < len(prompt):
            continue
        while end - last > 1.5 * longest:  # no short rest
            last += longest
            ends.append(last)
        ends.append(end)
        last = end
    return ends


def biased(logits: Tensor, bias: Mapping[int, float]) -> Tensor:
    """Logits (V,) with what is added to those of some ids."""
    with torch.inference_mode():
        ids = torch.tensor(list(bias), device=logits.device)
        added = torch.tensor(list(bias.values()), device=logits.device, dtype=logits.dtype)
        return logits.index_add(0, ids, added)


class LocalAnswer:
    """One answer of the local engine; see TokenStream."""

    def __init__(
        self,
        llm: LanguageModel,
        request: Request,
        worker: ComputeWorker | None = None,
        prefixes: PrefixCache | None = None,
    ) -> None:
        self.llm, self.prompt, self.stop = llm, request.prompt, request.stop
        self.cached_tokens, self.prefill_s = 0, 0.0
        self.finish: FinishReason = "cancelled"
        self._request, self._worker, self._prefixes = request, worker, prefixes
        self._longest = longest_piece(llm.device)
        # KV of the prompt from its start: cached pieces, then computed ones.
        self._pieces: list[Piece] = []

    @cached_property
    def _rows(self) -> Tensor:
        """The embeddings (sum M, ...) of all visuals, in the order of their places."""
        starts = [start for start, _ in self.prompt.spans]
        order = sorted(range(len(starts)), key=starts.__getitem__)
        return torch.cat([self._request.visuals[index] for index in order])

    @cached_property
    def _places(self) -> list[int]:
        """Positions of the prompt that take a row each, ascending."""
        return [index for index, token in enumerate(self.prompt.ids) if token == PLACEHOLDER]

    def __iter__(self) -> Iterator[int]:
        if self._worker is not None:
            self._worker.check_process()
        start = time.perf_counter()
        keys = self.prompt.cache_keys
        ends = [len(keys)] if self.llm.memory == "whole" else piece_ends(self.prompt, self._longest)
        self._pieces = self._take_prefix(keys, ends)
        self.cached_tokens = sum(piece.length for piece in self._pieces)
        try:
            kv, logits = self.prefill(ends)
            if logits is not None and self._request.first_bias:
                logits = biased(logits, self._request.first_bias)
            self.prefill_s = time.perf_counter() - start
            tokens = self._decode(kv, logits)
            del kv, logits  # else the KV would stay beside its copy in the batch
            yield from tokens
            self._put_prefix(keys, ends)
        except GeneratorExit:  # its reader left
            self._put_prefix(keys, ends)
            raise
        finally:
            self._pieces = []

    def _take_prefix(self, keys: Sequence[int], ends: Sequence[int]) -> list[Piece]:
        """The pieces to go on from; never the last one, which the first token's logits come from."""
        if self._prefixes is None:
            return []
        pieces = self._prefixes.take(keys, ends[:-1], self._request.scope)
        while pieces and self.llm.memory == "states" and pieces[-1].states is None:
            pieces.pop()
        return pieces

    def _put_prefix(self, keys: Sequence[int], ends: Sequence[int]) -> None:
        if self._prefixes is not None:
            self._prefixes.put(keys, ends, self._pieces, self._request.scope)

    def inputs(self, start: int, end: int) -> dict[str, Any]:
        """What the language model's forward takes for the prompt's positions from `start` to `end`.

        inputs_embeds (1, end - start, D); position_ids (axes, 1, end - start) where they are not the indices;
        extra (rows, n, D) and their places (1, end - start), where layers add rows of their own.
        """
        ids = torch.tensor(self.prompt.ids[start:end], device=self.llm.device)
        embedded = self.llm.embed(ids.masked_fill(ids == PLACEHOLDER, 0))
        first, last = bisect_left(self._places, start), bisect_left(self._places, end)
        inputs: dict[str, Any] = {"inputs_embeds": embedded[None], **self.llm.beside_embeddings(ids[None])}
        if first < last:
            rows, width = self._rows[first:last].to(embedded), embedded.shape[1]
            embedded[ids == PLACEHOLDER] = rows[:, :width]
            if rows.shape[1] > width:
                inputs |= {
                    "extra": rows[:, width:].unflatten(1, (-1, width)),
                    "places": ids[None] == PLACEHOLDER,
                }
        if self.prompt.positions:
            positions = [axis[start:end] for axis in self.prompt.positions]
            inputs["position_ids"] = torch.tensor(positions, device=self.llm.device)[:, None]
        return inputs

    def prefill(self, ends: Sequence[int]) -> tuple[Any, Tensor | None]:
        """Compute the pieces of the prompt that were not cached, whose ends are in `ends`.

        Returns the prompt's KV cache and the logits (V,) of the first new token, None if stopped.
        """
        kv = logits = None
        start = self.cached_tokens
        for end in ends[len(self._pieces) :]:
            before, inputs = partial(self._before, kv), partial(self.inputs, start, end)
            stretch = Stretch(start, end, len(self.prompt), before, inputs, self.stop)
            if self._worker is None:
                kv, logits = self._prefill_piece(stretch)
            else:
                kv, logits = self._worker.run(self._prefill_piece, stretch)
            if logits is None:
                break
            start = end
        return kv, logits

    def _before(self, kv: Any) -> Any:
        """The KV cache to go on from: that of the cached pieces in place of None."""
        if kv is not None:
            return kv
        config, pieces = self.llm.model.config, self._pieces
        return kv_from_layers(config, joined(pieces), pieces[-1].states) if pieces else kv_from_layers(config)

    @torch.inference_mode()
    def _prefill_piece(self, stretch: Stretch) -> tuple[Any, Tensor | None]:
        if self.stop.is_set():
            return None, None
        if stretch.logits is None:  # no pass that it shared was right
            if self._worker is None:
                stretch.compute(self.llm)
            else:
                self._worker.prefill(stretch)
        start, end = stretch.start, stretch.end
        if self._prefixes is not None and stretch.length >= SHORTEST_PIECE and self.llm.memory != "whole":
            self._pieces.append(Piece.of(stretch.kv, start, end, states=self._parts_at(start, end)))
        return stretch.kv, stretch.logits

    def _parts_at(self, start: int, end: int) -> bool:
        """Whether to keep a model's states at the end of a piece, since another question may part there."""
        if self.llm.memory != "states":
            return False
        # A piece of the greatest length was cut by its length alone.
        visual = any(end == place + count for place, count in self.prompt.spans)
        return visual or end - start != self._longest

    def _sampler(self, end_ids: Collection[int]) -> Sampler:
        text = [token for token in self.prompt.ids if token != PLACEHOLDER]
        sampling = self._request.sampling
        return Sampler(sampling, text, end_ids, self._request.length, self.llm.guide(sampling))

    def _decode(self, kv: Any, logits: Tensor | None) -> Generator[int, None, None]:
        """New tokens until the end of the turn, the length limit, or a stop; none without logits."""
        if self._worker is None:
            return self._decode_alone(kv, logits)
        return self._decode_together(self._worker, kv, logits)

    def _decode_alone(self, kv: Any, logits: Tensor | None) -> Generator[int, None, None]:
        if logits is None:
            return
        ends = self.llm.eos_ids | frozenset(self._request.sampling.stop_token_ids)
        sampler = self._sampler(ends)
        own = OwnKV(self.llm, kv)
        del kv
        while not self.stop.is_set():
            token = sampler(logits)
            if token in ends:
                self.finish = "stop"
                return
            yield token
            if (finish := sampler.finish) is not None:
                self.finish = finish
                return
            if self.stop.is_set():
                return
            with torch.inference_mode():
                logits = own.step(token, self.prompt.shift)

    def _decode_together(
        self, worker: ComputeWorker, kv: Any, logits: Tensor | None
    ) -> Generator[int, None, None]:
        if logits is None:
            return
        sequence = worker.join(
            kv, logits, self._request.sampling, self.stop, self._sampler(worker.eos), self.prompt.shift
        )
        del kv, logits
        try:
            yield from sequence
        finally:
            sequence.leave()
            self.finish = sequence.finish or "cancelled"
            if sequence.error is not None:
                self._pieces = []
