"""Flux-UMT: a student learns from a frozen teacher at several token counts (paper supplement, Table 5).

    python -m training.umt --config training/recipes/cpu/umt.yaml

Each batch has its own grid of frames and resolution. The group-dynamic selector gives the teacher its tokens;
the teacher's attention picks the student's among those, for each count; the student's last blocks and pooled
feature are drawn to the teacher's. Three counts at a time are Flux-Multi, one is Flux-Single. No code of this
stage was released: what could not be checked is marked UNVERIFIED and is an option.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from encoder.checkpoint import save_tensors
from encoder.errors import ConfigError
from encoder.fluxvit import FluxViT
from encoder.selection import select
from encoder.tokens import Grid, VisionTokens
from training.data.augment import AugmentConfig
from training.data.datasets import NEEDS, DatasetConfig, check_read, open_datasets
from training.data.flexible_grids import FlexibleGrid
from training.data.video_batches import VideoBatch, VideoBatches
from training.distill.distill_heads import DecoderConfig, Decoders
from training.distill.efficientnet import EfficientNetLiteSource
from training.distill.image_teachers import ImageEncoderSource
from training.distill.in_turn import InTurn
from training.distill.internvideo2 import InternVideo2Source, InternVideo2Teacher
from training.distill.teachers import TargetCache, Teacher, TeacherTargets, spaced_layers
from training.distill.token_masking import StudentChoice, student_choices, take, visible_count
from training.models.encoder_source import EncoderSource, check_token_counts, pool_heads
from training.trainer.command import run_stage
from training.trainer.losses import cosine_distillation, count_alignment, mean_cosine
from training.trainer.recipe import LoopConfig, OptimConfig, check_least, check_share

COUNTS = (2048, 1536, 1024)


@dataclass(frozen=True)
class TeacherSource:
    """Exactly one teacher; cache: folder for what it saw (see TargetCache), None for none."""

    internvideo2: InternVideo2Source | None = None
    image_encoder: ImageEncoderSource | None = None
    efficientnet: EfficientNetLiteSource | None = None
    cache: str | None = None

    def __post_init__(self) -> None:
        if sum(part is not None for part in (self.internvideo2, self.image_encoder, self.efficientnet)) != 1:
            raise ConfigError("teacher needs exactly one of internvideo2, image_encoder and efficientnet.")

    def open(self) -> Teacher:
        """The teacher; raises ModelError, CheckpointError or ConfigError when it cannot be loaded."""
        source = self.internvideo2 or self.image_encoder or self.efficientnet
        assert source is not None
        return source.open()


@dataclass(frozen=True)
class UmtRecipe:
    """Everything a Flux-UMT run depends on.

    teacher_tokens: how many the selector gives the teacher. num_tokens: the student's, most first; a clip
    of fewer tokens gives all. mask_ratio: one count as a share of the teacher's tokens instead, as in UMT and
    the InternVideo2 distillation (0.8). pools: the pooling head of each count (None: head 0 for the first, 1
    for the second, ... and for a single count head 1).
    selection: whose patch embeddings drive the selector, UNVERIFIED; the student's, since the paper says its
    dual patch norm makes the masks robust. student_choice, nested: see `token_masking.student_choices`.
    student_layers: blocks compared with the teacher's layers in order (None: the last ones).
    middle_weight, final_weight: of the two losses, 1:1 in the InternVideo2 code. count_weights: of the
    counts, UNVERIFIED (None: 1 each, summed, as in the released fine-tuning). count_alignment: weight of
    drawing the smaller counts' features to the largest one's, as in fine-tuning; whether pre-training had it
    is UNVERIFIED, 0 leaves it out.
    Memory: gradient_checkpointing computes whole blocks again in backward; recompute_cheap only what costs no
    matrix product, and the decoders; passes_in_turn lets each count go backward before the next one goes
    forward, with the same gradients (not in fp16, whose scaler acts on the whole loss only).
    """

    stage: ClassVar[str] = "umt"
    renamed: ClassVar[dict[str, str]] = {"counts": "num_tokens"}
    optim: OptimConfig
    loop: LoopConfig
    teacher: TeacherSource
    data: tuple[DatasetConfig, ...]
    encoder: EncoderSource = field(default_factory=EncoderSource)
    grid: FlexibleGrid = field(default_factory=FlexibleGrid)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    decoders: DecoderConfig = field(default_factory=DecoderConfig)
    teacher_tokens: int = 2048
    num_tokens: tuple[int, ...] = COUNTS
    mask_ratio: float | None = None
    pools: tuple[int, ...] | None = None
    selection: Literal["student", "teacher"] = "student"
    student_choice: StudentChoice = "multinomial"
    nested: bool = True
    student_layers: tuple[int, ...] | None = None
    middle_weight: float = 1.0
    final_weight: float = 1.0
    count_weights: tuple[float, ...] | None = None
    count_alignment: float = 0.0
    compat_truncation: bool = False
    gradient_checkpointing: bool = False
    recompute_cheap: bool = False
    passes_in_turn: bool = False
    max_missing: float = 0.01
    threads: int | None = None
    held_out: tuple[DatasetConfig, ...] = ()
    held_out_batches: int = 4

    def __post_init__(self) -> None:
        if self.mask_ratio is not None:
            masked = (visible_count(self.teacher_tokens, self.mask_ratio),)
            if self.num_tokens not in (COUNTS, masked):
                raise ConfigError("mask_ratio stands in place of num_tokens: name one or the other.")
            object.__setattr__(self, "num_tokens", masked)
        if bool(self.held_out) != (self.loop.evaluate_every > 0):
            raise ConfigError("held_out and loop.evaluate_every go together: name clips, and how often.")
        check_read(self.data, self.stage)
        check_read(self.held_out, self.stage, held_out=True)
        check_token_counts(self.num_tokens, pools=self.pools, count_weights=self.count_weights)
        check_least(self, 1, "threads", "held_out_batches")
        check_share(self, "max_missing")
        if self.gradient_checkpointing and self.recompute_cheap:
            raise ConfigError("gradient_checkpointing and recompute_cheap exclude each other: choose one.")
        if self.loop.compile and self.recompute_cheap:
            raise ConfigError(
                "loop.compile computes what is cheap again by itself: leave recompute_cheap out."
            )
        if self.passes_in_turn and self.loop.precision == "fp16":
            raise ConfigError("passes_in_turn needs loop.precision bf16 or fp32, not fp16.")
        if self.num_tokens[0] > self.teacher_tokens:
            raise ConfigError(f"num_tokens cannot exceed teacher_tokens, {self.teacher_tokens}.")

    @property
    def pool_heads(self) -> tuple[int, ...]:
        """Pooling head of each count."""
        return pool_heads(self.num_tokens, self.pools)


class UmtModel(nn.Module):
    """Student and decoders; the frozen teacher stands beside them and is neither trained nor saved.

    Raises ConfigError where the recipe's layers, pools and aligners do not fit the encoder or the teacher.
    """

    def __init__(self, encoder: FluxViT, teacher: Teacher, recipe: UmtRecipe) -> None:
        super().__init__()
        config, wanted = encoder.config, len(teacher.layer_dims)
        self.recipe = recipe
        self.student_layers = recipe.student_layers or spaced_layers(config.depth, wanted, 1)
        if len(self.student_layers) != wanted or max(self.student_layers) >= config.depth:
            raise ConfigError(
                f"student_layers must be {wanted} of {config.depth} blocks, not {list(self.student_layers)}."
            )
        if max(recipe.pool_heads) >= config.num_pools:
            raise ConfigError(
                f"The encoder has {config.num_pools} pools: {len(recipe.num_tokens)} do not fit."
            )
        if recipe.count_alignment and config.num_aligners < len(recipe.num_tokens) - 1:
            raise ConfigError(f"The encoder has {config.num_aligners} aligners, too few to align the counts.")
        encoder.recompute = (
            "blocks" if recipe.gradient_checkpointing else "cheap" if recipe.recompute_cheap else "nothing"
        )
        self.encoder = encoder
        self.decoders = Decoders(
            encoder, teacher.layer_dims, teacher.final_dim, len(recipe.num_tokens), recipe.decoders
        )
        # In tuples, out of sight of the module tree: not moved, wrapped, sharded or cast with the student.
        self._teacher = (teacher,)
        self._cache = (TargetCache(recipe.teacher.cache, teacher),) if recipe.teacher.cache else ()

    @property
    def teacher(self) -> Teacher:
        """The frozen teacher."""
        return self._teacher[0]

    @torch.no_grad()
    def teach(self, pixels: Tensor, patches: Tensor, grid: Grid) -> tuple[Tensor, TeacherTargets]:
        """The teacher's tokens (B, N), ascending, and its targets for them.

        patches: the student's embeddings (B, T*h*w, C).
        """
        recipe, teacher = self.recipe, self.teacher
        teacher.to(pixels.device)
        ranked = patches if recipe.selection == "student" else teacher.patches(pixels, grid)
        chosen = select(
            ranked.detach(), grid, recipe.teacher_tokens, compat_truncation=recipe.compat_truncation
        )
        source = self._cache[0] if self._cache else teacher
        return chosen, teacher.targets(source.observe(pixels, grid, chosen), grid, chosen)

    def forward(self, batch: VideoBatch) -> tuple[Tensor, dict[str, float | Tensor]]:
        """(loss, figures) of a batch."""
        recipe, encoder = self.recipe, self.encoder
        pixels = batch.pixels.to(encoder.cls_token.device)
        grid = encoder.grid_of(*pixels.shape[2:])
        patches = encoder.embed(pixels)
        chosen, targets = self.teach(pixels, patches, grid)
        choices = student_choices(
            targets.attention, recipe.num_tokens, recipe.student_choice, nested=recipe.nested
        )
        turns = None
        if recipe.passes_in_turn and torch.is_grad_enabled():
            turns = InTurn(patches, self.parameters())
            patches = turns.shared
        loss = torch.zeros((), device=pixels.device)
        figures: dict[str, float | Tensor] = {"tokens": float(len(pixels) * sum(c.shape[1] for c in choices))}
        pooled: list[Tensor] = []
        weights = recipe.count_weights or (1.0,) * len(choices)
        for number, (places, weight) in enumerate(zip(choices, weights, strict=True)):
            kept = chosen.gather(1, places)
            tokens = encoder.encode(patches, grid, kept, layers=self.student_layers)
            pooled.append(encoder.pool(tokens, recipe.pool_heads[number]))
            middle = self._middle_loss(tokens, targets, places, number)
            decoded = self.decoders.clip(pooled[-1], number)
            final = cosine_distillation(decoded, targets.final)
            own = weight * (recipe.middle_weight * middle + recipe.final_weight * final)
            if recipe.count_alignment and number:
                aligned = count_alignment(encoder.align(pooled[number], number - 1), pooled[0])
                figures["count_alignment"] = figures.get("count_alignment", 0.0) + aligned.detach()
                own = own + recipe.count_alignment * aligned
            if turns is None:
                loss = loss + own
            else:
                turns.add(own)
                pooled[number] = pooled[number].detach()
            name = recipe.num_tokens[number]
            figures |= {f"middle_{name}": middle.detach(), f"final_{name}": final.detach()}
            if not self.training:
                figures[f"cosine_{name}"] = mean_cosine(decoded, targets.final)
        return (loss if turns is None else turns.loss()), figures

    def _middle_loss(
        self, tokens: VisionTokens, targets: TeacherTargets, places: Tensor, number: int
    ) -> Tensor:
        """Mean over layers of the distance between the student's visible tokens and the teacher's."""
        kept, grid = torch.stack(tokens.kept), tokens.grids[0]
        hidden = [x.view(len(kept), 1 + kept.shape[1], -1) for x in tokens.hidden]
        positions = self.decoders.positions(grid, kept)
        again = self.encoder.recompute != "nothing" and torch.is_grad_enabled()
        losses = []
        for layer, (x, theirs) in enumerate(zip(hidden, targets.layers, strict=True)):
            of_layer = (x, positions, theirs, places, layer, number)
            losses.append(
                checkpoint(self._layer_loss, *of_layer, use_reentrant=False)
                if again
                else self._layer_loss(*of_layer)
            )
        return torch.stack(losses).mean()

    def _layer_loss(
        self, x: Tensor, positions: Tensor | None, theirs: Tensor, places: Tensor, layer: int, number: int
    ) -> Tensor:
        """Distance of one layer's visible tokens x (B, 1+K, C) from the teacher's (B, N or 1+N, D)."""
        cls = self.teacher.has_cls
        mine = self.decoders.tokens(x, positions, layer, number, cls=cls)
        if not cls:
            return cosine_distillation(mine, take(theirs, places))
        return cosine_distillation(mine, torch.cat([theirs[:, :1], take(theirs[:, 1:], places)], dim=1))


class UmtStage:
    """Flux-UMT on the recipe's videos."""

    def __init__(self, recipe: UmtRecipe) -> None:
        self.recipe = recipe
        self.data = self._batches(recipe.data, recipe.augment, "segments", recipe.max_missing)
        self.held_out = (
            self._batches(recipe.held_out, AugmentConfig(), "middle", 1.0) if recipe.held_out else None
        )
        torch.manual_seed(recipe.loop.seed)
        encoder = recipe.encoder.build()
        recipe.grid.check_patch(encoder.config.patch_size)
        teacher = recipe.teacher.open()
        if recipe.loop.compile and isinstance(teacher, InternVideo2Teacher):
            teacher.compile()
        self.model = UmtModel(encoder, teacher, recipe)

    def _batches(
        self,
        data: Sequence[DatasetConfig],
        augment: AugmentConfig,
        sampling: Literal["segments", "middle"],
        max_missing: float,
    ) -> VideoBatches:
        recipe = self.recipe
        return VideoBatches(
            open_datasets(data, NEEDS[recipe.stage]),
            recipe.grid,
            augment,
            recipe.optim.micro_batch,
            recipe.loop.seed,
            out=recipe.loop.out,
            max_missing=max_missing,
            sampling=sampling,
            threads=recipe.threads,
        )

    @property
    def micro_batches(self) -> int:
        """Micro-batches in one epoch."""
        return self.data.micro_batches

    def batch(self, index: int) -> VideoBatch:
        """Clips of micro-batch `index` on its own grid."""
        return self.data.get(index)

    @torch.no_grad()
    def evaluate(self) -> Mapping[str, float]:
        """Figures on held-out clips: the losses, the cosine with the teacher's final target and, where clips
        have labels, the accuracy of the nearest neighbour by pooled features, at each token count."""
        if self.held_out is None:
            return {}
        total = min(self.recipe.held_out_batches, self.held_out.micro_batches)
        figures: dict[str, float] = {}
        features: dict[int, list[Tensor]] = {count: [] for count in self.recipe.num_tokens}
        labels: list[int | None] = []
        device = self.model.encoder.cls_token.device
        for index in range(total):
            batch = self.held_out.get(index)
            for name, value in self.model(batch)[1].items():
                if name != "tokens":
                    figures[name] = figures.get(name, 0.0) + float(value) / total
            labels += [example.label for example in batch.examples]
            for count, head in zip(self.recipe.num_tokens, self.recipe.pool_heads, strict=True):
                tokens = self.model.encoder(batch.pixels.to(device), count)
                features[count].append(self.model.encoder.pool(tokens, head).float())
        if labels and None not in labels:
            for count, rows in features.items():
                figures[f"neighbour_{count}"] = neighbour_accuracy(torch.cat(rows), labels)
        return figures

    def finish(self, out: Path) -> None:
        """The encoder, for `encoder.init` of other stages and FluxViT.from_pretrained, and the decoders."""
        self.model.encoder.save_pretrained(out / "encoder")
        save_tensors(self.model.decoders.state_dict(), out / "decoders.safetensors")


def neighbour_accuracy(features: Tensor, labels: Sequence[int | None]) -> float:
    """Share of rows (N, D) whose nearest other row by cosine has the same label (leave-one-out 1-NN)."""
    rows = torch.nn.functional.normalize(features, dim=-1)
    nearest = (rows @ rows.T).fill_diagonal_(-2.0).argmax(dim=1).tolist()
    return sum(labels[index] == label for index, label in zip(nearest, labels, strict=True)) / len(labels)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    return run_stage(UmtRecipe, UmtStage, "training.umt", __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
