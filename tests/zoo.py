"""Every mixer and every kind of whole model, small: the subjects of the streaming contract's tests."""

import functools

import jax
from flax import nnx

from seqlab.models import (
    LMU,
    MLP,
    RGLRU,
    Attention,
    BatchNorm,
    CausalPooling,
    CausalWavelets,
    DeltaNet,
    Full,
    GatedDeltaNet,
    GatedLinearAttention,
    GatedShortConv,
    GroupedChannelMixer,
    KimiDeltaAttention,
    LanguageModel,
    LinearAttention,
    LMUFormer,
    LMUMixer,
    Mamba,
    Mamba2,
    MambaMixerStack,
    MixtureOfExperts,
    ParallelMixers,
    RecurrentLMU,
    Retention,
    SelectiveMixer,
    SequenceModel,
    SimpleGatedLinearAttention,
    SpikingAttention,
    SpikingLMUMixer,
    StreamingTSM2,
    SwiGLU,
    Window,
)
from seqlab.models.cache import MoBA, Quantized, duo

WINDOW = 8
partial = functools.partial


def stirred(build):
    """With norms that do something: statistics and affine maps at random, as after training, where those of a
    new model do nothing."""

    def build_stirred(dim, *, rngs):
        model = build(dim, rngs=rngs)
        for _, norm in nnx.iter_modules(model):
            if isinstance(norm, BatchNorm):
                size = norm.bias.shape
                norm.running_mean[...] = 0.3 * jax.random.normal(rngs.params(), size)
                norm.running_var[...] = jax.random.uniform(rngs.params(), size, minval=0.02, maxval=0.3)
                norm.bias[...] = 0.5 * jax.random.normal(rngs.params(), size)
        return model

    return build_stirred


def marked(build, *marks):
    """`build` for the quick tests too: of the contract ("quick"), with "gradients", and over "devices".
    Entries without marks are for the slow tests: each is a variant of one with marks, or long to compile."""
    entry = functools.partial(build)
    entry.marks = marks
    return entry


def names(mark):
    """The mixers that carry `mark`."""
    return [name for name, build in MIXERS.items() if mark in getattr(build, "marks", ())]


def lmuformer(dim, *, rngs, **options):
    return LMUFormer(dim, 5, dim=dim, theta=20.0, expand=2, rngs=rngs, **options)


MIXERS = {
    "attention": partial(Attention, heads=4, cache=Full(64)),
    "attention_gqa_norm": marked(
        partial(
            Attention, heads=4, kv_heads=2, head_dim=6, qk_norm=True, gate=True, bias=True, cache=Full(64)
        ),
        "quick",
        "devices",
    ),
    "window": marked(partial(Attention, heads=2, cache=Window(WINDOW)), "devices"),
    "window_sinks_softcap": marked(
        partial(
            Attention,
            heads=2,
            softcap=5.0,
            cache=Window(WINDOW, sinks=3, positions="absolute"),
            rotary_base=500.0,
        ),
        "quick",
        "gradients",
    ),
    "window_in_cache": partial(
        Attention,
        heads=4,
        kv_heads=2,
        cache=Window(WINDOW, sinks=3, positions="cache"),
        sink="learned",
        rotary_width=2,
    ),
    "coded": marked(
        partial(
            Attention,
            heads=2,
            head_dim=8,
            v_head_dim=16,
            softcap=3.0,
            scale=0.5,
            cache=Quantized(64, bits=4, group=4, residual=8, value_bits=2),
        ),
        "quick",
    ),
    "coded_window": partial(
        Attention,
        heads=2,
        kv_heads=1,
        head_dim=8,
        cache=Quantized(None, WINDOW, sinks=2, bits=8, group=2, residual=4),
    ),
    "duo": partial(
        Attention, heads=4, kv_heads=2, cache=duo((True, False), capacity=64, sinks=2, window=WINDOW)
    ),
    "moba": partial(Attention, heads=4, kv_heads=2, cache=MoBA(4, 3, capacity=64)),
    "moba_stored": partial(Attention, heads=2, cache=MoBA(4, 3, None, stored=4), key_conv=3),
    "mamba": marked(partial(Mamba, state_size=4), "quick", "devices"),
    "mamba_wide_conv": partial(
        Mamba, state_size=3, conv_width=6, expand=1, bias=True, selection_norm="weighted"
    ),
    "mamba2": marked(partial(Mamba2, head_dim=8, state_size=6, groups=2, dt_limit=(0.02, 0.5)), "quick"),
    "mamba2_variant": partial(
        Mamba2, head_dim=4, state_size=3, norm="norm_first", norm_groups=1, channel_skip=True, ssm_channels=24
    ),
    "linear": partial(LinearAttention, heads=2),
    "linear_normalized": marked(
        partial(LinearAttention, heads=4, kv_heads=2, feature_map="elu", normalize=True, norm_eps=None),
        "quick",
    ),
    "retention": marked(partial(Retention, heads=2), "quick"),
    "simple_gated_linear": partial(SimpleGatedLinearAttention, heads=2, kv_heads=1, gate_normalizer=2.0),
    "gated_linear": partial(GatedLinearAttention, heads=2, gate_rank=4),
    "gated_linear_conv": marked(
        partial(GatedLinearAttention, heads=2, gate_rank=4, conv_width=3, gate_normalizer=1.0), "quick"
    ),
    "delta": partial(DeltaNet, heads=2, negative_eigenvalues=True, gate=True),
    "gated_delta": marked(
        partial(GatedDeltaNet, heads=2, value_heads=4, head_dim=6), "quick", "gradients", "devices"
    ),
    "kimi_delta": partial(KimiDeltaAttention, heads=2),
    "selective": partial(SelectiveMixer, state_size=4),
    "grouped_channels": partial(GroupedChannelMixer, mixer=partial(SelectiveMixer, state_size=4)),
    "mamba_mixer_stack": marked(
        partial(
            MambaMixerStack,
            depth=2,
            token_mixer=partial(SelectiveMixer, state_size=4),
            channel_mixer=partial(GroupedChannelMixer, groups=2),
        ),
        "quick",
        "devices",
    ),
    "pooling": marked(partial(CausalPooling, size=4), "quick", "devices"),
    "wavelets": marked(partial(CausalWavelets, levels=3), "quick", "devices"),
    "lmu": marked(partial(LMU, order=7, theta=12.5), "quick", "devices"),
    "lmu_channels": partial(LMU, order=4, theta=30.0, channels=3, hidden=11, trainable_theta=True),
    "lmu_cell": marked(partial(RecurrentLMU, order=6, theta=16.0), "devices"),
    "lmu_cell_keras": marked(
        partial(
            RecurrentLMU, order=4, theta=9.0, hidden=5, channels=3, memory_to_memory=False, use_bias=True
        ),
        "quick",
    ),
    "lmu_cell_dense": partial(
        RecurrentLMU,
        order=5,
        theta=9.0,
        cell="dense",
        hidden_to_memory=False,
        input_to_hidden=False,
        discretizer="euler",
    ),
    "lmu_cell_none": partial(RecurrentLMU, order=5, theta=9.0, channels=2, cell="none", trainable_theta=True),
    "lmuformer_mixer": stirred(partial(LMUMixer, theta=20.0)),
    "lmuformer": stirred(partial(lmuformer, depth=2)),
    "lmuformer_causal": stirred(partial(lmuformer, centred=False)),
    "lmuformer_spiking_mixer": stirred(partial(SpikingLMUMixer, theta=20.0)),
    "lmuformer_spiking": stirred(partial(lmuformer, spiking=True)),
    "lmuformer_spiking_causal": stirred(partial(lmuformer, spiking=True, centred=False)),
    "spiking_attention": stirred(partial(SpikingAttention, heads=4, causal=True)),
    "lmuformer_spiking_attention": stirred(
        partial(lmuformer, spiking=True, centred=False, attention_heads=2)
    ),
    # Of one block the norm undoes the only weight of the first sum: a gradient of 0 up to rounding, which has
    # no relative error.
    "streaming_tsm2": partial(
        StreamingTSM2,
        length=13,
        horizon=2,
        patch=4,
        stride=3,
        dim=4,
        depth=2,
        mixer=partial(SelectiveMixer, state_size=2),
    ),
    "swiglu": marked(partial(SwiGLU, activation="gelu_tanh", bias=True), "quick"),
    "mlp": marked(MLP, "quick"),
    "rg_lru": marked(partial(RGLRU, width=8, heads=2, conv_width=3), "quick", "devices"),
    "parallel_mixers": partial(
        ParallelMixers,
        mixers=(
            partial(Attention, heads=2, cache=Window(8)),
            partial(Mamba2, inner=12, head_dim=4, state_size=3, factors=(0.5, 2.0, 0.7, 0.8, 1.5)),
        ),
        in_scales=(0.5, 2.0),
        out_scales=(1.5, 0.7),
    ),
    "gated_short_conv": marked(partial(GatedShortConv, bias=True), "quick"),
    "mixture_of_experts": marked(
        partial(MixtureOfExperts, hidden=8, experts=5, shared_hidden=8, shared_gate=True), "quick"
    ),
}

MODELS = {
    "lm_attention": {"mixers": MIXERS["attention"]},
    "lm_mamba": {"mixers": MIXERS["mamba"], "channel_mixer": None, "tie_embeddings": False},
    "lm_gated_linear": {"mixers": MIXERS["gated_linear_conv"], "remat": "block"},
    "lm_hybrid": {
        "mixers": (MIXERS["mamba"], MIXERS["window_sinks_softcap"]),
        "norms": "both",
        "parallel": True,
        "branch_scale": 0.5,
        "logit_softcap": 3.0,
    },
    "lm_hybrid_scanned": {"mixers": (MIXERS["gated_linear_conv"], MIXERS["window"]), "scan_layers": True},
    "sequence_hybrid": {"build": partial(SequenceModel, 3, 5), "mixers": (MIXERS["mamba"], MIXERS["window"])},
}


def mixer(name, dim=16):
    return MIXERS[name](dim, rngs=nnx.Rngs(0))


def model(name, dtype="float32", depth=2, vocab_size=31):
    options = {"build": partial(LanguageModel, vocab_size)} | MODELS[name]
    return options.pop("build")(16, depth, dtype=dtype, rngs=nnx.Rngs(0), **options)
