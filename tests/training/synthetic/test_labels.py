"""Labels of the synthetic world against what its scenes and its questions say."""

from __future__ import annotations

import torch

from training.synthetic.dataset import Sample, World
from training.synthetic.labels import CHANGES, EVENT_PARTS, UNKNOWN, WorldLabels
from training.synthetic.scene import Actor, Background, Phase, Pose, Scene, Shot
from training.synthetic.sprites import procedural_bank
from training.synthetic.world_config import WorldConfig

WORLD = World("train", 0, WorldConfig(), procedural_bank())
LABELS = WorldLabels(WORLD)


def test_they_agree_with_the_questions() -> None:
    samples = [WORLD.sample(number) for number in range(300)]
    found = LABELS.clips(samples)
    asked = {"count": 0, "first": 0, "motion": 0}
    for row, sample in enumerate(samples):
        for question in sample.questions:
            facts = question.facts
            if question.task == "count":
                assert found["count"][row] == facts["count"] - 1
                asked["count"] += 1
            if "first" in facts:
                code = next(c for c in LABELS.nouns if WORLD.nouns[c].name == facts["first"])
                assert found["first"][row] == LABELS.nouns[code]
                asked["first"] += 1
            if question.task == "action" and len(sample.scene.actors) == 1:
                assert found["motion"][row] == LABELS.motions[facts["motion"]]
                asked["motion"] += 1
            if facts.get("present"):
                code = next(c for c in LABELS.nouns if WORLD.nouns[c].name == facts["noun"])
                assert found["noun"][row, LABELS.nouns[code]] > 0
    assert min(asked.values()) > 20
    assert torch.allclose(found["noun"].sum(dim=1), torch.ones(len(samples)))
    assert set(found) == set(LABELS.clip_classes)
    for name in ("motion", "count", "first", "change", "event"):
        known = found[name][found[name] != UNKNOWN]
        assert known.min() >= 0
        assert known.max() < LABELS.clip_classes[name]


def scene(*actors: Actor, duration_s: float = 8.0) -> Scene:
    return Scene(duration_s, (Shot(0.0, duration_s, Background("gradient", 0), actors),), 0)


def test_patches_lie_where_the_object_is() -> None:
    code = sorted(LABELS.nouns)[0]
    path = Phase("right", 0.0, 8.0, Pose(0.25, 0.5, 0.3), Pose(0.75, 0.5, 0.3))
    labels = LABELS.patches(scene(Actor(code, (path,))), (0.0, 4.0, 8.0), 8)
    assert labels["noun"].shape == (3, 8, 8)
    columns = [frame.any(dim=0).nonzero().flatten().tolist() for frame in labels["noun"]]
    assert columns == [[1, 2], [3, 4], [5, 6]]
    assert set(labels["noun"].unique().tolist()) == {0, 1 + LABELS.nouns[code]}
    assert set(labels["motion"].unique().tolist()) == {0, 1 + LABELS.motions["right"]}


def test_what_appears_hides_and_changes() -> None:
    below, above = sorted(LABELS.nouns)[:2]
    still = Phase("still", 0.0, 8.0, Pose(0.5, 0.5, 0.5), Pose(0.5, 0.5, 0.5))
    both = scene(Actor(below, (still,)), Actor(above, (still,), appear_s=4.0))
    labels = LABELS.patches(both, (1.0, 6.0), 8)["noun"]
    assert labels[0, 4, 4] == 1 + LABELS.nouns[below]
    assert labels[1, 4, 4] == 1 + LABELS.nouns[above]
    becomes = scene(Actor(below, (still,), becomes=above, becomes_s=3.3))
    sample = Sample(becomes, "", ())
    assert LABELS.patches(becomes, (1.0, 6.0), 8)["noun"][:, 4, 4].tolist() == labels[:, 4, 4].tolist()
    found = LABELS.clips([sample])
    assert CHANGES[int(found["change"])] == "becomes"
    assert int(found["event"]) == int(3.3 / 8 * EVENT_PARTS)
    assert found["noun"].count_nonzero() == 2
