"""Chat stage 1: the projector alone is trained, between frozen encoder and LLM (paper supplement section 2).

    python -m training.chat_stage1 --config training/recipes/chat_stage1.yaml

Encoder and language model are frozen; AdamW at 1e-3, global batch 512, one epoch, cosine, warm-up ratio 0.03.
The result, in `loop.out`, is a folder that `VideoChat(model=...)` opens.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from encoder.checkpoint import load_encoder, load_tensors, read_tensors
from encoder.config import FluxViTConfig
from llm_bridge.attention import use_for_training
from llm_bridge.model import VideoLanguageModel, VLMConfig, assemble
from llm_bridge.packing import Weighting
from llm_bridge.projector import ProjectorConfig
from llm_bridge.prompt import TimeSentence
from training.data.chat_batches import ChatBatch, ChatData, ChatRecipe, scored_loss
from training.trainer.command import run_stage


@dataclass(frozen=True)
class ProjectorSettings:
    """As ProjectorConfig, whose widths follow from encoder and language model."""

    kind: Literal["mlp", "merge"] = "mlp"
    layers: int = 2
    norm: bool = False
    tokens_per_frame: int = 16
    summary_tokens: int = 0
    time_periods: int = 0

    def config(self, encoder: FluxViTConfig, llm_width: int) -> ProjectorConfig:
        """The projector between an encoder and a language model."""
        return ProjectorConfig(
            in_dim=encoder.embed_dim,
            out_dim=llm_width,
            kind=self.kind,
            layers=self.layers,
            norm=self.norm,
            tokens_per_frame=self.tokens_per_frame,
            merge_heads=encoder.num_heads,
            summary_tokens=self.summary_tokens,
            summary_dim=encoder.clip_embed_dim if self.summary_tokens else 0,
            time_periods=self.time_periods,
        )


@dataclass(frozen=True)
class ModelSource:
    """encoder: official .pth file or saved folder. llm: hub id, folder or GGUF. projector_init: folder or
    file of a projector to start from. The rest: see VLMConfig.
    """

    encoder: str
    llm: str
    projector: ProjectorSettings = field(default_factory=ProjectorSettings)
    vision_depth: int | None = None
    time_sentence: TimeSentence = "short"
    gradient_checkpointing: bool = False
    default_tokens: int = 1024
    projector_init: str | None = None

    @staticmethod
    def like(config: VLMConfig, folder: str) -> ModelSource:
        """What a saved model was made of. folder: where its encoder is."""
        names = [field.name for field in fields(ProjectorSettings)]
        settings = ProjectorSettings(**{name: getattr(config.projector, name) for name in names})
        return ModelSource(folder, config.llm, settings, config.vision_depth)

    def assemble(self, seed: int) -> VideoLanguageModel:
        """The parts with a fresh projector; raises ModelError or CheckpointError."""
        encoder = load_encoder(self.encoder)
        config = VLMConfig(
            llm=self.llm,
            encoder=encoder.config,
            # The width is replaced by that of the language model, which is not loaded yet.
            projector=self.projector.config(encoder.config, encoder.config.embed_dim),
            vision_depth=self.vision_depth,
            time_sentence=self.time_sentence,
            default_tokens=self.default_tokens,
        )
        torch.manual_seed(seed)
        model = assemble(config, encoder, None)
        if self.projector_init is not None:
            path = Path(self.projector_init)
            file = path / "projector.safetensors" if path.is_dir() else path
            load_tensors(model.projector, read_tensors(file))
        if self.gradient_checkpointing:
            model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
            model.language_model.train()  # transformers checkpoints in train mode only
        return model


@dataclass(frozen=True, kw_only=True)
class Stage1Recipe(ChatRecipe):
    """Everything a stage-1 run depends on."""

    stage: ClassVar[str] = "chat_stage1"
    model: ModelSource


class ChatModel(nn.Module):
    """The whole model as the loop trains it: loss of a batch, gradients where the stage switched them on."""

    def __init__(self, model: VideoLanguageModel, weighting: Weighting = "token") -> None:
        super().__init__()
        self.model, self.weighting = model, weighting

    def forward(self, batch: ChatBatch) -> tuple[Tensor, dict[str, float]]:
        """(loss, figures)."""
        return scored_loss(self.model, batch.prompts, batch.vision, self.weighting), batch.figures


class ChatStage:
    """A chat stage for the loop: the data of a recipe and a model of which some part has gradients."""

    def __init__(self, recipe: ChatRecipe, vlm: VideoLanguageModel) -> None:
        self.recipe, self.vlm = recipe, vlm
        use_for_training(vlm.language_model)
        self.data = ChatData(recipe, vlm)
        self.model = ChatModel(vlm, recipe.weighting)

    @property
    def micro_batches(self) -> int:
        """Micro-batches in one epoch."""
        return self.data.micro_batches

    def batch(self, index: int) -> ChatBatch:
        """Micro-batch number `index`."""
        return self.data.batch(index)

    def evaluate(self) -> dict[str, float]:
        """Mean loss on held-out records, when the recipe asks for some."""
        if not self.recipe.evaluate_records:
            return {}
        with torch.no_grad():
            batch = self.data.held_out(self.recipe.evaluate_records)
            return {"loss": float(scored_loss(self.vlm, batch.prompts, batch.vision, self.recipe.weighting))}

    def finish(self, out: Path) -> None:
        """Write the model folder: projector and encoder weights, and the language model's name."""
        self.data.flush()
        self.vlm.save_pretrained(out / "model")


class Stage1(ChatStage):
    """The projector alone has gradients."""

    def __init__(self, recipe: Stage1Recipe) -> None:
        super().__init__(recipe, recipe.model.assemble(recipe.loop.seed))
        self.vlm.projector.requires_grad_(True)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    return run_stage(Stage1Recipe, Stage1, "training.chat_stage1", __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
