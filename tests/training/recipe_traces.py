"""What a recipe brings about, as a digest: two recipes that do the same have equal traces."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from encoder.errors import FluxChatError
from training.chat_lora import LoraRecipe, LoraStage
from training.chat_stage1 import Stage1, Stage1Recipe
from training.clip import ClipRecipe, ClipStage
from training.data.datasets import NEEDS, DatasetConfig, count_samples, open_datasets
from training.data.loader import Loader
from training.finetune import FinetuneModel, FinetuneRecipe, FinetuneStage, test
from training.projector_warmup import ProjectorWarmupRecipe, ProjectorWarmupStage
from training.trainer.loop import train
from training.trainer.recipe import build
from training.trainer.run_log import RunLog
from training.umt import UmtRecipe, UmtStage

STAGES: Mapping[str, tuple[Any, Any]] = {
    "umt": (UmtRecipe, UmtStage),
    "finetune": (FinetuneRecipe, FinetuneStage),
    "clip": (ClipRecipe, ClipStage),
    "projector_warmup": (ProjectorWarmupRecipe, ProjectorWarmupStage),
    "chat_stage1": (Stage1Recipe, Stage1),
    "chat_lora": (LoraRecipe, LoraStage),
}
Values = dict[str, Any]


# -- keys ---------------------------------------------------------------------------------------------------


def keys_of(kind: Any, before: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, name of the dataclass that has it) of a recipe, tables in lists written as `data.0`."""
    for name, hint in typing.get_type_hints(kind).items():
        if typing.get_origin(hint) is typing.ClassVar:
            continue
        inner, place = _some(hint), f"{before}{name}"
        if typing.get_origin(inner) is tuple and dataclasses.is_dataclass(typing.get_args(inner)[0]):
            inner, place = typing.get_args(inner)[0], f"{place}.0"
        if dataclasses.is_dataclass(inner):
            yield from keys_of(inner, f"{place}.")
        else:
            yield place, kind.__name__


def _some(hint: Any) -> Any:
    """A type without None."""
    parts = [part for part in typing.get_args(hint) if part is not type(None)]
    return parts[0] if type(None) in typing.get_args(hint) else hint


def changed(values: Values, changes: Mapping[str, Any]) -> Values:
    """Values with dotted keys set, those of None taken out."""
    values = copy.deepcopy(values)
    for key, value in changes.items():
        *parents, last = key.split(".")
        table: Any = values
        for parent in parents:
            table = table[int(parent)] if isinstance(table, list) else table.setdefault(parent, {})
        if value is None:
            table.pop(last, None)
        else:
            table[last] = copy.deepcopy(value)
    return values


# -- digests ------------------------------------------------------------------------------------------------


def digest(*things: Any) -> str:
    """Of nested plain values, tensors, dataclasses, and files, which count by what they hold."""
    state = hashlib.blake2b(digest_size=16)
    for thing in things:
        _feed(state, thing)
    return state.hexdigest()


def _feed(state: Any, thing: Any) -> None:
    state.update(type(thing).__name__.encode())
    if isinstance(thing, Tensor):
        state.update(repr((thing.dtype, tuple(thing.shape))).encode())
        state.update(np.ascontiguousarray(thing.detach().cpu().float().numpy()).tobytes())
    elif dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        for field in dataclasses.fields(thing):
            if field.compare:
                _feed(state, getattr(thing, field.name))
    elif isinstance(thing, Mapping):
        for key in sorted(thing, key=str):
            state.update(str(key).encode())
            _feed(state, thing[key])
    elif isinstance(thing, (list, tuple)):
        for one in thing:
            _feed(state, one)
    elif isinstance(thing, Path):
        state.update(thing.read_bytes() if thing.is_file() else b"")
    elif isinstance(thing, (str, int, float, bool, bytes, type(None))):
        state.update(repr(thing).encode())


def files(folder: Path) -> dict[str, Any]:
    """By relative name, what is in a folder, without figures of time."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [{k: v for k, v in row.items() if not k.endswith("per_s")} for row in rows]
        elif path.is_file() and "tfevents" not in name and path.suffix not in (".pt", ".pkl"):
            found[name] = path
    return found


# -- traces -------------------------------------------------------------------------------------------------


def of_examples(stage: str, values: Values, place: str, work: Path) -> str:
    """Of a recipe's datasets at a place (data, held_out, ...): examples, their order, how many there are."""
    data: Sequence[DatasetConfig] = getattr(build(STAGES[stage][0], values, "test"), place)
    source = open_datasets(data, NEEDS[stage])
    examples = []
    for number in range(min(12, len(source))):
        example = source[number]
        media = (type(example.media).__name__, example.media.key if example.has_media else "")
        examples.append((dataclasses.replace(example, media=None), media))  # type: ignore[arg-type]
    order = Loader(source, 0, out=work, stride=1).order(0)
    try:
        counted: Any = count_samples(data, None)
    except FluxChatError as error:
        counted = str(error)
    indices = [sorted(files(Path(part.index_root))) for part in data if part.index_root]
    return digest(examples, order, source.classes, counted, sorted(files(work)), indices)


def of_stage(stage: str, values: Values, out: Path) -> str:
    """Of a stage without training: its data, model, losses, evaluation, and result."""
    recipe = build(STAGES[stage][0], changed(values, {"loop.out": str(out)}), "test")
    made = STAGES[stage][1](recipe)
    model = made.model.train()
    seen: list[Any] = [_settings(made)]
    for index in range(4):
        batch = made.batch(index)
        torch.manual_seed(index)
        loss, figures = model(batch)
        seen += [_of_batch(batch), loss, figures, type(loss.grad_fn).__name__]
    if recipe.loop.evaluate_every:
        model.eval()
        with torch.no_grad():
            seen.append(dict(made.evaluate()))
    made.finish(out)
    if stage == "finetune" and recipe.held_out:
        seen.append(_tested(recipe))
    trained = {n: (p, p.requires_grad) for n, p in model.named_parameters()}
    return digest(seen, trained, files(out))


def _tested(recipe: FinetuneRecipe) -> list[Any]:
    """What `--test` says, and the shapes of the clips that it looks at."""
    classify, shapes = FinetuneModel.classify, list[Any]()

    def watched(self: FinetuneModel, pixels: Tensor, counts: Sequence[int]) -> dict[int, Tensor]:
        shapes.append(tuple(pixels.shape))
        return classify(self, pixels, counts)

    FinetuneModel.classify = watched  # type: ignore[method-assign]
    try:
        return [test(recipe), shapes]
    finally:
        FinetuneModel.classify = classify  # type: ignore[method-assign]


def of_run(stage: str, values: Values, out: Path) -> str:
    """Of a run: files, figures by step, and when they reach the disk."""
    place = out / values["loop"]["out"]
    recipe = build(STAGES[stage][0], changed(values, {"loop.out": str(place)}), "test")
    flushed: list[Any] = []
    write = RunLog.write

    def watched(self: RunLog, step: int, figures: Any, **options: Any) -> None:
        flushed.append((step, options.get("flush")))
        write(self, step, figures, **options)

    RunLog.write = watched  # type: ignore[method-assign]
    try:
        train(STAGES[stage][1](recipe), recipe.optim, recipe.loop)
    finally:
        RunLog.write = write  # type: ignore[method-assign]
    return digest(flushed, sorted(files(out)), files(out))


def _of_batch(batch: Any) -> Any:
    """A batch without where it lies."""
    if not hasattr(batch, "examples"):
        return batch
    return [(example.id, example.label) for example in batch.examples], batch.pixels


def _settings(stage: Any) -> list[Any]:
    """What a stage keeps in memory or computes again, which no number shows."""
    model, found = stage.model, list[Any]()
    data = getattr(stage, "data", None)
    parts = [data, *getattr(data, "_batches", {}).values()]
    for part in parts:
        loader = getattr(part, "loader", None) or getattr(part, "_loader", None)
        found.append((getattr(part, "threads", None), loader and loader.missing.share))
    encoder = getattr(model, "encoder", None)
    found.append(getattr(encoder, "recompute", None))
    if (vlm := getattr(stage, "vlm", None)) is not None:
        found.append(vlm.language_model.is_gradient_checkpointing)
        found.append(
            [(n, m.p) for n, m in vlm.language_model.named_modules() if isinstance(m, torch.nn.Dropout)]
        )
    if (teacher := getattr(model, "_teacher", None)) is not None:
        found += [teacher[0].model.training, getattr(teacher[0], "frames_at_once", None)]
    found.append(getattr(getattr(stage, "text", None), "_cache_size", None))
    return found
