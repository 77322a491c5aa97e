"""Any Hugging Face causal language model, frozen: hub id, local folder or GGUF file."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from encoder.errors import ConfigError, ModelError
from llm_bridge.adapters import apply_adapter, quiet_peft, without_adapters
from llm_bridge.batch_invariance import make_batch_invariant
from llm_bridge.families import Memory, check_embeddings, check_family, family_of
from llm_bridge.kv_cache import DecodingBatch, Layers, PrefixCache, memory_of
from llm_bridge.lean.build import lean_model
from llm_bridge.lean.decoder import LeanBatch
from llm_bridge.lean.rotary import Rotary
from llm_bridge.lean.step import LeanModel
from llm_bridge.model_files.bars import without_bars
from llm_bridge.model_files.chat_templates import check_template
from llm_bridge.model_files.checks import (
    check_fits,
    check_folder,
    first_line,
    free_memory,
    local_folder,
    missing_bytes,
    open_settings,
    refused,
    weight_bytes,
    weight_options,
)
from llm_bridge.model_files.gguf_header import check_gguf, gguf_values, with_head_width
from llm_bridge.model_files.gguf_tokenizer import whole_tokenizer
from llm_bridge.model_files.hub import check_room, is_hub_id
from llm_bridge.prompt import template_text
from llm_bridge.quantized import KINDS, QuantizedLinear, quantize_linear
from llm_bridge.structured import AnswerSchema, Guide, SchemaVocabulary, check_tokenizer
from llm_bridge.thinking import ThinkingMarks

if TYPE_CHECKING:
    from llm_bridge.compute_worker import ComputeWorker
    from llm_bridge.engines.engine import Engine, EngineName
    from llm_bridge.sampling import SamplingParams

Quantize = Literal["8bit", "4bit", "int8", "int4"]  # the latter two on CPUs
OnDownload = Callable[[str, int], object]
# Files that hold a tokenizer's words, without which some of transformers' classes begin with none.
VOCABULARIES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json")
BLOCK_4BIT = 64  # weights of a row that share a scale
_WITHOUT_POSITIONS = {"linear_attention", "conv", "mamba", "moe", "mlp"}  # types of layers


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model in eval mode without gradients, its tokenizer, and where it came from."""

    model: Any
    tokenizer: Any
    name: str
    quantize: Quantize | None = None
    adapters: tuple[str, ...] = ()
    axes: int = 1  # of its positions: 3 with M-RoPE (time, row, column)

    @property
    def engine_name(self) -> EngineName:
        """The engine that computes it."""
        return "local"

    @property
    def identity(self) -> str:
        """That of the weights, and the engine where another one computes: equal ones give equal answers."""
        engine = "" if self.engine_name == "local" else f"|{self.engine_name}"
        return self.weights_identity + engine

    @property
    def weights_identity(self) -> str:
        """Name, quantisation, and a hash of each adapter's weights."""
        parts = [self.name, self.quantize or ""]
        for adapter in self.adapters:
            file = Path(adapter) / "adapter_model.safetensors"
            parts.append(hashlib.blake2b(file.read_bytes()).hexdigest() if file.is_file() else adapter)
        return "|".join(parts)

    def check(self) -> None:
        """Raises ModelError, or an error of the settings' own, for settings that contradict each other."""
        limit = self.context_length
        if limit is not None and (type(limit) is not int or limit < 1):
            raise ModelError(f"The language model {self.name} has no context: it says {limit!r:.40}.")
        if self.kv_bytes_per_token < 1 or any(type(end) is not int for end in self.eos_ids):
            raise ModelError(f"The language model {self.name} has settings that make no sense together.")

    @property
    def hidden_size(self) -> int:
        """Width of an input embedding."""
        return self.model.get_input_embeddings().embedding_dim

    @property
    def device(self) -> torch.device:
        """Where input embeddings are expected."""
        return self.model.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of an input embedding."""
        return self.model.get_input_embeddings().weight.dtype

    @property
    def stored_as(self) -> str:
        """The type of its weights, for people."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def context_length(self) -> int | None:
        """Most positions the model was made for, or None when it does not say."""
        return getattr(self._text_config, "max_position_embeddings", None)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one position adds to the KV cache."""
        config = self._text_config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        layers = max(1, sum(kind not in _WITHOUT_POSITIONS for kind in kinds))
        return 2 * layers * heads * head_dim * self.dtype.itemsize

    @cached_property
    def memory(self) -> Memory:
        """What it keeps of a prompt for the next question."""
        return memory_of(self.model.config)

    @cached_property
    def thinking_marks(self) -> ThinkingMarks | None:
        """How what it thinks before it answers is marked; None when it does not think."""
        return ThinkingMarks.of(self.tokenizer)

    def guide(self, sampling: SamplingParams) -> Guide | None:
        """What holds one answer to its schema; None without one. Raises ConfigError."""
        schema = sampling.schema
        return None if schema is None else self._schema_vocabulary.guide(AnswerSchema.of(schema))

    def check_schema(self) -> None:
        """Raises ConfigError where answers cannot be held to a schema."""
        check_tokenizer(self.tokenizer, self.name)

    @cached_property
    def _schema_vocabulary(self) -> SchemaVocabulary:
        self.check_schema()
        return SchemaVocabulary.of(self.tokenizer, self._text_config.vocab_size, self.eos_ids)

    @property
    def batches(self) -> bool:
        """Whether several answers of other lengths can be decoded in one pass."""
        family = family_of(self.model.config)
        takes_positions = "position_ids" in inspect.signature(self._base.forward).parameters
        return takes_positions and self.memory == "positions" and (family is None or family.batches)

    @property
    def prefills_together(self) -> bool:
        """Whether several prompts can be computed in one pass, which makes no logits but their last."""
        return self.batches and self.model.get_output_embeddings() is not None

    @property
    def eos_ids(self) -> frozenset[int]:
        """Tokens that end an answer: the model's, the tokenizer's, and the chat template's end of turn."""
        ids: set[int] = set()
        for source in (getattr(self.model, "generation_config", None), self._text_config, self.tokenizer):
            value = getattr(source, "eos_token_id", None)
            if value is not None:
                ids |= set(value) if isinstance(value, (list, tuple, set)) else {int(value)}
        end = self._end_of_turn
        return frozenset(ids if end is None else ids | {end})

    @property
    def _text_config(self) -> Any:
        return self.model.config.get_text_config()

    @property
    def _end_of_turn(self) -> int | None:
        mark = "\ue0f6"  # a character no template contains
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": mark}]
        text = template_text(self.tokenizer, messages, add_generation_prompt=False)
        tail = text[text.rfind(mark) + 1 :].strip()
        ids = self.tokenizer(tail, add_special_tokens=False).input_ids[:1]
        return ids[0] if ids and ids[0] in self.tokenizer.all_special_ids else None

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        quantized = (module for module in self.model.modules() if isinstance(module, QuantizedLinear))
        few_bits = sum(module.parameters_replaced for module in quantized)
        return few_bits + sum(p.numel() for p in self.model.parameters())

    @cached_property
    def lean(self) -> tuple[LeanModel, Rotary] | None:
        """What decodes it with few operations, made when first asked for; None where transformers does.

        It packs a copy of the weights, unless that would take more than half of the free memory: the other
        half is for the KV of answers.
        """
        if self.device.type != "cpu":
            return None
        copied = sum(p.numel() * p.element_size() for p in self.model.parameters())
        return lean_model(self.model) if copied <= free_memory(self.device) // 2 else None

    def together(self, sequences: Sequence[Layers]) -> DecodingBatch:
        """Answers that are decoded in one pass, from their keys and values, which are copied."""
        if self.lean is not None:
            return LeanBatch(*self.lean, sequences)
        from llm_bridge.batched_kv_cache import BatchedKVCache

        return BatchedKVCache(self, sequences)

    @cached_property
    def _cache_argument(self) -> str:
        return cache_argument(self._base)

    @property
    def _base(self) -> Any:
        """The model itself, without adapters that are not merged."""
        return without_adapters(self.model)

    def advance(self, kv: Any, **inputs: Tensor) -> Tensor:
        """Append inputs, named as in the model's forward, to a KV cache; the logits (B, V) after them.

        position_ids: (axes, B, L), or (B, L) for the same on every axis.
        """
        return self.model(**self._given(kv, inputs), logits_to_keep=1).logits[:, -1].float()

    def advance_rows(self, kv: Any, lengths: Sequence[int], **inputs: Tensor) -> Tensor:
        """As `advance`, of rows that are padded on the right; lengths: without that."""
        last = torch.tensor(lengths, device=self.device) - 1
        rows = torch.arange(len(lengths), device=self.device)
        return self.scores_at((rows, last), **self._given(kv, inputs)).float()

    def _given(self, kv: Any, inputs: dict[str, Tensor]) -> dict[str, Any]:
        """What the model's forward takes to append inputs to a KV cache."""
        if (positions := inputs.get("position_ids")) is not None:
            if self.axes == 1 and positions.dim() == 3:
                inputs["position_ids"] = positions[0]
            elif self.axes > 1 and positions.dim() == 2:
                inputs["position_ids"] = positions.expand(self.axes, -1, -1)
        return {**inputs, self._cache_argument: kv, "use_cache": True}

    def prefill_once(self, tokens: int) -> None:
        """Compute a prompt of so many positions, and forget it."""
        embeddings = torch.zeros(1, tokens, self.hidden_size, device=self.device, dtype=self.dtype)
        self.model(inputs_embeds=embeddings, use_cache=True, logits_to_keep=1)

    @property
    def own_engine(self) -> Engine | None:
        """What alone can compute it, for those who bring no engine; None where LocalEngine can."""
        return None

    def engine(self, worker: ComputeWorker, kept_bytes: int, max_batch: int) -> Engine:
        """What makes its answers. kept_bytes: of prompts, for follow-up questions."""
        from llm_bridge.engines.local import LocalEngine

        return LocalEngine(self, worker, PrefixCache(kept_bytes, self.kv_bytes_per_token))

    def step(self, kv: Any, token: int, position: int | None = None) -> Tensor:
        """Append a token to the KV cache of one sequence; logits (V,). position: None is its index."""
        inputs = {"input_ids": torch.tensor([[token]], device=self.device)}
        if position is not None:
            inputs["position_ids"] = torch.tensor([[position]], device=self.device)
        return self.advance(kv, **inputs)[0]

    def scores_at(self, wanted: Tensor | tuple[Tensor, Tensor], **inputs: Any) -> Tensor:
        """The model's own scores (P, V) at the wanted positions, bool (B, L) or rows and columns (P,), of a
        forward pass.

        The head is given those positions only, so that whatever the model does before and behind it (scaling,
        soft caps) is done by the model. inputs: as its forward takes them.
        """
        given: list[Tensor] = []

        def select(_: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            given.append(arguments[0][wanted])
            return (given[0][None], *arguments[1:])

        head = self.model.get_output_embeddings()
        handle = None if head is None else head.register_forward_pre_hook(select)
        try:
            logits = self.model(**inputs).logits
        finally:
            if handle is not None:
                handle.remove()
        return logits[0] if given else logits[wanted]

    def beside_embeddings(self, ids: Tensor) -> dict[str, Tensor]:
        """What a forward pass needs beside the embeddings of tokens (B, N), negative where a visual is.

        Gemma 3n and 4 have a second table, read in every layer; a visual is padding there, as theirs are.
        """
        decoder = self._second_table
        if decoder is None:
            return {}
        padding = getattr(self._text_config, "pad_token_id", None) or 0
        return {"per_layer_inputs": decoder.get_per_layer_inputs(ids.masked_fill(ids < 0, padding))}

    @cached_property
    def _second_table(self) -> Any:
        """The module that holds a table of embeddings for each layer; None in most models."""
        if not getattr(self._text_config, "hidden_size_per_layer_input", None):
            return None
        holders = (module for module in self.model.modules() if hasattr(module, "embed_tokens_per_layer"))
        return next(holders, None)

    def embed(self, ids: Sequence[int] | Tensor) -> Tensor:
        """Input embeddings of token ids: (N,) -> (N, hidden_size)."""
        return self.model.get_input_embeddings()(torch.as_tensor(ids, dtype=torch.long, device=self.device))


def cache_argument(model: Any) -> str:
    """What a model's forward calls its KV cache: transformers 5.24 renamed it."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def default_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    if torch.accelerator.is_available():
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is not None:
            return accelerator
    return torch.device("cpu")


def usable_device(device: str | torch.device | None) -> torch.device | None:
    """A device that can compute, from its name; None for None. Raises ConfigError."""
    if device is None:
        return None
    try:
        usable = torch.device(device)
        torch.empty(1, device=usable).tolist()  # the device "meta" holds nothing
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"There is no device {device!s} here ({reason}); leave it out to use the best one."
        ) from error
    return usable


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it natively, float16 on older GPUs, else float32."""
    if device.type == "cpu":
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if native else torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if device.type == "xpu" else torch.float16


def load_llm(
    name: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    device_map: str | dict[str, Any] | None = None,
    quantize: Quantize | None = None,
    adapters: Sequence[str | Path] = (),
    revision: str | None = None,
    on_download: OnDownload | None = None,
    engine: str | None = "local",
) -> LanguageModel:
    """Load a causal language model for use with frozen weights.

    name: hub id, folder, GGUF file, or folder holding one GGUF file. engine: "local" is transformers, which
    dequantises a GGUF file on loading; "llamacpp" runs one as it is; None takes llama.cpp for a GGUF file
    where it is installed and no other option stands against it; "vllm" starts a vLLM server, and
    "http://host:8000" uses a running one (several: with commas). device_map: as in transformers ("auto"
    spreads over GPUs). quantize: "int8" or "int4" on CPUs, through torch's own kernels; "8bit" or "4bit" on
    GPUs, through bitsandbytes. adapters: LoRA folders (peft), merged in order unless bitsandbytes quantises
    the base. on_download: told a hub model's name and bytes before they come. Code that a model brings is
    never run. Raises ModelError or ConfigError: one sentence, what was wrong and what to do.
    """
    from transformers import AutoModelForCausalLM

    options = {"quantize": quantize, "adapters": adapters, "device_map": device_map}
    from llm_bridge.engines.support import chosen_engine

    chosen = chosen_engine(name, engine, **options)
    if chosen == "vllm":
        from llm_bridge.engines.served_model import load_served

        return load_served(
            name, str(engine), dtype=dtype, adapters=adapters, revision=revision, on_download=on_download
        )
    if chosen == "llamacpp":
        from llm_bridge.engines.gguf_model import load_gguf

        folder, file = locate(str(name))
        return load_gguf(Path(folder) / str(file), device=None if device is None else torch.device(device))
    model, tokenizer, _ = load_pretrained(
        name,
        AutoModelForCausalLM,
        what="the language model",
        device=device,
        dtype=dtype,
        device_map=device_map,
        quantize=quantize,
        adapters=adapters,
        revision=revision,
        on_download=on_download,
    )
    if quantize in KINDS:
        quantize_linear(model, quantize, merged=bool(adapters))
    make_batch_invariant(model)
    with refused(f"Cannot load the language model {name}"):
        if family_of(model.config) is None:
            check_embeddings(model, str(name))
        loaded = LanguageModel(model, tokenizer, str(name), quantize, tuple(map(str, adapters)))
        loaded.check()
    return loaded


def load_pretrained(
    name: str | Path,
    auto_class: Any,
    *,
    what: str,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    device_map: str | dict[str, Any] | None = None,
    quantize: Quantize | None = None,
    adapters: Sequence[str | Path] = (),
    revision: str | None = None,
    on_download: OnDownload | None = None,
    not_quantised: Sequence[str] = (),
) -> tuple[Any, Any, Path]:
    """A frozen model of transformers, its tokenizer and its folder; arguments and errors as of `load_llm`.

    auto_class: of transformers, that builds it. what: it is called in errors. not_quantised: names of modules
    that keep their type, beside the head.
    """
    target = torch.device(device) if device is not None else default_device()
    dtype = dtype or default_dtype(target)
    path, gguf = locate(str(name))
    options: dict[str, Any] = {"dtype": dtype}
    if quantize is not None and quantize not in KINDS:
        if gguf is not None:
            raise ModelError(
                "GGUF weights cannot be quantised again: leave out quantize, or use the original."
            )
        options["quantization_config"] = _quantization(quantize, dtype, not_quantised)
        device_map = device_map or {"": str(target)}
    if device_map is not None:
        options["device_map"] = device_map
    with without_bars(), refused(f"Cannot load {what} {name}"):
        if is_hub_id(path):
            itemsize = None if quantize or device_map else dtype.itemsize
            if size := _check_download(path, revision, itemsize, what, auto_class):
                (on_download or (lambda *_: None))(path, size)
        folder = local_folder(path, revision)
        in_memory = quantize in (None, *KINDS) and device_map is None and target.type == "cpu"
        options |= _load_options(
            folder, gguf, dtype.itemsize if in_memory else None, f"{what} {name}", auto_class
        )
        tokenizer = load_tokenizer(folder, gguf)
        loaded_with_report: Any = auto_class.from_pretrained(
            folder, trust_remote_code=False, output_loading_info=True, **options
        )
        model, report = loaded_with_report
        if gguf is None and (missing := sorted(report["missing_keys"])):  # else they would be random
            raise ModelError(
                f"Cannot load {what} {name}: its weights lack {missing[0][:80]!r}"
                f"{f' and {len(missing) - 1} more' if missing[1:] else ''}: it is damaged."
            )
        if device_map is None:
            model = model.to(target)
        for adapter in adapters:
            model = apply_adapter(model, adapter, merge=quantize in (None, *KINDS))
        if quantize == "4bit":
            _check_quantised(model, str(name))
        model.eval().requires_grad_(False)
    return model, tokenizer, folder


def _check_download(name: str, revision: str | None, itemsize: int | None, what: str, auto_class: Any) -> int:
    """Bytes that must be downloaded; raises ModelError, before they are, where the model has no room."""
    from transformers import AutoConfig

    if not (size := missing_bytes(name, revision)):
        return 0
    check_room(name, size)
    config = AutoConfig.from_pretrained(open_settings(name), trust_remote_code=False, local_files_only=True)
    check_fits(config, None, per_byte=1, itemsize=itemsize, what=f"{what} {name}", auto_class=auto_class)
    return size


def _load_options(
    folder: Path, gguf: str | None, itemsize: int | None, what: str, auto_class: Any
) -> dict[str, Any]:
    """Checks that a folder is harmless and fits this machine; returns the arguments to load it with."""
    from transformers import AutoConfig

    options: dict[str, Any]
    source: dict[str, Any]
    if gguf is not None:
        from transformers import GgufConfig

        try:
            stored, per_byte = check_gguf(folder / gguf), 6
        except ValueError as error:
            raise ModelError(f"Cannot load {what}: {error}.") from error
        source = {"gguf_file": gguf}
        options = {**source, "local_files_only": True, "quantization_config": GgufConfig(dequantize=True)}
    else:
        check_folder(folder)
        source, options = {}, weight_options(folder)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True, **source)
    if gguf is not None:
        options["config"] = with_head_width(config, gguf_values(folder / gguf))
    check_family(config, what)
    if gguf is None:
        stored, per_byte = weight_bytes(folder), 1
        if getattr(config, "quantization_config", None):
            per_byte, itemsize = 8, None
    check_fits(config, stored, per_byte=per_byte, itemsize=itemsize, what=what, auto_class=auto_class)
    return options


def locate(name: str) -> tuple[str, str | None]:
    """(folder or hub id, GGUF file name or None); raises ModelError where there is neither."""
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{name} is a file but not GGUF: give a model folder, a hub id or a .gguf file.")
        return str(path.parent), path.name
    if path.is_dir():
        if not (path / "config.json").exists():
            files = sorted(path.glob("*.gguf"))
            if len(files) == 1:
                return str(path), files[0].name
            raise ModelError(f"{name} is not a model folder: it has neither config.json nor one .gguf file.")
        return str(path), None
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"There is no model at {name}.")
    return name, None


def load_tokenizer(folder: Path, gguf: str | None = None) -> Any:
    """The tokenizer of a model folder, or of a GGUF file in it; raises ModelError."""
    from transformers import AutoTokenizer

    options = {} if gguf is None else {"gguf_file": gguf}
    if gguf is None and not any(any(folder.glob(name)) for name in VOCABULARIES):
        raise ModelError(
            f"Cannot load the tokenizer of {folder}: it has no tokenizer.json: copy the model's other files."
        )
    with refused(f"Cannot load the tokenizer of {folder}"):
        tokenizer = None if gguf is None else whole_tokenizer(folder / gguf)
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True, **options
        )
        check_template(tokenizer)
    return tokenizer


def _quantization(quantize: str, dtype: torch.dtype, kept: Sequence[str]) -> Any:
    if quantize not in ("8bit", "4bit"):
        raise ModelError(f"quantize must be '8bit', '4bit', 'int8' or 'int4', not {quantize!r}.")
    try:
        with quiet_peft():
            import bitsandbytes  # noqa: F401
    except Exception as error:
        raise ModelError(
            f"{quantize} needs bitsandbytes, which does not load here: {first_line(error)}."
        ) from error
    from transformers import BitsAndBytesConfig

    skipped = {"llm_int8_skip_modules": ["lm_head", *kept]} if kept else {}
    if quantize == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, **skipped)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, **skipped
    )


def _check_quantised(model: Any, what: str) -> None:
    """Raises ModelError for layers that bitsandbytes computes wrongly or not at all on CPUs."""
    import bitsandbytes

    for name, layer in model.named_modules():
        odd = isinstance(layer, bitsandbytes.nn.Linear4bit) and layer.in_features % BLOCK_4BIT
        if odd and layer.weight.device.type == "cpu":
            raise ModelError(
                f"{what} cannot be run in 4 bit on a CPU: its layer {name} is {layer.in_features} wide, no "
                f"multiple of {BLOCK_4BIT}. Use 8bit."
            )
