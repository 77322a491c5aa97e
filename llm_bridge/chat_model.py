"""A model that VideoChat can drive, of whatever kind, and how a name becomes one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from encoder.errors import ConfigError
from llm_bridge.llm import LanguageModel, OnDownload, Quantize
from llm_bridge.model import VideoLanguageModel
from llm_bridge.model_files.hub import is_hub_id
from llm_bridge.towers.stock import load_stock, model_type, no_video_model, stock_kind
from llm_bridge.towers.tower import Stage, Tower


class ChatModel(Protocol):
    """What VideoChat needs of a model: VideoLanguageModel and StockModel have it.

    default_tokens: budget of a video where none is asked for. system: system prompt of conversations without
    one.
    """

    @property
    def llm(self) -> LanguageModel: ...

    @property
    def tower(self) -> Tower: ...

    @property
    def default_tokens(self) -> int: ...

    @property
    def system(self) -> str | None: ...

    def revision(self) -> str: ...


def load_chat_model(
    name: str | os.PathLike[str],
    *,
    llm: str | Path | None = None,
    encoder: str | os.PathLike[str] | None = None,
    stage: Stage | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    device_map: str | dict[str, Any] | None = None,
    quantize: Quantize | None = None,
    adapters: Sequence[str | Path] = (),
    engine: str | None = "local",
    encoder_device: str | torch.device | None = None,
    on_download: OnDownload | None = None,
) -> ChatModel:
    """A saved FluxChat model, or a stock video model (folder or hub id); which one, its config.json says.

    llm, encoder: replace parts of a FluxChat model. stage: when a stock model drops tokens (default: "after"
    its encoder). encoder_device: of a FluxChat model's encoder; default: device. The rest as
    `load_llm`. Raises ModelError, CheckpointError or ConfigError: one sentence.
    """
    options: dict[str, Any] = {
        "device": device,
        "dtype": dtype,
        "device_map": device_map,
        "quantize": quantize,
        "adapters": adapters,
        "on_download": on_download,
    }
    if is_stock(name):
        if llm is not None or encoder is not None:
            raise ConfigError(
                f"{name} has an encoder and a language model of its own: leave out llm and encoder."
            )
        if engine not in (None, "local"):
            raise ConfigError(
                f"The engine {engine} runs language models alone, and {name} has one of its own: leave "
                "engine out."
            )
        if encoder_device is not None:
            raise ConfigError(
                f"{name} is one model, encoder and language model together: leave encoder_device out, or "
                "spread it with device_map."
            )
        return load_stock(os.fspath(name), stage=stage or "after", **options)
    if (kind := model_type(Path(name).expanduser())) is not None:  # a FluxChat model's settings name none
        raise no_video_model(os.fspath(name), kind)
    if stage is not None:
        raise ConfigError(f"select is for stock video models: {name} always selects before its encoder.")
    return VideoLanguageModel.from_pretrained(
        os.fspath(name), llm=llm, encoder=encoder, engine=engine, encoder_device=encoder_device, **options
    )


def is_stock(name: str | os.PathLike[str]) -> bool:
    """Whether it names a stock model, as the name of a model on the hub always does."""
    if Path(name).expanduser().is_dir():
        return stock_kind(Path(name).expanduser()) is not None
    return is_hub_id(str(name))
