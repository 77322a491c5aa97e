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
from llm_bridge.model import PartTypes, VideoLanguageModel, VLMConfig, assemble
from llm_bridge.packing import Weighting
from llm_bridge.projector import ProjectorConfig
from llm_bridge.prompt import TimeSentence
from training.data.chat_batches import ChatBatch, ChatData, ChatRecipe, scored_loss
from training.trainer.command import run_stage
from training.trainer.distributed import device_of_process
from training.trainer.recipe import check_least


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

    def __post_init__(self) -> None:
        check_least(self, 1, "default_tokens")

    @staticmethod
    def like(config: VLMConfig, folder: str) -> ModelSource:
        """What a saved model was made of. folder: where its encoder is."""
        names = [field.name for field in fields(ProjectorSettings)]
        settings = ProjectorSettings(**{name: getattr(config.projector, name) for name in names})
        return ModelSource(folder, config.llm, settings, config.vision_depth)

    def assemble(self, seed: int, types: PartTypes | None = None) -> VideoLanguageModel:
        """The parts with a fresh projector, on this process's device; raises ModelError or CheckpointError.

        types: of the parts' parameters; default, those of the device.
        """
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
        model = assemble(config, encoder, None, device=device_of_process(), types=types)
        if self.projector_init is not None:
            path = Path(self.projector_init)
            file = path / "projector.safetensors" if path.is_dir() else path
            load_tensors(model.projector, read_tensors(file))
        if self.gradient_checkpointing:
            model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
        return model


@dataclass(frozen=True, kw_only=True)
class Stage1Recipe(ChatRecipe):
    """Everything a stage-1 run depends on."""

    stage: ClassVar[str] = "chat_stage1"
    model: ModelSource


class ChatModel(nn.Module):
    """What the loop trains: loss of a batch, gradients where the stage switched them on.

    The encoder is no part of it: it runs ahead in another thread, where a sharded one could not, and stays
    as it is in evaluation.
    """

    def __init__(self, vlm: VideoLanguageModel, weighting: Weighting = "token") -> None:
        super().__init__()
        self._vlm = (vlm,)  # a tuple keeps the encoder out of the module tree
        self.model = nn.ModuleDict({"projector": vlm.projector, "language_model": vlm.language_model})
        self.weighting = weighting

    @property
    def vlm(self) -> VideoLanguageModel:
        """The whole model."""
        return self._vlm[0]

    @property
    def sharded_layers(self) -> Sequence[str]:
        """The language model's layers, for FSDP."""
        return tuple(getattr(self.vlm.language_model, "_no_split_modules", None) or ())

    def train(self, mode: bool = True) -> ChatModel:
        """As `VideoLanguageModel.train`."""
        self.training = mode
        self.vlm.train(mode)
        return self

    def forward(self, batch: ChatBatch) -> tuple[Tensor, dict[str, float | Tensor]]:
        """(loss, figures); the loss is multiplied by the batch's share of its step."""
        loss = scored_loss(self.vlm, batch.prompts, batch.vision, self.weighting)
        return batch.share * loss, {**batch.figures}


class ChatStage:
    """A chat stage for the loop: the data of a recipe and a model of which some part has gradients."""

    shares_out = True  # a step's loss is the mean over its labels

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
        """Mean loss over the labels of held-out records, when the recipe asks for some."""
        total = weight = 0.0
        with torch.no_grad():
            for batch in self.data.held_out():
                total += batch.weight * float(self.model(batch)[0])
                weight += batch.weight
        return {"loss": total / weight} if weight else {}

    def finish(self, out: Path) -> None:
        """Write the model folder: projector and encoder weights, and the language model's name."""
        self.data.flush()
        self.vlm.save_pretrained(out / "model")


class Stage1(ChatStage):
    """The projector alone has gradients."""

    def __init__(self, recipe: Stage1Recipe, types: PartTypes | None = None) -> None:
        super().__init__(recipe, recipe.model.assemble(recipe.loop.seed, types))
        self.vlm.projector.requires_grad_(True)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    return run_stage(Stage1Recipe, Stage1, "training.chat_stage1", __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
