"""VideoChat: the front door. One model, many videos, any number of threads.

chat = VideoChat()
answer = chat.ask("clip.mp4", "Which way does the dog move?", budget=128)
print(answer.text, answer.usage.kept_tokens, answer.timings.first_token_s)
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from app.answer import Answer, KeptTokens, Seen, Timings, Usage
from app.estimate import Calibration, Estimate, estimate_plan
from encoder.budget import Budget, Plan
from encoder.errors import ConfigError, FluxChatError, ModelError
from encoder.preprocess import preprocess
from encoder.selection import Selector
from encoder.video import DEFAULT_LIMITS, Clip, Limits, VideoInfo, probe, read_clip
from llm_bridge.cache import ByteLRU, PrefixCache
from llm_bridge.generate import Generation, Sampling
from llm_bridge.llm import Quantize
from llm_bridge.model import VideoLanguageModel
from llm_bridge.prompt import Message, Visual, render

SHIPPED = Path(__file__).parent / "pretrained"
MIB = 2**20


class VideoChat:
    """Ask questions about videos and images within a token budget. Safe to use from many threads.

    model: folder of a saved model (default: the one that ships), or a loaded VideoLanguageModel.
    llm, encoder: replace the parts it names (hub id, folder or GGUF; official .pth or a saved folder).
    adapters: LoRA folders. device, dtype, device_map, quantize: as in `load_llm`; the best device by default.
    cache_mib: bound on what is kept for follow-up questions, half embeddings, half KV prefixes.
    trusted: False reads videos as strangers' uploads (sandboxed, allowed codecs only). limits: on reading.
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
        self._seen: ByteLRU[Seen] = ByteLRU(cache_mib * MIB // 2, lambda seen: seen.bytes)
        self._infos: ByteLRU[VideoInfo] = ByteLRU(4096, lambda _: 1)
        self._prefixes = PrefixCache(cache_mib * MIB // 2, self.model.llm.kv_bytes_per_token)
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
    ) -> AnswerStream:
        """The answer as an iterator of text pieces, stoppable within one token.

        video: path, bytes, file object, image, list of images, a `Clip`, a `Videos` of several, or None for
        text alone. budget: tokens per video (see `Budget.of`; default: the model's). history: earlier turns
        about the same video, as (question, answer) pairs. temperature 0 is greedy.
        Raises VideoError, BudgetError or ConfigError on iteration.
        """
        return AnswerStream(
            self,
            list(video) if isinstance(video, Videos) else [] if video is None else [video],
            _text(question),
            budget=budget,
            history=history or (),
            system=system,
            selector=selector,
            sampling=Sampling(max_new_tokens, temperature, top_p, top_k, seed),
        )

    def conversation(self, video: Any = None, **options: Any) -> Conversation:
        """A conversation of many turns; options as in `stream` are the defaults of every turn."""
        return Conversation(self, video, options)

    # -- the price ------------------------------------------------------------------------------------------

    def plan_budget(self, budget: Budget | int | str | None) -> Budget:
        """What people write as a Budget, None being the model's own; raises BudgetError."""
        return Budget(self.model.config.default_tokens) if budget is None else Budget.of(budget)

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

    def look(self, video: Any, budget: Budget | int | str | None = None, selector: Selector = "flux") -> Seen:
        """What the language model sees of a video: decoded, encoded and projected, or from the cache."""
        if self._closed:
            raise ModelError("This VideoChat was closed: make a new one.")
        info = self._info(video)
        plan = self._plan(info, self.plan_budget(budget))
        key = f"{info.digest}|{plan.key}|{selector}|{self._revision}"
        if (seen := self._seen.get(key)) is not None:
            return seen.again()
        seen = self._look(video, info, plan, selector, key)
        self._seen.put(key, seen)
        return seen

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

    def _look(self, video: Any, info: VideoInfo, plan: Plan, selector: Selector, key: str) -> Seen:
        start = time.perf_counter()
        if isinstance(video, Clip):
            clip = video
        else:
            # Twice the input size keeps all that resizing to it can use.
            side = 4 * max(plan.height, plan.width)
            clip = read_clip(video, plan.frames, max_side=side, trusted=self._trusted, limits=self._limits)
        decoded = time.perf_counter()
        pixels = preprocess(clip.frames, plan.height, plan.width, fit=self.model.config.fit)
        generator = torch.Generator().manual_seed(0)
        with torch.inference_mode():
            vision = self.model.encode(
                [pixels], [plan.keep], [clip.times_s], selector=selector, generator=generator
            )
            embedding = self.model.project(vision)[0]
            if self.model.device.type != "cpu":
                torch.accelerator.synchronize(self.model.device)
        kept = KeptTokens(
            times_s=clip.times_s if info.kind != "image" else (),
            duration_s=info.duration_s,
            grid=vision.grids[0],
            indices=tuple(vision.kept[0].tolist()),
        )
        visual = Visual(len(embedding), key, info.duration_s, kept.times_s)
        return Seen(embedding, visual, kept, decoded - start, time.perf_counter() - decoded)

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
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "gradio": gradio.__version__,
        }

    def forget(self) -> None:
        """Drop everything kept for follow-up questions."""
        self._seen.clear()
        self._prefixes.clear()

    def close(self) -> None:
        """Free the caches; asking afterwards raises ModelError."""
        self._closed = True
        self.forget()

    def __enter__(self) -> VideoChat:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Videos(list[Any]):
    """Several videos or images for one question: `chat.ask(Videos(["a.mp4", "b.jpg"]), "Which one?")`."""


class AnswerStream:
    """An answer in the making: iterate for pieces of text, `stop()` from any thread, then read `answer`."""

    def __init__(
        self,
        chat: VideoChat,
        videos: list[Any],
        question: str,
        *,
        budget: Budget | int | str | None,
        history: Sequence[Message | tuple[str, str]],
        system: str | None,
        selector: Selector,
        sampling: Sampling,
    ) -> None:
        self._chat, self._videos, self._question = chat, videos, question
        self._budget, self._history, self._system = budget, history, system
        self._selector, self._sampling = selector, sampling
        self._stop = threading.Event()
        self._answer: Answer | None = None

    def stop(self) -> None:
        """End computing within one token; what was said so far stays."""
        self._stop.set()

    @property
    def answer(self) -> Answer:
        """The finished (or stopped) answer; raises FluxChatError before the iteration has ended."""
        if self._answer is None:
            raise FluxChatError("The answer is not there yet: iterate over the stream first.")
        return self._answer

    def __iter__(self) -> Iterator[str]:
        chat, start = self._chat, time.perf_counter()
        looks = [chat.look(video, self._budget, self._selector) for video in self._videos]
        messages, visuals = self._messages(looks)
        prompt = render(chat.model.llm.tokenizer, messages, time_form=chat.model.config.time_sentence)
        prepared = time.perf_counter() - start
        generation = Generation(
            chat.model.llm, prompt, [v.embedding for v in visuals], self._sampling, chat._prefixes, self._stop
        )
        pieces: list[str] = []
        try:
            for piece in generation:
                pieces.append(piece)
                yield piece
        finally:
            stats = generation.stats
            self._answer = Answer(
                text="".join(pieces).strip(),
                usage=Usage(
                    seen_tokens=sum(look.kept.grid.size for look in looks),
                    kept_tokens=sum(len(look.kept.indices) for look in looks),
                    visual_tokens=sum(look.visual.tokens for look in looks),
                    prompt_tokens=stats.prompt_tokens,
                    cached_tokens=stats.cached_tokens,
                    completion_tokens=stats.completion_tokens,
                ),
                timings=Timings(
                    decode_s=sum(look.decode_s for look in looks),
                    encode_s=sum(look.encode_s for look in looks),
                    prefill_s=stats.prefill_s,
                    first_token_s=prepared + stats.first_token_s,
                    total_s=time.perf_counter() - start,
                    tokens_per_s=stats.tokens_per_s,
                ),
                kept=tuple(look.kept for look in looks),
                finish=stats.finish,
            )

    def _messages(self, looks: list[Seen]) -> tuple[list[Message], list[Seen]]:
        """The conversation with the videos in its first user turn, and what is seen, in order."""
        system = self._system or self._chat.model.config.system
        messages = [Message.of("system", system)] if system else []
        turns: list[Message] = []
        for turn in self._history:
            if isinstance(turn, Message):
                turns.append(turn)
            else:
                turns += [Message.of("user", _text(turn[0])), Message.of("assistant", str(turn[1]))]
        turns.append(Message.of("user", self._question))
        visuals = [look.visual for look in looks]
        turns[0] = Message("user", (*visuals, *turns[0].content))
        return messages + turns, looks


class Conversation:
    """Many turns about one or more videos; follow-ups pay only for their own words.

    `add` brings in another video for the next question. Not for several threads at once.
    """

    def __init__(self, chat: VideoChat, video: Any, options: dict[str, Any]) -> None:
        self._chat = chat
        self.options = options
        self.videos = list(video) if isinstance(video, Videos) else [] if video is None else [video]
        self.turns: list[tuple[str, str]] = []

    def add(self, video: Any) -> None:
        """Another video or image; it joins the others at the start of the conversation."""
        self.videos.append(video)

    def ask(self, question: str, **options: Any) -> Answer:
        """The next question; options override the conversation's for this turn."""
        stream = self.stream(question, **options)
        for _ in stream:
            pass
        return stream.answer

    def stream(self, question: str, **options: Any) -> AnswerStream:
        """The next question, streamed; a stopped answer stays in the conversation as far as it got."""
        return _ConversationStream(self, question, {**self.options, **options})


class _ConversationStream(AnswerStream):
    """Adds its turn to the conversation when it ends."""

    def __init__(self, conversation: Conversation, question: str, options: dict[str, Any]) -> None:
        stream = conversation._chat.stream(
            Videos(conversation.videos), question, **{**options, "history": list(conversation.turns)}
        )
        self.__dict__.update(stream.__dict__)
        self._conversation = conversation

    def __iter__(self) -> Iterator[str]:
        try:
            yield from super().__iter__()
        finally:
            if self._answer is not None:
                self._conversation.turns.append((self._question, self._answer.text))


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


def _text(question: str) -> str:
    if not isinstance(question, str) or not question.strip():
        raise ConfigError("The question is empty: ask something in words.")
    return question.strip()
