"""The three parts together: loss, gradients, saving and loading; and the projector alone."""

import copy
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import _disable_current_modes

from app.chat import VideoChat
from encoder.errors import CheckpointError, ConfigError, FluxChatError, ModelError
from encoder.fluxvit import FluxViT
from encoder.tokens import Grid, VisionTokens
from llm_bridge.model import VideoLanguageModel, VLMConfig, assemble, part_types
from llm_bridge.projector import Projector, ProjectorConfig, load_llava_projector
from llm_bridge.prompt import IGNORE
from llm_bridge.sampling import Sampler
from tests.encoder.video import video_files as vf
from tests.llm_bridge.tiny_vlm import ENCODER, answered, vision_of
from tests.no_float64 import NoFloat64


def test_loss_equals_the_direct_computation(model: VideoLanguageModel) -> None:
    keeps, answers = [5, 9], ["A dog.", "It moves to the left, then up."]
    vision = vision_of(model, keeps)
    prompts = [answered(model, keep, answer) for keep, answer in zip(keeps, answers, strict=True)]
    losses, count = torch.zeros(()), 0
    for prompt, visual in zip(prompts, model.project(vision), strict=True):
        ids = torch.tensor(prompt.ids)
        embedded = model.llm.embed(ids.clamp_min(0))
        start, length = prompt.spans[0]
        embedded[start : start + length] = visual
        scores = model.language_model(inputs_embeds=embedded[None]).logits[0, :-1]
        labels = torch.tensor(prompt.labels)[1:]
        losses = losses + F.cross_entropy(scores, labels, ignore_index=IGNORE, reduction="sum")
        count += int((labels != IGNORE).sum())
    torch.testing.assert_close(model.loss(prompts, vision), losses / count, atol=1e-5, rtol=1e-5)


def test_the_loss_of_answers_is_the_mean_of_theirs(model: VideoLanguageModel) -> None:
    keeps, answers = [5, 9, 7], ["A dog.", "It moves to the left, then up, and then it stays there.", "No."]
    vision = vision_of(model, keeps)
    prompts = [answered(model, keep, answer) for keep, answer in zip(keeps, answers, strict=True)]
    alone = [model.loss([prompt], vision.select(number)) for number, prompt in enumerate(prompts)]
    found = model.loss(prompts, vision, "answer")
    torch.testing.assert_close(found, torch.stack(alone).mean(), atol=1e-5, rtol=1e-5)
    assert abs(found - model.loss(prompts, vision)) > 1e-4


def test_gradients_reach_the_projector_alone(model: VideoLanguageModel) -> None:
    model.projector.requires_grad_(True)
    vision = vision_of(model, [6])
    model.loss([answered(model, 6, "A dog.")], vision).backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {f"projector.{name}" for name, _ in model.projector.named_parameters()}
    assert all(p.grad.abs().sum() > 0 for p in model.projector.parameters() if p.grad is not None)


def test_saved_and_loaded_it_is_the_same(model: VideoLanguageModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    again = VideoLanguageModel.from_pretrained(tmp_path, device="cpu", dtype=torch.float32)
    assert again.config == model.config
    assert again.revision() == model.revision()
    first, second = (m.project(vision_of(m, [7]))[0] for m in (model, again))
    assert torch.equal(first, second)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json",
        "encoder.safetensors",
        "projector.safetensors",
    ]


def test_the_revision_tells_weights_apart(model: VideoLanguageModel) -> None:
    whole, encoder = model.revision(), model.revision(language=False)
    with torch.no_grad():
        weight = model.projector.mlp[0].weight
        weight.copy_(weight.flip(0))  # the same values elsewhere
    assert model.revision() != whole
    assert model.revision(language=False) == encoder


def test_nothing_needs_float64(model: VideoLanguageModel) -> None:
    with NoFloat64(), pytest.raises(AssertionError):
        torch.ones(2).double()
    clips = [torch.zeros(3, 4, 56, 42), torch.zeros(3, 3, 28, 28)]
    with NoFloat64():
        model.revision()
        vision = model.encode(clips, [5, 4], [(0.0, 1.0, 2.0, 3.0), (0.0, 0.5, 1.0)])
        assert [len(one) for one in model.project(vision)] == [5, 4]


def test_questions_need_no_float64(
    model: VideoLanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = Sampler._sample

    def on_the_cpu(self: Sampler, *scores: torch.Tensor) -> int:
        with _disable_current_modes():  # whatever the device
            return sample(self, *scores)

    monkeypatch.setattr(Sampler, "_sample", on_the_cpu)
    clip = vf.write(tmp_path / "clip.mp4", vf.steady(12), size=(64, 48))
    with NoFloat64(), VideoChat(model, device="cpu") as chat:
        chat._worker.run(NoFloat64().__enter__)  # whose thread computes
        with pytest.raises(AssertionError):
            chat._worker.run(torch.ones(2).double)
        for sampling in ({}, {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.2}):
            asked = chat.ask(clip, "What?", budget=16, max_new_tokens=4, **sampling)
            assert asked.usage.completion_tokens > 0


@pytest.mark.parametrize("kind", ["mlp", "merge"])
def test_large_activations_are_finite_in_float16(llm_folder, kind: str) -> None:
    """As on GPUs without bfloat16: all parts in float16, norms in float32."""
    torch.manual_seed(0)
    projector = ProjectorConfig(32, 64, kind=kind, norm=True, tokens_per_frame=2, merge_heads=2)
    config = VLMConfig(llm=str(llm_folder("qwen2")), projector=projector, encoder=ENCODER)
    exact = assemble(config, FluxViT(ENCODER), None, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        for block in exact.encoder.blocks:  # their sum goes to thousands, whose squares are no float16
            block.ls1.gamma.mul_(5e5)
            block.ls2.gamma.mul_(5e5)
    half = copy.deepcopy(exact)
    for part in (half.encoder, half.projector, half.language_model):
        part.half()
    clips = [40 * torch.randn(3, 4, 28, 28) for _ in range(2)]
    prompts = [answered(exact, exact.projector.planned_tokens(12, 4), text) for text in ("Two birds.", "No.")]
    losses = []
    for model, pixels in ((exact, clips), (half, [clip.half() for clip in clips])):
        vision = model.encode(pixels, [12, 12], [(0.0, 1.0, 2.0, 3.0)] * 2)
        losses.append((vision, model.loss(prompts, vision).float()))
    (wanted, loss), (found, half_loss) = losses
    assert 1e3 < wanted.packed.abs().max() < 6e4
    assert found.packed.dtype == torch.float16
    assert torch.isfinite(found.packed).all()
    assert torch.equal(torch.stack(found.kept), torch.stack(wanted.kept))
    assert torch.cosine_similarity(found.packed.float(), wanted.packed, dim=-1).min() > 0.99
    assert half_loss.item() == pytest.approx(loss.item(), rel=0.02)


def test_older_gpus_compute_in_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    for native, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda native=native, **_: native)
        types = part_types(torch.device("cuda"), learns=True)
        assert (types.language, types.encoder, types.projector) == (dtype, dtype, torch.float32)
    assert part_types(torch.device("mps")).language == torch.float16


def test_parts_can_be_replaced(model: VideoLanguageModel, llm_folder, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")
    other = FluxViT(ENCODER)
    other.save_pretrained(tmp_path / "encoder")
    loaded = VideoLanguageModel.from_pretrained(
        tmp_path / "model",
        encoder=tmp_path / "encoder",
        llm=llm_folder("qwen3"),
        device="cpu",
        dtype=torch.float32,
    )
    assert torch.equal(loaded.encoder.cls_token, other.cls_token)
    assert loaded.language_model.config.model_type == "qwen3"


def test_misfits_are_one_sentence(model: VideoLanguageModel, tmp_path: Path) -> None:
    wide = dataclasses.replace(model.config.projector, out_dim=48)
    with pytest.raises(ModelError, match=r"training\.chat_stage1"):
        VideoLanguageModel(model.config, model.encoder, Projector(wide), model.llm)
    with pytest.raises(ModelError, match="not a FluxChat model"):
        VideoLanguageModel.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    (tmp_path / "projector.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="Cannot read"):
        VideoLanguageModel.from_pretrained(tmp_path, device="cpu")
    for content in ("{", "[]", '{"llm": "x"}', '{"encoder": {"x": 1}, "projector": {}, "llm": "x"}'):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(FluxChatError) as caught:
            VideoLanguageModel.from_pretrained(tmp_path)
        assert str(caught.value).count("\n") == 0


def tokens(keeps: list[int], frames: int = 4, dim: int = 32) -> VisionTokens:
    grid = Grid(frames, 5, 5)
    generator = torch.Generator().manual_seed(1)
    kept = tuple(torch.randperm(grid.size, generator=generator)[:k].sort().values for k in keeps)
    return VisionTokens(
        torch.randn(sum(keeps), dim, generator=generator),
        torch.zeros(len(keeps), dim),
        kept,
        (grid,) * len(keeps),
    )


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=4), st.sampled_from(["mlp", "merge"]), st.booleans())
def test_projector_counts_and_independence(keeps: list[int], kind, norm: bool) -> None:
    torch.manual_seed(0)
    projector = Projector(ProjectorConfig(32, 24, kind=kind, norm=norm, tokens_per_frame=3, merge_heads=4))
    vision = tokens(keeps)
    together = projector(vision)
    for index, part in enumerate(together):
        assert part.shape == (projector.planned_tokens(keeps[index], 4), 24)
        torch.testing.assert_close(part, projector(vision.select(index))[0], atol=1e-5, rtol=1e-4)


def test_tokens_can_say_when_they_were_seen() -> None:
    torch.manual_seed(0)
    plain = Projector(ProjectorConfig(32, 24))
    timed = Projector(ProjectorConfig(32, 24, time_periods=6))
    timed.load_state_dict(plain.state_dict(), strict=False)
    times = (0.5, 1.5, 3.0, 20.0)
    vision = dataclasses.replace(tokens([40]), times_s=(times,))
    assert torch.equal(timed(vision)[0], plain(vision)[0])  # nothing is said before it is learnt

    assert timed.time is not None
    torch.nn.init.normal_(timed.time.weight)
    said = timed(vision)[0] - plain(vision)[0]
    frames = vision.frame_of(0)
    for frame, seconds in enumerate(times):
        waves = [2 * math.pi * seconds / 2**power for power in range(1, 7)]
        wave = torch.tensor([math.sin(w) for w in waves] + [math.cos(w) for w in waves])
        expected = (timed.time.weight @ wave).expand(int((frames == frame).sum()), -1)
        torch.testing.assert_close(said[frames == frame], expected, atol=1e-4, rtol=1e-4)
    unknown = timed(tokens([40]))[0]
    image = timed(dataclasses.replace(tokens([40]), times_s=((),)))[0]
    assert torch.equal(unknown, image)


@pytest.mark.parametrize(
    ("kind", "names"), [("mlp", "mm_projector.{}"), ("merge", "model.mm_projector.mlp.{}")]
)
def test_llava_weights_load(kind, names: str) -> None:
    source = Projector(ProjectorConfig(32, 24, kind=kind, merge_heads=4))
    state = {names.format(key.removeprefix("mlp.")): value for key, value in source.state_dict().items()}
    target = Projector(source.config)
    load_llava_projector(target, state)
    assert torch.equal(target(tokens([9]))[0], source(tokens([9]))[0])
    state.pop(names.format("0.bias"))
    with pytest.raises(CheckpointError, match=r"1 missing: mlp\.0\.bias"):
        load_llava_projector(target, state)
    with pytest.raises(CheckpointError, match="no mm_projector"):
        load_llava_projector(target, {})


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "linear"},
        {"layers": 0},
        {"kind": "merge", "merge_heads": 5},
        {"depth": 2},
        {"time_periods": -1},
        {"kind": "merge", "merge_heads": 4, "time_periods": 2},
    ],
)
def test_wrong_projector_settings(wrong: dict) -> None:
    with pytest.raises(ConfigError):
        ProjectorConfig.from_dict({"in_dim": 32, "out_dim": 24, **wrong})


@pytest.mark.parametrize(
    "change",
    [
        {"projector": []},
        {"projector": {"in_dim": 10**10, "out_dim": 64}},
        {"projector": {"in_dim": 32, "out_dim": 64, "layers": 10**9}},
        {"projector": {"in_dim": 32, "out_dim": 64, "layers": "two"}},
        {"encoder": []},
        {"encoder": {"depth": 10**9}},
        {"llm": None},
        {"llm": ["a"]},
        {"default_tokens": float("nan")},
        {"default_tokens": -5},
        {"vision_depth": "last"},
        {"plan_table": [1]},
        {"plan_table": 5},
    ],
)
def test_settings_of_no_model_are_one_sentence(
    model: VideoLanguageModel, tmp_path: Path, change: dict[str, object]
) -> None:
    model.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    with pytest.raises(FluxChatError) as caught:
        VideoLanguageModel.from_pretrained(tmp_path, device="cpu")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400
