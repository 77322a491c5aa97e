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

Kind = Literal["thinking", "answer"]


@dataclass(frozen=True)
class ThinkingMarks:
    """begin, end: texts around thoughts. close: what ends them when they must end.

    header: a pattern of what is neither: the names of channels and roles. switch: whether the chat template
    can be told not to think. always: whether the model thinks even then.
    """

    begin: str
    end: str
    close: str
    header: str = ""
    switch: bool = False

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
                switch=True,
            )
        for begin, end in _PAIRS:
            if (begin in vocabulary and end in vocabulary) or end in template:
                return ThinkingMarks(begin, end, f"\n{end}\n\n", switch=bool(_SWITCH.search(template)))
        return None


_PAIRS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel>thought", "<channel|>"),
)
_SWITCH = re.compile(r"\benable_thinking\b|\bthinking\b|\breasoning_effort\b|\breasoning\b")


def template_switches(think: bool) -> dict[str, Any]:
    """What chat templates are told, by the names that they know it by; others take no notice."""
    effort = "medium" if think else "low"  # gpt-oss has no "none"
    return {"enable_thinking": think, "thinking": think, "reasoning": think, "reasoning_effort": effort}


class AnswerReader:
    """The tokens of an answer as texts that never end inside a character, thoughts apart, without marks.

    marks: None passes all on as the answer. prompt_ids: the thoughts may have been begun by the prompt.
    thinking: whether the last token belonged to thoughts.
    """

    def __init__(self, tokenizer: Any, marks: ThinkingMarks | None, prompt_ids: Sequence[int] = ()) -> None:
        self._tokenizer, self._marks = tokenizer, marks
        self._ids: list[int] = []
        self._start = self._read = 0
        self._held = ""
        self.thinking = False
        if marks is None:
            return
        tail = tokenizer.decode([token for token in prompt_ids[-16:] if token >= 0])
        self.thinking = tail.rstrip().endswith(marks.begin)
        shown = {marks.begin, marks.end, *re.findall(r"<\|\w+\|>", marks.begin + marks.close)}
        # Of special tokens, only those of the marks are read; the others are no text.
        self._shown = {token for text in shown if (token := tokenizer.get_vocab().get(text)) is not None}

    def push(self, token: int) -> list[tuple[Kind, str]]:
        """The texts that this token completes; none while a character or a mark is unfinished."""
        self._ids.append(token)
        text = self._text(self._start, len(self._ids))
        return [] if text.endswith("\ufffd") else self._sorted(self._emit(text))

    def flush(self) -> list[tuple[Kind, str]]:
        """Whatever is left at the end."""
        return self._sorted(self._emit(self._text(self._start, len(self._ids))), last=True)

    def _emit(self, text: str) -> str:
        # Decoding with the tokens before keeps the spaces that tokenizers drop at the start of a text.
        before = self._text(self._start, self._read)
        self._start, self._read = self._read, len(self._ids)
        return text[len(before) :].replace("\0", "")  # which no later prompt could hold

    def _text(self, start: int, end: int) -> str:
        ids = self._ids[start:end]
        if self._marks is None or self._shown.isdisjoint(ids):
            return self._decode(ids)
        texts, run = [], []
        for token in ids:
            if token in self._shown:
                texts += [self._decode(run), self._tokenizer.convert_ids_to_tokens(token)]
                run = []
            else:
                run.append(token)
        return "".join((*texts, self._decode(run)))

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

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


class ThinkingAllowance:
    """Counts an answer's tokens and its thoughts' apart, and ends thoughts that have used up their own.

    most_thinking, most_answer: tokens. full: whether the answer has all of its tokens.
    """

    def __init__(self, reader: AnswerReader, most_thinking: int, most_answer: int, close: Sequence[int]) -> None:
        self._reader = reader
        self._most_thinking, self._most_answer = most_thinking, most_answer
        self._close, self._forced = close, list[int]()
        self.thinking_tokens = self.answer_tokens = 0

    def forced(self) -> int | None:
        """The token that must come next, if one must."""
        if not self._forced and self._reader.thinking and self.thinking_tokens >= self._most_thinking:
            self._forced = list(self._close)
        return self._forced.pop(0) if self._forced else None

    def count(self, token: int) -> None:
        """A token has come."""
        thought = self._reader.thinking or bool(self._forced)
        self._reader.push(token)
        if thought or self._reader.thinking:
            self.thinking_tokens += 1
        else:
            self.answer_tokens += 1

    @property
    def full(self) -> bool:
        """Whether the answer has all of its tokens."""
        return self.answer_tokens >= self._most_answer
