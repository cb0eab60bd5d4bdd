"""Every mixer and every kind of whole model, small: what the law is tested on."""

import functools

from flax import nnx

from seqlab.models import (
    MLP,
    Attention,
    DeltaNet,
    Full,
    GatedDeltaNet,
    GatedLinearAttention,
    GroupedChannelMixer,
    KimiDeltaAttention,
    LanguageModel,
    LinearAttention,
    Mamba,
    Mamba2,
    MambaMixerStack,
    Retention,
    SelectiveMixer,
    SequenceModel,
    SimpleGatedLinearAttention,
    SwiGLU,
    Window,
)

WINDOW = 8
partial = functools.partial

MIXERS = {
    "attention": partial(Attention, heads=4, cache=Full(64)),
    "attention_gqa_norm": partial(Attention, heads=4, kv_heads=2, head_dim=6, qk_norm=True, bias=True, cache=Full(64)),
    "window": partial(Attention, heads=2, cache=Window(WINDOW)),
    "window_sinks_softcap": partial(Attention, heads=2, cache=Window(WINDOW, sinks=3, softcap=5.0), rotary_base=500.0),
    "mamba": partial(Mamba, state_size=4),
    "mamba_wide_conv": partial(Mamba, state_size=3, conv_width=6, expand=1, bias=True),
    "mamba2": partial(Mamba2, head_dim=8, state_size=6, groups=2, dt_limit=(0.02, 0.5)),
    "linear": partial(LinearAttention, heads=2),
    "linear_normalized": partial(LinearAttention, heads=4, kv_heads=2, feature_map="elu", normalize=True, norm_eps=None),
    "retention": partial(Retention, heads=2),
    "simple_gated_linear": partial(SimpleGatedLinearAttention, heads=2, kv_heads=1, gate_normalizer=2.0),
    "gated_linear": partial(GatedLinearAttention, heads=2, gate_rank=4),
    "gated_linear_conv": partial(GatedLinearAttention, heads=2, gate_rank=4, conv_width=3, gate_normalizer=1.0),
    "delta": partial(DeltaNet, heads=2, negative_eigenvalues=True, gate=True),
    "gated_delta": partial(GatedDeltaNet, heads=2, value_heads=4, head_dim=6),
    "kimi_delta": partial(KimiDeltaAttention, heads=2),
    "selective": partial(SelectiveMixer, state_size=4),
    "grouped_channels": partial(GroupedChannelMixer, mixer=partial(SelectiveMixer, state_size=4)),
    "mamba_mixer_stack": partial(
        MambaMixerStack, depth=2, token_mixer=partial(SelectiveMixer, state_size=4), channel_mixer=partial(GroupedChannelMixer, groups=2)
    ),
    "swiglu": SwiGLU,
    "mlp": MLP,
}

MODELS = {
    "lm_attention": {"mixers": MIXERS["attention"]},
    "lm_mamba": {"mixers": MIXERS["mamba"], "channel_mixer": None, "tie_embeddings": False},
    "lm_gated_linear": {"mixers": MIXERS["gated_linear_conv"], "remat": "block"},
    "lm_hybrid": {"mixers": (MIXERS["mamba"], MIXERS["window_sinks_softcap"])},
    "lm_hybrid_scanned": {"mixers": (MIXERS["gated_linear_conv"], MIXERS["window"]), "scan_layers": True},
    "sequence_hybrid": {"build": partial(SequenceModel, 3, 5), "mixers": (MIXERS["mamba"], MIXERS["window"])},
}


def mixer(name, dim=16):
    return MIXERS[name](dim, rngs=nnx.Rngs(0))


def model(name, dtype="float32", depth=2, vocab_size=31):
    options = {"build": partial(LanguageModel, vocab_size)} | MODELS[name]
    return options.pop("build")(16, depth, dtype=dtype, rngs=nnx.Rngs(0), **options)
