"""Answers that follow a schema: valid whatever the model, or said to be cut; wrong schemas are sentences."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from encoder.errors import ConfigError
from llm_bridge.compute_worker import ComputeWorker
from llm_bridge.generation import Generation
from llm_bridge.llm import LanguageModel
from llm_bridge.prompt import Message, Visual, render
from llm_bridge.sampling import Sampler, SamplingParams
from llm_bridge.structured import (
    LONGEST_SCHEMA,
    UNANSWERABLE,
    AnswerSchema,
    SchemaVocabulary,
    check_tokenizer,
)
from llm_bridge.thinking import AnswerLength
from tests.tiny_llms import byte_level

jsonschema = pytest.importorskip("jsonschema")
pytest.importorskip("llguidance", reason="the extra json is not installed")

THING: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "moves": {"type": "boolean"},
        "where": {"enum": ["left", "right", None]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 5}, "maxItems": 2},
    },
    "required": ["name", "count", "moves", "where", "tags"],
    "additionalProperties": False,
}


def generation(llm: LanguageModel, clip: int = 0, **sampling: Any) -> Generation:
    embedding = torch.randn(12, llm.hidden_size, generator=torch.Generator().manual_seed(clip))
    prompt = render(llm.tokenizer, [Message.of("user", Visual(12, f"clip {clip}"), "What is it?")])
    return Generation(llm, prompt, [embedding], SamplingParams(**{"max_new_tokens": 200, **sampling}))


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 1.0, "seed": 1, "repetition_penalty": 1.2}], ids=str
)
@pytest.mark.quick(1)
def test_every_tokenizer_and_random_weights_give_valid_json(
    llm: LanguageModel, sampling: dict[str, Any]
) -> None:
    for clip in range(3):
        asked = generation(llm, clip, schema=THING, **sampling)
        text = "".join(asked)
        assert asked.stats.finish == "stop"
        jsonschema.validate(json.loads(text), THING)


def test_answers_in_one_pass_are_those_alone(tiny_llm: Callable[[str], LanguageModel]) -> None:
    llm = tiny_llm("qwen2")
    alone = ["".join(generation(llm, clip, schema=THING)) for clip in range(4)]
    worker = ComputeWorker(llm)

    def ask(clip: int) -> str:
        asked = generation(llm, clip, schema=THING)
        asked.worker = worker
        return "".join(asked)

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(ask, range(4))) == alone
    worker.close()
    assert len(set(alone)) > 1


def test_an_answer_that_is_cut_says_so(tiny_llm: Callable[[str], LanguageModel]) -> None:
    llm = tiny_llm("qwen2")
    whole = generation(llm, schema=THING)
    text = "".join(whole)
    needed = whole.stats.completion_tokens
    cut = generation(llm, schema=THING, max_new_tokens=needed - 1)
    assert text.startswith("".join(cut))
    assert cut.stats.finish == "length"
    exact = generation(llm, schema=THING, max_new_tokens=needed)  # whole without a token that ends it
    assert ("".join(exact), exact.stats.finish) == (text, "stop")


def test_without_an_end_of_its_own_a_number_may_still_grow(tiny_llm: Callable[[str], LanguageModel]) -> None:
    llm = tiny_llm("qwen2")
    seven = llm.tokenizer("7").input_ids[0]
    asked = generation(llm, schema={"type": "integer"}, max_new_tokens=2, logit_bias={seven: 100})
    assert ("".join(asked), asked.stats.finish) == ("77", "length")


@settings(max_examples=30, deadline=None)
@given(
    st.recursive(
        st.sampled_from(
            [
                {"type": "boolean"},
                {"type": "null"},
                {"type": "integer", "minimum": -5, "maximum": 500},
                {"type": "string", "maxLength": 4},
                {"enum": ["a", 1, None]},
                {"const": {"x": [1]}},
                {"type": "string", "format": "date"},
                {"type": "string", "pattern": "^[a-c]{1,3}$"},
            ]
        ),
        lambda inner: (
            st.builds(lambda item: {"type": "array", "items": item, "maxItems": 2, "minItems": 1}, inner)
            | st.builds(
                lambda one, two: {
                    "type": "object",
                    "properties": {"a": one, "b": two},
                    "required": ["a"],
                    "additionalProperties": False,
                },
                inner,
                inner,
            )
            | st.builds(lambda one, two: {"anyOf": [one, two]}, inner, inner)
        ),
        max_leaves=4,
    ),
    st.integers(0, 2**32),
)
def test_any_scores_under_any_schema_give_valid_json(schema: dict[str, Any], seed: int) -> None:
    tokenizer = _tokenizer()
    ends = {tokenizer.eos_token_id}
    guide = VOCABULARY.guide(AnswerSchema.of(schema))
    sampler = Sampler(SamplingParams(max_new_tokens=400), end_ids=ends, guide=guide)
    random, tokens = torch.Generator().manual_seed(seed), []
    while sampler.finish is None:
        token = sampler(torch.randn(SIZE, generator=random))
        if token in ends:
            break
        tokens.append(token)
    assert sampler.finish != "length"
    jsonschema.validate(json.loads(tokenizer.decode(tokens)), schema)


TOKENIZERS: list[Any] = []
SIZE = 640  # above the tokenizer's, as padded tables are


def _tokenizer() -> Any:
    if not TOKENIZERS:
        TOKENIZERS.append(byte_level())
    return TOKENIZERS[0]


VOCABULARY = SchemaVocabulary.of(_tokenizer(), SIZE, {_tokenizer().eos_token_id})


def test_the_answer_is_held_to_it_only_when_the_thoughts_have_ended() -> None:
    class Reader:
        thinking = True

        def push(self, token: int) -> None:
            self.thinking = self.thinking and token != 9

    length = AnswerLength(50, Reader(), 8)  # type: ignore[arg-type]
    guide = VOCABULARY.guide(AnswerSchema.of({"const": True}))
    sampler = Sampler(SamplingParams(max_new_tokens=50), length=length, guide=guide)

    def scores(token: int) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.tensor(token), SIZE).float()

    assert [sampler(scores(token)) for token in (5, 6, 9)] == [5, 6, 9]
    answer = [sampler(scores(5))]
    while sampler.finish is None:
        answer.append(sampler(scores(5)))
    assert _tokenizer().decode(answer) == "true"


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "strin"}, "Invalid type: strin"),
        ({"type": "object", "properties": 5}, "properties must be an object"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"not": {"type": "string"}}, '"not"'),
        ({"not": {"type": "string"}, "x-guidance": {"lenient": True}}, '"not"'),
        ({"type": "string", "pattern": "("}, "unclosed group"),
        ({"$ref": "http://localhost/schema"}, "cannot be enforced"),
        ({"enum": []}, "Unsatisfiable"),
        ({"default": float("nan")}, "is no JSON"),
        pytest.param({"default": object()}, "is no JSON", id="an object"),
        ("{}", "must be a JSON object"),
        pytest.param({"description": "x" * LONGEST_SCHEMA}, "shorten it", id="too long"),
    ],
    ids=str,
)
def test_what_cannot_be_enforced_is_one_sentence(schema: Any, said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        SamplingParams(schema=schema)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("beside", [{"think": True}, {"min_tokens": 2}, {"stop_token_ids": (3,)}], ids=str)
def test_what_would_break_the_json_goes_not_with_it(beside: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"goes without {next(iter(beside))}"):
        SamplingParams(schema=THING, **beside)


def test_what_only_shows_at_the_first_token_is_a_sentence_too(
    tiny_llm: Callable[[str], LanguageModel],
) -> None:
    """A schema with more fields than are followed."""
    many = {"type": "object", "properties": {f"p{index}": {"type": "string"} for index in range(1500)}}
    with pytest.raises(ConfigError, match="items") as raised:
        "".join(generation(tiny_llm("qwen2"), schema=many))
    assert "<state>" not in str(raised.value)


def test_a_schema_that_refers_to_itself_alone_is_refused_before_anything_is_computed() -> None:
    with pytest.raises(ConfigError, match=UNANSWERABLE) as raised:
        SamplingParams(schema={"$ref": "#"})
    assert "<state>" not in str(raised.value)


def test_without_llguidance_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ConfigError, match=r"pip install 'fluxchat\[json\]'"):
        SamplingParams(schema=THING)


def test_a_tokenizer_that_cannot_be_held_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match="leave the schema out"):
        check_tokenizer(object(), "mine")


def test_a_schema_is_a_value() -> None:
    params = SamplingParams(schema=THING)
    assert params == SamplingParams(schema=AnswerSchema.of(THING))
    assert hash(params)
    assert params.schema.value == THING  # type: ignore[union-attr]
