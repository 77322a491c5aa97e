"""Multiply-accumulates of the parts of a training step, from sizes alone: no weights, no data, no network.

One product of a weight and a value counts once, attention's two products included, as in the paper's GFLOPs
column; norms, activations and the optimiser do not. Backward, a trained part takes two products for each one
forward (for its inputs and for its weights), a frozen one that passes a gradient on takes one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from encoder.config import FluxViTConfig
from encoder.cost import encoder_macs
from encoder.errors import ConfigError
from llm_bridge.model_files.checks import check_folder
from llm_bridge.text_encoders.mobileclip import MobileClipConfig
from llm_bridge.text_encoders.text_towers import WEIGHT_FILES
from training.distill.efficientnet import EfficientNetLiteSource
from training.distill.image_teachers import ImageEncoderSource
from training.distill.internvideo2 import InternVideo2Config


@dataclass(frozen=True)
class Part:
    """What one part of a model does for one sample, in multiply-accumulates."""

    name: str
    forward: float
    backward: float = 0.0

    @property
    def total(self) -> float:
        """Both passes."""
        return self.forward + self.backward


def trained(name: str, macs: float, *, recomputed: float = 0.0) -> Part:
    """A part that learns; recomputed: what gradient checkpointing does a second time."""
    return Part(name, macs + recomputed, 2 * macs)


def joined(name: str, parts: Iterable[Part]) -> Part:
    """Several parts as one."""
    parts = list(parts)
    return Part(name, sum(part.forward for part in parts), sum(part.backward for part in parts))


def mean_parts(cases: Sequence[Sequence[Part]]) -> tuple[Part, ...]:
    """Equally likely cases, each with the same parts, as their mean."""
    mean = []
    for same in zip(*cases, strict=True):
        whole = joined(same[0].name, same)
        mean.append(Part(whole.name, whole.forward / len(cases), whole.backward / len(cases)))
    return tuple(mean)


# -- vision -------------------------------------------------------------------------------------------------


def block_macs(dim: int, mlp_dim: int, depth: int, tokens: float) -> float:
    """Pre-norm transformer blocks on `tokens` tokens that all see each other."""
    return depth * ((4 * dim * dim + 2 * dim * mlp_dim) * tokens + 2 * tokens * tokens * dim)


def patch_macs(dim: int, patch_size: int, patches: int) -> int:
    """A linear map of every patch."""
    return patches * 3 * patch_size**2 * dim


def pool_macs(config: FluxViTConfig, keep: int) -> int:
    """One attention pooling of FluxViT over `keep` tokens and cls."""
    return encoder_macs(config, 0, keep, pool=True) - encoder_macs(config, 0, keep)


def decoder_macs(in_dim: int, out_dim: int, kind: str) -> int:
    """One decoder of Flux-UMT per token: a linear map, of kind "mlp" with another in front."""
    return in_dim * out_dim + (in_dim * in_dim if kind == "mlp" else 0)


@dataclass(frozen=True)
class TeacherSizes:
    """What a student needs to know of its teacher, whose work for one clip is `forward`."""

    forward: float
    layer_dims: tuple[int, ...]
    final_dim: int
    has_cls: bool


def internvideo2(config: InternVideo2Config, layers: int, patches: int, chosen: int) -> TeacherSizes:
    """InternVideo2 that embeds all patches and runs its blocks and pooling on `chosen` of them."""
    dim, tokens = config.embed_dim, chosen + 1
    pool = 2 * tokens * dim**2 + dim**2 + 2 * tokens * dim + dim * config.clip_embed_dim
    forward: float = patch_macs(dim, config.patch_size, patches) + pool
    forward += block_macs(dim, config.mlp_dim, config.depth, tokens)
    return TeacherSizes(forward, (dim,) * layers, config.clip_embed_dim, True)


# EfficientNet-Lite: side it was made for, multiply-accumulates at it, channels of the compared layers.
LITE: dict[str, tuple[int, float, tuple[int, int]]] = {
    "lite0": (224, 385e6, (112, 320)),
    "lite1": (240, 600e6, (112, 320)),
    "lite2": (260, 860e6, (120, 352)),
    "lite3": (280, 1.383e9, (136, 384)),
    "lite4": (300, 2.553e9, (160, 448)),
}
LITE_FINAL = 1280


def efficientnet(source: EfficientNetLiteSource, frames: int, resolution: int) -> TeacherSizes:
    """EfficientNet-Lite on every frame; its cost grows with the area. Raises ConfigError."""
    if source.size not in LITE:
        raise ConfigError(f"efficientnet.size must be lite0 to lite4, not {source.size!r}.")
    side, macs, layers = LITE[source.size]
    share = ((source.resolution or resolution) / side) ** 2
    return TeacherSizes(frames * macs * share, layers, LITE_FINAL, False)


def image_encoder(source: ImageEncoderSource, frames: int, side: int) -> TeacherSizes:
    """A Vision Transformer on every frame of `side` x `side` student patches; raises ConfigError."""
    config = known_config(source.model, "teacher.image_encoder.model")
    config = getattr(config, "vision_config", config)
    patch = int(config.patch_size)
    tokens = side**2 if source.resolution is None else (source.resolution // patch) ** 2
    dim = config.hidden_size
    mlp = getattr(config, "intermediate_size", None) or 4 * dim
    one = patch_macs(dim, patch, tokens) + block_macs(dim, mlp, config.num_hidden_layers, tokens + 1)
    layers = len(source.layers) if source.layers else source.count
    return TeacherSizes(frames * one, (dim,) * layers, dim, False)


# -- text ---------------------------------------------------------------------------------------------------

# Sizes of language models that recipes name, so that counting needs no hub.
LLMS: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2-7B-Instruct": {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    },
    "Qwen/Qwen2.5-1.5B-Instruct": {
        "model_type": "qwen2",
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "HuggingFaceTB/SmolLM2-135M-Instruct": {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
}
LLMS["Qwen/Qwen2.5-7B-Instruct"] = LLMS["Qwen/Qwen2-7B-Instruct"]
# MiniLM, the tower of recipes that name none: width, MLP width, blocks.
MINILM_SIZES = (384, 1536, 6)


@dataclass(frozen=True)
class LlmSizes:
    """weights: of the linear maps between embedding and head. linears: (in, out) of each by its name.
    attention: products per pair of positions, of which a position sees itself and those before it."""

    hidden: int
    vocabulary: int
    weights: int
    attention: int
    linears: tuple[tuple[str, int, int], ...]

    @staticmethod
    def of(name: str) -> LlmSizes:
        """Of a hub id in LLMS or in the hub's cache, or of a folder; raises ConfigError for any other.

        Built without memory for its weights. Of a mixture of experts all are counted.
        """
        from transformers import AutoConfig, AutoModelForCausalLM

        sizes = dict(LLMS.get(name, {}))
        if sizes:
            config: Any = AutoConfig.for_model(sizes.pop("model_type"), **sizes)
        else:
            config = known_config(name, "the language model")
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        outside = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
        weights = sum(p.numel() for p in model.parameters() if p.ndim >= 2 and id(p) not in outside)
        linears = tuple(
            (path, module.in_features, module.out_features)
            for path, module in model.named_modules()
            if isinstance(module, nn.Linear) and id(module.weight) not in outside
        )
        text = config.get_text_config()
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        attention = text.num_hidden_layers * text.num_attention_heads * width
        return LlmSizes(text.hidden_size, text.vocab_size, weights, attention, linears)

    def part(self, tokens: float, labelled: float, *, recomputed: bool) -> Part:
        """A frozen model between trained parts: forward over `tokens` positions, scores at `labelled` ones,
        and backward through both to the inputs (attention's products have two inputs with a gradient)."""
        weights = self.weights * tokens
        attention = self.attention * tokens * tokens
        head = self.hidden * self.vocabulary * labelled
        again = weights + attention if recomputed else 0.0
        return Part(
            f"language model, {tokens:.0f} positions",
            weights + attention + head + again,
            weights + 2 * attention + head,
        )

    def adapter(self, rank: int, targets: Sequence[str]) -> int:
        """LoRA's own weights: `rank` times (in + out) of every linear map that `targets` names."""
        everywhere = tuple(targets) == ("all-linear",)
        return sum(
            rank * (wide + deep)
            for path, wide, deep in self.linears
            if everywhere or any(path == name or path.endswith("." + name) for name in targets)
        )


def text_tower_macs(source: str | None, tokens: float) -> float:
    """One text of `tokens` tokens; a weight file counts as MobileCLIP-B. Raises ConfigError."""
    if source is None:
        dim, mlp, depth = MINILM_SIZES
        return block_macs(dim, mlp, depth, tokens)
    if source.endswith(WEIGHT_FILES):
        clip = MobileClipConfig()
        return block_macs(clip.dim, clip.mlp_dim, clip.layers, tokens) + clip.dim * clip.projection
    config = known_config(source, "text_tower")
    config = getattr(config, "text_config", config)
    return block_macs(config.hidden_size, config.intermediate_size, config.num_hidden_layers, tokens)


def text_dim(source: str | None) -> int:
    """Width of a tower's embedding; raises ConfigError."""
    if source is None:
        return MINILM_SIZES[0]
    if source.endswith(WEIGHT_FILES):
        return MobileClipConfig().projection
    config = known_config(source, "text_tower")
    return int(getattr(config, "projection_dim", None) or getattr(config, "text_config", config).hidden_size)


def known_config(name: str, where: str) -> Any:
    """A Hugging Face configuration from a folder or from the hub's cache, never from the network."""
    from transformers import AutoConfig

    try:
        if Path(name).is_dir():
            check_folder(Path(name))
        return AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        kept = ", ".join(LLMS) if where == "the language model" else "none"
        raise ConfigError(
            f"The sizes of {name} ({where}) are not on this machine: name a folder with its config.json "
            f"(known by name: {kept})."
        ) from error


def projector_part(layers: int, in_dim: int, out_dim: int, tokens: float, *, learns: bool) -> Part:
    """The projector; the frozen encoder in front of it takes no gradient."""
    first, rest = in_dim * out_dim * tokens, (layers - 1) * out_dim * out_dim * tokens
    return Part("projector", first + rest, first + 2 * rest if learns else 0.0)


def read_encoder(values: Mapping[str, Any], size: FluxViTConfig) -> FluxViTConfig:
    """A size with some settings changed; raises ConfigError for unknown ones."""
    return FluxViTConfig.from_dict({**size.to_dict(), **values})


def config_in(folder: str) -> FluxViTConfig | None:
    """The configuration of a saved encoder, or of a saved model's encoder; None where nothing is saved.

    Raises ConfigError for a file that is neither.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"Cannot read the encoder configuration {path}: {error}.") from error
    return FluxViTConfig.from_dict(values.get("encoder", values))
