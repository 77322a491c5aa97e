"""The recipe in a run's folder is the run's, and a resumed run may change only what makes no other run."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml

from encoder.errors import CheckpointError, ConfigError
from tests.training.trainer.test_every_key import recipe_of
from training import chat_stage1
from training.chat_stage1 import Stage1Recipe
from training.trainer.recipe import STAGES, build, read_recipe
from training.trainer.run_recipe import CHANGEABLE, MEASURED_ON, check_resumed, keep_recipe

DATA = {"json_path": "talks.json", "data_root": "videos"}
VALUES: dict[str, Any] = {
    "model": {"encoder": "e", "llm": "l"},
    "datasets": [DATA],
    "optim": {"lr": 1e-3, "batch_size": 4, "micro_batch": 2},
}


def recipe(out: Path, **changes: Any) -> Stage1Recipe:
    values = json.loads(json.dumps({**VALUES, "loop": {"out": str(out)}}))
    for key, value in changes.items():
        *tables, last = key.split("__")
        table = values
        for name in tables:
            table = table.setdefault(name, {})
        table[last] = value
    return build(Stage1Recipe, values, "test")


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A run with one checkpoint."""
    keep_recipe(recipe(tmp_path))
    (tmp_path / "checkpoints" / "step_00000004").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"optim__lr": 5e-4}, "optim.lr 0.001, not 0.0005: "),
        ({"optim__epochs": 2}, "optim.epochs 1.0, not 2.0: "),
        ({"optim__batch_size": 8}, "optim.batch_size 4, not 8: "),
        ({"loop__max_steps": 9}, "loop.max_steps null, not 9: "),
        ({"loop__seed": 1}, "loop.seed 0, not 1: "),
        ({"loop__precision": "fp32"}, "loop.precision bf16, not fp32: "),
        ({"num_tokens": [64, 32]}, "num_tokens [1024], not [64, 32]: "),
        ({"model__projector": {"layers": 1}}, "model.projector.layers 2, not 1: "),
        ({"datasets": [{**DATA, "json_path": "b"}]}, "datasets.0.json_path talks.json, not b: "),
        ({"datasets": [DATA, {**DATA, "json_path": "b"}]}, "datasets.1 null, not {"),
        ({"optim__lr": 1.0, "loop__seed": 1}, "optim.lr 0.001, not 1.0; loop.seed 0, not 1: "),
    ],
)
def test_what_would_make_another_run_is_refused_by_name(begun: Path, changes: dict, told: str) -> None:
    with pytest.raises(CheckpointError) as refused:
        check_resumed(recipe(begun, **changes))
    sentence = str(refused.value)
    assert sentence.startswith(f"The run in {begun} began with {told}")
    assert f"--config {begun / 'recipe.yaml'})" in sentence
    assert "another loop.out" in sentence


def test_what_makes_no_other_run_may_change(begun: Path) -> None:
    loop = {"checkpoint_every": 7, "keep_checkpoints": 3, "log_every": 2, "modules": ["a"], "compile": True}
    loop |= {"stop_after_s": 60.0, "trackers": ["wandb"]}
    changes: dict[str, Any] = {f"loop__{key}": value for key, value in loop.items()}
    changes |= {"max_missing": 0.5, "feature_cache": "f", "model__gradient_checkpointing": True}
    check_resumed(recipe(begun, **changes))
    moved = begun / "moved"
    shutil.copytree(begun, moved)
    check_resumed(recipe(moved))
    with pytest.raises(CheckpointError) as refused:
        check_resumed(recipe(moved, loop__seed=1))
    assert f"--config {moved / 'recipe.yaml'} loop.out={moved})" in str(refused.value)


def test_what_is_measured_changes_where_nothing_was_measured(begun: Path) -> None:
    def measuring(name: str, every: int = 5) -> Stage1Recipe:
        held_out = [{**DATA, "json_path": name}]
        return recipe(begun, held_out=held_out, evaluate_records=4, loop__evaluate_every=every)

    check_resumed(measuring("a"))
    keep_recipe(measuring("a"))
    check_resumed(measuring("a", 3))
    check_resumed(recipe(begun))
    with pytest.raises(CheckpointError, match=r"held_out\.0\.json_path a, not b: "):
        check_resumed(measuring("b"))


def test_a_run_of_the_last_version_and_one_without_a_checkpoint_go_on(begun: Path) -> None:
    other = recipe(begun, optim__lr=1.0)
    (begun / "recipe.yaml").rename(begun / "away.yaml")
    check_resumed(other)
    (begun / "away.yaml").rename(begun / "recipe.yaml")
    shutil.rmtree(begun / "checkpoints")
    check_resumed(other)


def test_a_setting_that_came_later_has_its_default(begun: Path) -> None:
    kept = yaml.safe_load((begun / "recipe.yaml").read_text())
    del kept["loop"]["compile"]
    (begun / "recipe.yaml").write_text(yaml.safe_dump(kept))
    check_resumed(recipe(begun))


def test_a_kept_recipe_that_cannot_be_read_is_named(begun: Path) -> None:
    (begun / "recipe.yaml").write_text("{")
    with pytest.raises(ConfigError, match=r"recipe\.yaml is not valid YAML"):
        check_resumed(recipe(begun))


def keys(kind: Any, place: str = "") -> set[str]:
    """Dotted keys of a recipe's dataclass."""
    found = set()
    for name, hint in get_type_hints(kind).items():
        if name in kind.__dataclass_fields__:
            inner = next((one for one in (hint, *get_args(hint)) if dataclasses.is_dataclass(one)), None)
            found |= {place + name} | (keys(inner, f"{place}{name}.") if inner else set())
    return found


def test_every_key_that_may_change_is_one_of_a_stage() -> None:
    known = set().union(*(keys(recipe_of(stage)) for stage in STAGES))
    assert known >= CHANGEABLE | MEASURED_ON


def test_the_folder_of_a_run_holds_its_recipe(stage1_recipe: Path, tmp_path: Path, capsys) -> None:
    config, run = ["--config", str(stage1_recipe)], [f"loop.out={tmp_path / 'run'}", "loop.max_steps=4"]
    assert chat_stage1.main([*config, "--print", *run]) == 0
    printed = capsys.readouterr().out
    assert chat_stage1.main([*config, *run]) == 0
    kept = tmp_path / "run" / "recipe.yaml"
    assert kept.read_text() == printed
    assert read_recipe(Stage1Recipe, kept) == read_recipe(Stage1Recipe, stage1_recipe, run)
    # The same run again, elsewhere.
    assert chat_stage1.main(["--config", str(kept), f"loop.out={tmp_path / 'again'}"]) == 0
    logs = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("run", "again")]
    whole, again = ([json.loads(line)["loss"] for line in lines] for lines in logs)
    assert again == whole
    assert len(whole) == 4

    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000004")
    capsys.readouterr()
    assert chat_stage1.main(["--config", str(kept), "--resume", "optim.lr=1e-4"]) == 2
    error = capsys.readouterr().err
    assert "began with optim.lr 0.01, not 0.0001: go on" in error
    assert len(error.splitlines()) == 1
    assert kept.read_text() == printed  # what is refused leaves no trace
    assert chat_stage1.main(["--config", str(kept), "loop.log_every=3"]) == 2
    assert kept.read_text() == printed
    assert chat_stage1.main(["--config", str(kept), "--resume", "loop.log_every=3"]) == 0
    assert yaml.safe_load(kept.read_text())["loop"]["log_every"] == 3
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == whole


def test_the_views_of_fine_tuning_are_measured_on_too(tmp_path: Path) -> None:
    kind = recipe_of("finetune")
    values = {
        "data": [{"csv": "train.csv"}],
        "held_out": [{"csv": "test.csv"}],
        "optim": VALUES["optim"],
        "loop": {"out": str(tmp_path), "evaluate_every": 5},
    }
    keep_recipe(build(kind, values, "test"))
    (tmp_path / "checkpoints" / "step_00000004").mkdir(parents=True)
    other = {**values, "test": {"frames": 4}}
    with pytest.raises(CheckpointError, match=r"test\.frames 12, not 4: "):
        check_resumed(build(kind, other, "test"))
    check_resumed(build(kind, {**other, "loop": {"out": str(tmp_path)}}, "test"))
