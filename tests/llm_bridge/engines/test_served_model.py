"""Language models that vLLM servers compute: what is loaded here, and answers equal to whole ones."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from app.chat import VideoChat
from encoder.cost import Speed
from encoder.errors import ConfigError, ModelError
from llm_bridge.engines.served_model import ServedModel
from llm_bridge.llm import LanguageModel, load_llm
from llm_bridge.model import VideoLanguageModel
from tests import tiny_families
from tests.app.conftest import SHORT
from tests.llm_bridge.engines.vllm_protocol import Behaviour, serving
from tests.llm_bridge.test_adapters import save_adapter
from tests.patience import PATIENCE_S


@pytest.fixture(scope="module")
def folder(llm_folder: Callable[[str], Path]) -> Path:
    return llm_folder("qwen2")


@pytest.fixture
def server(
    tiny_llm: Callable[[str], LanguageModel], monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, Behaviour]]:
    monkeypatch.setattr("llm_bridge.engines.vllm.USAGE_S", PATIENCE_S)
    with serving(tiny_llm("qwen2")) as started:
        yield started


def test_nothing_is_loaded_but_the_table(folder: Path, tiny_llm: Callable[[str], LanguageModel]) -> None:
    served = load_llm(folder, engine="http://127.0.0.1:9", device="cpu", dtype=torch.float32)
    whole = tiny_llm("qwen2")
    assert isinstance(served, ServedModel)
    real = [name for name, parameter in served.model.named_parameters() if parameter.device.type != "meta"]
    assert real == ["model.embed_tokens.weight"]
    ids = torch.arange(100)
    assert torch.equal(served.embed(ids), whole.embed(ids))
    for name in ("eos_ids", "hidden_size", "context_length", "parameters", "dtype", "kv_bytes_per_token"):
        assert getattr(served, name) == getattr(whole, name)
    assert served.identity != whole.identity
    with pytest.raises(ModelError, match="computed by vLLM"):
        served.advance(None)


def test_a_chat_answers_as_with_the_whole_model(
    model: VideoLanguageModel,
    folder: Path,
    server: tuple[str, Behaviour],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("app.estimate.measure_decode", lambda: Speed((1.0, 1.0, 1.0)))  # as with any model
    model.save_pretrained(tmp_path / "model")
    options: dict[str, Any] = {"llm": str(folder), "device": "cpu", "dtype": "float32", "trusted": True}
    with (
        VideoChat(tmp_path / "model", engine="local", **options) as whole,
        VideoChat(tmp_path / "model", engine=server[0], **options) as served,
    ):
        history: list[tuple[str, str]] = []
        for question in ("What is there?", "And then?"):
            asked = {"budget": 20, "max_new_tokens": 12, "history": history}
            answer = served.ask(SHORT, question, **asked)
            assert answer.text == whole.ask(SHORT, question, **asked).text
            assert answer.usage.cached_tokens == 16  # as the server says
            history.append((question, answer.text))
        assert served.estimate(SHORT, budget=20).prefill_s > 0
        assert served.info()["engine"] == "vllm"
        assert served.decoding[2] == 0
        before = [request.get("cache_salt") for request in server[1].requests[:2]]
        served.forget()
        served.ask(SHORT, "What is there?", budget=20, max_new_tokens=1)
        assert server[1].requests[-1].get("cache_salt") not in before


def test_shards_are_read_for_the_table_alone(folder: Path, tmp_path: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    for file in folder.iterdir():
        if file.suffix == ".json" or file.suffix == ".jinja":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    shards = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(sorted(weights))}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    needed = shards["model.embed_tokens.weight"]
    save_file({name: weights[name] for name in shards if shards[name] == needed}, tmp_path / needed)
    served = load_llm(tmp_path, engine="http://127.0.0.1:9", dtype=torch.float32)
    assert torch.equal(served.embed(range(50)), weights["model.embed_tokens.weight"][:50])


def damaged(tmp_path: Path, folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Path:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = change(load_file(folder / "model.safetensors"))
    save_file(weights, tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda weights: {"x": weights["model.norm.weight"]}, "table of embeddings is not found"),
        (
            lambda weights: {"model.embed_tokens.weight": weights["model.embed_tokens.weight"][:50].clone()},
            "damaged",
        ),
    ],
)
def test_a_damaged_table_is_one_sentence(
    folder: Path, tmp_path: Path, change: Callable[[dict[str, Any]], dict[str, Any]], words: str
) -> None:
    with pytest.raises(ModelError, match=words) as raised:
        load_llm(damaged(tmp_path, folder, change), engine="http://127.0.0.1:9")
    assert "\n" not in str(raised.value)


def test_what_vllm_does_not_run_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_bridge.llm.load_pretrained", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(ConfigError, match="takes no quantize"):
        load_llm(folder, engine="http://127.0.0.1:9", quantize="int8")
    with pytest.raises(ConfigError, match="address"):
        load_llm(folder, engine="http://127.0.0.1:9,ftp://here")
    with pytest.raises(ConfigError, match="There is no engine 'vlm'"):
        load_llm(folder, engine="vlm")
    monkeypatch.setenv("FLUXCHAT_VLLM_PYTHON", sys.executable)
    with pytest.raises(ConfigError, match="has no vLLM"):
        load_llm(folder, engine="vllm")
    with pytest.raises(ModelError, match="scales its embeddings itself"):
        load_llm(tiny_families.make(tmp_path / "gemma", "gemma3_text"), engine="http://127.0.0.1:9")


@pytest.mark.slow
def test_a_copy_with_adapters_goes_with_its_server(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: tuple[str, Behaviour]
) -> None:
    class Started:
        """Stands for a server that was started; which folder it serves."""

        address = server[0]

        def __init__(self, source: str, **_: Any) -> None:
            self.source, self.acts = Path(source), list[Callable[[], object]]()
            assert (self.source / "model.safetensors").exists()

        def at_close(self, act: Callable[[], object]) -> None:
            self.acts.append(act)

        def close(self) -> None:
            while self.acts:
                self.acts.pop()()

    monkeypatch.setattr("llm_bridge.engines.served_model.VllmServer", Started)
    monkeypatch.setattr("llm_bridge.engines.support.check_vllm_installed", lambda python: None)
    adapter = save_adapter(folder, tmp_path / "lora", {"target_modules": ["q_proj"]})
    served = load_llm(folder, engine="vllm", adapters=[adapter], dtype=torch.float32)
    assert isinstance(served, ServedModel)
    assert isinstance(served.server, Started)
    merged = load_llm(served.server.source, device="cpu", dtype=torch.float32).model.state_dict()
    expected = load_llm(folder, device="cpu", dtype=torch.float32, adapters=[adapter]).model.state_dict()
    assert all(torch.equal(merged[name], expected[name]) for name in expected)
    served.own_engine.close()
    assert not served.server.source.exists()


def test_the_size_is_said_before_a_server_downloads_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*_: Any, **__: Any) -> None:
        raise ModelError("vLLM did not start")

    monkeypatch.setattr("llm_bridge.engines.support.check_vllm_installed", lambda python: None)
    monkeypatch.setattr("llm_bridge.engines.served_model.missing_bytes", lambda *_: 123)
    monkeypatch.setattr("llm_bridge.engines.served_model.VllmServer", started)
    told: list[tuple[str, int]] = []
    with pytest.raises(ModelError, match="did not start"):
        load_llm("some/model", engine="vllm", on_download=lambda *size: told.append(size))
    assert told == [("some/model", 123)]
