"""A GGUF file that llama.cpp computes, as a LanguageModel: settings and tokenizer, no weights in torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from encoder.errors import ModelError
from encoder.json_files import parse_object
from llm_bridge.engines.llama_context import LlamaContext, LlamaWeights
from llm_bridge.llm import LanguageModel, load_tokenizer
from llm_bridge.model_files.checks import check_fits, free_memory, machine_bytes, refused
from llm_bridge.model_files.gguf_header import gguf_values
from llm_bridge.model_files.gguf_tokenizer import CONFIG

if TYPE_CHECKING:
    from llm_bridge.compute_worker import ComputeWorker
    from llm_bridge.engines.engine import Engine, EngineName

MOST_SEQUENCES = 64  # answers in progress and prompts that are kept
KV_SHARE = 0.5  # of the memory that is free, which the KV of all of them may take


@dataclass(frozen=True)
class GgufModel(LanguageModel):
    """A language model whose weights lie in llama.cpp's memory.

    model: its layers by transformers without values, for sizes and settings. weights: what computes.
    kind: the types of the weights, as llama.cpp calls them.
    """

    weights: LlamaWeights = field(kw_only=True)
    kind: str = field(kw_only=True)

    @property
    def engine_name(self) -> EngineName:
        """The engine that computes it."""
        return "llamacpp"

    @property
    def device(self) -> torch.device:
        """Where embeddings are given to llama.cpp."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Of embeddings."""
        return torch.float32

    @property
    def stored_as(self) -> str:
        """The types of its weights."""
        return self.kind

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one position adds to the KV memory, which is of 16 bits."""
        return super().kv_bytes_per_token // 2

    @property
    def lean(self) -> None:
        """Nothing of it is decoded in torch."""
        return None

    def context(self, kept_bytes: int = 2**28) -> LlamaContext:
        """A KV memory for one answer as long as the model's context, and what is kept beside it.

        kept_bytes: for prompts of earlier questions. It takes no more than a share of the free memory.
        """
        per_token = self.kv_bytes_per_token
        wanted = (self.context_length or 4096) + kept_bytes // per_token
        room = int(KV_SHARE * free_memory(self.device)) // per_token
        return LlamaContext(self.weights, cells=max(256, min(wanted, room)), sequences=MOST_SEQUENCES)

    @cached_property
    def _scratch(self) -> LlamaContext:
        return LlamaContext(self.weights, cells=4096)

    def prefill_once(self, tokens: int) -> None:
        """Compute a prompt of so many positions, and forget it."""
        self._scratch.append_rows(torch.zeros(tokens, self.hidden_size), at=0, sequence=0)
        self._scratch.rewind(0, 0)

    @cached_property
    def own_engine(self) -> Engine:
        """An engine for those who bring none."""
        from llm_bridge.compute_worker import ComputeWorker

        return self.engine(ComputeWorker(self), 2**28, 8)

    def engine(self, worker: ComputeWorker, kept_bytes: int, max_batch: int) -> Engine:
        """What makes its answers. kept_bytes: of prompts, for follow-up questions."""
        from llm_bridge.engines.llamacpp import LlamaCppEngine

        return LlamaCppEngine(self, worker, max_batch, kept_bytes)

    def advance(self, kv: Any, **inputs: Tensor) -> Tensor:
        """Nothing of it is computed in torch; raises ModelError."""
        raise ModelError(f"{self.name} is computed by llama.cpp: load it with engine='local' for this.")


def load_gguf(path: Path, *, device: torch.device | None = None) -> GgufModel:
    """Load a GGUF file into llama.cpp; raises ModelError or ConfigError: one sentence.

    device: a CPU keeps all layers there; else a GPU computes them, where llama.cpp was built for it.
    """
    from transformers import AutoModelForCausalLM

    what = f"the language model {path}"
    try:
        values = gguf_values(path)
    except (OSError, ValueError) as error:
        raise ModelError(f"Cannot load {what}: {getattr(error, 'strerror', None) or error}.") from error
    if (size := path.stat().st_size) > machine_bytes():
        raise ModelError(
            f"Cannot load {what}: its {size / 2**30:.1f} GiB are more than this machine's memory."
        )
    with refused(f"Cannot load {what}"):
        config = gguf_config(path, values)
        check_fits(config, size, per_byte=6, itemsize=None, what=what, auto_class=AutoModelForCausalLM)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        model.eval().requires_grad_(False)
    tokenizer = load_tokenizer(path.parent, path.name)
    on_cpu = device is not None and device.type == "cpu"
    weights = LlamaWeights(path, layers_on_gpu=0 if on_cpu else -1)
    if weights.width != config.get_text_config().hidden_size:
        raise ModelError(f"Cannot load {what}: its settings contradict each other.")
    kind = stored_types(values.get("general.file_type"))
    loaded = GgufModel(model, tokenizer, str(path), weights=weights, kind=kind)
    loaded.check()
    return loaded


def gguf_config(path: Path, values: Mapping[str, Any]) -> Any:
    """transformers' settings of a file: those that it was written with, else made of llama.cpp's."""
    from transformers import CONFIG_MAPPING, AutoConfig

    if not isinstance(text := values.get(CONFIG), str):
        return AutoConfig.from_pretrained(
            path.parent, gguf_file=path.name, trust_remote_code=False, local_files_only=True
        )
    written = parse_object(text.encode())
    return CONFIG_MAPPING[written["model_type"]].from_dict(written)


def stored_types(number: Any) -> str:
    """What llama.cpp calls the types of a file's weights, by their number: "Q4_K_M"."""
    from gguf import LlamaFileType

    try:
        return LlamaFileType(number).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except ValueError:
        return "GGUF"
