"""Sampling: the next token of an answer from the model's logits.

    sampler = Sampler(SamplingParams(temperature=0.7, top_p=0.9, seed=1), prompt_ids, end_ids)
    token = sampler(logits)

The rules are transformers' own, in its order for generation, except that logit_bias comes behind the
repetition penalty, so that its numbers mean the same with one. The temperature divides float64 scores whose
greatest is 0, where none overflows.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal

import torch
from torch import Tensor

from encoder.errors import ConfigError, ModelError
from llm_bridge.structured import AnswerSchema, Guide
from llm_bridge.thinking import AnswerLength

FinishReason = Literal["stop", "length", "cancelled"]  # how an answer ended: its end token, its limit, a stop


class LogitBias(Mapping[int, float]):
    """An immutable mapping of token ids to what is added to their scores."""

    def __init__(self, biases: Mapping[int, float]) -> None:
        self._biases = dict(sorted(biases.items()))

    def __getitem__(self, token: int) -> float:
        return self._biases[token]

    def __iter__(self) -> Iterator[int]:
        return iter(self._biases)

    def __len__(self) -> int:
        return len(self._biases)

    def __hash__(self) -> int:
        return hash(tuple(self._biases.items()))

    def __repr__(self) -> str:
        return repr(self._biases)


@dataclass(frozen=True)
class SamplingParams:
    """How an answer's tokens are sampled, and how many there may be.

    max_new_tokens, min_tokens: bounds on its length; nothing ends it before the latter. temperature: 0 is
    greedy. top_p, top_k, min_p: keep the likeliest tokens: of a total probability, by number (0: all), by
    probability relative to the best one. seed: 0 to 2**63 - 1, makes sampling repeatable.
    repetition_penalty: above 1 makes tokens of the prompt and the answer less likely. stop_token_ids: end the
    answer as the model's own end of turn does. logit_bias: added to the logits of token ids, -100 to 100.
    think: whether a model that can think before it answers does (some always do); max_thinking_tokens: the
    most it may, beside those of the answer. schema: a JSON Schema (dict) that the answer's JSON follows; it
    goes without think, min_tokens and stop_token_ids.
    Numbers of numpy are accepted; bools, numbers in strings and 4.0 for 4 are refused.
    Raises ConfigError: one sentence that names the field.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    logit_bias: Mapping[int, float] | None = None
    think: bool = False
    max_thinking_tokens: int = 1024
    schema: AnswerSchema | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            "max_new_tokens": _whole("max_new_tokens", self.max_new_tokens, 1),
            "temperature": _real("temperature", self.temperature, 0, 10),
            "top_p": _real("top_p", self.top_p, 0, 1, above=True),
            "top_k": _whole("top_k", self.top_k, 0),
            "seed": None if self.seed is None else _whole("seed", self.seed, 0, 2**63 - 1),
            "min_p": _real("min_p", self.min_p, 0, 1),
            "repetition_penalty": _real("repetition_penalty", self.repetition_penalty, 0.01, 100),
            "min_tokens": _whole("min_tokens", self.min_tokens, 0),
            "stop_token_ids": _ids("stop_token_ids", self.stop_token_ids),
            "think": _flag("think", self.think),
            "max_thinking_tokens": _whole("max_thinking_tokens", self.max_thinking_tokens, 0),
            "logit_bias": None if self.logit_bias is None else _biases(self.logit_bias),
            "schema": None if self.schema is None else AnswerSchema.of(self.schema),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if self.min_tokens > self.max_new_tokens:
            raise ConfigError(
                f"min_tokens must not be above max_new_tokens, but {self.min_tokens} > {self.max_new_tokens}."
            )
        for name in ("think", "min_tokens", "stop_token_ids"):
            if self.schema is not None and getattr(self, name):
                raise ConfigError(f"An answer that follows a schema goes without {name}: leave one out.")

    def check_vocabulary(self, size: int) -> None:
        """Raises ConfigError when a token id is none of a model with `size` tokens."""
        for name, ids in (("stop_token_ids", self.stop_token_ids), ("logit_bias", self.logit_bias or ())):
            if (greatest := max(ids, default=0)) >= size:
                raise ConfigError(f"{name} must be token ids below {size}, not {greatest}.")


class Sampler:
    """Samples the tokens of one answer, one after the other.

    prompt_ids: token ids of the prompt's text, for the repetition penalty. end_ids: tokens that end an
    answer, which are excluded before `sampling.min_tokens`. length: counts them; default: without thoughts.
    guide: holds the answer to its schema.
    """

    def __init__(
        self,
        sampling: SamplingParams,
        prompt_ids: Sequence[int] = (),
        end_ids: Collection[int] = frozenset(),
        length: AnswerLength | None = None,
        guide: Guide | None = None,
    ) -> None:
        self._guide = guide
        self._length = length or AnswerLength(sampling.max_new_tokens)
        self._greedy, self._temperature = sampling.temperature == 0, sampling.temperature
        self._rules = _rules(sampling, len(prompt_ids), {*end_ids, *sampling.stop_token_ids})
        self._warpers = _warpers(sampling)
        self._ids = torch.tensor([list(prompt_ids)], dtype=torch.long)
        self._random = torch.Generator()  # on the CPU: the same draws on every device
        if sampling.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(sampling.seed)

    def __call__(self, logits: Tensor) -> int:
        """Logits (V,), on any device -> token id.

        Raises ModelError when the logits are not finite, ConfigError when the rules leave no token.
        """
        top, best = logits.max(dim=-1)
        if not math.isfinite(float(top)):
            raise ModelError(
                "The language model's scores are not finite numbers: load it with dtype float32, or check "
                "its weights."
            )
        guide = self._guide if self._length.answering else None
        if (forced := self._length.forced()) is not None:
            token, guide = forced, None
        elif self._greedy and self._rules is None and guide is None:
            token = int(best)
        else:
            token = self._sample(logits.detach().cpu(), guide)
        if guide is not None:
            guide.accept(token)
        if self._rules is not None:
            self._ids = torch.cat((self._ids, torch.tensor([[token]])), dim=1)
        self._length.count(token)
        return token

    @property
    def finish(self) -> FinishReason | None:
        """How the answer has ended with its last token: whole by its schema, or with all that it may have."""
        if self._guide is not None and self._guide.complete:
            return "stop"
        return "length" if self._length.full else None

    def _sample(self, logits: Tensor, guide: Guide | None) -> int:
        if guide is not None:
            logits = guide.masked(logits)
        scores = logits[None].double()  # on the CPU: Apple's GPUs have no float64
        if self._rules is not None:
            scores = self._rules(self._ids, scores)
        top, best = scores.max(dim=-1)
        if not math.isfinite(float(top)):
            if guide is not None:
                raise ConfigError("The schema leaves no token to choose: change it, or leave it out.")
            raise ConfigError("min_tokens and stop_token_ids leave no token to choose: lower min_tokens.")
        if self._greedy:
            return int(best)
        scores = ((scores - top) / self._temperature).float()
        scores = self._warpers(self._ids, scores)
        return int(torch.multinomial(scores.softmax(dim=-1)[0], 1, generator=self._random))


def _rules(sampling: SamplingParams, prompt_length: int, end_ids: Collection[int]) -> Any:
    """What changes scores by token id, (ids (1, N), scores (1, V)) -> scores; None when nothing does."""
    from transformers import (
        LogitsProcessorList,
        MinNewTokensLengthLogitsProcessor,
        RepetitionPenaltyLogitsProcessor,
        SequenceBiasLogitsProcessor,
    )

    rules: list[Any] = []
    if sampling.repetition_penalty != 1:
        rules.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.logit_bias:
        bias = {(token,): value for token, value in sampling.logit_bias.items()}
        rules.append(SequenceBiasLogitsProcessor(bias))  # type: ignore[arg-type]
    if sampling.min_tokens and end_ids:
        rules.append(MinNewTokensLengthLogitsProcessor(prompt_length, sampling.min_tokens, sorted(end_ids)))
    return LogitsProcessorList(rules) if rules else None


def _warpers(sampling: SamplingParams) -> Any:
    """What leaves only the likeliest tokens, once the temperature has scaled the scores."""
    from transformers import LogitsProcessorList, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    warpers: list[Any] = []
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    return LogitsProcessorList(warpers)


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be True or False, not {_shown(value)}.")
    return value


def _whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    known = isinstance(value, Integral) and not isinstance(value, bool)
    if not known or value < least or (most is not None and value > most):
        span = f"from {least} to {most}" if most is not None else f"of at least {least}"
        raise ConfigError(f"{name} must be a whole number {span}, not {_shown(value)}.")
    return int(value)


def _real(name: str, value: Any, least: float, most: float, above: bool = False) -> float:
    known = isinstance(value, Real) and not isinstance(value, bool)
    # The float counts: what is above 0 may become 0 as one. NaN fails every comparison.
    if not known or not least <= value <= most or (above and not float(value) > least):
        span = f"above {least} and at most {most}" if above else f"from {least} to {most}"
        raise ConfigError(f"{name} must be a number {span}, not {_shown(value)}.")
    return float(value)


def _ids(name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, (list, tuple, set, frozenset)):
        raise ConfigError(f"{name} must be a list of token ids, not {_shown(value)}.")
    return tuple(_whole(f"Each of {name}", token, 0) for token in value)


def _biases(value: Any) -> LogitBias:
    if not isinstance(value, Mapping):
        raise ConfigError(f"logit_bias must map token ids to numbers, not be {_shown(value)}.")
    return LogitBias(
        {
            _whole("Each token id of logit_bias", token, 0): _real(
                "Each value of logit_bias", bias, -100, 100
            )
            for token, bias in value.items()
        }
    )


def _shown(value: Any) -> str:
    """A value as error messages quote it: short, on one line, whatever it is."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # noqa: BLE001 - a foreign object's repr; huge integers have none either
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."
