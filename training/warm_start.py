"""Warm start of the projector: visual tokens learn to look like the words of the answers.

    python -m training.warm_start --config training/recipes/cpu/warm_start.yaml

Before stage 1, and not of the paper: a frozen language model can read words, so each visual token is drawn to
the input embedding of a word that the answers about its video use, and away from all other words. On the demo
world `words: scene` tells each token what to say instead: what its patch shows. No forward pass of the
language model is needed, which makes a step twenty times cheaper than one of stage 1. The result serves as
`model.projector_init` of training.chat_stage1.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoder.errors import ConfigError, DataError
from encoder.tokens import VisionTokens
from llm_bridge.model import VideoLanguageModel
from llm_bridge.prompt import Prompt
from training.chat import ChatData
from training.chat_stage1 import Stage1Recipe
from training.command import run_stage
from training.data.features import Features, stack
from training.data.media import Media, WorldMedia
from training.demo_world.scene_words import SceneWords
from training.demo_world.world import World
from training.spoken import Spoken, spoken_by, spoken_losses

# Words in more than this share of the answers say nothing about a video.
COMMON_SHARE = 0.15
COUNTED_BATCHES = 8
FILLERS = frozenset({"of", "a", "pair", "piece", "set"})


@dataclass(frozen=True, kw_only=True)
class WarmStartRecipe(Stage1Recipe):
    """words: those of the "answers", each said by the token that says it best, or those of the "scene" (demo
    world only): what each token's patch shows, and by the summary tokens what the clip does.
    temperature: of the softmax over words. pull: weight of the distance to the nearest word of the answer.
    negatives: words of the vocabulary, drawn anew for each batch, that the tokens must not say.
    """

    words: Literal["answers", "scene"] = "answers"
    negatives: int = 2048
    temperature: float = 0.05
    pull: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.temperature > 0:
            raise ConfigError(f"temperature must be positive, not {self.temperature}.")


def word_loss(visual: Tensor, words: Tensor, table: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(How badly the words of one clip are said, how far each of its tokens is from the nearest of them).

    visual: (M, D). words: (W,) rows of table, (V, D) unit embeddings to choose from. Each token is a
    distribution over them; every word has to be said by the one token that says it best.
    """
    unit = F.normalize(visual, dim=-1)
    cosines = (unit @ table.T).float()  # [M, V]
    said = (cosines / temperature).log_softmax(dim=-1)[:, words].max(dim=0).values
    return -said.mean(), (1 - cosines[:, words].max(dim=1).values).mean()


@dataclass(frozen=True)
class WordBatch:
    """Clips, and per clip the words that its tokens should say: in any way, or as told."""

    vision: VisionTokens
    words: Sequence[list[int] | Spoken]


class WarmStartModel(nn.Module):
    """The projector in front of a language model's table of word embeddings."""

    def __init__(self, vlm: VideoLanguageModel, recipe: WarmStartRecipe) -> None:
        super().__init__()
        self.vlm, self.recipe = vlm, recipe
        table = vlm.llm.model.get_input_embeddings().weight.detach()
        self._norm = table.float().norm(dim=-1).mean()
        self._table = F.normalize(table.float(), dim=-1).to(table.dtype)

    def forward(self, batch: WordBatch) -> tuple[Tensor, dict[str, float]]:
        """(loss, figures) over the clips of a batch."""
        visuals = self.vlm.project(batch.vision)
        table, row_of = self._candidates(batch.words)
        parts: dict[str, list[Tensor]] = {}
        for visual, words in zip(visuals, batch.words, strict=True):
            for name, value in self._losses(visual.to(table), words, table, row_of).items():
                parts.setdefault(name, []).append(value)
        length = torch.cat(visuals).float().norm(dim=-1) / self._norm - 1
        means = {name: torch.stack(values).mean() for name, values in parts.items()}
        weights = {"distance": self.recipe.pull}
        loss = length.square().mean() + sum(weights.get(name, 1.0) * value for name, value in means.items())
        return loss, {name: value.item() for name, value in means.items()}

    def _losses(
        self, visual: Tensor, words: list[int] | Spoken, table: Tensor, row_of: dict[int, int]
    ) -> dict[str, Tensor]:
        """How badly one clip says its words, by name; nothing when it has none."""
        if isinstance(words, Spoken):
            cosines = (F.normalize(visual, dim=-1) @ table.T).float()
            return spoken_losses((cosines / self.recipe.temperature).log_softmax(dim=-1), words, row_of)
        if not words:  # nothing but common words
            return {}
        rows = torch.tensor([row_of[word] for word in words], device=visual.device)
        said, near = word_loss(visual, rows, table, self.recipe.temperature)
        return {"words": said, "distance": near}

    def _candidates(self, said: Sequence[list[int] | Spoken]) -> tuple[Tensor, dict[int, int]]:
        """Embeddings of all words of the batch and of others drawn by chance; the row of each word."""
        found = (one.words if isinstance(one, Spoken) else one for one in said)
        words = sorted({word for some in found for word in some})
        drawn = torch.randint(len(self._table), (self.recipe.negatives,)).tolist()
        ids = words + sorted(set(drawn) - set(words))
        return self._table[ids], {word: row for row, word in enumerate(words)}


class WarmStart:
    """Words of the answers, or of the scenes, for the loop."""

    def __init__(self, recipe: WarmStartRecipe) -> None:
        self.recipe = recipe
        self.vlm = recipe.model.assemble(recipe.loop.seed)
        self.vlm.projector.requires_grad_(True)
        self.data = ChatData(recipe, self.vlm)
        self.model = WarmStartModel(self.vlm, recipe)
        self._scenes: dict[World, SceneWords] = {}
        self._common = self._in_most_answers() if recipe.words == "answers" else set()

    @property
    def micro_batches(self) -> int:
        """Micro-batches in one epoch."""
        return self.data.micro_batches

    def batch(self, index: int) -> WordBatch:
        """Micro-batch number `index`; raises DataError when it has no clip, or a clip is not of the world."""
        records, seen = self.data.seen(index)
        if not any(seen):
            raise DataError("The warm start needs records with media.")
        pairs = [(record.media, one) for record, one in zip(records, seen, strict=True) if one is not None]
        vision = stack([one for _, one in pairs])
        if self.recipe.words == "scene":
            return WordBatch(vision, [self._spoken(media, one) for media, one in pairs])
        prompts = [prompt for prompt in self.data.prompted(records, seen).prompts if prompt.visuals]
        return WordBatch(vision, [sorted(_answered(prompt) - self._common) for prompt in prompts])

    def _spoken(self, media: Media | None, features: Features) -> Spoken:
        if not isinstance(media, WorldMedia):
            raise DataError("words: scene needs datasets of the demo world; use words: answers.")
        if media.world not in self._scenes:
            self._scenes[media.world] = SceneWords(media.world)
        summary_tokens = self.recipe.model.projector.summary_tokens
        return spoken_by(media, features, summary_tokens, self._scenes[media.world], self._ids_of)

    def _ids_of(self, phrase: str) -> tuple[int, ...]:
        """Ids of a phrase as it stands inside a sentence; fillers like "of" say nothing."""
        words = " ".join(word for word in phrase.split() if word not in FILLERS)
        return tuple(self.vlm.llm.tokenizer(f" {words}", add_special_tokens=False).input_ids) if words else ()

    def _in_most_answers(self) -> set[int]:
        """Ids in so many answers that they tell nothing, and those that end an answer."""
        batches = range(min(COUNTED_BATCHES, self.micro_batches))
        prompts = [prompt for index in batches for prompt in self.data.batch(index).prompts]
        found = Counter(label for prompt in prompts for label in _answered(prompt))
        frequent = {label for label, count in found.items() if count > COMMON_SHARE * len(prompts)}
        return frequent | set(self.vlm.llm.eos_ids)

    def evaluate(self) -> dict[str, float]:
        """Nothing: the loss tells enough."""
        return {}

    def finish(self, out: Path) -> None:
        """Write the model folder, whose projector stage 1 starts from."""
        self.data.flush()
        self.vlm.save_pretrained(out / "model")


def _answered(prompt: Prompt) -> set[int]:
    """The words of a prompt's answers."""
    return {label for label in prompt.labels if label >= 0}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    return run_stage(WarmStartRecipe, WarmStart, "training.warm_start", __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
