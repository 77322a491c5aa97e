"""llama.cpp behind few names: the weights of a GGUF file, one KV memory for many sequences, and passes.

    context = LlamaContext(LlamaWeights("model.gguf"), cells=4096, sequences=16)
    context.append_ids([1, 2, 3], at=0, sequence=0)
    logits = context.append_rows(embeddings, at=3, sequence=0)

Not safe for several threads at once. It speaks to the C interface of llama-cpp-python (extra: gguf).
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from encoder.errors import ConfigError, ModelError, OutOfMemory

PASS = 512  # most positions of a pass
NO_CELLS = "There was not enough memory for this question: lower the token budget, or ask again later."
_messages: deque[str] = deque(maxlen=50)  # the last errors that llama.cpp told of
_lock = threading.Lock()
_started: list[Any] = []  # keeps the callback alive
ERROR = 4  # the level of ggml's log


def installed() -> bool:
    """Whether llama-cpp-python is there; imports nothing."""
    return find_spec("llama_cpp") is not None


def check_installed(what: str) -> None:
    """Raises ConfigError where llama-cpp-python is missing."""
    if not installed():
        raise ConfigError(f"{what} needs llama.cpp: pip install 'fluxchat[gguf]'.")


def library() -> Any:
    """The C interface, started and silent; raises ConfigError where it is missing or does not load."""
    check_installed("This")
    try:
        import llama_cpp
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"llama-cpp-python does not load here ({reason}): install it again.") from error
    with _lock:
        if not _started:

            def listen(level: int, text: bytes, _: Any) -> None:
                if level == ERROR:
                    _messages.append(text.decode(errors="replace").strip())

            _started.append(llama_cpp.llama_log_callback(listen))
            llama_cpp.llama_log_set(_started[0], ctypes.c_void_p())
            llama_cpp.llama_backend_init()
    return llama_cpp


def quantise(source: Path, target: Path, ftype: int) -> None:
    """Write a GGUF file in another type, by llama.cpp; raises ModelError."""
    lib = library()
    settings = lib.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = ftype, torch.get_num_threads()
    _messages.clear()
    if lib.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(settings)):
        raise ModelError(f"llama.cpp cannot quantise this model ({_reason()}).")


def _reason() -> str:
    """The first thing that llama.cpp complained of, on one line."""
    text = next((message for message in _messages if message), "it gives no reason")
    return " ".join(text.split())[:200].rstrip(".")


class LlamaWeights:
    """The weights of a GGUF file, for any number of contexts.

    layers_on_gpu: 0, or -1 for all where llama.cpp was built for one. width: of an embedding.
    Raises ModelError where llama.cpp refuses the file, ConfigError where it is missing.
    """

    def __init__(self, path: str | Path, *, layers_on_gpu: int = 0) -> None:
        lib = library()
        settings = lib.llama_model_default_params()
        settings.n_gpu_layers = layers_on_gpu
        _messages.clear()
        self.model = lib.llama_model_load_from_file(str(path).encode(), settings)
        if not self.model:
            raise ModelError(f"Cannot load the language model {path}: llama.cpp refuses it ({_reason()}).")
        weakref.finalize(self, lib.llama_model_free, self.model)
        self.width = int(lib.llama_model_n_embd(self.model))
        self.vocabulary = int(lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model)))
        self.parameters = int(lib.llama_model_n_params(self.model))
        if lib.llama_model_has_encoder(self.model):
            raise ModelError(f"Cannot load the language model {path}: it is no decoder.")


class LlamaContext:
    """A KV memory of so many positions (cells) in all, which so many sequences share, and passes through it.

    threads: that compute; default: torch's. Raises OutOfMemory where there is no room for it.
    """

    def __init__(
        self, weights: LlamaWeights, *, cells: int, sequences: int = 1, threads: int | None = None
    ) -> None:
        self._lib = lib = library()
        self._weights, self._context = weights, None
        self.vocabulary, self.sequences = weights.vocabulary, sequences
        settings = lib.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max = cells, sequences
        settings.n_batch = settings.n_ubatch = min(PASS, cells)
        settings.n_threads = settings.n_threads_batch = threads or torch.get_num_threads()
        settings.kv_unified, settings.no_perf = True, True
        _messages.clear()
        self._context = lib.llama_init_from_model(weights.model, settings)
        if not self._context:
            raise OutOfMemory(f"llama.cpp has no room for {cells} positions ({_reason()}): ask for less.")
        self._memory = lib.llama_get_memory(self._context)
        self._ids, self._rows = lib.llama_batch_init(PASS, 0, 1), lib.llama_batch_init(PASS, weights.width, 1)
        self.cells = int(lib.llama_n_ctx(self._context))
        self._free = weakref.finalize(self, _free, lib, self._context, (self._ids, self._rows))

    def append_ids(self, ids: Sequence[int], *, at: int, sequence: int) -> Tensor:
        """Append token ids to a sequence of `at` positions; logits (V,) after the last.

        Raises OutOfMemory where no cells are free, ModelError for what llama.cpp cannot compute.
        """
        for start in range(0, len(ids), PASS):
            part = ids[start : start + PASS]
            for row, token in enumerate(part):
                self._ids.token[row] = token
            self._place(self._ids, at + start, len(part), sequence)
            self._pass(self._ids)
        return self._logits(-1)

    def append_rows(self, rows: Tensor, *, at: int, sequence: int) -> Tensor:
        """The same with embeddings (M, D) in place of ids."""
        for start in range(0, len(rows), PASS):
            part = np.ascontiguousarray(rows[start : start + PASS].float().cpu().numpy())
            ctypes.memmove(self._rows.embd, part.ctypes.data, part.nbytes)
            self._place(self._rows, at + start, len(part), sequence)
            self._pass(self._rows)
        return self._logits(-1)

    def step(self, tokens: Sequence[int], positions: Sequence[int], sequences: Sequence[int]) -> Tensor:
        """Append one token to each of several sequences; logits (B, V)."""
        batch = self._ids
        batch.n_tokens = len(tokens)
        for row, (token, position, sequence) in enumerate(zip(tokens, positions, sequences, strict=True)):
            batch.token[row], batch.pos[row] = token, position
            batch.n_seq_id[row], batch.seq_id[row][0], batch.logits[row] = 1, sequence, 1
        self._pass(batch)
        rows = [self._logits(row) for row in range(len(tokens))]
        return rows[0][None] if len(rows) == 1 else torch.stack(rows)

    def rewind(self, sequence: int, to: int) -> bool:
        """Drop what a sequence holds from a position on; False where all must be dropped, which is."""
        self._check()
        if self._lib.llama_memory_seq_rm(self._memory, sequence, to, -1):
            return True
        self._lib.llama_memory_seq_rm(self._memory, sequence, -1, -1)
        return False

    def copy(self, source: int, target: int, upto: int) -> None:
        """Give an empty sequence the first positions of another; they share the cells."""
        self._check()
        self._lib.llama_memory_seq_cp(self._memory, source, target, 0, upto)

    def close(self) -> None:
        """Free it; what is asked of it afterwards raises ModelError."""
        self._context = None
        self._free()

    def _check(self) -> None:
        if self._context is None:
            raise ModelError("The model was closed, so that nothing is computed any more: load it again.")

    def _place(self, batch: Any, at: int, count: int, sequence: int) -> None:
        batch.n_tokens = count
        for row in range(count):
            batch.pos[row] = at + row
            batch.n_seq_id[row], batch.seq_id[row][0], batch.logits[row] = 1, sequence, 0
        batch.logits[count - 1] = 1

    def _pass(self, batch: Any) -> None:
        self._check()
        _messages.clear()
        status = self._lib.llama_decode(self._context, batch)
        if status == 1:
            raise OutOfMemory(NO_CELLS)
        if status:
            raise ModelError(f"llama.cpp cannot compute this ({_reason()}, status {status}).")

    def _logits(self, row: int) -> Tensor:
        values = self._lib.llama_get_logits_ith(self._context, row)
        if not values:
            raise ModelError(f"llama.cpp gives no scores ({_reason()}).")
        return torch.from_numpy(np.ctypeslib.as_array(values, shape=(self.vocabulary,)).copy())


def _free(lib: Any, context: Any, batches: Sequence[Any]) -> None:
    for batch in batches:
        lib.llama_batch_free(batch)
    lib.llama_free(context)
