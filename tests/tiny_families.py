"""A tiny random model of each family of language models, with the byte-level tokenizer of `tiny_llms`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests import tiny_llms

DEFAULT = object()  # instead of a common value

COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "initializer_range": 0.3,
}
WINDOW = 24  # shorter than the prompts of the tests, which so look beyond it
WINDOWED: dict[str, Any] = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LOCAL: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
LATENT: dict[str, Any] = {
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16},
    **{
        "v_head_dim": 16,
        "head_dim": DEFAULT,
        "num_key_value_heads": 4,
        "first_k_dense_replace": 1,
        "n_routed_experts": 4,
    },
    **{"num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1},
}
DELTA: dict[str, Any] = {
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16},
    **{"linear_value_head_dim": 16, "linear_conv_kernel_dim": 4, "partial_rotary_factor": 0.5},
    "layer_types": ["linear_attention", "full_attention"],
}
MAMBA: dict[str, Any] = {
    **{"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1},
    **{"mamba_d_conv": 4, "mamba_expand": 2, "mamba_chunk_size": 16},
}

# What differs from COMMON, by the model type in config.json; DEFAULT leaves it to the family.
SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": {**EXPERTS, "decoder_sparse_step": 1},
    "mistral": {"sliding_window": None},
    "mixtral": {**LOCAL},
    "ministral3": {},
    "olmo2": {},
    "smollm3": {"no_rope_layers": [1, 0]},
    "gemma": {},
    "deepseek_v2": {**LATENT},
    "deepseek_v3": {**LATENT},
    "glm4": {},
    "stablelm": {},
    "nemotron": {},
    "starcoder2": {},
    "ernie4_5": {},
    "hunyuan_v1_dense": {},
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.22},
    "cohere": {"logit_scale": 0.0625},
    "minicpm3": {
        **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16},
        **{"v_head_dim": 16, "num_key_value_heads": 4, "head_dim": DEFAULT, "dim_model_base": 16},
    },
    "phi": {},
    "phi3": {},
    "gpt_neox": {},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 1024},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "falcon": {"head_dim": DEFAULT, "num_kv_heads": 2, "new_decoder_architecture": True},
    "gemma2": {**WINDOWED, "query_pre_attn_scalar": 16},
    "gemma3_text": {**WINDOWED, "query_pre_attn_scalar": 16},
    "gemma3n_text": {
        **{"sliding_window": WINDOW, "num_hidden_layers": 4, "num_kv_shared_layers": 2},
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        **{"laurel_rank": 8, "hidden_size_per_layer_input": 8, "altup_num_inputs": 2},
        **{"activation_sparsity_pattern": [0.0] * 4, "vocab_size_per_layer_input": 0},
        "intermediate_size": [128] * 4,
    },
    "gpt_oss": {**WINDOWED, **LOCAL},
    "olmo3": {**WINDOWED},
    "exaone4": {**WINDOWED, "sliding_window_pattern": 2},
    "cohere2": {**WINDOWED, "logit_scale": 0.0625},
    "llama4_text": {
        **{"attention_chunk_size": WINDOW, "layer_types": ["chunked_attention", "full_attention"]},
        **{"num_local_experts": 2, "intermediate_size_mlp": 128, "no_rope_layers": [1, 0]},
        **{"moe_layers": [1], "attn_temperature_tuning": True, "floor_scale": 32},
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "qwen3_next": {**EXPERTS, **DELTA, "shared_expert_intermediate_size": 32, "decoder_sparse_step": 1},
    "qwen3_5_text": {**DELTA},
    "nemotron_h": {
        **{"layers_block_type": ["mamba", "attention"], "mamba_num_heads": 8, "mamba_head_dim": 16},
        **{"ssm_state_size": 16, "n_groups": 1, "conv_kernel": 4, "chunk_size": 16, "expand": 2},
    },
    "zamba2": {
        **{"layers_block_type": ["mamba", "hybrid"], "mamba_d_state": 16, "mamba_d_conv": 4},
        **{"mamba_expand": 2, "n_mamba_heads": 8, "mamba_headdim": 16, "mamba_ngroups": 1, "chunk_size": 16},
        **{"num_key_value_heads": 4, "num_mem_blocks": 1, "use_mem_rope": True, "adapter_rank": 8},
        **{"head_dim": DEFAULT, "hybrid_layer_ids": [1]},
    },
    "granitemoehybrid": {
        **LOCAL,
        **MAMBA,
        **{"layer_types": ["mamba", "attention"], "shared_intermediate_size": 64},
        **{"logits_scaling": 8.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.22},
    },
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 128, "embedding_multiplier": 5.0, "lm_head_multiplier": 0.04},
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 16, "num_experts": 2},
    "recurrent_gemma": {"attention_window_size": WINDOW, "block_types": ["recurrent", "attention"]},
    "mamba": {"state_size": 16},
    "mamba2": {"state_size": 16, "num_heads": 8, "head_dim": 16, "n_groups": 1, "expand": 2},
    "kimi_linear": {},
    "gemma4_text": {
        **WINDOWED,
        **{
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 8,
            "global_head_dim": 16,
            "vocab_size_per_layer_input": 0,
        },
    },
}
# Windowed kinds of families that mostly have none.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral windowed": ("mistral", {"sliding_window": WINDOW}),
    "phi3 windowed": ("phi3", {"sliding_window": WINDOW}),
    "qwen2 windowed": (
        "qwen2",
        {**WINDOWED, "use_sliding_window": True, "max_window_layers": 1},
    ),
}


def make(folder: Path, name: str, tokenizer: Any = None) -> Path:
    """A model folder of a family: its model type in config.json, or a name of VARIANTS.

    tokenizer: in place of that of `tiny_llms`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, variant = VARIANTS.get(name, (name, {}))
    tokenizer = tokenizer or tiny_llms.byte_level()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    settings = {**COMMON, **SETTINGS[kind], **variant, "vocab_size": len(tokenizer)}
    settings |= {"eos_token_id": tokenizer.eos_token_id, "tie_word_embeddings": False}
    settings.setdefault("pad_token_id", tokenizer.pad_token_id)
    if "vocab_size_per_layer_input" in settings:
        settings["vocab_size_per_layer_input"] = len(tokenizer)
    config = AutoConfig.for_model(kind, **{k: v for k, v in settings.items() if v is not DEFAULT})
    config.bos_token_id = None
    torch.manual_seed(sum(map(ord, kind)))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():  # what begins as 0 or 1 would hide faults
        for parameter in model.parameters():
            if float(parameter.float().std(correction=0)) == 0:
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder
