"""Supervised fine-tuning of FluxViT on labelled clips (paper supplement, Table 6), and the test on views.

    python -m training.finetune --config training/recipes/cpu/finetune.yaml
    python -m training.finetune --config training/recipes/cpu/finetune.yaml --test

Several counts are Flux-Multi: one pass of the same clips for each, cross-entropy each, and the features of
the smaller counts drawn to that of the largest. One count is Flux-Single. --test measures the result in
`loop.out` by the `test` part of the recipe (several clips and crops of each video).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoder.checkpoint import load_encoder, load_tensors, save_json
from encoder.errors import CheckpointError, ConfigError, DataError
from encoder.fluxvit import FluxViT
from encoder.selection import select
from training.data.augment import AugmentConfig
from training.data.datasets import NEEDS, DatasetConfig, check_read, open_datasets
from training.data.examples import ExampleSource
from training.data.flexible_grids import FlexibleGrid
from training.data.video_batches import VideoBatch, VideoBatches
from training.evaluation.views import Accuracy, ViewConfig, view_accuracy
from training.models.encoder_source import (
    EncoderSource,
    check_token_counts,
    pool_heads,
    read_head_map,
    slice_heads,
)
from training.trainer.command import run_stage
from training.trainer.distributed import merged_on_ranks, open_accelerator, rank_of
from training.trainer.losses import count_alignment
from training.trainer.recipe import LoopConfig, OptimConfig, check_least, check_share

NEW_HEADS, SAME_HEADS = "new", "same"


@dataclass(frozen=True)
class FinetuneRecipe:
    """Everything a fine-tuning run depends on.

    num_tokens: kept in each pass, most first; a clip with fewer tokens gives all. pools: pooling and class
    head of each count (None: head 0 for the first, 1 for the second, ...; head 1 for a single count). The
    training engine of the released code has the largest count on head 0, its evaluation scripts name the
    reverse, [2, 1, 0]: UNVERIFIED which the released weights follow.
    align_weight: of the SmoothL1 that draws each smaller count to the largest; 0 leaves it out.
    heads: "new" starts class heads from nothing, "same" keeps those of the weights, and a file takes rows of
    them (see `read_head_map`). num_classes: for data without a list of classes.
    repeats: clips of each example in a batch, drawn differently ("repeated augmentation"); batch sizes count
    clips. evaluate_examples: held-out videos of the evaluation during training, one clip and its centre each.
    """

    stage: ClassVar[str] = "finetune"
    renamed: ClassVar[dict[str, str]] = {"counts": "num_tokens"}
    optim: OptimConfig
    loop: LoopConfig
    data: tuple[DatasetConfig, ...]
    held_out: tuple[DatasetConfig, ...] = ()
    encoder: EncoderSource = field(default_factory=EncoderSource)
    grid: FlexibleGrid = field(default_factory=FlexibleGrid)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    test: ViewConfig = field(default_factory=ViewConfig)
    num_tokens: tuple[int, ...] = (3072, 2048, 1024)
    pools: tuple[int, ...] | None = None
    align_weight: float = 1.0
    label_smoothing: float = 0.0
    drop_path: float = 0.1
    heads: str = NEW_HEADS
    num_classes: int | None = None
    repeats: int = 1
    gradient_checkpointing: bool = False
    max_missing: float = 0.01
    threads: int | None = None
    evaluate_examples: int = 256

    def __post_init__(self) -> None:
        check_token_counts(self.num_tokens, pools=self.pools)
        check_read(self.data, self.stage)
        check_read(self.held_out, self.stage, held_out=True)
        if self.loop.evaluate_every and not self.held_out:
            raise ConfigError("loop.evaluate_every needs held_out: name videos that are not trained on.")
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"label_smoothing must lie from 0 to below 1, not {self.label_smoothing}.")
        check_least(self, 1, "repeats", "threads", "num_classes")
        check_share(self, "max_missing")
        if not 0 <= self.drop_path < 1:
            raise ConfigError(f"drop_path must lie from 0 to below 1, not {self.drop_path}.")
        if self.optim.micro_batch % self.repeats:
            raise ConfigError("optim.micro_batch must be a multiple of repeats.")

    @property
    def pool_heads(self) -> tuple[int, ...]:
        """Pooling and class head of each count."""
        return pool_heads(self.num_tokens, self.pools)

    def head_for(self, count: int) -> int:
        """Head of the trained count nearest to `count` (512 is served by the head of 1024)."""
        nearest = min(range(len(self.num_tokens)), key=lambda number: abs(self.num_tokens[number] - count))
        return self.pool_heads[nearest]


def head_counts(recipe: FinetuneRecipe, pools: int) -> tuple[int, ...]:
    """The token count that each head is trained at, 0 for none; of several the least."""
    counts = [0] * pools
    for count, head in zip(recipe.num_tokens, recipe.pool_heads, strict=True):
        counts[head] = count
    return tuple(counts)


class FinetuneModel(nn.Module):
    """The encoder with its class heads; raises ConfigError where its pools and aligners are too few."""

    def __init__(self, encoder: FluxViT, recipe: FinetuneRecipe) -> None:
        super().__init__()
        config = encoder.config
        if max(recipe.pool_heads) >= config.num_pools:
            raise ConfigError(
                f"The encoder has {config.num_pools} pools: there is no head {max(recipe.pool_heads)}."
            )
        if recipe.align_weight and config.num_aligners < len(recipe.num_tokens) - 1:
            raise ConfigError(
                f"The encoder has {config.num_aligners} aligners, too few for {len(recipe.num_tokens)} "
                "token counts."
            )
        encoder.recompute = "blocks" if recipe.gradient_checkpointing else "nothing"
        encoder.config = encoder.config.replace(head_counts=head_counts(recipe, config.num_pools))
        self.encoder = encoder
        self.recipe = recipe

    def forward(self, batch: VideoBatch) -> tuple[Tensor, dict[str, float | Tensor]]:
        """(loss, figures) of a batch: the sum over counts of cross-entropy and alignment."""
        recipe, encoder = self.recipe, self.encoder
        device = encoder.cls_token.device
        pixels, labels = batch.pixels.to(device), batch.labels.to(device)
        grid = encoder.grid_of(*pixels.shape[2:])
        # One embedding serves every pass: the selector sees the same patches each time.
        patches = encoder.embed(pixels)
        loss = torch.zeros((), device=device)
        figures: dict[str, float | Tensor] = {}
        reference: Tensor | None = None
        seen = 0
        for number, (count, head) in enumerate(zip(recipe.num_tokens, recipe.pool_heads, strict=True)):
            kept = select(patches.detach(), grid, count)
            pooled = encoder.pool(encoder.encode(patches, grid, kept), head)
            logits = encoder.head[head](encoder.fc_norm(pooled)).float()
            wrong = F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
            loss = loss + wrong
            seen += kept.numel()
            figures[f"cross_entropy_{count}"] = wrong.detach()
            figures[f"accuracy_{count}"] = (logits.argmax(dim=1) == labels).float().mean()
            if reference is None:
                reference = pooled.detach()
            elif recipe.align_weight:
                apart = count_alignment(encoder.align(pooled, number - 1), reference)
                loss = loss + recipe.align_weight * apart
                figures[f"align_{count}"] = apart.detach()
        return loss, {"tokens": float(seen), **figures}

    @torch.no_grad()
    def classify(self, pixels: Tensor, counts: Sequence[int]) -> dict[int, Tensor]:
        """Logits (B, classes) at each count, by the head that serves it."""
        encoder = self.encoder
        pixels = pixels.to(encoder.cls_token.device)
        grid = encoder.grid_of(*pixels.shape[2:])
        patches = encoder.embed(pixels)
        logits = {}
        for count in counts:
            kept = select(patches, grid, count)
            logits[count] = encoder.classify(encoder.encode(patches, grid, kept), self.recipe.head_for(count))
        return logits


def class_count(recipe: FinetuneRecipe, source: ExampleSource) -> int:
    """Number of classes; raises ConfigError when neither data nor recipe say it."""
    named = len(source.classes)
    if not named and recipe.num_classes is None:
        raise ConfigError("The data name no classes: give them a classes file, or set num_classes.")
    if named and recipe.num_classes not in (None, named):
        raise ConfigError(f"num_classes is {recipe.num_classes}, but the data name {named} classes.")
    return named or int(recipe.num_classes or 0)


def build_encoder(recipe: FinetuneRecipe, classes: Sequence[str], count: int) -> FluxViT:
    """The recipe's encoder with `count` classes and its drop path.

    Raises CheckpointError when `heads: same` does not fit, DataError as `read_head_map`.
    """
    start = recipe.encoder.build()
    encoder = FluxViT(start.config.replace(num_classes=count, drop_path=recipe.drop_path))
    tensors: Mapping[str, Tensor] = start.state_dict()
    heads = start.config.num_pools
    if recipe.heads == NEW_HEADS:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("head.")}
    elif recipe.heads == SAME_HEADS:
        if start.config.num_classes != count:
            raise CheckpointError(
                f"The weights have {start.config.num_classes} classes and the data {count}: "
                "set heads to new, or to a file that says which rows to keep."
            )
    else:
        rows = read_head_map(recipe.heads, classes)
        if len(rows) != count:
            raise DataError(f"{recipe.heads} names {len(rows)} rows for {count} classes.")
        tensors = slice_heads(tensors, rows, heads)
    report = load_tensors(encoder, tensors, strict=False)
    lacking = [name for name in report.missing if not name.startswith("head.")]
    if lacking or report.mismatched or report.unexpected:
        raise CheckpointError(f"The weights do not fit the encoder: {report}.")
    return encoder


class FinetuneStage:
    """Fine-tuning on the recipe's labelled clips."""

    def __init__(self, recipe: FinetuneRecipe) -> None:
        self.recipe = recipe
        need = NEEDS[recipe.stage]
        source = open_datasets(recipe.data, need)
        self.data = VideoBatches(
            source,
            recipe.grid,
            recipe.augment,
            recipe.optim.micro_batch,
            recipe.loop.seed,
            out=recipe.loop.out,
            max_missing=recipe.max_missing,
            threads=recipe.threads,
            repeats=recipe.repeats,
            need=need,
        )
        self.held_out = open_held_out(recipe, source.classes)
        torch.manual_seed(recipe.loop.seed)
        encoder = build_encoder(recipe, source.classes, class_count(recipe, source))
        recipe.grid.check_patch(encoder.config.patch_size)
        self.model = FinetuneModel(encoder, recipe)

    @property
    def micro_batches(self) -> int:
        """Micro-batches in one epoch."""
        return self.data.micro_batches

    def batch(self, index: int) -> VideoBatch:
        """Clips of micro-batch `index` on its own grid."""
        return self.data.get(index)

    def evaluate(self) -> Mapping[str, float]:
        """Accuracy on the first held-out videos: one clip each, centre crop, at the trained counts."""
        if self.held_out is None:
            return {}
        test = self.recipe.test
        views = ViewConfig(
            test.frames, test.resolution, 1, 1, self.recipe.num_tokens, self.recipe.evaluate_examples
        )
        return measure(self.model, self.held_out, views).shares()

    def finish(self, out: Path) -> None:
        """The encoder with its heads, loadable by FluxViT.from_pretrained."""
        self.model.encoder.save_pretrained(out / "encoder")


def open_held_out(recipe: FinetuneRecipe, classes: Sequence[str]) -> ExampleSource | None:
    """The held-out videos; raises DataError when their labels mean other classes than the training data's."""
    if not recipe.held_out:
        return None
    source = open_datasets(recipe.held_out, NEEDS[recipe.stage])
    if classes and source.classes and tuple(source.classes) != tuple(classes):
        raise DataError("held_out names other classes than data: their labels would not mean the same.")
    return source


def measure(
    model: FinetuneModel, source: ExampleSource, views: ViewConfig, progress: bool = False
) -> Accuracy:
    """Accuracy on a source, shared out over the ranks."""
    from tqdm.auto import tqdm

    rank, ranks = rank_of()
    counts = views.num_tokens or model.recipe.num_tokens
    model.eval()
    accuracy = view_accuracy(
        lambda pixels: model.classify(pixels, counts),
        source,
        views,
        rank=rank,
        ranks=ranks,
        progress=lambda turns: tqdm(turns, unit="batch", disable=not progress or rank > 0),
    )
    total = Accuracy(0, {}, {}, {}).merged(merged_on_ranks(accuracy))
    if not total.videos:
        first = next(iter(total.unreadable.items()), ("none", "there are none"))
        raise DataError(f"None of the held-out videos can be tested: {first[0]}: {first[1]}")
    return total


def test(recipe: FinetuneRecipe) -> dict[str, float]:
    """Accuracy of `loop.out`/encoder by the recipe's test protocol, written to `loop.out`/test.json.

    Raises ConfigError without held_out, CheckpointError when the run did not finish.
    """
    if not recipe.held_out:
        raise ConfigError("held_out must name the videos to test on.")
    accelerator = open_accelerator(recipe.loop.precision)
    folder = Path(recipe.loop.out) / "encoder"
    encoder = load_encoder(folder).to(accelerator.device)
    source = open_held_out(recipe, ())
    assert source is not None
    if source.classes and len(source.classes) != encoder.config.num_classes:
        raise DataError(
            f"{folder} knows {encoder.config.num_classes} classes, held_out has {len(source.classes)}."
        )
    with accelerator.autocast():
        accuracy = measure(FinetuneModel(encoder, recipe), source, recipe.test, progress=True)
    shares = accuracy.shares()
    if accelerator.is_main_process:
        views = {"clips": recipe.test.clips, "crops": recipe.test.crops, "videos": accuracy.videos}
        save_json(shares | views | {"unreadable": accuracy.unreadable}, Path(recipe.loop.out) / "test.json")
        print(f"{accuracy.videos} videos, {recipe.test.clips} clips x {recipe.test.crops} crops")
        print(f"{'tokens':>8}  {'top-1':>6}  {'top-5':>6}")
        for count in accuracy.top1:
            print(f"{count:>8}  {shares[f'top1_{count}']:6.1%}  {shares[f'top5_{count}']:6.1%}")
        if accuracy.unreadable:
            print(f"{len(accuracy.unreadable)} videos could not be read: see {recipe.loop.out}/test.json")
    return shares


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    measured = {"test": ("measure the finished run by the recipe's test, instead of training", test)}
    return run_stage(FinetuneRecipe, FinetuneStage, "training.finetune", __doc__, argv, others=measured)


if __name__ == "__main__":
    sys.exit(main())
