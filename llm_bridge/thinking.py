"""Models that think before they answer: their marks, and an answer's text apart from its thoughts.

    marks = ThinkingMarks.of(tokenizer)      # None for a model that does not think
    reader = AnswerReader(tokenizer, marks, prompt_ids)
    for kind, text in reader.push(token): ...

The marks are those of chat templates: `<think>` ... `</think>` and its kin, or the channels of gpt-oss.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from llm_bridge.text_decoder import StreamingDecoder

Kind = Literal["thinking", "answer"]


@dataclass(frozen=True)
class ThinkingMarks:
    """begin, end: texts around thoughts. close: what is said for the model when they must end.

    header: a pattern of what is no text at all: the names of channels and roles.
    """

    begin: str
    end: str
    close: str
    header: str = ""

    @staticmethod
    def of(tokenizer: Any) -> ThinkingMarks | None:
        """Of a tokenizer and its chat template; None when they know no thinking."""
        template = str(getattr(tokenizer, "chat_template", None) or "")
        vocabulary = tokenizer.get_vocab()
        if "<|channel|>" in vocabulary and "<|message|>" in vocabulary:
            return ThinkingMarks(
                "<|channel|>analysis<|message|>",
                "<|end|>",
                "<|end|><|start|>assistant<|channel|>final<|message|>",
                r"(<\|start\|>assistant)?<\|channel\|>(final|commentary)[^<]*<\|message\|>|<\|start\|>assistant",
            )
        for begin, end in _PAIRS:
            if (begin in vocabulary and end in vocabulary) or end in template:
                return ThinkingMarks(begin, end, f"\n{end}\n\n")
        return None


_PAIRS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel>thought", "<channel|>"),
)


class AnswerReader:
    """The tokens of an answer as pieces of text, thoughts apart, without marks.

    marks: None passes all on as the answer. prompt_ids: the prompt may have begun the thoughts.
    thinking: whether the text so far ends in thoughts.
    """

    def __init__(self, tokenizer: Any, marks: ThinkingMarks | None, prompt_ids: Sequence[int] = ()) -> None:
        self._marks, self._held, self.thinking = marks, "", False
        shown: list[int] = []
        if marks is not None:
            tail = tokenizer.decode([token for token in prompt_ids[-16:] if token >= 0])
            self.thinking = tail.rstrip().endswith(marks.begin)
            texts = {marks.begin, marks.end, *re.findall(r"<\|\w+\|>", marks.begin + marks.close)}
            vocabulary = tokenizer.get_vocab()
            shown = [vocabulary[text] for text in texts if text in vocabulary]
        self._decoder = StreamingDecoder(tokenizer, shown)

    def push(self, token: int) -> list[tuple[Kind, str]]:
        """The texts that this token completes; none while a character or a mark is unfinished."""
        return self._sorted(self._decoder.push(token))

    def flush(self) -> list[tuple[Kind, str]]:
        """Whatever is left at the end."""
        return self._sorted(self._decoder.flush(), last=True)

    def _sorted(self, text: str, last: bool = False) -> list[tuple[Kind, str]]:
        """A text in its kinds; what may be the beginning of a mark is held back until more comes."""
        if self._marks is None:
            return [("answer", text)] if text else []
        self._held += text
        found: list[tuple[Kind, str]] = []
        while True:
            kind: Kind = "thinking" if self.thinking else "answer"
            mark = self._next_mark()
            if mark is None:
                break
            found.append((kind, self._held[: mark.start()]))
            self._held = self._held[mark.end() :]
            if mark.group() == self._marks.begin:
                self.thinking = True
            elif mark.group() == self._marks.end:
                self.thinking = False
        keep = len(self._held) if last else self._certain()
        found.append((kind, self._held[:keep]))
        self._held = self._held[keep:]
        return [(kind, text) for kind, text in found if text]

    def _next_mark(self) -> re.Match[str] | None:
        assert self._marks is not None
        marks = self._marks
        patterns = [re.escape(marks.begin), re.escape(marks.end)]
        if marks.header:
            patterns.append(marks.header)
        return re.search("|".join(patterns), self._held)

    def _certain(self) -> int:
        """How much of the held text is certainly no beginning of a mark."""
        assert self._marks is not None
        if self._marks.header and (at := self._held.rfind("<|start|>")) >= 0:
            return at
        if self._marks.header and (at := self._held.rfind("<|channel|>")) >= 0:
            return at
        for mark in (self._marks.begin, self._marks.end):
            for size in range(min(len(mark) - 1, len(self._held)), 0, -1):
                if self._held.endswith(mark[:size]):
                    return len(self._held) - size
        return len(self._held)


class AnswerLength:
    """Counts the tokens of an answer, and apart from them those of its thoughts, which may be no more either.

    most, most_thinking: tokens. close: what ends thoughts that have used up theirs.
    """

    def __init__(
        self,
        most: int,
        reader: AnswerReader | None = None,
        most_thinking: int = 0,
        close: Sequence[int] = (),
    ) -> None:
        self._most, self._reader, self._most_thinking = most, reader, most_thinking
        self._close = close
        self._forced: list[int] = []
        self._thoughts: list[bool] = []  # of each token, whether it is none of the answer's
        self._answered = 0

    def forced(self) -> int | None:
        """The token that must come next; None when it is the model's choice."""
        spent = len(self._thoughts) - self._answered >= self._most_thinking
        if not self._forced and spent and self._reader is not None and self._reader.thinking:
            self._forced = list(self._close)
        return self._forced.pop(0) if self._forced else None

    def count(self, token: int) -> None:
        """A token has come."""
        thought = self._reader is not None and (self._reader.thinking or bool(self._forced))
        if self._reader is not None:
            self._reader.push(token)
            thought = thought or self._reader.thinking
        self._thoughts.append(thought)
        self._answered += not thought

    def thinking_tokens(self, count: int) -> int:
        """How many of the first `count` tokens were thoughts, or ended them."""
        return sum(self._thoughts[:count])

    @property
    def answering(self) -> bool:
        """Whether the next token is the answer's, and not of the thoughts or their end."""
        return self._reader is None or not (self._reader.thinking or self._forced)

    @property
    def full(self) -> bool:
        """Whether the answer has all of its tokens."""
        return self._answered >= self._most
