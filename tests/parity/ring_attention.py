"""Attention and decayed linear attention with the sequence on several devices: layouts, partial sums, states
handed on, gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from seqlab import kernels
from seqlab.kernels.attention import merge
from seqlab.kernels.attention.ring import permutation, use_layout
from seqlab.parallel.sharding import compiler_options, make_mesh


def check(case):
    devices = case.meta["devices"]
    mesh = make_mesh(data=1, sequence=devices, devices=jax.devices()[:devices])
    if "slopes" in case.inputs:
        _check_linear(case, mesh, devices)
    else:
        _check_attention(case, mesh, devices)


def _check_attention(case, mesh, devices):
    layout, causal = case.meta["layout"], case.meta["causal"]
    q, k, v, dout = (case.array(name) for name in ("q", "k", "v", "dout"))
    np.testing.assert_array_equal(permutation(layout, devices, q.shape[1]), case.inputs["permutation"])
    attend = functools.partial(kernels.attention, causal=causal, scale=case.meta["scale"])

    @functools.partial(jax.jit, compiler_options=compiler_options(mesh))
    def run(q, k, v, dout):
        out, pull, lse = jax.vjp(attend, q, k, v, has_aux=True)
        return out, lse, pull(dout)

    with jax.set_mesh(mesh), use_layout(layout):
        out, lse, (dq, dk, dv) = run(q, k, v, dout)
    case.check_all({"o": out, "lse": lse.swapaxes(1, 2), "dq": dq, "dk": dk, "dv": dv})
    _check_blocks(case, attend, causal, devices, q, k, v)


def _check_blocks(case, attend, causal, devices, q, k, v):
    """Block after block on every device, each from the device before it: who sees what, and the sums so
    far."""
    positions = jnp.asarray(case.inputs["permutation"], jnp.int32).reshape(devices, -1)
    q, k, v = (jnp.stack([x[:, here] for here in positions]) for x in (q, k, v))
    places = jnp.broadcast_to(positions[:, None], (devices, q.shape[1], positions.shape[1]))
    source = (np.arange(devices)[:, None] - np.arange(devices)) % devices
    case.check("kv_source", source, exact=True)
    seen = (
        positions[:, None, :, None] >= positions[source][:, :, None, :]
        if causal
        else jnp.ones((*source.shape, *2 * places.shape[2:]))
    )
    case.check("allowed_pairs", seen.sum((2, 3)), exact=True)

    def part(q, here, k, v, there):
        return attend(q, k, v, q_positions=here, kv_positions=there)

    parts = jax.jit(jax.vmap(part))
    out, lse = jnp.zeros_like(q), jnp.full(q.shape[:-1], -jnp.inf)
    for step in range(devices + 1):
        m, total, mass = (case.expected(f"{name}_after")[:, step] for name in ("m", "l", "acc"))
        tops = np.where(m <= -1e29, -np.inf, m)
        with np.errstate(divide="ignore"):
            expected = tops + np.log(total)
        np.testing.assert_allclose(lse.swapaxes(-1, -2), expected, atol=1e-5)
        np.testing.assert_allclose(
            out * np.where(total == 0, 1, total).swapaxes(-1, -2)[..., None], mass, atol=1e-5
        )
        if step < devices:
            keys = source[:, step]
            out, lse = merge(out, lse, *parts(q, places, k[keys], v[keys], places[keys]))


def _check_linear(case, mesh, devices):
    arrays = tuple(case.array(name).swapaxes(1, 2) for name in ("q", "k", "v"))
    dout, decay = case.array("dout").swapaxes(1, 2), -jnp.asarray(case.inputs["slopes"], jnp.float32)
    run = functools.partial(kernels.linear_attention, decay=decay, scale=1.0)

    @functools.partial(jax.jit, compiler_options=compiler_options(mesh))
    def gradients(arrays, dout):
        out, pull = jax.vjp(lambda *arrays: run(*arrays)[0], *arrays)
        return out, pull(dout)

    with jax.set_mesh(mesh):
        out, slopes = gradients(arrays, dout)
    for name, value in zip(("o", "dq", "dk", "dv"), (out, *slopes), strict=True):
        case.check(name, value.swapaxes(1, 2))

    def chunked(nudges, arrays):
        """Stretch by stretch; each is handed its state and a nudge, whose gradient is that of the state."""

        def stretch(state, x):
            nudge, arrays = x
            out, new = run(*arrays, initial_state=state + nudge)
            return new, (out, state)

        stretches = [jnp.moveaxis(x.reshape(len(x), devices, -1, *x.shape[2:]), 1, 0) for x in arrays]
        _, (out, states) = jax.lax.scan(stretch, jnp.zeros_like(nudges[0]), (nudges, stretches))
        return jnp.moveaxis(out, 0, 1).reshape(dout.shape), states

    nudges = jnp.zeros(case.expected("KV_received").shape)
    _, pull, states = jax.vjp(lambda nudges: chunked(nudges, arrays), nudges, has_aux=True)
    (received,) = pull(dout)
    fade = jnp.exp(decay)[
        :, None, None
    ]  # the original hands on what the next step will read, one decay later than our state
    case.check("KV_received", fade * states)
    case.check("dKV_received", jnp.concatenate([received[1:], jnp.zeros_like(received[:1])]) / fade)
