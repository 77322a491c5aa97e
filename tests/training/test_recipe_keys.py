"""Every key of every stage's recipe, set to another value, has an effect or is refused in one sentence."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from encoder import compiling
from encoder.config import MICRO
from encoder.errors import FluxChatError
from encoder.fluxvit import FluxViT
from tests.host_copies import HostReads
from tests.llm_bridge.text_encoders import tiny_towers
from tests.no_float64 import NoFloat64
from tests.training import recipe_traces as traces
from tests.training.data import clip_corpus
from tests.training.data.test_shards import write_tar
from tests.training.distill.test_image_teachers import write_encoder
from tests.training.distill.tiny_teachers import NARROW, write_stage2
from tests.training.recipe_traces import STAGES, Values, changed, digest, keys_of
from training.chat_stage1 import Stage1, Stage1Recipe
from training.clip import ClipRecipe, ClipStage
from training.data.datasets import NEEDS
from training.trainer.optim import parameter_groups
from training.trainer.recipe import build, read_recipe, read_values
from training.trainer.run_log import Figures

SHAPE = {"embed_dim": 32, "depth": 4, "num_heads": 2, "pool_heads": 2, "clip_embed_dim": 16}


@dataclass(frozen=True)
class Case:
    """A key's other value, what the recipe is beside it, and by what the effect is seen."""

    value: Any
    beside: Mapping[str, Any] = field(default_factory=dict)
    seen: str = "stage"


class World:
    """Where the recipes of these tests find their files."""

    def __init__(self, folder: Path, recipe: Path, records: Path, corpus: Path, llm: Path) -> None:
        self.folder, self.recipe, self.corpus, self.llm = folder, recipe, corpus, llm
        self.media = records.parent
        rows = [
            {**row, "caption": f"Bars, {row['id']}.", "label": number % 2}
            for number, row in enumerate(json.loads(records.read_text())[:13])
        ]
        self.records = self._json("records.json", rows)
        self.others = self._json("others.json", rows[:6][::-1])
        words = [f"number{n}" for n in range(12)]
        self.turns = self._json(
            "turns.json",
            [{**rows[n], "conversations": _talk(words[n], words[-1 - n])} for n in range(len(words))],
        )
        labelled = [{"video": f"{n}.mp4", "label": n % 2, "caption": f"Bars to {n}."} for n in range(8)]
        self.labelled = self._json("labelled.json", labelled)
        self.csv = folder / "train.csv"
        self.csv.write_text("".join(f"{n}.mp4 {n % 2}\n" for n in range(8)))
        clip = (self.media / "0.mp4").read_bytes()
        for part in range(2):
            samples = [(f"{part}{n}", n) for n in range(4)]
            write_tar(
                folder / f"part-{part}.tar",
                [
                    file
                    for name, n in samples
                    for file in (
                        (f"{name}.cls", str(n % 2).encode()),
                        (f"{name}.mp4", clip),
                        (f"{name}.txt", f"Bars to {name}.".encode()),
                    )
                ],
            )
        self.classes, self.renamed = folder / "classes.txt", folder / "renamed.txt"
        self.classes.write_text("one\ntwo\n")
        self.renamed.write_text("three\nfour\n")
        self.mixture = folder / "mixture.yaml"
        rest = {"json_path": str(self.others), "data_root": str(self.media)}
        self.mixture.write_text(json.dumps({"datasets": [rest]}))
        torch.manual_seed(0)
        self.teacher, self.teacher_2 = folder / "teacher.pt", folder / "teacher_2.pt"
        model = write_stage2(self.teacher)
        for parameter in model.parameters():
            parameter.data.mul_(1.1)
        torch.save(
            {"module": {f"vision_encoder.{n}": v for n, v in model.state_dict().items()}}, self.teacher_2
        )
        for kind in ("clip", "siglip"):
            write_encoder(kind, folder / kind)
        self.encoder = folder / "weights"
        FluxViT(MICRO.replace(**SHAPE, num_classes=2)).save_pretrained(self.encoder)
        self.tower = folder / "tower"
        tower = tiny_towers.sentence_folder(self.tower)
        tower.embeddings.word_embeddings.weight.data.mul_(1.5)
        tower.save_pretrained(self.tower)
        self.lite, self.lite_2 = (self._lite(f"lite_{n}.pth", n) for n in range(2))
        ClipStage(build(ClipRecipe, changed(self.values("clip"), {"loop.seed": 5}), "test")).finish(folder)
        self.alignment = folder / "alignment.safetensors"
        self.start = self._start("start", {})
        self.start_2 = self._start("start_2", {"loop.seed": 5})

    def _json(self, name: str, rows: list[Any]) -> Path:
        (self.folder / name).write_text(json.dumps(rows))
        return self.folder / name

    def _lite(self, name: str, seed: int) -> Path:
        from efficientnet_lite_pytorch import EfficientNet

        torch.manual_seed(seed)
        torch.save(EfficientNet.from_name("efficientnet-lite0").state_dict(), self.folder / name)
        return self.folder / name

    def _start(self, name: str, changes: Mapping[str, Any]) -> Path:
        """A model folder, as stage 1 leaves it."""
        overrides = [f"{key}={value}" for key, value in changes.items()]
        stage = Stage1(read_recipe(Stage1Recipe, self.recipe, [f"loop.out={self.folder}/unused", *overrides]))
        stage.vlm.save_pretrained(self.folder / name)
        return self.folder / name

    def values(self, stage: str) -> Values:
        """The recipe from which each case departs."""
        make: Callable[[], Values] = getattr(self, f"_{stage}")
        return make()

    def _videos(self, name: str) -> Values:
        source = {"json_path": str(self.labelled), "data_root": str(self.media), "classes": str(self.classes)}
        return {
            "encoder": {"size": "micro", "settings": dict(SHAPE)},
            "data": [source],
            "grid": {"frames": [2, 8, 2], "resolutions": [42, 84, 14], "tokens": [36, 80]},
            "num_tokens": [36, 24, 12],
            "optim": {"lr": 3e-3, "batch_size": 4, "micro_batch": 2, "epochs": 2},
            "loop": {"out": name, "precision": "fp32"},
        }

    def _umt(self) -> Values:
        values = self._videos("umt")
        del values["data"][0]["classes"]
        teacher = {"weights": str(self.teacher), "count": 2, "settings": NARROW, "precision": "fp32"}
        return {**values, "teacher": {"internvideo2": teacher}, "teacher_tokens": 36}

    def _finetune(self) -> Values:
        test = {"frames": 4, "resolution": 56, "clips": 1, "crops": 1, "num_tokens": [24], "examples": 3}
        return {**self._videos("finetune"), "test": test}

    def _clip(self) -> Values:
        values = clip_corpus.values(self.corpus, Path("clip"))
        return {**values, "augment": {}, "loop": {"out": "clip", "precision": "fp32"}}

    def _chat_stage1(self) -> Values:
        values = read_values(self.recipe)
        values["datasets"] = [{"json_path": str(self.records), "data_root": str(self.media)}]
        return {**values, "loop": {"out": "chat", "precision": "fp32"}}

    def _projector_warmup(self) -> Values:
        return {**self._chat_stage1(), "negatives": 16}

    def _chat_lora(self) -> Values:
        values = {**self._chat_stage1(), "start": str(self.start), "lora": {"rank": 4, "alpha": 8}}
        del values["model"]
        return values


def _talk(first: str, second: str) -> list[dict[str, str]]:
    said = (("human", "<image>\nWhat?"), ("gpt", first), ("human", "And?"), ("gpt", second))
    return [{"from": who, "value": text} for who, text in said]


@pytest.fixture(scope="module")
def world(
    stage1_recipe: Path,
    llava_json: Path,
    corpus: Path,
    llm_folder: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> World:
    return World(tmp_path_factory.mktemp("keys"), stage1_recipe, llava_json, corpus, llm_folder("llama"))


# -- the table ----------------------------------------------------------------------------------------------


def dataset_cases(world: World, stage: str, place: str) -> Iterator[tuple[str, Case]]:
    """Of a dataset's own settings, wherever one stands."""
    key = f"{place}.0"
    see = partial(Case, seen="examples")
    chat = NEEDS[stage] == "answer"
    first: dict[str, Any] = {}
    if place == "held_out":
        first = {place: [{"json_path": str(world.labelled)}], "loop.evaluate_every": 1}
        first |= {"evaluate_records": 4} if chat else {}
    files = {**first, f"{key}.json_path": str(world.labelled), f"{key}.jsonl": None, f"{key}.classes": None}
    none = first | dict.fromkeys((f"{key}.json_path", f"{key}.jsonl", f"{key}.data_root", f"{key}.classes"))
    demo = {**none, f"{key}.world": {"count": 6}}
    for name, value, beside in (
        ("turns", 3, {}),
        ("captions", 1.0, {}),
        ("choices", 1.0, {"captions": 0.0}),
        ("choose_by", "words", {"choices": 1.0, "captions": 0.0}),
        ("rounds", 3, {"turns": 9}),
        ("task_weights", {"localisation": 50.0}, {"turns": 3}),
    ):
        yield name, see(value, demo | ({f"{key}.{n}": v for n, v in beside.items()} if chat else {}))
    yield "world_label", see("motion", demo)
    yield "independent", see(True, {**files, f"{key}.json_path": str(world.turns)})
    bare = {name: value for name, value in none.items() if not name.endswith(("data_root", "classes"))}
    for name, path in (("csv", world.csv), ("json_path", world.others), ("jsonl", world.others)):
        yield name, see(str(path), bare)
    yield "yaml_path", see(str(world.mixture), none)
    shards = {**none, f"{key}.shards": str(world.folder / "part-{0..1}.tar")}
    yield "shards", see(shards[f"{key}.shards"], none)
    for name, value in (
        ("split", "test"),
        ("count", 5),
        ("seed", 1),
        ("first", 3),
        ("preset", "solo"),
        ("nouns", 8),
        ("plots", ["cut"]),
    ):
        yield f"world.{name}", see(value, demo)
    yield "data_root", see("elsewhere", files)
    yield "classes", see(str(world.renamed), {**files, f"{key}.classes": str(world.classes)})
    yield "sampling_strategy", see("first:3", files)
    yield "index_root", see(str(world.folder / "index" / place), shards)
    yield "order", see("shards", shards)
    yield "corpus", see("kmash", files)
    yield "flip", see(0.5, files)
    yield "no_flip", see([".mp4"], files)


def loop_cases(stage: str) -> Iterator[tuple[str, Case]]:
    """Of `optim` and `loop`, seen in a short run."""
    run = partial(Case, seen="run")
    for name, value in (
        ("lr", 1e-4),
        ("batch_size", 2),
        ("micro_batch", 1 if stage.startswith(("chat", "proj")) else 4),
        ("epochs", 0.5),
        ("betas", [0.5, 0.6]),
        ("eps", 0.1),
        ("weight_decay", 0.5),
        ("warmup_ratio", 0.9),
        ("min_lr", 2e-3),
        ("clip_grad", 1e-3),
        ("layer_decay", 0.5),
        ("scale_lr", True),
    ):
        yield f"optim.{name}", run(value)
    yield "optim.warmup_lr", run(1e-5, {"optim.warmup_ratio": 0.9})
    for name, value in (
        ("out", "elsewhere"),
        ("seed", 3),
        ("precision", "bf16"),
        ("checkpoint_every", 1),
        ("keep_checkpoints", 1),
        ("log_every", 1),
        ("max_steps", 1),
        ("stop_after_s", 0.0),
        ("trackers", ["wandb"]),
        ("compile", True),
    ):
        yield f"loop.{name}", run(value, {"loop.checkpoint_every": 1} if name == "keep_checkpoints" else {})
    yield "loop.modules", run([{"umt": "encoder.blocks.1"}.get(stage, "nothing")])


def encoder_cases(world: World) -> Iterator[tuple[str, Case]]:
    plain = {"encoder.settings": None, "encoder.size": None}
    narrow = {name: value for name, value in SHAPE.items() if name != "clip_embed_dim"}
    yield "encoder.size", Case("small", {"encoder.settings": narrow})
    yield "encoder.init", Case(str(world.encoder), {**plain, "optim.micro_batch": 1})
    yield "encoder.settings", Case({**SHAPE, "gpe": False})


def video_cases(stage: str) -> Iterator[tuple[str, Case]]:
    """Of the grid, augmentation and reading of clips."""
    yield "grid.frames", Case([4, 6, 2])
    yield "grid.resolutions", Case([56, 70, 14])
    yield "grid.tokens", Case([36, 64] if stage == "clip" else [36, 40])
    yield "grid.patch_size", Case(7)
    many, resized = {"augment.crop": "multiscale"}, {"augment.crop": "resized"}
    yield "augment.crop", Case("center")
    yield "augment.scales", Case([0.5], many)
    yield "augment.max_distort", Case(0, many)
    yield "augment.area", Case([0.1, 0.2], resized)
    yield "augment.ratio", Case([0.2, 0.3], resized)
    yield "augment.flip", Case(1.0)
    yield "augment.rand_augment", Case([9, 0.5])
    yield "augment.rand_operations", Case(5, {"augment.rand_augment": [9, 0.5]})
    yield "augment.erase", Case(1.0)
    yield "max_missing", Case(0.5)
    yield "threads", Case(1)


def umt_cases(world: World) -> Iterator[tuple[str, Case]]:
    yield from encoder_cases(world)
    yield from video_cases("umt")
    own, other, lite = (f"teacher.{kind}" for kind in ("internvideo2", "image_encoder", "efficientnet"))
    for name, value in (
        ("weights", str(world.teacher_2)),
        ("count", 1),
        ("interval", 1.0),
        ("layers", [0, 1]),
        ("settings", {**NARROW, "pool_heads": 2}),
        ("compat_train_mode", True),
        ("precision", "bf16"),
    ):
        yield f"{own}.{name}", Case(value)
    images = {own: None, other: {"model": str(world.folder / "clip"), "count": 2}}
    for name, value in (
        ("model", str(world.folder / "siglip")),
        ("count", 1),
        ("interval", 2.0),
        ("layers", [0, 1]),
        ("mean", [0.1, 0.1, 0.1]),
        ("std", [0.9, 0.9, 0.9]),
        ("resolution", 32),
        ("precision", "bf16"),
        ("frames_at_once", 2),
    ):
        beside = {"mean": {f"{other}.std": [0.5] * 3}, "std": {f"{other}.mean": [0.5] * 3}}.get(name, {})
        yield f"{other}.{name}", Case(value, {**images, **beside})
    light = {own: None, lite: {"weights": str(world.lite)}}
    for name, value in (
        ("size", "lite1"),
        ("weights", str(world.lite_2)),
        ("resolution", 64),
        ("precision", "bf16"),
        ("frames_at_once", 2),
    ):
        yield f"{lite}.{name}", Case(value, light)
    yield "teacher.cache", Case(str(world.folder / "targets"), seen="folder")
    for name, value in (
        ("kind", "linear"),
        ("layers", "per_count"),
        ("final", "shared"),
        ("positions", False),
    ):
        yield f"decoders.{name}", Case(value)
    all_counts = {"num_tokens": [36]}
    yield "teacher_tokens", Case(48)
    yield "num_tokens", Case([30, 20, 10])
    yield "mask_ratio", Case(0.5, {"num_tokens": None, "teacher_tokens": 4000})
    yield "pools", Case([2, 1, 0])
    yield "selection", Case("teacher", {"teacher_tokens": 24, "num_tokens": [24, 12, 6]})
    yield "student_choice", Case("top")
    yield "nested", Case(False)
    yield "student_layers", Case([0, 1], all_counts)
    yield "middle_weight", Case(2.0)
    yield "final_weight", Case(2.0)
    yield "count_weights", Case([1.0, 0.5, 0.5])
    yield "count_alignment", Case(1.0)
    yield "compat_truncation", Case(True, {"teacher_tokens": 23, "num_tokens": [23, 12]})
    for name in ("gradient_checkpointing", "recompute_cheap", "passes_in_turn"):
        yield name, Case(True)
    held_out = {"held_out": [{"json_path": str(world.labelled), "data_root": str(world.media)}]}
    yield "held_out_batches", Case(1, {**held_out, "loop.evaluate_every": 1})
    yield "loop.evaluate_every", Case(2, {**held_out, "loop.evaluate_every": 1}, "run")


def finetune_cases(world: World) -> Iterator[tuple[str, Case]]:
    yield from encoder_cases(world)
    yield from video_cases("finetune")
    held_out = {"held_out": world.values("finetune")["data"]}
    for name, value in (
        ("frames", 2),
        ("resolution", 70),
        ("clips", 2),
        ("crops", 3),
        ("num_tokens", [12]),
        ("examples", 2),
    ):
        yield f"test.{name}", Case(value, held_out)
    yield "num_tokens", Case([30, 20, 10])
    yield "pools", Case([2, 1, 0])
    yield "align_weight", Case(0.0)
    yield "label_smoothing", Case(0.2)
    yield "drop_path", Case(0.5)
    weights = {"encoder.init": str(world.encoder), "encoder.settings": None, "encoder.size": None}
    yield "heads", Case("same", weights)
    yield "num_classes", Case(3)
    yield "repeats", Case(2)
    yield "gradient_checkpointing", Case(True)
    yield "evaluate_examples", Case(1, {**held_out, "loop.evaluate_every": 1})
    yield "loop.evaluate_every", Case(2, {**held_out, "loop.evaluate_every": 1}, "run")


def clip_cases(world: World) -> Iterator[tuple[str, Case]]:
    yield from encoder_cases(world)
    yield from video_cases("clip")
    demo = {"images": None, "videos": None, "augment": None, "world": {"count": 8}}
    for name, value in (
        ("split", "test"),
        ("count", 4),
        ("seed", 1),
        ("first", 3),
        ("preset", "solo"),
        ("nouns", 8),
        ("plots", ["cut"]),
    ):
        yield f"world.{name}", Case(value, demo)
    held_out = {"held_out": world.values("clip")["videos"], "loop.evaluate_every": 1}
    yield "frames", Case(4, held_out)
    yield "resolution", Case(56, held_out)
    yield "image_positions", Case("interpolate")
    yield "num_tokens", Case([8])
    yield "siblings", Case(2, demo)
    yield "train", Case("projector")
    yield "train_text", Case(True)
    yield "gradient_checkpointing", Case(True)
    yield "align_norm", Case(False)
    yield "align_init", Case(str(world.alignment))
    yield "text_tower", Case(str(world.tower))
    yield "text_tokenizer", Case("x")
    yield "text_length", Case(3)
    yield "text_cache", Case(0)
    yield "temperature", Case(0.05, {"align_init": str(world.alignment)})
    # From a head whose temperature is 0.01.
    start = {"align_init": str(world.alignment), "temperature": None, "temperature_min": 0.5}
    yield "temperature_min", Case(1e-3, start)
    yield "positives", Case("text")
    yield "attribute_weight", Case(0.5, demo)
    yield "patch_weight", Case(0.5, demo)
    yield "patch_background", Case(0.1, {**demo, "patch_weight": 0.5})
    yield "pool", Case(0)
    yield "pools", Case([0, 2])
    yield "evaluate_clips", Case(2, held_out)
    yield "loop.evaluate_every", Case(2, held_out, "run")


def chat_cases(world: World, stage: str) -> Iterator[tuple[str, Case]]:
    yield "frames", Case(2)
    yield "resolution", Case(84)
    yield "num_tokens", Case([4])
    views = {**dict.fromkeys(("frames", "resolution", "num_tokens"))}
    views["inputs"] = [{"frames": 4, "resolution": 56, "num_tokens": 8}]
    for name, value in (("frames", 2), ("resolution", 84), ("num_tokens", 4)):
        yield f"inputs.0.{name}", Case(value, views)
    talks = {"datasets": [{"json_path": str(world.turns), "data_root": str(world.media)}]}
    yield "template", Case("plain", talks)  # of which one reads the first answer, the other all
    yield "max_length", Case(24)
    yield "bucket", Case(2, {"optim.batch_size": 8})
    yield "weighting", Case("square")
    yield "max_missing", Case(0.5)
    yield "feature_cache", Case(str(world.folder / f"features_{stage}"), seen="folder")
    held_out = [{"json_path": str(world.others), "data_root": str(world.media)}]
    evaluated: dict[str, Any] = {"held_out": held_out, "evaluate_records": 4, "loop.evaluate_every": 1}
    if stage == "projector_warmup":  # which evaluates nothing
        evaluated = {}
    yield "evaluate_records", Case(2, evaluated)
    yield "loop.evaluate_every", Case(2, evaluated, "run")


def model_cases(world: World) -> Iterator[tuple[str, Case]]:
    yield "model.encoder", Case(str(world.encoder))
    yield "model.llm", Case(str(world.llm))
    merge = {"model.projector": {"kind": "merge"}}
    for name, value in (
        ("kind", "merge"),
        ("layers", 1),
        ("norm", False),
        ("tokens_per_frame", 2),
        ("summary_tokens", 2),
        ("time_periods", 4),
    ):
        yield f"model.projector.{name}", Case(value, merge if name == "tokens_per_frame" else {})
    yield "model.vision_depth", Case(1)
    yield "model.time_sentence", Case("long")
    yield "model.gradient_checkpointing", Case(True)
    yield "model.default_tokens", Case(8)
    yield "model.projector_init", Case(str(world.start_2))


def warmup_cases(world: World) -> Iterator[tuple[str, Case]]:
    yield from chat_cases(world, "projector_warmup")
    yield from model_cases(world)
    yield "words", Case("scene", {"datasets": [{"world": {"count": 8}}], "frames": 4, "template": "plain"})
    yield "negatives", Case(8)
    yield "temperature", Case(0.5)
    yield "pull", Case(3.0)


def lora_cases(world: World) -> Iterator[tuple[str, Case]]:
    yield from chat_cases(world, "chat_lora")
    yield "start", Case(str(world.start_2))
    for name, value in (("rank", 2), ("alpha", 4.0), ("dropout", 0.3), ("targets", ["q_proj"])):
        yield f"lora.{name}", Case(value)
    yield "quantize", Case("4bit")
    yield "train_projector", Case(False)
    demo = {"datasets": [{"world": {"count": 8}}], "frames": 4}
    yield "scene_words", Case(0.5, demo)
    yield "gradient_checkpointing", Case(True)


def stage1_cases(world: World) -> Iterator[tuple[str, Case]]:
    yield from chat_cases(world, "chat_stage1")
    yield from model_cases(world)


OWN: Mapping[str, Callable[[World], Iterator[tuple[str, Case]]]] = {
    "umt": umt_cases,
    "finetune": finetune_cases,
    "clip": clip_cases,
    "projector_warmup": warmup_cases,
    "chat_stage1": stage1_cases,
    "chat_lora": lora_cases,
}


def cases(stage: str, world: World) -> dict[str, Case]:
    """All of a stage, by key."""
    places = [
        key.removesuffix(".0.json_path")
        for key, _ in keys_of(STAGES[stage][0])
        if key.endswith(".0.json_path")
    ]
    of_data = {
        f"{place}.0.{name}": case for place in places for name, case in dataset_cases(world, stage, place)
    }
    return of_data | dict(loop_cases(stage)) | dict(OWN[stage](world))


# -- the tests ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_every_key_has_a_case(stage: str, world: World) -> None:
    assert set(cases(stage, world)) == {key for key, _ in keys_of(STAGES[stage][0])}


def trace(stage: str, key: str, case: Case, values: Values, out: Path) -> str:
    """What the recipe brings about, or the sentence that refuses it."""
    out.mkdir(parents=True)
    try:
        if case.seen == "examples":
            return traces.of_examples(stage, values, key.split(".")[0], out)
        if case.seen == "run":
            return traces.of_run(stage, values, out)
        found = traces.of_stage(stage, values, out)
        return digest(found, sorted(traces.files(Path(case.value)))) if case.seen == "folder" else found
    except FluxChatError as error:
        sentence = str(error)
        assert sentence.endswith(".")
        assert "\n" not in sentence
        return sentence


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.quick(2)
def test_a_training_step_needs_no_float64(stage: str, world: World, tmp_path: Path) -> None:
    recipe = build(STAGES[stage][0], changed(world.values(stage), {"loop.out": str(tmp_path)}), "test")
    made = STAGES[stage][1](recipe)
    groups = parameter_groups(made.model, 0.1)
    optimizer, batch = torch.optim.AdamW(groups, lr=1e-3), made.batch(0)
    with NoFloat64():
        made.model.train()(batch)[0].backward()
        parameters = [p for group in groups for p in group["params"]]
        assert torch.nn.utils.clip_grad_norm_(parameters, 1.0) > 0
        optimizer.step()


@pytest.mark.parametrize("stage", STAGES)
def test_a_training_step_waits_for_no_number(stage: str, world: World, tmp_path: Path) -> None:
    recipe = build(STAGES[stage][0], changed(world.values(stage), {"loop.out": str(tmp_path)}), "test")
    made = STAGES[stage][1](recipe)
    batch, figures = made.batch(0), Figures()
    with HostReads() as reads:
        loss, found = made.model.train()(batch)
        loss.backward()
        figures.add(found)
        figures.add(found)
        assert reads.count == 0
        figures.settle()
    assert figures.means() == {name: pytest.approx(float(value)) for name, value in found.items()}


def unread(key: str) -> str:
    """What a sentence ends with that refuses all of a table."""
    return f"does not read {key.split('.')[0]}: leave it out."


@pytest.mark.slow
@pytest.mark.usefixtures("cached_world")
@pytest.mark.parametrize("stage", STAGES)
def test_every_key_has_an_effect_or_is_refused(
    stage: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    # Refused at once: compiling would take minutes for each stage.
    monkeypatch.setattr(compiling, "lacking_compiler", lambda device: "nothing can compile here")
    known: dict[str, str] = {}  # of recipes before the change, by what they are
    vain, failed = [], []
    for number, (key, case) in enumerate(cases(stage, world).items()):
        before = changed(world.values(stage), case.beside)
        kind = digest(before, case.seen, key.split(".")[0] if case.seen == "examples" else "")
        if kind not in known:
            known[kind] = trace(stage, key, case, before, tmp_path / f"{number}")
            again = trace(stage, key, case, before, tmp_path / f"{number}-again")
            assert again == known[kind], f"{key}: the same recipe does something else"
        after = trace(stage, key, case, changed(before, {key: case.value}), tmp_path / f"{number}-after")
        name, sentence = key.split(".")[-1], known[kind]
        if " " in sentence and name not in sentence and not sentence.endswith(unread(key)):
            failed.append((key, sentence))  # for another reason than this key
        elif after == sentence and not after.endswith(unread(key)):
            vain.append(key)
        print(key, sentence[:60], "->", after[:110])
    assert not failed
    assert not vain
