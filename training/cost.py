"""What a recipe costs: multiply-accumulates of the whole run, and GPU hours at a stated utilisation.

    python -m training.cost training/recipes/umt_small.yaml
    python -m training.cost training/recipes/chat_lora.yaml --samples 600000 --gpus 16 --json

The recipe's own modules are built on torch's meta device, which has shapes and no memory, and run once,
forward and backward, at each shape; torch's FLOP counter counts. No weights, no data, no network, no GPU.
The default is eight A100, whose published bf16 peak is 312 TFLOPS. Matrix products count, attention's two
over the whole square even where it is causal; norms, activations and the optimiser do not, nor do decoding,
augmentation and evaluation: whether disk and CPUs keep up decides how much of the peak a run reaches.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from encoder.config import SIZES, FluxViTConfig
from encoder.errors import ConfigError
from encoder.fluxvit import FluxViT
from encoder.tokens import Grid, VisionTokens
from llm_bridge.adapters import quiet_peft
from llm_bridge.model import VLMConfig
from llm_bridge.model_files.checks import check_folder
from llm_bridge.projector import Projector
from llm_bridge.text_encoders.mobileclip import MobileClipText
from llm_bridge.text_encoders.text_towers import WEIGHT_FILES
from training.chat_lora import LoraRecipe, LoraSettings
from training.chat_stage1 import ModelSource, Stage1Recipe
from training.clip import ClipRecipe
from training.command_line import command_parser, run_command
from training.data.chat_batches import ChatInput, ChatRecipe
from training.data.clip_batches import still_grid
from training.data.corpora import corpora
from training.data.datasets import count_samples
from training.data.examples import Kind
from training.data.flexible_grids import FlexibleGrid
from training.distill.distill_heads import Decoders
from training.distill.efficientnet import EfficientNetLiteTeacher
from training.distill.image_teachers import FrameTeacher, ImageEncoderSource, ImageEncoderTeacher
from training.distill.internvideo2 import InternVideo2, InternVideo2Config, InternVideo2Teacher
from training.distill.teachers import spaced_layers
from training.finetune import FinetuneRecipe
from training.models.encoder_source import EncoderSource
from training.projector_warmup import ProjectorWarmupRecipe
from training.trainer.loop import total_steps
from training.trainer.recipe import build, check_stage, maker_of, read_values
from training.umt import TeacherSource, UmtRecipe

CAPTION_TOKENS = 32  # of a caption, and around it
CONVERSATION_TOKENS = 256  # of the questions and answers about one video, and around them
OPERATIONS = 2  # per multiply-accumulate, as TFLOPS count
GIGA = 1e9
META = torch.device("meta")

Recipe = UmtRecipe | FinetuneRecipe | ClipRecipe | Stage1Recipe | LoraRecipe
# Name and recipe of each stage.
RECIPES: dict[str, tuple[str, type[Any]]] = {
    "umt": ("Flux-UMT", UmtRecipe),
    "finetune": ("fine-tuning", FinetuneRecipe),
    "clip": ("Flux-CLIP", ClipRecipe),
    "projector_warmup": ("projector warm-up", ProjectorWarmupRecipe),
    "chat_stage1": ("chat, stage 1", Stage1Recipe),
    "chat_lora": ("chat, LoRA", LoraRecipe),
}
# Language models that recipes name, so that counting needs no hub.
LLM_FIELDS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "tie_word_embeddings",
)
LLMS: dict[str, tuple[Any, ...]] = {
    "Qwen/Qwen2-7B-Instruct": ("qwen2", 3584, 18944, 28, 28, 4, 152064, False),
    "Qwen/Qwen2.5-7B-Instruct": ("qwen2", 3584, 18944, 28, 28, 4, 152064, False),
    "Qwen/Qwen2.5-1.5B-Instruct": ("qwen2", 1536, 8960, 28, 12, 2, 151936, True),
    "HuggingFaceTB/SmolLM2-135M-Instruct": ("llama", 576, 1536, 30, 9, 3, 49152, True),
}
MINILM = ("bert", 384, 1536, 6, 12)  # the text tower of recipes that name none


# -- counting -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """What one part of a model does for one sample, in multiply-accumulates.

    backward: with what gradient checkpointing computes again.
    """

    name: str
    forward: float
    backward: float = 0.0

    @property
    def total(self) -> float:
        """Both passes."""
        return self.forward + self.backward

    def times(self, count: float, name: str) -> Part:
        """The same work done `count` times."""
        return Part(name, count * self.forward, count * self.backward)


def count(run: Callable[[], Tensor | Sequence[Tensor]]) -> Part:
    """The multiply-accumulates of `run`, and of a backward pass from those results that have a gradient."""
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:  # plain products, which the counter knows on every device
        results = run()
        forward = counter.get_total_flops()
        learnt = [x for x in ([results] if isinstance(results, Tensor) else results) if x.requires_grad]
        if learnt:
            torch.autograd.backward(learnt, [torch.empty_like(x) for x in learnt])
    return Part("", forward / OPERATIONS, (counter.get_total_flops() - forward) / OPERATIONS)


def total(name: str, parts: Iterable[Part]) -> Part:
    """Several parts as one."""
    parts = list(parts)
    return Part(name, sum(part.forward for part in parts), sum(part.backward for part in parts))


def mean_parts(cases: Sequence[Sequence[Part]]) -> tuple[Part, ...]:
    """Equally likely cases, each with the same parts, as their mean."""
    return tuple(
        total(same[0].name, same).times(1 / len(cases), same[0].name) for same in zip(*cases, strict=True)
    )


def values(*shape: int, grad: bool = False) -> Tensor:
    """A tensor without memory."""
    return torch.empty(*shape, device=META, requires_grad=grad)


def indices(*shape: int) -> Tensor:
    """Whole numbers without memory."""
    return torch.empty(*shape, device=META, dtype=torch.long)


# -- vision -------------------------------------------------------------------------------------------------


@cache
def meta_encoder(config: FluxViTConfig) -> FluxViT:
    """An encoder without memory for its weights, all of which have gradients."""
    with META:
        return FluxViT(config)


@cache
def embedding(config: FluxViTConfig, frames: int, resolution: int, *, learns: bool = True) -> Part:
    """Patches of one clip."""
    with torch.set_grad_enabled(learns):
        return count(lambda: meta_encoder(config).embed(values(1, 3, frames, resolution, resolution)))


@cache
def blocks(
    config: FluxViTConfig,
    tokens: int,
    *,
    learns: bool = True,
    checkpointing: bool = False,
    depth: int | None = None,
) -> Part:
    """All transformer blocks on `tokens` embedded patches and cls; the first, since all are alike, is run."""
    encoder = meta_encoder(config)
    encoder.recompute = "blocks" if checkpointing else "nothing"
    patches = values(1, tokens, config.embed_dim, grad=learns)

    def run() -> list[Tensor]:
        # On the position table's own grid, which needs no interpolation.
        out = encoder.encode(patches, encoder.pos_grid, indices(1, tokens), depth=1)
        return [out.packed, out.cls]

    with torch.set_grad_enabled(learns):
        return count(run).times(len(encoder.blocks[:depth]), "")


@cache
def pooling(config: FluxViTConfig, tokens: int, *, learns: bool = True, frozen_below: bool = False) -> Part:
    """One attention pooling of `tokens` tokens and cls. frozen_below: no gradient goes on to the blocks."""
    encoder = meta_encoder(config)
    grad = learns and not frozen_below
    vision = VisionTokens(
        values(tokens, config.embed_dim, grad=grad),
        values(1, config.embed_dim, grad=grad),
        (indices(tokens),),
        (encoder.pos_grid,),
    )
    with torch.set_grad_enabled(learns):
        return count(lambda: encoder.pool(vision, 0))


def one_pass(name: str, config: FluxViTConfig, tokens: int, *, checkpointing: bool) -> Part:
    """A trained encoder on `tokens` embedded tokens, pooled."""
    return total(name, (blocks(config, tokens, checkpointing=checkpointing), pooling(config, tokens)))


@cache
def linear(width: int, out: int) -> Part:
    """A trained linear map of one vector that has a gradient."""
    layer = nn.Linear(width, out, device=META)
    return count(lambda: layer(values(1, width, grad=True)))


def open_teacher(source: TeacherSource) -> InternVideo2Teacher | FrameTeacher:
    """The recipe's teacher without weights; raises ConfigError or ModelError."""
    with META:
        if (video := source.internvideo2) is not None:
            config = InternVideo2Config.from_dict(video.settings)
            layers = video.layers or spaced_layers(config.depth, video.count, video.interval)
            return InternVideo2Teacher(InternVideo2(config), layers)
        if (image := source.image_encoder) is not None:
            return image_encoder(image)
        assert source.efficientnet is not None
        return EfficientNetLiteTeacher(
            source.efficientnet.architecture(), resolution=source.efficientnet.resolution
        )


def image_encoder(source: ImageEncoderSource) -> ImageEncoderTeacher:
    """A Vision Transformer of Hugging Face; raises ConfigError where its configuration is not at hand."""
    from transformers import AutoModel

    config = known_config(source.model, "teacher.image_encoder.model")
    model: Any = AutoModel.from_config(config, attn_implementation="eager", trust_remote_code=False)
    model = getattr(model, "vision_model", model)
    layers = source.layers or spaced_layers(model.config.num_hidden_layers, source.count, source.interval)
    one = (1.0, 1.0, 1.0)  # pixel normalisation costs no products
    return ImageEncoderTeacher(model, layers, one, one, resolution=source.resolution)


@torch.no_grad()
def observation(
    teacher: InternVideo2Teacher | FrameTeacher, grid: Grid, resolution: int, chosen: int
) -> Part:
    """What a teacher does for one clip."""
    pixels = values(1, 3, grid.frames, resolution, resolution)
    if isinstance(teacher, InternVideo2Teacher):
        embedded = count(lambda: teacher.model.patch_embed(pixels))
        return total("", (embedded, encoded_by_internvideo2(teacher.model, chosen)))
    height, width = teacher.input_size(pixels, grid)
    one_frame = count(lambda: teacher.look(values(1, 3, height, width))[2])
    return one_frame.times(grid.frames, "")


@cache
def encoded_by_internvideo2(model: InternVideo2, tokens: int) -> Part:
    """Blocks and pooling of `tokens` embedded patches."""
    patches = values(1, tokens, model.config.embed_dim)
    return count(lambda: model.encode(patches, model.pos_grid, indices(1, tokens)).pooled)


# -- text ---------------------------------------------------------------------------------------------------


def config_of(sizes: tuple[Any, ...]) -> Any:
    """A Hugging Face configuration from the first of LLM_FIELDS."""
    from transformers import AutoConfig

    settings: dict[str, Any] = dict(zip(LLM_FIELDS, sizes, strict=False))
    return AutoConfig.for_model(**settings)


def known_config(name: str, where: str) -> Any:
    """A Hugging Face configuration from a folder or from the hub's cache, never from the network."""
    from transformers import AutoConfig

    try:
        if Path(name).is_dir():
            check_folder(Path(name))
        return AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        known = ", ".join(LLMS) if where == "the language model" else "none"
        raise ConfigError(
            f"The sizes of {name} ({where}) are not on this machine: name a folder with its config.json "
            f"(known by name: {known})."
        ) from error


@cache
def text_tower(source: str | None, tokens: int, *, learns: bool) -> tuple[Part, int]:
    """(one text of `tokens` tokens, width of its embedding); a weight file counts as MobileCLIP-B.

    Raises ConfigError.
    """
    from transformers import AutoModel

    ids, shapes = indices(1, tokens), []
    with META:
        if source is not None and source.endswith(WEIGHT_FILES):
            model: Any = MobileClipText()
        elif source is not None:
            model = AutoModel.from_config(known_config(source, "text_tower"), trust_remote_code=False)
        else:
            model = AutoModel.from_config(config_of(MINILM), trust_remote_code=False)
    model.requires_grad_(learns)

    def run() -> Tensor:
        if isinstance(model, MobileClipText):
            vectors = model(ids, indices(1))
        elif hasattr(model, "get_text_features"):
            features = model.get_text_features(input_ids=ids)
            vectors = features if isinstance(features, Tensor) else features.pooler_output
        else:
            vectors = model(input_ids=ids).last_hidden_state
        shapes.append(vectors.shape)
        return vectors

    return count(run), shapes[0][-1]


@cache
def language_model(name: str, lora: LoraSettings | None, checkpointing: bool) -> Any:
    """A frozen language model without memory for its weights, with or without adapters that learn.

    name: hub id in LLMS or in the hub's cache, or folder. Raises ConfigError for any other.
    """
    from transformers import AutoModelForCausalLM

    if name in LLMS:
        config: Any = config_of(LLMS[name])
    else:
        config = known_config(name, "the language model")
    with META:
        model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False).requires_grad_(False)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()  # transformers checkpoints in train mode only
        if lora is not None:
            with quiet_peft():
                from peft import get_peft_model
            model = get_peft_model(model, lora.config()).get_base_model()
    return model


def llm_width(model: Any) -> int:
    """Width of a language model's input embeddings."""
    return int(model.get_input_embeddings().weight.shape[1])


@cache
def reading(model: Any, positions: int, labelled: int) -> Part:
    """A language model over `positions` embeddings that have a gradient, and scores at `labelled` of them."""
    embedded = values(1, positions, llm_width(model), grad=True)
    mask = values(1, 1, positions, positions)  # of four dimensions: no other is made

    def run() -> Tensor:
        options = {"attention_mask": mask, "use_cache": False, "logits_to_keep": labelled}
        return model(inputs_embeds=embedded, **options).logits

    return count(run)


# -- what is known without weights or data ------------------------------------------------------------------


@dataclass(frozen=True)
class Assumptions:
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


def stage_of(settings: Mapping[str, Any], path: Path) -> tuple[str, type[Any]]:
    """Name and recipe of the stage that a file says it is of; raises ConfigError when it says none."""
    if "stage" not in settings:
        known = ", ".join(RECIPES)
        raise ConfigError(f"{path} does not say which stage's recipe it is: write stage: and one of {known}.")
    check_stage(settings["stage"], settings["stage"], str(path))
    return RECIPES[settings["stage"]]


def find_encoder(
    source: EncoderSource, path: Path, assumed: Assumptions, heirs: tuple[Path, ...] = ()
) -> FluxViTConfig:
    """The dimensions of a recipe's encoder. Weights to start from are not opened: their saved configuration
    says them, or the recipe beside `path` that writes them, or a size in their name, or --encoder.

    heirs: recipes that start from this one's result. Raises ConfigError when none does.
    """
    if assumed.encoder is not None:
        return SIZES[assumed.encoder]
    if source.init is None:
        return source.config()
    if (saved := saved_config(source.init)) is not None:
        return FluxViTConfig.from_dict(saved.get("encoder", saved))
    if (maker := maker_of(source.init, path, heirs)) is not None:
        before = build(EncoderSource, read_values(maker).get("encoder", {}), f"{maker}: encoder")
        return find_encoder(before, maker, assumed, (*heirs, maker))
    named = [size for size in SIZES if size in source.init]
    if len(named) == 1:
        return SIZES[named[0]]
    raise ConfigError(f"{source.init} is not there to say how large it is: name its size with --encoder.")


def find_model(recipe: Stage1Recipe | LoraRecipe, path: Path, heirs: tuple[Path, ...] = ()) -> ModelSource:
    """The model that a chat recipe trains: LoRA starts from a saved folder, or from that of a recipe beside.

    Raises ConfigError when neither is there.
    """
    if isinstance(recipe, Stage1Recipe):
        return recipe.model
    for folder in (Path(recipe.start), Path(recipe.start) / "model"):
        if (saved := saved_config(folder)) is not None:
            return ModelSource.like(VLMConfig.from_dict(saved), str(folder))
    maker = maker_of(recipe.start, path, heirs)
    if maker is None:
        raise ConfigError(
            f"{recipe.start} is not there to say what it starts from, and no recipe beside writes it."
        )
    settings = read_values(maker)
    before = build(stage_of(settings, maker)[1], settings, str(maker))
    if not isinstance(before, (Stage1Recipe, LoraRecipe)):
        raise ConfigError(f"{recipe.start} is the result of {maker}, which is no chat stage.")
    return find_model(before, maker, (*heirs, path))


def saved_config(folder: str | Path) -> dict[str, Any] | None:
    """The config.json of a folder; None where there is none. Raises ConfigError when it cannot be read."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"Cannot read the encoder configuration {path}: {error}.") from error


# -- stages -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Share:
    """Samples of one kind: how many in an epoch, and what one of them costs."""

    kind: Kind
    samples: int
    parts: tuple[Part, ...]


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
        """Mean over all samples."""
        of_kinds = (share.samples * sum(part.total for part in share.parts) for share in self.shares)
        return sum(of_kinds) / self.samples

    @property
    def macs(self) -> float:
        """Of the run."""
        return self.steps * self.batch * self.macs_per_sample


def read_workload(
    path: str | Path, overrides: Sequence[str] = (), assumed: Assumptions | None = None
) -> Workload:
    """The work of a recipe file; raises ConfigError when it is wrong or leaves something open."""
    path, assumed = Path(path), assumed or Assumptions()
    settings = read_values(path, overrides)
    name, kind = stage_of(settings, path)
    recipe: Recipe = build(kind, settings, str(path))
    if isinstance(recipe, UmtRecipe):
        work = _umt(recipe, path, assumed)
    elif isinstance(recipe, FinetuneRecipe):
        work = _finetune(recipe, path, assumed)
    elif isinstance(recipe, ClipRecipe):
        work = _clip(recipe, path, assumed)
    else:
        work = _chat(recipe, path, assumed)
    return replace(work, stage=name)


def _umt(recipe: UmtRecipe, path: Path, assumed: Assumptions) -> Workload:
    config = find_encoder(recipe.encoder, path, assumed)
    teacher, encoder = open_teacher(recipe.teacher), meta_encoder(config)
    with META:
        heads = Decoders(
            encoder, teacher.layer_dims, teacher.final_dim, len(recipe.num_tokens), recipe.decoders
        )

    @cache
    def decoding(number: int, tokens: int) -> Part:
        hidden = [values(1, 1 + tokens, config.embed_dim, grad=True) for _ in teacher.layer_dims]
        table = heads.positions(encoder.pos_grid, indices(1, tokens))
        layers = count(
            lambda: [
                heads.tokens(x, table, layer, number, cls=teacher.has_cls) for layer, x in enumerate(hidden)
            ]
        )
        if recipe.recompute_cheap or recipe.gradient_checkpointing:
            layers = replace(layers, backward=layers.backward + layers.forward)
        final = count(lambda: heads.clip(values(1, config.clip_embed_dim, grad=True), number))
        aligner = linear(config.clip_embed_dim, config.clip_embed_dim)
        return total("", (layers, final, *([aligner] if number and recipe.count_alignment else [])))

    def parts(frames: int, resolution: int) -> list[Part]:
        side = resolution // recipe.grid.patch_size
        grid = Grid(frames, side, side)
        chosen = min(recipe.teacher_tokens, grid.size)
        token_counts = [min(tokens, chosen) for tokens in recipe.num_tokens]
        return [
            replace(observation(teacher, grid, resolution, chosen), name="teacher (frozen)"),
            replace(embedding(config, frames, resolution), name="student, patches"),
            *(
                one_pass(
                    f"student, {name} tokens", config, tokens, checkpointing=recipe.gradient_checkpointing
                )
                for name, tokens in zip(recipe.num_tokens, token_counts, strict=True)
            ),
            total("decoders", (decoding(number, tokens) for number, tokens in enumerate(token_counts))),
        ]

    samples = sum(count_samples(recipe.data, assumed.samples).values())
    costs: dict[Kind, Sequence[Part]] = {"video": mean_parts([parts(*pair) for pair in recipe.grid.pairs()])}
    return _workload(recipe, config, {"video": samples}, costs)


def _finetune(recipe: FinetuneRecipe, path: Path, assumed: Assumptions) -> Workload:
    config = find_encoder(recipe.encoder, path, assumed)
    width = config.clip_embed_dim
    classes = recipe.num_classes or max(
        (corpora()[data.corpus].classes or 0 for data in recipe.data if data.corpus in corpora()), default=0
    )
    head, aligner = [linear(width, classes)] if classes else [], [linear(width, width)]

    def parts(frames: int, resolution: int) -> list[Part]:
        patches = recipe.grid.count(frames, resolution)
        passes = [
            one_pass("", config, min(tokens, patches), checkpointing=recipe.gradient_checkpointing)
            for tokens in recipe.num_tokens
        ]
        return [
            replace(embedding(config, frames, resolution), name="patches"),
            *(
                total(
                    f"encoder, {tokens} tokens",
                    (work, *head, *(aligner if number and recipe.align_weight else [])),
                )
                for number, (tokens, work) in enumerate(zip(recipe.num_tokens, passes, strict=True))
            ),
        ]

    samples = sum(count_samples(recipe.data, assumed.samples).values()) * recipe.repeats
    costs: dict[Kind, Sequence[Part]] = {"video": mean_parts([parts(*pair) for pair in recipe.grid.pairs()])}
    return _workload(recipe, config, {"video": samples}, costs)


def _clip(recipe: ClipRecipe, path: Path, assumed: Assumptions) -> Workload:
    config = find_encoder(recipe.encoder, path, assumed)
    tokens = assumed.text_tokens or CAPTION_TOKENS
    text, text_width = text_tower(recipe.text_tower, tokens, learns=recipe.train_text)
    text = replace(text, name="text tower" if recipe.train_text else "text tower (frozen)")
    head = linear(config.clip_embed_dim, text_width)
    learns = recipe.train == "all"

    def parts(frames: int, resolution: int, tokens: int) -> list[Part]:
        tokens = min(tokens, frames * (resolution // config.patch_size) ** 2)
        embedded = embedding(config, frames, resolution, learns=learns)
        run = blocks(config, tokens, learns=learns, checkpointing=learns and recipe.gradient_checkpointing)
        return [
            total("encoder" if learns else "encoder (frozen)", (embedded, run)),
            total("pooling and CLIP head", (pooling(config, tokens, frozen_below=not learns), head)),
            text,
        ]

    if recipe.world is not None:
        samples: dict[Kind, int] = {"video": assumed.samples or recipe.world.count}
    else:
        samples = count_samples((*recipe.images, *recipe.videos), assumed.samples)
    grids: dict[Kind, FlexibleGrid] = {"image": still_grid(recipe.video_grid), "video": recipe.video_grid}
    costs = {
        kind: mean_parts(
            [parts(*pair, tokens) for pair in grids[kind].pairs() for tokens in recipe.num_tokens]
        )
        for kind in samples
    }
    note = f"{tokens} tokens in a caption; a text met again is not computed again, which is not counted off"
    return _workload(recipe, config, samples, costs, note, apart=True)


def _chat(recipe: Stage1Recipe | LoraRecipe, path: Path, assumed: Assumptions) -> Workload:
    source = find_model(recipe, path)
    config = find_encoder(EncoderSource(init=source.encoder), path, assumed)
    text = assumed.text_tokens or (CAPTION_TOKENS if recipe.template == "plain" else CONVERSATION_TOKENS)
    if isinstance(recipe, LoraRecipe):
        name, learns = "language model (adapters learn)", recipe.train_projector
        llm = language_model(source.llm, recipe.lora, recipe.gradient_checkpointing)
    else:
        name, learns = "language model (frozen)", True
        llm = language_model(source.llm, None, source.gradient_checkpointing)
    width = llm_width(llm)
    with META:
        projector = Projector(source.projector.config(config, width)).requires_grad_(learns)

    def parts(frames: int, view: ChatInput) -> list[Part]:
        side = view.resolution // config.patch_size
        grid = Grid(frames, side, side)
        num_tokens = min(view.num_tokens, grid.size)
        vision = VisionTokens(
            values(num_tokens, config.embed_dim),
            values(1, config.embed_dim),
            (indices(num_tokens),),
            (grid,),
            summary=values(1, config.clip_embed_dim),
        )
        encoded = [
            embedding(config, frames, view.resolution, learns=False),
            blocks(config, num_tokens, learns=False, depth=source.vision_depth),
        ]
        if projector.summary is not None:
            encoded.append(pooling(config, num_tokens, learns=False))
        visual = projector.planned_tokens(num_tokens, frames)
        shared = [
            total("encoder (frozen)", encoded),
            replace(count(lambda: projector(vision)), name="projector"),
        ]
        if isinstance(recipe, ProjectorWarmupRecipe):  # words are compared, the language model does not run
            words = values(recipe.negatives, width)
            scores = count(lambda: values(visual, width, grad=True) @ words.T)
            return [*shared, replace(scores, name="word scores")]
        return [*shared, replace(reading(llm, min(visual + text, recipe.max_length), text), name=name)]

    samples = count_samples(recipe.datasets, assumed.samples)
    costs = {
        kind: mean_parts([parts(1 if kind == "image" else view.frames, view) for view in recipe.drawn])
        for kind in samples
    }
    notes = (
        f"{text} tokens of text in a sample, all of them scored",
        "every clip encoded each time (feature_cache saves it in later epochs)",
    )
    return _workload(recipe, config, samples, costs, *notes)


def _workload(
    recipe: UmtRecipe | FinetuneRecipe | ClipRecipe | ChatRecipe,
    config: FluxViTConfig,
    samples: Mapping[Kind, int],
    parts: Mapping[Kind, Sequence[Part]],
    *notes: str,
    apart: bool = False,
) -> Workload:
    """apart: each kind has steps of its own. What is left over of an epoch is not used."""
    optim = recipe.optim
    per_step = optim.batch_size // optim.micro_batch
    micro = [
        max(1, number // optim.micro_batch)
        for number in (samples.values() if apart else [sum(samples.values())])
    ]
    if len(micro) > 1:
        micro = [max(1, number // per_step) * per_step for number in micro]
    shares = tuple(Share(kind, number, tuple(parts[kind])) for kind, number in samples.items())
    steps = total_steps(sum(micro), optim, recipe.loop)
    return Workload("", config, optim.epochs, optim.batch_size, steps, shares, notes)


# -- the command --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """gpus of `tflops` each, of which `utilisation` is reached."""

    gpus: int = 8
    tflops: float = 312.0
    utilisation: float = 0.35

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise ConfigError(f"--gpus must be at least 1, not {self.gpus}.")
        if not 0 < self.tflops < math.inf:
            raise ConfigError(f"--tflops must be positive, not {self.tflops}.")
        if not 0 < self.utilisation <= 1:
            raise ConfigError(f"--utilisation must lie above 0 and up to 1, not {self.utilisation}.")

    def gpu_hours(self, macs: float) -> float:
        """Hours on one GPU."""
        return OPERATIONS * macs / (self.tflops * 1e12 * self.utilisation) / 3600


def facts(recipe: Path, work: Workload, machine: Machine) -> dict[str, Any]:
    """Everything the table shows, as plain values."""
    hours = machine.gpu_hours(work.macs)
    return {
        "recipe": str(recipe),
        "stage": work.stage,
        "encoder": {"embed_dim": work.encoder.embed_dim, "depth": work.encoder.depth},
        "epochs": work.epochs,
        "samples_per_epoch": work.samples,
        "batch_size": work.batch,
        "steps": work.steps,
        "parts": [
            {
                "samples": share.kind,
                "part": part.name,
                "forward_gmacs": part.forward / GIGA,
                "backward_gmacs": part.backward / GIGA,
                "share": part.total * share.samples / work.samples / work.macs_per_sample,
            }
            for share in work.shares
            for part in share.parts
        ],
        "gmacs_per_sample": work.macs_per_sample / GIGA,
        "macs": work.macs,
        "gpus": machine.gpus,
        "tflops": machine.tflops,
        "utilisation": machine.utilisation,
        "gpu_hours": hours,
        "hours": hours / machine.gpus,
        "notes": list(work.notes),
    }


def table(result: dict[str, Any]) -> str:
    """The facts as text."""
    width, depth = result["encoder"]["embed_dim"], result["encoder"]["depth"]
    lines = [
        f"{result['recipe']}: {result['stage']}, encoder {width} wide, {depth} blocks",
        f"{result['samples_per_epoch']:,} samples x {result['epochs']:g} epochs = {result['steps']:,} steps "
        f"of {result['batch_size']:,}",
        "",
    ]
    row = "{:7} {:32} {:>12} {:>12} {:>11}".format
    lines += [row("sample", "part", "forward", "backward", "of the run")]
    lines += [
        row(
            part["samples"],
            part["part"],
            f"{part['forward_gmacs']:,.2f}",
            f"{part['backward_gmacs']:,.2f}",
            f"{part['share']:.1%}",
        )
        for part in result["parts"]
    ]
    lines += [
        "Giga multiply-accumulates of one sample; " + f"{result['gmacs_per_sample']:,.2f} on average.",
        "",
        f"{result['macs']:.3g} multiply-accumulates in all: {_hours(result['gpu_hours'])} GPU hours at "
        f"{100 * result['utilisation']:g} % of {result['tflops']:g} TFLOPS, {_hours(result['hours'])} hours "
        f"on {result['gpus']} GPU{'s' if result['gpus'] > 1 else ''}.",
        *(f"Taken for granted: {note}." for note in result["notes"]),
    ]
    return "\n".join(lines)


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.2g}"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = command_parser("training.cost", __doc__)
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="a recipe of any stage")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change")
    parser.add_argument("--samples", type=int, metavar="N", help="samples in an epoch (the corpora's counts)")
    parser.add_argument("--encoder", metavar="SIZE", help="size of an encoder whose weights are not here")
    parser.add_argument("--text-tokens", type=int, metavar="N", help="tokens of one sample's text")
    parser.add_argument("--gpus", type=int, default=Machine.gpus, help="how many (8)")
    parser.add_argument("--tflops", type=float, default=Machine.tflops, help="peak of one GPU (312)")
    parser.add_argument(
        "--utilisation", type=float, default=Machine.utilisation, help="share of the peak reached (0.35)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return run_command(parser, run, argv, intermixed=True)


def run(args: argparse.Namespace) -> None:
    """Print what the recipe costs."""
    machine = Machine(args.gpus, args.tflops, args.utilisation)
    assumed = Assumptions(args.samples, args.encoder, args.text_tokens)
    result = facts(args.recipe, read_workload(args.recipe, args.overrides, assumed), machine)
    print(json.dumps(result, indent=2) if args.json else table(result))


if __name__ == "__main__":
    sys.exit(main())
