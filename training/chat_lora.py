"""Instruction tuning after stage 1: LoRA on the language model, with or without a 4-bit base.

    python -m training.chat_lora --config training/recipes/chat_lora.yaml

Starts from the folder that `training.chat_stage1` wrote. In `loop.out`, `model` is a folder that
`VideoChat(model=...)` opens, and `model/adapter` a peft adapter that `VideoChat(..., adapters=[...])` loads.
The paper stops at stage 1; this stage is the field's usual next one.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from encoder.errors import ConfigError
from llm_bridge.adapters import peft_config, quiet_peft
from llm_bridge.lora import use_for_training
from llm_bridge.model import ADAPTER, VideoLanguageModel, model_folder
from llm_bridge.packing import Weighting
from training.chat_stage1 import ChatModel, ChatStage
from training.data.chat_batches import ChatBatch, ChatRecipe
from training.models.token_targets import (
    TARGET_KINDS,
    SceneTargets,
    TokenTargets,
    WordTable,
    kinds_of,
    target_losses,
)
from training.trainer.command import run_stage
from training.trainer.distributed import device_of_process


@dataclass(frozen=True)
class LoraSettings:
    """rank, alpha: size of the update and alpha / rank its scale. targets: [all-linear], or module-name
    endings as peft matches them, for example [q_proj, v_proj].
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.05
    targets: tuple[str, ...] = ("all-linear",)

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"lora.rank must be at least 1, not {self.rank}.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora.dropout must lie from 0 to below 1, not {self.dropout}.")

    def config(self) -> Any:
        """The same as peft's LoraConfig."""
        with quiet_peft():
            from peft import LoraConfig

        everywhere = self.targets == ("all-linear",)
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            target_modules="all-linear" if everywhere else list(self.targets),
            task_type="CAUSAL_LM",
        )


@dataclass(frozen=True, kw_only=True)
class LoraRecipe(ChatRecipe):
    """Everything a LoRA run depends on.

    start: folder of a model from stage 1, or from this stage, whose adapter then goes on learning.
    quantize: "4bit" or "8bit" base weights through bitsandbytes.
    train_projector: let the projector go on learning beside the adapter.
    scene_words: weight of the projector warm-up's loss beside that of the answers, for datasets of the demo
    world: each visual token stays near the word of what its patch shows, where the projector drifts off else.
    """

    stage: ClassVar[str] = "chat_lora"
    start: str
    lora: LoraSettings = field(default_factory=LoraSettings)
    quantize: Literal["8bit", "4bit"] | None = None
    train_projector: bool = True
    scene_words: float = 0.0
    gradient_checkpointing: bool = False
    template: Literal["plain", "chat"] = "chat"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scene_words < 0:
            raise ConfigError(f"scene_words must not be negative, not {self.scene_words}.")
        if self.scene_words and not self.train_projector:
            raise ConfigError("scene_words teach the projector: they need train_projector.")


@dataclass(frozen=True)
class TargetBatch(ChatBatch):
    """A batch with targets of the visual tokens of each of its clips.

    weights: by kind of target, the clips that have some. shares: of the step, by kind, what the means over
    this batch's clips are multiplied by (see the loop).
    """

    targets: tuple[TokenTargets, ...]
    weights: dict[str, float] = field(default_factory=dict, kw_only=True)
    shares: dict[str, float] = field(default_factory=dict, kw_only=True)


class TargetModel(ChatModel):
    """The loss of the answers and, weighted, that of the token targets."""

    def __init__(self, model: VideoLanguageModel, weighting: Weighting, scene_words: float) -> None:
        super().__init__(model, weighting)
        self._scene_words, self._table = scene_words, WordTable(model.llm)

    def forward(self, batch: ChatBatch) -> tuple[Tensor, dict[str, float | Tensor]]:
        """(loss, figures)."""
        loss, figures = super().forward(batch)
        if not isinstance(batch, TargetBatch) or batch.vision is None:
            return loss, figures
        words = target_losses(self.vlm.project(batch.vision), batch.targets, self._table)
        if not words:
            return loss, figures
        shared = [batch.shares.get(name, 1.0) * value for name, value in words.items()]
        return loss + self._scene_words * torch.stack(shared).sum(), {
            **figures,
            "answers": loss.detach(),
            **{name: value.detach() for name, value in words.items()},
        }


class LoraStage(ChatStage):
    """Adapter matrices in the language model's linear layers are trained, and the projector if wanted."""

    def __init__(self, recipe: LoraRecipe) -> None:
        vlm = VideoLanguageModel.from_pretrained(
            recipe.start, quantize=recipe.quantize, tuned=False, device=device_of_process()
        )
        super().__init__(recipe, vlm)
        self.recipe: LoraRecipe = recipe
        self.adapted = self._add_adapter()
        vlm.projector.requires_grad_(recipe.train_projector)
        if recipe.scene_words:
            self._targets = SceneTargets(vlm)
            self.weighed = TARGET_KINDS
            self.model = TargetModel(vlm, recipe.weighting, recipe.scene_words)

    def batch(self, index: int) -> ChatBatch:
        """Micro-batch number `index`."""
        if not self.recipe.scene_words:
            return super().batch(index)
        examples, features = self.data.encoded(index)
        batch = self.data.prompted(examples, features)
        pairs = zip(examples, features, strict=True)
        targets = tuple(self._targets.of(example.media, one) for example, one in pairs if one is not None)
        weights = {kind: float(count) for kind, count in kinds_of(targets).items()}
        return TargetBatch(batch.prompts, batch.vision, targets, weight=batch.weight, weights=weights)

    def _add_adapter(self) -> torch.nn.Module:
        """Put the matrices into the model's own layers; the peft model around them saves them."""
        with quiet_peft():
            from peft import PeftModel, get_peft_model

        recipe, base = self.recipe, self.vlm.language_model
        if recipe.gradient_checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(recipe.loop.seed)
        learnt = model_folder(recipe.start) / ADAPTER
        adapted: torch.nn.Module
        try:
            with quiet_peft():
                if learnt.is_dir():
                    learnt_config = peft_config(learnt)
                    _check_same_adapter(learnt_config, recipe.lora, base)
                    learnt_config.inference_mode = False
                    learnt_config.lora_dropout = recipe.lora.dropout
                    adapted = PeftModel.from_pretrained(
                        base, str(learnt), is_trainable=True, config=learnt_config, use_safetensors=True
                    )
                else:
                    adapted = get_peft_model(base, recipe.lora.config())
        except ValueError as error:
            raise ConfigError(f"lora.targets does not fit the language model: {error}.") from error
        use_for_training(adapted)
        return adapted

    def finish(self, out: Path) -> None:
        """Write the model folder with the adapter inside."""
        self.adapted.save_pretrained(str(out / "model" / ADAPTER))  # type: ignore[operator]
        super().finish(out)


def _check_same_adapter(learnt: Any, settings: LoraSettings, base: Any) -> None:
    """Raises ConfigError when an adapter to go on from is of another size, or in other layers of the base
    model, than the recipe asks for."""
    if (learnt.r, learnt.lora_alpha) != (settings.rank, settings.alpha):
        raise ConfigError(
            f"The adapter to go on from has rank {learnt.r} and alpha {learnt.lora_alpha:g}, the recipe says "
            f"{settings.rank} and {settings.alpha:g}: name the same, or start without an adapter."
        )
    if _adapted_layers(base, learnt.target_modules) != _adapted_layers(base, settings.targets):
        raise ConfigError(
            f"The adapter to go on from is in other layers than lora.targets {list(settings.targets)}: name "
            "the same, or start without an adapter."
        )


def _adapted_layers(base: Any, targets: str | Collection[str]) -> set[str]:
    """Names of the linear layers that peft's target_modules mean: an expression, endings, or all of them."""
    head = base.get_output_embeddings()
    linear = {name for name, m in base.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}
    if isinstance(targets, str):
        return {name for name in linear if re.fullmatch(targets, name)}
    if tuple(targets) == ("all-linear",):
        return linear
    return {name for name in linear if any(f".{name}".endswith(f".{target}") for target in targets)}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    return run_stage(LoraRecipe, LoraStage, "training.chat_lora", __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
