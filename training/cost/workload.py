"""A recipe as work: which parts of which models run how often, without opening weights or data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from encoder.config import FluxViTConfig
from encoder.cost import encoder_macs
from training.chat_lora import LoraRecipe
from training.chat_stage1 import Stage1Recipe
from training.clip import ClipRecipe
from training.cost.macs import (
    LlmSizes,
    Part,
    TeacherSizes,
    decoder_macs,
    efficientnet,
    image_encoder,
    internvideo2,
    joined,
    mean_parts,
    patch_macs,
    pool_macs,
    projector_part,
    text_dim,
    text_tower_macs,
    trained,
)
from training.cost.recipe_facts import (
    Given,
    Kind,
    count_samples,
    count_steps,
    find_encoder,
    model_of,
    stage_of,
)
from training.data.chat_batches import ChatInput, ChatRecipe
from training.data.clip_batches import still_grid
from training.data.corpora import corpora
from training.data.flexible_grids import FlexibleGrid
from training.distill.internvideo2 import InternVideo2Config
from training.finetune import FinetuneRecipe
from training.models.clip_model import EncoderSource
from training.projector_warmup import ProjectorWarmupRecipe
from training.trainer.recipe import build, read_values
from training.umt import UmtRecipe

CAPTION_TOKENS = 32  # of a caption, and around it
CONVERSATION_TOKENS = 256  # of the questions and answers about one video, and around them
Recipe = UmtRecipe | FinetuneRecipe | ClipRecipe | Stage1Recipe | LoraRecipe


@dataclass(frozen=True)
class Share:
    """Samples of one kind: how many in an epoch, and what one of them costs."""

    kind: Kind
    samples: int
    parts: tuple[Part, ...]

    @property
    def macs(self) -> float:
        """Of one sample."""
        return sum(part.total for part in self.parts)


@dataclass(frozen=True)
class Workload:
    """A whole run. steps: of the optimiser, each of `batch` samples; notes: what was taken for granted."""

    stage: str
    encoder: FluxViTConfig
    epochs: float
    batch: int
    steps: int
    shares: tuple[Share, ...]
    notes: tuple[str, ...]

    @property
    def samples(self) -> int:
        """In one epoch."""
        return sum(share.samples for share in self.shares)

    @property
    def macs_per_sample(self) -> float:
        """Mean over the kinds."""
        return sum(share.samples * share.macs for share in self.shares) / self.samples

    @property
    def macs(self) -> float:
        """Of the run."""
        return self.steps * self.batch * self.macs_per_sample


def read_workload(path: str | Path, overrides: Sequence[str] = (), given: Given | None = None) -> Workload:
    """The work of a recipe file; raises ConfigError when it is wrong or leaves something open."""
    path, given = Path(path), given or Given()
    values = read_values(path, overrides)
    name, kind = stage_of(values, path)
    recipe: Recipe = build(kind, values, str(path))
    if isinstance(recipe, UmtRecipe):
        work = _umt(recipe, path, given)
    elif isinstance(recipe, FinetuneRecipe):
        work = _finetune(recipe, path, given)
    elif isinstance(recipe, ClipRecipe):
        work = _clip(recipe, path, given)
    else:
        work = _chat(recipe, path, given)
    return replace(work, stage=name)


# -- stages -------------------------------------------------------------------------------------------------


def _over_grid(grid: FlexibleGrid, parts: Callable[[int, int], Sequence[Part]]) -> tuple[Part, ...]:
    """Mean over the grid's equally likely pairs of frames and resolution."""
    return mean_parts([parts(frames, resolution) for frames, resolution in grid.pairs()])


def _pass(config: FluxViTConfig, keep: int, *, recomputed: bool) -> Part:
    """A trained encoder on `keep` embedded tokens, pooled."""
    blocks = encoder_macs(config, 0, keep)
    return trained("", blocks + pool_macs(config, keep), recomputed=blocks if recomputed else 0)


def _umt(recipe: UmtRecipe, path: Path, given: Given) -> Workload:
    config = find_encoder(recipe.encoder, path, given)

    def parts(frames: int, resolution: int) -> list[Part]:
        patches = recipe.grid.count(frames, resolution)
        chosen = min(recipe.teacher_tokens, patches)
        teacher = _teacher(recipe, frames, resolution, patches, chosen)
        found = [
            Part("teacher (frozen)", teacher.forward),
            trained("student, patches", patch_macs(config.embed_dim, config.patch_size, patches)),
        ]
        decoders, aligners, kind = 0.0, 0.0, recipe.decoders.kind
        for number, count in enumerate(recipe.counts):
            keep = min(count, chosen)
            work = _pass(config, keep, recomputed=recipe.gradient_checkpointing)
            found.append(Part(f"student, {count} tokens", work.forward, work.backward))
            tokens = keep + teacher.has_cls
            decoders += sum(tokens * decoder_macs(config.embed_dim, dim, kind) for dim in teacher.layer_dims)
            decoders += decoder_macs(config.clip_embed_dim, teacher.final_dim, kind)
            aligners += config.clip_embed_dim**2 if number and recipe.count_alignment else 0
        found.append(trained("decoders", decoders + aligners))
        return found

    samples = count_samples(recipe.data, given.samples)
    total = sum(samples.values())
    return _workload(recipe, config, {"video": total}, {"video": _over_grid(recipe.grid, parts)}, [total])


def _teacher(recipe: UmtRecipe, frames: int, resolution: int, patches: int, chosen: int) -> TeacherSizes:
    source = recipe.teacher
    if source.internvideo2 is not None:
        known = source.internvideo2
        layers = len(known.layers) if known.layers else known.count
        return internvideo2(InternVideo2Config.from_dict(known.settings), layers, patches, chosen)
    if source.image_encoder is not None:
        return image_encoder(source.image_encoder, frames, resolution // recipe.grid.patch_size)
    assert source.efficientnet is not None
    return efficientnet(source.efficientnet, frames, resolution)


def _finetune(recipe: FinetuneRecipe, path: Path, given: Given) -> Workload:
    config = find_encoder(recipe.encoder, path, given)
    classes = recipe.num_classes or max(
        (corpora()[data.corpus].classes or 0 for data in recipe.data if data.corpus in corpora()), default=0
    )

    def parts(frames: int, resolution: int) -> list[Part]:
        patches = recipe.grid.count(frames, resolution)
        found = [trained("patches", patch_macs(config.embed_dim, config.patch_size, patches))]
        for number, count in enumerate(recipe.counts):
            work = _pass(config, min(count, patches), recomputed=recipe.gradient_checkpointing)
            aligned = config.clip_embed_dim**2 if number and recipe.align_weight else 0
            heads = trained("", classes * config.clip_embed_dim + aligned)
            found.append(joined(f"encoder, {count} tokens", (work, heads)))
        return found

    samples = count_samples(recipe.data, given.samples)
    total = sum(samples.values()) * recipe.repeats
    return _workload(recipe, config, {"video": total}, {"video": _over_grid(recipe.grid, parts)}, [total])


def _clip(recipe: ClipRecipe, path: Path, given: Given) -> Workload:
    config = find_encoder(recipe.encoder, path, given)
    tokens = given.text_tokens or CAPTION_TOKENS
    text = text_tower_macs(recipe.text_tower, tokens)
    align = config.clip_embed_dim * text_dim(recipe.text_tower)
    frozen = recipe.train == "projector"

    def parts(patches: int, keep: int) -> list[Part]:
        embedded = patch_macs(config.embed_dim, config.patch_size, patches)
        blocks, pool = encoder_macs(config, 0, keep), pool_macs(config, keep)
        if frozen:
            # The gradient ends at the pooling's keys and values: nearly all of its work is theirs.
            return [
                Part("encoder (frozen)", embedded + blocks),
                Part("pooling and alignment", pool + align, pool + 2 * align),
            ]
        again = blocks if recipe.gradient_checkpointing else 0
        return [
            trained("encoder", embedded + blocks, recomputed=again),
            trained("pooling and alignment", pool + align),
        ]

    def mean(grid: FlexibleGrid) -> tuple[Part, ...]:
        counts = [grid.count(*pair) for pair in grid.pairs()]
        video = mean_parts([parts(count, min(count, keep)) for count in counts for keep in recipe.keeps])
        tower = trained("text tower", text) if recipe.train_text else Part("text tower (frozen)", text)
        return (*video, tower)

    if recipe.world is not None:
        samples: dict[Kind, int] = {"video": given.samples or recipe.world.count}
    else:
        total = count_samples((*recipe.images, *recipe.videos), given.samples)
        samples = {kind: count for kind, count in total.items() if count}
    grids: dict[Kind, FlexibleGrid] = {"image": still_grid(recipe.video_grid), "video": recipe.video_grid}
    costs = {kind: mean(grids[kind]) for kind in samples}
    note = f"{tokens} tokens in a caption; a text met again is not computed again, which is not counted off"
    return _workload(recipe, config, samples, costs, list(samples.values()), note)


def _chat(recipe: Stage1Recipe | LoraRecipe, path: Path, given: Given) -> Workload:
    source = model_of(recipe, path)
    config = find_encoder(EncoderSource(init=source.encoder), path, given)
    text = given.text_tokens or (CAPTION_TOKENS if recipe.template == "plain" else CONVERSATION_TOKENS)
    llm = LlmSizes.of(source.llm)
    depth = config.depth if source.vision_depth is None else source.vision_depth
    depth = depth if depth >= 0 else config.depth + depth
    checkpointing = source.gradient_checkpointing
    learns, adapter = True, 0
    if isinstance(recipe, LoraRecipe):
        checkpointing, learns = recipe.gradient_checkpointing, recipe.train_projector
        adapter = llm.adapter(recipe.lora.rank, recipe.lora.targets)

    def parts(frames: int, view: ChatInput) -> list[Part]:
        patches = frames * (view.resolution // config.patch_size) ** 2
        keep = min(view.keep, patches)
        visual = keep
        if source.projector.kind == "merge":
            visual = min(keep, source.projector.tokens_per_frame * frames)
        tokens = min(visual + text, recipe.max_length)
        found = [
            Part("encoder (frozen)", encoder_macs(config.replace(depth=depth), patches, keep)),
            projector_part(source.projector.layers, config.embed_dim, llm.hidden, visual, learns=learns),
        ]
        if isinstance(recipe, ProjectorWarmupRecipe):  # words are compared, the language model does not run
            scores = visual * recipe.negatives * llm.hidden
            return [*found, Part("word scores", scores, scores)]
        part = llm.part(tokens, text, recomputed=checkpointing)
        found.append(replace(part, name="language model (frozen)"))
        if adapter:
            again = adapter * tokens if checkpointing else 0
            found.append(trained("adapter", adapter * tokens, recomputed=again))
        return found

    samples = count_samples(recipe.datasets, given.samples)
    costs = {
        kind: mean_parts([parts(1 if kind == "image" else view.frames, view) for view in recipe.drawn])
        for kind in samples
    }
    notes = (
        f"{text} tokens of text in a sample, all of them scored",
        "every clip encoded each time (feature_cache saves it in later epochs)",
    )
    return _workload(recipe, config, samples, costs, [sum(samples.values())], *notes)


def _workload(
    recipe: UmtRecipe | FinetuneRecipe | ClipRecipe | ChatRecipe,
    config: FluxViTConfig,
    samples: Mapping[Kind, int],
    parts: Mapping[Kind, Sequence[Part]],
    stepped: Sequence[int],
    *notes: str,
) -> Workload:
    shares = tuple(Share(kind, count, tuple(parts[kind])) for kind, count in samples.items())
    steps = count_steps(recipe.optim, recipe.loop.max_steps, stepped)
    return Workload("", config, recipe.optim.epochs, recipe.optim.batch_size, steps, shares, notes)
