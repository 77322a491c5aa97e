"""Scoring: what counts as right, on hand-made answers, and intervals against their definition."""

import pytest

from training.evaluation.answer_scoring import (
    agrees,
    letter_in,
    motion_in,
    names,
    option_in,
    option_meant,
    says_yes,
    seconds_in,
)
from training.synthetic.dataset import World
from training.synthetic.phrases import ANSWERS, MOVES
from training.synthetic.question_forms import Question
from training.synthetic.sprites import procedural_bank


@pytest.mark.parametrize("motion", MOVES)
def test_every_wording_of_a_motion_is_understood(motion) -> None:
    for split in ("train", "test"):
        for phrase in MOVES[motion][split]:
            assert motion_in(f"A dog: {phrase}.") == motion, phrase
    assert motion_in(f"It {ANSWERS[motion]}.") == motion


def test_no_motion() -> None:
    assert motion_in("A bright dog on a cup.") is None


def test_names_whole_words() -> None:
    assert names("A dog runs.", "dog")
    assert names("Two Dogs run.", "dog", "dogs")
    assert not names("A hot doggy bag", "dog")
    assert not names("", "dog")


@pytest.mark.parametrize(
    ("text", "letter"),
    [("(B) left", "B"), ("B", "B"), ("Answer: C.", "C"), ("(d)", "D"), ("left", None), ("", None)],
)
def test_letters(text: str, letter: str | None) -> None:
    assert letter_in(text) == letter


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("(B) a cat", 1),
        ("b) a dog", 0),
        ("A dog.", 0),
        ("A. a cat", 0),
        ("It is a cat.", 1),
        ("A dog and a cat.", None),  # both are named, and the A is an article
        ("A dog and a cat: (B)", 1),
        ("A bus.", None),
        ("Answer A is right", 0),
        ("Option C", 2),
        ("a dogfish", None),
        ("", None),
    ],
)
def test_an_option_is_chosen_by_letter_or_by_words(text: str, chosen: int | None) -> None:
    assert option_in(text, ["a dog", "a cat", "after 1 second"]) == chosen


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("After about 5 seconds.", 5.0),
        ("At 4.5s, the dog", 4.5),
        ("After about sixteen seconds.", 16.0),
        ("Right at the start.", 0.0),
        ("Someone often sees it at the end.", None),
    ],
)
def test_times_are_read_in_digits_and_in_words(text: str, seconds: float | None) -> None:
    assert seconds_in(text) == seconds


def test_options_of_numbers_are_not_mixed_up() -> None:
    options = [f"after about {seconds} seconds" for seconds in (1, 11, 3, 13)]
    for number, option in enumerate(options):
        assert option_in(f"{option.capitalize()}.", options) == number


@pytest.mark.parametrize(
    ("text", "yes"),
    [
        ("Yes, no doubt.", True),
        ("I see a dog, so yes.", True),
        ("I see a nose and yesterday's cup, so no.", False),
        ("No.", False),
        ("A dog.", None),
    ],
)
def test_yes_and_no(text: str, yes: bool | None) -> None:
    assert says_yes(text) == yes


@pytest.mark.parametrize(
    ("facts", "right", "wrong"),
    [
        ({"present": True, "noun": "dog"}, "Yes, there is.", "No."),
        ({"present": False, "noun": "dog"}, "no", "Yes."),
        ({"motion": "left", "noun": "dog"}, "It heads left.", "It moves to the right."),
        ({"count": 3}, "Three.", "Two."),
        ({"count": 2}, "2", "12"),
        ({"count": 0}, "None.", "One."),
        ({"category": "animal"}, "An animal.", "A plant."),
        ({"noun": "red car"}, "A red car.", "A car."),
        ({"change": "vanishes", "noun": "dog"}, "The dog disappears.", "The dog appears."),
        ({"change": "becomes", "noun": "dog", "into": "cat"}, "It turns into a cat.", "The dog turns."),
        ({"time_s": 4.2}, "After about 5 seconds.", "After about 6 seconds."),
        ({"time_s": 0.4}, "Right at the start.", "After about 2 seconds."),
        ({"time_s": 3.0}, "After 2.5 seconds.", "In the middle."),
        ({"first": "dog"}, "The dog.", "The cat."),
        ({"last": "red car"}, "It is the red car.", "The car."),
        ({"change": "stops", "noun": "dog"}, "It stops moving.", "It starts to move."),
    ],
)
def test_open_answers(facts: dict, right: str, wrong: str) -> None:
    question = Question("x", "?", "", facts=facts)
    assert agrees(question, right)
    assert not agrees(question, wrong)
    assert not agrees(question, "")


def test_the_worlds_own_answers_are_right() -> None:
    world = World("test", 0, bank=procedural_bank())
    checked = 0
    for index in range(150):
        for question in world.sample(index).questions:
            assert agrees(question, question.answer), (
                question.question,
                question.answer,
                dict(question.facts),
            )
            checked += 1
    assert checked > 500


ITEMS = ("The door.", "The closet/cabinet.", "A red door.", "Two doors")


@pytest.mark.parametrize(
    ("text", "options", "number"),
    [
        ("He opened the door.", ITEMS, 0),
        ("the red door", ITEMS, 2),  # "door" stands in it too, as a part of "red door"
        ("A closet, or a cabinet", ITEMS, 1),  # two words of one option, none of the others
        ("2 doors", ITEMS, 3),
        ("Three.", ("1", "2", "3"), 2),
        ("Yes, it does.", ("yes", "no"), 0),
        ("It is not sure: yes and no.", ("yes", "no"), None),
        ("to the left", ("Moving left", "Moving right", "Still"), 0),
        ("moving", ("Moving left", "Moving right", "Still"), None),
        ("B", ("one", "two"), None),  # no options were shown, so a letter means none
        ("", ("one", "two"), None),
        ("two", ("Two.", "two"), None),
    ],
)
def test_the_option_that_an_open_answer_means(
    text: str, options: tuple[str, ...], number: int | None
) -> None:
    assert option_meant(text, options) == number
