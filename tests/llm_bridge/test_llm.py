"""Loading language models: what works, and one sentence for what cannot."""

import json
from pathlib import Path

import pytest
import torch

from encoder.errors import ModelError
from llm_bridge.llm import LanguageModel, default_dtype, load_llm


def logits(llm: LanguageModel) -> torch.Tensor:
    with torch.inference_mode():
        return llm.model(torch.arange(3, 20)[None]).logits


def test_facts(llm: LanguageModel) -> None:
    assert llm.hidden_size == 64
    assert llm.context_length == 1024
    assert llm.kv_bytes_per_token == 2 * 2 * 2 * 16 * 4
    assert llm.tokenizer.eos_token_id in llm.eos_ids
    assert not any(p.requires_grad for p in llm.model.parameters())
    assert not llm.model.training
    assert llm.embed([1, 2, 3]).shape == (3, 64)


def test_end_of_turn_is_an_end(tiny_llm) -> None:
    llm = tiny_llm("qwen2")
    assert llm.tokenizer.convert_tokens_to_ids("<|im_end|>") in llm.eos_ids


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "a/b/c"])
def test_missing(name: str) -> None:
    with pytest.raises(ModelError, match="no model at"):
        load_llm(name)


def test_unreachable_hub_id_is_one_sentence() -> None:
    with pytest.raises(ModelError, match=r"^There is no folder someone/some-model here[^\n]*\.$"):
        load_llm("someone/some-model")


def test_wrong_files(tmp_path: Path, llm_folder) -> None:
    (tmp_path / "x.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match="not GGUF"):
        load_llm(tmp_path / "x.bin")
    with pytest.raises(ModelError, match=r"neither config\.json nor one"):
        load_llm(tmp_path)
    (tmp_path / "bad.gguf").write_bytes(b"GGUFgarbage")
    with pytest.raises(ModelError, match="Cannot load"):
        load_llm(tmp_path / "bad.gguf")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))
    with pytest.raises(ModelError, match="Cannot load"):
        load_llm(tmp_path)
    with pytest.raises(ModelError, match="8bit"):
        load_llm(llm_folder("qwen2"), quantize="2bit")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"adapter_config\.json"):
        load_llm(llm_folder("qwen2"), adapters=[tmp_path], device="cpu")


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["8bit", "4bit"])
def test_quantised_on_this_device(llm_folder, quantize) -> None:
    exact = logits(load_llm(llm_folder("qwen2"), device="cpu", dtype=torch.float32))
    small = logits(load_llm(llm_folder("qwen2"), device="cpu", dtype=torch.float32, quantize=quantize))
    assert (small - exact).norm() / exact.norm() < 0.5
    assert not torch.equal(small, exact)


def test_default_dtype_follows_the_hardware() -> None:
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    assert default_dtype(torch.device("cpu")) == (torch.bfloat16 if native else torch.float32)
