"""The words of the world: phrases for motions and places, templates of questions, split into train and test.

No test template occurs among the training ones. Placeholders: {noun} a name ("dog"), {nouns} its plural,
{first} and {second} two names, {event} what happens ("the dog appears"), {doing} a motion as a gerund
("moving to the left").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from training.demo_world.scene import Motion

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
# What training calls a video, so that questions may call it anything.
FILMS = ("video", "video", "clip", "footage", "recording", "film")
NUMBERS = ("no", "one", "two", "three", "four")

QUESTIONS: Mapping[str, Split] = {
    "caption": {
        "train": (
            "Describe the video.",
            "What happens in the video?",
            "What is going on in this video?",
            "Tell me what you see.",
            "Write a caption for this video.",
            "Please describe what happens.",
            "Say what can be seen.",
            "Describe what is shown.",
            "What is this video about?",
            "Explain what happens here.",
            "Can you tell me what is going on?",
            "In a few words, what happens?",
            "Give me a caption.",
            "What do we see in this video?",
        ),
        "test": (
            "Give a short description of this clip.",
            "What does the clip show?",
            "Summarise the video.",
        ),
    },
    "existence": {
        "train": (
            "Is there {noun} in the video?",
            "Does {noun} appear in the video?",
            "Can you see {noun}?",
            "Is {noun} shown in this video?",
            "Do you see {noun} anywhere?",
            "Is {noun} visible at any time?",
            "Does the video show {noun}?",
            "Is {noun} there?",
            "Does the video have {noun} in it?",
            "Look closely: is there {noun}?",
            "Did you notice {noun}?",
            "Was there {noun} at some point?",
            "Do we get to see {noun}?",
            "Tell me whether there is {noun}.",
            "{noun}: is that in the video?",
            "I am looking for {noun}. Is it here?",
        ),
        "test": (
            "Does the clip contain {noun}?",
            "Would I find {noun} in this clip?",
            "Is {noun} part of the scene?",
        ),
    },
    "which_exists": {
        "train": (
            "Which of these is in the video?",
            "Which of these things appears?",
            "Which one can be seen in the video?",
            "Which one does the video show?",
            "Which of these do you see?",
            "Which of these is shown?",
            "One of these is in the video: which one?",
            "Pick the thing that is in the video.",
            "Choose what can be seen.",
            "Which thing on this list occurs?",
            "What is really in the video?",
        ),
        "test": ("Which of the following is part of the clip?", "Which of the following shows up?"),
    },
    "object": {
        "train": (
            "What object is in the video?",
            "What is shown in the video?",
            "What do you see in the video?",
            "Which object is this?",
            "What is the main object?",
            "What thing appears in the video?",
            "What is it?",
            "Name what you see.",
            "What is the thing on the screen?",
            "Tell me what is shown.",
            "Which thing do you see?",
            "What is in this video?",
            "Identify the object.",
            "What am I looking at?",
        ),
        "test": ("What is the clip about?", "Name the object in this clip.", "What can be seen here?"),
    },
    "object_by_motion": {
        "train": (
            "Which object is {doing}?",
            "What is {doing} in the video?",
            "What is the thing that is {doing}?",
            "Which thing is {doing}?",
            "What do you see {doing}?",
            "Tell me which object is {doing}.",
            "One thing is {doing}: which one?",
            "Which of the objects is {doing}?",
            "Which one is {doing}?",
            "Identify the thing {doing}.",
        ),
        "test": ("Name the object that is {doing}.", "What can be seen {doing}?"),
    },
    "category": {
        "train": (
            "What kind of thing is in the video?",
            "What type of object is shown?",
            "What category does the object belong to?",
            "What kind of object is it?",
            "What sort of thing is this?",
            "Which category is the object in?",
            "Is it an animal, a plant, food, or what else?",
            "To which group does the thing belong?",
            "Say what kind of thing it is.",
            "What sort of object do you see?",
            "Name the category of the object.",
            "What is the thing: which type?",
            "Which kind is the object of?",
            "Under which heading would you put this object?",
        ),
        "test": (
            "What class of things does the object belong to?",
            "How would you classify the object in the clip?",
        ),
    },
    "count": {
        "train": (
            "How many {nouns} are there?",
            "How many {nouns} can you see?",
            "How many {nouns} are in the video?",
            "Count the {nouns}.",
            "What is the number of {nouns}?",
            "How many {nouns} does the video show?",
            "Tell me how many {nouns} there are.",
            "Say the number of {nouns}.",
            "How many {nouns} do you see in total?",
            "How many {nouns} are shown?",
            "Number of {nouns}?",
            "How many {nouns} appear?",
            "There are how many {nouns}?",
        ),
        "test": ("Give the number of {nouns} in the clip.", "How many {nouns} does the clip contain?"),
    },
    "moving_count": {
        "train": (
            "How many objects are moving?",
            "How many objects move in the video?",
            "How many things are moving?",
            "What is the number of moving objects?",
            "How many of the objects move?",
            "Count the things that move.",
            "Count the moving objects.",
            "Tell me how many objects are moving.",
            "Say the number of things that move.",
            "How many of them do not stand still?",
            "How many things change their place?",
            "Of all objects, how many move?",
            "Number of moving things?",
            "How many are on the move?",
            "Give me a count of what moves.",
        ),
        "test": ("Give the number of objects in motion.", "How many objects are in motion?"),
    },
    "moving_direction": {
        "train": (
            "Which way does the {noun} move?",
            "In which direction does the {noun} move?",
            "Where does the {noun} go?",
            "What direction is the {noun} moving in?",
            "Which direction does the {noun} take?",
            "What is the moving direction of the {noun}?",
            "Where is the {noun} going?",
            "Left, right, up or down: where does the {noun} go?",
            "Tell me the direction of the {noun}.",
            "Say where the {noun} moves to.",
            "To which side is the {noun} moving?",
            "What direction does the {noun} go in?",
            "The {noun} moves: in which direction?",
        ),
        "test": ("Which way is the {noun} heading?", "Towards which side does the {noun} travel?"),
    },
    "action": {
        "train": (
            "What does the {noun} do?",
            "What is the {noun} doing?",
            "How does the {noun} move?",
            "What does the {noun} do in the video?",
            "Describe what the {noun} does.",
            "What kind of motion does the {noun} make?",
            "Tell me what the {noun} does.",
            "How is the {noun} moving?",
            "What motion does the {noun} show?",
            "Say how the {noun} moves.",
            "What can you see the {noun} doing?",
            "Describe the movement of the {noun}.",
            "The {noun}: what does it do?",
            "In what way does the {noun} move?",
        ),
        "test": (
            "What can be said about the motion of the {noun}?",
            "How would you describe the motion of the {noun}?",
        ),
    },
    "order_two": {
        "train": (
            "Which appears first, the {first} or the {second}?",
            "What comes first, the {first} or the {second}?",
            "Does the {first} or the {second} appear first?",
            "Which one is shown first, the {first} or the {second}?",
            "Which is there earlier, the {first} or the {second}?",
            "Which do you see first, the {first} or the {second}?",
            "Is it the {first} or the {second} that comes first?",
            "The {first} or the {second}: which one is first?",
            "Between the {first} and the {second}, which one appears first?",
            "Tell me which is earlier, the {first} or the {second}.",
            "Who comes first, the {first} or the {second}?",
            "Out of the {first} and the {second}, which is the first to appear?",
        ),
        "test": (
            "Which of the two shows up earlier, the {first} or the {second}?",
            "Who is on screen first: the {first} or the {second}?",
        ),
    },
    "order_first": {
        "train": (
            "Which object appears first?",
            "What is the first object to appear?",
            "What appears at first?",
            "Which thing comes first?",
            "What do you see first?",
            "Tell me what comes first.",
            "Which object is there before the others?",
            "The first thing to appear is what?",
            "Which of the objects do we see first?",
            "What is shown first?",
            "Name the object that appears first.",
        ),
        "test": ("Which object is the earliest to show up?", "What enters the clip before all others?"),
    },
    "order_last": {
        "train": (
            "Which object appears last?",
            "What is the last object to appear?",
            "What appears at the end?",
            "Which thing comes last?",
            "What do you see last?",
            "Tell me what comes last.",
            "Which object is there after the others?",
            "The last thing to appear is what?",
            "Which of the objects do we see last?",
            "What is shown last?",
            "Name the object that appears last.",
        ),
        "test": ("Which object is the final one to show up?", "What enters the clip last?"),
    },
    "order_all": {
        "train": (
            "In what order do the objects appear?",
            "What is the order in which the objects appear?",
            "Which object appears first, and which follow?",
            "In which order are the objects shown?",
            "Say in which order things appear.",
            "Tell me the order of the objects.",
            "What comes first, and what comes after it?",
            "Name the objects in the order in which they appear.",
            "Sort the objects by when they appear.",
            "Who appears when: what is the order?",
        ),
        "test": ("Give the order of appearance.", "List the objects as they show up."),
    },
    "sequence_after": {
        "train": (
            "What does the {noun} do after {doing}?",
            "What does the {noun} do once it has finished {doing}?",
            "After {doing}, what does the {noun} do?",
            "What happens after the {noun} is done {doing}?",
            "The {noun} is {doing}. What does it do then?",
            "What comes after {doing} for the {noun}?",
            "When the {noun} is no longer {doing}, what does it do?",
            "First the {noun} is {doing}, and then?",
            "Tell me what the {noun} does after {doing}.",
            "What does the {noun} go on to do after {doing}?",
        ),
        "test": (
            "What is the next thing the {noun} does after {doing}?",
            "What follows after the {noun} was {doing}?",
        ),
    },
    "sequence_first": {
        "train": (
            "What does the {noun} do first?",
            "What is the first thing the {noun} does?",
            "How does the {noun} move at first?",
            "What does the {noun} do at the start?",
            "Tell me what the {noun} does first.",
            "What is the {noun} doing at first?",
            "How does the {noun} move in the beginning?",
            "Which motion of the {noun} comes first?",
            "At the start, what does the {noun} do?",
            "Say what the {noun} does before anything else.",
        ),
        "test": ("How does the {noun} begin?", "What is the {noun} doing initially?"),
    },
    "scene_transition": {
        "train": (
            "How does the scene change?",
            "What is the scene transition?",
            "How does the background change?",
            "From where to where does the scene change?",
            "What scenes does the video show, one after the other?",
            "Tell me how the scene changes.",
            "What place comes first, and what place after it?",
            "Where are we first, and where after that?",
            "Describe the change of the background.",
            "Which scene turns into which?",
            "Say from which place to which place it goes.",
            "What are the two places?",
            "The background changes: how?",
        ),
        "test": ("Which change of scene takes place?", "Which places does the clip cut between?"),
    },
    "state_change": {
        "train": (
            "What happens to the {noun}?",
            "How does the {noun} change?",
            "What change do you see in the {noun}?",
            "What becomes of the {noun}?",
            "What happens to the {noun} during the video?",
            "Tell me what happens to the {noun}.",
            "Does anything happen to the {noun}?",
            "What about the {noun} changes?",
            "How is the {noun} changing?",
            "Say what changes with the {noun}.",
            "Over time, what does the {noun} go through?",
            "What event happens with the {noun}?",
        ),
        "test": ("Which change does the {noun} undergo?", "What is different about the {noun} later on?"),
    },
    "localisation": {
        "train": (
            "When does {event}?",
            "At what time does {event}?",
            "At which second does {event}?",
            "After how many seconds does {event}?",
            "What is the time when {event_s}?",
            "Tell me when {event_s}.",
            "Say at which second {event_s}.",
            "After what time does {event}?",
            "When is the moment that {event_s}?",
            "How long does it take until {event_s}?",
            "How many seconds in does {event}?",
            "Give the time at which {event_s}.",
            "How long into the video does {event}?",
            "How late in the video does {event}, in seconds?",
            "How much time goes by before {event_s}?",
        ),
        "test": ("How far into the clip does {event}?", "How many seconds pass before {event_s}?"),
    },
    "localisation_part": {
        "train": (
            "During which part of the video does {event}?",
            "In which part of the video does {event}?",
            "At what point of the video does {event}?",
            "Tell me in which part {event_s}.",
            "Beginning, middle or end: when does {event}?",
            "At which stage of the video does {event}?",
            "Is it early or late in the video that {event_s}?",
            "Say when {event_s}: at the beginning, in the middle, or at the end.",
            "In which stretch of the video does {event}?",
        ),
        "test": ("In which third of the clip does {event}?", "Roughly where in the clip does {event}?"),
    },
}


def third_person(phrase: str) -> str:
    """ "move left" -> "moves left", "do not move" -> "does not move"."""
    verb, _, rest = phrase.partition(" ")
    verb += "es" if verb in ("go", "do") or verb.endswith(("ch", "sh")) else "s"
    return f"{verb} {rest}".strip()


def sentence(text: str) -> str:
    """Capital letter first, full stop last."""
    text = text.strip()
    return text[0].upper() + text[1:] + ("" if text.endswith((".", "?")) else ".")
