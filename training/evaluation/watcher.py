"""Watcher: a chat model that answers questions about media at a fixed setting, greedily."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from encoder.preprocess import preprocess
from llm_bridge.cache import PrefixCache
from llm_bridge.generate import Generation, Sampling
from llm_bridge.model import VideoLanguageModel
from llm_bridge.prompt import Message, Visual, render
from training.data.media import Media
from training.evaluation.setting import Setting

PREFIX_BYTES = 64 * 2**20


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

    def answers(self, media: Media, number: int, questions: Sequence[Asked]) -> Iterator[str]:
        """The answer to each question. number: names the item; decides what "random" keeps.

        Raises VideoError when the media cannot be read.
        """
        llm, config = self.model.llm, self.model.config
        visuals, embeddings = self._look(media, number)
        # One cache per item: what came before must not matter.
        prefixes = PrefixCache(PREFIX_BYTES, llm.kv_bytes_per_token)
        for asked in questions:
            system = asked.system or config.system
            messages = [Message.of("system", system)] if system else []
            messages.append(Message("user", (*visuals, asked.question)))
            prompt = render(llm.tokenizer, messages, time_form=config.time_sentence)
            if asked.prefix:
                ids = llm.tokenizer(asked.prefix, add_special_tokens=False).input_ids
                prompt = replace(prompt, ids=(*prompt.ids, *ids))
            sampling = Sampling(max_new_tokens=asked.max_new_tokens)
            yield "".join(Generation(llm, prompt, embeddings, sampling, prefixes)).strip()

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
