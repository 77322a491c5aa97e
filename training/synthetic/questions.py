"""Questions whose answers follow from a scene alone: what is there, how many, how it moves.

Task names are MVBench's where it has them. A question is asked only where its answer can be seen.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from training.synthetic.nouns import Noun, Nouns
from training.synthetic.phrases import ANSWERS, DOING, NUMBERS, OPTIONS, Wording
from training.synthetic.question_forms import Asker, Question, kind_phrase
from training.synthetic.scene import DIRECTIONS, Actor, Scene
from training.synthetic.scene_events import steady
from training.synthetic.stage import shows
from training.synthetic.time_questions import (
    ask_change,
    ask_localisation,
    ask_order,
    ask_sequence,
    ask_transition,
)

TASKS = (
    *("existence", "object_existence", "object", "object_list", "category", "category_of_8"),
    *("count", "moving_count", "moving_direction", "action", "action_sequence", "appearance_order"),
    *("scene_transition", "state_change", "localisation", "localisation_part"),
)
MANY_OPTIONS = 8
MOST_OBJECTS = 4
# Motion is asked about only when it lasts for this share of the video: two of eight frames at least.
LEAST_PRESENCE = 0.3
# How often the answers that scenes give most often are asked for, so that guessing them does not pay.
STILL_SHARE, ONE_SHARE = 0.3, 0.4


def questions(
    scene: Scene, nouns: Nouns, pool: tuple[Noun, ...], wording: Wording, rng: random.Random
) -> tuple[Question, ...]:
    """Every question that this scene supports, in open and (where it makes sense) multiple-choice form.

    `nouns` names every sprite by its code, `pool` holds the nouns that wrong options are taken from.
    """
    asker = Asker(scene, nouns, pool, wording, rng)
    return tuple(question for ask in KINDS for question in ask(asker))


def ask_existence(ask: Asker) -> Iterator[Question]:
    """Is there a dog? Yes or no, equally likely, and what is seen. Which of these four is there?"""
    present = ask.rng.random() < 0.5
    noun = ask.nouns[ask.rng.choice(ask.shown)] if present else ask.absent(1)[0]
    text = ask.text("existence", noun=noun.indefinite)
    right, wrong = ("yes", "no") if present else ("no", "yes")
    answer = f"{right}, I see {_listed(ask)}"
    yield from ask.both("existence", text, right, [wrong], answer, noun=noun.name, present=present)
    shown = ask.nouns[ask.rng.choice(ask.shown)]
    others = [other.indefinite for other in ask.absent(3)]
    yield ask.choice("object_existence", ask.text("which_exists"), shown.indefinite, others, noun=shown.name)


def _listed(ask: Asker) -> str:
    """Everything shown: "a dog and two cats"."""
    counts = Counter(actor.code for actor in ask.scene.actors)
    nouns = [(ask.nouns[code], counts.get(code, 1)) for code in ask.shown]
    *names, last = [f"{NUMBERS[n]} {noun.plural}" if n > 1 else noun.indefinite for noun, n in nouns]
    return f"{', '.join(names)} and {last}" if names else last


def ask_object(ask: Asker) -> Iterator[Question]:
    """What is it? With several things: which of them moves like that?"""
    actors = ask.scene.actors
    if len(ask.shown) == 1:
        noun = ask.nouns[ask.shown[0]]
        answer = noun.indefinite if len(actors) == 1 else f"{NUMBERS[len(actors)]} {noun.plural}"
        wrong = [other.indefinite for other in ask.absent(3)]
        yield from ask.both("object", ask.text("object"), noun.indefinite, wrong, answer, noun=noun.name)
        return
    if any(actor.becomes or len(actor.phases) > 1 for actor in actors):
        return
    motions = [actor.motions for actor in actors]
    alone = [actor for actor in actors if motions.count(actor.motions) == 1]
    if alone:
        actor = ask.rng.choice(alone)
        name = ask.name(actor.code)
        text = ask.text("object_by_motion", doing=DOING[actor.motions[0]])
        names = [ask.name(code) for code in ask.shown] + [other.name for other in ask.absent(2)]
        wrong = [f"the {other}" for other in names if other != name]
        yield from ask.both("object", text, f"the {name}", wrong, noun=name)


def ask_all_objects(ask: Asker) -> Iterator[Question]:
    """What are all the things that are shown, where there are several kinds?"""
    if len(ask.shown) > 1:
        names = tuple(ask.name(code) for code in ask.shown)
        yield ask.open("object_list", ask.text("object_list"), _listed(ask), shown=names)


def ask_category(ask: Asker) -> Iterator[Question]:
    """What kind of thing is it, openly, among 4 and among 8?"""
    if len(ask.shown) > 1:
        return
    category = ask.nouns[ask.shown[0]].category
    kinds = [kind_phrase(kind) for kind in dict.fromkeys(noun.category for noun in ask.pool)]
    text, right = ask.text("category"), kind_phrase(category)
    yield from ask.both("category", text, right, kinds, category=category)
    yield ask.choice("category_of_8", text, right, kinds, MANY_OPTIONS, category=category)


def ask_count(ask: Asker) -> Iterator[Question]:
    """How many dogs (or objects)? How many of them move?"""
    actors = ask.scene.actors
    if not steady(ask.scene):
        return
    if len(actors) == 1 and not ask.maybe(ONE_SHARE):
        return
    alike = len({actor.code for actor in actors}) == 1
    plural = ask.nouns[actors[0].code].plural if alike and ask.rng.random() < 0.7 else "objects"
    number = NUMBERS[len(actors)]
    text = ask.text("count", nouns=plural)
    yield from ask.both("count", text, number, NUMBERS[1:], count=len(actors), of=plural)
    # Whether a thing that turns on the spot "moves" is a matter of taste.
    if len(actors) > 1 and all(actor.motions != ("spin",) for actor in actors):
        moving = sum(actor.motions != ("still",) for actor in actors)
        text = ask.text("moving_count")
        answer = NUMBERS[moving] if moving else "none"
        yield from ask.both("moving_count", text, answer, ["none", *NUMBERS[1:]], count=moving)


def ask_motion(ask: Asker) -> Iterator[Question]:
    """Which way does the dog go? What does it do?"""
    single = [
        actor
        for _, actor in ask.unique
        if len(actor.phases) == 1
        and actor.becomes is None
        and _presence(ask.scene, actor) >= LEAST_PRESENCE
        and not (actor.motions == ("still",) and (actor.starts_inside or actor.ends_inside))
    ]
    if not single:
        return
    actor = ask.rng.choice(single)
    noun, motion = ask.nouns[actor.code], actor.motions[0]
    facts = {"motion": motion, "noun": noun.name}
    answer = f"it {ANSWERS[motion]}"
    if motion in DIRECTIONS:
        text = ask.text("moving_direction", noun=noun.name)
        directions = [OPTIONS[direction] for direction in DIRECTIONS]
        yield from ask.both("moving_direction", text, OPTIONS[motion], directions, answer, **facts)
    if motion == "still" and not ask.maybe(STILL_SHARE):
        return
    wrong = [f"it {phrase}" for other, phrase in ANSWERS.items() if shows(noun, other)]
    yield from ask.both("action", ask.text("action", noun=noun.name), answer, wrong, **facts)


def _presence(scene: Scene, actor: Actor) -> float:
    """The share of the video during which an actor is there."""
    shot = next(shot for shot in scene.shots if actor in shot.actors)
    start_s, end_s = shot.presence(actor)
    return (end_s - start_s) / scene.duration_s


KINDS: Sequence[Callable[[Asker], Iterator[Question]]] = (
    ask_existence,
    ask_object,
    ask_category,
    ask_count,
    ask_motion,
    ask_order,
    ask_sequence,
    ask_transition,
    ask_change,
    ask_localisation,
    ask_all_objects,
)
