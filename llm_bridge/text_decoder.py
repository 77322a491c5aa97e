"""The text of an answer, token by token."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any


class StreamingDecoder:
    """Token ids -> text pieces that never end inside a character.

    shown: special tokens that are text; the others are none.
    """

    def __init__(self, tokenizer: Any, shown: Collection[int] = ()) -> None:
        self._tokenizer, self._shown = tokenizer, frozenset(shown)
        self._ids: list[int] = []
        self._start = self._read = 0

    def push(self, token: int) -> str:
        """The text that this token completes; empty while a character is unfinished."""
        self._ids.append(token)
        text = self._text(self._start, len(self._ids))
        if text.endswith("\ufffd"):
            return ""
        return self._emit(text)

    def flush(self) -> str:
        """Whatever is left at the end."""
        return self._emit(self._text(self._start, len(self._ids)))

    def _emit(self, text: str) -> str:
        # Decoding with the tokens before keeps the spaces that tokenizers drop at the start of a text.
        before = self._text(self._start, self._read)
        self._start, self._read = self._read, len(self._ids)
        return text[len(before) :].replace("\0", "")  # which no later prompt could hold

    def _text(self, start: int, end: int) -> str:
        ids = self._ids[start:end]
        if self._shown.isdisjoint(ids):
            return self._decode(ids)
        texts: list[str] = []
        run: list[int] = []
        for token in ids:
            if token in self._shown:
                texts += [self._decode(run), self._tokenizer.convert_ids_to_tokens(token)]
                run = []
            else:
                run.append(token)
        return "".join((*texts, self._decode(run)))

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
