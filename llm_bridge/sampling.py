"""Sampling: the next token of an answer from the model's logits.

    sampler = Sampler(SamplingParams(temperature=0.7, top_p=0.9, seed=1), prompt_ids, end_ids)
    token = sampler(logits)

The rules are transformers' own, in its order for generation, except that logit_bias comes behind the
repetition penalty, so that its numbers mean the same with one. The temperature divides float64 scores whose
greatest is 0, where none overflows. Of equal scores at the edge of what top_k, top_p and min_p leave,
transformers keeps all, and this as many as are asked for.

A vocabulary has 50 to 250 thousand tokens and a draw is among few of them: the greatest logits are taken on
the device, of all rows of a batch at once (`leading`), and a whole row is sorted only where they do not
decide.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any, Literal

import torch
from torch import Tensor

from encoder.errors import ConfigError, ModelError
from llm_bridge.structured import AnswerSchema, Guide
from llm_bridge.thinking import AnswerLength

FinishReason = Literal["stop", "length", "cancelled"]  # how an answer ended: its end token, its limit, a stop
LEADING = 256  # logits of a row that are looked at before all of it is
COLDEST = 1e-30  # a float32 is not divided by less


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


@dataclass(frozen=True)
class Greatest:
    """Some of a row's logits, on the host: the greatest (M,) float64, descending, and their tokens.

    total: the sum over all tokens of exp((logit - greatest) / temperature). whole: whether they are all.
    """

    values: Tensor
    ids: Tensor
    total: float
    whole: bool


@dataclass(frozen=True)
class Leading:
    """What of a row of logits is looked at first: the greatest one and its token, and more where one of
    several is drawn."""

    top: float
    best: int
    greatest: Greatest | None = None


def leading(logits: Tensor, samplers: Sequence[Sampler]) -> list[Leading]:
    """That of each row of logits (B, V) on any device, for its sampler; the device is waited for a few times
    in all and not for every row."""
    tops, bests = logits.max(dim=-1)
    found = [Leading(top, best) for top, best in zip(tops.tolist(), bests.tolist(), strict=True)]
    drawn = [row for row, sampler in enumerate(samplers) if sampler.draws]
    if not drawn:
        return found
    rows = logits if len(drawn) == len(samplers) else logits[drawn]
    values, ids = rows.topk(min(LEADING, rows.shape[-1]), dim=-1)
    # Row by row: a CPU sums one row in another order than several.
    totals = torch.stack(
        [
            ((row.float() - found[number].top) / max(samplers[number].temperature, COLDEST)).exp().sum()
            for number, row in zip(drawn, rows, strict=True)
        ]
    )
    whole = values.shape[-1] == rows.shape[-1]
    values, ids = values.float().cpu().double(), ids.cpu()
    for place, (number, total) in enumerate(zip(drawn, totals.tolist(), strict=True)):
        found[number] = replace(found[number], greatest=Greatest(values[place], ids[place], total, whole))
    return found


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
        self._sampling, self.temperature = sampling, sampling.temperature
        self._rules = _rules(sampling, len(prompt_ids), {*end_ids, *sampling.stop_token_ids})
        self._ids = torch.tensor([list(prompt_ids)], dtype=torch.long)
        self._random = torch.Generator()  # on the CPU: the same draws on every device
        if sampling.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(sampling.seed)

    @property
    def _truncates(self) -> bool:
        sampling = self._sampling
        return bool(sampling.top_k or sampling.top_p < 1 or sampling.min_p)

    @property
    def draws(self) -> bool:
        """Whether the next token is drawn from among the greatest logits as they are."""
        return bool(self.temperature) and self._truncates and self._rules is None and self._guide is None

    def __call__(self, logits: Tensor, first: Leading | None = None) -> int:
        """Logits (V,), on any device -> token id. first: what `leading` gave for them, if it was called.

        Raises ModelError when the logits are not finite, ConfigError when the rules leave no token.
        """
        first = first or leading(logits[None], [self])[0]
        if not math.isfinite(first.top):
            raise ModelError(
                "The language model's scores are not finite numbers: load it with dtype float32, or check "
                "its weights."
            )
        guide = self._guide if self._length.answering else None
        if (forced := self._length.forced()) is not None:
            token, guide = forced, None
        elif not self.temperature and self._rules is None and guide is None:
            token = first.best
        else:
            drawn = None if first.greatest is None else self._draw(first.greatest)
            token = self._sample(logits.detach().cpu(), guide) if drawn is None else drawn
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
        """From a whole row (V,) on the CPU."""
        if guide is not None:
            logits = guide.masked(logits)
        scores = logits.double()  # on the CPU: Apple's GPUs have no float64
        if self._rules is not None:
            scores = self._rules(self._ids, scores[None])[0]
        top, best = scores.max(dim=-1)
        if not math.isfinite(float(top)):
            if guide is not None:
                raise ConfigError("The schema leaves no token to choose: change it, or leave it out.")
            raise ConfigError("min_tokens and stop_token_ids leave no token to choose: lower min_tokens.")
        if not self.temperature:
            return int(best)
        chances = ((scores - top) / self.temperature).exp()
        if not self._truncates:
            return self._one_of(chances)
        token, total = None, float(chances.sum())
        for count in (min(LEADING, len(scores)), len(scores)):
            values, ids = scores.topk(count)
            token = self._draw(Greatest(values, ids, total, whole=count == len(scores)))
            if token is not None:
                break
        assert token is not None
        return token

    def _draw(self, greatest: Greatest) -> int | None:
        """One of the tokens that top_k, top_p and min_p leave; None where more of them must be looked at."""
        sampling, values, ids = self._sampling, greatest.values, greatest.ids
        by_id = ids.argsort()  # of equal logits the lower token is first, whatever the device says
        order = by_id[values[by_id].argsort(descending=True, stable=True)]
        values, total = values[order], greatest.total
        chances = ((values - values[0]) / self.temperature).exp()
        count = len(chances)
        if sampling.top_k and sampling.top_k <= count:
            count = sampling.top_k
            total = float(chances[:count].sum())
        elif sampling.top_k and sampling.top_p < 1 and not greatest.whole:
            return None  # top_p is a share of what top_k leaves, which is not all here
        chances = chances[:count]
        if sampling.top_p < 1:
            before = chances.cumsum(dim=0) - chances
            count = min(count, int((before < sampling.top_p * total).sum()))
        if sampling.min_p:
            count = min(count, int((chances >= sampling.min_p).sum()))
        count = max(count, 1)
        if not greatest.whole and values[count - 1] <= values[-1]:
            return None
        return int(ids[order[self._one_of(chances[:count])]])

    def _one_of(self, chances: Tensor) -> int:
        """An index drawn with these chances (N,), which need not sum to 1."""
        sums = chances.cumsum(dim=0)
        drawn = torch.rand(1, dtype=torch.float64, generator=self._random) * sums[-1]
        index = int(torch.searchsorted(sums, drawn, right=True))
        return index if index < len(sums) else int(chances.nonzero()[-1])  # where rounding reached the sum


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
