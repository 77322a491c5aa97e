"""Adapters: merged as peft merges them, without it where that can be."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from encoder.errors import ModelError
from llm_bridge import adapters
from llm_bridge.llm import LanguageModel, load_llm

KINDS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "v_proj"]},
    "all linear": {"target_modules": "all-linear", "lora_alpha": 32},
    "scaled by the root of the rank": {"target_modules": ["q_proj"], "use_rslora": True},
    "of several ranks": {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}},
    "with magnitudes": {"target_modules": ["q_proj"], "use_dora": True},
}
PLAIN = {"plain", "all linear"}


def logits(llm: LanguageModel) -> torch.Tensor:
    with torch.inference_mode():
        return llm.model(torch.arange(3, 20)[None]).logits.float()


@pytest.fixture
def folder(llm_folder: Callable[[str], Path]) -> Path:
    return llm_folder("qwen2")


def save_adapter(llm: Path, out: Path, settings: dict[str, Any]) -> Path:
    """An adapter with matrices that are not zero."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=4, init_lora_weights=False, **settings)
    get_peft_model(load_llm(llm, device="cpu", dtype=torch.float32).model, config).save_pretrained(out)
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.quick(3)
def test_every_kind_is_merged_as_peft_merges_it(
    folder: Path, tmp_path: Path, kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = save_adapter(folder, tmp_path, KINDS[kind])
    before = logits(load_llm(folder, device="cpu", dtype=dtype))
    ours = load_llm(folder, device="cpu", dtype=dtype, adapters=[adapter])
    with monkeypatch.context() as patch:
        patch.setattr(adapters, "merge_plain_lora", lambda *_: False)
        theirs = load_llm(folder, device="cpu", dtype=dtype, adapters=[adapter])
    assert torch.equal(logits(ours), logits(theirs))
    assert (logits(ours) - before).abs().max() > 1e-3
    plain = load_llm(folder, device="cpu", dtype=dtype)
    assert adapters.merge_plain_lora(plain.model, adapter) == (kind in PLAIN)


def test_beside_the_weights_it_answers_alike(folder: Path, tmp_path: Path) -> None:
    adapter = save_adapter(folder, tmp_path, KINDS["plain"])
    merged = load_llm(folder, device="cpu", dtype=torch.float32, adapters=[adapter])
    base = load_llm(folder, device="cpu", dtype=torch.float32)
    beside = adapters.apply_adapter(base.model, adapter, merge=False)
    with torch.inference_mode():
        found = beside(torch.arange(3, 20)[None]).logits
    torch.testing.assert_close(found, logits(merged), atol=1e-4, rtol=1e-4)


def test_a_plain_adapter_needs_no_peft(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = save_adapter(folder, tmp_path, KINDS["plain"])
    monkeypatch.setitem(sys.modules, "peft", None)  # importing it fails
    load_llm(folder, device="cpu", adapters=[adapter])


def test_an_adapter_of_another_model_is_refused(
    folder: Path, llm_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    adapter = save_adapter(folder, tmp_path / "fits", KINDS["plain"])
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "r": 8}))  # the matrices are of rank 4
    with pytest.raises(ModelError, match=r"does not fit the language model: [^\n]*\.$"):
        load_llm(folder, device="cpu", adapters=[adapter])
    damaged = save_adapter(folder, tmp_path / "damaged", KINDS["plain"])
    (damaged / "adapter_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ModelError, match="does not fit the language model"):
        load_llm(folder, device="cpu", adapters=[damaged])


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"peft_type": "XLORA"}, "only LORA"),
        ({"peft_type": ["LORA"]}, "only LORA"),
        ({"megatron_config": {"a": 1}, "megatron_core": "os"}, "'megatron_config' is not known"),
        ({"lora_ga_config": {"cache_file": "x.pt"}}, "not known"),
        ({"a_later_setting": True}, "not known"),
        ({"init_lora_weights": "pissa"}, "plain LoRA"),
        ({"r": 10**9}, "rank is"),
        ({"r": True}, "rank is"),
        ({"lora_alpha": "16"}, "not a number"),
        ({"rank_pattern": {"(a+)+$": 2}}, "more than names"),
        ({"rank_pattern": {"q_proj": 10**9}}, "rank is"),
        ({"exclude_modules": "(a+)+$"}, "more than names"),
    ],
)
@pytest.mark.quick(4)
def test_settings_that_load_or_lie_are_refused(
    folder: Path, tmp_path: Path, values: dict[str, Any], word: str
) -> None:
    adapter = save_adapter(folder, tmp_path, KINDS["plain"])
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **values}))
    with pytest.raises(ModelError, match=rf"{word}[^\n]*\.$"):
        load_llm(folder, device="cpu", adapters=[adapter])


def test_no_pattern_of_an_adapter_is_run(folder: Path, tmp_path: Path) -> None:
    """A regular expression can take for ever; the layers that have matrices say as much."""
    adapter = save_adapter(folder, tmp_path, KINDS["with magnitudes"])
    expected = logits(load_llm(folder, device="cpu", dtype=torch.float32, adapters=[adapter]))
    config = adapter / "adapter_config.json"
    endless = {"target_modules": r"(([a-z0-9_.]+)+)+\.q_proj"}
    config.write_text(json.dumps({**json.loads(config.read_text()), **endless}))
    found = logits(load_llm(folder, device="cpu", dtype=torch.float32, adapters=[adapter]))
    assert torch.equal(found, expected)


def test_pickled_adapters_are_refused(folder: Path, tmp_path: Path) -> None:
    adapter = save_adapter(folder, tmp_path, KINDS["plain"])
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(ModelError, match=r"no adapter_model\.safetensors"):
        load_llm(folder, device="cpu", adapters=[adapter])
