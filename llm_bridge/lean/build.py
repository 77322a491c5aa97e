"""The lean form of a language model of transformers, where it has the usual shape.

Which models have it is decided by name and by structure: each class of the list is compared with transformers
in the tests, and any module that is not what it should be leaves the model to transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from llm_bridge.batch_invariance import NAME, RowInvariantLinear
from llm_bridge.lean.products import PackedProduct, PlainProduct, packs
from llm_bridge.lean.rotary import Rotary
from llm_bridge.lean.step import LeanLayer, LeanModel, Product
from llm_bridge.quantized import QuantizedLinear, joined_product

LAYERS = frozenset(
    {
        *("LlamaDecoderLayer", "MistralDecoderLayer", "SmolLM3DecoderLayer"),
        *("Qwen2DecoderLayer", "Qwen3DecoderLayer"),
        *("Qwen2_5_VLDecoderLayer", "Qwen3VLTextDecoderLayer"),
    }
)
# Their frequencies do not depend on the longest position so far.
ROTARY = frozenset({"default", "linear", "llama3", "yarn", "mrope"})
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")


def lean_model(model: Any) -> tuple[LeanModel, Rotary] | None:
    """The lean form of a causal language model of transformers, and its positions; None where it has none.

    On CPUs the weights are packed, which takes their memory once more; elsewhere they are the model's own.
    """
    decoder, head = _decoder(model), model.get_output_embeddings()
    if decoder is None or not _usual(model, decoder, head):
        return None
    table = decoder.embed_tokens.weight
    with torch.inference_mode(False), torch.no_grad():
        layers = [_layer(layer, decoder.config, number) for number, layer in enumerate(decoder.layers)]
        attention = decoder.layers[0].self_attn
        width = attention.head_dim
        lean = LeanModel(
            embedding=table.detach(),
            layers=layers,
            norm=decoder.norm.weight.detach(),
            head=_product([head]),
            eps=decoder.norm.variance_epsilon,
            heads=attention.q_proj.out_features // width,
            groups=attention.k_proj.out_features // width,
            width=width,
        )
        return lean, Rotary(decoder.rotary_emb, table[:1].detach())


def _decoder(model: Any) -> Any:
    """The module that holds the layers, without the head."""
    wanted = ("layers", "norm", "rotary_emb", "embed_tokens")
    return next((m for m in model.modules() if all(hasattr(m, name) for name in wanted)), None)


def _usual(model: Any, decoder: Any, head: Any) -> bool:
    config = decoder.config
    parameters = list(model.parameters())
    one_place = len({(p.device, p.dtype) for p in parameters if p.is_floating_point()}) == 1
    return (
        bool(decoder.layers)
        and one_place
        and not any(p.is_meta for p in parameters)
        and not any(hasattr(module, "_hf_hook") for module in model.modules())
        and _attends_as_here(model)
        and type(decoder.embed_tokens) is nn.Embedding
        and _is_linear(head)
        and _rotary_type(decoder.rotary_emb) in ROTARY
        and all(map(_usual_layer, decoder.layers))
        and _is_norm(decoder.norm)
        and all(
            _is_norm(norm) and norm.variance_epsilon == decoder.norm.variance_epsilon
            for layer in decoder.layers
            for norm in _norms(layer)
        )
        and getattr(config, "hidden_act", "silu") == "silu"
    )


def _attends_as_here(model: Any) -> bool:
    return model.config.get_text_config()._attn_implementation in (NAME, "sdpa")


def _usual_layer(layer: Any) -> bool:
    if type(layer).__name__ not in LAYERS:
        return False
    attention, mlp = layer.self_attn, layer.mlp
    children = {name for name, _ in attention.named_children()} - {"rotary_emb"}
    normed = {"q_norm", "k_norm"}
    return (
        children in (set(_PROJECTIONS), {*_PROJECTIONS, *normed})
        and all(_is_linear(getattr(attention, name)) for name in _PROJECTIONS)
        and all(_is_linear(getattr(mlp, name, None)) for name in _MLP)
        and _same_bias([getattr(attention, name) for name in _PROJECTIONS[:3]])
        and _same_bias([getattr(mlp, name) for name in _MLP[:2]])
        and attention.scaling == attention.head_dim**-0.5
    )


def _is_linear(module: Any) -> bool:
    return type(module) in (nn.Linear, RowInvariantLinear) or isinstance(module, QuantizedLinear)


def _is_norm(module: Any) -> bool:
    return type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")


def _same_bias(modules: Sequence[Any]) -> bool:
    return len({module.bias is None for module in modules}) == 1


def _norms(layer: Any) -> list[Any]:
    found = [layer.input_layernorm, layer.post_attention_layernorm]
    if hasattr(layer.self_attn, "q_norm"):
        found += [layer.self_attn.q_norm, layer.self_attn.k_norm]
    return found


def _rotary_type(rotary: Any) -> str:
    return str(getattr(rotary, "rope_type", "unknown"))


def _layer(layer: Any, config: Any, number: int) -> LeanLayer:
    attention, mlp = layer.self_attn, layer.mlp
    norm = None
    if hasattr(attention, "q_norm"):
        counts = (
            attention.q_proj.out_features // attention.head_dim,
            attention.k_proj.out_features // attention.head_dim,
        )
        weights = (attention.q_norm.weight.detach(), attention.k_norm.weight.detach())
        norm = torch.cat([weight.expand(count, -1) for weight, count in zip(weights, counts, strict=True)])
    return LeanLayer(
        attention_norm=layer.input_layernorm.weight.detach(),
        qkv=_product([attention.q_proj, attention.k_proj, attention.v_proj]),
        heads_norm=norm,
        rotates=bool(getattr(attention, "use_rope", True)),
        window=_window(attention, config, number),
        out=_product([attention.o_proj]),
        mlp_norm=layer.post_attention_layernorm.weight.detach(),
        gate_up=_product([mlp.gate_proj, mlp.up_proj]),
        down=_product([mlp.down_proj]),
    )


def _window(attention: Any, config: Any, number: int) -> int | None:
    """Positions that a layer sees, the newest among them; None for all."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and kinds[number] != "sliding_attention":
        return None
    window = getattr(config, "sliding_window", None)
    return int(window) if window else None


def _product(modules: Sequence[Any]) -> Product:
    """The products of several layers on the same rows, side by side, as one."""
    if any(isinstance(module, QuantizedLinear) for module in modules):
        return _few_bits(modules)
    biases = [module.bias.detach() for module in modules if module.bias is not None]
    bias = torch.cat(biases) if biases else None
    weights = [module.weight.detach() for module in modules]
    if packs(weights[0]):
        return PackedProduct(torch.cat(weights), bias)
    if len(weights) == 1:
        return PlainProduct(weights[0], bias)
    joined = torch.cat(weights)
    # The modules read the joined weights from now on: they are not held twice.
    for module, part in zip(modules, joined.split([len(weight) for weight in weights]), strict=True):
        module.weight.data = part
    return PlainProduct(joined, bias)


def _few_bits(modules: Sequence[Any]) -> Product:
    """As `_product`, for layers of which some or all are quantised."""
    layers = [module for module in modules if isinstance(module, QuantizedLinear)]
    if len(layers) == len(modules):
        return joined_product(layers)
    parts = [_product([module]) for module in modules]
    return lambda rows: torch.cat([part(rows) for part in parts], dim=1)
