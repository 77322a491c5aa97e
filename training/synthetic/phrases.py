"""The words of the world: phrases for motions, places and numbers (templates: question_templates.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from training.synthetic.scene import Motion

Wording = Literal["train", "test"]
Split = Mapping[Wording, Sequence[str]]

# Base form first, so that one dog "moves left" and two dogs "move left".
MOVES: Mapping[Motion, Split] = {
    "left": {
        "train": ("move to the left", "move left", "go to the left", "travel left", "slide to the left"),
        "test": ("glide leftward", "head left", "drift to the left"),
    },
    "right": {
        "train": ("move to the right", "move right", "go to the right", "travel right", "slide to the right"),
        "test": ("glide rightward", "head right", "drift to the right"),
    },
    "up": {
        "train": ("move up", "go up", "rise", "move upwards", "climb up"),
        "test": ("glide upward", "head up", "drift upwards"),
    },
    "down": {
        "train": ("move down", "go down", "sink", "move downwards", "drop down"),
        "test": ("glide downward", "head down", "drift downwards"),
    },
    "circle": {
        "train": ("move in a circle", "go around in a circle", "circle around", "travel in a circle"),
        "test": ("make a loop", "follow a circle", "drift in a circle"),
    },
    "toward": {
        "train": (
            "come closer",
            "move towards the camera",
            "come towards the viewer",
            "get bigger and closer",
        ),
        "test": ("draw nearer", "approach the camera"),
    },
    "away": {
        "train": (
            "move away",
            "go away from the camera",
            "get smaller and farther",
            "move into the distance",
        ),
        "test": ("recede", "retreat from the viewer"),
    },
    "spin": {"train": ("spin", "spin around", "turn in place", "rotate"), "test": ("twirl", "whirl round")},
    "still": {
        "train": ("stay still", "stand still", "do not move", "stay in place"),
        "test": ("keep still", "remain where it was"),
    },
}
# The one form that answers use, as a third person, and the short form that options use.
ANSWERS: Mapping[Motion, str] = {
    "left": "moves to the left",
    "right": "moves to the right",
    "up": "moves up",
    "down": "moves down",
    "circle": "moves in a circle",
    "toward": "moves towards the camera",
    "away": "moves away from the camera",
    "spin": "spins",
    "still": "stays still",
}
OPTIONS: Mapping[Motion, str] = {
    "left": "left",
    "right": "right",
    "up": "up",
    "down": "down",
    "circle": "in a circle",
    "toward": "towards the camera",
    "away": "away from the camera",
    "spin": "spinning in place",
    "still": "not at all",
}
DOING: Mapping[Motion, str] = {
    "left": "moving left",
    "right": "moving right",
    "up": "moving up",
    "down": "moving down",
    "circle": "moving in a circle",
    "toward": "coming closer",
    "away": "moving away",
    "spin": "spinning",
    "still": "standing still",
}
# Background kind or photograph -> (as a place to cut to, as where something happens).
PLACES: Mapping[str, tuple[str, str]] = {
    "meadow": ("a meadow", "in a meadow"),
    "desert": ("a desert", "in the desert"),
    "sea": ("the sea", "by the sea"),
    "snow": ("a snowy land", "in the snow"),
    "night": ("a night sky", "at night"),
    "sunset": ("a sunset", "at sunset"),
    "grass": ("grass", "over grass"),
    "brick": ("a brick wall", "in front of a brick wall"),
}
COUNTING = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
    "twenty",
)
NUMBERS = ("no", *COUNTING[1:5])


def third_person(phrase: str) -> str:
    """ "move left" -> "moves left", "do not move" -> "does not move"."""
    verb, _, rest = phrase.partition(" ")
    verb += "es" if verb in ("go", "do") or verb.endswith(("ch", "sh")) else "s"
    return f"{verb} {rest}".strip()


def sentence(text: str) -> str:
    """Capital letter first, full stop last."""
    text = text.strip()
    return text[0].upper() + text[1:] + ("" if text.endswith((".", "?")) else ".")
