"""Prompts: messages with videos and images become token ids with places for visual embeddings.

The chat template of the tokenizer is rendered as text with a sentinel per visual, split at the sentinels,
and only then tokenised; so a visual's place is exact whatever the tokenizer merges. Text by users can neither
forge a sentinel nor end a turn.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Any, Literal

from encoder.errors import ModelError

IGNORE = -100
PLACEHOLDER = -1
Role = Literal["system", "user", "assistant"]
TimeSentence = Literal["short", "long", "none"]

# A private-use character no keyboard types; it is removed from users' text.
_MARK = "\ue0f5"
_SENTINEL = re.compile(f"{_MARK}(\\d+){_MARK}")
_ZERO_WIDTH = "\u200b"


@dataclass(frozen=True)
class Visual:
    """A video or image in a message: how many embeddings it takes, and when its frames were.

    key: identifies content, plan and model, for the caches. times_s: one per frame; empty for an image.
    """

    tokens: int
    key: str = ""
    duration_s: float = 0.0
    times_s: tuple[float, ...] = ()


@dataclass(frozen=True)
class Message:
    """One turn: text and visuals in the order they are read."""

    role: Role
    content: tuple[str | Visual, ...]

    @staticmethod
    def of(role: Role, *content: str | Visual) -> Message:
        """`Message.of("user", video, "What happens?")`"""
        return Message(role, tuple(content))


@dataclass(frozen=True)
class Prompt:
    """Token ids with PLACEHOLDER where a visual embedding belongs.

    visuals: in order of appearance; spans: (start, tokens) of each. For training only: labels are ids to
    learn, IGNORE elsewhere; branches are (start, end) of questions that share all before the first and do not
    see each other.
    """

    ids: tuple[int, ...]
    visuals: tuple[Visual, ...]
    spans: tuple[tuple[int, int], ...]
    labels: tuple[int, ...] = ()
    branches: tuple[tuple[int, int], ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def cache_keys(self) -> tuple[int, ...]:
        """One integer per position: the token id, or a negative one for the visual and the place in it."""
        keys = list(self.ids)
        for visual, (start, count) in zip(self.visuals, self.spans, strict=True):
            base = int.from_bytes(blake2b(visual.key.encode(), digest_size=7).digest(), "big") << 20
            keys[start : start + count] = [-(base + offset) - 1 for offset in range(count)]
        return tuple(keys)


def time_sentence(visual: Visual, form: TimeSentence) -> str:
    """How long a video is and when it was sampled, in VideoChat-Flash's words; empty for an image."""
    if form == "none" or not visual.times_s:
        return ""
    count = len(visual.times_s)
    start = (
        f"\nThe video lasts for {visual.duration_s:.2f} seconds, and {count} frames are uniformly sampled "
    )
    if form == "short":
        return start + "from it. "
    return start + f"at {', '.join(f'{t:.2f}' for t in visual.times_s)} seconds. "


def template_text(tokenizer: Any, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool) -> str:
    """The conversation as one text: by the chat template, or "User: ... Assistant: ..." without one."""
    if getattr(tokenizer, "chat_template", None):
        try:
            return tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:
            raise ModelError(
                f"The chat template of the language model refuses this conversation: {error}."
            ) from error
    names = {"system": "", "user": "User: ", "assistant": "Assistant: "}
    text = "".join(f"{names[m['role']]}{m['content']}\n" for m in messages)
    return text + "Assistant:" if add_generation_prompt else text


def neutralize(text: str, tokenizer: Any) -> str:
    """The text with every literal special token broken by a zero-width space, and without sentinel marks."""
    text = text.replace(_MARK, "")
    for special in sorted(tokenizer.all_special_tokens, key=len, reverse=True):
        if len(special) > 1 and special in text:
            text = text.replace(special, special[0] + _ZERO_WIDTH + special[1:])
    return text


def render(
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    time_form: TimeSentence = "short",
) -> Prompt:
    """Messages -> Prompt, ready for generation."""
    text, visuals = _to_text(tokenizer, messages, add_generation_prompt, time_form)
    builder = _Builder(tokenizer, visuals)
    builder.begin(text)
    builder.add(text)
    return builder.prompt()


def render_chat_training(
    tokenizer: Any, messages: Sequence[Message], *, time_form: TimeSentence = "short"
) -> Prompt:
    """Messages -> Prompt whose labels are the assistant's words, each with its end-of-turn token."""
    builder: _Builder | None = None
    done = ""
    for index, message in enumerate(messages):
        if message.role != "assistant":
            continue
        before, visuals = _to_text(tokenizer, messages[:index], True, time_form)
        after, _ = _to_text(tokenizer, messages[: index + 1], False, time_form)
        if builder is None:
            builder = _Builder(tokenizer, visuals)
            builder.begin(before)
        builder.visuals = visuals
        if not (before.startswith(done) and after.startswith(before)):
            raise ModelError(
                "The chat template rewrites earlier turns: train on single-turn conversations instead."
            )
        builder.add(before[len(done) :])
        # The newline that templates put behind an end-of-turn token belongs to the next turn.
        answer = after[len(before) :]
        builder.add(answer.rstrip("\n") or answer, learn=True)
        done = before + (answer.rstrip("\n") or answer)
    if builder is None:
        raise ModelError("A training conversation needs at least one assistant turn.")
    return builder.prompt()


def render_plain_training(tokenizer: Any, visual: Visual, caption: str) -> Prompt:
    """Visual, caption, newline: the plain template of LLaVA-style stage 1; the human text is not used."""
    builder = _Builder(tokenizer, (visual,))
    builder.begin("")
    builder.add(f"{_MARK}0{_MARK}")
    builder.add(neutralize(caption, tokenizer) + "\n", learn=True)
    return builder.prompt()


def _to_text(
    tokenizer: Any, messages: Sequence[Message], add_generation_prompt: bool, time_form: TimeSentence
) -> tuple[str, tuple[Visual, ...]]:
    visuals: list[Visual] = []
    plain = []
    for message in messages:
        parts = []
        for part in message.content:
            if isinstance(part, Visual):
                parts.append(f"{_MARK}{len(visuals)}{_MARK}{time_sentence(part, time_form)}\n")
                visuals.append(part)
            else:
                parts.append(neutralize(part, tokenizer))
        plain.append({"role": message.role, "content": "".join(parts)})
    return template_text(tokenizer, plain, add_generation_prompt=add_generation_prompt), tuple(visuals)


class _Builder:
    """Collects ids, spans and labels piece by piece."""

    def __init__(self, tokenizer: Any, visuals: tuple[Visual, ...]) -> None:
        self.tokenizer, self.visuals = tokenizer, visuals
        self.ids: list[int] = []
        self.labels: list[int] = []
        self.spans: list[tuple[int, int]] = []

    def begin(self, text: str) -> None:
        """Put the beginning-of-sequence token in front where the tokenizer wants it and the text lacks it."""
        bos = self.tokenizer.bos_token_id
        if bos is None or bos not in self.tokenizer("a").input_ids[:1]:
            return
        if not (self.tokenizer.bos_token and text.startswith(self.tokenizer.bos_token)):
            self._extend([bos], learn=False)

    def add(self, text: str, *, learn: bool = False) -> None:
        """Tokenise a stretch of template text and open a span at each sentinel in it."""
        for position, piece in enumerate(_SENTINEL.split(text)):
            if position % 2:
                count = self.visuals[int(piece)].tokens
                self.spans.append((len(self.ids), count))
                self._extend([PLACEHOLDER] * count, learn=False)
            elif piece:
                self._extend(self.tokenizer(piece, add_special_tokens=False).input_ids, learn)

    def _extend(self, ids: list[int], learn: bool) -> None:
        self.ids += ids
        self.labels += ids if learn else [IGNORE] * len(ids)

    def prompt(self) -> Prompt:
        return Prompt(tuple(self.ids), self.visuals, tuple(self.spans), tuple(self.labels))
