"""Rendering: the pixels show what the scene says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encoder.errors import DataError
from training.synthetic.backgrounds import KINDS, paint
from training.synthetic.dataset import World
from training.synthetic.render import render
from training.synthetic.scene import MOTIONS, Actor, Background, Motion, Phase, Pose, Scene, Shot
from training.synthetic.sprites import procedural_bank
from training.synthetic.world_config import WorldConfig

BANK = procedural_bank()
SIDE = 64


def clean(scene: Scene) -> Scene:
    """The scene without noise and compression."""
    return replace(scene, noise=0, jpeg=None)


def without_actors(scene: Scene) -> Scene:
    return replace(scene, shots=tuple(replace(shot, actors=()) for shot in scene.shots))


def masks(scene: Scene, times: list[float], height: int = SIDE, width: int = SIDE) -> np.ndarray:
    """Where objects cover the background: bool (T, height, width)."""
    full = render(clean(scene), times, height, width, BANK).astype(int)
    empty = render(clean(without_actors(scene)), times, height, width, BANK).astype(int)
    return np.abs(full - empty).max(axis=-1) > 24


def centres(covered: np.ndarray) -> np.ndarray:
    """Centre of mass of every mask as fractions of the frame: (T, 2), x then y."""
    sides = covered.shape[:0:-1]
    return np.array(
        [[c.mean() / side for c, side in zip(np.nonzero(m)[::-1], sides, strict=True)] for m in covered]
    )


@pytest.mark.parametrize("motion", MOTIONS)
def test_pixels_move_as_named(motion: Motion) -> None:
    # Colours of object and background may be close, so the plain night is used behind everything.
    world = World("train", 1, WorldConfig(plots=("solo",), motions=(motion,), pans=0.0), BANK)
    for index in range(6):
        scene = world.sample(index).scene
        if scene.actors[0].motions != (motion,):
            continue
        shot = replace(scene.shots[0], background=Background("night", 1), light=(1.0, 1.0, 1.0))
        scene = replace(scene, shots=(shot,))
        times = [(k + 0.5) / 8 * scene.duration_s for k in range(8)]
        covered = masks(scene, times)
        path, areas = centres(covered), covered.sum(axis=(1, 2))
        assert areas.min() > 10
        dx, dy = path[-1] - path[0]
        if motion in ("left", "right"):
            assert (dx > 0.2) if motion == "right" else (dx < -0.2)
            assert abs(dy) < abs(dx)
        elif motion in ("up", "down"):
            assert (dy > 0.2) if motion == "down" else (dy < -0.2)
            assert abs(dx) < abs(dy)
        elif motion == "circle":
            assert np.ptp(path, axis=0).min() > 0.15
        elif motion in ("toward", "away"):
            ratio = areas[-1] / areas[0]
            assert (ratio > 1.8) if motion == "toward" else (ratio < 0.6)
        elif motion == "spin":
            assert np.abs(path - path[0]).max() < 0.12
            assert (covered[0] != covered[2]).sum() > 5
        else:
            assert (covered == covered[0]).all()


def test_objects_come_and_go_at_their_times() -> None:
    pose = Pose(0.5, 0.5, 0.4)
    actor = Actor("red_square", (Phase("still", 0.0, 6.0, pose, pose),), appear_s=2.0, disappear_s=4.0)
    scene = Scene(6.0, (Shot(0.0, 6.0, Background("night", 0), (actor,)),), 0)
    times = [0.5, 1.9, 2.5, 3.5, 4.0, 5.5]
    assert [bool(mask.any()) for mask in masks(scene, times)] == [False, False, True, True, False, False]


def test_an_object_turns_into_another() -> None:
    pose = Pose(0.5, 0.5, 0.5)
    actor = Actor("red_square", (Phase("still", 0, 4, pose, pose),), becomes="blue_circle", becomes_s=2.0)
    scene = Scene(4.0, (Shot(0.0, 4.0, Background("night", 0), (actor,)),), 0)
    before, after = render(scene, [1.0, 3.0], SIDE, SIDE, BANK)[:, SIDE // 2, SIDE // 2].astype(int)
    assert before[0] > before[2] + 80
    assert after[2] > after[0] + 80


def test_cuts_change_everything_at_once() -> None:
    world = World("train", 2, WorldConfig(plots=("cut",)), BANK)
    for index in range(5):
        scene = clean(world.sample(index).scene)
        cut_s = scene.shots[1].start_s
        a, b, c = render(scene, [cut_s - 0.1, cut_s - 1e-6, cut_s], SIDE, SIDE, BANK).astype(int)
        assert np.abs(b - c).mean() > 3 * max(np.abs(a - b).mean(), 0.5)


def test_every_object_leaves_pixels_of_its_own() -> None:
    world = World("train", 4, WorldConfig(plots=("several", "group")), BANK)
    for index in range(15):
        scene = clean(world.sample(index).scene)
        times = [0.5 * scene.duration_s]
        full = render(scene, times, SIDE, SIDE, BANK)
        for number in range(len(scene.actors)):
            shot = scene.shots[0]
            fewer = replace(shot, actors=shot.actors[:number] + shot.actors[number + 1 :])
            assert (full != render(replace(scene, shots=(fewer,)), times, SIDE, SIDE, BANK)).any()


@settings(max_examples=25, deadline=None)
@given(
    index=st.integers(0, 10**6),
    height=st.integers(16, 90),
    width=st.integers(16, 90),
    times=st.lists(st.floats(-1.0, 25.0), min_size=1, max_size=4),
)
def test_any_size_and_time_renders_the_same_twice(
    index: int, height: int, width: int, times: list[float]
) -> None:
    world = World("test", 0, WorldConfig(jpeg=0.5), BANK)
    scene = world.sample(index).scene
    first = world.render(scene, times, height, width)
    assert first.shape == (len(times), height, width, 3)
    assert first.dtype == np.uint8
    assert (first == world.render(scene, times, height, width)).all()


def test_resolution_changes_detail_alone() -> None:
    world = World("train", 0, WorldConfig(noise=0.0, jpeg=0.0, pans=0.0), BANK)
    for index in range(12):
        scene = world.sample(index).scene
        small = world.render(scene, [1.0], 48, 48)[0].astype(float)
        large = world.render(scene, [1.0], 192, 192)[0].astype(float)
        shrunk = large.reshape(48, 4, 48, 4, 3).mean(axis=(1, 3))
        assert np.abs(small - shrunk).mean() < 6


def test_circles_stay_round_in_wide_frames() -> None:
    start = Pose(0.7, 0.5, 0.15)
    circle = Phase("circle", 0.0, 8.0, start, start, 0.2, 1.0, 0.0)
    shot = Shot(0.0, 8.0, Background("night", 0), (Actor("yellow_circle", (circle,)),))
    path = centres(masks(Scene(8.0, (shot,), 0), [float(t) for t in range(8)], 96, 192))
    pixels = path * [192, 96]
    assert np.ptp(pixels[:, 0]) == pytest.approx(np.ptp(pixels[:, 1]), rel=0.15)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "photo"])
def test_backgrounds_depend_on_seed_alone(kind: str) -> None:
    first, second = Background(kind, 1), Background(kind, 2)
    assert (paint(first, 40, 60, {}) == paint(first, 40, 60, {})).all()
    assert (paint(first, 40, 60, {}) != paint(second, 40, 60, {})).any()
    assert paint(first, 40, 60, {}).shape == (40, 60, 3)


def test_photographs_are_cropped_and_missing_ones_named() -> None:
    photo = np.random.default_rng(0).integers(0, 255, (80, 120, 3)).astype(np.uint8)
    for name in ("grass", "rocket"):
        assert paint(Background("photo", 3, name), 32, 48, {name: photo}).shape == (32, 48, 3)
    with pytest.raises(DataError, match="rocket"):
        paint(Background("photo", 3, "rocket"), 32, 48, {})
    with pytest.raises(DataError, match="Unknown background"):
        paint(Background("ocean", 3), 32, 48, {})


def test_frames_too_small_to_see_are_refused() -> None:
    world = World("train", bank=BANK)
    with pytest.raises(DataError, match="too small"):
        world.render(world.sample(0).scene, [0.0], 8, 8)
