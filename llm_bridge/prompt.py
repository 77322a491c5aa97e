"""Prompts: messages with videos and images become token ids with places for visual embeddings.

The chat template of the tokenizer is rendered as text with a sentinel per visual, split at the sentinels,
and only then tokenised; so a visual's place is exact whatever the tokenizer merges. Text by users can neither
forge a sentinel nor end a turn; what is not valid Unicode is refused before the tokenizer sees it.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from typing import Any, Generic, Literal, TypeVar

from encoder.errors import ConfigError, ModelError
from llm_bridge.thinking import ThinkingMarks

IGNORE = -100
PLACEHOLDER = -1
Role = Literal["system", "user", "assistant"]
TimeSentence = Literal["short", "long", "none"]

# A private-use character no keyboard types; it is removed from users' text.
_MARK = "\ue0f5"
_SENTINEL = re.compile(f"{_MARK}(\\d+(?:\\.\\d+)?){_MARK}")  # a visual, or one stretch of it
_ZERO_WIDTH = "\u200b"
NO_MARKS: Mapping[str, str] = {}


@dataclass(frozen=True)
class Stretch:
    """Embeddings of a visual that stand side by side in a prompt.

    offsets: per axis of the model's positions, that of each embedding counted from where the stretch begins;
    empty: one after the other. extent: how far on the next position is (default: count).
    """

    count: int
    offsets: tuple[tuple[int, ...], ...] = ()
    extent: int | None = None


@dataclass(frozen=True)
class Visual:
    """A video or image in a message: how many embeddings it takes, and when its frames were.

    key: identifies content, plan and model, for the caches. times_s: one per frame; empty for an image.
    layout: stretches of the embeddings with the model's own text between them; empty: one stretch. range_s:
    from where to where it was sampled; None for all of it.
    """

    tokens: int
    key: str = ""
    duration_s: float = 0.0
    times_s: tuple[float, ...] = ()
    layout: tuple[str | Stretch, ...] = ()
    range_s: tuple[float, float] | None = None

    @property
    def kind(self) -> Literal["image", "video"]:
        """What a chat template calls it."""
        return "video" if self.times_s else "image"


V = TypeVar("V")


@dataclass(frozen=True)
class Message(Generic[V]):
    """One turn: text and media in the order they are read.

    V: type of a video or image in it; `Visual` when a prompt is made of it. Texts that follow each other
    are joined as they are; a medium begins a line of its own.
    """

    role: Role
    content: tuple[str | V, ...]

    @staticmethod
    def of(role: Role, *content: str | V) -> Message[V]:
        """`Message.of("user", video, "What happens?")`"""
        return Message(role, tuple(content))

    @property
    def text(self) -> str:
        """Its words, without the media."""
        return "".join(part for part in self.content if isinstance(part, str))


@dataclass(frozen=True)
class Prompt:
    """Token ids with PLACEHOLDER where a visual embedding belongs.

    visuals: in the order of the messages, which a chat template may change within one; spans: (start, length)
    of each, from its first embedding to its last, with the text between. positions: of each id, per axis;
    empty when they are its index. next_position: of what follows. For training only: labels are ids to learn,
    IGNORE elsewhere; branches are (start, end) of questions that share all before the first and do not see
    each other.
    """

    ids: tuple[int, ...]
    visuals: tuple[Visual, ...]
    spans: tuple[tuple[int, int], ...]
    labels: tuple[int, ...] = ()
    branches: tuple[tuple[int, int], ...] = ()
    positions: tuple[tuple[int, ...], ...] = ()
    next_position: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    def followed_by(self, ids: Sequence[int]) -> Prompt:
        """The same with more token ids at its end, none of them to learn."""
        added = range(self.next_position, self.next_position + len(ids))
        return replace(
            self,
            ids=(*self.ids, *ids),
            labels=(*self.labels, *[IGNORE] * len(ids)),
            positions=tuple((*axis, *added) for axis in self.positions),
            next_position=self.next_position + len(ids),
        )

    @property
    def shift(self) -> int | None:
        """How far positions run ahead of indices at the end; None when positions are indices."""
        return self.next_position - len(self.ids) if self.positions else None

    @cached_property
    def cache_keys(self) -> tuple[int, ...]:
        """One integer per position: the token id, or a negative one for the visual and the place in it."""
        keys = list(self.ids)
        for visual, (start, count) in zip(self.visuals, self.spans, strict=True):
            base = int.from_bytes(blake2b(visual.key.encode(), digest_size=7).digest(), "big") << 20
            offset = 0
            for index in range(start, start + count):
                if keys[index] == PLACEHOLDER:
                    offset += 1
                    keys[index] = -(base + offset)
        return tuple(keys)


def time_sentence(visual: Visual, form: TimeSentence) -> str:
    """How long a video is and when it was sampled, in VideoChat-Flash's words; empty for an image."""
    if form == "none" or not visual.times_s:
        return ""
    count = len(visual.times_s)
    start = (
        f"\nThe video lasts for {visual.duration_s:.2f} seconds, and {count} frames are uniformly sampled "
    )
    if form == "short" and visual.range_s is not None:
        return start + f"from {visual.range_s[0]:.2f} to {visual.range_s[1]:.2f} seconds. "
    if form == "short":
        return start + "from it. "
    return start + f"at {', '.join(f'{t:.2f}' for t in visual.times_s)} seconds. "


def template_text(
    tokenizer: Any, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool, think: bool = False
) -> str:
    """The conversation as one text: by the chat template, or "User: ... Assistant: ..." without one.

    A system prompt that the template refuses stands before the first user's text. think: told to templates
    that know it.
    """
    if template := getattr(tokenizer, "chat_template", None):
        switches = _switches(str(template), think)

        def by_template(turns: Sequence[dict[str, Any]]) -> str:
            return tokenizer.apply_chat_template(
                list(turns), tokenize=False, add_generation_prompt=add_generation_prompt, **switches
            )

        try:
            return by_template(messages)
        except Exception as error:
            with contextlib.suppress(Exception):
                if merged := _system_in_user(messages):
                    return by_template(merged)
            raise ModelError(
                f"The chat template of the language model refuses this conversation: {error}."
            ) from error
    names = {"system": "", "user": "User: ", "assistant": "Assistant: "}
    text = "".join(f"{names[m['role']]}{m['content']}\n" for m in messages)
    return text + "Assistant:" if add_generation_prompt else text


def _switches(template: str, think: bool) -> dict[str, Any]:
    """Whether to think, by the names that chat templates know it by; others take no notice."""
    # gpt-oss, which has channels, always thinks: "low" is its least.
    least, more = ("low", "medium") if "<|channel|>" in template else ("none", "high")
    return {"enable_thinking": think, "thinking": think, "reasoning_effort": more if think else least}


def _system_in_user(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with a leading system prompt put before the first user's text; none without one."""
    if len(messages) < 2 or (messages[0]["role"], messages[1]["role"]) != ("system", "user"):
        return []
    system, user, *rest = messages
    if not isinstance(system["content"], str):  # parts, of a template that takes media
        blank = {"type": "text", "text": "\n\n"}
        return [{"role": "user", "content": [*system["content"], blank, *user["content"]]}, *rest]
    return [{"role": "user", "content": f"{system['content']}\n\n{user['content']}"}, *rest]


def check_text(text: Any, what: str = "The text") -> str:
    """The text itself; raises ConfigError for what no tokenizer can read: no str, a lone surrogate, NUL.

    what: its name in the error. All text goes through here before it is tokenised.
    """
    if not isinstance(text, str):
        raise ConfigError(f"{what} must be a text (str), not a {type(text).__name__}.")
    try:
        if not text.isascii():
            text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        # Python keeps a byte that is no UTF-8, of an argument or a file name, in these.
        byte = 0xDC80 <= code <= 0xDCFF
        fault = (
            f"a byte that is not UTF-8 (0x{code - 0xDC00:02x})"
            if byte
            else f"half a character ({chr(code)!a})"
        )
        raise ConfigError(
            f"{what} is not valid Unicode: it has {fault} at position {error.start}; "
            "send it as UTF-8, or take that out."
        ) from None
    if (nul := text.find("\0")) >= 0:
        raise ConfigError(f"{what} has a NUL character at position {nul}; take it out.")
    return text


def neutralize(text: str, tokenizer: Any, marks: Iterable[str] = ()) -> str:
    """The text with every literal special token broken by a zero-width space, and without sentinel marks.

    marks: other texts to break, such as those that stand for media. Raises ConfigError as `check_text` does.
    """
    text = check_text(text).replace(_MARK, "")
    for special in sorted({*tokenizer.all_special_tokens, *marks}, key=len, reverse=True):
        if len(special) > 1 and special in text:
            text = text.replace(special, special[0] + _ZERO_WIDTH + special[1:])
    return text


def count_text(
    tokenizer: Any,
    messages: Sequence[Message[Any]],
    *,
    add_generation_prompt: bool = True,
    most: int | None = None,
    bound: TextBound | None = None,
    marks: Mapping[str, str] = NO_MARKS,
    think: bool = False,
) -> int:
    """Tokens of a conversation without its media and their time sentences.

    A text that has more than `most` tokens whatever they are, by `bound`, is not tokenised: the least count
    that it can have is returned. Raises ConfigError for text that is not valid.
    """
    # Whatever stands for a medium is a place without tokens here.
    plain = [
        Message(m.role, tuple(part if isinstance(part, str) else Visual(0) for part in m.content))
        for m in messages
    ]
    text, visuals = _to_text(tokenizer, plain, add_generation_prompt, "none", marks, think)
    if most is not None and bound is not None and (least := bound.least_tokens(text)) > most:
        return least
    builder = _Builder(tokenizer, visuals)
    builder.begin(text)
    builder.add(text)
    return len(builder.ids)


@dataclass(frozen=True)
class TextBound:
    """How few tokens a text can have: each stands for at most `longest` bytes of its UTF-8.

    silent: bytes that the tokenizer may drop.
    """

    longest: int
    silent: bytes = b""

    def least_tokens(self, text: str) -> int:
        """At most the number of tokens of a text; counted without tokenising it."""
        return -(-len(text.encode().translate(None, self.silent)) // self.longest)

    @staticmethod
    def of(tokenizer: Any) -> TextBound | None:
        """Of a tokenizer; None where nothing bounds it: it drops characters, or joins unknown ones."""
        fast = getattr(tokenizer, "backend_tokenizer", None)
        shrinks = 1 if fast is None else _shrinks(_steps(fast.normalizer, "normalizers"))
        if fast is None or shrinks is None:
            return None
        splits = _steps(fast.pre_tokenizer, "pretokenizers")
        if any(s["type"] not in _WHOLE_SPLITS or s.get("behavior") == "Removed" for s in splits):
            return None
        added = fast.get_added_tokens_decoder().values()
        if any(token.lstrip or token.rstrip for token in added):  # any number of blanks with it
            return None
        from tokenizers import models, pre_tokenizers

        vocabulary = fast.get_vocab(with_added_tokens=True)
        if not isinstance(fast.model, models.BPE):
            return None
        if any(step["type"] == "ByteLevel" for step in splits):  # each byte is written as one character
            longest = max(max(map(len, vocabulary)), *(len(token.content.encode()) for token in added), 1)
            split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str
            spelt: dict[int, str] = {}
            for code in (*range(0x800), *range(0x800, 0xD800, 0x40), *range(0xE000, 0x110000, 0x1000)):
                spelt |= zip(chr(code).encode(), split(chr(code))[0][0], strict=True)
            silent = bytes(byte for byte, character in spelt.items() if character not in vocabulary)
            return TextBound(shrinks * longest, silent)
        if not fast.model.byte_fallback or any(f"<0x{byte:02X}>" not in vocabulary for byte in range(256)):
            return None
        return TextBound(shrinks * max(len(token.encode()) for token in vocabulary))


# Pre-tokenizers that keep every character.
_WHOLE_SPLITS = ("ByteLevel", "Metaspace", "Digits", "Split", "Punctuation")


def _shrinks(normalizers: Sequence[dict[str, Any]]) -> int | None:
    """How many times shorter, in bytes, normalizers can make a text; None where nothing bounds it."""
    times = 1
    for step in normalizers:
        if step["type"] in ("NFC", "NFKC", "NFD"):
            times = 4  # three letters of three bytes are one of Hangul, a letter of four one of ASCII
        elif step["type"] == "Replace":
            pattern = step["pattern"].get("String")
            if pattern is None or len(step["content"].encode()) < len(pattern.encode()):
                return None
        elif step["type"] != "Prepend":
            return None
    return times


def _steps(component: Any, inner: str) -> list[dict[str, Any]]:
    """The parts of a tokenizer's normalizer or pre-tokenizer, in order."""
    if component is None:
        return []
    settings = json.loads(component.__getstate__())
    return list(settings[inner]) if settings["type"] == "Sequence" else [settings]


def render(
    tokenizer: Any,
    messages: Sequence[Message[Visual]],
    *,
    add_generation_prompt: bool = True,
    time_form: TimeSentence = "short",
    marks: Mapping[str, str] = NO_MARKS,
    axes: int = 1,
    think: bool = False,
) -> Prompt:
    """Messages -> Prompt, ready for generation.

    marks: what the chat template writes for an "image" and a "video", for templates that take media; else
    media stand in a message's text. axes: of the model's positions. think: whether a model that can think
    first does.
    """
    text, visuals = _to_text(tokenizer, messages, add_generation_prompt, time_form, marks, think)
    builder = _Builder(tokenizer, visuals)
    builder.begin(text)
    builder.add(text)
    return builder.prompt(axes)


def render_chat_training(
    tokenizer: Any, messages: Sequence[Message[Visual]], *, time_form: TimeSentence = "short"
) -> Prompt:
    """Messages -> Prompt whose labels are the assistant's words, each with its end-of-turn token.

    Where the chat template rewrites earlier turns, each turn is a branch, as it was when it was said.
    """
    prompts = render_chat_turns(tokenizer, messages, time_form=time_form)
    if len(prompts) == 1:
        return prompts[0]
    from llm_bridge.packing import share_beginning  # it knows prompts

    try:
        return share_beginning(prompts)
    except ValueError as error:
        raise ModelError(
            "The chat template rewrites earlier turns, and a later turn brings another video: train on "
            "conversations whose videos all come first."
        ) from error


def render_chat_turns(
    tokenizer: Any, messages: Sequence[Message[Visual]], *, time_form: TimeSentence = "short"
) -> list[Prompt]:
    """The same as one Prompt, or as one for each assistant turn where the template rewrites earlier ones."""
    turns = [
        _turn_texts(tokenizer, messages[: index + 1], time_form)
        for index, message in enumerate(messages)
        if message.role == "assistant"
    ]
    if not turns:
        raise ModelError("A training conversation needs at least one assistant turn.")
    said = [before + answer for before, answer, _ in turns]
    if all(before.startswith(earlier) for (before, _, _), earlier in zip(turns[1:], said, strict=False)):
        return [_training_prompt(tokenizer, turns)]
    return [_training_prompt(tokenizer, [turn]) for turn in turns]


_Turn = tuple[str, str, tuple[Visual, ...]]  # the text before an answer, the answer, the visuals of both


def _training_prompt(tokenizer: Any, turns: Sequence[_Turn]) -> Prompt:
    """Turns that each begin with all of the one before."""
    builder = _Builder(tokenizer, ())
    builder.begin(turns[0][0])
    done = 0
    for before, answer, builder.visuals in turns:
        builder.add(before[done:])
        builder.add(answer, learn=True)
        done = len(before) + len(answer)
    return builder.prompt()


def _turn_texts(tokenizer: Any, messages: Sequence[Message[Visual]], time_form: TimeSentence) -> _Turn:
    """The last turn, the assistant's, as it is when it is said."""
    before, visuals = _to_text(tokenizer, messages[:-1], True, time_form)
    after, _ = _to_text(tokenizer, messages, False, time_form)
    if after.startswith(before):
        answer = after[len(before) :]
    else:  # the template begins thoughts, and leaves them out of what was said: they end at once
        words, marks = neutralize(messages[-1].text, tokenizer).strip(), ThinkingMarks.of(tokenizer)
        begun = marks is not None and before.rstrip().endswith(marks.begin)
        if marks is None or not begun or not words or words not in after:
            raise ModelError(
                "The chat template does not show an answer as it asks for it: it cannot be trained."
            )
        answer = marks.close + after[after.rindex(words) :]
    # The newline that templates put behind an end-of-turn token belongs to the next turn.
    return before, answer.rstrip("\n") or answer, visuals


def render_plain_training(tokenizer: Any, visual: Visual, caption: str) -> Prompt:
    """Visual, caption, newline: the plain template of LLaVA-style stage 1; the human text is not used."""
    builder = _Builder(tokenizer, (visual,))
    builder.begin("")
    builder.add(f"{_MARK}0{_MARK}")
    builder.add(neutralize(caption, tokenizer) + "\n", learn=True)
    return builder.prompt()


def _to_text(
    tokenizer: Any,
    messages: Sequence[Message[Visual]],
    add_generation_prompt: bool,
    time_form: TimeSentence,
    marks: Mapping[str, str] = NO_MARKS,
    think: bool = False,
) -> tuple[str, tuple[Visual, ...]]:
    """The conversation by the chat template, with sentinels for the visuals, and the visuals."""
    visuals = tuple(part for message in messages for part in message.content if isinstance(part, Visual))
    if marks:
        return _marked_text(tokenizer, messages, add_generation_prompt, marks, visuals, think), visuals
    count = 0
    plain = []
    for message in messages:
        parts: list[str] = []
        for part in message.content:
            if isinstance(part, Visual):
                if parts and parts[-1] and not parts[-1][-1].isspace():
                    parts.append("\n")
                parts.append(f"{_MARK}{count}{_MARK}{time_sentence(part, time_form)}\n")
                count += 1
            else:
                parts.append(neutralize(part, tokenizer))
        plain.append({"role": message.role, "content": "".join(parts)})
    text = template_text(tokenizer, plain, add_generation_prompt=add_generation_prompt, think=think)
    return text, visuals


def _marked_text(
    tokenizer: Any,
    messages: Sequence[Message[Visual]],
    add_generation_prompt: bool,
    marks: Mapping[str, str],
    visuals: tuple[Visual, ...],
    think: bool,
) -> str:
    """By a chat template that writes a mark for each medium; each mark becomes the visual's layout."""
    parts = [
        {
            "role": message.role,
            "content": [
                {"type": part.kind}
                if isinstance(part, Visual)
                else {"type": "text", "text": neutralize(part, tokenizer, marks.values())}
                for part in message.content
            ],
        }
        for message in messages
    ]
    text = template_text(tokenizer, parts, add_generation_prompt=add_generation_prompt, think=think)
    # A template may write the images of a message before its videos: of each kind they keep their order.
    waiting: dict[str, list[int]] = {}
    for index, visual in enumerate(visuals):
        waiting.setdefault(marks[visual.kind], []).append(index)

    def laid_out(mark: re.Match[str]) -> str:
        if not (indices := waiting.get(mark.group())):
            return mark.group()
        index = indices.pop(0)
        stretches = enumerate(visuals[index].layout or (Stretch(visuals[index].tokens),))
        return "".join(
            part if isinstance(part, str) else f"{_MARK}{index}.{number}{_MARK}" for number, part in stretches
        )

    written = "|".join(map(re.escape, sorted(set(marks.values()), key=len, reverse=True)))
    text = re.sub(written, laid_out, text)
    if left := [visuals[indices[0]].kind for indices in waiting.values() if indices]:
        raise ModelError(f"The chat template of the language model takes no {left[0]}s at this place.")
    return text


class _Builder:
    """Collects ids, spans, positions and labels piece by piece."""

    def __init__(self, tokenizer: Any, visuals: tuple[Visual, ...]) -> None:
        self.tokenizer, self.visuals = tokenizer, visuals
        self.ids: list[int] = []
        self.labels: list[int] = []
        self.spans: dict[int, tuple[int, int]] = {}  # of a visual: its first index, and the one after it
        self.stretches: list[tuple[int, Stretch]] = []  # where each begins

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
                index, _, number = piece.partition(".")
                visual, start = self.visuals[int(index)], len(self.ids)
                part = visual.layout[int(number)] if number and visual.layout else Stretch(visual.tokens)
                assert isinstance(part, Stretch)
                self._extend([PLACEHOLDER] * part.count, learn=False)
                self.stretches.append((start, part))
                self.spans[int(index)] = (self.spans.get(int(index), (start, 0))[0], len(self.ids))
            elif piece:
                self._extend(self.tokenizer(piece, add_special_tokens=False).input_ids, learn)

    def _extend(self, ids: list[int], learn: bool) -> None:
        self.ids += ids
        self.labels += ids if learn else [IGNORE] * len(ids)

    def prompt(self, axes: int = 1) -> Prompt:
        spans = tuple((start, end - start) for _, (start, end) in sorted(self.spans.items()))
        positions, following = self._positions(axes)
        return Prompt(
            tuple(self.ids),
            self.visuals,
            spans,
            tuple(self.labels),
            positions=positions,
            next_position=following,
        )

    def _positions(self, axes: int) -> tuple[tuple[tuple[int, ...], ...], int]:
        """Positions per axis, and the next one; none where they are the indices on one axis."""
        if axes == 1 and all(not part.offsets and part.extent is None for _, part in self.stretches):
            return (), len(self.ids)
        found: list[list[int]] = [[] for _ in range(axes)]
        index = position = 0
        for start, part in [*self.stretches, (len(self.ids), Stretch(0))]:
            for axis, values in enumerate(found):
                values += range(position, position + start - index)
                first = position + start - index
                own = part.offsets[axis] if part.offsets else range(part.count)
                values += [first + offset for offset in own]
            position += start - index + (part.count if part.extent is None else part.extent)
            index = start + part.count
        return tuple(map(tuple, found)), position
