"""The API as a contract: routes and their description, errors, whose files are whose, what clients send."""

from __future__ import annotations

import gzip
import json
import logging
import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import httpx
import openai
import pydantic
import pytest

from app.chat import VideoChat
from app.server.chat_request import Reference, parse_chat
from app.server.errors import A_FILE, ApiError, PathRedactor
from app.server.media import download as fetching
from app.server.media.resolver import Resolver
from app.server.options import LaunchOptions
from app.server.routes import Api, ServerSettings
from encoder.errors import BudgetError, ConfigError, ContextError, FluxChatError, ModelError, VideoError
from llm_bridge.model import VideoLanguageModel
from tests.app.conftest import SHORT
from tests.app.server.serving import answer, ask, data_url, question, running, upload
from tests.encoder.video import video_files as vf
from tests.patience import PATIENCE_S, until

Serving = tuple[str, Api]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vf.write(tmp_path_factory.mktemp("media") / "ok.mp4", vf.steady(10))


@pytest.fixture(scope="module")
def shared(tiny_model: VideoLanguageModel, clip: Path) -> Iterator[Serving]:
    settings = ServerSettings(media_root=clip.parent, upload_mib=1, body_mib=2)
    with (
        VideoChat(tiny_model, trusted=False) as chat,
        running(chat, LaunchOptions(page=False, server=settings)) as pair,
    ):
        yield pair


@pytest.fixture
def client(shared: Serving) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{shared[0]}/v1", api_key="none", max_retries=0) as made:
        yield made


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error of a response that must be one, in OpenAI's shape."""
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert len(error["message"].splitlines()) == 1
    return error


# -- routes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", "/v1/chat/completions", "POST"),
        ("PUT", "/v1/files", "GET, HEAD, POST"),
        ("POST", f"/v1/files/file-{'0' * 32}", "DELETE, GET, HEAD"),
        ("DELETE", "/v1/models", "GET, HEAD"),
        ("PATCH", "/v1/models/fluxchat", "GET, HEAD"),
        ("OPTIONS", "/v1/chat/completions", "POST"),
        ("BREW", "/v1/models", "GET, HEAD"),
        ("POST", "/healthz", "GET, HEAD"),
        ("DELETE", "/metrics", "GET, HEAD"),
    ],
)
def test_a_wrong_method_is_405_with_the_allowed_ones(
    shared: Serving, method: str, path: str, allow: str
) -> None:
    response = httpx.request(method, shared[0] + path)
    assert (response.status_code, response.headers["Allow"]) == (405, allow)
    assert error_of(response)["code"] == "method_not_allowed"


@pytest.mark.parametrize(
    "path", ["/v1", "/v1/", "/v1/completions", "/v1/models/", "/v1/chat", "/v1/a/b/%00%ff"]
)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_an_unknown_route_is_404_with_the_known_ones(shared: Serving, method: str, path: str) -> None:
    response = httpx.request(method, shared[0] + path)
    assert response.status_code == 404
    error = error_of(response)
    assert error["code"] == "unknown_url"
    for route in (
        "POST /v1/chat/completions",
        "GET /v1/files",
        "DELETE /v1/files/{id}",
        "GET /v1/models/{id}",
    ):
        assert route in error["message"]


def test_paths_beside_the_api_are_json_too(shared: Serving) -> None:
    assert error_of(httpx.get(f"{shared[0]}/nothing"))["code"] == "unknown_url"


def test_an_unknown_model_is_404_with_the_known_one(client: openai.OpenAI) -> None:
    assert client.models.retrieve("fluxchat").id == "fluxchat"
    with pytest.raises(openai.NotFoundError, match="fluxchat") as caught:
        client.models.retrieve("gpt-4o")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(("kind", "status"), [("text/plain", 415), ("", 415), ("application/json", 400)])
def test_a_body_of_another_type(shared: Serving, kind: str, status: int) -> None:
    headers = {"Content-Type": kind}
    response = httpx.post(f"{shared[0]}/v1/chat/completions", content=b"[]", headers=headers)
    assert response.status_code == status
    error_of(response)


# -- the description ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/embeddings", "/v1/files"])
@pytest.mark.parametrize(("encoding", "status"), [("gzip", 415), ("br", 415), ("identity", 400)])
def test_a_compressed_body_is_refused_in_a_sentence(
    shared: Serving, path: str, encoding: str, status: int
) -> None:
    kind = "multipart/form-data; boundary=x" if path == "/v1/files" else "application/json"
    sent = httpx.post(
        f"{shared[0]}{path}",
        content=gzip.compress(b"{}"),
        headers={"Content-Type": kind, "Content-Encoding": encoding},
    )
    assert sent.status_code == status
    assert ("Compressed bodies are not taken" in sent.json()["error"]["message"]) is (status == 415)


def test_the_description_names_every_route_and_field(shared: Serving) -> None:
    document = httpx.get(f"{shared[0]}/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    assert set(document["paths"]["/v1/files"]) == {"get", "post"}
    assert set(document["paths"]["/v1/files/{id}"]) == {"get", "delete"}
    assert {"/v1/chat/completions", "/v1/models", "/v1/models/{id}", "/healthz"} <= set(document["paths"])
    fields = document["components"]["schemas"]["ChatBody"]
    assert fields["additionalProperties"] is False
    assert {"messages", "token_budget", "min_p", "stop", "logit_bias"} <= set(fields["properties"])
    # All that is referred to is there.
    text = json.dumps(document)
    for name in set(text.split("#/components/schemas/")[1:]):
        assert name.split('"')[0] in document["components"]["schemas"]


def test_the_docs_page_loads_nothing_from_elsewhere(shared: Serving) -> None:
    response = httpx.get(f"{shared[0]}/docs")
    assert response.headers["content-type"].startswith("text/html")
    assert "<script" not in response.text
    assert "http" not in response.text.replace("<code>", "")
    assert "default-src 'none'" in response.headers["content-security-policy"]
    for told in ("/v1/chat/completions", "token_budget", "min_p", "input_video"):
        assert told in response.text


def test_the_docs_page_is_served_beside_the_chat_page(tiny_model: VideoLanguageModel) -> None:
    options = LaunchOptions(examples=[])
    with VideoChat(tiny_model, trusted=False) as chat, running(chat, options) as (address, _):
        assert "token_budget" in httpx.get(f"{address}/docs").text
        assert "/v1/files" in httpx.get(f"{address}/openapi.json").json()["paths"]
        assert httpx.delete(f"{address}/v1/models").status_code == 405
        assert error_of(httpx.post(f"{address}/v1"))["code"] == "unknown_url"


# -- files --------------------------------------------------------------------------------------------------


def test_files_are_listed_newest_first_and_by_pages(client: openai.OpenAI, clip: Path) -> None:
    made = [client.files.create(file=clip, purpose="vision").id for _ in range(3)]
    assert [file.id for file in client.files.list()] == made[::-1]
    assert [file.id for file in client.files.list(limit=2, order="asc")] == made  # the client turns the pages
    first = client.files.list(limit=2)
    assert first.has_more
    assert len(first.data) == 2
    for name in made:
        client.files.delete(name)
    assert client.files.list().data == []


@pytest.mark.parametrize("query", ["limit=0", "limit=x", "order=best", "limits=3", "limit=99999"])
def test_wrong_queries_are_named(shared: Serving, query: str) -> None:
    response = httpx.get(f"{shared[0]}/v1/files?{query}")
    assert response.status_code == 400
    assert error_of(response)["param"] == query.partition("=")[0]


def test_files_belong_to_who_uploaded_them(tiny_model: VideoLanguageModel, clip: Path) -> None:
    """As the guard names clients, here by a header."""

    class Named:
        def __init__(self, app: Any) -> None:
            self._app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            headers = dict(scope.get("headers", ()))
            if b"x-client" in headers:
                scope["fluxchat.client"] = headers[b"x-client"].decode()
            await self._app(scope, receive, send)

    from fastapi import FastAPI
    from starlette.testclient import TestClient

    with VideoChat(tiny_model, trusted=False) as chat:
        server = Api(chat)
        app = FastAPI()
        server.install(app)
        with TestClient(Named(app)) as http:
            ann, ben, nobody = {"X-Client": "ann"}, {"X-Client": "ben"}, {"X-Client": "anonymous-1"}
            with clip.open("rb") as file:
                name = http.post("/v1/files", files={"file": file}, headers=ann).json()["id"]
            assert [f["id"] for f in http.get("/v1/files", headers=ann).json()["data"]] == [name]
            for other in (ben, nobody, {}):
                assert http.get("/v1/files", headers=other).json()["data"] == []
                assert http.get(f"/v1/files/{name}", headers=other).status_code == 404
                assert http.delete(f"/v1/files/{name}", headers=other).status_code == 404
                asked = http.post("/v1/chat/completions", json=question("What?", name), headers=other)
                assert (asked.status_code, asked.json()["error"]["code"]) == (404, "file_not_found")
                assert asked.json()["error"]["param"] == "messages[0].content[0].video_url.url"
            assert http.delete(f"/v1/files/{name}", headers=ann).json()["deleted"]
        server.close()


# -- sampling and order, as the model gets them --------------------------------------------------------------


def test_all_sampling_options_reach_the_model(
    tiny_model: VideoLanguageModel, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Any, dict[str, Any]]] = []
    usual = VideoChat.stream_messages

    def spy(self: VideoChat, messages: Any, **options: Any) -> Any:
        seen.append((messages, options))
        return usual(self, messages, **options)

    monkeypatch.setattr(VideoChat, "stream_messages", spy)
    asked = {
        "temperature": 0.5,
        "top_k": 3,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "min_tokens": 2,
        "seed": 7,
        "stop_token_ids": [5],
        "logit_bias": {"9": -100},
    }
    body = question("What?", max_tokens=4, user="u", **asked)
    parts = body["messages"][0]["content"]
    parts.insert(0, {"type": "text", "text": "Before:"})
    parts.insert(1, {"type": "input_video", "video_url": data_url(clip)})
    body["messages"] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "Hi."},
        *body["messages"],
    ]
    with VideoChat(tiny_model, trusted=False) as chat, running(chat) as (address, _):
        answer(httpx.post(f"{address}/v1/chat/completions", json=body))
    ((messages, options),) = seen
    assert [message.role for message in messages] == ["system", "user", "assistant", "user"]
    before, medium, after = messages[3].content
    assert (before, after) == ("Before:", "What?")
    assert not isinstance(medium, str)
    expected = {**asked, "stop_token_ids": (5,), "logit_bias": {9: -100}}
    assert {name: options[name] for name in asked} == expected
    assert (options["max_new_tokens"], options["selector"]) == (4, "flux")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
        ({"stop_token_ids": [999_999]}, "stop_token_ids"),
        ({"min_tokens": 2000, "max_tokens": 5000}, "min_tokens"),
        ({"seed": 2**64}, "seed"),
        ({"token_budget": "many"}, "token_budget"),
        ({"token_budget": "auto:-1"}, "token_budget"),
        ({"token_budget": "auto:nan"}, "token_budget"),
    ],
)
def test_what_the_model_cannot_do_is_400(shared: Serving, change: dict[str, Any], param: str) -> None:
    response = ask(shared[0], "What?", "ok.mp4", **change)
    assert response.status_code == 400, response.text
    error = error_of(response)
    assert error["param"] == param
    assert error["code"] != "context_length_exceeded"


def test_error_messages_use_the_apis_names(shared: Serving) -> None:
    error = error_of(ask(shared[0], "What?", max_tokens=1024))
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    assert "max_tokens" in error["message"]
    assert "max_new_tokens" not in error["message"]


def test_a_client_that_disconnects_during_a_download_ends_it(
    tiny_model: VideoLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = threading.Event()

    def host(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\n\r\nx")
            while connection.recv(100):  # until the server goes away
                continue
        ended.set()

    monkeypatch.setattr(fetching, "public_address", lambda name, port: "127.0.0.1")
    monkeypatch.setattr(fetching, "TIMEOUT_S", 1000.0)
    options = LaunchOptions(page=False, server=ServerSettings(url_hosts=("videos.example",)))
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        VideoChat(tiny_model, trusted=False) as chat,
        running(chat, options) as (address, server),
    ):
        threading.Thread(target=host, args=(listener,), daemon=True).start()
        body = question("What?", f"http://videos.example:{listener.getsockname()[1]}/a.mp4")
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                f"{address}/v1/chat/completions", json=body, timeout=httpx.Timeout(PATIENCE_S, read=0.5)
            )
        assert ended.wait(PATIENCE_S), "it went on for nobody"
        until(lambda: not server.scheduler.running)
        assert not list(Path(server.store.folder).iterdir())


def test_a_lone_surrogate_is_400_in_every_field(shared: Serving) -> None:
    base = question("What?")
    for change in (
        question("a \ud83d b"),
        {**base, "stop": ["\udcff"]},
        {**base, "user": "\ud83d"},
        {**base, "model": "\ud83d"},
        {**base, "\ud83d": 1},
        question("What?", "\ud83d.mp4"),
        {**base, "messages": [{"role": "system", "content": "\ude00"}, *base["messages"]]},
    ):
        response = httpx.post(
            f"{shared[0]}/v1/chat/completions",
            content=json.dumps(change).encode(),
            headers={"Content-Type": "application/json"},
        )
        assert response.status_code == 400, response.text
        assert "half of a character" in error_of(response)["message"]


# -- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (VideoError("x."), 400, "invalid_media"),
        (BudgetError("x."), 400, "invalid_budget"),
        (ContextError("x."), 400, "context_length_exceeded"),
        (ConfigError("x."), 400, None),
        (ModelError("x."), 503, "model_unavailable"),
        (FluxChatError("x."), 400, None),
        (MemoryError(), 503, "out_of_memory"),
        (RuntimeError("secret"), 500, None),
        (ApiError(418, "x.", code="teapot"), 418, "teapot"),
    ],
)
def test_every_error_has_its_code(error: Exception, status: int, code: str | None) -> None:
    known = ApiError.of(error)
    assert (known.status, known.body["error"]["code"]) == (status, code)
    assert "secret" not in str(known)


def test_a_message_is_one_line_of_valid_unicode() -> None:
    error = ApiError(400, "a\nb \ud83d" + "c" * 5000, param="\udcff")
    text = json.dumps(error.body, ensure_ascii=False).encode().decode()
    assert "\n" not in text
    assert len(str(error)) <= 1000


def test_a_chat_template_that_refuses_the_conversation_is_400() -> None:
    from jinja2 import TemplateError

    error = ModelError("The chat template refuses this.")
    error.__cause__ = TemplateError("roles must alternate")
    assert (ApiError.of(error).status, ApiError.of(error).body["error"]["param"]) == (400, "messages")


def test_which_of_several_videos_cannot_be_read(shared: Serving, clip: Path) -> None:
    broken = "data:video/mp4;name=holiday.mp4;base64,AAAA"
    response = ask(shared[0], "What?", "ok.mp4", broken, "ok.mp4")
    error = error_of(response)
    assert (response.status_code, error["code"]) == (400, "invalid_media")
    assert error["param"] == "messages[0].content[1].video_url.url"
    assert "'holiday.mp4'" in error["message"]
    assert "2 of 3" in error["message"]
    alone = error_of(ask(shared[0], "What?", "data:video/mp4;base64,AAAA"))
    assert alone["param"] == "messages[0].content[0].video_url.url"


def test_a_part_of_a_video_is_asked_about(shared: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    address, server = shared
    looked: list[tuple[float, ...]] = []
    encode = server.chat._vision.encode

    def watched(*args: Any, **options: Any) -> Any:
        video = encode(*args, **options)
        looked.append(video.kept.times_s)
        return video

    monkeypatch.setattr(server.chat._vision, "encode", watched)
    assert ask(address, "What?", data_url(SHORT), start=1, end="0:02.5").status_code == 200
    part = {"type": "video_url", "video_url": {"url": data_url(SHORT)}, "start": 3, "region": [0, 0, 0.5, 1]}
    question = {"role": "user", "content": [part, {"type": "text", "text": "What?"}]}
    body = {"messages": [question], "max_tokens": 2, "start": 1, "end": 2}
    assert httpx.post(f"{address}/v1/chat/completions", json=body).status_code == 200
    assert all(1 <= time_s < 2.5 for time_s in looked[0])
    assert all(time_s >= 3 for time_s in looked[1])
    error = error_of(response := ask(address, "What?", data_url(SHORT), start=9))
    assert (response.status_code, error["param"]) == (400, "messages[0].content[0].video_url.url")
    assert "lasts 0:05" in error["message"]


def test_an_upload_that_cannot_be_read_is_named(shared: Serving) -> None:
    files = {"file": ("my holiday.mp4", b"not a video at all")}
    response = httpx.post(f"{shared[0]}/v1/files", files=files)
    error = error_of(response)
    assert (response.status_code, error["param"], error["code"]) == (400, "file", "invalid_media")
    assert "my holiday.mp4" in error["message"]
    files = {"file": ('a "quoted" \n holiday.mp4', b"not a video at all")}
    assert (
        "'a _quoted_ _ holiday.mp4'" in error_of(httpx.post(f"{shared[0]}/v1/files", files=files))["message"]
    )


def test_an_upload_with_an_endless_boundary_is_refused(shared: Serving) -> None:
    kind = {"Content-Type": f"multipart/form-data; boundary={'x' * 300}"}
    response = httpx.post(f"{shared[0]}/v1/files", content=b"--x", headers=kind)
    assert response.status_code == 400
    assert "boundary is too long" in error_of(response)["message"]


def test_no_error_contains_a_path_of_the_server(
    shared: Serving, clip: Path, tiny_model: VideoLanguageModel, tmp_path: Path
) -> None:
    address, server = shared
    torn = tmp_path / "torn.mp4"
    torn.write_bytes(clip.read_bytes()[:600])
    private = [server.store.folder, tempfile.gettempdir(), str(Path.home()), str(clip.parent), os.getcwd()]
    private.append(str(tiny_model.llm.name))
    responses = [
        ask(address, "What?", data_url(torn)),
        ask(address, "What?", str(clip.parent / "missing.mp4")),
        ask(address, "What?", "data:image/png;base64,AAAA"),
        ask(address, "What?", "data:image/png;base64,AAAA", data_url(torn)),
        ask(address, "What?", "data:image/gif;base64,R0lGODlhAQABAAAAACw="),
        ask(address, "word " * 3000),
        ask(address, "What?", "ok.mp4", token_budget="0.5"),
        ask(address, "What?", f"file-{'0' * 32}"),
        httpx.post(f"{address}/v1/files", files={"file": ("x.mp4", torn.read_bytes())}),
        httpx.post(f"{address}/v1/files", files={"file": ("x.png", b"\x89PNG\r\n\x1a\n")}),
    ]
    for response in responses:
        assert response.status_code in (400, 404), response.text
        error_of(response)
        for path in private:
            assert path not in response.text, response.text
        assert "tmp" not in response.text.lower()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("Cannot read '{store}/tmpab12': it is empty.", f"Cannot read '{A_FILE}': it is empty."),
        ("open({store}/a/b.mp4) failed", f"open({A_FILE}) failed"),
        ("No such file: '{home}/.cache/x y.bin'", f"No such file: '{A_FILE} y.bin'"),
        ("but {model} has 1024", "but the model has 1024"),
        ("{temp}", A_FILE),
        ("file://{temp}/x", A_FILE),
        pytest.param("<_io.BytesIO object at 0x7f00aa> is bad", "it is bad", id="an object"),
        ("3/4 of /v1/chat/completions", "3/4 of /v1/chat/completions"),
    ],
)
def test_paths_are_redacted(tmp_path: Path, text: str, told: str) -> None:
    store, model = tmp_path / "store", tmp_path / "models" / "qwen"
    scrub = PathRedactor({str(model): "the model"}, [store, None])
    places = {
        "store": str(store),
        "home": str(Path.home()),
        "model": str(model),
        "temp": tempfile.gettempdir(),
    }
    assert scrub(text.format(**places)) == told


def test_an_unexpected_exception_is_logged_but_not_shown(
    shared: Serving, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(5, "Input/output error", f"{shared[1].store.folder}/x")

    monkeypatch.setattr(Resolver, "open", fail)
    with caplog.at_level(logging.ERROR):
        response = ask(shared[0], "What?", "ok.mp4")
    assert response.status_code == 500
    assert "Input/output" not in response.text
    assert "Input/output" in caplog.text


# -- what clients send --------------------------------------------------------------------------------------


def test_openai_client_messages_can_be_sent_back(client: openai.OpenAI) -> None:
    """Programs put the message object that they got back into the next request."""
    messages: list[Any] = [{"role": "user", "content": "How many?"}]
    for _ in range(2):
        done = client.chat.completions.create(model="fluxchat", messages=messages, max_tokens=5)
        messages += [done.choices[0].message.model_dump(), {"role": "user", "content": "And why?"}]
    parse_chat({"messages": messages})


class Seen(pydantic.BaseModel):
    """What a client asks for."""

    model_config = pydantic.ConfigDict(extra="forbid")
    name: Annotated[str, pydantic.Field(max_length=8)]
    moves: bool


def test_openai_client_parses_what_follows_its_schema(client: openai.OpenAI, clip: Path) -> None:
    pytest.importorskip("llguidance", reason="the extra json is not installed")
    body: Any = question("What is it?", data_url(clip), max_tokens=60)
    parsed = client.chat.completions.parse(**body, response_format=Seen).choices[0]
    assert isinstance(parsed.message.parsed, Seen)
    assert parsed.finish_reason == "stop"
    body["max_tokens"] = 3
    with pytest.raises(openai.LengthFinishReasonError):  # what was cut is no JSON, and says so
        client.chat.completions.parse(**body, response_format=Seen)
    with client.chat.completions.stream(**body | {"max_tokens": 60}, response_format=Seen) as events:
        assert events.get_final_completion().choices[0].message.parsed == parsed.message.parsed


def test_any_json_object(client: openai.OpenAI) -> None:
    pytest.importorskip("llguidance", reason="the extra json is not installed")
    body: Any = question("What is it?", max_tokens=5)
    reply = client.chat.completions.create(**body, response_format={"type": "json_object"}).choices[0]
    assert str(reply.message.content).startswith("{")
    assert reply.finish_reason in ("stop", "length")


@pytest.mark.slow
def test_langchain_asks_about_videos(shared: Serving, clip: Path) -> None:
    langchain = pytest.importorskip("langchain_openai")
    from langchain_core.messages import AIMessage, HumanMessage, SystemMessage

    def model(**options: Any) -> Any:
        return langchain.ChatOpenAI(
            base_url=f"{shared[0]}/v1", api_key="none", model="fluxchat", max_retries=0, **options
        )

    video = {"type": "video_url", "video_url": {"url": data_url(clip)}}
    image = {"type": "image_url", "image_url": {"url": "ok.mp4"}}
    messages = [
        SystemMessage("Be brief."),
        HumanMessage([video, {"type": "text", "text": "What moves?"}]),
        AIMessage("A square."),
        HumanMessage([image, {"type": "text", "text": "And here?"}]),
    ]
    chat = model(max_tokens=12, temperature=0, extra_body={"token_budget": 16})
    whole = chat.invoke(messages)
    assert whole.usage_metadata["output_tokens"] <= 12
    assert whole.response_metadata["finish_reason"] in ("length", "stop")
    chunks = list(
        model(max_tokens=12, temperature=0, stream_usage=True, extra_body={"token_budget": 16}).stream(
            messages
        )
    )
    assert "".join(chunk.content for chunk in chunks) == whole.content
    total = sum((chunk.usage_metadata or {}).get("output_tokens", 0) for chunk in chunks)
    assert total == whole.usage_metadata["output_tokens"]
    assert model(max_completion_tokens=3, stop=["zzz"], seed=1).invoke("Hello?").content is not None
    with pytest.raises(openai.BadRequestError, match="did you mean token_budget"):
        model(extra_body={"token_budgets": 3}).invoke("Hello?")


@pytest.mark.slow
def test_langchain_with_the_responses_format(shared: Serving, clip: Path) -> None:
    """Its own blocks of content for images and files become OpenAI's."""
    langchain = pytest.importorskip("langchain_openai")
    from langchain_core.messages import HumanMessage

    content = data_url(clip).partition(",")[2]
    chat = langchain.ChatOpenAI(base_url=f"{shared[0]}/v1", api_key="none", model="fluxchat", max_tokens=3)
    for block in (
        {"type": "image", "base64": content, "mime_type": "video/mp4"},
        {"type": "file", "base64": content, "mime_type": "video/mp4", "filename": "a.mp4"},
        {"type": "file", "file_id": upload(shared[0], clip)},
    ):
        asked = HumanMessage([block, {"type": "text", "text": "What?"}])
        assert chat.invoke([asked]).usage_metadata["input_tokens"] > 32


def test_the_repr_of_a_reference_hides_its_value() -> None:
    """A log with a request in it must not hold the video."""
    assert "secret" not in repr(Reference("data:,secret"))
