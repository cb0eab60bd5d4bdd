"""MambaMixer, TSM2 and ViM2: the scan, mixers of one, two and four directions, the stack of weighted sums, a
whole TSM2.

The cases were derived from the paper's equations, whose directions share arrays [K, ...]; a channel mixer is
known by the `layout` of the case, a stack by its weights alpha, TSM2 by its patches.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from seqlab.interop.convert import convert
from seqlab.kernels import scan
from seqlab.models import TSM2, LayerNorm, MambaMixerStack, SelectiveChannelMixer, SelectiveMixer
from seqlab.models.images import FourScans, scan_orders

# of one direction: ours, theirs
PARTS = {
    "conv1d.weight": "conv_weight",
    "conv1d.bias": "conv_bias",
    "x_proj.weight": "x_proj",
    "A_log": "A_log",
    "D": "D",
} | {
    "dt_proj.weight": "dt_proj_weight",
    "dt_proj.bias": "dt_proj_bias",
}


SUMS = ("alpha", "beta", "theta", "gamma")


def check(case):
    if "dwconv_weight" in case.params:
        check_four_scans(case)
    elif "patch_weight" in case.params:
        check_tsm2(case)
    elif "alpha" in case.params:
        check_stack(case)
    elif "x" in case.inputs:
        check_mixer(case)
    else:
        check_scan(case)


def sizes(params):
    """The constructor's arguments that the shapes of a mixer tell, besides its width."""
    return {
        "inner": params["A_log"].shape[1],
        "state_size": params["A_log"].shape[2],
        "dt_rank": params["dt_proj_weight"].shape[2],
        "conv_width": params["conv_weight"].shape[2],
    }


def part(params, prefix):
    """The arrays below a prefix."""
    return {name.removeprefix(prefix): value for name, value in params.items() if name.startswith(prefix)}


def mixer_weights(params, prefix=""):
    """The arrays of one mixer under the names that `convert` expects; its directions stand in one array, one
    after the other."""
    renamed = {f"{prefix}{name}.weight": params[name] for name in ("in_proj", "out_proj")}
    for k in range(len(params["x_proj"])):
        for ours, theirs in PARTS.items():
            value = params[theirs][k]
            renamed[f"{prefix}directions.{k}.{ours}"] = value[:, None] if theirs == "conv_weight" else value
    return renamed


def check_mixer(case):
    x, params = case.array("x"), case.params
    factory = functools.partial(SelectiveMixer, **sizes(params))
    if "x^T" in case.meta.get("layout", ""):
        module = SelectiveChannelMixer(x.shape[2], tokens=x.shape[1], mixer=factory, rngs=nnx.Rngs(0))
        module = convert(module, mixer_weights(params, "mixer."))
    else:
        module = factory(x.shape[2], bidirectional=len(params["x_proj"]) == 2, rngs=nnx.Rngs(0))
        module = convert(module, mixer_weights(params))
    run = jax.jit(lambda x, state: module(x, state))
    if not module.causal:
        case.check("y", run(x, None)[0])
        return
    y, state = run(x, module.init_state(len(x), x.dtype))
    case.check_all({"y": y, "conv_state": state.conv, "ssm_state": state.ssm})
    if "cut" in case.options:
        cut = case.options["cut"]
        first, state = run(x[:, :cut], module.init_state(len(x), x.dtype))
        case.check_all({"conv_state_after_cut": state.conv, "ssm_state_after_cut": state.ssm})
        case.check("y", jnp.concatenate([first, run(x[:, cut:], state)[0]], axis=1))


def stack_weights(case, names, norms, prefix=""):
    """A stack's arrays; `names` and `norms` are the original's words for the token mixer and the channel
    mixer and their norms."""
    renamed = {f"{prefix}{name}": case.params[name] for name in SUMS}
    for i in range(case.options["depth"]):
        block = part(case.params, f"block{i + 1}.")
        for ours, theirs in zip(("token", "channel"), names, strict=True):
            nested = (
                "" if theirs == "token" else "mixer."
            )  # only the token mixer of a plain stack is the bare SelectiveMixer
            renamed |= mixer_weights(part(block, f"{theirs}."), f"{prefix}{ours}_mixers.{i}.{nested}")
            renamed[f"{prefix}{ours}_norms.{i}.{norms}"] = block[f"norm_{theirs}_weight"]
            renamed[f"{prefix}{ours}_norms.{i}.bias"] = block[f"norm_{theirs}_bias"]
    return renamed


def check_stack(case):
    x, options = case.array("x"), case.options
    first = part(case.params, "block1.")
    stack = MambaMixerStack(
        x.shape[2],
        options["depth"],
        functools.partial(
            SelectiveMixer, **sizes(part(first, "token.")), bidirectional=len(first["token.x_proj"]) == 2
        ),
        functools.partial(
            SelectiveChannelMixer,
            tokens=x.shape[1],
            mixer=functools.partial(SelectiveMixer, **sizes(part(first, "channel."))),
        ),
        final_sum=False,
        rngs=nnx.Rngs(0),
    )
    stack = convert(stack, stack_weights(case, ("token", "channel"), "weight"))
    mids = record(stack, "token", "channel")
    y, _ = stack(x)
    case.check_all(mids)
    case.check("y", y)


def record(stack, token, channel):
    """What every mixer reads (before its norm) and writes, by the original's names, once the stack has
    run."""
    found = {}

    def watch(modules, i, name):
        module = modules[i]

        def call(value, *rest):
            output = module(value, *rest)
            found[name] = value if name[0] == "x" else output[0]
            return output

        return call

    for ours, theirs in (("token", token), ("channel", channel)):
        for attribute, letter in ((f"{ours}_norms", "x"), (f"{ours}_mixers", "y")):
            modules = list(getattr(stack, attribute))
            vars(stack)[attribute] = [
                watch(modules, i, f"{letter}_{theirs}_{i + 1}") for i in range(len(modules))
            ]
    return found


def check_tsm2(case):
    x, options = case.array("x").swapaxes(1, 2), case.options
    model = TSM2(
        x.shape[2],
        x.shape[1],
        options["horizon"],
        patch=options["patch_len"],
        stride=options["stride"],
        dim=options["dim"],
        depth=options["depth"],
        mixer=functools.partial(SelectiveMixer, **sizes(part(case.params, "block1.time."))),
        reversible=False,
        final_sum=False,
        align="start",
        rngs=nnx.Rngs(0),
    )
    renamed = stack_weights(case, ("time", "variate"), "scale", "stack.")
    renamed = {
        name: value.T if "_norms." in name else value for name, value in renamed.items()
    }  # [m, n] there, [n, m] here
    for ours, theirs in (("embed", "patch"), ("head", "head")):
        renamed |= {f"{ours}.{kind}": case.params[f"{theirs}_{kind}"] for kind in ("weight", "bias")}
    model = convert(model, renamed)
    mids = record(model.stack, "time", "variate")
    y = model(x)
    mids = {name: value.swapaxes(1, 2) for name, value in mids.items()}
    case.check_all({"embedded": model.embed(model.cut(x)).swapaxes(1, 2), **mids})
    case.check("forecast", y.swapaxes(1, 2))


def check_four_scans(case):
    x, params = case.array("x"), case.params
    _, height, width, dim = x.shape
    case.check_all({"scan_order": scan_orders(height, width)}, exact=True)
    names = {name: theirs for name, theirs in PARTS.items() if not name.startswith("conv1d")}
    weights = {f"{name}.weight": params[name] for name in ("in_proj", "out_proj")}
    weights |= {
        f"directions.{k}.{ours}": params[theirs][k]
        for k in range(len(params["D"]))
        for ours, theirs in names.items()
    }
    weights |= {"conv.weight": params["dwconv_weight"][:, None], "conv.bias": params["dwconv_bias"]}
    norm = {"norm.weight": params.get("out_norm_weight"), "norm.bias": params.get("out_norm_bias")}
    shapes = {
        "inner": params["A_log"].shape[1],
        "state_size": params["A_log"].shape[2],
        "dt_rank": params["dt_proj_weight"].shape[2],
    }
    for name, factory in (
        ("y", None),
        ("y_with_out_norm", functools.partial(LayerNorm, eps=case.options.get("layernorm_eps", 1e-5))),
    ):
        if name in case.outs:
            mixer = FourScans(dim, **shapes, norm=factory, rngs=nnx.Rngs(0))
            mixer = convert(mixer, weights if factory is None else weights | norm)
            case.check(name, jax.jit(lambda x, mixer=mixer: mixer.mix(x))(x))


def check_scan(case):
    u, delta, A, B, C, D = (case.array(name) for name in ("u", "delta", "A", "B", "C", "D"))
    for suffix, h0 in (("", None), ("_from_h0", case.array("h0"))):
        if f"y{suffix}" in case.outs:
            y, state = scan(u, delta, A, B, C, initial_state=h0)
            case.check_all({f"y{suffix}": y + D * u, f"h_last{suffix}": state})
    if (
        "y_exact_zoh_b" in case.outs
    ):  # (exp(ΔA) - 1) / A instead of Δ: the inputs differ by n, so there is one scan for every column of A
        total, states = D * u, []
        for n in range(A.shape[1]):
            held = u * jnp.expm1(delta * A[:, n]) / (delta * A[:, n])
            y, state = scan(held, delta, A[:, n : n + 1], B[..., n : n + 1], C[..., n : n + 1])
            total, states = total + y, [*states, state]
        case.check_all({"y_exact_zoh_b": total, "h_last_exact_zoh_b": jnp.concatenate(states, axis=2)})
