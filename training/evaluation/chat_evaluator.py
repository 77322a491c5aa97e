"""Watcher: a chat model that answers questions about media at a fixed setting, greedily."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from encoder.preprocess import preprocess
from llm_bridge.compute_worker import ComputeWorker
from llm_bridge.generation import Generation
from llm_bridge.kv_cache import PrefixCache
from llm_bridge.model import VideoLanguageModel
from llm_bridge.prompt import Message, Prompt, Visual, render
from llm_bridge.sampling import SamplingParams
from training.data.media import Media
from training.evaluation.encoder_input import Setting

PREFIX_BYTES = 256 * 2**20
ROWS = 16  # questions about one item that are decoded together


@dataclass(frozen=True)
class Asked:
    """One question, asked on its own. system: None is the model's own; prefix: words that the answer begins
    with, given to the model."""

    question: str
    system: str | None = None
    prefix: str = ""
    max_new_tokens: int = 24


@dataclass
class Watcher:
    """A model at one setting; with None it is shown no video at all."""

    model: VideoLanguageModel
    setting: Setting | None
    seed: int = 0

    @property
    def key(self) -> str:
        """Names the input in journals; the model and the seed are named by their header."""
        return "blind" if self.setting is None else str(self.setting)

    def answers(self, media: Media, number: int, questions: Sequence[Asked]) -> Iterator[str]:
        """The answer to each question, decoded together, none knowing of the others.

        number: names the item; decides what "random" keeps. Raises VideoError when the media cannot be read.
        """
        llm = self.model.llm
        visuals, embeddings = self._look(media, number)
        # One cache per item: what came before must not matter.
        prefixes = PrefixCache(PREFIX_BYTES, llm.kv_bytes_per_token)
        prompts = [self._prompt(visuals, asked) for asked in questions]
        if len(prompts) > 1:
            self._read_once(prompts[0], embeddings, prefixes)
        worker = ComputeWorker(llm, max_batch=ROWS)
        running = [
            iter(Generation(llm, prompt, embeddings, sampling, prefixes, worker=worker))
            for prompt, sampling in zip(
                prompts, (SamplingParams(asked.max_new_tokens) for asked in questions), strict=True
            )
        ]
        said: list[list[str]] = [[] for _ in questions]
        unfinished = list(range(len(questions)))
        while unfinished:  # in turns, so that all of them are in the batch before it makes many steps
            for index in list(unfinished):
                piece = next(running[index], None)
                if piece is None:
                    unfinished.remove(index)
                else:
                    said[index].append(piece)
        worker.close()
        yield from ("".join(pieces).strip() for pieces in said)

    def _prompt(self, visuals: tuple[Visual, ...], asked: Asked) -> Prompt:
        tokenizer, config = self.model.llm.tokenizer, self.model.config
        system = asked.system or config.system
        messages: list[Message[Visual]] = [Message.of("system", system)] if system else []
        messages.append(Message("user", (*visuals, asked.question)))
        prompt = render(tokenizer, messages, time_form=config.time_sentence)
        if asked.prefix:
            ids = tokenizer(asked.prefix, add_special_tokens=False).input_ids
            prompt = replace(prompt, ids=(*prompt.ids, *ids))
        return prompt

    def _read_once(self, prompt: Prompt, embeddings: Sequence[torch.Tensor], prefixes: PrefixCache) -> None:
        """Prefill what the prompts have in common, the video above all, before they all ask for it."""
        for _ in Generation(self.model.llm, prompt, embeddings, SamplingParams(max_new_tokens=1), prefixes):
            pass

    @torch.inference_mode()
    def _look(self, media: Media, number: int) -> tuple[tuple[Visual, ...], list[torch.Tensor]]:
        if self.setting is None:
            return (), []
        side, keep = self.setting.resolution, self.setting.keep
        clip = media.load(self.setting.frames, side)
        pixels = preprocess(clip, side, side, fit=self.model.config.fit)
        merge = self.setting.merging(self.model.encoder.config.patch_size)
        vision = self.model.encode(
            [pixels],
            [None if merge else keep],
            [clip.times_s],
            selector=self.setting.selector,
            generator=torch.Generator().manual_seed(self.seed * 1_000_003 + number),
            merge=merge,
        )
        embedding = self.model.project(vision)[0]
        times = clip.times_s if clip.info.kind != "image" else ()
        key = f"{number}/{self.setting}"
        return (Visual(len(embedding), key, clip.duration_s, times),), [embedding]
