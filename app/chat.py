"""VideoChat: the front door. One model, many videos, any number of threads.

chat = VideoChat()
answer = chat.ask("clip.mp4", "Which way does the dog move?", budget=128)
print(answer.text, answer.usage.kept_tokens, answer.timings.first_token_s)
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from app.answer import Answer
from app.conversation import Conversation
from app.estimate import Calibration, Estimate, PriceEstimator
from app.long_video import Showing, showings
from app.messages import (
    Media,
    Videos,
    as_media,
    check_messages,
    check_selector,
    part_of,
    question_messages,
    with_part,
)
from app.note import Note, note_for, without_notes
from app.speech.listener import Listener
from app.speech.transcript import Transcript
from app.streaming import AnswerStream, NotCopyable, Step, StopSignal, all_familiar
from app.vision import EncodedVideo, OpenedVideo, Preview, Vision
from encoder.budget import Budget, Plan, PlanTable
from encoder.errors import ConfigError, ContextError, ModelError
from encoder.selection import Selector
from encoder.video.cut import CutPart
from encoder.video.part import Part
from encoder.video.reader import DEFAULT_LIMITS, Limits, VideoInfo
from llm_bridge.chat_model import ChatModel, load_chat_model
from llm_bridge.compute_worker import ComputeWorker
from llm_bridge.generation import Generation, GenerationStats
from llm_bridge.kv_cache import ByteLRU, CacheStats
from llm_bridge.llm import OnDownload, Quantize, usable_device
from llm_bridge.prompt import Message, Prompt, TextBound, Visual, count_text, render
from llm_bridge.sampling import SamplingParams
from llm_bridge.towers.tower import Stage

__all__ = ["Answer", "Estimate", "Media", "Message", "SamplingParams", "VideoChat", "Videos"]

SHIPPED = Path(__file__).parent / "pretrained"
MIB = 2**20
MOST_SURVEYS = 256
SPEECH_TOKENS = 256  # most of what is said in a video, by default
_PROCESS = os.getpid()  # where torch was loaded
# What begins ("decode", "encode", "prefill"), of which video, of how many; a Step where it is a video's.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Query:
    """A question as VideoChat computes it: checked, with every default filled in."""

    messages: tuple[Message[Media], ...]
    budget: Budget
    selector: Selector
    sampling: SamplingParams
    scope: str
    progress: Progress
    hedge: bool
    speech: int  # most tokens of what is said in a video; 0: nobody listens
    language: str | None
    parts: bool  # of a long video


class VideoChat(NotCopyable):
    """Ask questions about videos and images within a token budget. Safe to use from many threads.

    model: folder of a saved model (default: the one that ships), a stock video model (hub id or folder, as
    "HuggingFaceTB/SmolVLM2-500M-Video-Instruct"), or a loaded model.
    llm, encoder: replace the parts it names (hub id, folder or GGUF; official .pth or a saved folder).
    adapters: LoRA folders. device, dtype, device_map, quantize: as in `load_llm`; the best device by default.
    engine: what runs the language model: "local", "llamacpp" (GGUF files), "vllm" (starts a server), or the
    addresses of vLLM servers; default: llama.cpp for a GGUF file where it is installed (see `load_llm`).
    cache_mib: bound on the caches for follow-up questions: half of it KV prefixes, a quarter each decoded
    frames and embeddings.
    trusted: False reads videos as strangers' uploads (sandboxed, allowed codecs only). limits: on reading.
    select: when a stock model drops tokens: "after" its encoder (default), or "before", which saves encoding.
    plan: frames and resolution for each budget, as `training.optimize_tokens` measures them (its
    plan_table.json); default: the model's own table, or the rule of encoder/budget.py.
    think: whether a model that can think does so before questions that do not say (see SamplingParams).
    on_download: told a hub model's name and its bytes before they are downloaded.
    speech_model: a folder of faster-whisper's, or one of its names; default: the one that is fetched.
    batch: most answers, each asked from a thread of its own, that are decoded in one pass.
    encoder_device: where a FluxChat model's encoder runs, beside the language model; default: device.
    compiled: whether torch.compile makes a FluxChat model's encoder, which takes seconds for each new size.
    encode_batch: most videos of one size, asked about at once, that are encoded in one call; default: 8 on a
    GPU, 1 on CPUs, where the last bits would depend on who else asks.
    It belongs to the process that made it: a forked child makes its own.
    Raises ModelError, CheckpointError or ConfigError: one sentence, what was wrong and what to do.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | ChatModel | None = None,
        *,
        llm: str | None = None,
        encoder: str | os.PathLike[str] | None = None,
        adapters: Sequence[str | Path] = (),
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        device_map: str | dict[str, Any] | None = None,
        quantize: Quantize | None = None,
        engine: str | None = None,
        cache_mib: int = 1024,
        trusted: bool = True,
        limits: Limits = DEFAULT_LIMITS,
        batch: int = 8,
        encoder_device: str | torch.device | None = None,
        compiled: bool = False,
        encode_batch: int | None = None,
        select: Stage | None = None,
        plan: str | os.PathLike[str] | PlanTable | None = None,
        think: bool = False,
        on_download: OnDownload | None = None,
        speech_model: str | os.PathLike[str] | None = None,
    ) -> None:
        _check_kinds(model, llm, encoder, dtype, cache_mib, limits, batch, plan, speech_model)
        self._process, self._closed = os.getpid(), threading.Event()
        if self._process != _PROCESS:
            torch.set_num_threads(1)  # the threads of a forked process are not there: waiting for them hangs
        self.model: ChatModel
        if model is not None and not isinstance(model, (str, os.PathLike)):
            self.model = model
        else:
            self.model = load_chat_model(
                SHIPPED if model is None else model,
                llm=llm,
                encoder=encoder,
                stage=select,
                device=usable_device(device),
                dtype=getattr(torch, dtype) if isinstance(dtype, str) else dtype,
                device_map=device_map,
                quantize=quantize,
                engine=engine,
                encoder_device=usable_device(encoder_device),
                adapters=adapters,
                on_download=on_download,
            )
        if compiled:
            _compile(self.model)
        table = _plan_table(plan, self.model)
        self._tower = self.model.tower
        self.name = self._tower.name_with(Path(self.model.llm.name).name)
        self._listener = Listener(None if speech_model is None else os.fspath(speech_model))
        self.think = think
        self._check_think(think)
        self._worker = ComputeWorker(self.model.llm, batch)
        self._vision = Vision(
            self.model,
            self._worker,
            cache_bytes=cache_mib * MIB // 2,
            encode_batch=encode_batch,
            trusted=trusted,
            limits=limits,
        )
        self.surveys: ByteLRU[Tensor] = ByteLRU(MOST_SURVEYS, lambda _: 1)  # how much changes in long videos
        self._engine = self.model.llm.engine(self._worker, cache_mib * MIB // 2, batch)
        self._prices = PriceEstimator(self.model, self._worker, table)

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
        start: float | str | None = None,
        end: float | str | None = None,
        region: Sequence[float] | str | None = None,
        selector: Selector = "flux",
        scope: str = "",
        progress: Progress | None = None,
        stop: threading.Event | None = None,
        hedge: bool = True,
        speech: bool | int = False,
        language: str | None = None,
        parts: bool = False,
        **sampling: Any,
    ) -> AnswerStream:
        """The answer to the last of several messages; media stand where the messages put them.

        messages: `Message.of("user", Media("a.mp4"), "What is it?")`, ...; a system message comes first.
        budget: tokens per video (see `Budget.of`; default: the model's).
        start, end, region: look at a part of each medium that is not a part already: seconds or "1:02", and
        fractions x0, y0, x1, y1 of the upright picture (see `Part.of`). Only that is decoded; times stay
        those of the whole video.
        scope: whose question this is; nothing kept for one scope serves another. progress: called with what
        begins ("decode", "encode", "prefill"), of which video, of how many; of a long video it is an
        `app.streaming.Step`, which says which part. stop: an event that ends the answer when set.
        hedge: say first, once, that a video is nothing the model knows, where it can tell, and doubt its yes;
        with parts, say that a time is not in the video.
        speech: put what is said in each video beside its frames, with times: most tokens of it, True for 256
        (extra `speech`). language: what is spoken, as "de"; None recognises it.
        parts: show a video of ten minutes or more that comes first and alone in parts, at most eight, which
        share its budget, or around the time that a question names (see `app.long_video`).
        sampling: fields of `SamplingParams`: max_new_tokens, temperature (0 is greedy), top_p, think, schema
        (a JSON Schema that the answer follows: read `Answer.json()`), ...
        Raises BudgetError or ConfigError for what is wrong with the arguments; on iteration VideoError,
        ContextError when all is longer than the model's context, and ModelError when it cannot answer.
        """
        self._check_usable()
        part = Part.of(start, end, region)
        if stop is not None and not callable(getattr(stop, "is_set", None)):
            raise ConfigError(f"stop must be a threading.Event, not a {type(stop).__name__}.")
        if progress is not None and not callable(progress):
            raise ConfigError(f"progress must be a function, not a {type(progress).__name__}.")
        if not isinstance(scope, str):
            raise ConfigError(f"scope must be a text (str), not a {type(scope).__name__}.")
        query = self._query(
            without_notes(with_part(check_messages(messages), part)),
            budget=budget,
            selector=selector,
            scope=scope,
            progress=progress,
            hedge=hedge,
            speech=speech,
            language=language,
            parts=parts,
            **sampling,
        )
        stops = [self._closed] if stop is None else [self._closed, stop]
        plans: list[tuple[VideoInfo, Plan]] = []
        stream = AnswerStream(
            partial(self._prepare, query, plans=plans), self._check_usable, StopSignal(*stops)
        )
        stream.on_timings(partial(self._learn, plans))
        return stream

    def check(self, question: str, *, system: str | None = None, **options: Any) -> None:
        """Raise what a question would about any video, before there is one: for wrong options, for a text and
        an answer that are longer than the context, and for a speech model that is not there.

        options: as in `stream_messages`, but for a part.
        """
        self._check_usable()
        query = self._query(check_messages(question_messages(None, question, (), system)), **options)
        self._count_text(query)
        if query.speech:
            self._listener.ready(query.language)

    def _query(
        self,
        checked: tuple[Message[Media], ...],
        *,
        budget: Budget | int | str | None = None,
        selector: Selector = "flux",
        scope: str = "",
        progress: Progress | None = None,
        hedge: bool = True,
        speech: bool | int = False,
        language: str | None = None,
        parts: bool = False,
        **sampling: Any,
    ) -> Query:
        """What is asked, as `stream_messages` takes it; raises BudgetError and ConfigError."""
        check_selector(selector)
        if (system := self.model.system) and all(message.role != "system" for message in checked):
            checked = (Message.of("system", system), *checked)
        chosen = SamplingParams(**{"think": self.think and sampling.get("schema") is None, **sampling})
        self._check_think(chosen.think)
        if chosen.schema is not None:
            self.model.llm.check_schema()
        return Query(
            checked,
            self.plan_budget(budget),
            selector,
            chosen,
            scope,
            progress or (lambda *_: None),
            bool(hedge),
            _speech_budget(speech),
            language,
            bool(parts),
        )

    def conversation(self, video: Any = None, **options: Any) -> Conversation:
        """A conversation of many turns; options as in `stream` are the defaults of every turn.

        A source that can be read only once is read now; all else at the first question.
        """
        self._check_usable()
        return Conversation(self, video, options)

    def _learn(
        self,
        plans: Sequence[tuple[VideoInfo, Plan]],
        videos: Sequence[EncodedVideo],
        stats: GenerationStats,
    ) -> None:
        """Correct the price of the next question by what this one took."""
        if plans and stats.prefill_s > 0:  # it was not stopped before
            rows = [
                (*plan, video.decode_s, video.encode_s) for plan, video in zip(plans, videos, strict=True)
            ]
            self._prices.learn_question(rows, stats.prompt_tokens, stats.cached_tokens, stats.prefill_s)

    def _prepare(
        self, query: Query, stop: StopSignal, *, plans: list[tuple[VideoInfo, Plan]]
    ) -> tuple[list[EncodedVideo], Generation, Note]:
        """Encode the media of a question and make its prompt: all but the answer, and the note before it.

        plans: is given what was opened and the plan of each, if prices can learn from it.
        Raises FluxChatError, and Stopped once it was stopped.
        """
        self._check_usable()
        text_tokens = self._count_text(query)
        check = stop.check
        messages, note = showings(
            self, query.messages, query.budget, parts=query.parts, scope=query.scope, check=check
        )
        media = [part for message in messages for part in message.content if isinstance(part, Showing)]
        count = len({showing.index for showing in media})
        # All are opened before one is encoded: a question about one that cannot be read costs nothing.
        opened = [self._open(one.medium, one.budget, one.medium.label(one.index, count)) for one in media]
        if self._prices.calibrated:  # else what follows may wait for the measurement
            plans += [(video.seen, plan) for video, plan in opened]
        said = [self._said(video, query, one.shares) for one, (video, _) in zip(media, opened, strict=True)]
        videos = []
        for one, (video, plan) in zip(media, opened, strict=True):
            check()

            def progress(what: str, one: Showing = one) -> None:
                query.progress(Step(what, one.number, one.shares), one.index, count)

            videos.append(
                self._vision.encode(video, plan, query.selector, scope=query.scope, progress=progress)
            )
        self._check_usable()  # closed meanwhile
        check()
        shown = iter(zip(videos, said, strict=True))
        prompt = render(
            self.model.llm.tokenizer,
            [Message(m.role, tuple(x for p in m.content for x in _rendered(p, shown))) for m in messages],
            time_form=self._tower.time_form,
            marks=self._tower.marks,
            axes=self.model.llm.axes,
            think=query.sampling.think,
        )
        self._check_context(prompt, text_tokens, query)
        query.progress("prefill", 0, 1)
        familiarity = self._tower.familiarity
        hedged = query.hedge and query.sampling.schema is None  # JSON has no room for a sentence
        doubted = hedged and familiarity is not None and all_familiar(videos) is False
        generation = Generation(
            self.model.llm,
            prompt,
            [video.embedding for video in videos],
            query.sampling,
            scope=query.scope,
            stop=stop,
            engine=self._engine,
            first_bias=familiarity.yes_bias(self.model.llm.tokenizer) if familiarity and doubted else {},
        )
        asked_new = any(isinstance(part, Media) for part in query.messages[-1].content)
        files = [video.info.digest for video, _ in opened]
        shows_new = familiarity and doubted and asked_new and _shows_new(messages, videos, files)
        if familiarity and shows_new:
            note = Note(note_for(familiarity.things) + note)
        return videos, generation, note if hedged else Note()

    def _said(self, video: OpenedVideo, query: Query, shares: int = 1) -> str:
        """What is said in a video, as text on lines of its own, within its share of the query's budget."""
        if not query.speech:
            return ""
        transcript = self._vision.listen(video, self._listener, query.language)
        tokenizer = self.model.llm.tokenizer
        text = transcript.text(
            lambda text: len(tokenizer(text, add_special_tokens=False).input_ids),
            max(1, query.speech // shares),
        )
        return text and f"\n{text}\n"

    def transcribe(self, video: Any, *, language: str | None = None, **part: Any) -> Transcript:
        """What is said in a video, in lines with times (extra `speech`); part: as in `estimate`.

        Raises VideoError; ConfigError or ModelError where the speech model is not there.
        """
        self._check_usable()
        medium = part_of(video, **part)
        return self._vision.listen(self._vision.open(medium), self._listener, language)

    def _open(self, medium: Media, budget: Budget, label: str | None = None) -> tuple[OpenedVideo, Plan]:
        """A medium that can be read, and what the budget buys of it; raises VideoError or BudgetError."""
        self._check_usable()
        video = self._vision.open(medium, label)
        return video, self._prices.plan(video.seen, budget)

    @cached_property
    def _text_bound(self) -> TextBound | None:
        return TextBound.of(self.model.llm.tokenizer)

    def _count_text(self, query: Query) -> int:
        """Tokens of the messages' text; raises ContextError when they cannot fit beside the answer."""
        limit, tokenizer = self.model.llm.context_length, self.model.llm.tokenizer
        messages, answer = query.messages, query.sampling.max_new_tokens
        # A token has at least one byte of any text, so that a short one needs no bound.
        long = limit is not None and sum(len(message.text) for message in messages) > limit
        bound, marks = self._text_bound if long else None, self._tower.marks
        think = query.sampling.think
        count = count_text(tokenizer, messages, most=limit, bound=bound, marks=marks, think=think)
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

    def _check_think(self, think: bool) -> None:
        if think and self.model.llm.thinking_marks is None:
            raise ConfigError(
                f"The language model {self.model.llm.name} does not think before it answers: leave think out."
            )

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
        return Budget(self.model.default_tokens) if budget is None else Budget.of(budget)

    def keep(self, video: Any) -> Media:
        """A video or image as a `Media` that can be read again: a one-pass source is read now.

        Raises VideoError when that fails; whether it is a video, `probe` says.
        """
        self._check_usable()
        medium = as_media(video)
        held = self._vision.hold(medium, medium.label())
        # A file object finds what was read of it; the path of a pipe means something new each time.
        again = held.source is medium.source or not isinstance(medium.source, (str, os.PathLike))
        return medium if again else replace(medium, source=held)

    def probe(self, video: Any) -> VideoInfo:
        """Size, duration and codec of a video or image; raises VideoError when it cannot be used."""
        self._check_usable()
        return self._vision.open(as_media(video)).info

    def frames_at(self, video: Any, times_s: Sequence[float], max_side: int) -> Tensor:
        """Frames of a video at ascending times (seconds), uint8 (T, H, W, 3), `max_side` pixels at most.

        Each is sought by itself, however long the video is. Raises VideoError.
        """
        self._check_usable()
        return self._vision.frames_at(as_media(video), times_s, max_side)

    def plan(self, video: Any, budget: Budget | int | str | None = None, **part: Any) -> Plan:
        """Frames, resolution and kept tokens that the budget buys on this video; part: as in `estimate`."""
        return self._open(part_of(video, **part), self.plan_budget(budget))[1]

    def estimate(
        self,
        video: Any,
        budget: Budget | int | str | None = None,
        selector: Selector | None = None,
        *,
        scope: str = "",
        new_tokens: int | None = None,
        **part: Any,
    ) -> Estimate:
        """The price before anything runs: tokens, multiply-accumulates, seconds, MiB.

        selector: given, what is kept for `scope` under it counts: what was decoded or encoded before costs no
        time. new_tokens: of a follow-up question, the positions that the language model has not read yet.
        part: start, end and region of what is looked at, as in `stream_messages`.
        The first call on a machine measures its speed (some seconds, cached on disk); answers correct it.
        """
        opened, plan = self._open(part_of(video, **part), self.plan_budget(budget))
        if selector is None:
            return self._prices.estimate(opened.seen, plan)
        check_selector(selector)
        known = self._vision.known(opened, plan, selector, scope=scope)
        return self._prices.estimate(opened.seen, plan, known, new_tokens if known.encoded else None)

    @property
    def calibration(self) -> Calibration:
        """Speed of this model on this machine, measured once and cached."""
        self._check_usable()
        return self._prices.calibration

    @property
    def calibrated(self) -> bool:
        """Whether estimates are there at once, without measuring the machine first."""
        return self._prices.calibrated

    # -- looking --------------------------------------------------------------------------------------------

    def look(
        self,
        video: Any,
        budget: Budget | int | str | None = None,
        selector: Selector = "flux",
        *,
        scope: str = "",
        progress: Callable[[str], None] = lambda _: None,
        **part: Any,
    ) -> EncodedVideo:
        """A video as the language model sees it: decoded, encoded and projected, or from the cache.

        part: as in `estimate`.
        """
        check_selector(selector)
        opened, plan = self._open(part_of(video, **part), self.plan_budget(budget))
        return self._vision.encode(opened, plan, selector, scope=scope, progress=progress)

    def preview(
        self,
        video: Any,
        budget: Budget | int | str | None = None,
        selector: Selector = "flux",
        *,
        scope: str = "",
        **part: Any,
    ) -> Preview:
        """The frames that a budget samples and the patches that it keeps, without running the encoder.

        part: as in `estimate`.
        """
        check_selector(selector)
        opened, plan = self._open(part_of(video, **part), self.plan_budget(budget))
        return self._vision.preview(opened, plan, selector, scope=scope)

    def cut(self, video: Any, start: float | str, end: float | str, out: str | os.PathLike[str]) -> CutPart:
        """Copy a part of a video into the file `out`, as `encoder.video.cut` does; raises VideoError."""
        self._check_usable()
        return self._vision.cut(as_media(video), start, end, Path(out))

    # -- the rest -------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the encoder runs."""
        return self._tower.device

    def info(self) -> dict[str, Any]:
        """The model, the machine and the versions, for people."""
        from app.about import machine_info

        self._check_usable()
        llm = self.model.llm
        videos, prefixes = self.caches["videos"], self.caches["prefixes"]
        familiarity = self._tower.familiarity
        return (
            machine_info()
            | self._tower.describe()
            | {
                "llm": f"{llm.name}, {llm.parameters / 1e6:.0f} M, {llm.stored_as}",
                "engine": self._engine.name,
                "quantize": llm.quantize or "no",
                "device": str(self.device),
                "threads": torch.get_num_threads(),
                "default_budget": self.model.default_tokens,
                "familiarity": "cannot tell known videos from others"
                if familiarity is None
                else f"knows {familiarity.things} drawn things, and tells other videos from them",
                "revision": self._vision.revision,
                "cache": f"{videos.entries} videos {videos.bytes / MIB:.1f} MiB, {prefixes.entries} prefixes "
                f"{prefixes.bytes / MIB:.1f} MiB",
            }
        )

    @property
    def fingerprint(self) -> tuple[str, str, str, int]:
        """What answers depend on beside question, video and options: equal ones give equal greedy answers."""
        self._check_usable()
        model = self.model
        return self.name, model.llm.identity, self._vision.revision, model.default_tokens

    @property
    def caches(self) -> dict[str, CacheStats]:
        """What is kept for follow-up questions, by kind."""
        self._check_process()
        return {**self._vision.caches, "prefixes": self._engine.kept}

    @property
    def decoding(self) -> tuple[int, int, int]:
        """Forward passes that made tokens, the tokens made, and the answers being made now."""
        return self._engine.decoding

    def forget(self, scope: str | None = None) -> None:
        """Drop everything kept for follow-up questions, or what was kept for one scope."""
        self._check_process()
        self._vision.forget(scope)
        self.surveys.discard(lambda key: scope is None or str(key).startswith(f"{scope}|"))
        self._engine.forget(scope)

    def close(self) -> None:
        """Free the caches; asking afterwards, and answers that are being made, end in a ModelError."""
        if os.getpid() != self._process:
            return  # nothing of it is this process's
        self._closed.set()
        self._engine.close()
        self._worker.close()
        self._vision.close()

    def __enter__(self) -> VideoChat:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _shows_new(
    messages: Sequence[Message[Showing]], videos: Sequence[EncodedVideo], files: Sequence[str]
) -> bool:
    """Whether the last message brings an unfamiliar video of which no earlier one had an unfamiliar part.

    videos, files: of all of them, and what tells their files apart.
    """
    strange = [file for video, file in zip(videos, files, strict=True) if video.familiar is False]
    count = sum(isinstance(part, Showing) for part in messages[-1].content)
    new = sum(video.familiar is False for video in videos[len(videos) - count :])
    told = len(strange) - new
    return not set(strange[told:]) <= set(strange[:told])


def _rendered(part: str | Showing, shown: Iterator[tuple[EncodedVideo, str]]) -> tuple[str | Visual, ...]:
    """A part of a message as the prompt has it: of a medium its visual, and what is said in it."""
    if isinstance(part, str):
        return (part,)
    video, said = next(shown)
    return (video.visual, said) if said else (video.visual,)


def _check_kinds(
    model: Any,
    llm: Any,
    encoder: Any,
    dtype: Any,
    cache_mib: Any,
    limits: Any,
    batch: Any,
    plan: Any,
    speech_model: Any,
) -> None:
    """Raises ConfigError for an argument of VideoChat of another kind than it takes."""
    names = {"model": model, "llm": llm, "encoder": encoder, "plan": plan, "speech_model": speech_model}
    others = {"model": hasattr(model, "tower"), "plan": isinstance(plan, PlanTable)}
    for name, value in names.items():
        if value is None or others.get(name):
            continue
        if not isinstance(value, (str, os.PathLike)):
            raise ConfigError(f"{name} must be a path or a name, not a {type(value).__name__}.")
        if not os.fspath(value):
            raise ConfigError(f"{name} is empty: give a path or a name, or leave it out.")
    known = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not isinstance(known, torch.dtype):
        raise ConfigError(f"There is no dtype {dtype!r:.40}: take float32, bfloat16 or float16.")
    if not isinstance(limits, Limits):
        raise ConfigError(f"limits must be Limits(...), not a {type(limits).__name__}.")
    for name, value, least in (("cache_mib", cache_mib, 0), ("batch", batch, 1)):
        if type(value) is not int or value < least:
            raise ConfigError(f"{name} must be a whole number from {least} up, not {value!r:.40}.")


def _compile(model: ChatModel) -> None:
    """Raises ConfigError for a stock model, and where nothing can compile."""
    from encoder.compiling import compile_encoder
    from llm_bridge.model import VideoLanguageModel

    if not isinstance(model, VideoLanguageModel):
        raise ConfigError("A stock video model's encoder is not compiled here: leave compile out.")
    compile_encoder(model.encoder)


def _plan_table(plan: str | os.PathLike[str] | PlanTable | None, model: ChatModel) -> PlanTable | None:
    if plan is None:
        return None
    table = plan if isinstance(plan, PlanTable) else PlanTable.read(Path(plan).expanduser())
    return table.check(model.tower.space, "given" if isinstance(plan, PlanTable) else os.fspath(plan))


def _speech_budget(speech: bool | int) -> int:
    if isinstance(speech, bool):
        return SPEECH_TOKENS if speech else 0
    if not isinstance(speech, int) or speech < 0:
        raise ConfigError(f"speech must be True, False or a number of tokens, not {speech!r:.40}.")
    return speech


def _too_long(limit: int, text: int, media: int, answer: int, turns: int) -> ContextError:
    """Says what to shorten: a part that alone is longer than the excess, or else the longest.

    Tokens: limit, of the context; text, of all messages; media, of the videos and their time sentences;
    answer, max_new_tokens.
    """
    excess = text + media + answer - limit
    parts = {
        "videos": (media, f"lower the token budget: its videos take {media}"),
        "text": (text, "shorten the question" + ("" if turns == 1 else ", or start a new conversation")),
        "answer": (answer, f"lower max_new_tokens, which is {answer}"),
    }
    sufficient = [name for name, (tokens, _) in parts.items() if tokens > excess]
    chosen = max(sufficient or parts, key=lambda name: parts[name][0])
    subject = "question" if turns == 1 else "conversation"
    tokens = "1 token" if excess == 1 else f"{excess} tokens"
    return ContextError(
        f"The {subject} is {tokens} too long for the language model's context of {limit}: {parts[chosen][1]}."
    )
