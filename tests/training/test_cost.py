"""What a recipe costs: by hand, against torch's own counter on real models, and through the command."""

from __future__ import annotations

import json
import math
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from encoder.config import BASE, SMALL
from encoder.errors import ConfigError
from tests import ROOT
from tests.training.distill.tiny_teachers import SETTINGS, write_stage2
from training.cost.hours import Machine, main
from training.cost.macs import LITE, LITE_FINAL, LlmSizes
from training.cost.recipe_facts import Given
from training.cost.workload import Workload, read_workload
from training.data.video_batches import VideoBatch
from training.trainer.recipe import build
from training.umt import UmtModel, UmtRecipe

RECIPES = ROOT / "training" / "recipes"
SHIPPED = sorted([*RECIPES.glob("*.yaml"), *RECIPES.glob("cpu/*.yaml"), *RECIPES.glob("box/*.yaml")])
# The only recipe whose data have no published number.
OPEN = {"chat_lora.yaml"}


def work(name: str, *overrides: str, **given: Any) -> Workload:
    return read_workload(RECIPES / name, overrides, Given(**given))


def run(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


# -- by hand ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "frames", "gmacs"),
    # The paper's GFLOPs of one view at 224^2, all tokens kept: 3072, 2048, 1024 and 512 of them.
    [
        ("small", 12, 153.88),
        ("small", 8, 83.27),
        ("small", 4, 31.98),
        ("small", 2, 13.59),
        ("base", 12, 440.08),
        ("base", 8, 254.76),
        ("base", 4, 108.10),
        ("base", 2, 49.26),
    ],
)
def test_a_single_pass_costs_what_the_paper_says_and_training_three_times_that(
    size: str, frames: int, gmacs: float
) -> None:
    tokens = frames * 256
    only = f"frames: [{frames}, {frames + 1}, 1], resolutions: [224, 225, 1], tokens: [{tokens}, {tokens}]"
    found = work(
        "finetune_k400_small.yaml",
        f"grid={{{only}}}",
        f"counts=[{tokens}]",
        "pools=[1]",
        encoder=size,
    )
    assert found.encoder == {"small": SMALL, "base": BASE}[size]
    (share,) = found.shares
    assert sum(part.forward for part in share.parts) / 1e9 == pytest.approx(gmacs, abs=0.01)
    assert found.macs_per_sample == pytest.approx(3 * sum(part.forward for part in share.parts))


def test_flexible_grids_cost_the_mean_of_their_pairs(tmp_path: Path) -> None:
    grid = "grid={{frames: [{0}, {1}, 2], resolutions: [224, 225, 1], tokens: [{2}, {3}]}}"
    both = work("finetune_k400_small.yaml", grid.format(8, 12, 2048, 2560)).macs_per_sample
    less = work("finetune_k400_small.yaml", grid.format(8, 9, 2048, 2048)).macs_per_sample
    more = work("finetune_k400_small.yaml", grid.format(10, 11, 2560, 2560)).macs_per_sample
    assert both == pytest.approx((less + more) / 2)
    assert less < more


def test_the_chat_stage_by_hand() -> None:
    found = work("chat_stage1.yaml", "model.gradient_checkpointing=false", text_tokens=40)
    video, image = found.shares
    assert (video.kind, image.kind) == ("video", "image")
    encoder, projector, llm = video.parts
    # 8 frames of 256 patches, 1024 kept and cls through 11 of 12 blocks of width 768.
    blocks = 11 * (12 * 768 * 768 * 1025 + 2 * 1025 * 1025 * 768)
    assert (encoder.forward, encoder.backward) == (8 * 256 * 588 * 768 + blocks, 0)
    # 16 tokens a frame; the first linear map needs no gradient of its input.
    assert projector.forward == 128 * (768 * 3584 + 3584 * 3584)
    assert projector.backward == 128 * (768 * 3584 + 2 * 3584 * 3584)
    layer = 2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944
    weights, attention, head = 28 * layer * 168, 28 * 168 * 168 * 3584, 40 * 3584 * 152064
    assert llm.forward == weights + attention + head
    assert llm.backward == weights + 2 * attention + head
    # One picture: 256 patches, which become 16 tokens.
    assert image.parts[1].forward == 16 * (768 * 3584 + 3584 * 3584)


def test_gradient_checkpointing_adds_a_forward_pass() -> None:
    plain = work("chat_stage1.yaml", "model.gradient_checkpointing=false").shares[0].parts[2]
    again = work("chat_stage1.yaml").shares[0].parts[2]
    head = 32 * 3584 * 152064
    assert again.forward == 2 * plain.forward - head
    assert again.backward == plain.backward
    plain, again = (
        work("clip_stage2_base.yaml", f"gradient_checkpointing={value}").shares[1].parts[0]
        for value in ("false", "true")
    )
    assert 1.9 < again.forward / plain.forward < 2
    assert again.backward == plain.backward


def test_samples_and_steps_are_the_recipes() -> None:
    umt = work("umt_small.yaml")
    assert umt.samples == 1_100_000
    assert umt.steps == math.ceil(100 * (1_100_000 // 32) / 64)
    clip = work("clip_stage1_small.yaml")
    images, videos = clip.shares
    assert (images.kind, videos.kind) == ("image", "video")
    assert videos.samples == 10_727_607
    assert images.samples == 3_318_333 + 12_423_374 + 1_000_000 + 108_077 + 113_287
    assert work("umt_small.yaml", "loop.max_steps=7").steps == 7
    assert work("umt_small.yaml", "data.0.sampling_strategy=first:10%").samples == 110_000
    assert work("finetune_k400_small.yaml", "repeats=2").samples == 2 * 240_436


def test_a_frozen_encoder_is_not_trained() -> None:
    for share in work("clip_stage1_base.yaml").shares:
        encoder, pooling, text = share.parts
        assert encoder.backward == text.backward == 0
        assert pooling.backward > 0
    assert work("clip_stage2_base.yaml").shares[1].parts[0].backward > 0


# -- against what models do ---------------------------------------------------------------------------------


def counted(run: Callable[[], Any], *, without_attention: bool = False) -> float:
    """Multiply-accumulates by torch's counter, which knows attention as plain products only."""
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        run()
    kinds = counter.get_flop_counts()["Global"]
    return sum(n for kind, n in kinds.items() if not (without_attention and "bmm" in str(kind))) / 2


def test_flux_umt_does_what_is_counted(tmp_path: Path) -> None:
    write_stage2(tmp_path / "teacher.pt", SETTINGS)
    source = {"weights": str(tmp_path / "teacher.pt"), "count": 2, "interval": 1.5, "settings": SETTINGS}
    values = {
        "stage": "umt",
        "teacher": {"internvideo2": {**source, "precision": "fp32"}},
        "encoder": {"size": "micro"},
        "data": [{"csv": "none.csv"}],
        "grid": {"frames": [8, 9, 1], "resolutions": [112, 113, 1], "tokens": [512, 512]},
        "teacher_tokens": 256,
        "counts": [192, 128, 64],
        "optim": {"lr": 1e-3, "batch_size": 2, "micro_batch": 2},
        "loop": {"out": str(tmp_path)},
    }
    (tmp_path / "umt.yaml").write_text(yaml.safe_dump(values))
    recipe = build(UmtRecipe, values, "umt")
    model = UmtModel(recipe.encoder.build(), recipe.teacher.open(), recipe).train()
    batch = VideoBatch((), torch.randn(2, 3, 8, 112, 112), 0)
    found = read_workload(tmp_path / "umt.yaml", (), Given(samples=10))
    forward = sum(part.forward for part in found.shares[0].parts)
    assert counted(lambda: model(batch)) / 2 == pytest.approx(forward, rel=0.015)
    assert counted(lambda: model(batch)[0].backward()) / 2 == pytest.approx(found.macs_per_sample, rel=0.015)


@pytest.mark.parametrize("layout", ["llama", "qwen2"])
def test_a_frozen_language_model_does_what_is_counted(layout: str, llm_folder: Callable[[str], Path]) -> None:
    from transformers import AutoModelForCausalLM

    folder = llm_folder(layout)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
    sizes = LlmSizes.of(str(folder))
    inputs = torch.randn(1, 24, sizes.hidden, requires_grad=True)

    def step() -> None:
        hidden = model.get_decoder()(inputs_embeds=inputs, use_cache=False).last_hidden_state[0, :9]
        model.get_output_embeddings()(hidden).sum().backward()

    weights = sizes.weights * 24 + sizes.hidden * sizes.vocabulary * 9
    part = sizes.part(24, 9, recomputed=False)
    assert counted(step, without_attention=True) == 2 * weights
    assert part.total == 2 * weights + 3 * sizes.attention * 24 * 24


def test_lora_counts_the_adapters_own_weights(llm_folder: Callable[[str], Path]) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = llm_folder("qwen2")
    for targets in (["all-linear"], ["q_proj", "v_proj"]):
        wanted: Any = "all-linear" if len(targets) == 1 else targets
        model = AutoModelForCausalLM.from_pretrained(folder)
        adapted = get_peft_model(model, LoraConfig(r=3, target_modules=wanted, task_type="CAUSAL_LM"))
        own = sum(p.numel() for name, p in adapted.named_parameters() if "lora_" in name)
        assert LlmSizes.of(str(folder)).adapter(3, targets) == own > 0


@pytest.mark.parametrize(
    ("name", "heads", "billions"),  # heads: matrices between hidden states and words
    [
        ("Qwen/Qwen2-7B-Instruct", 2, 7.62),
        ("Qwen/Qwen2.5-7B-Instruct", 2, 7.62),
        ("Qwen/Qwen2.5-1.5B-Instruct", 1, 1.54),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 1, 0.1345),
    ],
)
def test_known_language_models_are_as_large_as_published(name: str, heads: int, billions: float) -> None:
    sizes = LlmSizes.of(name)
    parameters = sizes.weights + heads * sizes.hidden * sizes.vocabulary
    assert parameters / 1e9 == pytest.approx(billions, rel=0.003)


@pytest.mark.parametrize("size", sorted(LITE))
def test_efficientnet_lite_does_what_is_counted(size: str) -> None:
    package = pytest.importorskip("efficientnet_lite_pytorch")
    with torch.device("meta"):
        model = package.EfficientNet.from_name(f"efficientnet-{size}", image_size=None).eval()
    side, macs, channels = LITE[size]
    pixels = torch.zeros(1, 3, side, side, device="meta")
    assert counted(lambda: model(pixels)) == pytest.approx(macs, rel=0.01)
    widths = [block._project_conv.out_channels for block in model._blocks]
    assert widths[-1] == channels[1]
    assert channels[0] in widths
    assert model._conv_head.out_channels == LITE_FINAL


# -- the command --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", SHIPPED, ids=lambda path: str(path.relative_to(RECIPES)))
def test_every_shipped_recipe_has_a_price(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("something was read from the network or from weights")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr("encoder.checkpoint.read_tensors", refuse)
    words = ["--samples", "1000"] if recipe.name in OPEN and recipe.parent == RECIPES else []
    found = run(capsys, str(recipe), *words)
    for key in ("macs", "gpu_hours", "hours", "gmacs_per_sample", "steps", "samples_per_epoch"):
        assert 0 < found[key] < math.inf
    assert sum(part["share"] for part in found["parts"]) == pytest.approx(1)
    assert all(part["forward_gmacs"] > 0 for part in found["parts"])
    width = {"small": 384, "base": 768}.get(recipe.stem.rsplit("_", 1)[-1])
    assert width is None or found["encoder"]["embed_dim"] == width


def test_options_scale_the_result(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(RECIPES / "umt_small.yaml")
    usual = run(capsys, recipe)
    assert usual["gpu_hours"] == pytest.approx(2 * usual["macs"] / (312e12 * 0.35) / 3600)
    assert usual["hours"] == pytest.approx(usual["gpu_hours"] / 8)
    assert run(capsys, recipe, "--gpus", "16")["hours"] == pytest.approx(usual["hours"] / 2)
    assert run(capsys, recipe, "--gpus", "16")["gpu_hours"] == pytest.approx(usual["gpu_hours"])
    assert run(capsys, recipe, "--tflops", "624")["hours"] == pytest.approx(usual["hours"] / 2)
    assert run(capsys, recipe, "--utilisation", "0.7")["hours"] == pytest.approx(usual["hours"] / 2)
    # Not exactly: what does not fill a step at the end of an epoch is not used.
    assert run(capsys, recipe, "--samples", "550000")["macs"] == pytest.approx(usual["macs"] / 2, rel=1e-3)
    assert run(capsys, recipe, "optim.epochs=50")["macs"] == pytest.approx(usual["macs"] / 2, rel=1e-3)
    assert run(capsys, recipe, "--encoder", "base")["macs"] > usual["macs"]


def test_options_may_stand_anywhere(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(RECIPES / "cpu" / "umt.yaml")
    assert main([recipe, "--gpus", "1", "optim.epochs=2", "--json", "optim.batch_size=64"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["gpus"], found["epochs"], found["batch_size"]) == (1, 2, 64)


def test_the_table_names_parts_hours_and_assumptions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(RECIPES / "chat_stage1.yaml"), "--gpus", "1"]) == 0
    text = capsys.readouterr().out
    for word in ("language model (frozen)", "projector", "1,039,128 samples", "35 % of 312 TFLOPS", "1 GPU."):
        assert word in text
    assert "Taken for granted: 32 tokens of text" in text


def test_weights_that_exist_say_their_own_size(
    tiny_encoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(RECIPES / "finetune_k710_small.yaml")
    found = run(capsys, recipe, f"encoder.init={tiny_encoder}", "--samples", "5000")
    assert found["encoder"] == {"embed_dim": 32, "depth": 2}


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["no_such.yaml"], "Cannot read the recipe no_such.yaml"),
        (["{cpu}/umt.yaml", "optim.speed=3"], "unknown setting 'speed'"),
        (["{cpu}/umt.yaml", "teacher_tokens=100"], "counts cannot exceed teacher_tokens"),
        (["{all}/chat_lora.yaml"], "names no corpus: say how many samples it has with --samples"),
        (["{all}/umt_small.yaml", "data.0.corpus=kinetic"], "There is no corpus 'kinetic'"),
        (["{all}/accelerate/ddp.yaml"], "does not say which stage's recipe it is"),
        (["{cpu}/umt.yaml", "stage=umtt"], "stage must be one of umt, finetune"),
        (["{cpu}/umt.yaml", "stage=clip"], "has the unknown setting 'teacher'"),
        (
            ["{all}/chat_stage1.yaml", "model.llm=some/model-9b"],
            "some/model-9b (the language model) are not on",
        ),
        (["{all}/chat_stage1.yaml", "model.encoder=gone.pth"], "name its size with --encoder"),
        (["{cpu}/umt.yaml", "--encoder", "huge"], "--encoder must be one of micro, small, base, large"),
        (["{cpu}/umt.yaml", "--samples", "0"], "--samples must be at least 1"),
        (["{cpu}/umt.yaml", "--gpus", "0"], "--gpus must be at least 1"),
        (["{cpu}/umt.yaml", "--tflops", "nan"], "--tflops must be positive"),
        (["{cpu}/umt.yaml", "--utilisation", "35"], "--utilisation must lie above 0 and up to 1"),
    ],
)
def test_what_is_wrong_is_one_sentence(
    words: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word.format(all=RECIPES, cpu=RECIPES / "cpu") for word in words]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert reason in err
    assert err.count("\n") == 1


def test_the_command_runs_where_there_is_no_hub() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "training.cost.hours", str(RECIPES / "cpu" / "finetune.yaml")],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=RECIPES.parents[1],
    )
    assert done.returncode == 0, done.stderr
    assert "fine-tuning, encoder 192 wide, 6 blocks" in done.stdout
    assert "GPU hours at 35 % of 312 TFLOPS" in done.stdout


def test_a_machine_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="utilisation"):
        Machine(utilisation=0)
