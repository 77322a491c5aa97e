"""What a recipe says of itself: its stage, its samples and steps, and how large its encoder is.

Weights and data are not opened. What a recipe starts from is known from its saved configuration, or from the
recipe beside it that makes it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from encoder.config import SIZES, FluxViTConfig
from encoder.errors import ConfigError
from training.chat_lora import LoraRecipe
from training.chat_stage1 import ModelSource, Stage1Recipe
from training.clip import ClipRecipe
from training.cost.macs import config_in, read_encoder
from training.data.corpora import compare, corpora
from training.data.datasets import DatasetConfig, choose_numbers
from training.finetune import FinetuneRecipe
from training.models.clip_model import EncoderSource
from training.projector_warmup import ProjectorWarmupRecipe
from training.trainer.recipe import OptimConfig, build, read_values
from training.umt import UmtRecipe

Kind = Literal["video", "image"]
# Name and recipe of each stage.
RECIPES: dict[str, tuple[str, type[Any]]] = {
    "umt": ("Flux-UMT", UmtRecipe),
    "finetune": ("fine-tuning", FinetuneRecipe),
    "clip": ("Flux-CLIP", ClipRecipe),
    "projector_warmup": ("projector warm start", ProjectorWarmupRecipe),
    "chat_stage1": ("chat, stage 1", Stage1Recipe),
    "chat_lora": ("chat, LoRA", LoraRecipe),
}


@dataclass(frozen=True)
class Given:
    """What the command line says: samples of an epoch, the encoder's size, tokens of a sample's text."""

    samples: int | None = None
    encoder: str | None = None
    text_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("samples", "text_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, not {value}.")
        if self.encoder is not None and self.encoder not in SIZES:
            raise ConfigError(f"--encoder must be one of {', '.join(SIZES)}, not {self.encoder!r}.")


def stage_of(values: Mapping[str, Any], path: Path) -> tuple[str, type[Any]]:
    """Name and recipe of the stage that a file says it is of; raises ConfigError when it says none."""
    known = ", ".join(RECIPES)
    if "stage" not in values:
        raise ConfigError(f"{path} does not say which stage's recipe it is: write stage: and one of {known}.")
    if values["stage"] not in RECIPES:
        raise ConfigError(f"{path}: stage must be one of {known}, not {values['stage']!r}.")
    return RECIPES[values["stage"]]


# -- samples ------------------------------------------------------------------------------------------------


def count_samples(data: Sequence[DatasetConfig], given: int | None) -> dict[Kind, int]:
    """Samples of an epoch by kind: from the corpus that a dataset names, the world's count, or `given`, which
    replaces all of them and keeps their shares. Raises ConfigError when they cannot be known."""
    found: dict[Kind, float] = {}
    for dataset in data:
        kind: Kind = "video"
        if dataset.world is not None:
            count: float = dataset.world.count
        elif dataset.corpus is not None:
            compare(dataset.corpus, 0)
            corpus = corpora()[dataset.corpus]
            kind = "image" if corpus.media == "image" else "video"
            count = _sampled(corpus.clips.get("train", max(corpus.clips.values())), dataset)
        elif given is not None:
            count = given / len(data)
        else:
            raise ConfigError(f"{dataset.name} names no corpus: say how many samples it has with --samples.")
        found[kind] = found.get(kind, 0) + count
    total = sum(found.values())
    scale = 1.0 if given is None else given / total
    return {kind: max(1, round(count * scale)) for kind, count in found.items()}


def _sampled(total: int, dataset: DatasetConfig) -> int:
    return len(choose_numbers(total, dataset.sampling_strategy, dataset.name))


def count_steps(optim: OptimConfig, most: int | None, samples: Sequence[int]) -> int:
    """As the loop and the data count them: what is left over of an epoch is not used.

    samples: of each kind that has steps of its own.
    """
    per_step = optim.batch_size // optim.micro_batch
    micro = [max(1, count // optim.micro_batch) for count in samples]
    if len(micro) > 1:
        micro = [max(1, count // per_step) * per_step for count in micro]
    steps = math.ceil(optim.epochs * sum(micro) / per_step)
    return max(1, steps) if most is None else min(steps, most)


# -- models -------------------------------------------------------------------------------------------------


def find_encoder(
    source: EncoderSource, path: Path, given: Given, seen: tuple[Path, ...] = ()
) -> FluxViTConfig:
    """The dimensions of a recipe's encoder. Weights to start from are not opened: their saved configuration
    says them, or the recipe beside `path` that writes them, or a size in their name, or --encoder.

    Raises ConfigError when none does.
    """
    if given.encoder is not None:
        return SIZES[given.encoder]
    if source.init is None:
        if source.size not in SIZES:
            raise ConfigError(f"encoder.size must be one of {', '.join(SIZES)}, not {source.size!r}.")
        return read_encoder(source.settings, SIZES[source.size])
    saved = config_in(source.init)
    if saved is not None:
        return saved
    maker = made_by(source.init, path, seen)
    if maker is not None:
        values = read_values(maker).get("encoder", {})
        return find_encoder(build(EncoderSource, values, f"{maker}: encoder"), maker, given, (*seen, maker))
    named = [size for size in SIZES if size in source.init]
    if len(named) == 1:
        return SIZES[named[0]]
    raise ConfigError(f"{source.init} is not there to say how large it is: name its size with --encoder.")


def made_by(result: str, path: Path, seen: Sequence[Path] = ()) -> Path | None:
    """The recipe whose run writes `result`: in the same folder, or in one beside it."""
    beside = sorted(path.parent.glob("*.yaml")), sorted(path.parent.parent.glob("*/*.yaml"))
    for other in dict.fromkeys(chain.from_iterable(beside)):
        if other == path or other in seen:
            continue
        loop = read_values(other).get("loop")
        if isinstance(loop, dict) and Path(result).parent == Path(str(loop.get("out"))):
            return other
    return None


def model_of(recipe: Stage1Recipe | LoraRecipe, path: Path, seen: tuple[Path, ...] = ()) -> ModelSource:
    """The model that a chat recipe trains: LoRA starts from that of the recipe beside it, or from a saved
    folder. Raises ConfigError when neither is there."""
    if isinstance(recipe, Stage1Recipe):
        return recipe.model
    saved = _saved_model(recipe.start)
    if saved is not None:
        return saved
    maker = made_by(recipe.start, path, seen)
    if maker is None:
        raise ConfigError(
            f"{recipe.start} is not there to say what it starts from, and no recipe beside writes it."
        )
    values = read_values(maker)
    kind: type[Any] = stage_of(values, maker)[1]
    other = build(kind, values, str(maker))
    if not isinstance(other, (Stage1Recipe, LoraRecipe)):
        raise ConfigError(f"{recipe.start} is the result of {maker}, which is no chat stage.")
    return model_of(other, maker, (*seen, path))


def _saved_model(start: str) -> ModelSource | None:
    from llm_bridge.model import VLMConfig

    for folder in (Path(start), Path(start) / "model"):
        if (folder / "config.json").is_file():
            config = VLMConfig.from_dict(json.loads((folder / "config.json").read_text()))
            break
    else:
        return None
    projector = {name: getattr(config.projector, name) for name in ("kind", "layers", "tokens_per_frame")}
    values = {
        "encoder": str(folder),
        "llm": config.llm,
        "projector": projector,
        "vision_depth": config.vision_depth,
    }
    return build(ModelSource, values, start)
