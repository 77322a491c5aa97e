"""Scene: a pure description of a video - who is where, when, over what - and its geometry.

Times are seconds from the start of the video. Positions are fractions of the frame's width and height,
sizes and radii fractions of its shorter side, so that one scene renders alike at any resolution.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

Motion = Literal["still", "left", "right", "up", "down", "circle", "toward", "away", "spin"]
MOTIONS: tuple[Motion, ...] = get_args(Motion)
DIRECTIONS: tuple[Motion, ...] = ("left", "right", "up", "down")
FADE_S = 0.25


@dataclass(frozen=True)
class Pose:
    """Centre (x, y), size and rotation in degrees (counter-clockwise) of one object."""

    x: float
    y: float
    size: float
    angle: float = 0.0


@dataclass(frozen=True)
class Phase:
    """One motion from `start` to `end` between two times; a circle leaves `start` and comes back.

    `radius`, `turns` (signed) and `start_angle` (radians, where on the circle `start` lies) belong to
    circles alone.
    """

    motion: Motion
    start_s: float
    end_s: float
    start: Pose
    end: Pose
    radius: float = 0.0
    turns: float = 0.0
    start_angle: float = 0.0


@dataclass(frozen=True)
class Actor:
    """One object: its sprite code, its motions in order, and when it can be seen.

    `appear_s` 0.0 and `disappear_s` infinity mean the borders of its shot. `flip` mirrors the sprite; from
    `becomes_s` on the sprite `becomes` is drawn in its place.
    """

    code: str
    phases: tuple[Phase, ...]
    appear_s: float = 0.0
    disappear_s: float = math.inf
    flip: bool = False
    becomes: str | None = None
    becomes_s: float = math.inf

    def code_at(self, time_s: float) -> str:
        """The sprite drawn at a time."""
        return self.becomes if self.becomes is not None and time_s >= self.becomes_s else self.code

    def phase_at(self, time_s: float) -> Phase:
        """What it does at a time; times outside its phases give the first or last one."""
        return next((phase for phase in self.phases if time_s < phase.end_s), self.phases[-1])

    @property
    def starts_inside(self) -> bool:
        """Whether it appears after the start of its shot."""
        return self.appear_s > 0.0

    @property
    def ends_inside(self) -> bool:
        """Whether it disappears before the end of its shot."""
        return math.isfinite(self.disappear_s)

    @property
    def motions(self) -> tuple[Motion, ...]:
        """The motions in order, standing still left out unless there is nothing else."""
        moving = tuple(phase.motion for phase in self.phases if phase.motion != "still")
        return moving or ("still",)


@dataclass(frozen=True)
class Background:
    """What lies behind: a kind that backgrounds.py can paint, its seed, and for photographs the name."""

    kind: str
    seed: int
    photo: str | None = None


@dataclass(frozen=True)
class Shot:
    """A stretch of the video between two cuts.

    `pan` is how far the background drifts (fractions of the frame) during the shot; `light` multiplies red,
    green and blue. Later actors are drawn over earlier ones.
    """

    start_s: float
    end_s: float
    background: Background
    actors: tuple[Actor, ...]
    pan: tuple[float, float] = (0.0, 0.0)
    light: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def presence(self, actor: Actor) -> tuple[float, float]:
        """From when to when an actor is there, in seconds of the video."""
        return max(self.start_s, actor.appear_s), min(self.end_s, actor.disappear_s)


@dataclass(frozen=True)
class Scene:
    """A whole video. `noise`: amplitude in grey levels; `jpeg`: quality 1-95 or None."""

    duration_s: float
    shots: tuple[Shot, ...]
    seed: int
    noise: int = 0
    jpeg: int | None = None

    def shot_at(self, time_s: float) -> Shot:
        """The shot on screen at a time; times outside the video give the first or last one."""
        return next((shot for shot in self.shots if time_s < shot.end_s), self.shots[-1])

    @property
    def actors(self) -> tuple[Actor, ...]:
        """All actors of all shots."""
        return tuple(actor for shot in self.shots for actor in shot.actors)

    @property
    def shown(self) -> tuple[str, ...]:
        """The codes of everything that can be seen at some time, each once, as captions tell of it."""
        actors = [actor for shot in self.shots for actor in largest_first(shot)]
        codes = [code for actor in actors for code in (actor.code, actor.becomes) if code]
        return tuple(dict.fromkeys(codes))


def pose_at(actor: Actor, time_s: float, aspect: float = 1.0) -> Pose:
    """Where an actor is at a time, visible or not; `aspect` = width / height keeps circles round."""
    phase = actor.phase_at(time_s)
    u = min(max((time_s - phase.start_s) / max(phase.end_s - phase.start_s, 1e-9), 0.0), 1.0)
    start, end = phase.start, phase.end
    x, y = start.x + u * (end.x - start.x), start.y + u * (end.y - start.y)
    if phase.motion == "circle":
        angle = phase.start_angle + 2 * math.pi * phase.turns * u
        x += phase.radius * (math.cos(angle) - math.cos(phase.start_angle)) / max(aspect, 1.0)
        y += phase.radius * (math.sin(angle) - math.sin(phase.start_angle)) * min(aspect, 1.0)
    # Equal ratios in equal times: that is how approaching at constant speed looks steady to the eye.
    size = start.size * (end.size / start.size) ** u
    return Pose(x, y, size, start.angle + u * (end.angle - start.angle))


def largest_first(shot: Shot) -> list[Actor]:
    """The actors of a shot as a viewer would list them: by when they appear, of those together the largest.

    Sizes are those in the middle of the time that each is there.
    """

    def rank(actor: Actor) -> tuple[float, float]:
        start_s, end_s = shot.presence(actor)
        return start_s, -pose_at(actor, (start_s + end_s) / 2).size

    return sorted(shot.actors, key=rank)


def opacity_at(actor: Actor, time_s: float) -> float:
    """0.0 (not there) to 1.0; objects fade in and out over FADE_S, but not at the borders of a shot."""
    if not actor.appear_s <= time_s < actor.disappear_s:
        return 0.0
    rising = (time_s - actor.appear_s) / FADE_S if actor.starts_inside else 1.0
    falling = (actor.disappear_s - time_s) / FADE_S
    return max(0.0, min(1.0, rising, falling))


def visible_fraction(shot: Shot, actor: Actor, time_s: float) -> float:
    """How much of an actor's square lies in the frame and under no later actor's; 0.0 while it is not there.

    A lower bound: where two others cover the same part, it counts twice. Judged in a square frame.
    """
    if opacity_at(actor, time_s) < 0.5:
        return 0.0
    box = _box(pose_at(actor, time_s))
    area = (box[2] - box[0]) * (box[3] - box[1])
    seen = _overlap(box, (0.0, 0.0, 1.0, 1.0))
    for other in shot.actors[shot.actors.index(actor) + 1 :]:
        if opacity_at(other, time_s) > 0.25:
            seen -= _overlap(box, _box(pose_at(other, time_s)))
    return max(0.0, seen / area)


def _box(pose: Pose) -> tuple[float, float, float, float]:
    """The inner square that most sprites fill: left, top, right, bottom."""
    half = 0.42 * pose.size
    return pose.x - half, pose.y - half, pose.x + half, pose.y + half


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """The area that two boxes share."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(0.0, width) * max(0.0, height)
