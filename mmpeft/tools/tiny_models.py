"""A tiny random model of any causal LM class of the installed transformers, for surveys and tests.

Every field of a config that counts something is made small by its name; families whose fields depend on each other
have a few of their own.
"""

from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mmpeft.errors import RefusedError

MAX_PARAMETERS = 300_000_000
SMALL = {
    199: "vocab_size decoder_vocab_size unpadded_vocab_size vocab_size_per_layer_input",
    64: "hidden_size n_embd d_model dim embedding_size word_embed_proj_dim emb_dim lru_width attention_hidden_size "
    "embedding_dim input_embedding_size output_embedding_size backbone_hidden_size dim_model_base",
    96: "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim dff dim_ff d_inner feed_forward_size "
    "ffn_hidden_size moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size "
    "shared_experts_intermediate_size intermediate_size_mlp expert_ffn_hidden_size dense_intermediate_size "
    "moe_shared_expert_intermediate_size",
    256: "max_position_embeddings n_positions n_ctx max_seq_len context_length model_max_length",
    128: "index_topk",
    56: "image_size",
    24: "qk_head_dim",
    16: "head_dim swa_head_dim dim_head d_head v_head_dim qk_nope_head_dim linear_head_dim linear_key_head_dim "
    "linear_value_head_dim attention_head_size kv_channels global_head_dim attention_head_dim mamba_d_head "
    "mamba_head_dim mamba_headdim kv_lora_rank q_lora_rank o_lora_rank index_head_dim gated_norm_rank "
    "hidden_size_per_layer_input ple_embed_dim d_rel router_hidden_size laurel_rank adapter_rank loop_gate_rank",
    14: "patch_size",
    8: "qk_rope_head_dim rotary_dim mamba_d_state ssm_state_size state_size mamba_n_heads mamba_num_heads "
    "sliding_window sliding_window_size attention_window_size window_size",
    3: "image_token_id image_token_index",
    5: "audio_token_id video_token_id boi_token_id boi_token_index",
    6: "eoi_token_id eoi_token_index boa_token_id eoa_token_id eoa_token_index vision_start_token_id "
    "vision_end_token_id",
    4: "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads encoder_attention_heads "
    "num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads linear_num_heads "
    "linear_num_value_heads num_hidden_layers num_layers n_layer n_layers decoder_layers encoder_layers "
    "num_encoder_layers num_decoder_layers num_experts n_routed_experts num_local_experts moe_num_experts "
    "mamba_d_conv conv_kernel",
    2: "num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads num_query_groups "
    "num_experts_per_tok moe_topk num_experts_per_token moe_k index_n_heads n_groups mamba_n_groups mamba_ngroups "
    "num_kv_shared_layers eos_token_id",
    1: "n_shared_experts num_shared_experts moe_num_shared_experts first_k_dense_replace num_dense_layers n_group "
    "topk_group bos_token_id decoder_start_token_id",
    0: "pad_token_id",
}
"""Value -> the names of the fields that get it."""
SIZES = {name: value for value, names in SMALL.items() for name in names.split()}
STATE_AND_ATTENTION = ["linear_attention", "full_attention"] * 2
WINDOW_AND_FULL = ["sliding_attention", "full_attention"] * 2
OWN: dict[str, dict[str, Any]] = {
    **{
        key: {"num_key_value_heads": 4}
        for key in [
            "axk1",
            "axk2",
            "deepseek_v2",
            "deepseek_v3",
            "deepseek_v32",
            "dots3_note_text",
            "glm4_moe_lite",
            "glm_moe_dsa",
            "minicpm3",
            "sarvam_mla",
            "youtu",
        ]
    },
    **{
        key: {"layer_types": STATE_AND_ATTENTION, "num_key_value_heads": 4}
        for key in ["bailing_hybrid", "kimi_linear"]
    },
    **{
        key: {"num_kv_shared_layers": 0, "layer_types": WINDOW_AND_FULL}
        for key in ["gemma4_text", "gemma4_unified_text"]
    },
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {"encoder_hash_byte_group_vocab": 512},
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": STATE_AND_ATTENTION},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    **{key: {"layer_types": ["conv", "full_attention"] * 2} for key in ["lfm2", "lfm2_moe"]},
    "longcat_flash": {"num_key_value_heads": 4, "head_dim": 8},
    "mamba2": {"num_heads": 8, "n_groups": 2},
    "moshi": {"audio_vocab_size": 199},
    "qwen4_exp_text": {
        "ple_layer_ids": [1],
        "ngram_vocab_size_base": 300,
        "split_ngram_parts": 4,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [16, 48], "axial_pos_shape": [16, 16]},
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2, "num_mem_blocks": 1},
    "zaya": {"num_experts_per_tok": 1},
}
"""Families whose fields depend on each other; layers of both kinds where a family mixes them."""


def causal_lm_types() -> list[str]:
    """The model types of which the installed transformers has a causal LM."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(model_type: str, **changes: Any) -> Any:
    """The smallest config of a family; ``changes`` are fields of one's own."""
    made: Any = CONFIG_MAPPING[model_type]
    fields = {name: SIZES[name] for name in made.__dataclass_fields__ if name in SIZES}
    for name, part in made.sub_configs.items():
        if part is AutoConfig:  # whichever stands there by default
            part = type(getattr(made(), name))
        if getattr(part, "model_type", None) in CONFIG_MAPPING:
            fields[name] = tiny_config(part.model_type).to_dict()
    return made(**{**fields, **OWN.get(model_type, {}), **changes})


def tiny_model(model_type: str, seed: int = 0, **changes: Any) -> Any:
    """A random causal LM in fp32 with eager attention, in eval mode.

    Args:
        model_type: of transformers.
        seed: of the weights; the global random state is left as it is.
        changes: fields of the config.

    Raises:
        RefusedError: it would not be tiny.
    """
    config = tiny_config(model_type, **changes)
    with torch.device("meta"):
        size = sum(tensor.numel() for tensor in _from(config).parameters())
    if size > MAX_PARAMETERS:
        raise RefusedError(
            f"{model_type} has {size / 1e6:.0f} M parameters even with every known field small"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _from(config).eval()


def _from(config: Any) -> nn.Module:
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
