"""Projector warm-up: visual tokens are drawn to the embeddings of the words of the answers.

    python -m training.projector_warmup --config training/recipes/cpu/projector_warmup.yaml

Before stage 1, and not of the paper: a frozen language model can read words, so each visual token is drawn to
the input embedding of a word that the answers about its video use, and away from all other words. On the demo
world `words: scene` gives each token a target of its own: what its patch shows. No forward pass of the
language model is needed, which makes a step twenty times cheaper than one of stage 1. The result serves as
`model.projector_init` of training.chat_stage1.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoder.errors import ConfigError, DataError
from encoder.tokens import VisionTokens
from llm_bridge.model import VideoLanguageModel
from llm_bridge.prompt import Prompt
from training.chat_stage1 import Stage1Recipe
from training.data.chat_batches import ChatData
from training.data.feature_cache import stack
from training.models.token_targets import (
    NEGATIVES,
    TEMPERATURE,
    SceneTargets,
    TokenTargets,
    WordTable,
    target_losses,
)
from training.trainer.command import run_stage

# Words in more than this share of the answers say nothing about a video.
COMMON_SHARE = 0.15
COUNTED_BATCHES = 8


@dataclass(frozen=True, kw_only=True)
class ProjectorWarmupRecipe(Stage1Recipe):
    """What the warm-up reads beside the keys of stage 1; a key that it would not read is refused.

    words: those of the "answers", each the target of the token that is nearest to it, or those of the
    "scene" (synthetic world only): what each token's patch shows, and for the summary tokens what happens.
    temperature: of the softmax over words. pull: weight of the distance to the nearest word of the answer.
    negatives: words of the vocabulary, drawn anew for each batch, from which the tokens are pushed away.
    """

    stage: ClassVar[str] = "projector_warmup"
    words: Literal["answers", "scene"] = "answers"
    negatives: int = NEGATIVES
    temperature: float = TEMPERATURE
    pull: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.temperature > 0:
            raise ConfigError(f"temperature must be positive, not {self.temperature}.")
        unread = {
            "weighting": self.weighting != "token",
            "held_out": bool(self.held_out),
            "model.gradient_checkpointing": self.model.gradient_checkpointing,  # no language model runs
        }
        for name, given in unread.items():
            if given:
                raise ConfigError(f"The projector warm-up does not read {name}: leave it out.")
        if self.words == "scene":  # no text is made of the answers
            for name in ("pull", "template", "max_length"):
                if getattr(self, name) != getattr(ProjectorWarmupRecipe, name):
                    raise ConfigError(
                        f"The projector warm-up with words: scene does not read {name}: leave it out."
                    )


def word_loss(visual: Tensor, words: Tensor, table: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(cross-entropy of one clip's words, mean distance of its tokens from the nearest of them).

    visual: (M, D). words: (W,) rows of table, (V, D) unit embeddings to choose from. Each token is a
    distribution over them; a word counts by the token that gives it the most.
    """
    unit = F.normalize(visual, dim=-1)
    cosines = (unit @ table.T).float()  # [M, V]
    best = (cosines / temperature).log_softmax(dim=-1)[:, words].max(dim=0).values
    return -best.mean(), (1 - cosines[:, words].max(dim=1).values).mean()


@dataclass(frozen=True)
class WordBatch:
    """Clips, and per clip the words of its answers, or the targets of its tokens."""

    vision: VisionTokens
    words: Sequence[list[int]] = ()
    targets: Sequence[TokenTargets] = ()


class ProjectorWarmupModel(nn.Module):
    """The projector in front of a language model's table of word embeddings."""

    def __init__(self, vlm: VideoLanguageModel, recipe: ProjectorWarmupRecipe) -> None:
        super().__init__()
        self._vlm, self.recipe = (vlm,), recipe  # a tuple keeps the frozen parts out of the module tree
        self.vlm = nn.ModuleDict({"projector": vlm.projector})
        self._table = WordTable(vlm.llm, recipe.negatives)

    def forward(self, batch: WordBatch) -> tuple[Tensor, dict[str, float | Tensor]]:
        """(loss, figures) over the clips of a batch."""
        visuals = self._vlm[0].project(batch.vision)
        if batch.targets:
            means = target_losses(visuals, batch.targets, self._table, self.recipe.temperature)
        else:
            means = self._answer_losses(visuals, batch.words)
        length = torch.cat(visuals).float().norm(dim=-1) / self._table.norm - 1
        weights = {"distance": self.recipe.pull}
        loss = length.square().mean() + sum(weights.get(name, 1.0) * value for name, value in means.items())
        return loss, {name: value.detach() for name, value in means.items()}

    def _answer_losses(self, visuals: Sequence[Tensor], words: Sequence[list[int]]) -> dict[str, Tensor]:
        """Means of `word_loss`; nothing when no clip has any but common words."""
        table, row_of = self._table.candidates(word for some in words for word in some)
        pairs = [
            word_loss(
                visual.to(table),
                torch.tensor([row_of[word] for word in some], device=visual.device),
                table,
                self.recipe.temperature,
            )
            for visual, some in zip(visuals, words, strict=True)
            if some
        ]
        return {
            name: torch.stack(values).mean()
            for name, values in zip(("words", "distance"), zip(*pairs, strict=True), strict=False)
        }


class ProjectorWarmupStage:
    """The projector alone learns, from words of the answers or of the scenes."""

    def __init__(self, recipe: ProjectorWarmupRecipe) -> None:
        self.recipe = recipe
        self.vlm = recipe.model.assemble(recipe.loop.seed)
        self.vlm.projector.requires_grad_(True)
        self.data = ChatData(recipe, self.vlm)
        self.model = ProjectorWarmupModel(self.vlm, recipe)
        self._targets = SceneTargets(self.vlm)
        self._common = self._in_most_answers() if recipe.words == "answers" else set()

    @property
    def micro_batches(self) -> int:
        """Micro-batches in one epoch."""
        return self.data.micro_batches

    def batch(self, index: int) -> WordBatch:
        """Micro-batch number `index`; raises DataError when it has no clip, or a clip is not of the world."""
        examples, features = self.data.encoded(index)
        if not any(features):
            raise DataError("The projector warm-up needs examples with media.")
        pairs = [
            (example.media, one) for example, one in zip(examples, features, strict=True) if one is not None
        ]
        vision = stack([one for _, one in pairs])
        if self.recipe.words == "scene":
            return WordBatch(vision, targets=[self._targets.of(media, one) for media, one in pairs])
        prompts = [prompt for prompt in self.data.prompted(examples, features).prompts if prompt.visuals]
        return WordBatch(vision, [sorted(_answered(prompt) - self._common) for prompt in prompts])

    def _in_most_answers(self) -> set[int]:
        """Ids in so many answers that they say nothing of one video, and those that end an answer."""
        batches = range(min(COUNTED_BATCHES, self.micro_batches))
        prompts = [prompt for index in batches for prompt in self.data.batch(index).prompts]
        counts = Counter(label for prompt in prompts for label in _answered(prompt))
        frequent = {label for label, count in counts.items() if count > COMMON_SHARE * len(prompts)}
        return frequent | set(self.vlm.llm.eos_ids)

    def evaluate(self) -> dict[str, float]:
        """No figures besides the loss."""
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
    return run_stage(ProjectorWarmupRecipe, ProjectorWarmupStage, "training.projector_warmup", __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
