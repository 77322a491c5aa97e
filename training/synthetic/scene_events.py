"""What happens in a scene, and when: what appears first, what changes, what is there throughout."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from training.synthetic.nouns import Nouns
from training.synthetic.scene import Actor, Motion, Scene

# Two onsets closer than this (share of the video, seconds) cannot be told apart.
APART_SHARE, APART_S = 0.1, 0.7


def steady(scene: Scene) -> bool:
    """Whether the same things, each with one motion, are there from start to end."""
    calm = all(
        len(a.phases) == 1 and not (a.becomes or a.starts_inside or a.ends_inside) for a in scene.actors
    )
    return len(scene.shots) == 1 and calm


def least_gap(scene: Scene) -> float:
    """Seconds by which two onsets must differ for their order to be seen."""
    return max(APART_S, APART_SHARE * scene.duration_s)


def onsets(scene: Scene, nouns: Nouns) -> list[tuple[float, str]]:
    """When everything that its name alone identifies can first be seen, earliest first: (seconds, name)."""
    codes = [actor.code for actor in scene.actors]
    return sorted(
        (shot.presence(actor)[0], nouns[actor.code].name)
        for shot in scene.shots
        for actor in shot.actors
        if codes.count(actor.code) == 1
    )


@dataclass(frozen=True)
class SceneEvent:
    """Something that happens at a moment: a cut (actor None), or what an actor does; motion: a new one."""

    at_s: float
    actor: Actor | None
    kind: Literal["cut", "appears", "vanishes", "becomes", "moves", "rests"]
    motion: Motion | None = None


def events_of(scene: Scene) -> list[SceneEvent]:
    """All that happens in a scene, actor by actor, then the cuts."""
    events = []
    for actor in scene.actors:
        if actor.starts_inside:
            events.append(SceneEvent(actor.appear_s, actor, "appears"))
        if actor.ends_inside:
            events.append(SceneEvent(actor.disappear_s, actor, "vanishes"))
        if actor.becomes:
            events.append(SceneEvent(actor.becomes_s, actor, "becomes"))
        for before, after in pairwise(actor.phases):
            kind: Literal["moves", "rests"] = "rests" if after.motion == "still" else "moves"
            events.append(SceneEvent(before.end_s, actor, kind, after.motion))
    return events + [SceneEvent(shot.start_s, None, "cut") for shot in scene.shots[1:]]


def change_of(actor: Actor) -> str | None:
    """The one change of state of an actor, or None."""
    if actor.becomes:
        return "becomes"
    if actor.ends_inside:
        return "vanishes"
    if actor.starts_inside:
        return "appears"
    if len(actor.phases) == 2 and "still" in (actor.phases[0].motion, actor.phases[1].motion):
        return "starts" if actor.phases[0].motion == "still" else "stops"
    return None
