"""Writes the folders of tests/pretrained: small random models of transformers, saved by it, with the logits
that it computes for some tokens.

    python tests/make_pretrained.py NAME...      in an environment with transformers and torch

The folders that exist were written by transformers 5.23 (Llama, Mistral, Qwen2, Qwen3, Mamba, Mamba-2) and
5.24 (the others). A cached decode of transformers itself is compared with its single pass before the file is
written.
"""

import pathlib
import sys

import numpy as np

FOLDER = pathlib.Path(__file__).parent / "pretrained"
_SIZES = {
    "vocab_size": 48,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
ABSENT = object()
_RECURRENT = dict.fromkeys(("num_attention_heads", "num_key_value_heads", "max_position_embeddings"), ABSENT)
_MAMBA2 = {
    "hidden_size": 16,
    "mamba_n_heads": 4,
    "mamba_n_groups": 2,
    "mamba_d_state": 6,
    "mamba_expand": 1,
    "mamba_chunk_size": 5,
}
_FACTORS = {
    "attention_multiplier": 0.3,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "logits_scaling": 8.0,
}
_GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 20, "sliding_window": 5}
_EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
MODELS = {
    "bamba": _MAMBA2 | {"num_hidden_layers": 2, "attn_layer_indices": [1], "head_dim": 8},
    "falcon_mamba": _RECURRENT | {"state_size": 6, "intermediate_size": 24, "expand": 1},
    "jamba": {
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "intermediate_size": 8,
        "hidden_size": 16,
        "num_hidden_layers": 4,
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "mamba_d_state": 6,
        "mamba_expand": 1,
        "use_mamba_kernels": False,
    },
    "granitemoehybrid": _MAMBA2
    | _FACTORS
    | {
        "layer_types": ["mamba", "attention"],
        "num_local_experts": 3,
        "intermediate_size": 8,
        "shared_intermediate_size": 12,
    },
    "lfm2": {
        "num_hidden_layers": 3,
        "layer_types": ["conv", "full_attention", "conv"],
        "block_auto_adjust_ff_dim": False,
        "conv_bias": True,
    },
    "qwen3_next": _EXPERTS
    | {
        "hidden_size": 16,
        "head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 6,
        "linear_value_head_dim": 3,
        "shared_expert_intermediate_size": 6,
    },
    "falcon_h1": _MAMBA2
    | {
        "mamba_d_ssm": 24,
        "mamba_rms_norm": True,
        "lm_head_multiplier": 0.4,
        "embedding_multiplier": 5.5,
        "mlp_multipliers": [0.8, 0.6],
        "key_multiplier": 0.39,
        "attention_out_multiplier": 0.7,
        "attention_in_multiplier": 1.2,
        "ssm_multipliers": [0.35, 0.25, 0.9, 0.7, 0.3],
        "ssm_in_multiplier": 1.25,
        "ssm_out_multiplier": 0.5,
    },
    "recurrent_gemma": {
        "num_hidden_layers": 3,
        "hidden_size": 16,
        "lru_width": 24,
        "attention_window_size": 5,
        "logits_soft_cap": 4.0,
        "num_key_value_heads": 1,
        "max_position_embeddings": ABSENT,
    },
    "gemma": {"head_dim": 8},
    "gemma2": _GEMMA | {"final_logit_softcapping": 5.0, "attn_logit_softcapping": 2.0},
    "gemma3_text": _GEMMA
    | {
        "num_hidden_layers": 3,
        "sliding_window_pattern": 3,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "phi3": {"sliding_window": 6, "partial_rotary_factor": 0.75, "hidden_size": 32},
    "olmo2": {"num_key_value_heads": 4, "rope_theta": 500_000.0},
    "gpt_neox": {"rotary_pct": 0.25, "hidden_size": 32, "num_key_value_heads": None},
    "mixtral": {"num_local_experts": 3, "intermediate_size": 16, "sliding_window": 7},
    "qwen2_moe": _EXPERTS | {"shared_expert_intermediate_size": 12},
    "qwen3_moe": _EXPERTS | {"mlp_only_layers": [0], "norm_topk_prob": True},
    "smollm3": {"no_rope_layer_interval": 2, "mlp_bias": True},
    "granite": _FACTORS | {"mlp_bias": True},
}


def make(name: str) -> None:
    """Write the folder of one model."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

    torch.manual_seed(0)
    options = {key: value for key, value in (_SIZES | MODELS[name]).items() if value is not ABSENT}
    config = AutoConfig.for_model(name, **options)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for part, value in model.named_parameters():
            near_one = "norm" in part and value.mean() == 1  # the rest around what it is for a new model
            value.copy_((value if near_one else 0.0) + 0.25 * torch.randn_like(value))
        tokens = torch.randint(0, config.vocab_size, (2, 16))
        logits = model(tokens, use_cache=False).logits
        cache, chunks = DynamicCache(config=config), (tokens[:, :7], *tokens[:, 7:].split(1, dim=1))
        pieces = [model(chunk, cache=cache, use_cache=True).logits for chunk in chunks]
    apart = (torch.cat(pieces, dim=1) - logits).abs().max().item()
    print(f"{name}: largest logit {logits.abs().max().item():.2f}, cached decode within {apart:.1e}")
    folder = FOLDER / name
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    np.savez(folder / "expected.npz", tokens=tokens.numpy().astype(np.int32), logits=logits.numpy())


if __name__ == "__main__":
    for name in sys.argv[1:] or MODELS:
        make(name)
