"""ChatEvaluator: a chat model that answers questions about media, greedily, at an encoder input or budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from encoder.budget import Plan
from encoder.video.reader import Clip
from llm_bridge.chat_model import ChatModel
from llm_bridge.compute_worker import ComputeWorker
from llm_bridge.generation import Generation
from llm_bridge.kv_cache import PrefixCache
from llm_bridge.prompt import Message, Prompt, Visual, render
from llm_bridge.sampling import SamplingParams
from training.data.media import Media
from training.evaluation.budget_input import BudgetInput, shown_info
from training.evaluation.encoder_input import EncoderInput

PREFIX_BYTES = 256 * 2**20
ROWS = 16  # questions about one item that are decoded together


@dataclass(frozen=True)
class Query:
    """One question, put to the model on its own. system: None is the model's own; prefix: words that the
    answer begins with, given to the model."""

    question: str
    system: str | None = None
    prefix: str = ""
    max_new_tokens: int = 24


@dataclass
class ChatEvaluator:
    """A model at one encoder input, or at what a budget buys of each clip; with None it is text-only: it is
    shown no video at all."""

    model: ChatModel
    encoder_input: EncoderInput | BudgetInput | None
    seed: int = 0

    @property
    def key(self) -> str:
        """Names the input in journals; the model and the seed are named by their header."""
        # "blind" is text-only in the journals of earlier versions, which go on.
        return "blind" if self.encoder_input is None else str(self.encoder_input)

    def answers(self, media: Media, number: int, questions: Sequence[Query]) -> Iterator[str]:
        """The answer to each question, decoded together, none knowing of the others.

        number: names the item; decides what "random" keeps. Raises VideoError when the media cannot be read.
        """
        llm = self.model.llm
        visuals, embeddings = self._encode(media, number)
        # One cache per item: what came before must not matter.
        prefixes = PrefixCache(PREFIX_BYTES, llm.kv_bytes_per_token)
        prompts = [self._prompt(visuals, question) for question in questions]
        if len(prompts) > 1:
            self._prefill_common(prompts[0], embeddings, prefixes)
        worker = ComputeWorker(llm, max_batch=ROWS)
        running = [
            iter(Generation(llm, prompt, embeddings, sampling, prefixes, worker=worker))
            for prompt, sampling in zip(
                prompts, (SamplingParams(question.max_new_tokens) for question in questions), strict=True
            )
        ]
        pieces: list[list[str]] = [[] for _ in questions]
        unfinished = list(range(len(questions)))
        while unfinished:  # in turns, so that all of them are in the batch before it makes many steps
            for index in list(unfinished):
                piece = next(running[index], None)
                if piece is None:
                    unfinished.remove(index)
                else:
                    pieces[index].append(piece)
        worker.close()
        yield from ("".join(parts).strip() for parts in pieces)

    def _prompt(self, visuals: tuple[Visual, ...], question: Query) -> Prompt:
        tokenizer, tower = self.model.llm.tokenizer, self.model.tower
        system = question.system or self.model.system
        messages: list[Message[Visual]] = [Message.of("system", system)] if system else []
        messages.append(Message("user", (*visuals, question.question)))
        prompt = render(
            tokenizer, messages, time_form=tower.time_form, marks=tower.marks, axes=self.model.llm.axes
        )
        if question.prefix:
            ids = tokenizer(question.prefix, add_special_tokens=False).input_ids
            prompt = prompt.followed_by(ids)
        return prompt

    def _prefill_common(
        self, prompt: Prompt, embeddings: Sequence[torch.Tensor], prefixes: PrefixCache
    ) -> None:
        """Prefill what the prompts have in common, the video above all, before they all ask for it."""
        for _ in Generation(self.model.llm, prompt, embeddings, SamplingParams(max_new_tokens=1), prefixes):
            pass

    @torch.inference_mode()
    def _encode(self, media: Media, number: int) -> tuple[tuple[Visual, ...], list[torch.Tensor]]:
        if self.encoder_input is None:
            return (), []
        tower, encoder_input = self.model.tower, self.encoder_input
        clip, plan = self._shown(media, encoder_input)
        pixels = tower.pixels(clip, plan)
        merging = None
        if isinstance(encoder_input, EncoderInput):
            merging = encoder_input.merging(plan.patch_size)
        if merging is not None:
            embedding, kept = tower.merge(pixels, merging, clip.times_s)
        else:
            seed = self.seed * 1_000_003 + number
            embedding, kept = tower.look(pixels, plan, encoder_input.selector, clip.times_s, seed)
        times = clip.times_s if clip.info.kind != "image" else ()
        layout = tower.layout(plan, kept.tolist(), times, clip.duration_s)
        key = f"{number}/{encoder_input}"
        return (Visual(len(embedding), key, clip.duration_s, times, layout),), [embedding]

    def _shown(self, media: Media, encoder_input: EncoderInput | BudgetInput) -> tuple[Clip, Plan]:
        if isinstance(encoder_input, BudgetInput):
            return encoder_input.open(media, self.model.tower)
        clip = self._clip(media, encoder_input)
        return clip, encoder_input.plan(self.model.tower.space, clip.info, len(clip.frames))

    def _clip(self, media: Media, encoder_input: EncoderInput) -> Clip:
        """Its frames, no more a second than the tower samples of a video."""
        clip = media.load(encoder_input.frames, encoder_input.resolution)
        if self.model.tower.space.most_fps is None:
            return clip
        most = self.model.tower.space.most_frames(shown_info(clip.info, media))
        return clip if most >= len(clip.frames) else media.load(most, encoder_input.resolution)
