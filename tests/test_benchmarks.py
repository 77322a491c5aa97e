"""Every benchmark runs, as small as it goes, and prints its one JSON line with the figures that docs name."""

import gc
import importlib
import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import ROOT

HERE = ROOT / "tests" / "bench"
TESTED_ELSEWHERE = {"gpu", "soak"}  # tests/test_gpu_bench.py, tests/app/server/test_soak.py
ALWAYS = ("machine", "accelerator", "threads", "dtype", "torch", "commit", "load")
# Of each benchmark: figures of its line, the names on the way to each; options beside --smallest.
FIGURES: dict[str, tuple[str, ...]] = {
    "agreement": ("positions", "same", "mismatches", "largest_gap", "beyond_a_near_tie"),
    "decode": ("ratio_to_fastest", "long_over_short", "1s/ours/median_ms", "10s/pyav_auto/spread"),
    "encoder": ("gemm_fraction", "bf16_over_fp32", "float32/batch1/256/ms_per_clip"),
    "engine_load": ("results/2/local/requests_per_s", "results/2/local/first_token_p50_s"),
    "engines": ("questions", "answers", "results/local/same_as_float32", "results/local/differences"),
    "estimate": ("median_error", "worst_error", "cases/0/predicted_s", "cases/0/measured_s"),
    "fuzz": ("files", "outcomes", "violations", "slowest_s", "growth_mib"),
    "history": ("differing", "tiny/questions", "tiny/cpu_s/batched", "box/cached_batched"),
    "library": ("indexing/index_clips_per_s", "asking/ask_videos_per_s", "search/median_ms", "rows", "cores"),
    "llm": ("weights_mb", "read_weights/median_ms", "bf16 prefill/spread", "int8 speedup of 2 rows"),
    "load": ("cpu_ms_per_clip/loader", "clips_per_s/media", "over_decord/media_alone"),
    "long_video": ("s_per_hour/parts", "10_min/parts/added_mib", "10_min/decode/frames"),
    "page": ("1280/paint_ms", "1280/ready_ms", "1280/shift", "1280/shift_with_video", "1280/kib"),
    "sandbox": ("in_force", "wall_added_ms/median", "cpu_confined_ms/q3"),
    "second_turn": ("speedup/16", "speedup_over_cached_embeddings/16", "results/16/same_answers"),
    "serve": ("results/tokens_per_step", "results/cold/2/together/speedup", "results/follow_up/2/alone"),
    "stage1": ("samples_per_s/ours", "speedup", "loss_after/plain", "loss_difference_95", "peak_mib"),
    "start": ("ours/import_s/median_ms", "ours/answer_s/n", "ours/peak_mib", "interpreter/import_s"),
    "stock": ("sooner than plain/before 25% first", "prefill at 25% sooner than at 100%", "results"),
}


def _named() -> list[str]:
    """The benchmarks, by their files."""
    return sorted(p.stem for p in HERE.glob("*.py") if '__name__ == "__main__"' in p.read_text())


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Benchmarks take all cores."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    gc.collect()  # models


def test_every_benchmark_has_a_smoke_test() -> None:
    assert set(_named()) == set(FIGURES) | TESTED_ELSEWHERE


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(FIGURES))
def test_the_smallest_run_prints_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if name == "page" and not (shutil.which("chromium") or Path("/usr/bin/chromium").exists()):
        pytest.skip("Chromium is not installed")
    status = importlib.import_module(f"tests.bench.{name}").main(["--smallest"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["bench"], result["smallest"]) == (name, True)
    assert set(ALWAYS) <= set(result)
    for path in FIGURES[name]:
        assert _found(result, path) is not None, path
    assert not status


@pytest.mark.slow
@pytest.mark.parametrize("name", ["agreement", "engines", "llm"])
def test_llama_cpp_beside_the_others(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("llama.cpp is not installed: make llamacpp runs what needs it")
    from app.cli import main

    file = tmp_path / "box-F16.gguf"
    assert main(["export", str(file)]) == 0
    importlib.import_module(f"tests.bench.{name}").main(["--smallest", "--gguf", str(file)])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    figure = {"agreement": "same", "engines": "results/llamacpp/same_as_local", "llm": "box-F16 prefill/n"}
    assert _found(result, figure[name]) is not None


def _found(result: Any, path: str) -> Any:
    """What stands at the end of a path of keys and numbers of places; KeyError, IndexError: nothing."""
    for key in path.split("/"):
        result = result[int(key)] if isinstance(result, list) else result[key]
    return result
