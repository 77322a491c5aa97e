"""POST /v1/embeddings: features of texts and clips, the same as a library of videos has.

wanted = parse_embeddings(body)          # raises ApiError that names the field that is wrong
embedder.answer(wanted, client, stop)    # the response's body
"""

from __future__ import annotations

import base64
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from app.library.clip_reader import read_one
from app.library.embedders import Embedder, open_embedder
from app.library.library import Library
from app.messages import Media
from app.server.chat_request import Reference, reference, validated, without_nul
from app.server.errors import ApiError
from app.server.limits import WEB_LIMITS
from app.server.media.resolver import Resolver
from app.server.schemas import MAX_MEDIA, MODEL, EmbeddingsBody, TextPart
from encoder.errors import VideoError

LONGEST = 1 << 20  # characters of all texts


@dataclass(frozen=True)
class EmbeddingsRequest:
    """items: texts and media, in order. encoded: vectors are sent as base64."""

    items: tuple[str | Reference, ...]
    encoded: bool

    @property
    def texts(self) -> list[str]:
        return [item for item in self.items if isinstance(item, str)]

    @property
    def media(self) -> list[Reference]:
        return [item for item in self.items if isinstance(item, Reference)]


def parse_embeddings(data: Any) -> EmbeddingsRequest:
    """A decoded JSON body; raises ApiError naming the field that is wrong."""
    body = validated(data, EmbeddingsBody)
    items = tuple(_item(item, f"input[{index}]") for index, item in enumerate(body.input))
    wanted = EmbeddingsRequest(items, body.encoding_format == "base64")
    if len(wanted.media) > MAX_MEDIA:
        raise ApiError(400, f"At most {MAX_MEDIA} videos and images fit one request.", param="input")
    if sum(map(len, wanted.texts)) > LONGEST:
        raise ApiError(400, f"The texts have more than {LONGEST} characters: send less.", param="input")
    return wanted


def _item(item: Any, path: str) -> str | Reference:
    if isinstance(item, (str, TextPart)):
        text = without_nul(item if isinstance(item, str) else item.text, path)
        if not text.strip():
            raise ApiError(400, f"{path} is empty: send words.", param=path)
        return text
    return reference(item, path)


class ClipEmbedder:
    """Computes one request at a time. library: its embedder is used, else the shipped encoder."""

    def __init__(self, library: Library | None, resolver: Resolver) -> None:
        self._library, self._resolver = library, resolver
        self._shipped: Embedder | None = None
        self._limits = replace(WEB_LIMITS, max_bytes=resolver.max_bytes)

    def answer(self, wanted: EmbeddingsRequest, client: str, stop: threading.Event) -> dict[str, Any]:
        """The response's body. Raises ApiError and FluxChatError."""
        embedder = self._embedder()
        texts = embedder.embed_texts(wanted.texts) if wanted.texts else ()
        with self._resolver.open(wanted.media, client, stop) as media:
            clips = [
                self._clip(embedder, medium, reference)
                for medium, reference in zip(media, wanted.media, strict=True)
            ]
        of_texts, of_clips = iter(texts), iter(clips)
        rows = [next(of_texts) if isinstance(item, str) else next(of_clips) for item in wanted.items]
        tokens = embedder.count_tokens(wanted.texts)
        return {
            "object": "list",
            "model": MODEL,
            "data": [
                {"object": "embedding", "index": index, "embedding": _written(row, wanted.encoded)}
                for index, row in enumerate(rows)
            ],
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }

    def _embedder(self) -> Embedder:
        if self._library is not None:
            return self._library.embedder()
        if self._shipped is None:
            self._shipped = open_embedder()
        return self._shipped

    def _clip(self, embedder: Embedder, medium: Media, reference: Reference) -> Tensor:
        try:
            frames = read_one(
                medium.source,
                medium.part,
                embedder.frames,
                trusted=False,
                limits=self._limits,
                name=medium.label(),
            )
        except VideoError as error:
            raise ApiError.of(error).about(reference.param) from error
        return embedder.embed_clips([frames])[0]


def _written(row: Tensor, encoded: bool) -> Sequence[float] | str:
    """A vector as numbers, or as base64 of little-endian float32, which OpenAI's clients ask for."""
    values = row.to(torch.float32).contiguous()
    if encoded:
        return base64.b64encode(values.numpy().astype("<f4").tobytes()).decode()
    numbers: list[float] = values.tolist()
    return numbers
