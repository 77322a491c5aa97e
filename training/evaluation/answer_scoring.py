"""Scoring answers about the synthetic world: does a free text agree with the facts of a question."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from training.synthetic.phrases import COUNTING
from training.synthetic.question_forms import Question

# Words that name a motion, in any wording the world or a language model uses; more specific ones first.
_MOTION_WORDS: Mapping[str, str] = {
    "circle": r"circle|circling|circular|loop",
    "toward": r"toward|closer|nearer|approach|bigger|larger|grow",
    "away": r"\baway\b|farther|further|recede|retreat|smaller|distance|shrink",
    "spin": r"\bspin|\bturn|rotat|twirl|whirl",
    "left": r"\bleft",
    "right": r"\bright",
    "up": r"\bup\b|upward|\brise|\brising|\bclimb|ascend",
    "down": r"\bdown\b|downward|\bsink|\bdrop|\bfall|descend",
    "still": r"\bstill\b|not mov|n't mov|in place|where it was|stationary",
}
# Words that name a change; "becomes" is recognised by what the thing turns into.
_CHANGE_WORDS: Mapping[str, str] = {
    "same": r"\bsame\b|\bnothing\b|unchanged|n't change|not change",
    "stops": r"\bstop|\bhalt|comes to (?:a )?rest",
    "vanishes": r"disappear|vanish|\bgone\b|leaves",
    "appears": r"\bappear|shows up|\benters\b",
    "starts": r"\bstart|\bbegin",
}
# An answered time counts as right when it is this near to the true one.
NEAR_S = 1.0
_NUMBER = rf"(\d+(?:\.\d+)?|\b(?:{'|'.join(COUNTING)})\b)"


def motion_in(text: str) -> str | None:
    """The motion that a text names, or None; of several the one that stands first in `_MOTION_WORDS`."""
    lowered = text.lower()
    return next((motion for motion, words in _MOTION_WORDS.items() if re.search(words, lowered)), None)


def names(text: str, noun: str, plural: str | None = None) -> bool:
    """Whether a text names a thing, as whole words, in singular or plural."""
    plurals = (plural,) if plural else (noun + "s", noun + "es", noun.removesuffix("y") + "ies")
    forms = "|".join(re.escape(form.lower()) for form in (noun, *plurals))
    return re.search(rf"\b(?:{forms})\b", text.lower()) is not None


def letter_in(text: str) -> str | None:
    """The option letter of an answer to a multiple-choice question: the first that stands alone.

    The A of "A bus." is an article and none.
    """
    match = re.search(r"\(([A-Ha-h])\)|\b(A(?!\s+(?!is\b)[a-z])|[B-H])\b", text)
    return (match.group(1) or match.group(2)).upper() if match else None


def says_yes(text: str) -> bool | None:
    """Whether an answer says yes or no: the word it begins with, else the last of them; None for neither."""
    words = re.findall(r"[a-z]+", text.lower())
    verdicts = [word for word in words if word in ("yes", "no")]
    if not verdicts:
        return None
    return (words[0] if words[0] in ("yes", "no") else verdicts[-1]) == "yes"


def option_in(text: str, options: Sequence[str]) -> int | None:
    """The number of the option that an answer chooses, or None.

    By its letter when the answer begins with one, "(B)", "B." or "B:"; else by its words when the text holds
    those of one option alone, as VLMEvalKit infers options from texts; else by a letter anywhere.
    """
    leading = re.match(r"\s*(?:\(([A-Ha-h])\)|([A-H])(?:[.):]|\s*$))", text)
    answer = f" {_plain(text)} "
    contained = [number for number, option in enumerate(options) if f" {_plain(option)} " in answer]
    if leading is None and len(contained) == 1:
        return contained[0]
    letter = letter_in(text)
    return ord(letter) - ord("A") if letter else None


def option_meant(text: str, options: Sequence[str]) -> int | None:
    """The number of the option that an open answer, made without seeing the options, means; or None.

    Words are compared in lower case, without punctuation and articles, numbers as digits. An option whose
    words stand in the answer, in order, is meant, where no other does but in a part of it. Where none does,
    the one that shares most words with the answer (F1 of bags of words, as SQuAD scores answers), if it is
    one alone.
    """
    answer = _content(text)
    contents = [_content(option) for option in options]
    held = [number for number, words in enumerate(contents) if words and _holds(answer, words)]
    whole = [n for n in held if not any(m != n and _holds(contents[m], contents[n]) for m in held)]
    if held:
        return whole[0] if len(whole) == 1 else None
    shares = [_word_f1(answer, words) for words in contents]
    best = max(shares, default=0.0)
    return shares.index(best) if best > 0 and shares.count(best) == 1 else None


def _content(text: str) -> list[str]:
    """The words of a text that carry its meaning, numbers as digits."""
    words = (word for word in _plain(text).split() if word not in ("a", "an", "the"))
    return [str(COUNTING.index(word)) if word in COUNTING else word for word in words]


def _holds(words: Sequence[str], part: Sequence[str]) -> bool:
    """Whether the part stands in the words, in order and side by side."""
    return any(words[start : start + len(part)] == part for start in range(len(words) - len(part) + 1))


def _word_f1(one: Sequence[str], other: Sequence[str]) -> float:
    """Agreement of two bags of words, 0 to 1."""
    common = (Counter(one) & Counter(other)).total()
    return 2 * common / (len(one) + len(other)) if common else 0.0


def agrees(question: Question, text: str) -> bool:
    """Whether an answer is right: by the option chosen for multiple choice, by its facts otherwise."""
    if question.options:
        return option_in(text, question.options) == question.answer_index
    facts: Mapping[str, Any] = question.facts
    lowered = text.lower().strip()
    if _plain(text) and _plain(text) == _plain(question.answer):  # irregular plurals
        return True
    if "shown" in facts:
        listed = re.split(r",|;|\n|\band\b", lowered)
        things = sum(bool(_plain(part)) for part in listed)
        return things == len(facts["shown"]) and all(names(text, name) for name in facts["shown"])
    if "present" in facts:
        return says_yes(lowered) == facts["present"]
    if "change" in facts:
        if facts["change"] == "becomes":
            return names(text, facts["into"])
        return (
            next((c for c, words in _CHANGE_WORDS.items() if re.search(words, lowered)), None)
            == facts["change"]
        )
    if "motion" in facts:
        return motion_in(text) == facts["motion"]
    if "count" in facts:
        match = re.search(rf"{_NUMBER}|\bno(?:ne)?\b", lowered)
        return match is not None and _value(match.group(1) or "zero") == facts["count"]
    if "time_s" in facts and "part" not in facts:
        answered_s = seconds_in(text)
        return answered_s is not None and abs(answered_s - facts["time_s"]) <= NEAR_S
    for key in ("first", "last"):
        if key in facts:
            return names(text, facts[key])
    if "category" in facts:
        return names(text, facts["category"])
    if "noun" in facts:
        return names(text, facts["noun"])
    return _plain(text) == _plain(question.answer)


def seconds_in(text: str) -> float | None:
    """The time that an answer gives, in seconds: its first number, "5" or "five", or 0 for "at the start"."""
    lowered = text.lower()
    match = re.search(_NUMBER, lowered)
    if match is not None:
        return _value(match.group(1))
    return 0.0 if re.search(r"\b(?:start|beginning)\b", lowered) else None


def _value(number: str) -> float:
    """Of a number in digits or in words."""
    return float(COUNTING.index(number) if number in COUNTING else number)


def _plain(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))
