"""Recipes: what is accepted, and one clear sentence for what is not."""

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import nn

from encoder.errors import ConfigError
from tests import ROOT
from training.chat_stage1 import Stage1Recipe
from training.clip import ClipRecipe
from training.clip import main as clip_main
from training.cost import RECIPES as STAGE_RECIPES
from training.data.datasets import NEEDS
from training.data.synthetic_source import WorldSource
from training.trainer.optim import learning_rate, parameter_groups
from training.trainer.recipe import (
    RENAMED_STAGES,
    STAGES,
    OptimConfig,
    build,
    maker_of,
    read_recipe,
    read_values,
    to_yaml,
)

RECIPES = ROOT / "training" / "recipes"
SHIPPED = sorted(path for path in RECIPES.rglob("*.yaml") if path.parent.name != "accelerate")
# All settings of each shipped recipe as they were when every recipe was written out in full.
RESOLVED = json.loads((Path(__file__).parent / "recipes.json").read_text())


def kind_of(path: Path) -> Any:
    """The dataclass of a recipe's stage."""
    stage = read_values(path)["stage"]
    module = importlib.import_module(f"training.{stage}")
    found = [kind for kind in vars(module).values() if getattr(kind, "stage", None) == stage]
    return next(
        kind for kind in found if dataclasses.is_dataclass(kind) and kind.__module__ == module.__name__
    )


def holds(found: Any, expected: Any) -> bool:
    """Whether all expected settings are there; new ones may have come."""
    if isinstance(expected, dict):
        return all(name in found and holds(found[name], value) for name, value in expected.items())
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(holds, found, expected))
    return type(found) is type(expected) and found == expected


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: str(p.relative_to(RECIPES)))
def test_every_recipe_says_what_it_is_and_what_it_was(path: Path, tmp_path: Path) -> None:
    kind = kind_of(path)
    recipe = read_recipe(kind, path)
    first = path.read_text().splitlines()[0]
    assert f"-m training.{kind.stage} --config {path.relative_to(RECIPES.parents[1])}" in first
    expected = RESOLVED[str(path.relative_to(RECIPES))]
    assert holds(json.loads(json.dumps({"stage": kind.stage, **dataclasses.asdict(recipe)})), expected)
    # What --print shows is a recipe that reads back as the same.
    (tmp_path / "printed.yaml").write_text(to_yaml(recipe))
    assert read_recipe(kind, tmp_path / "printed.yaml") == recipe


def test_all_rooms_know_the_same_stages() -> None:
    assert set(STAGES) == set(NEEDS) == set(STAGE_RECIPES)
    for stage, (_, kind) in STAGE_RECIPES.items():
        assert kind.stage == stage


def test_a_recipe_holds_only_what_differs() -> None:
    assert set(RESOLVED) == {str(path.relative_to(RECIPES)) for path in SHIPPED}
    lines = [line for path in RECIPES.glob("finetune_*.yaml") for line in path.read_text().splitlines()]
    assert len(lines) < 220


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A recipe in one folder, based on one in another."""
    (tmp_path / "below").mkdir()
    (tmp_path / "base.yaml").write_text(
        "{stage: clip, num_tokens: [1, 2], world: {count: 5, seed: 3}, loop: {out: a}, "
        "optim: {lr: 1, batch_size: 8, micro_batch: 4}}"
    )
    (tmp_path / "below" / "mine.yaml").write_text("{base: ../base.yaml, num_tokens: [3], world: {seed: 4}}")
    return tmp_path


def test_tables_are_merged_and_lists_replaced(folder: Path) -> None:
    recipe = read_recipe(ClipRecipe, folder / "below" / "mine.yaml", ["world.count=6"])
    assert recipe.num_tokens == (3,)
    assert recipe.world == WorldSource(count=6, seed=4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("base: other.yaml", "the base of .*mine.yaml: No such file"),
        ("base: mine.yaml", "is its own base"),
        ("base: 7", "base must name a recipe, not 7"),
        ("{base: ../base.yaml, stage: clips}", "stage must be one of .*not 'clips' .nearest is 'clip'"),
        ("{base: ../base.yaml, stage: umt}", "of the stage umt: run it with python -m training.umt"),
        ("{base: ../base.yaml, stage: }", "stage must be one of"),
        ("{base: ../base.yaml, num_tokens: [1], num_tokens: [2]}", "'num_tokens' stands twice"),
        ("{base: ../base.yaml, num_tokens: &all [*all]}", "is no setting: Circular reference"),
        ("{base: ../base.yaml, num_tokens: " + "[" * 5000, "not valid YAML"),
        ("{base: ../base.yaml, ? [1, 2] : 3}", "not valid YAML|no setting|unknown setting"),
    ],
)
def test_wrong_bases_and_stages(folder: Path, content: str, message: str) -> None:
    path = folder / "below" / "mine.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_recipe(ClipRecipe, path)
    assert "\n" not in str(caught.value)


def test_bases_may_not_go_in_a_circle(folder: Path) -> None:
    (folder / "base.yaml").write_text("base: below/mine.yaml")
    with pytest.raises(ConfigError, match=r"own base, by way of .*mine\.yaml and .*base\.yaml"):
        read_values(folder / "below" / "mine.yaml")


def test_print_shows_the_whole_recipe_and_trains_nothing(folder: Path, capsys) -> None:
    assert clip_main(["--config", str(folder / "below" / "mine.yaml"), "--print", "optim.lr=2"]) == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["optim"]["lr"] == 2
    (folder / "printed.yaml").write_text(printed)
    again = read_recipe(ClipRecipe, folder / "printed.yaml")
    assert again == read_recipe(ClipRecipe, folder / "below" / "mine.yaml", ["optim.lr=2"])
    assert not (folder / "a").exists()


@pytest.mark.parametrize("stage", sorted(RENAMED_STAGES))
def test_a_stage_of_another_name_is_one_sentence(stage: str, folder: Path) -> None:
    (folder / "old.yaml").write_text(f"{{base: base.yaml, stage: {stage}}}")
    with pytest.raises(
        ConfigError, match=f"old.yaml: the stage {stage} is now called projector_warmup"
    ) as caught:
        read_recipe(ClipRecipe, folder / "old.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("recipe", "override", "sentence"),
    [
        ("cpu/umt.yaml", "counts=[3]", "the setting 'counts' is now named num_tokens."),
        ("cpu/finetune.yaml", "counts=[3]", "the setting 'counts' is now named num_tokens."),
        ("cpu/finetune.yaml", "test.counts=[3]", "test: the setting 'counts' is now named num_tokens."),
        ("cpu/clip.yaml", "keeps=[3]", "the setting 'keeps' is now named num_tokens."),
        ("cpu/chat_lora.yaml", "keeps=[3]", "the setting 'keeps' is now named num_tokens."),
        (
            "cpu/chat_stage1.yaml",
            "inputs=[{frames: 1, resolution: 14, keep: 1}]",
            "inputs[0]: the setting 'keep' is now named num_tokens.",
        ),
        (
            "cpu/chat_stage1.yaml",
            "datasets.0.favour=[localisation]",
            "datasets[0]: the setting 'favour' is now named task_weights (a table: {task: 1 + times named}).",
        ),
    ],
)
def test_a_setting_of_another_name_is_one_sentence(recipe: str, override: str, sentence: str) -> None:
    path = RECIPES / recipe
    with pytest.raises(ConfigError) as caught:
        read_recipe(kind_of(path), path, [override])
    assert str(caught.value).endswith(sentence)
    assert "\n" not in str(caught.value)


def test_the_table_that_is_wrong_is_named() -> None:
    values = {
        "videos": [{"csv": "a"}, {"csv": "a", "jsonl": "b"}],
        **read_values(RECIPES / "cpu" / "clip.yaml"),
    }
    values.pop("world")
    with pytest.raises(ConfigError, match=r"^r: videos\[1\]: A dataset needs exactly one of"):
        build(ClipRecipe, values, "r")


def test_the_papers_stage_one() -> None:
    recipe = read_recipe(Stage1Recipe, RECIPES / "chat_stage1.yaml")
    optim = recipe.optim
    assert (optim.lr, optim.batch_size, optim.epochs, optim.warmup_ratio) == (1e-3, 512, 1, 0.03)
    assert (optim.weight_decay, optim.clip_grad, optim.betas) == (0, 1.0, (0.9, 0.999))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.rate=1", "optim has the unknown setting 'rate': known are lr"),
        ("optim.lr=fast", "optim: lr must be float, not 'fast'"),
        ("optim.lr=-1", "lr must be positive"),
        ("optim.batch_size=10", "multiple of micro_batch"),
        ("optim.warmup_ratio=1.5", "warmup_ratio"),
        ("loop.precision=fp8", "precision must be one of fp32, bf16, fp16, not 'fp8'"),
        ("num_tokens=[]", "at least one token count"),
        ("num_tokens=7", "num_tokens must be a list"),
        ("world=3", "must be a table"),
        ("world.split=dev", "split must be one of"),
        ("siblings=5", "multiple of siblings"),
        ("siblngs=2", "unknown setting 'siblngs' (nearest is 'siblings')"),
        ("optim.lr=true", "optim: lr must be float, not True"),
        ("optim.micro_batch=8.0", "optim: micro_batch must be int, not 8.0"),
        ("optim.lr=.nan", "optim: lr is nan"),
        ("optim.betas=[0.9, 1.0]", "betas must lie from 0 to below 1"),
        ("optim.betas=[0.9, x]", "optim: betas[1] must be float, not 'x'"),
        ("loop.checkpoint_every=0", "loop.checkpoint_every must be at least 1"),
        ("loop.max_steps=0", "loop.max_steps must be at least 1, not 0"),
        ("loop.trackers=[wandb, x]", "loop: trackers[1] must be one of trackio, wandb, not 'x'"),
        ("num_tokens=[1", "is not valid YAML"),
        ("optim.betas=[0.9]", "must hold 2 values"),
        ("nonsense", "key=value"),
        ("temperature.x=1", "is not a table"),
        ("num_tokens.9=1", "the list 'num_tokens' has 6 entries"),
        ("loop.out=' '", "loop.out must name the folder"),
        ("loop.seed=99999999999999999999", "loop.seed must lie from 0 to 4294967295"),
        ("loop.seed=-1", "loop.seed must lie from 0"),
        ("loop.stop_after_s=-1", "loop.stop_after_s must not be negative, not -1"),
        ("optim.min_lr=1", "optim.min_lr must not exceed optim.lr 0.001"),
        ("optim.warmup_lr=1", "optim.warmup_lr must not exceed"),
        ("attribute_weight=-0.5", "attribute_weight must not be negative, not -0.5"),
        ("pools=[0, 1, 1, 1, 1, -1]", "pools[5] must not be negative"),
        ("text_length=0", "text_length must be at least 1, not 0"),
        ("evaluate_clips=0", "evaluate_clips must be at least 1"),
    ],
)
def test_wrong_settings(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_recipe(ClipRecipe, RECIPES / "cpu" / "clip.yaml", [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("recipe", "override", "message"),
    [
        ("finetune", "repeats=0", "repeats must be at least 1, not 0"),
        ("finetune", "threads=0", "threads must be at least 1, not 0"),
        ("finetune", "drop_path=1", "drop_path must lie from 0 to below 1, not 1"),
        ("finetune", "max_missing=2", "max_missing must lie from 0 to 1, not 2"),
        ("finetune", "drop_path=-0.5", "drop_path must lie from 0"),
        ("umt", "held_out_batches=0", "held_out_batches must be at least 1"),
        ("umt", "count_weights=[1, 1, -1]", "count_weights[2] must not be negative"),
        ("chat_stage1", "frames=0", "frames must be at least 1, not 0"),
        ("chat_stage1", "num_tokens=[8, 0]", "num_tokens must be at least 1, not [8, 0]"),
        ("chat_stage1", "model.default_tokens=0", "model: default_tokens must be at least 1"),
        (
            "chat_stage1",
            "model.projector.summary_tokens=-1",
            "model.projector.summary_tokens must not be neg",
        ),
        ("projector_warmup", "negatives=-1", "negatives must not be negative"),
    ],
)
def test_numbers_out_of_range(recipe: str, override: str, message: str) -> None:
    path = RECIPES / "cpu" / f"{recipe}.yaml"
    with pytest.raises(ConfigError) as caught:
        read_recipe(kind_of(path), path, [override])
    assert message in str(caught.value)


def test_what_counts_from_the_end_may_be_negative() -> None:
    path = RECIPES / "cpu" / "chat_stage1.yaml"
    assert read_recipe(Stage1Recipe, path, ["model.vision_depth=-1"]).model.vision_depth == -1


def test_an_entry_of_a_list_is_set_by_its_number() -> None:
    recipe = read_recipe(ClipRecipe, RECIPES / "cpu" / "clip.yaml", ["num_tokens.1=48"])
    assert recipe.num_tokens == (32, 48, 64, 64, 128, 128)


def test_paths_may_begin_at_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    (folder / "home.yaml").write_text("{base: base.yaml, loop: {out: ~/runs}, align_init: ~/a~/b}")
    recipe = read_recipe(ClipRecipe, folder / "home.yaml", ["text_tower=~/tower"])
    paths = (recipe.loop.out, recipe.align_init, recipe.text_tower)
    assert paths == ("/home/me/runs", "/home/me/a~/b", "/home/me/tower")


def test_settings_stand_on_either_side_of_options(capsys: pytest.CaptureFixture[str]) -> None:
    main = importlib.import_module("training.umt").main
    assert main(["--config", str(RECIPES / "cpu/umt.yaml"), "optim.lr=0.5", "--print", "loop.out=there"]) == 0
    shown = capsys.readouterr().out
    assert "lr: 0.5" in shown
    assert "out: there" in shown


@pytest.mark.parametrize("content", [None, "[1, 2]", "a: [", "", "optim: {lr: 1e-3}"])
def test_wrong_files(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "r.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        read_recipe(ClipRecipe, path)
    assert str(path) in str(caught.value)


def test_scientific_notation_is_a_number(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("{lr: 1e-3, batch_size: 8, micro_batch: 4}")
    assert read_recipe(OptimConfig, path).lr == 1e-3


def test_cosine_with_warm_up() -> None:
    config = OptimConfig(lr=1.0, batch_size=1, micro_batch=1, warmup_ratio=0.1, min_lr=0.01)
    rates = [learning_rate(step, 100, config) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.505)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.01, abs=1e-3)


def test_what_is_never_decayed() -> None:
    from encoder.fluxvit import FluxViT
    from tests.encoder.test_fluxvit import TINY

    model = FluxViT(TINY)
    model.blocks[0].requires_grad_(False)
    decayed, plain = parameter_groups(model, 0.05)
    names = {id(p): n for n, p in model.named_parameters()}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    assert {"pos_embed", "cls_token", "fc_norm.weight"} <= {names[id(p)] for p in plain["params"]}
    # Five-dimensional, so decayed, as in the released training code.
    assert "gpe_proj.depthwise_conv.weight" in {names[id(p)] for p in decayed["params"]}
    assert not any(names[id(p)].startswith("blocks.0.") for p in decayed["params"] + plain["params"])
    assert parameter_groups(nn.Linear(2, 2, bias=False), 0.1)[0]["weight_decay"] == 0.1


def test_who_made_a_result_is_found_among_files_that_are_no_recipes(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: nowhere.yaml\n")
    (tmp_path / "b.yaml").write_text("stage: umt\nloop: {out: runs/umt}\n")
    assert maker_of("runs/umt/last", tmp_path / "mine.yaml") == tmp_path / "b.yaml"
    assert maker_of("runs/other/last", tmp_path / "mine.yaml") is None
