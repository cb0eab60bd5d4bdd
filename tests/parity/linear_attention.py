"""The linear-attention family: the bare recurrences with their gradients, and the published layers with their
memories."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from seqlab import models
from seqlab.interop.convert import convert, published_names
from seqlab.kernels import linear_attention


def check(case):
    if "x" in case.inputs:
        _check_layer(case)
        return
    scale = case.meta.get("scale")  # a number, or in words that of the width
    options = {"scale": float(scale)} if isinstance(scale, int | float) else {}
    for implementation in ("reference", "xla"):
        call = functools.partial(linear_attention, implementation=implementation, **options)
        if any(name.startswith("grad_") for name in case.outs):
            _check_gradients(case, call)
        else:
            _check_op(case, jax.jit(functools.partial(call, chunk=16)))


def _arguments(case):
    """The arguments of `linear_attention` under the original's names; the decay is g per head or gk per
    channel."""
    arrays = {
        name: case.array(name) for name in ("q", "k", "v", "beta", "initial_state") if name in case.inputs
    }
    decay = next((case.array(name) for name in ("gk", "g") if name in case.inputs), None)
    if decay is None and ("log_gamma" in case.mids or "retention" in str(case.meta)):
        decay = jnp.log1p(-(2.0 ** (-5 - jnp.arange(arrays["q"].shape[2], dtype=jnp.float32))))
    return arrays | ({} if decay is None else {"decay": decay})


def _check_op(case, call):
    arguments = _arguments(case)
    out, state = call(**arguments)
    case.check("o", out)
    case.check("final_state", state)
    zero = {**arguments, "initial_state": jnp.zeros_like(state)}
    out, state = call(**zero)
    case.check_all({"o_zero_init": out, "final_state_zero_init": state, "o_parallel_zero_init": out})
    if "log_gamma" in case.mids:
        case.check("log_gamma", arguments["decay"])
    if "state_after_cut" in case.mids:
        steps = {
            name: x[:, : case.meta["cut"]] if name != "initial_state" and x.ndim > 1 else x
            for name, x in arguments.items()
        }
        case.check("state_after_cut", call(**steps)[1])
    if "o_elu_normalized" in case.outs:  # a normaliser is what a column of ones in v accumulates
        q, k = (jax.nn.elu(arguments[name]) + 1 for name in "qk")
        v = jnp.concatenate([arguments["v"], jnp.ones((*q.shape[:3], 1))], axis=-1)
        start = jnp.concatenate(
            [arguments["initial_state"], jnp.moveaxis(case.array("initial_z"), 1, -1)], axis=-1
        )
        for state, suffix in ((start, ""), (jnp.zeros_like(start), "_zero_init")):
            out, final = call(q, k, v, initial_state=state)
            case.check(f"o_elu_normalized{suffix}", out[..., :-1] / (out[..., -1:] + 1e-10))
            case.check_all(
                {
                    f"final_state_elu{suffix}": final[..., :-1],
                    f"final_z_elu{suffix}": jnp.moveaxis(final[..., -1:], -1, 1),
                }
            )


def _check_gradients(case, call):
    @jax.jit
    def run(arguments, cotangents):
        results, pull = jax.vjp(lambda arguments: call(**arguments, chunk=8), arguments)
        return results, pull(cotangents)[0]

    results, grads = run(_arguments(case), (case.array("cotangent_o"), case.array("cotangent_state")))
    case.check_all(dict(zip(("o", "final_state"), results, strict=True)))
    names = {"decay": "gk" if "gk" in case.inputs else "g"}
    case.check_all({f"grad_{names.get(name, name)}": gradient for name, gradient in grads.items()})


# The original's options under our names; what is not listed means the same under the same name.
_OPTIONS = {
    "num_heads": "heads",
    "num_kv_heads": "kv_heads",
    "num_v_heads": "value_heads",
    "gate_low_rank_dim": "gate_rank",
    "gate_logit_normalizer": "gate_normalizer",
    "clamp_min": "gate_floor",
    "allow_neg_eigval": "negative_eigenvalues",
    "do_feature_map_norm": "normalize",
    "tie_feature_map_qk": "tie_feature_map",
    "use_output_gate": "gate",
    "use_gate": "gate",
}
_SAME = ("expand_k", "expand_v", "head_dim", "feature_map", "norm_q", "norm_k", "norm_eps", "conv_bias")
_SAME += ("qk_activation", "qk_norm", "use_beta")
# the original's class: ours, its default number of heads, whether it has short convolutions by default
_LAYERS = {
    "LinearAttention": (models.LinearAttention, 8, False),
    "MultiScaleRetention": (models.Retention, 8, False),
    "SimpleGatedLinearAttention": (models.SimpleGatedLinearAttention, 4, True),
    "GatedLinearAttention": (models.GatedLinearAttention, 4, False),
    "DeltaNet": (models.DeltaNet, 4, True),
    "GatedDeltaNet": (models.GatedDeltaNet, 6, True),
    "KimiDeltaAttention": (models.KimiDeltaAttention, 16, True),
}
_HANDLED = {
    "hidden_size",
    "mode",
    "layer_idx",
    "fuse_norm",
    "elementwise_affine",
    "conv_size",
    "use_short_conv",
    "output_norm",
}


def layer(config, name):
    cls, heads, convolves = _LAYERS[name]
    unknown = set(config) - set(_OPTIONS) - set(_SAME) - _HANDLED
    assert not unknown, f"options of {name} that are not handled: {unknown}"
    options = {"heads": heads} | {
        ours: config[theirs] for theirs, ours in _OPTIONS.items() if theirs in config
    }
    options |= {option: config[option] for option in _SAME if option in config}
    if config.get("output_norm") == "identity":
        options["norm_eps"] = None
    if cls is not models.LinearAttention:
        options["conv_width"] = (
            config.get("conv_size", 4) if config.get("use_short_conv", convolves) else None
        )
    if cls is models.GatedDeltaNet:
        options.setdefault("head_dim", 256)
    if cls is models.KimiDeltaAttention:
        options.setdefault("head_dim", 128)
    return cls(config["hidden_size"], **options, rngs=nnx.Rngs(0))


def _check_layer(case):
    name = case.meta["cls"].split()[0].split(".")[-1]
    module = layer(case.options, name)
    # The norm behind a gate that is not fused goes by another name.
    params = {key.replace("g_norm.", "g_norm_swish_gate."): value for key, value in case.params.items()}
    if not case.options.get("elementwise_affine", True) and module.norm is not None:
        params |= {
            name: np.ones(module.head_shape[1])
            for ours, (name, *_) in published_names(module).items()
            if ours == "norm.weight"
        }
    module = convert(module, params)
    x = case.array("x")
    run = jax.jit(lambda x, state: module(x, state))
    y, state = run(x, module.init_state(len(x)))
    memory = state.memory
    if getattr(module, "normalize", False):
        case.check("final_z", np.moveaxis(memory[..., -1:], -1, 1))
        memory = memory[..., :-1]
    case.check("y", y)
    case.check_all({"final_state": memory})
    state, pieces = module.init_state(len(x)), []  # the same in two parts, then without a state
    for part in (x[:, :7], x[:, 7:]):
        y, state = run(part, state)
        pieces.append(y)
    case.check("y", np.concatenate(pieces, axis=1))
    case.check("y", jax.jit(lambda x: module(x)[0])(x))
