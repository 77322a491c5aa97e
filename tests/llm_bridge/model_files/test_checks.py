"""Model folders of strangers: nothing of them runs, no lie takes memory, and each refusal is one sentence."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from encoder.errors import FluxChatError, ModelError
from llm_bridge.llm import load_llm
from llm_bridge.model_files.chat_templates import check_template
from llm_bridge.model_files.checks import check_folder, machine_bytes
from llm_bridge.model_files.gguf_header import check_gguf
from tests import ROOT

ROOMS = ("app", "encoder", "llm_bridge", "training")


@pytest.fixture
def folder(llm_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    """A tiny model that a test may spoil."""
    return Path(shutil.copytree(llm_folder("qwen2"), tmp_path / "model"))


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(FluxChatError) as caught:
        load_llm(folder, device="cpu", dtype=torch.float32, **options)
    text = str(caught.value)
    assert text.isprintable()
    assert len(text) < 400
    assert "Traceback" not in text
    return text


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


# -- every call that loads says so ---------------------------------------------------------------------------


def loading_calls() -> list[tuple[str, ast.Call]]:
    """Calls of transformers' and the hub's loaders in all rooms: `X.from_pretrained(...)` and the like."""
    found = []
    for path in (file for room in ROOMS for file in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = (
                    node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                )
                if name in ("from_pretrained", "from_config", "snapshot_download", "hf_hub_download", "load"):
                    found.append((f"{path.relative_to(ROOT)}:{node.lineno}", node))
    return found


def constant(node: ast.expr | None) -> object:
    return node.value if isinstance(node, ast.Constant) else None


def test_no_loader_may_run_what_it_loads() -> None:
    """Loaders of our own classes and of peft have no code to run; all others are told not to."""
    ours = {"VideoLanguageModel", "FluxViT", "PeftModel", "LoraConfig", "MobileClipText", "cls"}
    seen = 0
    for place, call in loading_calls():
        owner = getattr(getattr(call.func, "value", None), "id", "")
        name = call.func.attr if isinstance(call.func, ast.Attribute) else call.func.id  # type: ignore[attr-defined]
        words = {word.arg: word.value for word in call.keywords}
        if name in ("from_pretrained", "from_config") and owner not in ours:
            assert constant(words.get("trust_remote_code")) is False, place
        elif name in ("snapshot_download", "hf_hub_download"):
            assert "revision" in words, place
        elif name == "load" and owner == "torch":
            assert constant(words.get("weights_only")) is True, place
        elif name == "load" and owner in ("np", "numpy"):
            assert constant(words.get("allow_pickle")) in (None, False), place
        else:
            continue
        seen += 1
    assert seen > 8
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            assert "pickle.load" not in path.read_text(), path


def test_code_in_a_model_folder_is_not_run_whoever_answers(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    mark = tmp_path / "ran"
    (folder / "own.py").write_text(f"open({str(mark)!r}, 'w')\nclass C: pass\n")
    own = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.C", "AutoTokenizer": ["own.C", "own.C"]}
    change(folder / "config.json", model_type="own", auto_map=own)
    change(folder / "tokenizer_config.json", tokenizer_class="C", auto_map=own)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    with pytest.raises(ModelError, match="needs code of its own"):
        load_llm(folder)
    assert not mark.exists()
    assert "y/N" not in "".join(capfd.readouterr())


def test_code_beside_a_known_model_is_left_alone(folder: Path, tmp_path: Path) -> None:
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    change(folder / "config.json", auto_map={"AutoModelForCausalLM": "own.C"})
    load_llm(folder, device="cpu")
    assert not (tmp_path / "ran").exists()


class Bomb:
    """What a pickle calls when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_pickled_weights_are_numbers_only(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    load_llm(folder, device="cpu")
    torch.save({**tensors, "bomb": Bomb(tmp_path / "ran")}, folder / "pytorch_model.bin")
    assert "Cannot load" in refusal(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    assert "Cannot load" in refusal(folder)
    assert not (tmp_path / "ran").exists()


# -- settings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"hidden_size": 10**10}, "hidden_size is 1e"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"num_hidden_layers": 900, "layer_types": ["full_attention"] * 900}, "do not belong together"),
        ({"vocab_size": 2**23}, "do not belong together"),
        ({"intermediate_size": 2**19}, "do not belong together"),
        ({"hidden_size": "wide"}, "Cannot load"),
        ({"hidden_size": -64}, "Cannot load"),
        ({"num_attention_heads": 0}, "Cannot load"),
        ({"attn_implementation": "stranger/kernel"}, "names code to download"),
        ({"_attn_implementation": {"": "stranger/kernel:run"}}, "names code to download"),
        ({"text_config": {"_attn_implementation": "stranger/kernel@v1"}}, "names code to download"),
        ({"experts_implementation": "stranger/kernel"}, "names code to download"),
        ({"quantization_config": {"quant_method": "exotic"}}, "quantised by 'exotic'"),
        ({"quantization_config": {}}, "quantised by 'None'"),
        ({"transformers_weights": "../other.bin"}, "no safetensors file of the folder"),
        ({"transformers_weights": "pytorch_model.bin"}, "no safetensors file of the folder"),
        ({"dtype": "load"}, "no number type"),
        ({"model_type": "no-such-model"}, "Cannot load"),
        ({"model_type": ["llama"]}, "Cannot load"),
    ],
)
def test_settings_that_lie_or_load_are_refused(folder: Path, values: dict[str, Any], word: str) -> None:
    change(folder / "config.json", **values)
    assert word in refusal(folder)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"a":' * 100_000, "nested too deep"),
        (b"[1]", "no JSON object"),
        (b'{"rope_theta": NaN}', "NaN"),
        (b'{"a": "' + b"x" * 17 * 2**20 + b'"}', "larger than"),
    ],
)
def test_settings_that_are_no_settings_are_refused(folder: Path, text: bytes, word: str) -> None:
    (folder / "config.json").write_bytes(text)
    assert word in refusal(folder)


def test_files_elsewhere_are_not_read(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.json").write_text("{}")
    (folder / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    (folder / "tokenizer.json").symlink_to(tmp_path / "tokenizer.json")
    assert "a link out of the folder" in refusal(folder)
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "tokenizer.json")
    assert "not a regular file" in refusal(folder)
    (folder / "tokenizer.json").unlink()
    shutil.copy(tmp_path / "tokenizer.json", folder / "tokenizer.json")
    change(folder / "tokenizer_config.json", vocab_file="/etc/passwd")
    assert "outside the folder" in refusal(folder)


def test_the_hubs_cache_may_link_to_its_own_files(folder: Path, tmp_path: Path) -> None:
    home = tmp_path / "models--a--b"
    snapshot = home / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (home / "blobs").mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copy(file, home / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    check_folder(snapshot)
    (snapshot / "more.json").symlink_to("/etc/hostname")
    with pytest.raises(ModelError, match="link out of the folder"):
        check_folder(snapshot)


# -- weights -------------------------------------------------------------------------------------------------


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def long_header(file: Path) -> None:
    file.write_bytes(struct.pack("<Q", 2**60) + file.read_bytes()[8:])


def foreign_offsets(file: Path) -> None:
    table = json.dumps(
        {"lm_head.weight": {"dtype": "F32", "shape": [9], "data_offsets": [0, 2**50]}}
    ).encode()
    file.write_bytes(struct.pack("<Q", len(table)) + table + b"0" * 36)


@pytest.mark.parametrize("spoil", [cut, long_header, foreign_offsets, lambda file: file.write_bytes(b"")])
def test_weights_that_lie_are_refused(folder: Path, spoil: Callable[[Path], None]) -> None:
    spoil(folder / "model.safetensors")
    assert "model.safetensors" in refusal(folder)


def test_lists_of_shards_stay_in_the_folder(folder: Path, tmp_path: Path) -> None:
    weights = folder / "model.safetensors"
    names = list(load_file(weights))
    weights.rename(folder / "model-1.safetensors")
    index = folder / "model.safetensors.index.json"
    for shard, word in {
        "../model-1.safetensors": "no safetensors file of the folder",
        "model-2.safetensors": "which is missing",
        "model-1.bin": "no safetensors file of the folder",
    }.items():
        index.write_text(json.dumps({"weight_map": dict.fromkeys(names, shard)}))
        assert word in refusal(folder)
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "model-1.safetensors")}))
    load_llm(folder, device="cpu")


def test_a_model_larger_than_the_machine_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine_bytes() > 2**28
    monkeypatch.setattr("llm_bridge.model_files.checks.machine_bytes", lambda: 1000.0)
    assert "GiB of memory" in refusal(folder)


def test_weights_that_are_missing_are_not_made_up(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert "lack 'model.layers.0.mlp.up_proj.weight'" in refusal(folder)


@pytest.mark.parametrize("values", [{"max_position_embeddings": "many"}, {"max_position_embeddings": 0}])
def test_settings_that_are_noticed_late_are_one_sentence(folder: Path, values: dict[str, Any]) -> None:
    change(folder / "config.json", **values)
    refusal(folder)


def test_weights_of_another_model_are_one_sentence(folder: Path) -> None:
    save_file({"x": torch.zeros(400_000)}, folder / "model.safetensors", {"format": "pt"})
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text()[:-40])
    assert "tokenizer" in refusal(folder)


# -- GGUF ----------------------------------------------------------------------------------------------------


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def gguf(*entries: bytes, tensors: tuple[bytes, ...] = (), version: int = 3, more: int = 0) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors) + more, len(entries) + more)
    return head + b"".join(entries) + b"".join(tensors)


def tensor(dimensions: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text("t") + struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, kind, offset)


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"", "empty"),
        (b"GGUF", "ends in the middle"),
        (gguf(version=1), "version 1"),
        (gguf(more=2**40), "table lists"),
        (gguf(more=9), "ends in the middle"),
        # transformers' reader goes through such a list for ever
        (gguf(text("a") + struct.pack("<IIQ", 9, 4, 2**60)), "list of"),
        (gguf(text("a") + struct.pack("<IIQ", 9, 4, 2**20)), "ends in the middle"),
        (gguf(text("a") + struct.pack("<IIQ", 9, 9, 1)), "unknown kind"),
        (gguf(struct.pack("<Q", 2**62)), "ends in the middle"),
        (gguf(tensors=(tensor((2**40, 2**40)),)), "cut off"),
        (gguf(tensors=(tensor((1, 1, 1, 1, 1)),)), "5 dimensions"),
        (gguf(tensors=(tensor((4,), kind=999),)), "unknown kind"),
        (gguf(tensors=(tensor((4,), offset=2**50),)), "cut off"),
        (gguf(tensors=tuple(tensor((64,)) for _ in range(40))) + bytes(256), "overlap"),
    ],
)
def test_gguf_tables_that_lie_are_refused(tmp_path: Path, data: bytes, word: str) -> None:
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(ValueError, match=word):
        check_gguf(tmp_path / "m.gguf")
    assert word in refusal(tmp_path / "m.gguf")


def test_an_honest_gguf_table_is_walked_to_its_end(tmp_path: Path) -> None:
    entries = (
        text("general.name") + struct.pack("<I", 8) + text("tiny"),
        text("words") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("b"),
        text("scores") + struct.pack("<IIQ", 9, 6, 2) + bytes(8),
    )
    (tmp_path / "m.gguf").write_bytes(gguf(*entries, tensors=(tensor((8, 2)),)) + bytes(64))
    assert check_gguf(tmp_path / "m.gguf") == 64


# -- chat templates ------------------------------------------------------------------------------------------


class Templated:
    """A tokenizer that is only its template."""

    def __init__(self, chat_template: object) -> None:
        self.chat_template, self.special_tokens_map = chat_template, {"eos_token": "</s>"}
        self.name_or_path = "some/model"


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'x' * 10**10 }}",
        "{{ '%09999999999d' % 1 }}",
        "{{ 'x'|center(4000000000) }}",
        "{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n }}",
    ],
)
@pytest.mark.quick(3)
def test_templates_that_fill_the_memory_are_refused(template: str) -> None:
    with pytest.raises(ModelError, match=r"fills the memory: [^\n]*\.$"):
        check_template(Templated({"default": template}))


def test_templates_that_do_not_end_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_bridge.model_files.chat_templates.SECONDS", 1)
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(ModelError, match=r"does not end: [^\n]*\.$"):
        check_template(Templated(loop))


def test_honest_templates_pass() -> None:
    check_template(Templated(None))
    check_template(Templated("{% for m in messages %}{{ m['content'] }}{% endfor %}"))
    check_template(Templated("{% set x = 3 %}{% for i in range(x) %}{{ messages[-1].content }}{% endfor %}"))
    check_template(Templated("{{ raise_exception('no') }}"))
