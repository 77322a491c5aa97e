"""Answers that follow a JSON Schema: which tokens may come next, by llguidance (extra `json`).

    schema = AnswerSchema.of({"type": "object", "properties": {"dogs": {"type": "integer"}}})
    guide = SchemaVocabulary.of(tokenizer, size, end_ids).guide(schema)
    scores = guide.masked(scores); guide.accept(token)

A schema that is wrong, or has a keyword that cannot be enforced, is refused before anything is computed.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from encoder.errors import ConfigError

LONGEST_SCHEMA = 2**16  # characters
UNANSWERABLE = "no answer can follow it"
# One line as `json.dumps` writes it: free blanks would let an answer run on in them. Nothing in a schema may
# weaken what is enforced.
_RULES = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "coerce_one_of": False,
    "lenient": False,
}


@dataclass(frozen=True)
class AnswerSchema:
    """A JSON Schema that can be enforced. text: as JSON."""

    text: str
    grammar: str = field(repr=False, compare=False)

    @staticmethod
    def of(schema: AnswerSchema | Mapping[str, Any]) -> AnswerSchema:
        """Raises ConfigError for what is no schema, or cannot be enforced: one sentence."""
        if isinstance(schema, AnswerSchema):
            return schema
        if not isinstance(schema, Mapping):
            raise ConfigError(f"The schema must be a JSON object (dict), not a {type(schema).__name__}.")
        matcher = _llguidance().LLMatcher
        try:
            text = json.dumps(dict(schema), allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigError(f"The schema is no JSON ({error}): give a JSON Schema as a dict.") from None
        if len(text) > LONGEST_SCHEMA:
            raise ConfigError(
                f"The schema has {len(text)} characters, and at most {LONGEST_SCHEMA} are taken: shorten it."
            )
        try:
            grammar = matcher.grammar_from_json_schema(text, overrides=_RULES)
        except ValueError as error:
            raise _refused(error) from None
        wrong, said = matcher.validate_grammar_with_warnings(grammar)
        if wrong or said:  # a warning is about what would not be enforced
            raise _refused(said[0])
        # Of bytes, for any tokenizer: that no answer can follow it shows at the first token only.
        first = Guide(matcher(_llguidance().LLTokenizer("byte"), grammar, log_level=0), ())
        first.check_next()
        return AnswerSchema(text, grammar)

    @property
    def value(self) -> dict[str, Any]:
        """The schema as plain values."""
        values: dict[str, Any] = json.loads(self.text)
        return values

    @property
    def with_rules(self) -> dict[str, Any]:
        """As `value`, with what another program's llguidance needs to hold an answer to it as here."""
        return {**self.value, "x-guidance": _RULES}


def _refused(why: object) -> ConfigError:
    text = " ".join(str(why).partition("<state>")[0].split())  # then its inner state is listed
    text = UNANSWERABLE if text == "NoExtensionBias" else text
    return ConfigError(f"This schema cannot be enforced ({text[:200]}): change it, or leave it out.")


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise ConfigError("A schema needs llguidance: pip install 'fluxchat[json]'.") from None
    return llguidance


def check_tokenizer(tokenizer: Any, name: str) -> None:
    """Raises ConfigError where a language model's tokens cannot be held to a schema. name: the model's."""
    from transformers import PreTrainedTokenizerFast

    _llguidance()
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ConfigError(
            f"The tokenizer of {name} is not one of the tokenizers library, whose answers can be held to a "
            "schema: leave the schema out, or take another language model."
        )


class SchemaVocabulary:
    """A tokenizer as llguidance sees it; takes about a second to make."""

    def __init__(self, tokens: Any, ends: Collection[int]) -> None:
        self._tokens, self._ends = tokens, frozenset(ends)

    @staticmethod
    def of(tokenizer: Any, size: int, ends: Collection[int]) -> SchemaVocabulary:
        """size: of the model's vocabulary, at least the tokenizer's. ends: tokens that end an answer."""
        from llguidance.hf import from_tokenizer

        return SchemaVocabulary(
            from_tokenizer(tokenizer, n_vocab=max(size, len(tokenizer)), eos_token=sorted(ends)), ends
        )

    def guide(self, schema: AnswerSchema) -> Guide:
        """What holds one answer to a schema."""
        return Guide(_llguidance().LLMatcher(self._tokens, schema.grammar, log_level=0), self._ends)


class Guide:
    """Holds one answer to its schema, token by token. Raises ConfigError where the schema is too complex."""

    def __init__(self, matcher: Any, ends: Collection[int]) -> None:
        self._matcher, self._ends = matcher, frozenset(ends)
        self._check()

    def masked(self, scores: Tensor) -> Tensor:
        """Scores (V,) on the CPU with -inf for every token that cannot come next."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        allowed = torch.zeros(scores.shape[-1], dtype=torch.bool)
        known = torch.from_numpy(np.unpackbits(bits, bitorder="little")[: len(allowed)]).bool()
        allowed[: len(known)] = known
        return scores.masked_fill(~allowed, -torch.inf)

    def check_next(self) -> None:
        """Raises ConfigError where nothing can come next."""
        self._matcher.compute_bitmask()
        self._check()

    def accept(self, token: int) -> None:
        """A token of the answer has come."""
        if token not in self._ends:
            self._matcher.consume_token(token)
            self._check()

    @property
    def complete(self) -> bool:
        """Whether the answer is whole, and nothing more can come."""
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise _refused(self._matcher.get_error())
