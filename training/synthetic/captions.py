"""Captions: what a scene shows, said in one or a few sentences."""

from __future__ import annotations

import random

from training.synthetic.nouns import Nouns
from training.synthetic.phrases import MOVES, NUMBERS, PLACES, Wording, sentence, third_person
from training.synthetic.scene import Actor, Background, Scene, Shot, largest_first


def place_of(background: Background) -> tuple[str, str] | None:
    """What a background is called: ("the sea", "by the sea"), or None for those without a name."""
    return PLACES.get(background.photo or background.kind)


def caption(scene: Scene, nouns: Nouns, wording: Wording, rng: random.Random) -> str:
    """What happens, shot by shot and object by object, in order of appearance."""
    parts = []
    for number, shot in enumerate(scene.shots):
        clauses = _clauses(shot, nouns, wording, rng)
        place = place_of(shot.background)
        if number > 0:
            to = f" to {place[0]}" if place else ""
            parts.append(sentence(f"then the scene changes{to}"))
        elif place and (len(scene.shots) > 1 or rng.random() < 0.3):
            clauses[0] = f"{place[1]}, {clauses[0]}" if rng.random() < 0.3 else f"{clauses[0]} {place[1]}"
        parts.append(_join(clauses, rng))
    return " ".join(parts)


def _join(clauses: list[str], rng: random.Random) -> str:
    if len(clauses) == 2 and rng.random() < 0.6:
        return sentence(f"{clauses[0]} {rng.choice(('and', 'while'))} {clauses[1]}")
    return " ".join(sentence(clause) for clause in clauses)


def _clauses(shot: Shot, nouns: Nouns, wording: Wording, rng: random.Random) -> list[str]:
    """One clause per actor; actors of one kind that do the same share a clause ("three dogs move up")."""
    groups: dict[tuple, list[Actor]] = {}
    for actor in largest_first(shot):
        groups.setdefault((actor.code, actor.motions, actor.appear_s, actor.disappear_s), []).append(actor)
    clauses = []
    for number, actors in enumerate(groups.values()):
        noun, count = nouns[actors[0].code], len(actors)
        same = sum(actor.code == actors[0].code for actor in shot.actors) > count
        subject = noun.indefinite if count == 1 else f"{NUMBERS[count]} {noun.plural}"
        if same and number > 0:
            subject = f"another {noun.name}" if count == 1 else f"{NUMBERS[count]} other {noun.plural}"
        clauses.append(f"{subject} {_predicate(actors[0], count > 1, nouns, wording, rng)}")
    return clauses


def _predicate(actor: Actor, plural: bool, nouns: Nouns, wording: Wording, rng: random.Random) -> str:
    """What one actor (or several alike) does, as a verb phrase."""

    def verb(phrase: str) -> str:
        return phrase.replace("it was", "they were") if plural else third_person(phrase)

    phases = [phase for phase in actor.phases if len(actor.phases) == 1 or phase.motion != "still"]
    steps = [verb(rng.choice(MOVES[phase.motion][wording])) for phase in phases]
    if len(actor.phases) > 1 and actor.phases[0].motion == "still":
        steps.insert(0, verb(rng.choice(MOVES["still"][wording])))
    if len(actor.phases) > 1 and actor.phases[-1].motion == "still":
        steps.append(verb("stop"))
    if actor.becomes is not None:
        change = verb(f"turn into {nouns[actor.becomes].indefinite}")
        steps = [change] if actor.motions == ("still",) else [*steps, change]
    if actor.appear_s > 0.0 and actor.starts_inside:
        appear = verb("appear" if wording == "train" else "show up")
        steps = [appear] if actor.motions == ("still",) else [appear, *steps]
    if actor.ends_inside:
        vanish = verb("disappear" if wording == "train" else "vanish")
        steps = [vanish] if actor.motions == ("still",) and not actor.starts_inside else [*steps, vanish]
    return steps[0] + "".join(f"{rng.choice((', then', ' and then'))} {step}" for step in steps[1:])
