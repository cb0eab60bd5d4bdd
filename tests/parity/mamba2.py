"""Mamba-2: the state-space duality with its gradients, the mixer with its states, whole language models."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from flax import nnx

from parity import mamba
from seqlab.interop.convert import convert
from seqlab.kernels import linear_attention
from seqlab.models import Mamba2


def check(case):
    if "input_ids" in case.inputs:
        mamba.check_language_model(case, "mamba2", mixer(case, mixer_params(case.params)))
    elif "dt" in case.inputs:
        for implementation in ("reference", "xla"):
            _check_ssd(case, functools.partial(linear_attention, implementation=implementation))
    else:
        build = mixer(case, case.params)
        module = convert(build(case.options["hidden_size"], rngs=nnx.Rngs(0)), case.params)
        mamba.check_mixer(
            case, module, lambda ssm: ssm.swapaxes(2, 3)
        )  # the original keeps values before keys


def mixer_params(params):
    """Those of the first layer of a language model."""
    prefix = "backbone.layers.0.mixer."
    return {name.removeprefix(prefix): value for name, value in params.items() if name.startswith(prefix)}


def mixer(case, params):
    options = case.options
    heads = len(params["A_log"])
    inner = heads * options["head_dim"]
    variants = {
        "norm": None if "norm.weight" not in params else "gate_first",
        "channel_skip": len(params["D"]) > heads,
        "ssm_channels": inner if inner < params["out_proj.weight"].shape[1] else None,
        "norm_groups": options.get("norm_groups"),
    }
    transformers = "transformers" in f"{case.meta.get('repository')} {case.meta.get('cls')}"
    if options.get("norm_before_gate") and not transformers:  # which has the key, and ignores it
        variants["norm"] = "norm_first"
    return functools.partial(
        Mamba2,
        **variants,
        expand=options["expand"],
        head_dim=options["head_dim"],
        state_size=options["state_size"],
        groups=options["n_groups"],
        conv_width=options["conv_kernel"],
        dt_limit=tuple(map(float, options.get("time_step_limit", (0, "inf")))),
        conv_bias=options["use_conv_bias"],
        bias=options["use_bias"],
        norm_eps=options["layer_norm_epsilon"],
    )


def _check_ssd(case, linear_attention):
    names = ("x", "dt", "A", "B", "C", "D", "dt_bias", "initial_state")
    floats = {name: case.array(name) for name in names if name in case.inputs}
    low, high = map(float, case.meta.get("dt_limit", (0, "inf")))

    def run(floats, end=None):
        """Queries C, keys B, values Δx, log decay ΔA; the original's states are transposed."""
        f = SimpleNamespace(**{"D": None, "dt_bias": 0.0, "initial_state": None, **floats})
        x, dt, B, C = (y[:, :end] for y in (f.x, f.dt, f.B, f.C))
        delta = dt + f.dt_bias
        delta = jnp.clip(jax.nn.softplus(delta) if case.meta.get("dt_softplus", True) else delta, low, high)
        start = None if f.initial_state is None else f.initial_state.swapaxes(2, 3)
        chunk = 8 if case.meta["chunk_size"] <= 8 else 16
        y, state = linear_attention(
            C, B, delta[..., None] * x, decay=delta * f.A, scale=1.0, initial_state=start, chunk=chunk
        )
        return y if f.D is None else y + f.D[:, None] * x, state.swapaxes(2, 3)

    (y, state), pull = jax.vjp(run, floats)
    case.check_all({"y": y, "o": y, "y_float64": y, "final_state": state})
    if "state_after_cut" in case.mids:
        case.check("state_after_cut", run(floats, case.meta["cut"])[1])
    if "cotangent_o" in case.inputs:
        (grads,) = pull((case.array("cotangent_o"), case.array("cotangent_state")))
        for name, gradient in grads.items():
            case.check(f"grad_{name}", gradient)
