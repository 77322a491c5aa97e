"""Token targets: the words that visual tokens should be near in a language model's embeddings, and the loss.

`training.projector_warmup` learns nothing else; `training.chat_lora` can learn it beside the answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from encoder.errors import DataError
from llm_bridge.llm import LanguageModel
from llm_bridge.model import VideoLanguageModel
from training.data.feature_cache import Features
from training.data.media import Media, WorldMedia
from training.synthetic.dataset import World
from training.synthetic.scene_words import FIXED_PHRASES, SceneWords

WordIds = tuple[int, ...]
NEGATIVES, TEMPERATURE = 2048, 0.05
TARGET_KINDS = ("summary", "patches", "shared")
FILLERS = frozenset({"of", "a", "pair", "piece", "set"})


@dataclass(frozen=True)
class TokenTargets:
    """Targets of one clip's visual tokens, as word ids.

    summary, patches: (token, words) of summary tokens and of patch tokens, whose target is all of the words.
    shared: (first, last, words): the target of that token from `first` to before `last` which is nearest.
    """

    summary: tuple[tuple[int, WordIds], ...]
    patches: tuple[tuple[int, WordIds], ...]
    shared: tuple[tuple[int, int, WordIds], ...]

    @property
    def words(self) -> set[int]:
        """All of them."""
        of_one_token = [words for _, words in (*self.summary, *self.patches)]
        return {word for words in (*of_one_token, *(words for _, _, words in self.shared)) for word in words}


def scene_targets(
    media: WorldMedia,
    features: Features,
    summary_tokens: int,
    words: SceneWords,
    ids_of: Callable[[str], WordIds],
) -> TokenTargets:
    """What each visual token of a clip of the synthetic world shows, as targets.

    Summary tokens come first: FIXED_PHRASES of them have a phrase of their own (see SceneWords.clip), the
    others share the names of what is shown; with fewer, all of them share everything. Then come the tokens of
    the kept patches. ids_of: the ids of a phrase.
    """
    scene = media.sample.scene
    phrases = [ids_of(phrase) for phrase in words.clip(scene)]
    fixed = FIXED_PHRASES if summary_tokens > FIXED_PHRASES else 0
    summary = [(token, ids) for token, ids in enumerate(phrases[:fixed]) if ids]
    shared = [(fixed, summary_tokens, ids) for ids in phrases[fixed:] if ids and summary_tokens]
    shown = words.patches(scene, features.times_s, features.grid.width)
    ids_by_kind = [ids_of(phrase) for phrase in shown.phrases]
    kinds = shown.which.flatten()[features.kept.long()].tolist()
    patches = [(summary_tokens + place, ids_by_kind[kind]) for place, kind in enumerate(kinds)]
    return TokenTargets(tuple(summary), tuple(patches), tuple(shared))


def kinds_of(targets: Sequence[TokenTargets]) -> dict[str, int]:
    """By kind of target, the clips that have some."""
    counts = {kind: sum(bool(getattr(one, kind)) for one in targets) for kind in TARGET_KINDS}
    return {kind: count for kind, count in counts.items() if count}


def clip_losses(scores: Tensor, targets: TokenTargets, column_of: dict[int, int]) -> dict[str, Tensor]:
    """Mean negative log-probability of the targets of one clip, by kind; absent kinds are left out.

    scores: (M, V) log-probabilities of the clip's tokens over candidate words; column_of: the column of each
    word id. The log-probability of a phrase is the mean over its words.
    """
    losses = {}
    for kind, pairs in (("summary", targets.summary), ("patches", targets.patches)):
        if pairs:
            tokens = torch.tensor([token for token, ids in pairs for _ in ids])
            columns = torch.tensor([column_of[word] for _, ids in pairs for word in ids])
            shares = torch.tensor([1 / len(ids) for _, ids in pairs for _ in ids], device=scores.device)
            losses[kind] = -(scores[tokens, columns] * shares).sum() / len(pairs)
    if targets.shared:
        best = [
            scores[first:last, [column_of[word] for word in ids]].mean(dim=1).max()
            for first, last, ids in targets.shared
        ]
        losses["shared"] = -torch.stack(best).mean()
    return losses


class WordTable:
    """Input embeddings of a language model's words, as unit vectors.

    norm: their mean length. negatives: words drawn anew for each batch, from which tokens are pushed away.
    """

    def __init__(self, llm: LanguageModel, negatives: int = NEGATIVES) -> None:
        table = llm.model.get_input_embeddings().weight.detach()
        self.norm = table.float().norm(dim=-1).mean()
        self.negatives = negatives
        self._table = F.normalize(table.float(), dim=-1).to(table.dtype)

    def candidates(self, words: Iterable[int]) -> tuple[Tensor, dict[int, int]]:
        """(V, D) embeddings of these words and of others drawn by chance; the row of each of these words."""
        wanted = sorted(set(words))
        drawn = torch.randint(len(self._table), (self.negatives,)).tolist()
        ids = wanted + sorted(set(drawn) - set(wanted))
        return self._table[ids], {word: row for row, word in enumerate(wanted)}


class SceneTargets:
    """Targets of clips of the synthetic world for a model's visual tokens."""

    def __init__(self, vlm: VideoLanguageModel) -> None:
        self._tokenizer = vlm.llm.tokenizer
        self._summary_tokens = vlm.config.projector.summary_tokens
        self._seconds = vlm.config.projector.time_periods > 0
        self._scenes: dict[World, SceneWords] = {}

    def of(self, media: Media | None, features: Features) -> TokenTargets:
        """Those of one clip; raises DataError for media that are not of the world."""
        if not isinstance(media, WorldMedia):
            raise DataError(
                "The words of scenes need datasets of the synthetic world: name such, or learn without them."
            )
        if media.world not in self._scenes:
            self._scenes[media.world] = SceneWords(media.world, seconds=self._seconds)
        return scene_targets(media, features, self._summary_tokens, self._scenes[media.world], self._ids_of)

    def _ids_of(self, phrase: str) -> WordIds:
        """Ids of a phrase as it stands inside a sentence; fillers like "of" say nothing."""
        words = " ".join(word for word in phrase.split() if word not in FILLERS)
        return tuple(self._tokenizer(f" {words}", add_special_tokens=False).input_ids) if words else ()


def target_losses(
    visuals: Sequence[Tensor],
    targets: Sequence[TokenTargets],
    table: WordTable,
    temperature: float = TEMPERATURE,
) -> dict[str, Tensor]:
    """Means over clips of `clip_losses`, for the embeddings (M_i, D) of each."""
    words, column_of = table.candidates(word for one in targets for word in one.words)
    losses: dict[str, list[Tensor]] = {}
    for visual, one in zip(visuals, targets, strict=True):
        cosines = (F.normalize(visual.to(words), dim=-1) @ words.T).float()
        scores = (cosines / temperature).log_softmax(dim=-1)
        for name, value in clip_losses(scores, one, column_of).items():
            losses.setdefault(name, []).append(value)
    return {name: torch.stack(values).mean() for name, values in losses.items()}
