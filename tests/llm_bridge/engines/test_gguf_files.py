"""Models written as GGUF, and which engine runs which file; without llama.cpp."""

import contextlib
import sys
from collections.abc import Callable
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from app.cli import main
from encoder.errors import ConfigError, ModelError
from llm_bridge.chat_model import load_chat_model
from llm_bridge.engines import EngineName, support
from llm_bridge.generation import Generation
from llm_bridge.llm import LanguageModel, load_llm, load_tokenizer
from llm_bridge.model import VideoLanguageModel
from llm_bridge.model_files import gguf_export
from llm_bridge.model_files.folder_export import write_folder
from llm_bridge.model_files.gguf_export import write_gguf
from llm_bridge.model_files.gguf_header import gguf_values
from llm_bridge.prompt import Message, render
from llm_bridge.sampling import SamplingParams
from tests.llm_bridge.engines.vllm_protocol import serving
from tests.llm_bridge.test_adapters import save_adapter
from tests.tiny_llms import make
from tests.tiny_video_models import make as make_video_model

TEXT = "What's it? I'll say 2024-05-06:\n\n  naïve café 日本 🐕<|im_end|> <tag>"


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where llama-cpp-python is not installed."""
    monkeypatch.setattr("llm_bridge.engines.llama_context.find_spec", lambda name: None)


@pytest.mark.parametrize("layout", ["qwen2", "plain"])
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
@pytest.mark.quick(2)
def test_a_model_comes_back_from_its_file(
    tiny_llm: Callable[[str], LanguageModel], tmp_path: Path, layout: str, kind: str
) -> None:
    llm = tiny_llm(layout)
    again = load_llm(write_gguf(llm, tmp_path / "m.gguf", kind), device="cpu", dtype=torch.float32)
    stored = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
    weights = llm.model.state_dict()
    for name, tensor in again.model.state_dict().items():
        expected = weights[name] if tensor.dim() < 2 else weights[name].to(stored).float()
        assert torch.equal(tensor, expected), name
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
    assert (again.eos_ids, again.context_length) == (llm.eos_ids, llm.context_length)


@pytest.mark.parametrize(("width", "named"), [(16, True), (24, True), (16, False)])
def test_heads_are_as_wide_as_the_file_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int, named: bool
) -> None:
    llm = load_llm(make(tmp_path / "llm", "qwen3", head_dim=width), device="cpu", dtype=torch.float32)
    if not named:  # then it is that of llama.cpp: the model's width by its heads
        monkeypatch.setattr("gguf.GGUFWriter.add_key_length", lambda *_: None)
    file = write_gguf(llm, tmp_path / "m.gguf", "F32")
    again = load_llm(file, device="cpu", dtype=torch.float32, engine="local")
    assert again.model.config.head_dim == width
    ids = torch.tensor([[1, 5, 9, 30]])
    with torch.inference_mode():
        assert torch.equal(again.model(ids).logits, llm.model(ids).logits)


def test_no_bars_of_transformers_are_shown(
    tiny_llm: Callable[[str], LanguageModel], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
    try:
        write_folder(tiny_llm("qwen2"), tmp_path / "written")
        load_llm(tmp_path / "written", device="cpu")
        assert logging.is_progress_bar_enabled()
    finally:
        if not before:
            logging.disable_progress_bar()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("layout", ["qwen2", "plain"])
def test_a_tokenizer_comes_back_as_it_was(
    tiny_llm: Callable[[str], LanguageModel], tmp_path: Path, layout: str
) -> None:
    llm = tiny_llm(layout)
    write_gguf(llm, tmp_path / "m.gguf", "F16")
    again = load_tokenizer(tmp_path, "m.gguf")
    assert again(TEXT).input_ids == llm.tokenizer(TEXT).input_ids
    assert again.decode(again(TEXT).input_ids) == llm.tokenizer.decode(llm.tokenizer(TEXT).input_ids)
    assert again.chat_template == llm.tokenizer.chat_template
    values = gguf_values(tmp_path / "m.gguf")
    assert values["tokenizer.ggml.eos_token_id"] == llm.tokenizer.eos_token_id
    assert values["tokenizer.ggml.pre"] == {"qwen2": "qwen2", "plain": "gpt-2"}[layout]


def test_what_cannot_be_written_is_refused_in_a_sentence(
    tiny_llm: Callable[[str], LanguageModel], tmp_path: Path, without: None
) -> None:
    llm = tiny_llm("qwen2")
    with pytest.raises(ConfigError, match="is written as one of"):
        write_gguf(llm, tmp_path / "m.gguf", "Q9")
    with pytest.raises(ConfigError, match=r"end in \.gguf"):
        write_gguf(llm, tmp_path / "m.bin", "F16")
    with pytest.raises(ConfigError, match="no folder"):
        write_gguf(llm, tmp_path / "none" / "m.gguf", "F16")
    with pytest.raises(ConfigError, match=r"needs llama.cpp: pip install 'fluxchat\[gguf\]'"):
        write_gguf(llm, tmp_path / "m.gguf", "Q8_0")
    with pytest.raises(ModelError, match="no byte-level BPE"):
        write_gguf(tiny_llm("llama"), tmp_path / "m.gguf", "F16")
    scaled = load_llm(
        make(
            tmp_path / "scaled",
            "qwen2",
            rope_parameters={"rope_type": "linear", "factor": 2, "rope_theta": 1e4},
        ),
        device="cpu",
    )
    with pytest.raises(ModelError, match="scales its positions"):
        write_gguf(scaled, tmp_path / "m.gguf", "F16")
    assert not (tmp_path / "m.gguf").exists()


def test_a_failed_write_leaves_the_old_file(
    tiny_llm: Callable[[str], LanguageModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m.gguf").write_bytes(b"old")

    def full(*_: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(gguf_export, "_add_tensor", full)
    with pytest.raises(OSError, match="full"):
        write_gguf(tiny_llm("qwen2"), tmp_path / "m.gguf", "F16")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("m.gguf", b"old")]


# -- the table of docs/which-engine.md -----------------------------------------------------------------------


def rows() -> list[tuple[str, str, dict[str, str]]]:
    """Tower, language model, and what the table says of each engine."""
    lines = (Path(__file__).parents[3] / "docs" / "which-engine.md").read_text().splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("| vision tower"))
    cells = takewhile(lambda line: line.startswith("|"), lines[start:])
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in cells]
    engines = [cell.strip("`") for cell in table[0][2:]]
    found, tower = [], ""
    for row in table[2:]:
        tower = row[0] or tower
        found.append((tower, row[1], dict(zip(engines, row[2:], strict=True))))
    return found


CELLS = [
    (tower, language, engine, said) for tower, language, cells in rows() for engine, said in cells.items()
]
STOCK = {
    "SmolVLM": "smolvlm",
    "LLaVA-OneVision": "llava_onevision",
    "Qwen2.5-VL": "qwen2_5_vl",
    "Qwen3-VL": "qwen3_vl",
}


def test_the_table_names_every_engine_and_tower() -> None:
    assert {engine for *_, engine, _ in CELLS} == set(get_args(EngineName))
    towers = {tower.split(" (")[0] for tower, *_ in CELLS}
    assert towers == {"FluxViT and projector", *STOCK}
    assert len(CELLS) == 27


@pytest.fixture(scope="module")
def video_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a stock video model by kind, made once."""
    return cache(lambda kind: make_video_model(tmp_path_factory.mktemp("stock") / kind, kind))


@pytest.mark.parametrize(("tower", "language", "engine", "said"), CELLS)
@pytest.mark.quick(2)
def test_each_cell_of_the_table_is_so(
    tower: str,
    language: str,
    engine: str,
    said: str,
    tiny_llm: Callable[[str], LanguageModel],
    llm_folder: Callable[[str], Path],
    model: VideoLanguageModel,
    video_model: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options: dict[str, Any] = {}
    if kind := STOCK.get(tower.split(" (")[0]):
        folder = video_model(kind)
    else:
        folder = tmp_path / "model"
        model.save_pretrained(folder)
        options["llm"] = str(llm_folder("qwen2"))
        if "GGUF" in language:
            options["llm"] = str(write_gguf(tiny_llm("qwen2"), tmp_path / "m.gguf", "F16"))
        if "LoRA" in language:
            settings = {"target_modules": ["q_proj"]}
            options["adapters"] = [save_adapter(llm_folder("qwen2"), tmp_path / "lora", settings)]
        if "--quantize" in language:
            options["quantize"] = "int8"
    if said.startswith("yes"):
        if engine == "llamacpp":
            pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: make llamacpp")
        with contextlib.ExitStack() as stack:
            at = engine
            if engine == "vllm":
                at, _ = stack.enter_context(serving(tiny_llm("qwen2")))
            opened = load_chat_model(folder, engine=at, device="cpu", **options)
            prompt = render(opened.llm.tokenizer, [Message.of("user", "What?")], axes=opened.llm.axes)
            generation = Generation(opened.llm, prompt, [], SamplingParams(max_new_tokens=3, min_tokens=3))
            list(generation)
            assert generation.stats.completion_tokens == 3
        return
    assert said.startswith("refused")
    for name in ("model.read_tensors", "model.load_llm", "llm.load_pretrained", "chat_model.load_stock"):
        monkeypatch.setattr(f"llm_bridge.{name}", lambda *_, **__: pytest.fail("something was loaded"))
    with pytest.raises(ConfigError) as raised:
        load_chat_model(folder, engine=engine, device="cpu", **options)
    text = str(raised.value)
    assert text.startswith(f"The engine {engine}")
    assert text.endswith(".")
    assert "\n" not in text


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"adapters": ["lora"]}, "no adapters: merge them"),
        ({"quantize": "int8"}, "no quantize"),
        ({"quantize": "4bit"}, "no quantize"),
        ({"device_map": "auto"}, "no device_map"),
    ],
)
def test_llamacpp_refuses_what_it_cannot_carry_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], word: str, without: None
) -> None:
    def loads(*_: Any, **__: Any) -> None:
        raise AssertionError("something was loaded")

    monkeypatch.setattr("llm_bridge.llm.load_pretrained", loads)
    monkeypatch.setattr("llm_bridge.engines.gguf_model.load_gguf", loads)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match=word) as raised:
        load_llm(tmp_path / "m.gguf", engine="llamacpp", **options)
    assert str(raised.value).endswith(".")
    with pytest.raises(ConfigError, match="runs GGUF files"):
        load_llm(tmp_path / "none", engine="llamacpp")
    with pytest.raises(ConfigError, match=r"needs llama\.cpp"):
        load_llm(tmp_path / "m.gguf", engine="llamacpp")
    assert "takes no" in (support.why_local(tmp_path / "m.gguf", **options) or "")


def test_a_model_is_refused_before_its_encoder_is_read(
    model: VideoLanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("llm_bridge.model.read_tensors", lambda *_: pytest.fail("read"))
    with pytest.raises(ConfigError, match="runs GGUF files"):
        VideoLanguageModel.from_pretrained(tmp_path, engine="llamacpp")


def test_without_llamacpp_a_file_is_dequantised_and_that_is_said(
    tiny_llm: Callable[[str], LanguageModel],
    model: VideoLanguageModel,
    tmp_path: Path,
    without: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_gguf(tiny_llm("qwen2"), tmp_path / "m.gguf", "F16")
    model.save_pretrained(tmp_path / "model")
    loaded = "llama_cpp" in sys.modules
    status = main(["info", "--model", str(tmp_path / "model"), "--llm", str(tmp_path / "m.gguf")])
    told = capsys.readouterr()
    assert status == 0
    assert "is dequantised and run by transformers: pip install 'fluxchat[gguf]'" in told.err
    assert "local" in told.out
    assert ("llama_cpp" in sys.modules) == loaded


def test_the_command_writes_a_file_and_says_so(
    model: VideoLanguageModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model.save_pretrained(tmp_path / "model")
    command = ["export", str(tmp_path / "m.gguf"), "--type", "f16", "--model", str(tmp_path / "model")]
    assert main(command) == 0
    assert "F16" in capsys.readouterr().out
    assert main(command) == 2
    assert "--force" in capsys.readouterr().err
    assert main([*command, "--force"]) == 0


@pytest.mark.slow
def test_the_command_writes_a_folder_with_the_adapter_merged(
    model: VideoLanguageModel,
    llm_folder: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model.save_pretrained(tmp_path / "model")
    adapter = save_adapter(llm_folder("qwen2"), tmp_path / "lora", {"target_modules": ["q_proj"]})
    command = ["export", str(tmp_path / "merged"), "--model", str(tmp_path / "model")]
    command += ["--adapters", str(adapter)]
    assert main([*command, "--type", "Q8_0"]) == 2
    assert "a name that ends in .gguf makes a GGUF file" in capsys.readouterr().err
    assert main([*command, "--type", "f32"]) == 0
    assert "F32" in capsys.readouterr().out
    written = load_llm(tmp_path / "merged", device="cpu", dtype=torch.float32)
    expected = load_llm(llm_folder("qwen2"), device="cpu", dtype=torch.float32, adapters=[adapter])
    weights = written.model.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in expected.model.state_dict().items())
    modes = {file.stat().st_mode for file in (tmp_path / "merged").iterdir()}
    assert len(modes) == 1  # a server may run as somebody else
    assert written.tokenizer(TEXT).input_ids == expected.tokenizer(TEXT).input_ids
    assert main([*command, "--force"]) == 2
    assert "is there already: choose another name" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora", "merged", "model"]


def test_a_folder_is_whole_or_not_there(
    tiny_llm: Callable[[str], LanguageModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = tiny_llm("qwen2")

    def full(*_: Any, **__: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(type(llm.tokenizer), "save_pretrained", full)
    with pytest.raises(OSError, match="full"):
        write_folder(llm, tmp_path / "merged")
    assert not list(tmp_path.iterdir())
