"""VideoChat: the front door. One model, many videos, any number of threads.

chat = VideoChat()
answer = chat.ask("clip.mp4", "Which way does the dog move?", budget=128)
print(answer.text, answer.usage.kept_tokens, answer.timings.first_token_s)
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from app.answer import Answer, Seen
from app.estimate import Calibration, Estimate, estimate_plan
from app.preview import Preview, choose, kept_tokens, thumbnails
from app.turns import AnswerStream, Conversation, Progress, Videos, question_text
from encoder import confine
from encoder.budget import Budget, Plan
from encoder.errors import ConfigError, ModelError
from encoder.preprocess import preprocess
from encoder.selection import Selector
from encoder.tokens import VisionTokens
from encoder.video import DEFAULT_LIMITS, Clip, Limits, VideoInfo, probe, read_clip
from llm_bridge.batching import Batcher
from llm_bridge.cache import ByteLRU, CacheStats, PrefixCache
from llm_bridge.generate import Sampling
from llm_bridge.llm import Quantize
from llm_bridge.model import VideoLanguageModel
from llm_bridge.prompt import Message, Visual

SHIPPED = Path(__file__).parent / "pretrained"
MIB = 2**20


class VideoChat:
    """Ask questions about videos and images within a token budget. Safe to use from many threads.

    model: folder of a saved model (default: the one that ships), or a loaded VideoLanguageModel.
    llm, encoder: replace the parts it names (hub id, folder or GGUF; official .pth or a saved folder).
    adapters: LoRA folders. device, dtype, device_map, quantize: as in `load_llm`; the best device by default.
    cache_mib: bound on what is kept for follow-up questions: half of it KV prefixes, a quarter each decoded
    frames and embeddings.
    trusted: False reads videos as strangers' uploads (sandboxed, allowed codecs only). limits: on reading.
    batch: answers, asked from as many threads, whose tokens are made in one pass; 1 is one at a time.
    Raises ModelError, CheckpointError or ConfigError: one sentence, what was wrong and what to do.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | VideoLanguageModel | None = None,
        *,
        llm: str | None = None,
        encoder: str | os.PathLike[str] | None = None,
        adapters: Sequence[str | Path] = (),
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        device_map: str | dict[str, Any] | None = None,
        quantize: Quantize | None = None,
        cache_mib: int = 1024,
        trusted: bool = True,
        limits: Limits = DEFAULT_LIMITS,
        batch: int = 8,
    ) -> None:
        if isinstance(model, VideoLanguageModel):
            self.model = model
        else:
            self.model = VideoLanguageModel.from_pretrained(
                SHIPPED if model is None else Path(model),
                llm=llm,
                encoder=encoder,
                device=_device(device),
                dtype=getattr(torch, dtype) if isinstance(dtype, str) else dtype,
                device_map=device_map,
                quantize=quantize,
                adapters=adapters,
            )
        self.name = f"{self.model.encoder.config.embed_dim}-d FluxViT + {Path(self.model.llm.name).name}"
        self._limits, self._trusted = limits, trusted
        self._revision = self.model.revision()
        self._clips: ByteLRU[Clip] = ByteLRU(cache_mib * MIB // 4, lambda clip: clip.frames.nbytes)
        self._seen: ByteLRU[Seen] = ByteLRU(cache_mib * MIB // 4, lambda seen: seen.bytes)
        self._infos: ByteLRU[VideoInfo] = ByteLRU(4096, lambda _: 1)
        self._prefixes = PrefixCache(cache_mib * MIB // 2, self.model.llm.kv_bytes_per_token)
        self._batcher = Batcher(self.model.llm, batch)
        self._calibration: Calibration | None = None
        self._calibrating = threading.Lock()
        self._closed = False

    # -- asking ---------------------------------------------------------------------------------------------

    def ask(self, video: Any, question: str, **options: Any) -> Answer:
        """One question about one video or image, or a list of them; see `stream` for the options."""
        stream = self.stream(video, question, **options)
        for _ in stream:
            pass
        return stream.answer

    def stream(
        self,
        video: Any,
        question: str,
        *,
        budget: Budget | int | str | None = None,
        history: Sequence[Message | tuple[str, str]] | None = None,
        system: str | None = None,
        selector: Selector = "flux",
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
        scope: str = "",
        progress: Progress | None = None,
        stop: threading.Event | None = None,
    ) -> AnswerStream:
        """The answer as an iterator of text pieces, stoppable within one token.

        video: path, bytes, file object, image, list of images, a `Clip`, a `Videos` of several, or None for
        text alone. budget: tokens per video (see `Budget.of`; default: the model's). history: earlier turns
        about the same video, as (question, answer) pairs. temperature 0 is greedy. scope: whose question this
        is; nothing kept for one scope serves another. progress: told what begins ("decode", "encode",
        "prefill"), of which video, of how many. stop: an event that ends the answer when set.
        Raises VideoError, BudgetError or ConfigError on iteration.
        """
        return AnswerStream(
            self,
            list(video) if isinstance(video, Videos) else [] if video is None else [video],
            question_text(question),
            budget=budget,
            history=history or (),
            system=system,
            selector=selector,
            sampling=Sampling(max_new_tokens, temperature, top_p, top_k, seed),
            scope=scope,
            progress=progress,
            stop=stop,
        )

    def conversation(self, video: Any = None, **options: Any) -> Conversation:
        """A conversation of many turns; options as in `stream` are the defaults of every turn."""
        return Conversation(self, video, options)

    # -- the price ------------------------------------------------------------------------------------------

    def plan_budget(self, budget: Budget | int | str | None) -> Budget:
        """What people write as a Budget, None being the model's own; raises BudgetError."""
        return Budget(self.model.config.default_tokens) if budget is None else Budget.of(budget)

    def probe(self, video: Any) -> VideoInfo:
        """Size, duration and codec of a video or image; raises VideoError when it cannot be used."""
        return self._info(video)

    def plan(self, video: Any, budget: Budget | int | str | None = None) -> Plan:
        """Frames, resolution and kept tokens that the budget buys on this video."""
        return self._plan(self._info(video), self.plan_budget(budget))

    def estimate(self, video: Any, budget: Budget | int | str | None = None) -> Estimate:
        """The price before anything runs: tokens, multiply-accumulates, seconds, MiB.

        The first call on a machine measures its speed (some seconds, cached on disk).
        """
        info = self._info(video)
        plan = self._plan(info, self.plan_budget(budget))
        full = Budget.full().plan(info, self.model.encoder.config)
        return estimate_plan(self.model, info, plan, full, self.calibration)

    @property
    def calibration(self) -> Calibration:
        """Speed of this model on this machine, measured once and cached."""
        with self._calibrating:
            if self._calibration is None:
                self._calibration = Calibration.load_or_measure(self.model)
            return self._calibration

    @property
    def calibrated(self) -> bool:
        """Whether estimates are there at once, without measuring the machine first."""
        return self._calibration is not None

    def _plan(self, info: VideoInfo, budget: Budget) -> Plan:
        model = self.model
        predict = None
        if budget.seconds is not None:
            calibration = self.calibration
            full = Budget.full().plan(info, model.encoder.config)

            def predict(plan: Plan) -> float:
                return estimate_plan(model, info, plan, full, calibration).first_token_s

        return budget.plan(info, model.encoder.config, table=model.plan_table, predict_s=predict)

    # -- looking --------------------------------------------------------------------------------------------

    def look(
        self,
        video: Any,
        budget: Budget | int | str | None = None,
        selector: Selector = "flux",
        *,
        scope: str = "",
        progress: Callable[[str], None] = lambda _: None,
    ) -> Seen:
        """What the language model sees of a video: decoded, encoded and projected, or from the cache."""
        plan, info = self._open(video, budget)
        key = f"{scope}|{info.digest}|{plan.key}|{selector}|{self._revision}"
        if (seen := self._seen.get(key)) is not None:
            return seen.again()
        seen = self._look(video, info, plan, selector, key, scope, progress)
        self._seen.put(key, seen)
        return seen

    def preview(
        self,
        video: Any,
        budget: Budget | int | str | None = None,
        selector: Selector = "flux",
        *,
        scope: str = "",
    ) -> Preview:
        """The frames that a budget samples and the patches that it keeps, without running the encoder."""
        plan, info = self._open(video, budget)
        clip = self._clip(video, info, plan, scope)
        return Preview(thumbnails(self.model, clip, plan), choose(self.model, clip, plan, selector))

    def _open(self, video: Any, budget: Budget | int | str | None) -> tuple[Plan, VideoInfo]:
        if self._closed:
            raise ModelError("This VideoChat was closed: make a new one.")
        info = self._info(video)
        return self._plan(info, self.plan_budget(budget)), info

    def _info(self, video: Any) -> VideoInfo:
        if isinstance(video, Clip):
            return video.info
        key = None
        if isinstance(video, (str, os.PathLike)) and os.path.isfile(video):
            status = os.stat(video)
            key = (os.path.abspath(video), status.st_size, status.st_mtime_ns, status.st_ino)
            if (known := self._infos.get(key)) is not None:
                return known
        info = probe(video, trusted=self._trusted, limits=self._limits)
        if key is not None:
            self._infos.put(key, info)
        return info

    def _clip(self, video: Any, info: VideoInfo, plan: Plan, scope: str) -> Clip:
        """The frames of a plan, decoded or from the cache."""
        if isinstance(video, Clip):
            return video
        # Twice the input size keeps all that resizing to it can use.
        side = 4 * max(plan.height, plan.width)
        key = f"{scope}|{info.digest}|{plan.frames}|{side}"
        if (clip := self._clips.get(key)) is None:
            clip = read_clip(video, plan.frames, max_side=side, trusted=self._trusted, limits=self._limits)
            self._clips.put(key, clip)
        return clip

    def _look(
        self,
        video: Any,
        info: VideoInfo,
        plan: Plan,
        selector: Selector,
        key: str,
        scope: str,
        progress: Callable[[str], None],
    ) -> Seen:
        start = time.perf_counter()
        progress("decode")
        clip = self._clip(video, info, plan, scope)
        decoded = time.perf_counter()
        progress("encode")
        pixels = preprocess(clip.frames, plan.height, plan.width, fit=self.model.config.fit)
        vision, embedding = self._batcher.run(self._encode, pixels, plan.keep, clip.times_s, selector)
        kept = kept_tokens(clip, replace(plan, frames=len(clip.frames)), vision.kept[0])
        visual = Visual(len(embedding), key, info.duration_s, kept.times_s)
        return Seen(embedding, visual, kept, decoded - start, time.perf_counter() - decoded)

    @torch.inference_mode()
    def _encode(
        self, pixels: torch.Tensor, keep: int, times_s: tuple[float, ...], selector: Selector
    ) -> tuple[VisionTokens, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        vision = self.model.encode([pixels], [keep], [times_s], selector=selector, generator=generator)
        embedding = self.model.project(vision)[0]
        if self.model.device.type != "cpu":
            torch.accelerator.synchronize(self.model.device)
        return vision, embedding

    # -- the rest -------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the encoder runs."""
        return self.model.device

    def info(self) -> dict[str, Any]:
        """The model, the machine and the versions, for people."""
        import gradio
        import transformers

        encoder, llm = self.model.encoder, self.model.llm
        count = sum(p.numel() for p in encoder.parameters())
        seen, prefixes = self._seen.stats, self._prefixes.stats
        return {
            "encoder": f"FluxViT {encoder.config.embed_dim}-d x {encoder.config.depth}, {count / 1e6:.1f} M",
            "projector": f"{self.model.projector.config.kind}, {self.model.projector.config.layers} layers",
            "llm": f"{llm.name}, {llm.parameters / 1e6:.0f} M, {str(llm.dtype).removeprefix('torch.')}",
            "quantize": llm.quantize or "no",
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "default_budget": self.model.config.default_tokens,
            "revision": self._revision,
            "cache": f"{seen.entries} videos {seen.bytes / MIB:.1f} MiB, {prefixes.entries} prefixes "
            f"{prefixes.bytes / MIB:.1f} MiB",
            "sandbox": str(confine.report()),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "gradio": gradio.__version__,
        }

    @property
    def caches(self) -> dict[str, CacheStats]:
        """What is kept for follow-up questions, by kind."""
        return {"clips": self._clips.stats, "videos": self._seen.stats, "prefixes": self._prefixes.stats}

    @property
    def decoding(self) -> tuple[int, int, int]:
        """Forward passes that made tokens, the tokens made, and the answers being made now."""
        return self._batcher.steps, self._batcher.made, self._batcher.active

    def forget(self, scope: str | None = None) -> None:
        """Drop everything kept for follow-up questions, or what was kept for one scope."""

        def unwanted(key: Hashable) -> bool:
            return scope is None or str(key).startswith(f"{scope}|")

        self._clips.discard(unwanted)
        self._seen.discard(unwanted)
        self._prefixes.clear(scope)

    def close(self) -> None:
        """Free the caches; asking afterwards raises ModelError."""
        self._closed = True
        self._batcher.close()
        self.forget()

    def __enter__(self) -> VideoChat:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _device(device: str | torch.device | None) -> torch.device | None:
    if device is None:
        return None
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"There is no device {device!s} here ({reason}); leave it out to use the best one."
        ) from error
    return found
