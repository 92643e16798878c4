"""Tiny random models of every decoder family of transformers: configurations shrunk by the names of their fields."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

FAMILIES: tuple[str, ...] = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCABULARY, LONGEST = 300, 128
MAX_PARAMETERS = 5_000_000

# Largest value of each field.
_SIZES = {
    "vocab_size vocab_size_per_layer_input decoder_vocab_size pronunciation_vocab_size shape_vocab_size": VOCABULARY,
    "max_position_embeddings n_positions max_seq_len n_ctx context_length max_target_positions model_max_length "
    "original_max_position_embeddings index_topk indexer_budget": LONGEST,
    "intermediate_size decoder_ffn_dim encoder_ffn_dim ffn_dim moe_intermediate_size shared_expert_intermediate_size "
    "shared_intermediate_size ffn_hidden_size intermediate_size_mlp dim_ff dff d_inner expert_ffn_hidden_size "
    "dense_intermediate_size moe_shared_expert_intermediate_size feed_forward_size": 48,
    "hidden_size d_model n_embd emb_dim embedding_dim embedding_size input_embedding_size output_embedding_size "
    "word_embed_proj_dim lru_width attention_hidden_size backbone_hidden_size mamba_d_ssm router_hidden_size "
    "encoder_hash_byte_group_vocab ple_embed_dim ngram_vocab_size_base make_ngram_vocab_size_divisible_by": 32,
    "head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim "
    "swa_head_dim mamba_d_state state_size ssm_state_size kv_channels dim_head attention_head_size d_head "
    "index_head_dim gated_norm_rank kv_lora_rank q_lora_rank o_lora_rank adapter_rank d_rel mamba_head_dim "
    "hidden_size_per_layer_input rotary_dim sliding_window window_size attention_window_size local_attention "
    "sliding_window_size chunk_size mamba_chunk_size attention_chunk_size global_head_dim pronunciation_embed_dim "
    "shape_embed_dim mamba_headdim mamba_d_head hc_lowrank": 8,
    "num_attention_heads n_head n_heads decoder_attention_heads encoder_attention_heads num_encoder_attention_heads "
    "num_decoder_attention_heads attention_heads swa_num_attention_heads num_experts n_routed_experts "
    "num_local_experts moe_num_experts linear_num_value_heads laurel_rank linear_num_heads mamba_d_conv mamba_dt_rank "
    "time_step_rank zero_expert_num index_n_heads prompt_length split_ngram_parts": 4,
    "num_hidden_layers num_layers n_layer n_layers decoder_layers encoder_layers num_encoder_layers num_decoder_layers "
    "num_blocks num_layers_per_stack num_key_value_heads num_kv_heads num_experts_per_tok num_experts_per_token "
    "moe_topk moe_k swa_num_key_value_heads linear_num_key_heads mamba_num_heads n_mamba_heads num_query_groups "
    "num_heads heads_per_ngram": 2,
    "num_shared_experts n_shared_experts moe_num_shared_experts first_k_dense_replace num_dense_layers "
    "moe_layer_start_index n_group topk_group mamba_n_groups n_groups": 1,
    "num_kv_shared_layers num_nextn_predict_layers": 0,
}
SIZES = {name: size for names, size in _SIZES.items() for name in names.split()}
LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_blocks")
# Lists with one entry for each layer; a tiny model has one layer of each kind.
KINDS = ("layer_types", "mlp_layer_types", "layers_block_type", "block_types", "indexer_types")

_MAMBA = dict(mamba_n_heads=4, mamba_d_head=16)
_INDEXER = dict(indexer_n_heads=4, indexer_kv_heads=1, indexer_head_dim=8, indexer_budget=LONGEST)
# Fields whose meaning does not follow from the name, or whose default builds no model.
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": _MAMBA | dict(attn_layer_indices=[1]),
    "cohere_compass_text": dict(
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={
            kind: dict(rope_type="default", rope_theta=10_000.0, mrope_section=[2, 1, 1])
            for kind in ("sliding_attention", "full_attention")
        },
    ),
    "dbrx": dict(
        attn_config=dict(kv_n_heads=2, rope_theta=10_000.0, clip_qkv=8),
        ffn_config=dict(ffn_hidden_size=48, moe_num_experts=4, moe_top_k=2),
    ),
    "deepseek_v2": dict(num_experts_per_tok=2, n_group=1, topk_group=1),
    "dots1": dict(n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2),
    "falcon_h1": dict(mamba_n_heads=4, mamba_d_head=8),
    "gemma3n_text": dict(
        layer_types=["sliding_attention", "full_attention"],
        num_kv_shared_layers=0,
        activation_sparsity_pattern=[0.0, 0.0],
    ),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]]),
    "granitemoehybrid": _MAMBA | dict(layer_types=["linear_attention", "full_attention"]),
    "hunyuan_v1_dense": dict(head_dim=8),
    "hunyuan_v1_moe": dict(head_dim=8),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"]),
    "mamba2": dict(num_heads=4, head_dim=16, n_groups=2),
    "ministral": dict(head_dim=8),
    "nemotron": dict(head_dim=8, num_key_value_heads=2),
    "qwen4_exp_text": _INDEXER | dict(indexer_compress_ratio=4),
    "reformer": dict(axial_pos_embds=False, attn_layers=["local", "local"], num_attention_heads=4, pad_token_id=0),
    "xlm": dict(causal=True),
    "xlnet": dict(attn_type="uni"),
    "xmod": dict(default_language="en_XX"),
    "zamba": dict(
        layers_block_type=["linear_attention", "hybrid", "hybrid"],
        num_hidden_layers=3,
        attention_hidden_size=64,
        attention_head_dim=16,
        num_key_value_heads=4,
    ),
    "zamba2": dict(
        layers_block_type=["linear_attention", "hybrid", "hybrid"],
        num_hidden_layers=3,
        mamba_headdim=16,
        n_mamba_heads=4,
        attention_hidden_size=64,
        attention_head_dim=16,
        num_key_value_heads=4,
    ),
}


def shrink(config_class: type[PretrainedConfig], ids: dict[str, int]) -> dict[str, Any]:
    """Arguments of a tiny configuration with the special tokens `ids`."""
    default = config_class()
    values = default.to_dict()
    parts = {name: getattr(default, name, None) for name in config_class.sub_configs}
    small: dict[str, Any] = {name: shrink(type(part), ids) for name, part in parts.items() if part is not None}
    for name, value in values.items():
        if isinstance(value, int) and not isinstance(value, bool) and value > SIZES.get(name, value):
            small[name] = SIZES[name]
        elif name in ids:
            small[name] = ids[name]
    kinds = {name: list(dict.fromkeys(values[name])) for name in KINDS if isinstance(values.get(name), list)}
    num_layers = max([2, *map(len, kinds.values())])
    small |= {name: num_layers for name in LAYERS if name in small}
    small |= {name: (kinds[name] * num_layers)[:num_layers] for name in kinds}
    if "kv_lora_rank" in values:  # multi-head latent attention has no groups
        small["num_key_value_heads"] = small["num_attention_heads"]
    if values.get("is_decoder") is False:
        small["is_decoder"] = True
    return small | SPECIAL.get(config_class.model_type, {})


def tiny_config(family: str, **ids: int) -> PretrainedConfig:
    """A configuration of a family with a few thousand weights and the special tokens `ids`."""
    config_class = CONFIG_MAPPING[family]
    return config_class(**shrink(config_class, ids))


def tiny_model(config: PretrainedConfig, *, gain: float = 1.0, seed: int = 0) -> PreTrainedModel:
    """A random model of a configuration, its matrices scaled by `gain` for peaked logits.

    Raises:
        ValueError: the model is not tiny.
    """
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"its smallest configuration has {size / 1e6:.0f} M weights")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(gain)
    return model.eval()
