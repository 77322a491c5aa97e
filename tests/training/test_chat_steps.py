"""A step of the chat stages: its records, its loss over all labels, what learns in it and what does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from encoder.checkpoint import load_encoder
from encoder.errors import ConfigError
from llm_bridge.model import part_types
from tests.patience import PATIENCE_S
from training.chat_stage1 import Stage1, Stage1Recipe
from training.trainer.distributed import device_of_process, open_accelerator
from training.trainer.loop import train
from training.trainer.recipe import read_recipe


def talk(words: int, media: str = "<image>\n") -> list[dict[str, str]]:
    return [
        {"from": "human", "value": f"{media}What is it?"},
        {"from": "gpt", "value": " ".join(["word"] * words)},
    ]


def records(path: Path, *, videos: int, texts: int) -> str:
    """A dataset of records whose answers have very different lengths."""
    rows = [{"id": f"v{n}", "video": f"{n}.mp4", "conversations": talk(1 + 9 * n)} for n in range(videos)]
    rows += [{"id": f"t{n}", "conversations": talk(1 + 5 * n, "")} for n in range(texts)]
    path.write_text(json.dumps(rows))
    return str(path)


def overrides(folder: Path, media: Path, out: Path, **counts: int) -> list[str]:
    data = records(folder / "rows.json", **counts)
    return [f"datasets=[{{json_path: {data}, data_root: {media}}}]", f"loop.out={out}", "loop.max_steps=1"]


def processes(grads: Path, count: int, *arguments: str, port: int, **environment: str) -> dict[str, Tensor]:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={count}"),
            *(f"--master-port={port}", "-m", "tests.training.chat_processes", str(grads), *arguments),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1", **environment},
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr[-9000:]
    return load_file(grads)


def flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradients[name].double().flatten() for name in sorted(gradients)])


def assert_same_direction(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    a, b = flat(found), flat(wanted)
    assert float(torch.nn.functional.cosine_similarity(a, b, dim=0)) > 0.9999
    torch.testing.assert_close(a.norm(), b.norm(), rtol=1e-3, atol=0)


def gradients(stage: Stage1, per_step: int) -> dict[str, Tensor]:
    """Of one step's loss, as the loop shares it out."""
    from training.trainer.loop import _Run

    recipe = stage.recipe
    run = _Run(open_accelerator(recipe.loop.precision), stage, recipe.optim, recipe.loop, False)
    assert run.share == per_step
    run.gradients(0, 0.0, lambda step, _: run.make(step))
    return {name: p.grad for name, p in stage.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("weighting", ["token", "square"])
def test_a_steps_gradient_is_that_of_one_big_batch(
    stage1_recipe: Path, llava_json: Path, tmp_path: Path, weighting: str
) -> None:
    common = [f"weighting={weighting}", "optim.batch_size=8", "num_tokens=[8]", "bucket=4"]
    common += overrides(tmp_path, llava_json.parent, tmp_path / "out", videos=6, texts=4)
    found = []
    for micro in (8, 2):
        stage = Stage1(read_recipe(Stage1Recipe, stage1_recipe, [*common, f"optim.micro_batch={micro}"]))
        found.append(gradients(stage, 8 // micro))
    assert_same_direction(found[1], found[0])


@pytest.mark.slow
@pytest.mark.parametrize("sharded", ["", "1"], ids=["ddp", "fsdp"])
@pytest.mark.parametrize("each", [2, 4])
def test_two_processes_have_the_gradient_of_one_big_batch(
    stage1_recipe: Path, llava_json: Path, tmp_path: Path, each: int, sharded: str
) -> None:
    """Sorted by length, the first micro-batches are text alone: with one each, only those of one process."""
    common = [f"optim.batch_size={2 * each}", "num_tokens=[8]", "bucket=4"]
    common += overrides(tmp_path, llava_json.parent, tmp_path / "one", videos=each, texts=each)
    recipe = ["--config", str(stage1_recipe)]
    big = read_recipe(Stage1Recipe, stage1_recipe, [*common, f"optim.micro_batch={2 * each}"])
    wanted = gradients(Stage1(big), 1)
    out = ["optim.micro_batch=2", f"loop.out={tmp_path / 'two'}"]
    if each == 2:
        stage = Stage1(read_recipe(Stage1Recipe, stage1_recipe, [*common, *out]))
        assert [stage.batch(rank).vision is None for rank in range(2)] == [True, False]
    port = 29540 + each + bool(sharded)
    found = processes(tmp_path / "g", 2, *recipe, *common, *out, port=port, SHARDED=sharded)
    assert_same_direction(found, wanted)
    assert (tmp_path / "two" / "model" / "projector.safetensors").is_file()
    assert (tmp_path / "g.ranks").read_text() == "0\n"  # the main process alone keeps the recipe
    read_recipe(Stage1Recipe, tmp_path / "two" / "recipe.yaml")


def test_a_batch_of_text_alone_reaches_every_trained_parameter(
    stage1_recipe: Path, llava_json: Path, tmp_path: Path
) -> None:
    changes = overrides(tmp_path, llava_json.parent, tmp_path / "out", videos=0, texts=4)
    changes += ["model.projector.summary_tokens=2", "model.projector.time_periods=3"]
    stage = Stage1(read_recipe(Stage1Recipe, stage1_recipe, changes))
    batch = stage.batch(0)
    assert batch.vision is None
    stage.model(batch)[0].backward()
    learn = [p for p in stage.model.parameters() if p.requires_grad]
    assert learn
    assert all(p.grad is not None and not p.grad.any() for p in learn)


def numbers(batches: Sequence[object], stage: Stage1) -> list[int]:
    decode = stage.vlm.llm.tokenizer.decode
    prompts = [prompt for batch in batches for prompt in batch.prompts]  # type: ignore[attr-defined]
    return [decode([i for i in prompt.labels if i >= 0]).count("word") for prompt in prompts]


def test_a_step_draws_its_records_at_random_and_sorts_within(
    stage1_recipe: Path, llava_json: Path, tmp_path: Path
) -> None:
    """Short captions and long talks come in the same step."""
    rows = [{"conversations": talk(2 if n % 2 else 60, "")} for n in range(64)]
    (tmp_path / "r.json").write_text(json.dumps(rows))
    changes = [f"datasets=[{{json_path: {tmp_path / 'r.json'}}}]", f"loop.out={tmp_path}/o", "bucket=99"]
    changes += ["optim.batch_size=16", "optim.micro_batch=4"]
    stage = Stage1(read_recipe(Stage1Recipe, stage1_recipe, changes))
    for step in range(4):
        words = numbers([stage.batch(4 * step + part) for part in range(4)], stage)
        assert words == sorted(words)
        assert 2 < sum(count < 10 for count in words) < 14


def test_what_learns_is_float32_under_the_gpus_types(
    stage1_recipe: Path, llava_json: Path, tmp_path: Path
) -> None:
    types = part_types(torch.device("cuda"), torch.bfloat16, learns=True)
    assert (types.language, types.encoder, types.projector) == (
        torch.bfloat16,
        torch.bfloat16,
        torch.float32,
    )
    changes = overrides(tmp_path, llava_json.parent, tmp_path / "out", videos=4, texts=0)
    recipe = read_recipe(Stage1Recipe, stage1_recipe, [*changes, "loop.precision=bf16"])
    stage = Stage1(recipe, types)
    assert stage.vlm.encoder.cls_token.dtype == torch.bfloat16
    stage.vlm.projector.bfloat16()  # wherever it came from
    before = [p.detach().clone() for p in stage.vlm.projector.parameters()]
    train(stage, recipe.optim, recipe.loop)
    after = list(stage.vlm.projector.parameters())
    assert {p.dtype for p in after} == {torch.float32}
    assert any(not torch.equal(p, q) for p, q in zip(before, after, strict=True))
    state = torch.load(tmp_path / "out/checkpoints/step_00000001/optimizer.pt", weights_only=True)["state"]
    assert {v.dtype for values in state.values() for v in values.values()} == {torch.float32}


def test_the_frozen_encoder_never_trains(stage1_recipe: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    encoder = load_encoder(tiny_encoder)
    encoder.config = encoder.config.replace(drop_path=0.9)
    encoder.save_pretrained(tmp_path / "dropping")
    changes = [f"model.encoder={tmp_path / 'dropping'}", f"loop.out={tmp_path}/o"]
    changes += ["model.gradient_checkpointing=true"]
    stage = Stage1(read_recipe(Stage1Recipe, stage1_recipe, changes))
    stage.model.train()
    stage.vlm.train()
    assert stage.vlm.projector.training
    assert not any(module.training for module in stage.vlm.encoder.modules())
    # Layers that recompute in the backward pass look at their own flag; nothing below them is in training.
    inside = [m for m in stage.vlm.language_model.modules() if m.training]
    assert {type(m).__name__ for m in inside} <= {"Qwen2DecoderLayer", "Qwen2Model", "Qwen2ForCausalLM"}
    assert any(type(m).__name__ == "Qwen2DecoderLayer" for m in inside)
    first, second = stage.batch(0).vision, stage.batch(0).vision
    assert first is not None
    assert second is not None
    assert torch.equal(first.packed, second.packed)


def test_each_process_has_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert device_of_process("cuda") == torch.device("cuda", 3)
    assert device_of_process("cpu") == torch.device("cpu")
    monkeypatch.delenv("LOCAL_RANK")
    assert device_of_process("cuda") == torch.device("cuda", 0)


def test_the_parts_go_to_the_processs_device(stage1_recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []

    def assemble(*_: object, device: torch.device, **__: object) -> None:
        asked.append(device)
        raise ConfigError("enough")

    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr("training.chat_stage1.assemble", assemble)
    monkeypatch.setattr("training.trainer.distributed.default_device", lambda: torch.device("cuda"))
    with pytest.raises(ConfigError, match="enough"):
        Stage1(read_recipe(Stage1Recipe, stage1_recipe))
    assert asked == [torch.device("cuda", 1)]


def test_held_out_records_are_others(stage1_recipe: Path, llava_json: Path, tmp_path: Path) -> None:
    other = records(tmp_path / "held.json", videos=3, texts=0)
    held = f"held_out=[{{json_path: {other}, data_root: {llava_json.parent}}}]"
    changes = [held, "evaluate_records=3", "loop.evaluate_every=1", f"loop.out={tmp_path}/o"]
    stage = Stage1(read_recipe(Stage1Recipe, stage1_recipe, changes))
    batches = list(stage.data.held_out())
    assert [len(batch.prompts) for batch in batches] == [2, 1]
    assert numbers(batches, stage) == [1, 10, 19]
    whole = Stage1(read_recipe(Stage1Recipe, stage1_recipe, [*changes, "optim.micro_batch=4"]))
    assert stage.evaluate()["loss"] == pytest.approx(whole.evaluate()["loss"], rel=1e-4)
    for wrong in (
        ["evaluate_records=3", "loop.evaluate_every=1"],
        [held, "loop.evaluate_every=1"],
        [held, "evaluate_records=3"],
        [
            "evaluate_records=3",
            "loop.evaluate_every=1",
            f"held_out=[{{json_path: {llava_json}, data_root: {llava_json.parent}}}]",
        ],
    ):
        with pytest.raises(ConfigError, match="held_out"):
            read_recipe(Stage1Recipe, stage1_recipe, wrong)


def test_lengths_of_merged_clips(stage1_recipe: Path, llava_json: Path, tmp_path: Path) -> None:
    """An image merges to the tokens of one frame."""
    changes = ["model.projector={kind: merge, tokens_per_frame: 2, norm: true}", f"loop.out={tmp_path}/o"]
    data = Stage1(read_recipe(Stage1Recipe, stage1_recipe, changes)).data
    source = data._loader.source
    visual = [
        data._length(n) - sum(len(t) for turn in source[n].turns for t in turn) // 4 for n in (0, 12, 13)
    ]
    assert visual == [8, 2, 0]
