"""Questions about the course of a video: order, sequence, changes, and when something happens."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise, permutations

from training.synthetic.captions import place_of
from training.synthetic.phrases import ANSWERS, COUNTING, DOING, PLACES
from training.synthetic.question_forms import Asker, Question
from training.synthetic.scene import Actor
from training.synthetic.scene_events import SceneEvent, change_of, events_of, least_gap, onsets
from training.synthetic.stage import shows

PARTS = ("at the beginning", "in the middle", "at the end", "throughout the entire video")
# An event this near (share of a third) to the border of a third belongs to neither.
PART_MARGIN = 0.12
# How often the answers that scenes give most often are asked for, so that guessing them does not pay.
CHANGE_SHARES = {"same": 0.35, "appears": 0.4}
MIDDLE_SHARE = 0.25


def ask_order(ask: Asker) -> Iterator[Question]:
    """Which appears first, which last, and in what order do all of them?"""
    begins = onsets(ask.scene, ask.nouns)
    if len(begins) < 2 or len(begins) < len(ask.scene.actors):
        return
    gap = least_gap(ask.scene)
    names = [name for _, name in begins]
    clear = [later - sooner >= gap for (sooner, _), (later, _) in pairwise(begins)]
    absent = [noun.name for noun in ask.absent(2)]
    if clear[0]:
        pair = ask.rng.sample((names[0], ask.rng.choice(names[1:])), 2)
        text = ask.text("order_two", first=pair[0], second=pair[1])
        yield ask.open("appearance_order", text, f"the {names[0]}", first=names[0])
        wrong = [f"the {name}" for name in (*names[1:], *absent)]
        text = ask.text("order_first")
        yield from ask.both("appearance_order", text, f"the {names[0]}", wrong, first=names[0])
    if clear[-1]:
        wrong = [f"the {name}" for name in (*names[:-1], *absent)]
        text = ask.text("order_last")
        yield from ask.both("appearance_order", text, f"the {names[-1]}", wrong, last=names[-1])
    if all(clear):
        right, *wrong = (_in_order(order) for order in permutations(names))
        # Two things have one other order only: lists with a thing that is not there fill up the options.
        wrong += (
            [_in_order((names[0], absent[0])), _in_order((absent[1], names[1]))] if len(names) == 2 else []
        )
        text = ask.text("order_all")
        yield from ask.both("appearance_order", text, right, wrong, f"first {right}", order=names)


def _in_order(names: tuple[str, ...]) -> str:
    return ", then ".join(f"the {name}" for name in names)


def ask_sequence(ask: Asker) -> Iterator[Question]:
    """What does the dog do first, and what after that?"""
    for _, actor in ask.unique:
        if len(actor.motions) < 2:
            continue
        noun, motions = ask.nouns[actor.code], actor.motions
        step = ask.rng.randrange(1, len(motions))
        before, after = motions[step - 1], motions[step]
        moves = [motion for motion in ANSWERS if motion != "still" and shows(noun, motion)]
        wrong = [f"it {ANSWERS[motion]}" for motion in moves]
        if motions.count(before) == 1:
            text = ask.text("sequence_after", noun=noun.name, doing=DOING[before])
            right = f"it {ANSWERS[after]}"
            yield from ask.both("action_sequence", text, right, wrong, motion=after, noun=noun.name)
        text = ask.text("sequence_first", noun=noun.name)
        right = f"it {ANSWERS[motions[0]]}"
        yield from ask.both("action_sequence", text, right, wrong, motion=motions[0], noun=noun.name)


def ask_transition(ask: Asker) -> Iterator[Question]:
    """From where to where does the scene change?"""
    places = [place for shot in ask.scene.shots if (place := place_of(shot.background)) is not None]
    if len(ask.scene.shots) != 2 or len(places) != 2 or places[0] == places[1]:
        return
    start, end = places[0][0], places[1][0]
    third, fourth = ask.rng.sample([name for name, _ in PLACES.values() if name not in (start, end)], 2)
    right = f"from {start} to {end}"
    # Each place stands in two options, each pair in both orders: the options alone give nothing away.
    wrong = [f"from {end} to {start}", f"from {third} to {fourth}", f"from {fourth} to {third}"]
    facts = {"from": start, "to": end}
    text = ask.text("scene_transition")
    yield from ask.both("scene_transition", text, right, wrong, f"it changes {right}", **facts)


def ask_change(ask: Asker) -> Iterator[Question]:
    """What happens to the dog: does it turn into something, come, go, start, stop, or none of these?"""
    changed = [actor for _, actor in ask.unique if change_of(actor)]
    resting = [actor for _, actor in ask.unique if actor.motions == ("still",)]
    if not changed and not resting:
        return
    actor = ask.rng.choice(changed or resting)
    if not ask.maybe(CHANGE_SHARES.get(change_of(actor) or "same", 1.0)):
        return
    noun, kind = ask.name(actor.code), change_of(actor) or "same"
    target = ask.nouns[actor.becomes] if actor.becomes else ask.absent(1)[0]
    texts = {
        "becomes": f"it turns into {target.indefinite}",
        "vanishes": "it disappears",
        "appears": "it appears",
        "starts": "it starts to move",
        "stops": "it stops moving",
        "same": "it stays the same",
    }
    wrong = [text for other, text in texts.items() if other != kind]
    text = ask.text("state_change", noun=noun)
    into = target.name if kind == "becomes" else None
    yield from ask.both("state_change", text, texts[kind], wrong, change=kind, noun=noun, into=into)


def ask_localisation(ask: Asker) -> Iterator[Question]:
    """After how many seconds, and in which third, does it happen?"""
    events = _events(ask)
    if not events:
        return
    at, event, event_s = ask.rng.choice(events)
    duration, seconds, exact = ask.scene.duration_s, round(at), round(at, 2)
    text = ask.text("localisation", event=event, event_s=event_s)
    yield ask.open("localisation", text, _after(seconds), time_s=exact)
    wrong = _wrong_seconds(ask, seconds, duration)
    if wrong:
        options = [_after(second) for second in wrong]
        yield ask.choice("localisation", text, _after(seconds), options, time_s=exact)
    part, into = divmod(at / duration * 3, 1)
    usual = int(part) == 1 and not ask.maybe(MIDDLE_SHARE)
    if PART_MARGIN <= into <= 1 - PART_MARGIN and not usual:
        text, right = ask.text("localisation_part", event=event, event_s=event_s), PARTS[int(part)]
        yield from ask.both("localisation_part", text, right, PARTS, time_s=exact, part=int(part))


def _wrong_seconds(ask: Asker, seconds: int, duration_s: float) -> list[int]:
    """Three times clear of the right one, whose rank among the four is uniform; none if they do not fit."""
    far = max(2, round(duration_s / 6))
    before = list(range(1, seconds - far + 1))
    after = list(range(seconds + far, round(duration_s) + 1))
    ranks = [rank for rank in range(4) if rank <= len(before) and 3 - rank <= len(after)]
    if not ranks or seconds == 0:
        return []
    rank = ask.rng.choice(ranks)
    return ask.rng.sample(before, rank) + ask.rng.sample(after, 3 - rank)


def _after(seconds: int) -> str:
    if seconds == 0:
        return "right at the start"
    # A word is one token, where language models like SmolLM2 decide on a number digit by digit.
    number = COUNTING[seconds] if seconds < len(COUNTING) else str(seconds)
    return f"after about {number} second{'' if seconds == 1 else 's'}"


def _events(ask: Asker) -> list[tuple[float, str, str]]:
    """What happens at a known time: (seconds, "the dog appear", "the dog appears")."""
    unique = [actor for _, actor in ask.unique]
    events = []
    for event in events_of(ask.scene):
        actor = event.actor
        if actor is None:
            if len(ask.scene.shots) == 2:
                events.append((event.at_s, "the scene change", "the scene changes"))
        elif actor in unique:
            the, (base, third) = f"the {ask.name(actor.code)}", _happens(ask, event, actor)
            events.append((event.at_s, f"{the} {base}", f"{the} {third}"))
    return events


def _happens(ask: Asker, event: SceneEvent, actor: Actor) -> tuple[str, str]:
    """Base form and third person: ("appear", "appears")."""
    if event.kind == "becomes":
        into = ask.nouns[actor.becomes or ""].indefinite
        return f"turn into {into}", f"turns into {into}"
    if event.kind == "moves":
        assert event.motion is not None
        doing = DOING[event.motion]
        return f"start {doing}", f"starts {doing}"
    return {
        "appears": ("appear", "appears"),
        "vanishes": ("disappear", "disappears"),
        "rests": ("stop moving", "stops moving"),
    }[event.kind]
