"""What a recipe costs: by hand, against torch's counter on real models, and through the command."""

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
from encoder.cost import encoder_macs
from encoder.errors import ConfigError
from encoder.tokens import Grid
from tests import ROOT
from tests.patience import PATIENCE_S
from tests.training.distill.tiny_teachers import SETTINGS, write_stage2
from training.chat_lora import LoraSettings
from training.cost import (
    LLMS,
    Assumptions,
    Machine,
    Workload,
    blocks,
    language_model,
    main,
    observation,
    open_teacher,
    pooling,
    read_workload,
    reading,
)
from training.data.video_batches import VideoBatch
from training.distill.efficientnet import EfficientNetLiteSource
from training.trainer.recipe import build
from training.umt import TeacherSource, UmtModel, UmtRecipe

RECIPES = ROOT / "training" / "recipes"
# Steps, and giga multiply-accumulates of one sample by formulas that were worked out by hand.
BY_FORMULA: dict[str, tuple[int, float]] = {
    "box/chat_lora.yaml": (560, 95.6707),
    "box/chat_lora_answers.yaml": (1616, 124.8751),
    "box/chat_stage1.yaml": (100, 90.8253),
    "box/clip.yaml": (14484, 1.2111),
    "box/projector_warmup.yaml": (3000, 1.0768),
    "chat_lora.yaml": (8, 10875.0803),
    "chat_stage1.yaml": (2030, 2054.6370),
    "clip_stage1_base.yaml": (20280, 68.3882),
    "clip_stage1_small.yaml": (20280, 21.6077),
    "clip_stage2_base.yaml": (1266, 530.9389),
    "clip_stage2_small.yaml": (632, 167.0836),
    "cpu/chat_lora.yaml": (150, 87.1564),
    "cpu/chat_stage1.yaml": (150, 82.7799),
    "cpu/clip.yaml": (700, 1.2111),
    "cpu/finetune.yaml": (384, 3.7036),
    "cpu/projector_warmup.yaml": (500, 0.3656),
    "cpu/umt.yaml": (192, 6.5664),
    "cpu/umt_norms.yaml": (120, 6.5664),
    "cpu/umt_norms_plain.yaml": (120, 6.5664),
    "finetune_coin_base.yaml": (441, 2264.2658),
    "finetune_coin_small.yaml": (705, 751.2863),
    "finetune_k400_base.yaml": (1409, 2264.2674),
    "finetune_k400_small.yaml": (2348, 751.2878),
    "finetune_k710_base.yaml": (12852, 2264.2695),
    "finetune_k710_small.yaml": (22491, 751.2900),
    "finetune_ssv2_base.yaml": (6599, 2264.2658),
    "finetune_ssv2_small.yaml": (9898, 751.2863),
    "umt_base.yaml": (53711, 4306.5367),
    "umt_small.yaml": (53711, 3118.9991),
    "umt_small_plain.yaml": (53711, 3118.9991),
}
# Where torch's counter differs by more than 2 % from those formulas, and why.
SMALL_LLM = (1.07, 1.11)  # the whole square of causal attention, and the positions of summary tokens
DIFFERENT: dict[str, tuple[float, float]] = {
    "box/chat_lora.yaml": SMALL_LLM,
    "box/chat_lora_answers.yaml": SMALL_LLM,
    "box/chat_stage1.yaml": SMALL_LLM,
    "cpu/chat_lora.yaml": SMALL_LLM,
    "cpu/chat_stage1.yaml": SMALL_LLM,
    "box/projector_warmup.yaml": (1.05, 1.06),  # summary tokens
    "cpu/projector_warmup.yaml": (1.09, 1.11),
    "box/clip.yaml": (
        0.95,
        0.97,
    ),  # pixels need no gradient, and patches are a quarter of so small an encoder
    "cpu/clip.yaml": (0.95, 0.97),
    "chat_stage1.yaml": (0.90, 0.92),  # what is recomputed ends at the last input that backward needs
}
QUICK = ("cpu/clip.yaml", "cpu/finetune.yaml", "cpu/projector_warmup.yaml", "clip_stage1_small.yaml")
# The only recipe whose data have no published number.
OPEN = {"chat_lora.yaml"}


def work(name: str, *overrides: str, **assumed: Any) -> Workload:
    return read_workload(RECIPES / name, overrides, Assumptions(**assumed))


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
@pytest.mark.quick(2)
def test_a_single_pass_costs_what_the_paper_says_and_training_three_times_that(
    size: str, frames: int, gmacs: float
) -> None:
    tokens = frames * 256
    only = f"frames: [{frames}, {frames + 1}, 1], resolutions: [224, 225, 1], tokens: [{tokens}, {tokens}]"
    found = work(
        "finetune_k400_small.yaml",
        f"grid={{{only}}}",
        f"num_tokens=[{tokens}]",
        "pools=[1]",
        encoder=size,
    )
    assert found.encoder == {"small": SMALL, "base": BASE}[size]
    (share,) = found.shares
    assert sum(part.forward for part in share.parts) / 1e9 == pytest.approx(gmacs, abs=0.01)
    # Backward twice that, but for the patches, whose pixels need no gradient.
    patches = share.parts[0].forward
    assert found.macs_per_sample == pytest.approx(3 * sum(part.forward for part in share.parts) - patches)


def test_flexible_grids_cost_the_mean_of_their_pairs(tmp_path: Path) -> None:
    grid = "grid={{frames: [{0}, {1}, 2], resolutions: [224, 225, 1], tokens: [{2}, {3}]}}"
    both = work("finetune_k400_small.yaml", grid.format(8, 12, 2048, 2560)).macs_per_sample
    less = work("finetune_k400_small.yaml", grid.format(8, 9, 2048, 2048)).macs_per_sample
    more = work("finetune_k400_small.yaml", grid.format(10, 11, 2560, 2560)).macs_per_sample
    assert both == pytest.approx((less + more) / 2)
    assert less < more


@pytest.mark.slow
def test_the_chat_stage_by_hand() -> None:
    found = work("chat_stage1.yaml", "model.gradient_checkpointing=false", text_tokens=40)
    video, image = found.shares
    assert (video.kind, image.kind) == ("video", "image")
    encoder, projector, llm = video.parts
    # 8 frames of 256 patches, 1024 kept and cls through 11 of 12 blocks of width 768.
    blocks = 11 * (12 * 768 * 768 * 1025 + 2 * 1025 * 1025 * 768)
    assert (encoder.forward, encoder.backward) == (8 * 256 * 588 * 768 + blocks, 0)
    # 16 tokens a frame; the first linear map needs no gradient of its input. Merging compares tokens besides.
    assert projector.forward == pytest.approx(128 * (768 * 3584 + 3584 * 3584), rel=0.02)
    assert projector.backward == 128 * (768 * 3584 + 2 * 3584 * 3584)
    layer = 2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944
    weights, attention, head = 28 * layer * 168, 2 * 28 * 168 * 168 * 3584, 40 * 3584 * 152064
    assert llm.forward == pytest.approx(weights + attention + head, rel=1e-6)
    assert llm.backward == pytest.approx(weights + 2 * attention + head, rel=1e-6)
    # One picture: 256 patches, which become 16 tokens.
    assert image.parts[1].forward == pytest.approx(16 * (768 * 3584 + 3584 * 3584), rel=0.02)


def test_gradient_checkpointing_computes_forward_again(llm_folder: Callable[[str], Path]) -> None:
    plain, again = (blocks(SMALL, 512, checkpointing=checkpointing) for checkpointing in (False, True))
    assert again.forward == plain.forward
    assert again.backward == plain.backward + plain.forward
    # Of a frozen layer, whose weights need no inputs, not to the end, and of the scores nothing.
    plain, again = (
        reading(language_model(str(llm_folder("llama")), None, checkpointing), 24, 9)
        for checkpointing in (False, True)
    )
    assert again.forward == plain.forward
    assert plain.backward + 0.3 * plain.forward < again.backward < plain.backward + plain.forward


@pytest.mark.parametrize("tokens", [64, 1000])
def test_the_counter_sees_attention_on_the_meta_device(tokens: int) -> None:
    one = blocks(SMALL, tokens)
    assert one.forward == encoder_macs(SMALL, 0, tokens)
    assert one.backward == 2 * one.forward
    pooled = encoder_macs(SMALL, 0, tokens, pool=True) - encoder_macs(SMALL, 0, tokens)
    assert pooling(SMALL, tokens).forward == pooled


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_frozen_encoder_is_not_trained() -> None:
    for share in work("clip_stage1_base.yaml").shares:
        encoder, pooling, text = share.parts
        assert encoder.backward == text.backward == 0
        assert pooling.backward > 0
    assert work("clip_stage2_base.yaml").shares[1].parts[0].backward > 0


# -- against what models do ---------------------------------------------------------------------------------


def counted(run: Callable[[], Any]) -> float:
    """Multiply-accumulates of a real model."""
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        run()
    return counter.get_total_flops() / 2


@pytest.mark.slow
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
        "num_tokens": [192, 128, 64],
        "optim": {"lr": 1e-3, "batch_size": 2, "micro_batch": 2},
        "loop": {"out": str(tmp_path)},
    }
    (tmp_path / "umt.yaml").write_text(yaml.safe_dump(values))
    recipe = build(UmtRecipe, values, "umt")
    model = UmtModel(recipe.encoder.build(), recipe.teacher.open(), recipe).train()
    batch = VideoBatch((), torch.randn(2, 3, 8, 112, 112), 0)
    found = read_workload(tmp_path / "umt.yaml", (), Assumptions(samples=10))
    forward = sum(part.forward for part in found.shares[0].parts)
    assert counted(lambda: model(batch)) / 2 == pytest.approx(forward, rel=0.015)
    assert counted(lambda: model(batch)[0].backward()) / 2 == pytest.approx(found.macs_per_sample, rel=0.015)


@pytest.mark.parametrize("layout", ["llama", "qwen2"])
@pytest.mark.parametrize(
    "lora", [None, LoraSettings(rank=3, dropout=0), LoraSettings(3, targets=("q_proj",))]
)
@pytest.mark.quick(1)
def test_a_language_model_does_what_is_counted(
    layout: str, lora: LoraSettings | None, llm_folder: Callable[[str], Path]
) -> None:
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    folder = llm_folder(layout)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
    linears = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name)
    if lora is not None:
        model = get_peft_model(model, lora.config()).get_base_model()
        linears += sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    width = model.get_input_embeddings().weight.shape[1]
    inputs = torch.randn(1, 24, width, requires_grad=True)

    def step() -> None:
        hidden = model.get_decoder()(inputs_embeds=inputs, use_cache=False).last_hidden_state
        model.get_output_embeddings()(hidden[:, -9:]).sum().backward()

    part = reading(language_model(str(folder), lora, False), 24, 9)
    assert counted(step) == pytest.approx(part.total, rel=1e-3)
    config = model.config
    attention = 2 * config.num_hidden_layers * 24 * 24 * width
    assert part.forward == pytest.approx(linears * 24 + attention + 9 * width * config.vocab_size, rel=0.01)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("Qwen/Qwen2-7B-Instruct", 7.62),
        ("Qwen/Qwen2.5-7B-Instruct", 7.62),
        ("Qwen/Qwen2.5-1.5B-Instruct", 1.54),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 0.1345),
    ],
)
def test_known_language_models_are_as_large_as_published(name: str, billions: float) -> None:
    assert name in LLMS
    model = language_model(name, None, False)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.003)


@pytest.mark.parametrize(
    ("size", "side", "macs"),
    [("lite0", 224, 385e6), ("lite1", 240, 600e6), ("lite2", 260, 860e6), ("lite4", 300, 2.553e9)],
)
@pytest.mark.quick(1)
def test_efficientnet_lite_costs_what_was_published(size: str, side: int, macs: float) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    teacher = open_teacher(TeacherSource(efficientnet=EfficientNetLiteSource(size)))
    one = observation(teacher, Grid(3, side // 14, side // 14), side, 10)
    assert one.forward == pytest.approx(3 * macs, rel=0.01)
    assert one.backward == 0


# -- the command --------------------------------------------------------------------------------------------


def test_the_table_holds_every_shipped_recipe() -> None:
    files = [*RECIPES.glob("*.yaml"), *RECIPES.glob("cpu/*.yaml"), *RECIPES.glob("box/*.yaml")]
    assert {str(path.relative_to(RECIPES)) for path in files} == set(BY_FORMULA)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in BY_FORMULA]
)
@pytest.mark.quick(1)
def test_every_shipped_recipe_costs_what_formulas_say(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("something was read from the network or from weights")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr("encoder.checkpoint.read_tensors", refuse)
    found = run(capsys, str(RECIPES / name), *(["--samples", "1000"] if name in OPEN else []))
    steps, gmacs = BY_FORMULA[name]
    least, most = DIFFERENT.get(name, (0.98, 1.02))
    assert found["steps"] == steps
    assert least * gmacs < found["gmacs_per_sample"] < most * gmacs
    assert 0 < found["hours"] < found["gpu_hours"] < math.inf
    assert sum(part["share"] for part in found["parts"]) == pytest.approx(1)
    assert all(part["forward_gmacs"] > 0 for part in found["parts"])
    width = {"small": 384, "base": 768}.get(Path(name).stem.rsplit("_", 1)[-1])
    assert width is None or found["encoder"]["embed_dim"] == width


@pytest.mark.slow
def test_options_scale_the_result(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(RECIPES / "finetune_k400_small.yaml")
    usual = run(capsys, recipe)
    assert usual["gpu_hours"] == pytest.approx(2 * usual["macs"] / (312e12 * 0.35) / 3600)
    assert usual["hours"] == pytest.approx(usual["gpu_hours"] / 8)
    assert run(capsys, recipe, "--gpus", "16")["hours"] == pytest.approx(usual["hours"] / 2)
    assert run(capsys, recipe, "--gpus", "16")["gpu_hours"] == pytest.approx(usual["gpu_hours"])
    assert run(capsys, recipe, "--tflops", "624")["hours"] == pytest.approx(usual["hours"] / 2)
    assert run(capsys, recipe, "--utilisation", "0.7")["hours"] == pytest.approx(usual["hours"] / 2)
    # Not exactly: what does not fill a step at the end of an epoch is not used.
    assert run(capsys, recipe, "--samples", "120218")["macs"] == pytest.approx(usual["macs"] / 2, rel=1e-3)
    assert run(capsys, recipe, "optim.epochs=2.5")["macs"] == pytest.approx(usual["macs"] / 2, rel=1e-3)
    assert run(capsys, recipe, "--encoder", "base")["macs"] > usual["macs"]


def test_options_may_stand_anywhere(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(RECIPES / "cpu" / "finetune.yaml")
    assert main([recipe, "--gpus", "1", "optim.epochs=2", "--json", "optim.batch_size=64"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["gpus"], found["epochs"], found["batch_size"]) == (1, 2, 64)


@pytest.mark.slow
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
        (["{cpu}/umt.yaml", "teacher_tokens=100"], "num_tokens cannot exceed teacher_tokens"),
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


@pytest.mark.slow
def test_the_command_runs_where_there_is_no_hub() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "training.cost", str(RECIPES / "cpu" / "finetune.yaml")],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        cwd=RECIPES.parents[1],
    )
    assert done.returncode == 0, done.stderr
    assert "fine-tuning, encoder 192 wide, 6 blocks" in done.stdout
    assert "GPU hours at 35 % of 312 TFLOPS" in done.stdout


def test_a_machine_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="utilisation"):
        Machine(utilisation=0)
