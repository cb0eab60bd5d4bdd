"""Mamba: the bare scan with its gradients, the mixer with its states, whole language models."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from seqlab.interop.convert import convert
from seqlab.kernels import scan
from seqlab.models import LanguageModel, Mamba, RMSNorm


def check(case):
    if "input_ids" in case.inputs:
        check_language_model(case, "mamba", mixer(case.options))
    elif "x" in case.inputs:
        check_mixer(
            case, convert(mixer(case.options)(case.options["hidden_size"], rngs=nnx.Rngs(0)), case.params)
        )
    else:
        for implementation in ("reference", "xla"):
            _check_scan(case, functools.partial(scan, implementation=implementation))


def mixer(options):
    return functools.partial(
        Mamba,
        expand=options.get("expand", options.get("intermediate_size", 0) // options["hidden_size"]),
        state_size=options["state_size"],
        conv_width=options["conv_kernel"],
        dt_rank=options["time_step_rank"],
        conv_bias=options["use_conv_bias"],
        bias=options["use_bias"],
    )


def check_mixer(case, module, layout=lambda ssm: ssm):
    """The whole, and a stream of it in the original's segments: outputs and both states."""
    x = case.array("x")
    run = jax.jit(lambda x, state: module(x, state))
    y, state = run(x, module.init_state(len(x)))
    case.check("y", y)
    case.check_all(_states(state, case, "", layout))
    segments = case.meta.get("segments") or (
        [case.meta["prefill"], *[1] * case.meta["steps"]] if "prefill" in case.meta else []
    )
    if segments:
        state, pieces = module.init_state(len(x)), []
        for i, end in enumerate(np.cumsum(segments)):
            y, state = run(x[:, end - segments[i] : end], state)
            pieces.append(y)
            case.check_all(
                _states(state, case, f"_{i}", layout)
                | (_states(state, case, "_prefill", layout) if i == 0 else {})
            )
        case.check("y_stream", np.concatenate(pieces, axis=1))


def _states(state, case, suffix, layout):
    """The original keeps one input of the convolution more than a step needs: compared are those that it
    needs."""
    name = f"conv_state{suffix}"
    if name not in case.outs and name not in case.mids:
        return {}
    expected = case.expected(name)
    kept = np.concatenate([expected[..., :1], np.asarray(state.conv).transpose(0, 2, 1)], axis=-1)
    return {name: kept, f"ssm_state{suffix}": layout(state.ssm)}


def check_language_model(case, architecture, factory):
    options = case.options
    model = LanguageModel(
        options["vocab_size"],
        options["hidden_size"],
        options["num_hidden_layers"],
        factory,
        channel_mixer=None,
        norm=functools.partial(RMSNorm, eps=options["layer_norm_epsilon"]),
        tie_embeddings=options["tie_word_embeddings"],
        rngs=nnx.Rngs(0),
    )
    model = convert(model, case.params, architecture=architecture)
    tokens, mask = case.array("input_ids"), case.inputs.get("attention_mask")
    x, mids = original_padding(model, tokens, mask) if mask is not None else (None, {})
    if x is None:
        x, _ = model.features(tokens)
        mids[f"hidden_{options['num_hidden_layers']}"] = x
    logits = model.read_out(x)
    case.check_all(mids)
    case.check("logits", logits)
    losses = (
        jax.nn.logsumexp(logits[:, :-1], axis=-1)
        - jnp.take_along_axis(logits[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
    )
    case.check("loss", losses.mean())


def original_padding(model, tokens, mask):
    """What the original does with padded steps: it lets them write into the residual stream, and its linear
    biases into the convolution.

    seqlab's `valid` keeps them out of everything. The original's numbers come from the same mixers with the
    mask applied where it
    applies it: on the input of the mixer and behind the convolution.
    """
    x, mids, keep = model.embedding(tokens), {}, jnp.asarray(mask, jnp.float32)[..., None]
    for i, block in enumerate(model.backbone.blocks):
        conv = block.mixer.conv
        block.mixer.conv = _Masked(conv, keep)
        x = x + block.mixer(block.mixer_norm(x) * keep)[0]
        block.mixer.conv = conv
        mids[f"hidden_{i}"] = x
    x = model.backbone.norm(x)
    mids[f"hidden_{len(model.backbone.blocks)}"] = x
    return x, mids


class _Masked:
    def __init__(self, conv, keep):
        self.conv, self.keep = conv, keep

    def __call__(self, *arguments):
        y, state = self.conv(*arguments)
        return y * self.keep, state


def _map(x, u, begin, end):
    """An input or output map [b, t, n]; [b, t, e, n] of one that is constant (E, N) or that groups of
    channels have, (b, G, N, L)."""
    if x.ndim == 3:
        return x.swapaxes(1, 2)[:, begin:end]
    if x.ndim == 2:
        return jnp.broadcast_to(x, (*u.shape[:2], *x.shape))
    return jnp.repeat(x.transpose(0, 3, 1, 2)[:, begin:end], u.shape[2] // x.shape[1], axis=2)


def _scanned(scan, arrays, state):
    return scan(*arrays, initial_state=state)


def _by_columns(scan, arrays, state):
    """The scan whose maps belong to each channel: one of every column of A, whose input is u B."""
    u, delta, A, B, C = arrays
    B, C = (x if x.ndim == 4 else x[:, :, None] for x in (B, C))
    one, total, states = jnp.ones((*u.shape[:2], 1), u.dtype), 0.0, []
    for n in range(A.shape[1]):
        start = None if state is None else state[..., n : n + 1]
        h, last = scan(u * B[..., n], delta, A[:, n : n + 1], one, one, initial_state=start)
        total, states = total + C[..., n] * h, [*states, last]
    return total, jnp.concatenate(states, axis=2)


def _check_scan(case, scan):
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    floats = {name: case.array(name) for name in names if name in case.inputs}
    softplus = case.meta.get("delta_softplus", True)

    def run(floats, begin=0, end=None, state=None):
        """The original's call around our scan; its arrays are [batch, channel, time]."""
        f = dict(floats)
        u, delta = (f[name].swapaxes(1, 2)[:, begin:end] for name in ("u", "delta"))
        B, C = (_map(f[name], u, begin, end) for name in ("B", "C"))
        delta = delta + f.get("delta_bias", 0.0)
        delta = jax.nn.softplus(delta) if softplus else delta
        wide = B.ndim + C.ndim > 6
        y, state = (_by_columns if wide else _scanned)(scan, (u, delta, f["A"], B, C), state)
        y = y + f["D"] * u if "D" in f else y
        y = y.swapaxes(1, 2)
        return (y * jax.nn.silu(f["z"][:, :, begin:end]) if "z" in f else y), state

    (y, state), pull = jax.vjp(run, floats)
    case.check_all({"y": y, "o": y, "y_float64": y, "last_state": state, "final_state": state})
    if "cut" in case.meta:
        case.check("state_after_cut", run(floats, 0, case.meta["cut"])[1])
    if "cotangent_o" in case.inputs:
        (grads,) = pull((case.array("cotangent_o"), case.array("cotangent_state")))
        for name, gradient in grads.items():
            case.check(f"grad_{name}", gradient)
