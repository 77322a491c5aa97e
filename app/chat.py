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
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from app.answer import Answer, EncodedVideo
from app.estimate import Calibration, Estimate, estimate_plan
from app.messages import (
    Media,
    Videos,
    as_media,
    check_messages,
    check_selector,
    check_source,
    named,
    question_messages,
)
from app.preview import Preview, choose, kept_tokens, thumbnails
from app.streaming import AnswerStream, Conversation, NotCopyable, StopSignal
from encoder.budget import Budget, Plan
from encoder.errors import ConfigError, ContextError, ModelError, VideoError
from encoder.preprocess import preprocess
from encoder.selection import Selector
from encoder.tokens import VisionTokens
from encoder.video import confine
from encoder.video.reader import DEFAULT_LIMITS, Clip, Limits, VideoInfo, probe, read_clip
from encoder.video.sources import Held, HeldSources
from llm_bridge.compute_worker import ComputeWorker
from llm_bridge.generation import Generation, SamplingParams
from llm_bridge.kv_cache import ByteLRU, CacheStats, PrefixCache
from llm_bridge.llm import Quantize
from llm_bridge.model import VideoLanguageModel
from llm_bridge.prompt import Message, Prompt, TextBound, Visual, count_text, render

__all__ = ["Answer", "Estimate", "Media", "Message", "SamplingParams", "VideoChat", "Videos"]

SHIPPED = Path(__file__).parent / "pretrained"
MIB = 2**20
FILE_STATE = ("dev", "ino", "size", "mtime_ns", "ctime_ns")  # of os.stat: another value, another file
SETTLED_S = 2.0
_PROCESS = os.getpid()  # where torch was loaded
# What begins ("decode", "encode", "prefill"), of which video, of how many.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Query:
    """A question as VideoChat computes it."""

    messages: tuple[Message[Media], ...]
    budget: Budget
    selector: Selector
    sampling: SamplingParams
    scope: str
    progress: Progress


class Opened(NamedTuple):
    """A medium that can be read, and what the budget buys of it. label: what errors call it."""

    held: Held
    label: str
    info: VideoInfo
    plan: Plan


class VideoChat(NotCopyable):
    """Ask questions about videos and images within a token budget. Safe to use from many threads.

    model: folder of a saved model (default: the one that ships), or a loaded VideoLanguageModel.
    llm, encoder: replace the parts it names (hub id, folder or GGUF; official .pth or a saved folder).
    adapters: LoRA folders. device, dtype, device_map, quantize: as in `load_llm`; the best device by default.
    cache_mib: bound on what is kept for follow-up questions: half of it KV prefixes, a quarter each decoded
    frames and embeddings.
    trusted: False reads videos as strangers' uploads (sandboxed, allowed codecs only). limits: on reading.
    batch: answers, asked from as many threads, whose tokens are made in one pass; 1 is one at a time.
    It belongs to the process that made it: a forked child makes its own.
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
        self._process, self._closed = os.getpid(), threading.Event()
        if self._process != _PROCESS:
            torch.set_num_threads(1)  # the threads of a forked process are not there: waiting for them hangs
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
        self._sources = HeldSources(limits)
        self._revision = self.model.revision()
        self._clips: ByteLRU[Clip] = ByteLRU(cache_mib * MIB // 4, lambda clip: clip.frames.nbytes)
        self._seen: ByteLRU[EncodedVideo] = ByteLRU(cache_mib * MIB // 4, lambda seen: seen.bytes)
        self._infos: ByteLRU[VideoInfo] = ByteLRU(4096, lambda _: 1)
        self._prefixes = PrefixCache(cache_mib * MIB // 2, self.model.llm.kv_bytes_per_token)
        self._worker = ComputeWorker(self.model.llm, batch)
        self._calibration: Calibration | None = None
        self._calibrating = threading.Lock()

    # -- asking ---------------------------------------------------------------------------------------------

    def ask(self, video: Any, question: str, **options: Any) -> Answer:
        """One question about one video or image, or a `Videos` of several; see `stream` for the options."""
        stream = self.stream(video, question, **options)
        for _ in stream:
            pass
        return stream.answer

    def stream(
        self,
        video: Any,
        question: str,
        *,
        history: Sequence[Message[Media] | tuple[str, str]] | None = None,
        system: str | None = None,
        **options: Any,
    ) -> AnswerStream:
        """The answer as an iterator of text pieces, stoppable within one token.

        video: path, bytes, binary file object (also a pipe, or a socket's), image, list of images, a `Clip`,
        a `Media` that names one of these, a `Videos` of several, or None for text alone. history: earlier
        turns about the same videos, as (question, answer) pairs; the videos stand before the first turn's
        text. options: as in `stream_messages`. Raises as that does.
        """
        self._check_usable()
        messages = question_messages(video, question, () if history is None else history, system)
        return self.stream_messages(messages, **options)

    def stream_messages(
        self,
        messages: Sequence[Message[Media]],
        *,
        budget: Budget | int | str | None = None,
        selector: Selector = "flux",
        scope: str = "",
        progress: Progress | None = None,
        stop: threading.Event | None = None,
        **sampling: Any,
    ) -> AnswerStream:
        """The answer to the last of several messages; media stand where the messages put them.

        messages: `Message.of("user", Media("a.mp4"), "What is it?")`, ...; a system message comes first.
        budget: tokens per video (see `Budget.of`; default: the model's). scope: whose question this is;
        nothing kept for one scope serves another. progress: told what begins ("decode", "encode",
        "prefill"), of which video, of how many. stop: an event that ends the answer when set.
        sampling: fields of `SamplingParams`: max_new_tokens, temperature (0 is greedy), top_p, ...
        Raises BudgetError or ConfigError for what is wrong with the arguments; on iteration VideoError,
        ContextError when all is longer than the model's context, and ModelError when it cannot answer.
        """
        self._check_usable()
        check_selector(selector)
        if stop is not None and not callable(getattr(stop, "is_set", None)):
            raise ConfigError(f"stop must be a threading.Event, not a {type(stop).__name__}.")
        if progress is not None and not callable(progress):
            raise ConfigError(f"progress must be a function, not a {type(progress).__name__}.")
        if not isinstance(scope, str):
            raise ConfigError(f"scope must be a text (str), not a {type(scope).__name__}.")
        query = Query(
            check_messages(messages),
            self.plan_budget(budget),
            selector,
            SamplingParams(**sampling),
            scope,
            progress or (lambda what, index, count: None),
        )
        stops = [self._closed] if stop is None else [self._closed, stop]
        return AnswerStream(partial(self._prepare, query), self._check_usable, StopSignal(*stops))

    def conversation(self, video: Any = None, **options: Any) -> Conversation:
        """A conversation of many turns; options as in `stream` are the defaults of every turn.

        A source that can be read only once is read now; all else at the first question.
        """
        self._check_usable()
        return Conversation(self, video, options)

    def _prepare(self, query: Query, stop: threading.Event) -> tuple[list[EncodedVideo], Generation]:
        """Look at the media of a question and make its prompt: all but the answer. Raises FluxChatError."""
        self._check_usable()
        messages = query.messages
        if (system := self.model.config.system) and all(m.role != "system" for m in messages):
            messages = (Message.of("system", system), *messages)
        text_tokens = self._count_text(messages, query.sampling.max_new_tokens)
        media = [part for message in messages for part in message.content if isinstance(part, Media)]
        # All are opened before one is looked at: a question about one that cannot be read costs nothing.
        opened = [
            self._open(medium, query.budget, medium.label(index, len(media)))
            for index, medium in enumerate(media)
        ]
        looks = []
        for index, one in enumerate(opened):
            tell = partial(_tell, query.progress, index, len(opened))
            looks.append(self._look(one, query.selector, query.scope, tell))
        self._check_usable()  # closed meanwhile
        visuals = iter([look.visual for look in looks])
        prompt = render(
            self.model.llm.tokenizer,
            [
                Message(m.role, tuple(p if isinstance(p, str) else next(visuals) for p in m.content))
                for m in messages
            ],
            time_form=self.model.config.time_sentence,
        )
        self._check_context(prompt, text_tokens, query)
        query.progress("prefill", 0, 1)
        generation = Generation(
            self.model.llm,
            prompt,
            [look.embedding for look in looks],
            query.sampling,
            self._prefixes,
            query.scope,
            stop,
            worker=self._worker,
        )
        return looks, generation

    @cached_property
    def _text_bound(self) -> TextBound | None:
        return TextBound.of(self.model.llm.tokenizer)

    def _count_text(self, messages: Sequence[Message[Media]], answer: int) -> int:
        """Tokens of the messages' text; raises ContextError when they cannot fit beside the answer."""
        limit, tokenizer = self.model.llm.context_length, self.model.llm.tokenizer
        # A token has at least one byte of any text, so that a short one needs no bound.
        long = limit is not None and sum(len(message.text) for message in messages) > limit
        count = count_text(tokenizer, messages, most=limit, bound=self._text_bound if long else None)
        if limit is not None and count + answer > limit:
            raise _too_long(limit, count, 0, answer, turns=sum(m.role == "user" for m in messages))
        return count

    def _check_context(self, prompt: Prompt, text_tokens: int, query: Query) -> None:
        """Raises ContextError when prompt and answer are longer than the model's context."""
        limit, answer = self.model.llm.context_length, query.sampling.max_new_tokens
        if limit is not None and len(prompt) + answer > limit:
            turns = sum(message.role == "user" for message in query.messages)
            # The sentences about time go with their videos.
            raise _too_long(limit, text_tokens, len(prompt) - text_tokens, answer, turns)

    def _check_usable(self) -> None:
        """Raises ModelError in a process that was forked since, and after `close`; waits for no lock."""
        self._check_process()
        if self._closed.is_set():
            raise ModelError("This VideoChat was closed: make a new one.")

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise ModelError(
                "This VideoChat belongs to the process that made it: make a new one in this process, "
                "or start processes with the method 'spawn'."
            )

    # -- the price ------------------------------------------------------------------------------------------

    def plan_budget(self, budget: Budget | int | str | None) -> Budget:
        """What people write as a Budget, None being the model's own; raises BudgetError."""
        return Budget(self.model.config.default_tokens) if budget is None else Budget.of(budget)

    def keep(self, video: Any) -> Media:
        """A video or image as a `Media` that can be read again: a one-pass source is read now.

        Raises VideoError when that fails; whether it is a video, `probe` says.
        """
        self._check_usable()
        medium = as_media(video)
        held = self._hold(medium, medium.label())
        # A file object finds what was read of it; the path of a pipe means something new each time.
        again = held.source is medium.source or not isinstance(medium.source, (str, os.PathLike))
        return medium if again else Media(held, medium.name)

    def probe(self, video: Any) -> VideoInfo:
        """Size, duration and codec of a video or image; raises VideoError when it cannot be used."""
        self._check_usable()
        medium = as_media(video)
        label = medium.label()
        return self._info(self._hold(medium, label), label)

    def plan(self, video: Any, budget: Budget | int | str | None = None) -> Plan:
        """Frames, resolution and kept tokens that the budget buys on this video."""
        return self._open(as_media(video), self.plan_budget(budget)).plan

    def estimate(self, video: Any, budget: Budget | int | str | None = None) -> Estimate:
        """The price before anything runs: tokens, multiply-accumulates, seconds, MiB.

        The first call on a machine measures its speed (some seconds, cached on disk).
        """
        one = self._open(as_media(video), self.plan_budget(budget))
        full = Budget.full().plan(one.info, self.model.encoder.config)
        return estimate_plan(self.model, one.info, one.plan, full, self.calibration)

    @property
    def calibration(self) -> Calibration:
        """Speed of this model on this machine, measured once and cached."""
        self._check_usable()
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
    ) -> EncodedVideo:
        """What the language model sees of a video: decoded, encoded and projected, or from the cache."""
        check_selector(selector)
        return self._look(self._open(as_media(video), self.plan_budget(budget)), selector, scope, progress)

    def preview(
        self,
        video: Any,
        budget: Budget | int | str | None = None,
        selector: Selector = "flux",
        *,
        scope: str = "",
    ) -> Preview:
        """The frames that a budget samples and the patches that it keeps, without running the encoder."""
        check_selector(selector)
        one = self._open(as_media(video), self.plan_budget(budget))
        clip = self._clip(one, scope)
        return Preview(thumbnails(self.model, clip, one.plan), choose(self.model, clip, one.plan, selector))

    def _open(self, medium: Media, budget: Budget, label: str | None = None) -> Opened:
        """A medium made ready to be read; raises VideoError when it cannot be, BudgetError."""
        self._check_usable()
        label = medium.label() if label is None else label
        held = self._hold(medium, label)
        info = self._info(held, label)
        return Opened(held, label, info, self._plan(info, budget))

    def _hold(self, medium: Media, label: str) -> Held:
        """What can be read of a medium more than once."""
        check_source(medium, label)
        return self._sources.hold(medium.source, label)

    def _info(self, held: Held, label: str) -> VideoInfo:
        video = held.source
        if isinstance(video, Clip):
            return video.info
        key = None
        if isinstance(video, (str, os.PathLike)) and os.path.isfile(video):
            status = os.stat(video)
            key = (os.path.abspath(video), *(getattr(status, f"st_{name}") for name in FILE_STATE))
            if (known := self._infos.get(key)) is not None:
                return known
        try:
            info = probe(video, trusted=self._trusted, limits=self._limits, name=label)
        except VideoError as error:
            raise named(error, label) from error.__cause__
        # A file just written may be written again within the clock's step, with nothing to tell by.
        if key is not None and time.time() - status.st_ctime > SETTLED_S:
            self._infos.put(key, info)
        return info

    def _clip(self, one: Opened, scope: str) -> Clip:
        """The frames of a plan, decoded or from the cache."""
        video = one.held.source
        if isinstance(video, Clip):
            return video
        # Twice the input size keeps all that resizing to it can use.
        side = 4 * max(one.plan.height, one.plan.width)
        key = f"{scope}|{one.info.digest}|{one.plan.frames}|{side}"
        if (clip := self._clips.get(key)) is None:
            clip = read_clip(
                video,
                one.plan.frames,
                max_side=side,
                trusted=self._trusted,
                limits=self._limits,
                name=one.label,
            )
            if clip.info.digest != one.info.digest:
                raise VideoError(f"Cannot read {one.label}: it was changed meanwhile; ask again.")
            self._clips.put(key, clip)
        return clip

    def _look(
        self, one: Opened, selector: Selector, scope: str, progress: Callable[[str], None]
    ) -> EncodedVideo:
        key = f"{scope}|{one.info.digest}|{one.plan.key}|{selector}|{self._revision}"
        if (seen := self._seen.get(key)) is not None:
            return seen.again()
        start = time.perf_counter()
        progress("decode")
        clip = self._clip(one, scope)
        decoded = time.perf_counter()
        progress("encode")
        plan = one.plan
        pixels = preprocess(clip.frames, plan.height, plan.width, fit=self.model.config.fit)
        vision, embedding = self._worker.run(self._encode, pixels, plan.keep, clip.times_s, selector)
        kept = kept_tokens(clip, replace(plan, frames=len(clip.frames)), vision.kept[0])
        visual = Visual(len(embedding), key, one.info.duration_s, kept.times_s)
        seen = EncodedVideo(embedding, visual, kept, decoded - start, time.perf_counter() - decoded)
        self._seen.put(key, seen)
        return seen

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

        self._check_usable()
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
        self._check_process()
        return {"clips": self._clips.stats, "videos": self._seen.stats, "prefixes": self._prefixes.stats}

    @property
    def decoding(self) -> tuple[int, int, int]:
        """Forward passes that made tokens, the tokens made, and the answers being made now."""
        return self._worker.steps, self._worker.made, self._worker.active

    def forget(self, scope: str | None = None) -> None:
        """Drop everything kept for follow-up questions, or what was kept for one scope."""
        self._check_process()

        def unwanted(key: Hashable) -> bool:
            return scope is None or str(key).startswith(f"{scope}|")

        self._clips.discard(unwanted)
        self._seen.discard(unwanted)
        self._prefixes.clear(scope)

    def close(self) -> None:
        """Free the caches; asking afterwards, and answers that are being made, end in a ModelError."""
        if os.getpid() != self._process:
            return  # nothing of it is this process's
        self._closed.set()
        self._worker.close()
        self._sources.close()
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


def _tell(progress: Progress, index: int, count: int, what: str) -> None:
    progress(what, index, count)


def _too_long(limit: int, text: int, media: int, answer: int, turns: int) -> ContextError:
    """What to shorten, in tokens: the part that is alone large enough, or the largest.

    text: of all messages; media: of the videos with their sentences; answer: the most new tokens.
    """
    excess = text + media + answer - limit
    parts = {
        "videos": (media, f"lower the token budget: its videos take {media}"),
        "text": (text, "shorten the question" + ("" if turns == 1 else ", or start a new conversation")),
        "answer": (answer, f"lower max_new_tokens, which is {answer}"),
    }
    enough = [name for name, (tokens, _) in parts.items() if tokens > excess]
    chosen = max(enough or parts, key=lambda name: parts[name][0])
    what = "question" if turns == 1 else "conversation"
    many = "1 token" if excess == 1 else f"{excess} tokens"
    return ContextError(
        f"The {what} is {many} too long for the language model's context of {limit}: {parts[chosen][1]}."
    )
