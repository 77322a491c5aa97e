"""/v1/embeddings: OpenAI's shape, and the vectors that a library has."""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from app.chat import VideoChat
from app.library.clip_table import ClipTable
from app.library.embedders import FluxEmbedder
from app.library.library import Library
from app.server.options import LaunchOptions
from app.server.routes import ServerSettings
from llm_bridge.assets.cache_dir import cache_dir
from llm_bridge.model import VideoLanguageModel
from llm_bridge.text_encoders.text_towers import MINILM
from tests.app.conftest import SHORT, WORLD
from tests.app.library.conftest import ColourEmbedder, film
from tests.app.server.serving import data_url, running, upload
from tests.patience import PATIENCE_S

needs_lancedb = pytest.mark.skipif(find_spec("lancedb") is None, reason="LanceDB is not installed")
MOST_APART = 1e-4  # of two ways to decode the same frames


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    folder = tmp_path_factory.mktemp("library")
    film(folder / "videos" / "three.mp4", ["white", "red", "green"])
    library = Library(folder / "index", embedder=ColourEmbedder(), seconds=2)
    library.index([folder / "videos"])
    return library


@pytest.fixture(scope="module")
def address(tiny_model: VideoLanguageModel, library: Library) -> Iterator[str]:
    options = LaunchOptions(page=False, library=library)
    with VideoChat(tiny_model, trusted=False) as chat, running(chat, options) as (address, _):
        yield address


def post(address: str, content: Any, **fields: Any) -> httpx.Response:
    return httpx.post(f"{address}/v1/embeddings", json={"input": content, **fields})


def vectors(response: httpx.Response) -> np.ndarray:
    assert response.status_code == 200, response.text
    data = response.json()["data"]
    assert [row["index"] for row in data] == list(range(len(data)))
    return np.array([row["embedding"] for row in data], np.float32)


def clip(url: str, **part: Any) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": url}, **part}


@needs_lancedb
def test_clips_and_texts_have_the_vectors_of_the_library(address: str, library: Library) -> None:
    video = library.folder.parent / "videos" / "three.mp4"
    found = ClipTable(library.folder, "c0").nearest([1.0, 0.0, 0.0], 3)
    rows = sorted((row for row, _ in found), key=lambda row: row.start_s)
    asked = [clip(data_url(video), start=row.start_s, end=row.end_s) for row in rows]
    got = vectors(post(address, ["red", *asked, {"type": "text", "text": "blue"}]))
    assert np.abs(got[1:4] - np.array([row.vector for row in rows])).max() < MOST_APART
    assert np.abs(got[[0, 4]] - ColourEmbedder().embed_texts(["red", "blue"]).numpy()).max() < 1e-6
    assert np.argmax(got[1:4] @ got[0]) == 1


@needs_lancedb
def test_openais_client_is_served(address: str, library: Library) -> None:
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
    reply = client.embeddings.create(model="fluxchat", input=["red", "green"])  # it asks for base64
    expected = ColourEmbedder().embed_texts(["red", "green"]).numpy()
    assert np.abs(np.array([row.embedding for row in reply.data]) - expected).max() < 1e-6
    assert (reply.model, reply.usage.prompt_tokens) == ("fluxchat", 2)
    one = client.embeddings.create(model="fluxchat", input="red", encoding_format="float")
    assert one.data[0].embedding == pytest.approx(expected[0], abs=1e-6)
    raw = post(address, "red", encoding_format="base64").json()["data"][0]["embedding"]
    assert np.frombuffer(base64.b64decode(raw), "<f4") == pytest.approx(expected[0], abs=1e-6)


@needs_lancedb
def test_every_way_to_name_a_video_is_taken(address: str) -> None:
    name = upload(address, SHORT)
    content = base64.b64encode(SHORT.read_bytes()).decode()
    got = vectors(
        post(
            address,
            [
                clip(name),
                clip(data_url(SHORT)),
                {"type": "file", "file": {"file_id": name}},
                {"type": "file", "file": {"file_data": content, "filename": "b.mp4"}},
                {"type": "input_video", "file_id": name},
            ],
        )
    )
    assert np.abs(got - got[0]).max() == 0
    assert vectors(post(address, clip(name))).shape == (1, 3)


@needs_lancedb
@pytest.mark.parametrize(
    ("content", "fields", "param", "sentence"),
    [
        ([], {}, "input", "must not be empty"),
        ("", {}, "input[0]", "must not be empty"),
        (["red", " "], {}, "input[1]", "is empty"),
        ([[1, 2]], {}, "input[0]", "must be a text or an object"),
        (["red"], {"dimensions": 8}, "dimensions", "leave it out"),
        (["red"], {"encoding_format": "hex"}, "encoding_format", "must be"),
        (["red"], {"inputs": 1}, "inputs", "no field"),
        (["red"], {"model": "other"}, "model", "no model"),
        ([clip("file-" + "0" * 32)], {}, "input[0].video_url.url", "no such file"),
        ([clip("/etc/passwd")], {}, "input[0].video_url.url", "no such media"),
        (["red", clip("data:video/mp4;base64,AAAA")], {}, "input[1].video_url.url", ""),
        (["red"] * 2000, {}, "input", "too long"),
        ([{"type": "audio"}], {}, "input[0]", "cannot stand here"),
    ],
)
def test_what_is_wrong_is_named(
    address: str, content: Any, fields: dict[str, Any], param: str, sentence: str
) -> None:
    response = post(address, content, **fields)
    assert response.status_code in (400, 404), response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert sentence in error["message"]


@needs_lancedb
def test_a_part_beyond_the_end_is_a_sentence(address: str) -> None:
    response = post(address, [clip(data_url(SHORT), start=900, end=901)])
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "input[0].video_url.url"


@needs_lancedb
def test_too_many_at_once_are_refused(
    tiny_model: VideoLanguageModel, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on, embed = threading.Event(), threading.Event(), ColourEmbedder.embed_texts

    def slow(self: ColourEmbedder, texts: Any) -> Any:
        begun.set()
        assert go_on.wait(PATIENCE_S)
        return embed(self, texts)

    monkeypatch.setattr(ColourEmbedder, "embed_texts", slow)
    options = LaunchOptions(page=False, library=library, server=ServerSettings(queue=0))
    with (
        VideoChat(tiny_model, trusted=False) as chat,
        running(chat, options) as (address, _),
        ThreadPoolExecutor(1) as thread,
    ):
        first = thread.submit(post, address, "red")
        assert begun.wait(PATIENCE_S)
        second = post(address, "red")
        go_on.set()
        assert (second.status_code, second.json()["error"]["code"]) == (429, "queue_full")
        assert first.result().status_code == 200
        assert post(address, "red").status_code == 200


@pytest.mark.slow
def test_without_a_library_they_are_the_shipped_encoders(
    tiny_model: VideoLanguageModel, tmp_path: Path
) -> None:
    if not (cache_dir() / MINILM).exists():
        pytest.skip("the text tower is not here")
    library = Library(tmp_path / "index", seconds=10)
    library.index([WORLD])
    embedder = FluxEmbedder()
    rows = ClipTable(library.folder, embedder.fingerprint).nearest([1.0] + [0.0] * 383, 3)
    with VideoChat(tiny_model, trusted=False) as chat, running(chat) as (address, _):
        for row, _ in rows:
            asked = clip(data_url(WORLD), start=row.start_s, end=row.end_s)
            got = vectors(post(address, ["a red circle", asked]))
            assert float(got[1] @ np.array(row.vector)) > 0.9999
            assert np.abs(got[0] - embedder.embed_texts(["a red circle"])[0].numpy()).max() < 1e-5
