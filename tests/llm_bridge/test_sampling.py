"""What SamplingParams accepts, and that no accepted setting gives a token that its rules forbid."""

import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from encoder.errors import ConfigError, ModelError
from llm_bridge import sampling
from llm_bridge.sampling import Sampler, SamplingParams, leading

VOCABULARY = 12
NAN, INF = float("nan"), float("inf")
NO_NUMBERS = [True, "1", None, NAN, INF, -INF, [1], {}, 1j, b"1", 10**400, "x" * 10**4]


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("max_new_tokens", [0, -1, 4.0, 1.5, np.float32(4), np.bool_(True)]),
        ("temperature", [-1, -1e-300, 10.1, Fraction(101, 10), torch.tensor(1.0)]),
        ("top_p", [0, -0.1, 1.1, Fraction(1, 10**400)]),
        ("top_k", [-1, 2.0]),
        ("seed", [-1, 2**63, 2**64, 1.5]),
        ("min_p", [-0.1, 1.1]),
        ("repetition_penalty", [0, -1, 1e-30, 1e30]),
        ("min_tokens", [-1, 0.0, 129]),
        ("stop_token_ids", [5, [-1], [1.0], ["a"], [None], [True], "12", {1: 2}]),
        (
            "logit_bias",
            [[(1, 2)], {"1": 2}, {1: "2"}, {1: 101}, {1: -101}, {1: NAN}, {-1: 0}, {1.5: 1}, {1: True}],
        ),
    ],
)
def test_what_makes_no_sense_is_one_sentence_that_names_it(field: str, wrong: list[Any]) -> None:
    allowed = {
        "seed": [None],
        "logit_bias": [None, {}],
        "stop_token_ids": [[1]],
        "max_new_tokens": [10**400],
        "top_k": [10**400],
    }.get(field, [])
    for value in [*wrong, *(other for other in NO_NUMBERS if other not in allowed)]:
        if field == "min_tokens" and value == 10**400:
            continue
        with pytest.raises(ConfigError) as raised:
            SamplingParams(**{field: value})
        message = str(raised.value)
        assert field in message
        assert message.count(". ") == 0
        assert message.endswith(".")
        assert len(message) < 200


def test_numbers_of_other_kinds_are_numbers() -> None:
    sampling = SamplingParams(
        np.int64(5), np.float32(0.5), Fraction(1, 2), np.uint8(3), min_tokens=np.int8(2)
    )
    assert sampling == SamplingParams(5, 0.5, 0.5, 3, min_tokens=2)
    assert [type(value) for value in (sampling.max_new_tokens, sampling.temperature)] == [int, float]


def test_settings_are_values() -> None:
    biases, stops = {3: 1, 1: -2.5}, [4, 5]
    sampling = SamplingParams(logit_bias=biases, stop_token_ids=stops)  # type: ignore[arg-type]
    biases[3] = 100
    stops.append(6)
    same = SamplingParams(logit_bias={1: -2.5, 3: 1.0}, stop_token_ids=(4, 5))
    assert sampling == same == replace(sampling)
    assert hash(sampling) == hash(same)
    assert sampling.logit_bias == {1: -2.5, 3: 1.0}
    assert sampling.stop_token_ids == (4, 5)


finite = st.floats(-(2.0**127), 2.0**127, width=32)
tokens = st.integers(0, VOCABULARY - 1)
samplings = st.builds(
    SamplingParams,
    max_new_tokens=st.just(20),
    temperature=st.one_of(st.just(0), st.floats(0, 10), st.sampled_from([5e-324, 1e-37, 1e-10])),
    top_p=st.floats(0, 1, exclude_min=True),
    top_k=st.integers(0, 2 * VOCABULARY),
    seed=st.one_of(st.none(), st.integers(0, 2**63 - 1)),
    min_p=st.floats(0, 1),
    repetition_penalty=st.floats(0.01, 100),
    min_tokens=st.integers(0, 3),
    stop_token_ids=st.lists(tokens, max_size=3),
    logit_bias=st.one_of(st.none(), st.dictionaries(tokens, st.floats(-100, 100), max_size=4)),
)


@settings(max_examples=200, deadline=None)
@given(
    sampling=samplings,
    rows=st.lists(st.lists(finite, min_size=VOCABULARY, max_size=VOCABULARY), min_size=1, max_size=5),
    prompt=st.lists(tokens, max_size=6),
)
@example(SamplingParams(20, 1e-40), [[float(i) for i in range(VOCABULARY)]], [])
@example(SamplingParams(20, 1e-40, repetition_penalty=100), [[-(2.0**127)] * VOCABULARY], [0, 1])
def test_any_setting_on_any_finite_scores_gives_an_allowed_token(
    sampling: SamplingParams, rows: list[list[float]], prompt: list[int]
) -> None:
    end_ids = {0}
    sampler = Sampler(sampling, prompt, end_ids)
    seen = list(prompt)
    for made, row in enumerate(rows):
        token = sampler(torch.tensor(row))
        scores = [
            (score * sampling.repetition_penalty if score < 0 else score / sampling.repetition_penalty)
            if index in seen and sampling.repetition_penalty != 1
            else score
            for index, score in enumerate(torch.tensor(row).tolist())
        ]
        for index, bias in (sampling.logit_bias or {}).items():
            scores[index] += float(np.float32(bias))
        if made < sampling.min_tokens:
            for index in {*end_ids, *sampling.stop_token_ids}:
                scores[index] = -INF
        best = max(scores)
        assert scores[token] > -INF
        if sampling.temperature == 0:
            assert scores[token] == best
        else:
            exact = [math.exp((score - best) / sampling.temperature) for score in scores]
            total = sum(exact)
            # The bounds themselves are computed in float32, where what hardly differs is the same.
            ahead = [p for p in exact if p > exact[token] * (1 + 1e-6)]
            if sampling.top_k:
                assert len(ahead) < sampling.top_k
            assert sum(ahead) / total <= sampling.top_p + 1e-3
            assert exact[token] >= sampling.min_p - 1e-3
        seen.append(token)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"logit_bias": {1: 5.0}}, {"min_tokens": 2}])
@pytest.mark.parametrize("wrong", [NAN, INF])
def test_scores_that_are_no_numbers_are_an_error(options: dict[str, Any], wrong: float) -> None:
    scores = torch.zeros(VOCABULARY)
    scores[7] = wrong
    for bad in (scores, torch.full((VOCABULARY,), -INF)):
        with pytest.raises(ModelError, match="not finite numbers"):
            Sampler(SamplingParams(**options), [1], {0})(bad)


def test_no_token_left_is_an_error() -> None:
    sampling = SamplingParams(min_tokens=1, stop_token_ids=tuple(range(VOCABULARY)))
    with pytest.raises(ConfigError, match="leave no token"):
        Sampler(sampling)(torch.zeros(VOCABULARY))


def test_a_tiny_temperature_is_nearly_greedy() -> None:
    scores = torch.tensor([0.0, 5.0, 5.0 - 1e-6, 3e38])
    assert {Sampler(SamplingParams(temperature=1e-40, seed=seed))(scores) for seed in range(20)} == {3}
    assert {Sampler(SamplingParams(temperature=1e-40, seed=seed))(scores[:3]) for seed in range(20)} == {1}


def test_drawing_follows_the_probabilities() -> None:
    sampler = Sampler(SamplingParams(temperature=0.5, seed=0))
    scores = torch.log(torch.tensor([1.0, 2.0, 3.0])) * 0.5
    counts = torch.bincount(torch.tensor([sampler(scores) for _ in range(3000)]), minlength=3) / 3000
    torch.testing.assert_close(counts, torch.tensor([1 / 6, 2 / 6, 3 / 6]), atol=0.03, rtol=0)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 5},
        {"top_p": 0.6},
        {"min_p": 0.2},
        {"top_k": 40, "top_p": 0.9, "min_p": 0.05},
        {"top_k": 60, "top_p": 0.3},  # a share of what top_k leaves, of which the first 50 are a part
        {"top_k": 50, "top_p": 0.5},
    ],
)
def test_the_greatest_logits_decide_as_all_do(
    options: dict[str, Any], kind: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the first few decide or all are looked at, one seed draws one token; bfloat16 has ties."""
    rows = 3 * torch.randn(40, 500, generator=torch.Generator().manual_seed(0)).to(kind)
    tokens = {}
    for most in (3, 50, 500):
        monkeypatch.setattr(sampling, "LEADING", most)
        samplers = [Sampler(SamplingParams(temperature=0.8, seed=n, **options)) for n in range(len(rows))]
        firsts = leading(rows, samplers)
        tokens[most] = [draw(row, first) for draw, row, first in zip(samplers, rows, firsts, strict=True)]
    assert tokens[3] == tokens[50] == tokens[500]


@pytest.mark.parametrize(
    "options", [{"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.2}, {"top_k": 9, "top_p": 0.7}]
)
def test_what_may_be_drawn_is_what_transformers_leaves(options: dict[str, Any]) -> None:
    warpers = {"top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper, "min_p": MinPLogitsWarper}
    row = 2 * torch.randn(300, generator=torch.Generator().manual_seed(1))
    scores = row[None] / 0.8
    for name, value in options.items():
        scores = warpers[name](value)(torch.zeros(1, 1, dtype=torch.long), scores)
    allowed = set(torch.isfinite(scores[0]).nonzero().flatten().tolist())
    sampler = Sampler(SamplingParams(temperature=0.8, seed=0, **options))
    assert {sampler(row) for _ in range(100 * len(allowed))} == allowed


def test_rows_of_a_batch_are_chosen_from_as_alone() -> None:
    rows = torch.randn(4, 900, generator=torch.Generator().manual_seed(2))
    ways = [{}, {"temperature": 1.0}, {"temperature": 0.5, "top_p": 0.8}, {"repetition_penalty": 1.3}]

    def samplers() -> list[Sampler]:
        return [Sampler(SamplingParams(seed=3, **way), [1, 2, 3]) for way in ways]

    alone = [sampler(row) for sampler, row in zip(samplers(), rows, strict=True)]
    together = samplers()
    firsts = leading(rows, together)
    assert [first.greatest is not None for first in firsts] == [False, False, True, False]
    assert [draw(*row) for draw, *row in zip(together, rows, firsts, strict=True)] == alone
