"""The words that say what a scene shows: of the whole clip, and of every patch of every frame.

`training.projector_warmup` can draw visual tokens to them. They are not of the paper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from training.synthetic.captions import place_of
from training.synthetic.dataset import World
from training.synthetic.labels import WorldLabels
from training.synthetic.phrases import COUNTING, NUMBERS
from training.synthetic.scene import Motion, Scene, Shot
from training.synthetic.scene_events import change_of, onsets, steady

# The one word by which answers tell a motion from the others.
MOTION_WORDS: Mapping[Motion, str] = {
    "left": "left",
    "right": "right",
    "up": "up",
    "down": "down",
    "circle": "circle",
    "toward": "towards",
    "away": "away",
    "spin": "spins",
    "still": "still",
}
CHANGE_WORDS: Mapping[str | None, str] = {
    None: "same",
    "appears": "appears",
    "vanishes": "disappears",
    "becomes": "turns",
    "starts": "starts",
    "stops": "stops",
}
BACKGROUND = "background"


@dataclass(frozen=True)
class PatchWords:
    """phrases: what patches say. which: (T, rows, columns) int64, the phrase of each patch."""

    phrases: tuple[str, ...]
    which: Tensor


FIXED_PHRASES = 5


class SceneWords:
    """The words of a world's scenes. seconds: patches also say when, as answers do: "five", or "start"."""

    def __init__(self, world: World, *, seconds: bool = False) -> None:
        self._world, self._labels, self._seconds = world, WorldLabels(world), seconds
        self._motions = [MOTION_WORDS[motion] for motion in world.level.motions]
        self._nouns = [world.nouns[code].name for code in self._labels.nouns]

    def clip(self, scene: Scene) -> tuple[str, ...]:
        """FIXED_PHRASES in fixed places (what appears first, how it moves, how many there are, what changes,
        where), empty where there is nothing to say, and then the name of everything that is shown."""
        begins = onsets(scene, self._world.nouns)
        first = begins[0][1] if begins else self._world.nouns[scene.actors[0].code].name
        named = [actor for actor in scene.actors if self._world.nouns[actor.code].name == first]
        moves = " ".join(MOTION_WORDS[motion] for motion in dict.fromkeys(named[0].motions))
        count = NUMBERS[len(scene.actors)] if steady(scene) else ""
        change = CHANGE_WORDS[change_of(scene.actors[0])] if len(scene.actors) == 1 else ""
        places = " ".join(place for shot in scene.shots if (place := _place(shot)))
        shown = dict.fromkeys(self._world.nouns[code].name for code in scene.shown)
        return (first, moves, count, change, places, *shown)

    def patches(self, scene: Scene, times_s: Sequence[float], side: int) -> PatchWords:
        """Each patch of `side` x `side` per frame: the name and motion of the object there, or the place.

        Then, with `seconds`, the whole second of its frame.
        """
        labels = self._labels.patches(scene, times_s, side)
        second = torch.tensor([round(time) if self._seconds else -1 for time in times_s])
        seconds = second[:, None, None].expand_as(labels["noun"])
        facts = torch.stack([labels["noun"], labels["motion"], seconds], dim=-1)
        shot = torch.tensor([scene.shots.index(scene.shot_at(time)) for time in times_s])
        facts[..., 1] += (facts[..., 0] == 0) * shot[:, None, None]  # nothing there: the shot instead
        kinds, which = facts.flatten(0, 2).unique(dim=0, return_inverse=True)
        phrases = [
            " ".join(filter(None, (self._what(scene, noun, other), _second(second))))
            for noun, other, second in kinds.tolist()
        ]
        return PatchWords(tuple(phrases), which.view(labels["noun"].shape))

    def _what(self, scene: Scene, noun: int, other: int) -> str:
        """An object and its motion by their labels; without an object, the place of shot number `other`."""
        if noun:
            return f"{self._nouns[noun - 1]} {self._motions[other - 1]}"
        return _place(scene.shots[other]) or BACKGROUND


def _second(second: int) -> str:
    """The word for a second as answers name it; nothing for -1 and beyond the words."""
    if second == 0:
        return "start"
    return COUNTING[second] if 0 < second < len(COUNTING) else ""


def _place(shot: Shot) -> str:
    """The word for where a shot takes place, or nothing."""
    place = place_of(shot.background)
    return place[0].removeprefix("a ").removeprefix("the ") if place else ""
