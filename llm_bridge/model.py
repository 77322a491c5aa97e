"""VideoLanguageModel: encoder, projector and frozen language model as one."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoder.budget import PlanRow, PlanTable
from encoder.checkpoint import build, load_encoder, read_tensors, save_json, save_tensors, weights_hash
from encoder.config import FluxViTConfig
from encoder.errors import ConfigError, ModelError
from encoder.fluxvit import FluxViT
from encoder.graphs import EncoderGraphs
from encoder.json_files import read_object
from encoder.tokens import Grid, VisionTokens
from llm_bridge.attention import packs
from llm_bridge.engines.support import chosen_engine
from llm_bridge.familiarity import FAMILIARITY, Familiarity
from llm_bridge.llm import LanguageModel, OnDownload, Quantize, default_device, default_dtype, load_llm
from llm_bridge.model_files.checks import first_line
from llm_bridge.packing import Packing, Weighting, branched_attention, label_weights, without_branches
from llm_bridge.projector import Projector, ProjectorConfig
from llm_bridge.prompt import IGNORE, PLACEHOLDER, Prompt, TimeSentence
from llm_bridge.towers.flux import FluxTower

DEFAULT_LLM = "HuggingFaceTB/SmolLM2-135M-Instruct"
ADAPTER = "adapter"  # subfolder of a model whose language model was tuned with LoRA


@dataclass(frozen=True)
class VLMConfig:
    """How the parts are put together.

    vision_depth: encoder blocks to run, negative counts from the end; None runs all. Which layer FluxViT chat
    reads is UNVERIFIED (VideoChat-Flash reads the last but one of its encoder: -1). summary_pool: the pooling
    head behind the projector's summary tokens. fit: how a frame of another shape becomes square. plan_table:
    measured best inputs per token count; empty: the default policy.
    """

    llm: str
    projector: ProjectorConfig
    encoder: FluxViTConfig
    vision_depth: int | None = None
    time_sentence: TimeSentence = "short"
    fit: Literal["squash", "crop"] = "squash"
    default_tokens: int = 1024
    system: str | None = None
    summary_pool: int = 1
    plan_table: tuple[PlanRow, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> VLMConfig:
        """The reverse; raises ConfigError for unknown or missing keys."""
        try:
            plain = dict(values)
            _check_values(plain)
            plain["projector"] = ProjectorConfig.from_dict(plain["projector"])
            plain["encoder"] = FluxViTConfig.from_dict(plain["encoder"])
            plain["plan_table"] = tuple(PlanRow(**row) for row in plain.get("plan_table", ()))
            return VLMConfig(**plain)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"The model's config.json does not fit this version: {first_line(error)}."
            ) from error


def _check_values(values: Mapping[str, Any]) -> None:
    """Raises ValueError for a value of a wrong type, or of a size that no model has."""
    sizes = {"default_tokens": (1, 10**7), "summary_pool": (0, 64), "vision_depth": (-256, 256)}
    for key, (least, most) in sizes.items():
        value = values.get(key)
        if value is not None and (type(value) is not int or not least <= value <= most):
            raise ValueError(f"{key} is {value!r:.40}, not a whole number from {least} to {most}")
    for key in ("llm", "time_sentence", "fit", "system"):
        if not isinstance(values.get(key), (str, type(None))):
            raise ValueError(f"{key} is no text")
    if not values["llm"]:
        raise ValueError("llm names no language model")
    for key, value in values["projector"].items():
        if key not in ("kind", "norm") and (type(value) is not int or not 0 <= value <= 2**17):
            raise ValueError(f"the projector's {key} is {value!r:.40}, not a whole number up to {2**17}")
    if values["projector"].get("layers", 2) > 64:
        raise ValueError("the projector has more than 64 layers")


class VideoLanguageModel(nn.Module):
    """Encoder, projector and language model; all frozen but what training unfreezes (the projector).

    familiarity: tells known videos from others, where the model came with it.
    """

    def __init__(self, config: VLMConfig, encoder: FluxViT, projector: Projector, llm: LanguageModel) -> None:
        super().__init__()
        if projector.config.out_dim != llm.hidden_size or projector.config.in_dim != encoder.config.embed_dim:
            raise ModelError(
                f"The projector maps {projector.config.in_dim} to {projector.config.out_dim}, but the "
                f"encoder is {encoder.config.embed_dim} and the language model {llm.hidden_size} wide: train "
                "one for this pair with `python -m training.chat_stage1`."
            )
        self.config = config
        self.encoder = encoder
        self.projector = projector
        self.language_model = llm.model
        self.llm = llm
        self.familiarity: Familiarity | None = None
        self._graphs = EncoderGraphs(encoder)

    def train(self, mode: bool = True) -> VideoLanguageModel:
        """Only what learns changes its way: projector, adapters' dropout.

        Encoder and language model stay as in evaluation, so that features depend on the clip alone. Layers of
        the language model that are to recompute in the backward pass do so in training only.
        """
        super().train(False)
        self.training = mode
        self.projector.train(mode)
        for name, module in self.language_model.named_modules():
            learns = name.rpartition(".")[0].endswith("lora_dropout")
            if learns or getattr(module, "gradient_checkpointing", False):
                module.training = mode
        return self

    @property
    def device(self) -> torch.device:
        """Where pixels go."""
        return self.encoder.cls_token.device

    @property
    def plan_table(self) -> PlanTable | None:
        """The measured plan table that came with the model."""
        return PlanTable.of(self.config.plan_table) if self.config.plan_table else None

    @property
    def tower(self) -> FluxTower:
        """Encoder and projector as what looks at videos."""
        return FluxTower(self)

    @property
    def default_tokens(self) -> int:
        """Budget of a video where none is asked for."""
        return self.config.default_tokens

    @property
    def system(self) -> str | None:
        """System prompt of conversations without one."""
        return self.config.system

    def encode(
        self,
        pixels: Sequence[Tensor],
        keep: Sequence[int | None],
        times_s: Sequence[Sequence[float]] | None = None,
        *,
        replay: bool = False,
        **selection: Any,
    ) -> VisionTokens:
        """Frozen encoder: clips (3, T, H, W), one K each -> the tokens the projector reads.

        replay: as CUDA graphs where that can be (see encoder/graphs.py); for answers, whose shapes recur.
        """
        encoder = self._graphs if replay else self.encoder
        with torch.no_grad():
            cls = self.encoder.cls_token
            clips = [clip.to(cls.device, cls.dtype) for clip in pixels]
            vision = encoder(clips, list(keep), depth=self.config.vision_depth, times_s=times_s, **selection)
            if self.projector.summary is None:
                return vision
            return dataclasses.replace(vision, summary=self.encoder.pool(vision, self.config.summary_pool))

    def project(self, vision: VisionTokens) -> list[Tensor]:
        """Embeddings (M_i, D) of every clip for the language model."""
        weight = self.projector.mlp[0].weight
        return self.projector(vision.to(weight.device, weight.dtype))

    def is_familiar(self, frames: Tensor) -> bool | None:
        """Whether frames, uint8 (T, H, W, 3), look like what it was trained on; None when it cannot tell."""
        if self.familiarity is None:
            return None
        return self.familiarity.is_familiar(self.encoder, frames, self.config.fit)

    def loss(
        self, prompts: Sequence[Prompt], vision: VisionTokens | None, weighting: Weighting = "token"
    ) -> Tensor:
        """Mean cross-entropy over the labelled positions of a batch, weighted as `label_weights` says.

        prompts: with labels; vision: the clips of all prompts in order (None when there is none). Scores are
        computed at labelled positions only.
        """
        visuals = self._visuals(vision)
        if any(prompt.branches for prompt in prompts) and not self._takes_branches(prompts):
            prompts, visuals = _apart(prompts, visuals)
        logits, targets = self._scores_at_labels(prompts, visuals)
        logits = logits.float()
        if weighting == "token":
            return F.cross_entropy(logits, targets)
        weights = label_weights(prompts, weighting).to(logits.device)
        return (F.cross_entropy(logits, targets, reduction="none") * weights).sum() / weights.sum()

    def _takes_branches(self, prompts: Sequence[Prompt]) -> bool:
        """Whether a mask keeps branches apart: states run through them, and a window counts places."""
        config = self.language_model.config.get_text_config()
        windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
        longest = max(len(prompt) for prompt in prompts)
        return self.llm.memory == "positions" and all(not window or window >= longest for window in windows)

    def _visuals(self, vision: VisionTokens | None) -> list[Tensor]:
        """Embeddings of every clip; without any, no rows of a blank one.

        So the loss of text alone depends on every trained parameter too: other processes wait for the
        gradients of each, and for this one's part of each sharded layer in the backward pass.
        """
        if vision is not None:
            return self.project(vision)
        width, device = self.encoder.config.embed_dim, next(self.projector.parameters()).device
        blank = VisionTokens(
            packed=torch.zeros(1, width, device=device),
            cls=torch.zeros(1, width, device=device),
            kept=(torch.zeros(1, dtype=torch.long, device=device),),
            grids=(Grid(1, 1, 1),),
            times_s=((0.0,),),
            summary=torch.zeros(1, self.encoder.config.clip_embed_dim, device=device),
        )
        return [embeddings[:0] for embeddings in self.project(blank)]

    def _scores_at_labels(self, prompts: Sequence[Prompt], visuals: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Scores (P, V) at positions that predict a label, and those labels (P,)."""
        if packs(self.language_model, max(len(prompt) for prompt in prompts)):
            return self._packed_scores(prompts, visuals)
        device, longest = self.llm.device, max(len(prompt) for prompt in prompts)
        ids = torch.full((len(prompts), longest), PLACEHOLDER, device=device)
        labels = torch.full_like(ids, IGNORE)
        real = torch.zeros_like(ids, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt.ids, device=device)
            labels[row, : len(prompt)] = torch.tensor(prompt.labels, device=device)
            real[row, : len(prompt)] = True
        embedded = self._embed(ids, (ids == PLACEHOLDER) & real, visuals)
        attention: dict[str, Tensor] = {}  # padding stands last, where nothing attends to it
        if any(prompt.branches for prompt in prompts):
            visible, positions = branched_attention(prompts, longest, embedded.dtype)
            attention = {"attention_mask": visible.to(device), "position_ids": positions.to(device)}
        following = labels.roll(-1, dims=1)
        following[:, -1] = IGNORE
        predicted = following != IGNORE
        inputs = {"inputs_embeds": embedded, **attention, **self.llm.beside_embeddings(ids)}
        return self.llm.scores_at(predicted, use_cache=False, **inputs), following[predicted]

    def _packed_scores(self, prompts: Sequence[Prompt], visuals: list[Tensor]) -> tuple[Tensor, Tensor]:
        """As `_scores_at_labels`, computed from one packed row without padding."""
        packing = Packing.of(prompts)
        ids = torch.tensor([packing.of_prompts([prompt.ids for prompt in prompts])])
        following = [(*prompt.labels[1:], IGNORE) for prompt in prompts]
        labels = torch.tensor([packing.of_prompts(following)])
        embedded = self._embed(ids, ids == PLACEHOLDER, visuals)
        predicted = labels != IGNORE
        scores = self.llm.scores_at(
            predicted,
            inputs_embeds=embedded,
            attention_mask=embedded.new_zeros(1, 1, 1, 1),  # of four dimensions: no other is made
            position_ids=torch.tensor([packing.positions]),
            packing=packing,
            use_cache=False,
        )
        return scores, labels[predicted]

    def _embed(self, ids: Tensor, is_visual: Tensor, visuals: list[Tensor]) -> Tensor:
        """Input embeddings (B, L, D) of token ids (B, L), with the visual ones where `is_visual` (B, L)."""
        embedded = self.llm.embed(ids.clamp_min(0).flatten()).view(*ids.shape, -1)
        if not visuals:
            return embedded
        return embedded.masked_scatter(is_visual.unsqueeze(-1), torch.cat(visuals).to(embedded))

    def revision(self, *, language: bool = True) -> str:
        """Hash of the encoder's weights, the projector's, and the language model's name and adapters: a cache
        key. language: False hashes the encoder alone."""
        if not language:
            return weights_hash(self.encoder)
        parts = f"{self.llm.identity} {weights_hash(self.encoder, self.projector)}"
        return hashlib.blake2b(parts.encode(), digest_size=12).hexdigest()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and the weights of encoder and projector, and its judge of familiarity if it has
        one; the language model is only named."""
        folder = Path(folder)
        save_tensors(self.encoder.state_dict(), folder / "encoder.safetensors")
        save_tensors(self.projector.state_dict(), folder / "projector.safetensors")
        if self.familiarity is not None:
            self.familiarity.save(folder / FAMILIARITY)
        save_json(self.config.to_dict(), folder / "config.json")

    @staticmethod
    def from_pretrained(
        folder: str | Path,
        *,
        llm: str | Path | None = None,
        encoder: str | os.PathLike[str] | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        device_map: str | dict[str, Any] | None = None,
        quantize: Quantize | None = None,
        adapters: Sequence[str | Path] = (),
        tuned: bool = True,
        engine: str | None = "local",
        encoder_device: str | torch.device | None = None,
        on_download: OnDownload | None = None,
    ) -> VideoLanguageModel:
        """Read what `save_pretrained` wrote and load the language model it names (or `llm`, or `encoder`).

        A folder with an `adapter` was tuned with LoRA, which applies unless `llm` replaces its base
        or `tuned` is False.
        dtype is the language model's; on CPUs the encoder and projector run in float32, elsewhere in dtype.
        encoder_device: where they run; default: device.
        Raises ModelError, CheckpointError or ConfigError: one sentence, what was wrong and what to do.
        """
        folder = model_folder(folder)
        try:
            config = VLMConfig.from_dict(read_object(folder / "config.json"))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or first_line(error)
            raise ModelError(
                f"{folder} is not a FluxChat model: cannot read its config.json ({reason})."
            ) from error
        chosen_engine(  # which may refuse, before anything is loaded
            llm or config.llm, engine, quantize=quantize, adapters=adapters, device_map=device_map
        )
        if encoder is None:
            vision = build(lambda: FluxViT(config.encoder), read_tensors(folder / "encoder.safetensors"))
        else:
            vision = load_encoder(encoder)
            config = dataclasses.replace(config, encoder=vision.config)
        projector = build(lambda: Projector(config.projector), read_tensors(folder / "projector.safetensors"))
        if tuned and llm is None and (folder / ADAPTER).is_dir():
            adapters = (folder / ADAPTER, *adapters)
        judge = folder / FAMILIARITY
        familiarity = Familiarity.read(judge, vision) if encoder is None and judge.exists() else None
        model = assemble(
            config,
            vision,
            projector,
            llm=llm,
            device=device,
            dtype=dtype,
            device_map=device_map,
            quantize=quantize,
            adapters=adapters,
            engine=engine,
            encoder_device=encoder_device,
            on_download=on_download,
        )
        model.familiarity = familiarity
        return model


def _apart(prompts: Sequence[Prompt], visuals: list[Tensor]) -> tuple[list[Prompt], list[Tensor]]:
    """Prompts without branches, and the visuals of each."""
    alone: list[Prompt] = []
    shown: list[Tensor] = []
    remaining = iter(visuals)
    for prompt in prompts:
        own = [next(remaining) for _ in prompt.spans]
        for branch in without_branches(prompt):
            alone.append(branch)
            shown += own
    return alone, [*shown, *remaining]  # one without rows, of text alone


def model_folder(folder: str | Path) -> Path:
    """The folder of the model itself: that of a training stage's output holds it as `model`."""
    folder = Path(folder)
    inside = not (folder / "config.json").exists() and (folder / "model" / "config.json").exists()
    return folder / "model" if inside else folder


@dataclass(frozen=True)
class PartTypes:
    """Floating type of each part's parameters."""

    language: torch.dtype
    encoder: torch.dtype
    projector: torch.dtype


def part_types(
    device: torch.device, language: torch.dtype | None = None, *, learns: bool = False
) -> PartTypes:
    """What the parts are kept in on a kind of device.

    language: the language model's own, default that of the hardware. On CPUs encoder and projector are in
    float32, elsewhere as the language model; a projector that learns is in float32 everywhere, since small
    steps vanish in half precision, and computes under autocast.
    """
    language = language or default_dtype(device)
    vision = torch.float32 if device.type == "cpu" else language
    return PartTypes(language, vision, torch.float32 if learns else vision)


def assemble(
    config: VLMConfig,
    encoder: FluxViT,
    projector: Projector | None,
    *,
    llm: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    types: PartTypes | None = None,
    encoder_device: str | torch.device | None = None,
    **llm_options: Any,
) -> VideoLanguageModel:
    """Load the language model and put the parts together, frozen and in eval mode.

    projector: None makes a fresh one, to be trained. types: default, those of the device (see `part_types`).
    encoder_device: of the encoder and the projector; default: the one device of all.
    Raises ModelError as `load_llm` does.
    """
    target = torch.device(device) if device is not None else default_device()
    sees = target if encoder_device is None else torch.device(encoder_device)
    if types is None:
        language_type = part_types(target, dtype).language
        types = part_types(sees, language_type, learns=projector is None)
    language = _load_language(str(llm or config.llm), device=target, dtype=types.language, **llm_options)
    if projector is None:
        fitted = dataclasses.replace(config.projector, out_dim=language.hidden_size)
        config, projector = dataclasses.replace(config, projector=fitted), Projector(fitted)
    model = VideoLanguageModel(
        config, encoder.to(sees, types.encoder), projector.to(sees, types.projector), language
    )
    return model.eval().requires_grad_(False)


def _load_language(name: str, **options: Any) -> LanguageModel:
    """As `load_llm`; of the shipped model's own it also says when it must be fetched again."""
    resolved = resolve_llm(name)
    try:
        return load_llm(resolved, **options)
    except ModelError as error:
        if resolved != name:
            from llm_bridge.assets.fetch import damage

            if reason := damage(Path(resolved), thorough=True):
                raise ModelError(
                    f"The language model in {resolved} is damaged ({reason}): run `fluxchat fetch`."
                ) from error
        raise


def resolve_llm(name: str) -> str:
    """The shipped model's language model from the local cache, any other name unchanged."""
    if name != DEFAULT_LLM:
        return name
    from llm_bridge.assets.fetch import default_llm_path

    return str(default_llm_path())
