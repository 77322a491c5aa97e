"""Warm start of the projector: visual tokens learn to look like the words of the answers.

    python -m training.warm_start --config training/recipes/cpu/warm_start.yaml

Before stage 1, and not of the paper: a frozen language model can read words, so each visual token is drawn to
the input embedding of a word that the answers about its video use, and away from all other words. No forward
pass of the language model is needed, which makes a step twenty times cheaper than one of stage 1. The result
serves as `model.projector_init` of training.chat_stage1.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoder.errors import ConfigError
from llm_bridge.model import VideoLanguageModel
from training.chat import ChatBatch, ChatData
from training.chat_stage1 import Stage1Recipe
from training.command import run_stage

# Words in more than this share of the answers say nothing about a video.
COMMON_SHARE = 0.15
COUNTED_BATCHES = 8


@dataclass(frozen=True, kw_only=True)
class WarmStartRecipe(Stage1Recipe):
    """temperature: of the softmax over words. pull: weight of the distance to the nearest word of the answer.
    negatives: words of the vocabulary, drawn anew for each batch, that the tokens must not say.
    """

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


class WarmStartModel(nn.Module):
    """The projector in front of a language model's table of word embeddings."""

    def __init__(self, vlm: VideoLanguageModel, common: set[int], recipe: WarmStartRecipe) -> None:
        super().__init__()
        self.vlm, self.common, self.recipe = vlm, common, recipe
        table = vlm.llm.model.get_input_embeddings().weight.detach()
        self._norm = table.float().norm(dim=-1).mean()
        self._table = F.normalize(table.float(), dim=-1).to(table.dtype)

    def forward(self, batch: ChatBatch) -> tuple[Tensor, dict[str, float]]:
        """(loss, figures) over the clips of a batch."""
        assert batch.vision is not None
        visuals = self.vlm.project(batch.vision)
        prompts = [prompt for prompt in batch.prompts if prompt.visuals]
        answers = [sorted({label for label in p.labels if label >= 0} - self.common) for p in prompts]
        table, row_of = self._candidates(answers)
        parts: list[tuple[Tensor, Tensor]] = []
        for visual, words in zip(visuals, answers, strict=True):
            if words:
                rows = torch.tensor([row_of[word] for word in words], device=visual.device)
                parts.append(word_loss(visual.to(table), rows, table, self.recipe.temperature))
        if not parts:  # nothing but common words
            return 0.0 * torch.cat(visuals).sum(), {}
        length = torch.cat(visuals).float().norm(dim=-1) / self._norm - 1
        said, near = (torch.stack(losses).mean() for losses in zip(*parts, strict=True))
        loss = said + self.recipe.pull * near + length.square().mean()
        return loss, {"words": said.item(), "distance": near.item()}

    def _candidates(self, answers: Sequence[Sequence[int]]) -> tuple[Tensor, dict[int, int]]:
        """Embeddings of all words of the batch and of others drawn by chance; the row of each word."""
        words = sorted({word for answer in answers for word in answer})
        drawn = torch.randint(len(self._table), (self.recipe.negatives,)).tolist()
        ids = words + sorted(set(drawn) - set(words))
        return self._table[ids], {word: row for row, word in enumerate(words)}


class WarmStart:
    """Words of the answers for the loop."""

    def __init__(self, recipe: WarmStartRecipe) -> None:
        self.vlm = recipe.model.assemble(recipe.loop.seed)
        self.vlm.projector.requires_grad_(True)
        self.data = ChatData(recipe, self.vlm)
        self.model = WarmStartModel(self.vlm, self._common(), recipe)

    @property
    def micro_batches(self) -> int:
        """Micro-batches in one epoch."""
        return self.data.micro_batches

    def batch(self, index: int) -> ChatBatch:
        """Micro-batch number `index`."""
        return self.data.batch(index)

    def _common(self) -> set[int]:
        """Ids in so many answers that they tell nothing, and those that end an answer."""
        prompts = [p for i in range(min(COUNTED_BATCHES, self.micro_batches)) for p in self.batch(i).prompts]
        found = Counter(label for prompt in prompts for label in set(prompt.labels) if label >= 0)
        frequent = {label for label, count in found.items() if count > COMMON_SHARE * len(prompts)}
        return frequent | set(self.vlm.llm.eos_ids)

    def evaluate(self) -> dict[str, float]:
        """Nothing: the loss tells enough."""
        return {}

    def finish(self, out: Path) -> None:
        """Write the model folder, whose projector stage 1 starts from."""
        self.data.flush()
        self.vlm.save_pretrained(out / "model")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    return run_stage(WarmStartRecipe, WarmStart, "training.warm_start", __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
