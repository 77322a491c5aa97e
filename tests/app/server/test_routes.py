"""The API as programs use it: the openai client, plain requests, many at once, impatient and slow ones."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from app.chat import VideoChat
from app.messages import Media
from app.server.errors import ApiError
from app.server.media.store import MediaStore
from app.server.options import LaunchOptions
from app.server.replies import TextFilter
from app.server.routes import Api, ServerSettings
from llm_bridge.model import VideoLanguageModel
from llm_bridge.prompt import Message
from tests.app.conftest import SHORT
from tests.app.server.serving import answer, ask, data_url, question, running, upload
from tests.encoder.video import video_files as vf
from tests.passes import before_each_pass
from tests.patience import PATIENCE_S, until

Serving = tuple[str, Api]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Eight small videos that differ, and an image."""
    folder = tmp_path_factory.mktemp("media")
    videos = [vf.write(folder / f"{n}.mp4", vf.steady(10 + 3 * n), size=(64 + 16 * n, 64)) for n in range(8)]
    Image.new("RGB", (40, 30), (200, 30, 30)).save(folder / "red.png")
    return [*videos, folder / "red.png"]


@pytest.fixture(scope="module")
def shared(tiny_model: VideoLanguageModel, clips: list[Path]) -> Iterator[Serving]:
    """One server for the tests that leave it as it was."""
    settings = ServerSettings(media_root=clips[0].parent)
    with (
        VideoChat(tiny_model, trusted=False) as chat,
        running(chat, LaunchOptions(page=False, server=settings)) as pair,
    ):
        yield pair


@pytest.fixture
def client(shared: Serving) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{shared[0]}/v1", api_key="none", max_retries=0)


@contextmanager
def slowly(chat: VideoChat, seconds: float = 0.02) -> Iterator[list[float]]:
    """Every pass of the language model takes longer; when they began is in the list."""
    times: list[float] = []

    def wait() -> None:
        times.append(time.monotonic())
        time.sleep(seconds)

    with before_each_pass(chat.model.llm, wait):
        yield times


# -- the openai client --------------------------------------------------------------------------------------


def test_openai_client_asks_about_an_uploaded_video(client: openai.OpenAI, clips: list[Path]) -> None:
    file = client.files.create(file=clips[0], purpose="user_data")
    assert file.bytes == clips[0].stat().st_size
    assert client.files.retrieve(file.id).filename == "0.mp4"
    done = client.chat.completions.create(
        **question("What moves?", file.id, max_tokens=12), extra_body={"token_budget": 32}
    )
    assert done.choices[0].message.content
    assert done.choices[0].finish_reason in ("length", "stop")
    usage = done.usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.model_dump()["visual_tokens"] == 32
    assert usage.model_dump()["kept_tokens"] == 32
    assert usage.completion_tokens <= 12
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)


def test_openai_client_streams_the_same(client: openai.OpenAI, clips: list[Path]) -> None:
    asked = question("Describe it!", data_url(clips[1]), max_tokens=30)
    whole = client.chat.completions.create(**asked)
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert "".join(filter(None, pieces)) == whole.choices[0].message.content
    assert len(pieces) > 3
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    assert 0 < usage.prompt_tokens_details.cached_tokens < usage.prompt_tokens  # over the same connection


def test_openai_client_gets_typed_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt", messages=[{"role": "user", "content": "x"}])
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(**question("x", "data:video/mp4;base64,AAAA"))
    assert bad.value.code == "invalid_media"
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(**question("x " * 2000))
    assert long.value.code == "context_length_exceeded"


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "fluxchat"
    assert client.models.retrieve("fluxchat").owned_by == "fluxchat"


# -- what may be asked --------------------------------------------------------------------------------------


def test_answers_are_those_of_video_chat(shared: Serving, tiny_model: Any, clips: list[Path]) -> None:
    conversation = [
        Message.of("system", "Be brief."),
        Message.of("user", Media(clips[2]), "What is it?"),
        Message.of("assistant", "A dog."),
        Message.of("user", Media(clips[8]), "Where?"),
        Message.of("assistant", "Left."),
        Message.of("user", "Why?"),
    ]
    with VideoChat(tiny_model) as chat:
        stream = chat.stream_messages(conversation, budget=16, max_new_tokens=20)
        text = "".join(stream).strip()
        expected = stream.answer
    first = question("What is it?", data_url(clips[2]))["messages"][0]
    messages = [
        {"role": "system", "content": "Be brief."},
        first,
        {"role": "assistant", "content": "A dog."},
        {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": data_url(clips[8], "image/png")}}],
        },
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": "Left."},
        {"role": "user", "content": "Why?"},
    ]
    response = ask(shared[0], "", messages=messages, token_budget=16, max_completion_tokens=20)
    assert answer(response) == text == expected.text
    usage = response.json()["usage"]
    assert usage["prompt_tokens"] == expected.usage.prompt_tokens
    assert usage["seen_tokens"] == expected.usage.seen_tokens


@pytest.mark.parametrize("way", ["name", "absolute", "file url", "data url", "id", "file part"])
@pytest.mark.quick(2)
def test_ways_to_name_a_video(shared: Serving, clips: list[Path], way: str) -> None:
    address, path = shared[0], clips[3]
    url = {
        "name": lambda: "3.mp4",
        "absolute": lambda: str(path),
        "file url": lambda: path.as_uri(),
        "data url": lambda: data_url(path, "application/octet-stream"),
    }.get(way, lambda: upload(address, path))()
    body = question("What is it?", url, max_tokens=8)
    if way == "file part":
        body["messages"][0]["content"][0] = {"type": "file", "file": {"file_id": url}}
    response = httpx.post(f"{address}/v1/chat/completions", json=body)
    assert answer(response) == answer(ask(address, "What is it?", "3.mp4", max_tokens=8))


def test_text_alone_and_sampling(shared: Serving) -> None:
    options = {"temperature": 1.2, "top_p": 0.9, "top_k": 40, "max_tokens": 12}
    first, again = (answer(ask(shared[0], "How many?", seed=7, **options)) for _ in range(2))
    assert first == again
    others = {answer(ask(shared[0], "How many?", seed=seed, **options)) for seed in range(4)}
    assert len(others) > 1


def test_budgets(shared: Serving) -> None:
    def kept(budget: Any) -> int:
        return int(
            ask(shared[0], "x", "0.mp4", token_budget=budget, max_tokens=1).json()["usage"]["kept_tokens"]
        )

    assert [kept(16), kept("16"), kept(None)] == [16, 16, 64]
    assert kept("full") > 64


def test_stop_texts(shared: Serving) -> None:
    whole = answer(ask(shared[0], "Describe it!", "1.mp4", max_tokens=30))
    cut = whole[len(whole) // 2 :][:2]
    response = ask(shared[0], "Describe it!", "1.mp4", max_tokens=30, stop=[cut, "never there"])
    assert answer(response) == whole[: whole.index(cut)].rstrip()
    assert response.json()["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "messages[0].role"),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
            400,
            "messages",
        ),
        ({"messages": [{"role": "user", "content": "  "}]}, 400, "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
            400,
            "messages[0].content[0]",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "video_url"}]}]},
            400,
            "messages[0].content[0].video_url",
        ),
        ({"messages": ["hi"]}, 400, "messages[0]"),
        ({"messages": "hi"}, 400, "messages"),
        ({"model": "other"}, 404, "model"),
        ({"n": 2}, 400, "n"),
        ({"tools": [{"type": "function"}]}, 400, "tools"),
        ({"response_format": {"type": "grammar"}}, 400, "response_format"),
        ({"logprobs": True}, 400, "logprobs"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"temperature": 99}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_completion_tokens": 1.5}, 400, "max_completion_tokens"),
        ({"seed": True}, 400, "seed"),
        ({"stream": "yes"}, 400, "stream"),
        ({"stop": [1]}, 400, "stop[0]"),
        ({"token_budget": [1]}, 400, "token_budget"),
        ({"token_budget": "many"}, 400, "token_budget"),
        ({"selector": "best"}, 400, "selector"),
    ],
    ids=str,
)
def test_wrong_requests(shared: Serving, change: dict[str, Any], status: int, param: str | None) -> None:
    body = {**question("What?", "0.mp4"), **change}
    response = httpx.post(f"{shared[0]}/v1/chat/completions", json=body)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert len(error["message"].splitlines()) == 1


@pytest.mark.parametrize("body", [b"{", b"", b"[" * 100_000, b"\xff\xfe", b"[1]", b'"x"'])
def test_bodies_that_are_not_json(shared: Serving, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    response = httpx.post(f"{shared[0]}/v1/chat/completions", content=body, headers=headers)
    assert response.status_code == 400
    assert "error" in response.json()


def test_an_error_of_a_stream_is_a_status(shared: Serving) -> None:
    response = ask(shared[0], "What?", "missing.mp4", stream=True)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invalid_media"


def test_unknown_urls_are_json(shared: Serving) -> None:
    assert httpx.get(f"{shared[0]}/v1/completions").json()["error"]["code"] == "unknown_url"
    assert httpx.get(f"{shared[0]}/v1/chat/completions").status_code == 405
    assert httpx.get(f"{shared[0]}/v1/files/file-{'0' * 32}").json()["error"]["code"] == "file_not_found"


# -- health and metrics -------------------------------------------------------------------------------------


def test_health_and_metrics(tiny_model: VideoLanguageModel, clips: list[Path]) -> None:
    with VideoChat(tiny_model, trusted=False) as chat, running(chat) as (address, _):
        assert httpx.get(f"{address}/healthz").json() == {"status": "ok"}
        url = upload(address, clips[0])
        with httpx.Client() as client:  # one connection is one client
            body = question("What?", url, token_budget=16, max_tokens=5)
            for _ in range(2):
                answer(client.post(f"{address}/v1/chat/completions", json=body))
        ask(address, "What?", "data:,")
        text = httpx.get(f"{address}/metrics").text
        values = {
            (sample.name, *sorted(sample.labels.values())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }
        assert values["fluxchat_requests_total", "/v1/chat/completions", "200"] == 2
        assert values["fluxchat_requests_total", "/v1/chat/completions", "400"] == 1
        assert values["fluxchat_tokens_total", "kept"] == 32
        assert values["fluxchat_tokens_total", "cached"] > 16
        assert values["fluxchat_first_token_seconds_count",] == 2
        assert values["fluxchat_first_token_seconds_bucket", "+Inf"] == 2
        assert values["fluxchat_answer_seconds_sum",] > 0
        assert values["fluxchat_files",] == 1
        assert values["fluxchat_file_bytes",] == clips[0].stat().st_size
        assert values["fluxchat_waiting",] == 0
        assert values["fluxchat_decoded_tokens_total",] > 0
        assert values["fluxchat_cache_entries", "videos"] == 1
        assert "_created" not in text


# -- load ---------------------------------------------------------------------------------------------------


def test_concurrent_clients_get_the_answers_they_get_alone(
    shared: Serving, tiny_model: VideoLanguageModel, clips: list[Path]
) -> None:
    asked = [
        ("How many?", f"{n}.mp4", {"max_tokens": 10 + 3 * n, "token_budget": 8 * (n + 1)}) for n in range(5)
    ]

    def one(job: tuple[str, str, dict[str, Any]]) -> str:
        return answer(ask(shared[0], job[0], job[1], **job[2], user=str(time.monotonic_ns())))

    alone = [one(job) for job in asked]
    assert len(set(alone)) > 2
    steps, made, _ = shared[1].chat.decoding
    with ThreadPoolExecutor(5) as pool:
        assert list(pool.map(one, asked)) == alone
    now = shared[1].chat.decoding
    assert now[0] - steps < now[1] - made  # steps were shared
    assert now[2] == 0


def test_past_the_queue_is_429(tiny_model: VideoLanguageModel) -> None:
    options = LaunchOptions(page=False, server=ServerSettings(slots=1, queue=1))
    with (
        VideoChat(tiny_model, trusted=False) as chat,
        running(chat, options) as (address, server),
        slowly(chat),
        ThreadPoolExecutor(3) as pool,
    ):
        first = pool.submit(ask, address, "What?", max_tokens=60)
        until(lambda: server.scheduler.running == 1)
        second = pool.submit(ask, address, "What?", max_tokens=2)
        until(lambda: server.scheduler.waiting == 1)
        refused = ask(address, "What?", max_tokens=2)
        assert refused.status_code == 429
        assert int(refused.headers["Retry-After"]) >= 1
        assert refused.json()["error"]["code"] == "queue_full"
        assert first.result().status_code == second.result().status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_disconnected_client_stops_its_generation(tiny_model: VideoLanguageModel, stream: bool) -> None:
    with (
        VideoChat(tiny_model, trusted=False) as chat,
        running(chat) as (address, server),
        slowly(chat) as times,
    ):
        body = question("What?", max_tokens=400, stream=stream)
        host, port = address.removeprefix("http://").split(":")
        connection = socket.create_connection((host, int(port)))
        content = json.dumps(body).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        until(lambda: len(times) > 4)
        connection.close()
        until(lambda: server.scheduler.running == 0)
        assert len(times) < 300


def test_a_client_that_disconnects_leaves_the_queue(tiny_model: VideoLanguageModel) -> None:
    options = LaunchOptions(page=False, server=ServerSettings(slots=1))
    with (
        VideoChat(tiny_model, trusted=False) as chat,
        running(chat, options) as (address, server),
        slowly(chat),
        ThreadPoolExecutor(1) as pool,
    ):
        first = pool.submit(ask, address, "What?", max_tokens=60)
        until(lambda: server.scheduler.running == 1)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                f"{address}/v1/chat/completions",
                json=question("What?"),
                timeout=httpx.Timeout(PATIENCE_S, read=0.3),
            )
        until(lambda: server.scheduler.waiting == 0)
        assert first.result().status_code == 200


def test_a_slow_reader_blocks_nobody(tiny_model: VideoLanguageModel) -> None:
    """It reads nothing of its long answer; with one slot, the next client is served all the same."""
    options = LaunchOptions(page=False, server=ServerSettings(slots=1))
    with VideoChat(tiny_model, trusted=False) as chat, running(chat, options) as (address, _):
        with httpx.stream(
            "POST", f"{address}/v1/chat/completions", json=question("What?", max_tokens=400, stream=True)
        ) as slow:
            lines = slow.iter_lines()
            next(lines)
            assert answer(ask(address, "How many?", max_tokens=5)) is not None
            rest = list(lines)
        assert rest[-2:] == ["data: [DONE]", ""]


def test_draining_finishes_running_answers_and_refuses_new_ones(tiny_model: VideoLanguageModel) -> None:
    with VideoChat(tiny_model, trusted=False) as chat, ThreadPoolExecutor(2) as pool:
        expected = chat.ask(None, "What?", max_new_tokens=80).text
        with running(chat) as (address, server):
            with slowly(chat):
                first = pool.submit(ask, address, "What?", max_tokens=80)
                until(lambda: server.scheduler.running == 1)
                draining = pool.submit(asyncio.run, server.scheduler.drain(60))
                until(lambda: server.scheduler.draining)
                refused = ask(address, "What?")
                assert httpx.get(f"{address}/healthz").status_code == 503
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
            assert "Retry-After" in refused.headers
            draining.result()
        assert answer(first.result()) == expected


def test_an_answer_that_the_end_of_the_server_cuts_is_an_error(tiny_model: VideoLanguageModel) -> None:
    with (
        VideoChat(tiny_model, trusted=False) as chat,
        ThreadPoolExecutor(1) as pool,
        running(chat) as (address, server),
        slowly(chat),
    ):
        options: dict[str, Any] = {"max_tokens": 900, "min_tokens": 900}
        whole = pool.submit(ask, address, "What?", **options)
        body = question("Which?", stream=True, **options)
        with httpx.stream("POST", f"{address}/v1/chat/completions", json=body, timeout=PATIENCE_S) as cut:
            lines = cut.iter_lines()
            next(lines)
            until(lambda: server.scheduler.running == 2)
            asyncio.run(server.scheduler.drain(0))
            *_, last, done = filter(None, lines)
        refused = whole.result()
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
    assert (json.loads(last[6:])["error"]["code"], done) == ("shutting_down", "data: [DONE]")


def test_an_unexpected_exception_is_a_500_without_details(
    tiny_model: VideoLanguageModel, caplog: pytest.LogCaptureFixture
) -> None:
    with VideoChat(tiny_model, trusted=False) as chat, running(chat) as (address, server):

        def fail(*_: Any) -> None:
            raise RuntimeError("secret detail")

        handle = chat.model.llm.model.register_forward_pre_hook(fail)
        response = ask(address, "What?")
        handle.remove()
        assert response.status_code == 500
        assert response.json()["error"]["type"] == "server_error"
        assert "secret" not in response.text
        assert "secret detail" in caplog.text
        until(lambda: server.scheduler.running == 0)
        assert answer(ask(address, "What?", max_tokens=3)) is not None


def test_a_failure_in_the_middle_of_a_stream_is_its_last_event(tiny_model: VideoLanguageModel) -> None:
    with VideoChat(tiny_model, trusted=False) as chat, running(chat) as (address, server):
        calls = 0

        def fail() -> None:
            nonlocal calls
            calls += 1
            if calls > 12:
                raise RuntimeError("secret detail")

        with before_each_pass(chat.model.llm, fail):
            response = ask(address, "What?", max_tokens=60, stream=True)
        events = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
        assert (response.status_code, events[-1]) == (200, "[DONE]")
        assert len(events) > 4
        assert json.loads(events[-2])["error"]["type"] == "server_error"
        assert "secret" not in response.text
        until(lambda: server.scheduler.running == 0)


# -- parts --------------------------------------------------------------------------------------------------


@example(pieces=["b ", "b"], stops=[" ", "b b"])
@example(pieces=["b b"], stops=[" ", "b b"])
@given(
    pieces=st.lists(st.text(alphabet="ab \n", max_size=4), max_size=8),
    stops=st.lists(st.text(alphabet="ab \n", min_size=1, max_size=3), max_size=2),
)
def test_text_filter_equals_cutting_the_whole_text(pieces: list[str], stops: list[str]) -> None:
    whole = "".join(pieces).lstrip()
    ends = [(whole.index(stop) + len(stop), whole.index(stop)) for stop in stops if stop in whole]
    expected = whole[: min(ends)[1]].rstrip() if ends else whole.rstrip()
    text = TextFilter(tuple(stops))
    assert "".join([*map(text.push, pieces), text.flush()]) == expected
    assert text.done == bool(ends)


def store_with(tmp: Path, size: int, **options: Any) -> tuple[MediaStore, Path]:
    path = tmp / "file"
    path.write_bytes(b"x" * size)
    return MediaStore(**options), path


def test_store_is_bounded(tmp_path: Path) -> None:
    store, path = store_with(tmp_path, 100, limit_bytes=250)
    with path.open("rb") as file:
        kept = store.add(file, "a")
    first = store.add_bytes(b"y" * 100)
    store.add_bytes(b"z" * 100)  # only what can be sent again gives way
    assert store.size == (2, 200)
    assert not Path(first.path).exists()
    assert store.find(kept.id) is kept
    with (
        path.open("rb") as file,
        store.use(store.add_bytes(b"z" * 100)),
        pytest.raises(ApiError, match="store of files is full"),
    ):
        store.add(file, "b")
    assert len(list(Path(store.folder).iterdir())) == 2
    store.close()
    assert not Path(store.folder).exists()


def test_store_sweeps_unused_files_only(tmp_path: Path) -> None:
    store, path = store_with(tmp_path, 10, keep_s=0.0)
    with path.open("rb") as file:
        kept = store.add(file, "a")
    with store.use(kept) as used:
        store.sweep()
        assert store.size[0] == 1
        store.delete(kept.id)
        assert Path(used).exists()
    assert not Path(used).exists()
    stored = store.add_bytes(b"x")
    time.sleep(0.01)
    store.sweep()
    assert not Path(stored.path).exists()
    store.close()


def test_the_same_bytes_are_stored_once() -> None:
    store = MediaStore()
    with ThreadPoolExecutor(4) as pool:
        kept = list(pool.map(store.add_bytes, [SHORT.read_bytes()] * 8))
    assert len({stored.path for stored in kept}) == 1
    assert len(list(Path(store.folder).iterdir())) == 1
    store.close()
    assert threading.active_count() < 100
