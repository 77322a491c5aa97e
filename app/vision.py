"""Looking at videos: a medium -> its frames -> the embeddings that the language model reads, each made once.

    vision = Vision(model, worker, cache_bytes=2**29)
    video = vision.open(Media("clip.mp4"))                  # readable, size and duration known
    encoded = vision.encode(video, plan, "flux")            # EncodedVideo

What computes is the model's tower (llm_bridge/towers), of whatever kind.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from app.answer import KeptTokens
from app.messages import Media, check_source, with_name
from app.speech.listener import Listener
from app.speech.transcript import Transcript
from encoder.budget import Plan
from encoder.errors import VideoError
from encoder.preprocess import centre
from encoder.selection import Selector
from encoder.video.cut import CutPart, cut
from encoder.video.digest import WHOLE_BYTES, file_digest, file_state
from encoder.video.geometry import Crop, fit_within
from encoder.video.in_memory import is_images, shrink
from encoder.video.part import FRAME, Part
from encoder.video.reader import DEFAULT_LIMITS, Clip, Limits, VideoInfo, probe, read_clip
from encoder.video.sources import Held, HeldSources
from llm_bridge.chat_model import ChatModel
from llm_bridge.compute_thread import ComputeThread
from llm_bridge.kv_cache import ByteLRU, CacheStats
from llm_bridge.prompt import Visual
from llm_bridge.towers.encoding_queue import EncodingQueue

THUMBNAIL = 320  # pixels of the longer side
MOST_INFOS = 4096
MOST_TRANSCRIPTS = 256


@dataclass(frozen=True)
class EncodedVideo:
    """A video as the language model sees it.

    embedding: (M, D). visual: its place in a prompt. kept: the patches, their grid and frame times. decode_s,
    encode_s: seconds it took, 0 from the cache. familiar: whether it looks like what the model was trained
    on, None when the model cannot tell.
    """

    embedding: Tensor
    visual: Visual
    kept: KeptTokens
    decode_s: float
    encode_s: float
    familiar: bool | None = None

    @property
    def bytes(self) -> int:
        """Memory it holds, roughly."""
        return self.embedding.nbytes + 8 * len(self.kept.indices) + 512

    def from_cache(self) -> EncodedVideo:
        """The same, for which nothing was decoded or encoded."""
        return replace(self, decode_s=0.0, encode_s=0.0)


@dataclass(frozen=True)
class Preview:
    """Sampled frames and the patches of them that stay.

    frames: uint8 (T, H, W, 3) thumbnails of exactly what the patch grid covers. kept: the patches.
    """

    frames: Tensor
    kept: KeptTokens


class Known(NamedTuple):
    """What need not be done again for a question about a video."""

    decoded: bool = False
    encoded: bool = False


class OpenedVideo(NamedTuple):
    """A medium that can be read more than once, and its probe. label: what errors call it.

    part: what is looked at. seen: that part as if it were a video of its own.
    """

    held: Held
    label: str
    info: VideoInfo
    part: Part
    seen: VideoInfo


class Vision:
    """Looks at videos for one model and keeps the results; safe to use from many threads.

    worker: computes all that runs on the model; a tower on another device than the language model's has a
    thread of its own. encode_batch: see EncodingQueue. cache_bytes: bound, half of it for decoded frames,
    half for embeddings. trusted, limits: of reading. scope: nothing kept for one scope serves another.
    Every cache has its own lock, and no lock is held while anything is read or computed.
    """

    def __init__(
        self,
        model: ChatModel,
        worker: ComputeThread,
        *,
        cache_bytes: int,
        encode_batch: int | None = None,
        trusted: bool = True,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        self.revision = model.revision()
        self._tower = model.tower
        self._own_thread = None if _same_place(model) else ComputeThread("fluxchat-encode")
        self._encoding = EncodingQueue(self._tower, self._own_thread or worker, encode_batch)
        self._trusted, self._limits = trusted, limits
        self._sources = HeldSources(limits)
        self._infos: ByteLRU[VideoInfo] = ByteLRU(MOST_INFOS, lambda _: 1)
        self._transcripts: ByteLRU[Transcript] = ByteLRU(MOST_TRANSCRIPTS, lambda _: 1)
        self._clips: ByteLRU[Clip] = ByteLRU(cache_bytes // 2, lambda clip: clip.frames.nbytes)
        self._encoded: ByteLRU[EncodedVideo] = ByteLRU(cache_bytes // 2, lambda video: video.bytes)

    @property
    def caches(self) -> dict[str, CacheStats]:
        """Decoded clips and encoded videos that are kept."""
        return {"clips": self._clips.stats, "videos": self._encoded.stats}

    def open(self, medium: Media, label: str | None = None) -> OpenedVideo:
        """Probe a medium; raises VideoError when it cannot be used."""
        label = medium.label() if label is None else label
        held = self.hold(medium, label)
        info = self._info(held, label)
        try:
            return OpenedVideo(held, label, info, medium.part, medium.part.seen(info))
        except VideoError as error:
            raise with_name(error, label) from error.__cause__

    def hold(self, medium: Media, label: str) -> Held:
        """A medium's source as one that can be read more than once; raises VideoError."""
        check_source(medium, label)
        return self._sources.hold(medium.source, label)

    def cut(self, medium: Media, start: float | str, end: float | str, out: str | Path) -> CutPart:
        """Copy a part of a video into a file, read as all videos are here; raises VideoError."""
        return cut(
            medium.source, start, end, out, trusted=self._trusted, limits=self._limits, name=medium.label()
        )

    def listen(self, video: OpenedVideo, listener: Listener, language: str | None) -> Transcript:
        """What is said in the part that is looked at, or from the cache; nothing in pictures in memory.

        Raises VideoError, ConfigError and ModelError.
        """
        if isinstance(video.held.source, Clip) or is_images(video.held.source) or video.info.kind == "image":
            return Transcript((), sound=False)
        start_s, end_s = video.part.range_s(video.info)
        key = f"{video.info.digest}|{start_s}|{end_s}|{language}"
        if (known := self._transcripts.get(key)) is not None:
            return known
        said = listener.listen(
            video.held.source,
            start_s,
            end_s,
            language=language,
            trusted=self._trusted,
            limits=self._limits,
            name=video.label,
        )
        self._transcripts.put(key, said)
        return said

    def frames_at(self, medium: Media, times_s: Sequence[float], max_side: int) -> Tensor:
        """Frames at ascending times, sought one by one, uint8 (T, H, W, 3); keeps none."""
        label = medium.label()
        return read_clip(
            self.hold(medium, label).source,
            at_s=times_s,
            region=medium.part.region,
            max_side=max_side,
            decoder="pyav",  # decord reads a file from its beginning
            trusted=self._trusted,
            limits=self._limits,
            name=label,
        ).frames

    def encode(
        self,
        video: OpenedVideo,
        plan: Plan,
        selector: Selector,
        *,
        scope: str = "",
        progress: Callable[[str], None] = lambda _: None,
    ) -> EncodedVideo:
        """Decode, encode and project a video, or take it from the cache.

        progress: called with "decode" and "encode" as they begin.
        """
        key = self._encoded_key(video, plan, selector, scope)
        if (known := self._encoded.get(key)) is not None:
            return known.from_cache()
        decoded_before = _clip_key(video, plan, scope) in self._clips
        start = time.perf_counter()
        progress("decode")
        clip = self._clip(video, plan, scope)
        decoded = time.perf_counter()
        decode_s = 0.0 if decoded_before else decoded - start
        progress("encode")
        embedding, kept, familiar = self._embed(clip, plan, selector, video.part)
        times_s = clip.times_s if clip.info.kind != "image" else ()
        layout = self._tower.layout(plan, kept.indices, times_s, video.info.duration_s)
        range_s = video.part.range_s(video.info) if video.part.timed else None
        visual = Visual(len(embedding), key, video.info.duration_s, times_s, layout, range_s)
        encoded = EncodedVideo(embedding, visual, kept, decode_s, time.perf_counter() - decoded, familiar)
        self._encoded.put(key, encoded)
        return encoded

    def known(self, video: OpenedVideo, plan: Plan, selector: Selector, *, scope: str = "") -> Known:
        """What of `encode` is in the caches already."""
        encoded = self._encoded_key(video, plan, selector, scope) in self._encoded
        decoded = isinstance(video.held.source, Clip) or _clip_key(video, plan, scope) in self._clips
        return Known(decoded=encoded or decoded, encoded=encoded)

    def _encoded_key(self, video: OpenedVideo, plan: Plan, selector: Selector, scope: str) -> str:
        return f"{scope}|{video.seen.digest}|{plan.key}|{selector}|{self.revision}"

    def preview(self, video: OpenedVideo, plan: Plan, selector: Selector, *, scope: str = "") -> Preview:
        """What `encode` would sample and keep; decodes and embeds patches, runs no encoder block."""
        clip = self._clip(video, plan, scope)
        return Preview(self._thumbnails(clip, plan), self._select(clip, plan, selector, video.part))

    def forget(self, scope: str | None = None) -> None:
        """Drop all frames and embeddings, or those of one scope."""

        def unwanted(key: Hashable) -> bool:
            return scope is None or str(key).startswith(f"{scope}|")

        self._clips.discard(unwanted)
        self._encoded.discard(unwanted)

    def close(self) -> None:
        """Let go of held sources and of what is kept."""
        if self._own_thread is not None:
            self._own_thread.close()
        self._sources.close()
        self.forget()

    # -- files and frames -----------------------------------------------------------------------------------

    def _info(self, held: Held, label: str) -> VideoInfo:
        source = held.source
        if isinstance(source, Clip):
            return source.info
        key = _file_key(source)
        if key is not None and (known := self._infos.get(key)) is not None:
            return known
        try:
            info = probe(source, trusted=self._trusted, limits=self._limits, name=label)
        except VideoError as error:
            raise with_name(error, label) from error.__cause__
        if key is not None:
            self._infos.put(info.digest if isinstance(key, str) else key, info)
        return info

    def _clip(self, video: OpenedVideo, plan: Plan, scope: str) -> Clip:
        """The frames of a plan, decoded or from the cache."""
        source, part = video.held.source, video.part
        if isinstance(source, Clip):
            return source if part.whole else part.of_clip(source)
        key = _clip_key(video, plan, scope)
        start_s, end_s = part.range_s(video.info) if part.timed else (None, None)
        if (clip := self._clips.get(key)) is None:
            clip = read_clip(
                source,
                plan.frames,
                start_s=start_s,
                end_s=end_s,
                region=part.region,
                max_side=_decoded_side(plan),
                decoder="pyav" if part.timed else "auto",  # decord reads a file from its beginning
                trusted=self._trusted,
                limits=self._limits,
                name=video.label,
            )
            if clip.info.digest != video.info.digest:
                raise VideoError(f"Cannot read {video.label}: it was changed meanwhile; ask again.")
            self._clips.put(key, clip)
        return clip

    def _thumbnails(self, clip: Clip, plan: Plan) -> Tensor:
        """uint8 (T, H, W, 3) of what the model sees of each frame, at most THUMBNAIL pixels a side."""
        crop = self._tower.fit == "crop"
        frames = clip.frames[:: plan.frames_per_cell]  # one for each row of cells in time
        frames = centre(frames, plan.height, plan.width) if crop else frames
        return shrink(frames, fit_within(frames.shape[2], frames.shape[1], THUMBNAIL))

    # -- the vision tower -----------------------------------------------------------------------------------

    def _embed(
        self, clip: Clip, plan: Plan, selector: Selector, part: Part
    ) -> tuple[Tensor, KeptTokens, bool | None]:
        """Embeddings (M, D) of a clip, the cells that they stand for, and whether it is familiar."""
        (embedding, indices), familiar = self._encoding.look(clip, plan, selector)
        return embedding, self._kept_tokens(clip, plan, indices, part), familiar

    def _select(self, clip: Clip, plan: Plan, selector: Selector, part: Part) -> KeptTokens:
        """The cells that `_embed` would keep."""
        indices = self._encoding.select(clip, plan, selector)
        return self._kept_tokens(clip, plan, indices, part)

    def _kept_tokens(self, clip: Clip, plan: Plan, indices: Tensor, part: Part) -> KeptTokens:
        """(K,) kept raster indices with the times of the frames that they lie in."""
        grid = replace(plan, frames=len(clip.frames)).grid
        times = clip.times_s[:: plan.frames_per_cell] if clip.info.kind != "image" else ()
        return KeptTokens(
            times, clip.duration_s, grid, tuple(indices.tolist()), self._covered(clip, plan, part)
        )

    def _covered(self, clip: Clip, plan: Plan, part: Part) -> Crop:
        """What of the whole picture the patch grid covers."""
        left, top, right, bottom = part.region or FRAME
        if self._tower.fit != "crop":
            return left, top, right, bottom
        height, width = clip.frames.shape[1:3]
        inner = centre(clip.frames[:1], plan.height, plan.width).shape
        x, y = (1 - inner[2] / width) / 2 * (right - left), (1 - inner[1] / height) / 2 * (bottom - top)
        return left + x, top + y, right - x, bottom - y


def _same_place(model: ChatModel) -> bool:
    return model.tower.device == model.llm.device


def _decoded_side(plan: Plan) -> int:
    """Pixels of decoded frames: twice the input size keeps all that resizing to it can use."""
    return 4 * max(plan.height, plan.width)


def _clip_key(video: OpenedVideo, plan: Plan, scope: str) -> str:
    return f"{scope}|{video.seen.digest}|{plan.frames}|{_decoded_side(plan)}"


def _file_key(source: Any) -> Hashable | None:
    """What an unchanged file is known by: its state in the file system, or its digest."""
    if not isinstance(source, (str, os.PathLike)):
        return None
    if (state := file_state(source)) is not None:
        return state
    with contextlib.suppress(OSError, VideoError):  # just written: hashing is quicker than a probe
        if os.path.isfile(source) and os.path.getsize(source) <= WHOLE_BYTES:
            return file_digest(source)
    return None
