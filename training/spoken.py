"""What visual tokens should say in the words of a language model, and how badly they say it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from training.data.features import Features
from training.data.media import WorldMedia
from training.demo_world.scene_words import FIXED_PHRASES, SceneWords

WordIds = tuple[int, ...]


@dataclass(frozen=True)
class Spoken:
    """What the tokens of one clip should say, as word ids.

    summary, patches: (token, words) of summary tokens and of patch tokens, which say all of the words.
    shared: (first, last, words); one of the tokens from `first` to before `last`, whichever says them best.
    """

    summary: tuple[tuple[int, WordIds], ...]
    patches: tuple[tuple[int, WordIds], ...]
    shared: tuple[tuple[int, int, WordIds], ...]

    @property
    def words(self) -> set[int]:
        """All of them."""
        told = [words for _, words in (*self.summary, *self.patches)]
        return {word for words in (*told, *(words for _, _, words in self.shared)) for word in words}


def spoken_by(
    media: WorldMedia,
    features: Features,
    summary_tokens: int,
    words: SceneWords,
    ids_of: Callable[[str], WordIds],
) -> Spoken:
    """What each visual token of a clip of the demo world shows.

    Summary tokens come first: FIXED_PHRASES of them have a phrase of their own (see SceneWords.clip), the
    others share the names of what is shown; with fewer, all of them share everything. Then come the tokens of
    the kept patches. ids_of: the ids of a phrase.
    """
    scene = media.sample.scene
    phrases = [ids_of(phrase) for phrase in words.clip(scene)]
    fixed = FIXED_PHRASES if summary_tokens > FIXED_PHRASES else 0
    summary = [(token, ids) for token, ids in enumerate(phrases[:fixed]) if ids]
    shared = [(fixed, summary_tokens, ids) for ids in phrases[fixed:] if ids and summary_tokens]
    seen = words.patches(scene, features.times_s, features.grid.width)
    ids_by_kind = [ids_of(phrase) for phrase in seen.phrases]
    kinds = seen.which.flatten()[features.kept.long()].tolist()
    patches = [(summary_tokens + place, ids_by_kind[kind]) for place, kind in enumerate(kinds)]
    return Spoken(tuple(summary), tuple(patches), tuple(shared))


def spoken_losses(scores: Tensor, spoken: Spoken, row_of: dict[int, int]) -> dict[str, Tensor]:
    """Mean negative log-probability of what the tokens of a clip should say, by kind; absent kinds left out.

    scores: (M, V) log-probabilities of the clip's tokens over candidate words; row_of: the candidate's column
    of each word id. What is said of a phrase is the mean over its words.
    """
    losses = {}
    for kind, told in (("summary", spoken.summary), ("patches", spoken.patches)):
        if told:
            tokens = torch.tensor([token for token, ids in told for _ in ids])
            columns = torch.tensor([row_of[word] for _, ids in told for word in ids])
            shares = torch.tensor([1 / len(ids) for _, ids in told for _ in ids], device=scores.device)
            losses[kind] = -(scores[tokens, columns] * shares).sum() / len(told)
    if spoken.shared:
        best = [
            scores[first:last, [row_of[word] for word in ids]].mean(dim=1).max()
            for first, last, ids in spoken.shared
        ]
        losses["shared"] = -torch.stack(best).mean()
    return losses
