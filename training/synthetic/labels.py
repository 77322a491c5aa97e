"""What a scene shows, as class numbers: of the whole clip, and of every patch of every frame.

Flux-CLIP on the synthetic world can learn them beside the captions. Neither is of the paper.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from training.synthetic.dataset import Sample, World
from training.synthetic.questions import MOST_OBJECTS
from training.synthetic.scene import Scene, opacity_at, pose_at
from training.synthetic.scene_events import change_of, events_of, least_gap, onsets, steady

UNKNOWN = -100  # what cross_entropy leaves out
CHANGES = ("same", "appears", "vanishes", "becomes", "starts", "stops")
EVENT_PARTS = 10
# A patch belongs to the object whose middle part, this share of its size, covers the patch's centre.
COVERS = 0.4


class WorldLabels:
    """The labels of a world's samples.

    clip_classes, patch_classes: class count by attribute, of the clip and of its patches. Attributes of a
    clip are "noun" (a distribution over everything shown), "motion" (of a lone object), "count", "first"
    (which of several appears first), "change" (of a lone object), "event" (the tenth of the clip in which
    the one thing that happens does). Of a patch: "noun" and "motion", 0 where there is no object.
    """

    def __init__(self, world: World) -> None:
        codes = sorted({noun.code for noun in world.pool})
        self.nouns = {code: number for number, code in enumerate(codes)}
        self.motions = {str(motion): number for number, motion in enumerate(world.level.motions)}
        self._names = {world.nouns[code].name: number for code, number in self.nouns.items()}
        self._world = world
        self.clip_classes = {"noun": len(self.nouns), "motion": len(self.motions)}
        if world.level.plots != ("solo",):
            self.clip_classes |= {
                "count": MOST_OBJECTS,
                "first": len(self.nouns),
                "change": len(CHANGES),
                "event": EVENT_PARTS,
            }
        self.patch_classes = {"noun": 1 + len(self.nouns), "motion": 1 + len(self.motions)}

    def clips(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """(B,) class numbers with UNKNOWN where the question has no answer; "noun" (B, nouns) shares."""
        scenes = [sample.scene for sample in samples]
        classes = {
            "motion": [self._motion(scene) for scene in scenes],
            "count": [len(scene.actors) - 1 if steady(scene) else UNKNOWN for scene in scenes],
            "first": [self._first(scene) for scene in scenes],
            "change": [_change(scene) for scene in scenes],
            "event": [_event(scene) for scene in scenes],
        }
        labels = {name: torch.tensor(values) for name, values in classes.items() if name in self.clip_classes}
        return {"noun": torch.stack([self._shown(scene) for scene in scenes])} | labels

    def _shown(self, scene: Scene) -> Tensor:
        shares = torch.zeros(len(self.nouns))
        shown = [self.nouns[code] for code in scene.shown]
        shares[shown] = 1 / len(shown)
        return shares

    def _motion(self, scene: Scene) -> int:
        actors = scene.actors
        alone = len(actors) == 1 and len(actors[0].motions) == 1
        return self.motions[actors[0].motions[0]] if alone else UNKNOWN

    def _first(self, scene: Scene) -> int:
        begins = onsets(scene, self._world.nouns)
        if len(begins) < 2 or len(begins) < len(scene.actors):
            return UNKNOWN
        clear = begins[1][0] - begins[0][0] >= least_gap(scene)
        return self._names[begins[0][1]] if clear else UNKNOWN

    def patches(self, scene: Scene, times_s: Sequence[float], side: int) -> dict[str, Tensor]:
        """(T, side, side) class numbers by patch attribute, for a square frame of side x side patches."""
        centres = (torch.arange(side) + 0.5) / side
        nouns = torch.zeros(len(times_s), side, side, dtype=torch.int64)
        motions = torch.zeros_like(nouns)
        for frame, time_s in enumerate(times_s):
            for actor in scene.shot_at(time_s).actors:  # later ones lie above
                if opacity_at(actor, time_s) < 0.5:
                    continue
                pose = pose_at(actor, time_s)
                across, down = ((centres - at).abs() <= COVERS * pose.size for at in (pose.x, pose.y))
                covered = down[:, None] & across[None, :]
                nouns[frame][covered] = 1 + self.nouns[actor.code_at(time_s)]
                motions[frame][covered] = 1 + self.motions[actor.phase_at(time_s).motion]
        return {"noun": nouns, "motion": motions}


def _change(scene: Scene) -> int:
    if len(scene.actors) != 1 or len(scene.actors[0].motions) > 1:
        return UNKNOWN
    return CHANGES.index(change_of(scene.actors[0]) or "same")


def _event(scene: Scene) -> int:
    """The part of the clip in which its only event lies."""
    times = [event.at_s for event in events_of(scene)]
    if len(times) != 1:
        return UNKNOWN
    return min(int(times[0] / scene.duration_s * EVENT_PARTS), EVENT_PARTS - 1)
