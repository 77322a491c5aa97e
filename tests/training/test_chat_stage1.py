"""Stage 1 through its command: what it trains, what it leaves alone, exact resume, broken media."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from app.chat import VideoChat
from encoder.errors import DataError
from tests.encoder.video import video_files as vf
from tests.patience import PATIENCE_S
from training.chat_stage1 import Stage1, Stage1Recipe, main
from training.trainer.recipe import read_recipe


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def train(recipe: Path, out: Path, *overrides: str) -> int:
    return main(["--config", str(recipe), f"loop.out={out}", *overrides])


@pytest.fixture(scope="module")
def finished(stage1_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stage1") / "run"
    assert train(stage1_recipe, out) == 0
    return out


def test_the_loss_falls(finished: Path) -> None:
    found = losses(finished)
    assert len(found) == 14  # 15 records, 7 micro-batches of 2, 2 per step, 4 epochs
    assert sum(found[-3:]) < 0.85 * sum(found[:3])


def test_only_the_projector_is_trained(finished: Path, tiny_encoder: Path) -> None:
    trained = load_file(finished / "checkpoints" / "step_00000014" / "trainable.safetensors")
    assert all(name.startswith("model.projector.") for name in trained)
    before, after = (
        load_file(tiny_encoder / "model.safetensors"),
        load_file(finished / "model" / "encoder.safetensors"),
    )
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert len(before) == len(after)


def test_the_result_is_a_model_to_chat_with(finished: Path, llava_json: Path) -> None:
    with VideoChat(finished / "model", device="cpu") as chat:
        answer = chat.ask(llava_json.parent / "3.mp4", "What is it?", budget=16, max_new_tokens=8)
    assert answer.usage.visual_tokens == 16


def test_an_unreadable_video_is_named_and_passed_over(finished: Path) -> None:
    missing = json.loads((finished / "missing.json").read_text())
    assert list(missing) == ["lost"]
    assert "no such file" in missing["lost"]


def test_the_micro_batches_of_a_step_see_alike(stage1_recipe: Path, tmp_path: Path) -> None:
    views = "[{frames: 4, resolution: 56, num_tokens: 8}, {frames: 2, resolution: 84, num_tokens: 16}]"
    overrides = [f"loop.out={tmp_path}", f"inputs={views}", "bucket=4"]
    overrides += ["frames=16", "resolution=224", "num_tokens=[1024]"]
    data = Stage1(read_recipe(Stage1Recipe, stage1_recipe, overrides)).data
    steps = [(data.batch(2 * step), data.batch(2 * step + 1)) for step in range(8)]
    seen = [{grid.frames for b in step if b.vision for grid in b.vision.grids} - {1} for step in steps]
    assert {frames for found in seen for frames in found} == {2, 4}
    assert all(len(found) == 1 for found in seen)


def test_resume_is_bit_equal(finished: Path, stage1_recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    for step in range(7, 15):
        shutil.rmtree(out / "checkpoints" / f"step_{step:08d}", ignore_errors=True)
    assert train(stage1_recipe, out, "--resume") == 0
    assert losses(out) == losses(finished)


def test_cached_features_give_the_same_losses_without_encoding(
    finished: Path, stage1_recipe: Path, tmp_path: Path
) -> None:
    overrides = [f"feature_cache={tmp_path / 'features'}"]
    assert train(stage1_recipe, tmp_path / "first", *overrides) == 0
    assert losses(tmp_path / "first") == losses(finished)
    overrides.append(f"loop.out={tmp_path / 'first'}")
    stage = Stage1(read_recipe(Stage1Recipe, stage1_recipe, overrides))
    calls = []
    stage.vlm.encoder.register_forward_hook(lambda *_: calls.append(1))
    for index in range(4 * stage.micro_batches):
        stage.batch(index)
    assert not calls


def test_too_many_unreadable_videos_stop_the_run(stage1_recipe: Path, tmp_path: Path) -> None:
    talk = [{"from": "human", "value": "<image>\n?"}, {"from": "gpt", "value": "!"}]
    rows = [{"id": str(i), "video": f"{i}.mp4", "conversations": talk} for i in range(30)]
    (tmp_path / "lost.json").write_text(json.dumps(rows))
    (tmp_path / "29.mp4").write_bytes(vf.write(tmp_path / "ok.mp4", vf.steady(5)).read_bytes())
    overrides = [
        f"datasets=[{{json_path: {tmp_path / 'lost.json'}, data_root: {tmp_path}}}]",
        f"loop.out={tmp_path}/out",
    ]
    stage = Stage1(read_recipe(Stage1Recipe, stage1_recipe, overrides))
    with pytest.raises(DataError, match="more than the allowed share"):
        stage.batch(0)


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("model.encoder=/no/such.pth", "no weight file"),
        ("model.llm=./nowhere", "no model at"),
        ("datasets=[{json_path: /no.json}]", "Cannot read the annotations"),
        ("datasets=[{}]", "exactly one of"),
        ("optim.lr=high", "must be float"),
        ("max_length=10", "more than max_length"),
    ],
)
def test_wrong_recipes_end_in_one_line(
    stage1_recipe: Path, tmp_path: Path, override: str, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", str(stage1_recipe), f"loop.out={tmp_path / 'x'}", override]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert word in said


def talk(question: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": f"<video>{question}"}, {"from": "gpt", "value": "A thing."}]


def unlabelled(folder: Path, videos: Path, long: set[int]) -> list[str]:
    """Four records; the answers of those in `long` lie beyond max_length."""
    rows = [
        {"video": f"{n}.mp4", "conversations": talk("word " * 400 if n in long else "What?")}
        for n in range(4)
    ]
    (folder / "cut.json").write_text(json.dumps(rows))
    return [
        f"datasets=[{{json_path: {folder / 'cut.json'}, data_root: {videos}}}]",
        "max_length=64",
        "optim.batch_size=2",
        "optim.micro_batch=1",
        "optim.epochs=2",
        f"loop.out={folder / 'out'}",
    ]


def test_an_answer_that_is_cut_off_teaches_nothing_and_spoils_nothing(
    stage1_recipe: Path, llava_json: Path, tmp_path: Path
) -> None:
    overrides = unlabelled(tmp_path, llava_json.parent, {1})
    assert main(["--config", str(stage1_recipe), *overrides]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < row["loss"] < 100 for row in rows)
    assert rows[-1]["skipped"] == 0


@pytest.mark.slow
def test_the_real_command_ends_in_one_line_when_nothing_was_learnt(
    stage1_recipe: Path, llava_json: Path, tmp_path: Path
) -> None:
    overrides = unlabelled(tmp_path, llava_json.parent, {0, 1, 2, 3})
    done = subprocess.run(
        [sys.executable, "-m", "training.chat_stage1", "--config", str(stage1_recipe), *overrides],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=PATIENCE_S,
    )
    assert done.returncode == 2
    assert "None of the 4 steps held anything to learn: no answer lies within max_length." in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "model").exists()


def test_what_a_system_says_is_learnt_under_but_not_learnt(
    stage1_recipe: Path, llava_json: Path, tmp_path: Path
) -> None:
    rows = [{"video": "3.mp4", "conversations": [{"from": "system", "value": "Be short."}, *talk("What?")]}]
    (tmp_path / "s.json").write_text(json.dumps(rows))
    overrides = [f"datasets=[{{json_path: {tmp_path / 's.json'}, data_root: {llava_json.parent}}}]"]
    stage = Stage1(read_recipe(Stage1Recipe, stage1_recipe, [*overrides, f"loop.out={tmp_path}"]))
    prompt = stage.batch(0).prompts[0]
    decode = stage.vlm.llm.tokenizer.decode
    assert "Be short." in decode([token for token in prompt.ids if token >= 0])
    assert "Be short." not in decode([label for label in prompt.labels if label >= 0])


def test_plain_template_learns_the_caption_after_the_video(stage1_recipe: Path, tmp_path: Path) -> None:
    stage = Stage1(read_recipe(Stage1Recipe, stage1_recipe, ["template=plain", f"loop.out={tmp_path}"]))
    prompt = next(p for p in stage.batch(0).prompts if p.visuals)
    assert prompt.spans[0][0] == 0
    learned = stage.vlm.llm.tokenizer.decode([label for label in prompt.labels if label >= 0])
    assert learned.endswith(".\n")


def test_buckets_hold_like_lengths_and_every_record_once(stage1_recipe: Path, tmp_path: Path) -> None:
    rows = [
        {"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "word " * (1 + i % 40)}]}
        for i in range(160)
    ]
    (tmp_path / "text.json").write_text(json.dumps(rows))
    overrides = [f"datasets=[{{json_path: {tmp_path / 'text.json'}}}]", f"loop.out={tmp_path}/out"]
    overrides += ["optim.batch_size=80", "optim.micro_batch=8"]

    def padding(bucket: int) -> tuple[float, list[str]]:
        stage = Stage1(read_recipe(Stage1Recipe, stage1_recipe, [*overrides, f"bucket={bucket}"]))
        batches = [stage.batch(index) for index in range(stage.micro_batches)]
        assert [p.ids for p in stage.batch(3).prompts] == [p.ids for p in batches[3].prompts]
        seen = sorted(str(prompt.ids) for batch in batches for prompt in batch.prompts)
        return sum(batch.figures["padding"] for batch in batches) / len(batches), seen

    (loose, all_records), (tight, the_same) = padding(1), padding(10)
    assert all_records == the_same
    assert tight < 0.4 * loose
