"""A language model that vLLM servers compute, as a LanguageModel: settings, tokenizer, input embeddings."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from encoder.errors import ModelError
from llm_bridge.assets.scratch import ScratchFolder
from llm_bridge.engines.support import is_address
from llm_bridge.engines.vllm_server import VllmServer, default_python
from llm_bridge.families import check_family
from llm_bridge.llm import (
    LanguageModel,
    OnDownload,
    default_device,
    default_dtype,
    load_llm,
    load_tokenizer,
    locate,
)
from llm_bridge.model_files.checks import SETTINGS_FILES, check_folder, local_folder, missing_bytes, refused
from llm_bridge.model_files.folder_export import write_into
from llm_bridge.model_files.hub import check_room, download_bytes, is_hub_id

if TYPE_CHECKING:
    from llm_bridge.compute_worker import ComputeWorker
    from llm_bridge.engines.engine import Engine, EngineName
    from llm_bridge.engines.vllm import VllmEngine

KEY = "FLUXCHAT_ENGINE_KEY"  # of servers that ask for one
OPTIONS = "FLUXCHAT_VLLM_OPTIONS"  # of a server that is started here, as on its command line
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class ServedModel(LanguageModel):
    """A language model whose layers are elsewhere.

    model: its layers without values, and its table of input embeddings. addresses: of the servers. server:
    one that was started for it.
    """

    addresses: tuple[str, ...] = field(kw_only=True)
    server: VllmServer | None = field(kw_only=True, default=None)

    @property
    def engine_name(self) -> EngineName:
        """The engine that computes it."""
        return "vllm"

    @property
    def stored_as(self) -> str:
        """Where its weights are."""
        return f"on vLLM at {', '.join(self.addresses)}"

    @property
    def lean(self) -> None:
        """Nothing of it is decoded here."""
        return None

    @cached_property
    def own_engine(self) -> VllmEngine:
        """What its servers are asked through."""
        from llm_bridge.engines.vllm import VllmEngine

        return VllmEngine(self, self.addresses, key=os.environ.get(KEY), server=self.server)

    def engine(self, worker: ComputeWorker, kept_bytes: int, max_batch: int) -> Engine:
        """What makes its answers; the servers bound what they keep and how many they make at once."""
        return self.own_engine

    def prefill_once(self, tokens: int) -> None:
        """Have a prompt of so many positions computed."""
        self.own_engine.prefill_once(tokens)

    def advance(self, kv: Any, **inputs: Tensor) -> Tensor:
        """Nothing of it is computed here; raises ModelError."""
        raise ModelError(f"{self.name} is computed by vLLM: load it with engine='local' for this.")


def load_served(
    name: str | Path,
    engine: str,
    *,
    dtype: torch.dtype | None = None,
    adapters: Sequence[str | Path] = (),
    revision: str | None = None,
    on_download: OnDownload | None = None,
) -> ServedModel:
    """Arguments as of `load_llm`; raises ModelError or ConfigError: one sentence.

    engine: "vllm" starts a server, for a copy with the adapters merged where there are some; addresses name
    servers that run already, with the adapters, if any, merged into what they serve.
    """
    from llm_bridge.engines.vllm import checked_address

    dtype = dtype or default_dtype(default_device())
    origin: dict[str, Any] = {"revision": revision, "on_download": on_download}
    if is_address(engine):
        addresses = tuple(checked_address(address.strip()) for address in engine.split(","))
        return _loaded(name, str(name), dtype, adapters, addresses, **origin)
    with contextlib.ExitStack() as undo:
        source = str(name)
        if adapters:
            scratch = undo.enter_context(ScratchFolder("fluxchat-merged-"))
            source = str(scratch)
            _write_merged(scratch, name, dtype=dtype, adapters=adapters, **origin)
            origin["revision"] = None  # the copy has none
        elif is_hub_id(source):  # the server downloads it all, and says so to its log alone
            _announce(source, missing_bytes(source, revision), on_download)
        options = shlex.split(os.environ.get(OPTIONS, ""))
        if origin["revision"]:
            options += ["--revision", origin["revision"]]
        kind = str(dtype).removeprefix("torch.")  # the same on both sides
        server = VllmServer(source, python=default_python(), dtype=kind, options=options)
        undo.callback(server.close)
        loaded = _loaded(source, str(name), dtype, adapters, (server.address,), server, **origin)
        server.at_close(undo.pop_all().close)
    return loaded


def _write_merged(folder: Path, name: str | Path, **options: Any) -> None:
    """A language model with its adapters merged, as vLLM reads it."""
    whole = load_llm(name, device="cpu", **options)
    write_into(whole, folder)


def _loaded(
    source: str | Path,
    name: str,
    dtype: torch.dtype,
    adapters: Sequence[str | Path],
    addresses: tuple[str, ...],
    server: VllmServer | None = None,
    *,
    revision: str | None,
    on_download: OnDownload | None,
) -> ServedModel:
    """The parts that are needed here, read from `source`; it is called `name`."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    what = f"the language model {name}"
    path, _ = locate(str(source))
    with refused(f"Cannot load {what}"):
        settings = local_folder(path, revision, patterns=SETTINGS_FILES)
        check_folder(settings, whole=False)
        config = AutoConfig.from_pretrained(settings, trust_remote_code=False, local_files_only=True)
        check_family(config, what)
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        table = model.get_input_embeddings()
        if type(table) is not nn.Embedding:
            raise ModelError(
                f"The engine vllm cannot run {what}: it scales its embeddings itself, which servers do "
                "their own way: use the engine local."
            )
        file = _file_of_table(path, settings, revision, on_download)
        values = _read_table(file, tuple(table.weight.shape)).to(dtype)
        table.weight = nn.Parameter(values, requires_grad=False)
        model.eval().requires_grad_(False)
    tokenizer, merged = load_tokenizer(settings), tuple(map(str, adapters))
    loaded = ServedModel(model, tokenizer, name, adapters=merged, addresses=addresses, server=server)
    loaded.check()
    return loaded


def _file_of_table(path: str, settings: Path, revision: str | None, on_download: OnDownload | None) -> Path:
    """The file of weights that holds the table; of a model on the hub, no other one is downloaded."""
    wanted = SINGLE
    if (index := settings / INDEX).is_file():
        shards = json.loads(index.read_text())["weight_map"]
        wanted = shards[_table_key(shards)]
    if is_hub_id(path) and not (settings / wanted).is_file():
        _announce(path, download_bytes(path, revision, (wanted,), ()), on_download)
        return local_folder(path, revision, patterns=(wanted,)) / wanted
    if not (settings / wanted).is_file():
        raise ValueError("it has no safetensors, which the engine vllm reads the table of embeddings from")
    return settings / wanted


def _announce(name: str, size: int, on_download: OnDownload | None) -> None:
    """Say what is downloaded next; raises ModelError where there is no room for it."""
    check_room(name, size)
    if size and on_download is not None:
        on_download(name, size)


def _table_key(keys: Any) -> str:
    """The name of the table of input embeddings among those of weights."""
    endings = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
    found = [key for key in keys if key.endswith(endings)]
    if len(found) != 1:
        raise ValueError("its table of embeddings is not found among its weights: use the engine local")
    return str(found[0])


def _read_table(file: Path, shape: tuple[int, ...]) -> Tensor:
    with safe_open(file, "pt") as weights:
        table = weights.get_tensor(_table_key(weights.keys()))
    if tuple(table.shape) != shape:
        raise ValueError("its table of embeddings has another size than its config.json says: it is damaged")
    return table
