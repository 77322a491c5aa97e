"""Stock video models of transformers (SmolVLM2 and others) taken apart: a tower and a language model.

    model = load_stock("HuggingFaceTB/SmolVLM2-500M-Video-Instruct")
    VideoChat(model)

The kind is read from the folder's config.json. Pieces are driven one by one, so that the selection stands
between them, and a prompt's KV is kept and continued as for any other language model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from encoder.errors import ConfigError, ModelError
from llm_bridge.adapters import without_adapters
from llm_bridge.batch_invariance import make_batch_invariant
from llm_bridge.llm import LanguageModel, Quantize, cache_argument, load_pretrained
from llm_bridge.model_files.checks import open_settings
from llm_bridge.quantized import KINDS, quantize_linear
from llm_bridge.towers.measured_plans import measured_plan
from llm_bridge.towers.stock_tower import StockTower
from llm_bridge.towers.tower import Stage

# What is no language model: left in 16 bit, since the tower is small, and its widths do not suit 4 bit.
TOWERS = (
    *("model.visual", "model.vision_tower", "model.vision_model"),
    *("model.multi_modal_projector", "model.connector"),
)


class TextPart(nn.Module):
    """The language model of a stock video model as a causal language model of its own.

    extra rows of a prefill are added behind its first layers (Qwen3-VL's deepstack).
    """

    def __init__(self, decoder: nn.Module, head: nn.Module, generation_config: Any) -> None:
        super().__init__()
        self.decoder, self.head = decoder, head
        self.config: Any = decoder.config
        self.generation_config = generation_config
        self._cache_argument = cache_argument(decoder)

    def get_input_embeddings(self) -> nn.Module:
        """The embedding table."""
        return self.decoder.get_input_embeddings()  # type: ignore[operator]

    def get_output_embeddings(self) -> nn.Module:
        """The layer of the logits."""
        return self.head

    def set_attn_implementation(self, name: str) -> None:
        """As of a model of transformers."""
        self.decoder.set_attn_implementation(name)  # type: ignore[operator]

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = True,
        logits_to_keep: int = 0,
        extra: Tensor | None = None,
        places: Tensor | None = None,
    ) -> Any:
        """Logits of the last positions. extra: (rows, n, D), one row per True of places (B, L)."""
        from transformers.modeling_outputs import CausalLMOutputWithPast

        options: dict[str, Any] = {}
        if extra is not None:
            options = {"visual_pos_masks": places, "deepstack_visual_embeds": list(extra.unbind(1))}
        if past_key_values is None:
            from transformers import DynamicCache

            past_key_values = DynamicCache(config=self.config)
        out = self.decoder(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            **{self._cache_argument: past_key_values},
            **options,
        )
        hidden = out.last_hidden_state[:, -logits_to_keep:]
        return CausalLMOutputWithPast(logits=self.head(hidden))


class StockModel:
    """A stock video model behind VideoChat."""

    system: str | None = None

    def __init__(self, llm: LanguageModel, tower: StockTower) -> None:
        self.llm, self.tower = llm, tower

    @property
    def default_tokens(self) -> int:
        """Budget of a video where none is asked for."""
        return self.tower.default_tokens

    def revision(self) -> str:
        """A cache key."""
        return f"{self.llm.identity} {self.tower.digest()}"


def kinds() -> dict[str, type[StockTower]]:
    """Model types of transformers that are supported."""
    from llm_bridge.towers.llava_onevision import LlavaOnevisionTower
    from llm_bridge.towers.qwen2_5_vl import Qwen25VLTower
    from llm_bridge.towers.qwen3_vl import Qwen3VLTower
    from llm_bridge.towers.smolvlm import SmolVLMTower

    return {
        "smolvlm": SmolVLMTower,
        "qwen3_vl": Qwen3VLTower,
        "qwen2_5_vl": Qwen25VLTower,
        "llava_onevision": LlavaOnevisionTower,
    }


def model_type(folder: str | Path) -> str | None:
    """What a folder's config.json says it is; None where there is none, or it does not say."""
    try:
        kind = json.loads((Path(folder) / "config.json").read_text()).get("model_type")
    except (OSError, ValueError, AttributeError):
        return None
    return kind if isinstance(kind, str) else None


def stock_kind(folder: str | Path) -> str | None:
    """The model type of a folder that holds a stock video model, else None."""
    kind = model_type(folder)
    return kind if kind in kinds() else None


def no_video_model(name: str | Path, kind: str) -> ModelError:
    """For a model of transformers of another kind."""
    return ModelError(
        f"{name} is a {kind[:80]!r} model, which cannot be shown videos here: give a model of the kinds "
        f"{', '.join(kinds())} (`fluxchat models` lists some) or a FluxChat model's folder."
    )


def load_stock(
    name: str | Path,
    *,
    stage: Stage = "after",
    quantize: Quantize | None = None,
    adapters: Sequence[str | Path] = (),
    **options: Any,
) -> StockModel:
    """Load a stock video model for use with frozen weights.

    name: hub id or folder. stage: when cells are dropped. The rest, and options, as `load_llm`. Raises
    ModelError or ConfigError: one sentence, what was wrong and what to do.
    """
    from transformers import AutoModelForImageTextToText

    if stage not in ("before", "after"):
        raise ConfigError(f"select must be 'before' or 'after', not {stage!r}.")
    settings = open_settings(name)  # before gigabytes of another kind are downloaded
    if stock_kind(settings) is None:
        raise no_video_model(name, model_type(settings) or "nameless")
    model, tokenizer, folder = load_pretrained(
        name,
        AutoModelForImageTextToText,
        what="the video model",
        quantize=quantize,
        adapters=adapters,
        not_quantised=TOWERS,
        **options,
    )
    base = without_adapters(model)
    tower = kinds()[base.config.model_type](base, folder, stage)
    tower.plan_table = measured_plan(name, stage, tower.space)
    part = TextPart(_decoder(base), base.get_output_embeddings(), getattr(base, "generation_config", None))
    if quantize in KINDS:
        quantize_linear(part, quantize, merged=bool(adapters))
    make_batch_invariant(part)
    llm = LanguageModel(part.eval(), tokenizer, str(name), quantize, tuple(map(str, adapters)), tower.axes)
    llm.check()
    return StockModel(llm, tower)


def _decoder(model: Any) -> nn.Module:
    """The transformer that reads embeddings, whatever the model calls it."""
    inner = model.model
    return next(getattr(inner, name) for name in ("text_model", "language_model") if hasattr(inner, name))
