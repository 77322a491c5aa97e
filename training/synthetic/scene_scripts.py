"""Scene scripts: how a scene of one or several objects, a sequence, a change or a cut comes about."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from training.synthetic.nouns import Noun
from training.synthetic.scene import (
    Actor,
    Background,
    Motion,
    Phase,
    Pose,
    Scene,
    Shot,
    opacity_at,
    visible_fraction,
)
from training.synthetic.stage import Cell, Path, Stage, shows

# Where objects have room of their own, by how many there are.
CELLS: Mapping[int, Sequence[Sequence[Cell]]] = {
    1: (((0.5, 0.5),),),
    2: (
        ((0.27, 0.5), (0.73, 0.5)),
        ((0.5, 0.27), (0.5, 0.73)),
        ((0.28, 0.3), (0.72, 0.7)),
        ((0.28, 0.7), (0.72, 0.3)),
    ),
    3: (((0.27, 0.28), (0.73, 0.28), (0.5, 0.74)), ((0.27, 0.72), (0.73, 0.72), (0.5, 0.26))),
    4: (((0.26, 0.26), (0.74, 0.26), (0.26, 0.74), (0.74, 0.74)),),
}
SHRINK = {1: 1.0, 2: 0.85, 3: 0.72, 4: 0.64}
TRIES = 12
# What must be seen of every object, and for which share of its presence.
SEEN, SEEN_SHARE = 0.55, 0.75


def solo(stage: Stage, rng: random.Random, motion_rng: random.Random, motion: Motion | None = None) -> Scene:
    """One object with one motion. Everything but the motion comes from `rng`."""
    noun = stage.pick(rng, 1)[0]
    duration_s = stage.duration(rng)
    start_s, end_s = rng.uniform(0.0, 0.12) * duration_s, rng.uniform(0.88, 1.0) * duration_s
    path = Path.draw(rng, rng.uniform(*stage.config.size))
    flip = rng.random() < 0.5
    actor = Actor(
        noun.code, (path.phase(motion or stage.motion(motion_rng, noun), start_s, end_s),), flip=flip
    )
    return stage.finish(rng, duration_s, [stage.flat_shot(rng, 0.0, duration_s, [actor])])


def _moving(stage: Stage, rng: random.Random, noun: Noun, share_still: float) -> Motion:
    """Still with the given chance (when the world knows stillness), else some motion."""
    if "still" in stage.config.motions and rng.random() < share_still:
        return "still"
    return stage.motion(rng, noun)


def _some_moving(stage: Stage, rng: random.Random, nouns: Sequence[Noun]) -> list[Motion]:
    """One motion per noun; how many of them move is nearly uniform, all of them somewhat more often."""
    count = len(nouns)
    movers = rng.choices(range(count + 1), [1] * count + [2])[0] if "still" in stage.config.motions else count
    chosen = set(rng.sample(range(count), movers))
    motions: list[Motion] = []
    for number, noun in enumerate(nouns):
        motion = stage.motion(rng, noun) if number in chosen else "still"
        # Among several things a spinning one makes "how many move" a matter of taste.
        if motion == "spin" and count > 1 and len(stage.config.motions) > 2:
            motion = rng.choice([m for m in stage.config.motions if m not in ("still", "spin")])
        motions.append(motion)
    return motions


def _size(stage: Stage, rng: random.Random, count: int, attempt: int = 0) -> float:
    """A size for one of `count` objects; every failed attempt to keep them apart makes it smaller."""
    return max(0.18, rng.uniform(*stage.config.size) * SHRINK[count] * 0.93**attempt)


def _slots(rng: random.Random, count: int) -> list[Cell]:
    slots = list(rng.choice(CELLS[count]))
    rng.shuffle(slots)
    return slots


def _actor(
    stage: Stage,
    rng: random.Random,
    noun: Noun,
    motion: Motion,
    cell: Cell | None,
    window: tuple[float, float],
    size: float,
    **extra: float,
) -> Actor:
    """An object that does one motion in its cell between two times."""
    path = Path.draw(rng, size, cell)
    phases = (path.phase(motion, *window),)
    return Actor(noun.code, phases, flip=rng.random() < 0.5, **extra)  # type: ignore[arg-type]


def well_seen(actors: Sequence[Actor], start_s: float, end_s: float) -> bool:
    """Whether every actor is seen well for most of the time that it is there."""
    shot = Shot(start_s, end_s, Background("gradient", 0), tuple(actors))
    times = [start_s + (i + 0.5) / 12 * (end_s - start_s) for i in range(12)]
    for actor in actors:
        present = [t for t in times if opacity_at(actor, t) > 0.6]
        seen = sum(visible_fraction(shot, actor, t) >= SEEN for t in present)
        if not present or seen < SEEN_SHARE * len(present):
            return False
    return True


def _cast(build: Callable[[int], list[Actor]], start_s: float, end_s: float) -> list[Actor]:
    """Builds actors until all are well seen; attempts use ever smaller objects, the last one is taken."""
    actors: list[Actor] = []
    for attempt in range(TRIES):
        actors = build(attempt)
        if well_seen(actors, start_s, end_s):
            break
    return actors


def _different(
    stage: Stage,
    rng: random.Random,
    start_s: float,
    end_s: float,
    nouns: Sequence[Noun],
    share_still: float | None = None,
) -> list[Actor]:
    """One actor per noun, each with a motion of its own; two now and then share the frame and may cross."""
    count = len(nouns)
    if share_still is None:
        motions = _some_moving(stage, rng, nouns)
    else:
        motions = [_moving(stage, rng, noun, share_still) for noun in nouns]
    free = count == 1 or (count == 2 and rng.random() < 0.4)

    def build(attempt: int) -> list[Actor]:
        cells: Sequence[Cell | None] = [None] * count if free and attempt < TRIES // 2 else _slots(rng, count)
        return [
            _actor(stage, rng, noun, motion, cell, (start_s, end_s), _size(stage, rng, count, attempt))
            for noun, motion, cell in zip(nouns, motions, cells, strict=True)
        ]

    return _cast(build, start_s, end_s)


def several(stage: Stage, rng: random.Random, motion_rng: random.Random) -> Scene:
    """Two to four different objects, each with a motion of its own."""
    duration_s, most = stage.duration(rng), stage.config.max_objects
    actors = _different(stage, rng, 0.0, duration_s, stage.pick(rng, rng.randint(min(2, most), most)))
    return stage.finish(rng, duration_s, [stage.flat_shot(rng, 0.0, duration_s, actors)])


def group(stage: Stage, rng: random.Random, motion_rng: random.Random) -> Scene:
    """One to four of the same kind; they move alike or each as it likes."""
    duration_s, count = stage.duration(rng), rng.randint(1, stage.config.max_objects)
    noun = stage.pick(rng, 1)[0]
    motions = _some_moving(stage, rng, [noun] * count)
    if rng.random() < 0.5:
        motions = [rng.choice(motions)] * count

    def build(attempt: int) -> list[Actor]:
        size = _size(stage, rng, count, attempt)
        return [
            _actor(stage, rng, noun, motion, cell, (0.0, duration_s), size)
            for motion, cell in zip(motions, _slots(rng, count), strict=True)
        ]

    actors = _cast(build, 0.0, duration_s)
    return stage.finish(rng, duration_s, [stage.flat_shot(rng, 0.0, duration_s, actors)])


def order(stage: Stage, rng: random.Random, motion_rng: random.Random) -> Scene:
    """Two or three objects that appear one after the other and stay."""
    duration_s = stage.duration(rng, 4.0)
    count = min(rng.choice((2, 2, 3)), stage.config.max_objects)
    gap = duration_s / (count + 1)
    times = [gap * (i + rng.uniform(-0.2, 0.2) + 0.6) for i in range(count)]
    if rng.random() < 0.6:
        times[0] = 0.0
    nouns = stage.pick(rng, count)
    motions = [_moving(stage, rng, noun, 0.6) for noun in nouns]

    def build(attempt: int) -> list[Actor]:
        return [
            _actor(
                stage,
                rng,
                noun,
                motion,
                cell,
                (at, duration_s),
                _size(stage, rng, count, attempt),
                appear_s=at,
            )
            for noun, motion, cell, at in zip(nouns, motions, _slots(rng, count), times, strict=True)
        ]

    actors = _cast(build, 0.0, duration_s)
    rng.shuffle(actors)
    return stage.finish(rng, duration_s, [stage.flat_shot(rng, 0.0, duration_s, actors)])


def vanish(stage: Stage, rng: random.Random, motion_rng: random.Random) -> Scene:
    """One or more objects, of which one disappears or appears in the midst."""
    duration_s = stage.duration(rng, 3.0)
    count = rng.randint(1, min(3, stage.config.max_objects))
    nouns = stage.pick(rng, count)
    motions = [_moving(stage, rng, noun, 0.5) for noun in nouns]
    event_s = rng.uniform(0.18, 0.82) * duration_s
    comes = rng.random() < 0.4
    window = (event_s, duration_s) if comes else (0.0, event_s)

    def build(attempt: int) -> list[Actor]:
        actors = []
        for number, (noun, motion, cell) in enumerate(zip(nouns, motions, _slots(rng, count), strict=True)):
            size = _size(stage, rng, count, attempt)
            if number:
                actors.append(_actor(stage, rng, noun, motion, cell, (0.0, duration_s), size))
            else:
                when = {"appear_s": event_s} if comes else {"disappear_s": event_s}
                actors.append(_actor(stage, rng, noun, motion, cell, window, size, **when))
        return actors

    actors = _cast(build, 0.0, duration_s)
    return stage.finish(rng, duration_s, [stage.flat_shot(rng, 0.0, duration_s, actors)])


def _step(rng: random.Random, motion: Motion, at: Pose, start_s: float, end_s: float) -> Phase | None:
    """A motion that goes on from a pose, or None when it would leave the frame or stay too short."""
    if motion in ("left", "right", "up", "down"):
        sign = 1 if motion in ("right", "down") else -1
        here = at.x if motion in ("left", "right") else at.y
        length = min(rng.uniform(0.4, 0.6), 0.84 - here if sign > 0 else here - 0.16)
        if length < 0.3:
            return None
        step = sign * length
        end = (at.x + step, at.y) if motion in ("left", "right") else (at.x, at.y + step)
        return Phase(motion, start_s, end_s, at, Pose(*end, at.size, at.angle))
    if motion == "circle":
        # Seen from where it starts, the centre lies towards the middle of the frame.
        radius = rng.uniform(0.15, 0.24)
        for angle in rng.sample([k * 0.7854 for k in range(8)], 8):
            edge = Phase(motion, start_s, end_s, at, at, radius, rng.choice((-1.0, 1.0)), angle)
            centre = (at.x - radius * math.cos(angle), at.y - radius * math.sin(angle))
            if all(0.14 + radius <= c <= 0.86 - radius for c in centre):
                return edge
        return None
    if motion in ("toward", "away"):
        size = at.size * (1.9 if motion == "toward" else 1 / 1.9)
        return (
            Phase(motion, start_s, end_s, at, Pose(at.x, at.y, size, at.angle))
            if 0.14 <= size <= 0.62
            else None
        )
    turn = 360.0 * rng.choice((-1, 1)) if motion == "spin" else 0.0
    return Phase(motion, start_s, end_s, at, Pose(at.x, at.y, at.size, at.angle + turn))


def sequence(stage: Stage, rng: random.Random, motion_rng: random.Random) -> Scene:
    """One object that does two or three things in turn; falls back on a single motion when only one fits."""
    duration_s = stage.duration(rng, 3.0)
    noun = stage.pick(rng, 1)[0]
    wanted = 3 if duration_s >= 6.0 and rng.random() < 0.4 else 2
    choices = [m for m in stage.config.motions if m != "still" and shows(noun, m)]
    at = Pose(rng.uniform(0.18, 0.82), rng.uniform(0.18, 0.82), rng.uniform(*stage.config.size) * 0.85)
    play = 0.4 if wanted == 2 else 0.2
    borders = [0.0, *((i + rng.uniform(-play, play)) / wanted for i in range(1, wanted)), 1.0]
    phases: list[Phase] = []
    for start, end in pairwise(borders):
        for motion in rng.sample(choices, len(choices)):
            if phases and motion == phases[-1].motion:
                continue
            phase = _step(rng, motion, at, start * duration_s, end * duration_s)
            if phase is not None:
                phases.append(phase)
                at = phase.end
                break
    if not phases:
        return solo(stage, rng, motion_rng)
    actor = Actor(noun.code, tuple(phases), flip=rng.random() < 0.5)
    return stage.finish(rng, duration_s, [stage.flat_shot(rng, 0.0, duration_s, [actor])])


def change(stage: Stage, rng: random.Random, motion_rng: random.Random) -> Scene:
    """An object turns into another, starts to move, or stops."""
    duration_s = stage.duration(rng, 3.0)
    noun, other = stage.pick(rng, 2)
    event_s = rng.uniform(0.2, 0.8) * duration_s
    path = Path.draw(rng, rng.uniform(*stage.config.size))
    kind = rng.choice(("becomes", "becomes", "starts", "stops"))
    motion = stage.motion(rng, noun)
    phases: tuple[Phase, ...]
    if kind == "becomes":
        motion = _moving(stage, rng, noun, 0.5)
        phases = (path.phase(motion, 0.0, duration_s),)
        actor = Actor(noun.code, phases, flip=rng.random() < 0.5, becomes=other.code, becomes_s=event_s)
    elif motion == "still":
        actor = Actor(noun.code, (path.phase("still", 0.0, duration_s),), disappear_s=event_s)
    else:
        window = (event_s, duration_s) if kind == "starts" else (0.0, event_s)
        move = path.phase(motion, *window)
        rest = Phase("still", 0.0, event_s, move.start, move.start)
        if kind == "stops":
            rest = Phase("still", event_s, duration_s, move.end, move.end)
        phases = (rest, move) if kind == "starts" else (move, rest)
        actor = Actor(noun.code, phases, flip=rng.random() < 0.5)
    return stage.finish(rng, duration_s, [stage.flat_shot(rng, 0.0, duration_s, [actor])])


def cut(stage: Stage, rng: random.Random, motion_rng: random.Random) -> Scene:
    """Two shots with different places and objects, one object (seldom two) in each."""
    duration_s = stage.duration(rng, 4.0)
    cut_s = rng.uniform(0.25, 0.75) * duration_s
    counts = [min(rng.choice((1, 1, 2)), stage.config.max_objects) for _ in range(2)]
    nouns = stage.pick(rng, sum(counts))
    first = _different(stage, rng, 0.0, cut_s, nouns[: counts[0]], 0.25)
    second = _different(stage, rng, cut_s, duration_s, nouns[counts[0] :], 0.25)
    places = stage.places(rng, 2)
    shots = [
        stage.flat_shot(rng, 0.0, cut_s, first, places[0]),
        stage.flat_shot(rng, cut_s, duration_s, second, places[1]),
    ]
    return stage.finish(rng, duration_s, shots)


Script = Callable[[Stage, random.Random, random.Random], Scene]
SCENE_SCRIPTS: Mapping[str, Script] = {
    "solo": solo,
    "several": several,
    "group": group,
    "order": order,
    "sequence": sequence,
    "change": change,
    "vanish": vanish,
    "cut": cut,
}
