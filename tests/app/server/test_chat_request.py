"""What a request means: nothing in it is ignored, nothing is moved, and what is wrong is named."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.server.chat_request import ChatRequest, Reference, parse_chat
from app.server.errors import ApiError
from app.server.request_body import decode_json
from app.server.schemas import ChatBody
from encoder.video.part import Part

NAMES = {"type": "object", "properties": {"name": {"type": "string"}}}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def video(url: str) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": url}}


def parsed(*messages: dict[str, Any], **options: Any) -> ChatRequest:
    return parse_chat({"messages": list(messages) or [user(text("What?"))], **options})


def content(asked: ChatRequest) -> list[tuple[str, list[str]]]:
    """Roles and parts, media in angle brackets."""
    return [
        (message.role, [part if isinstance(part, str) else f"<{part.value}>" for part in message.content])
        for message in asked.messages
    ]


def refused(body: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse_chat(body)
    error = caught.value
    message = error.body["error"]["message"]
    assert message.endswith((".", "?"))
    assert "\n" not in message
    return error


# -- order --------------------------------------------------------------------------------------------------


def test_text_and_media_keep_their_places() -> None:
    asked = parsed(user(text("Before:"), video("a"), text("After:"), video("b"), text("Which fell?")))
    assert content(asked) == [("user", ["Before:", "<a>", "After:", "<b>", "Which fell?"])]
    params = [reference.param for reference in asked.media]
    assert params == ["messages[0].content[1].video_url.url", "messages[0].content[3].video_url.url"]


def test_media_stay_in_their_turn() -> None:
    asked = parsed(
        {"role": "developer", "content": "Be brief."},
        {"role": "system", "content": [text("Be kind.")]},
        user(video("a"), text("What is it?")),
        {"role": "assistant", "content": "A cat."},
        user(video("b")),
        user(text("And this?"), text("And why?")),
    )
    assert content(asked) == [
        ("system", ["Be brief.\nBe kind."]),
        ("user", ["<a>", "What is it?"]),
        ("assistant", ["A cat."]),
        ("user", ["<b>", "And this?\nAnd why?"]),
    ]


def test_a_later_system_message_is_not_moved() -> None:
    asked = parsed(
        user(text("One?")),
        {"role": "assistant", "content": "1"},
        {"role": "system", "content": "Shout."},
        user(text("Two?")),
    )
    assert [role for role, _ in content(asked)] == ["user", "assistant", "system", "user"]


@given(st.lists(st.sampled_from(["text", "video"]), min_size=1, max_size=6))
def test_any_sequence_of_parts_is_read_in_order(kinds: list[str]) -> None:
    parts = [text(f"t{i}") if kind == "text" else video(f"v{i}") for i, kind in enumerate(kinds)]
    asked = parsed(user(*parts, text("?")))
    (_, found), *_ = content(asked)
    names = [f"t{i}" if kind == "text" else f"<v{i}>" for i, kind in enumerate(kinds)]
    assert "\n".join(found).split("\n") == [*names, "?"]


def test_a_nul_is_refused_from_users_and_dropped_from_answers() -> None:
    asked = parsed(user(text("a")), {"role": "assistant", "content": "b\0c"}, user(text("d")))
    assert content(asked)[1] == ("assistant", ["bc"])
    for message, param in (
        ({"role": "user", "content": "a\0"}, "messages[0].content"),
        (user(text("a"), text("\0")), "messages[0].content[1].text"),
    ):
        assert refused({"messages": [message]}).body["error"]["param"] == param


# -- how media are named ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ({"type": "video_url", "video_url": "u"}, ("u", "video_url", "url", "")),
        ({"type": "video_url", "video_url": {"url": "u"}}, ("u", "video_url.url", "url", "")),
        (
            {"type": "image_url", "image_url": {"url": "u", "detail": "auto"}},
            ("u", "image_url.url", "url", ""),
        ),
        ({"type": "input_video", "video_url": "u"}, ("u", "video_url", "url", "")),
        ({"type": "input_video", "input_video": {"url": "u"}}, ("u", "input_video.url", "url", "")),
        ({"type": "input_video", "file_id": "f"}, ("f", "file_id", "id", "")),
        ({"type": "input_image", "image_url": "u", "detail": "auto"}, ("u", "image_url", "url", "")),
        ({"type": "input_image", "file_id": "f"}, ("f", "file_id", "id", "")),
        ({"type": "file", "file": {"file_id": "f"}}, ("f", "file.file_id", "id", "")),
        (
            {"type": "file", "file": {"file_data": "QQ==", "filename": "a.mp4"}},
            ("QQ==", "file.file_data", "data", "a.mp4"),
        ),
        ({"type": "input_file", "file_url": "u"}, ("u", "file_url", "url", "")),
        ({"type": "input_file", "file_data": "QQ==", "filename": "a"}, ("QQ==", "file_data", "data", "a")),
    ],
)
def test_every_way_to_name_a_medium(part: dict[str, Any], expected: tuple[str, str, Any, str]) -> None:
    value, path, kind, name = expected
    (found,) = parsed(user(part, {"type": "input_text", "text": "What?"})).media
    assert found == Reference(value, f"messages[0].content[0].{path}", kind, name)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "file", "file": {}},
        {"type": "file", "file": {"filename": "a.mp4"}},
        {"type": "file", "file": {"file_id": "a", "file_data": "b"}},
        {"type": "input_video"},
        {"type": "input_image", "image_url": "a", "file_id": "b"},
        {"type": "video_url", "video_url": {"url": ""}},
        {"type": "video_url", "video_url": {"url": None}},
        {"type": "image_url", "image_url": {"url": "a", "detail": "high"}},
        {"type": "video_url", "video_url": {"url": "a", "fps": 2}},
    ],
)
def test_invalid_media_references(part: dict[str, Any]) -> None:
    error = refused({"messages": [user(part, text("What?"))]})
    assert error.status == 400
    assert str(error.body["error"]["param"]).startswith("messages[0].content[0]")


# -- fields -------------------------------------------------------------------------------------------------

CHANGING: dict[str, Any] = {
    "ignore_eos": True,
    "guided_choice": ["a", "b"],
    "guided_json": {},
    "use_beam_search": True,
    "best_of": 3,
    "continue_final_message": True,
    "echo": True,
    "n": 2,
    "logprobs": True,
    "top_logprobs": 3,
    "presence_penalty": 0.1,
    "frequency_penalty": -1,
    "length_penalty": 0.5,
    "store": True,
    "service_tier": "priority",
    "reasoning_effort": "high",
    "verbosity": "low",
    "response_format": {"type": "grammar"},
    "tools": [{"type": "function"}],
    "tool_choice": "required",
    "modalities": ["audio"],
    "chat_template": "{{ messages }}",
    "mm_processor_kwargs": {"fps": 2},
    "bad_words": ["no"],
    "n_predict": 5,
    "extra_body": {"token_budget": 3},
    "mirostat": 2,
}


@pytest.mark.parametrize("name", CHANGING)
def test_unsupported_values_are_refused(name: str) -> None:
    error = refused({"messages": [user(text("x"))], name: CHANGING[name]})
    assert (error.status, error.body["error"]["param"]) == (400, name)
    assert name in str(error)


def test_a_response_format_without_a_type_is_told_the_types() -> None:
    error = refused({"messages": [user(text("x"))], "response_format": {}})
    assert str(error) == "response_format must have a type: text, json_object or json_schema."


@pytest.mark.parametrize(
    "fields",
    [
        {"metadata": {}},
        {"metadata": {"run": "1"}},
        {"store": False},
        {"parallel_tool_calls": True},
        {"service_tier": "auto"},
        {"repetition_penalty": 1.0},
        {"n": 1, "best_of": 1, "logprobs": False, "presence_penalty": 0, "frequency_penalty": 0.0},
        {"user": "u", "safety_identifier": "s", "prompt_cache_key": "k", "request_id": "r"},
        {"tools": [], "tool_choice": "auto", "functions": None, "response_format": {"type": "text"}},
        {"stop": [], "logit_bias": {}, "stop_token_ids": [], "modalities": ["text"]},
        {"stream_options": None, "seed": None, "temperature": None, "top_p": None, "max_tokens": None},
        {"top_k": -1, "min_p": 0, "min_tokens": 0, "ignore_eos": False, "add_generation_prompt": True},
        {"skip_special_tokens": True, "include_stop_str_in_output": False, "reasoning_effort": "none"},
    ],
    ids=str,
)
def test_neutral_values_are_accepted(fields: dict[str, Any]) -> None:
    asked, plain = parsed(**fields), parsed()
    assert (asked.sampling, asked.stop, asked.messages) == (plain.sampling, plain.stop, plain.messages)


def test_stop_is_a_text_or_a_list() -> None:
    assert parsed(stop="a").stop == ("a",)
    assert parsed(stop=["a", "b"]).stop == ("a", "b")


def test_supported_fields_are_parsed() -> None:
    asked = parsed(
        temperature=0.5,
        top_p=0.9,
        top_k=5,
        min_p=0.1,
        repetition_penalty=1.5,
        min_tokens=2,
        seed=2**63 - 1,
        stop_token_ids=[3, 4],
        logit_bias={"7": -100, "8": 2.5},
        max_completion_tokens=9,
        token_budget="auto:2",
        selector="uniform",
        stream=True,
        stream_options={"include_usage": True},
    )
    assert asked.sampling == {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.5,
        "min_tokens": 2,
        "seed": 2**63 - 1,
        "stop_token_ids": (3, 4),
        "logit_bias": {7: -100, 8: 2.5},
    }
    assert (asked.max_tokens, asked.token_budget, asked.selector) == (9, "auto:2", "uniform")
    assert asked.stream
    assert asked.include_usage


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("token_budgets", "token_budget"),
        ("tokenbudget", "token_budget"),
        ("max_token", "max_tokens"),
        ("Temperature", "temperature"),
        ("stop_tokens_ids", "stop_token_ids"),
        ("mesages", "messages"),
        ("minp", "min_p"),
        ("budget", "token_budget"),
        ("max_new_tokens", "max_tokens"),
    ],
)
def test_a_misspelt_field_gets_a_suggestion(written: str, meant: str) -> None:
    body = {"messages": [user(text("x"))], written: 16}
    if written == "mesages":
        del body["messages"]
    error = refused(body)
    assert str(error).endswith(f"did you mean {meant}?")
    assert (error.body["error"]["param"], error.body["error"]["code"]) == (written, "unknown_field")


def test_a_misspelt_nested_field_gets_a_suggestion_of_its_object() -> None:
    error = refused({"messages": [user({"type": "video_url", "video_url": {"urls": "a"}}, text("x"))]})
    assert error.body["error"]["param"] == "messages[0].content[0].video_url.urls"
    assert str(error).endswith("did you mean url?")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"seed": True}, "seed"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 10**39}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"seed": "7"}, "seed"),
        ({"temperature": True}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 10**38}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"min_p": 2}, "min_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": False}, "top_k"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"min_tokens": 9, "max_tokens": 5}, "min_tokens"),
        ({"stop": ""}, "stop[0]"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": {"a": 1}}, "stop"),
        ({"stop_token_ids": ["1"]}, "stop_token_ids[0]"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"logit_bias": {"1": "a"}}, "logit_bias.1"),
        ({"logit_bias": []}, "logit_bias"),
        ({"token_budget": True}, "token_budget"),
        ({"token_budget": 0}, "token_budget"),
        ({"token_budget": 1.5}, "token_budget"),
        ({"token_budget": {}}, "token_budget"),
        ({"selector": "best"}, "selector"),
        ({"stream": 1}, "stream"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": []}, "stream_options"),
        ({"stream_options": {"usage": True}}, "stream_options.usage"),
        ({"metadata": 3}, "metadata"),
        ({"model": 3}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": {}}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": [3]}, "messages[0]"),
        ({"messages": [{"content": "x"}]}, "messages[0]"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [[]]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": "x", "name": "Ann"}]}, "messages[0].name"),
        ({"messages": [user(text("x")), {"role": "tool", "content": "x"}]}, "messages[1]"),
        ({"messages": [{"role": "system", "content": [video("a")]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages"),
        ({"messages": [user(video("a"))]}, "messages"),
        ({"messages": [user(*[video("a")] * 17, text("x"))]}, "messages"),
        (
            {"messages": [user(text("x")), {"role": "assistant", "content": "y", "tool_calls": [{}]}]},
            "messages[1].tool_calls",
        ),
    ],
    ids=str,
)
def test_wrong_values_are_named(change: dict[str, Any], param: str) -> None:
    error = refused({"messages": [user(text("x"))], **change})
    assert error.status == 400
    assert error.body["error"]["param"] == param


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(sorted(ChatBody.model_fields)), JSON, max_size=4), JSON)
def test_any_json_is_a_request_or_an_error_with_a_sentence(fields: dict[str, Any], part: Any) -> None:
    for body in ({"messages": [user(text("x"))], **fields}, {"messages": [user(part)]}, part):
        with suppress(ApiError):
            parse_chat(body)
            continue
        error = refused(body)
        assert error.status in (400, 404)
        json.dumps(error.body, ensure_ascii=False).encode()


# -- JSON ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b'{"a": 1e999}',
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"a": 1, "a": 2}',
        b'{"a": {"b": 1, "b": 1}}',
        b'{"a": "\\ud83d"}',
        b'{"\\udc00": 1}',
        b'{"a": ["x", {"b": "\\ude00\\ud83d"}]}',
        b'{"a": "\xff"}',
        b"\xff\xfe{\x00}\x00",
        b"[" * 100_000,
        b"[" * 5000 + b"]" * 5000,
        b"[" + b"0," * 300_000 + b"0]",
        b"",
        b"{",
        b"{} {}",
        b"'a'",
    ],
    ids=lambda body: repr(body[:24]),
)
def test_ambiguous_json_is_refused(body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        decode_json(body)
    assert caught.value.status == 400
    json.dumps(caught.value.body, ensure_ascii=False).encode()


def test_a_lone_surrogate_is_named_with_its_path() -> None:
    with pytest.raises(ApiError) as caught:
        decode_json(b'{"messages": [{"content": "a \\ud83d"}]}')
    assert caught.value.body["error"]["param"] == "messages[0].content"


@given(JSON)
def test_valid_json_is_decoded_unchanged(value: Any) -> None:
    assert decode_json(json.dumps(value).encode()) == value
    assert decode_json(json.dumps(value, ensure_ascii=False).encode("utf-8")) == value


def test_surrogate_pairs_are_valid() -> None:
    assert decode_json(b'"\\ud83d\\ude00"') == decode_json('"😀"'.encode()) == "😀"


# -- parts of media -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "medium",
    [
        {"type": "video_url", "video_url": {"url": "u"}},
        {"type": "image_url", "image_url": {"url": "u"}},
        {"type": "input_video", "file_id": "f"},
        {"type": "input_image", "file_id": "f"},
        {"type": "file", "file": {"file_id": "f"}},
        {"type": "input_file", "file_data": "QQ=="},
    ],
)
def test_a_medium_may_be_a_part(medium: dict[str, Any]) -> None:
    asked = parsed(user({**medium, "start": 5, "end": "1:02.5", "region": [0, 0.5, 1, 1]}, text("What?")))
    assert asked.media[0].part == Part(5.0, 62.5, (0.0, 0.5, 1.0, 1.0))
    assert asked.part.whole
    asked = parse_chat({"messages": [user(medium, text("What?"))], "start": "0:05", "region": [0, 0, 1, 0.5]})
    assert asked.part == Part(5.0, None, (0.0, 0.0, 1.0, 0.5))
    assert asked.media[0].part.whole


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"start": -1}, "start"),
        ({"start": "soon"}, "start"),
        ({"end": "1:75"}, "end"),
        ({"end": True}, "end"),
        ({"start": 5, "end": 5}, "end"),
        ({"region": [0, 0, 640, 360]}, "region"),
        ({"region": [0, 0, 1]}, "region"),
        ({"region": [0.5, 0, 0.5, 1]}, "region"),
        ({"region": "all"}, "region"),
        ({"begin": 5}, "begin"),
    ],
)
def test_wrong_parts_name_their_field(fields: dict[str, Any], param: str) -> None:
    medium = {"type": "video_url", "video_url": {"url": "u"}}
    error = refused({"messages": [user({**medium, **fields}, text("What?"))]}).body["error"]
    assert str(error["param"]).startswith(f"messages[0].content[0].{param}")
    error = refused({"messages": [user(medium, text("What?"))], **fields}).body["error"]
    assert str(error["param"]).startswith(param)


@pytest.mark.parametrize(
    ("form", "schema"),
    [
        ({"type": "json_object"}, {"type": "object"}),
        ({"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": NAMES}}, NAMES),
    ],
)
def test_a_response_format_is_a_schema(form: dict[str, Any], schema: dict[str, Any]) -> None:
    pytest.importorskip("llguidance", reason="the extra json is not installed")
    asked = parsed(response_format=form)
    assert asked.sampling["schema"].value == schema
    assert asked.sampling["think"] is False
    assert "schema" not in parsed(response_format={"type": "text"}).sampling


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {}}},
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}},
            "response_format.json_schema.schema",
        ),
        ({"response_format": {"type": "json_object"}, "stop": "}"}, "stop"),
        ({"response_format": {"type": "json_object"}, "min_tokens": 3}, "min_tokens"),
        (
            {"response_format": {"type": "json_object"}, "chat_template_kwargs": {"enable_thinking": True}},
            "chat_template_kwargs",
        ),
    ],
    ids=str,
)
def test_a_wrong_response_format_is_named(fields: dict[str, Any], param: str) -> None:
    pytest.importorskip("llguidance", reason="the extra json is not installed")
    error = refused({"messages": [user(text("x"))], **fields})
    assert (error.status, error.body["error"]["param"]) == (400, param)
