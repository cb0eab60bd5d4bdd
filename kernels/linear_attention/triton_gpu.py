"""Linear attention with its recurrence in Triton: the products of `xla` inside chunks, for all chunks at
once, and one kernel from chunk to chunk.

Inside chunks there are only matrix products, which XLA runs by vendor libraries. From chunk to chunk XLA
would launch a few small operations thousands of times; the kernel keeps the state in registers instead. With
the triangular system (1 + A)^-1 of the delta rule applied to values and keys beforehand (arXiv 2406.06484),
the remaining recurrence is u = U - W S.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from seqlab.kernels import triton
from seqlab.kernels.blocks import find, widest
from seqlab.kernels.linear_attention import xla
from seqlab.kernels.linear_attention.xla import Config, _inverse, _set_apart, _where


class Blocks(NamedTuple):
    """Steps of a chunk, values of a program, whose state [k, values] is in registers, and options of
    Triton."""

    steps: int
    values: int
    warps: int
    stages: int


BUDGET = 1 << 26  # elements of one array [b, block, h, k]


def blocks(exact: bool, keys: int, values: int) -> Blocks:
    """The tile for heads with these key and value widths, with float32 products or not; NotImplementedError
    if none."""
    place = "linear_attention/triton_gpu/carry", 4 if exact else 2
    if keys > widest(*place):
        raise NotImplementedError(
            f"kernels for keys of up to {widest(*place)} exist in this precision, got k={keys}"
        )
    found = Blocks(**find(*place, keys))
    return found._replace(values=min(found.values, triton.power(values, 16)))


def linear_attention(q, k, v, decay, beta, initial_state, reset, *, scale, chunk=None):
    """`out, final_state`; see `xla.linear_attention` for the arguments."""
    triton.require(q, k, v, decay, beta, initial_state)
    if beta is not None and beta.shape[-1] > 1:
        raise NotImplementedError(
            "no kernel has a beta of every value: each would need a triangular system of its own"
        )
    # A decoding step is a few operations that XLA fuses.
    if v.shape[1] == 1:
        return xla.linear_attention(q, k, v, decay, beta, initial_state, reset, scale=scale)
    exact = v.dtype == jnp.float32
    most = blocks(exact, k.shape[-1], v.shape[-1]).steps
    channels = decay is not None and decay.shape[-1] > 1
    size = min(chunk or (xla.default_chunk(k, decay, beta) if channels else most), most)
    with jax.default_matmul_precision("highest" if exact else "default"):
        return xla.in_blocks(
            (q, k, v, decay, beta, reset), initial_state, BUDGET, Config(scale, size, 0, _CARRIES[exact])
        )


def _plain(exact, state, v, products, masks):
    """See `xla._plain`."""
    states, _, final = _through(
        exact, state, v, None, _where(masks.last, products.write), products.keep, masks
    )
    return _old(products.read, states, masks), final


def _delta(exact, state, v, beta, overlaps, products, masks):
    """See `xla._delta`."""
    system, size = _inverse(beta * overlaps), v.shape[-2]
    queries, keys = jnp.split(products.read, (size,), axis=-2)
    read = system @ (beta * _where(masks.first, keys))
    write = jnp.broadcast_to(_where(masks.last, products.write), read.shape)
    states, u, final = _through(exact, state, system @ (beta * v), read, write, products.keep, masks)
    return _old(queries, states, masks), u, final


_CARRIES = {
    exact: tuple(functools.partial(function, exact) for function in (_plain, _delta))
    for exact in (False, True)
}


def _old(read, states, masks):
    if masks.first is None:
        return read @ states
    states, broken = _set_apart(states)
    return jnp.where(masks.first, jnp.where(broken, jnp.nan, read @ states), 0)


def _through(exact, state, U, read, write, keep, masks):
    """The states [n, b, g, r, k, v] before every chunk, u [n, b, g, r, c, v] and the state after the last,
    [b, g, r, k, v]."""
    (n, b, g, r), (k, v) = U.shape[:4], state.shape[-2:]
    if masks.whole is not None:
        keep = jnp.broadcast_to(
            _where(masks.whole, jnp.ones((), state.dtype) if keep is None else keep), (n, b, g, *_tail(keep))
        )

    def flat(x):
        return None if x is None else x.reshape(n, -1, *x.shape[4:])

    keep = None if keep is None else flat(keep)[..., 0]
    arrays = (state.reshape(-1, k, v), flat(U), flat(read), flat(write), keep)
    states, u, final = _carry(exact, masks.whole is not None, *arrays)
    return states.reshape(n, b, g, r, k, v), u.reshape(n, b, g, r, -1, v), final.reshape(state.shape)


def _tail(keep):
    return (1, 1, 1) if keep is None else keep.shape[3:]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _carry(exact, reset, state, U, read, write, keep):
    """See `triton_kernels`: state [heads, k, v]; U [n, heads, c, v]; read, write [n, heads or fewer, c, k];
    keep [n, heads or fewer, .]."""
    from seqlab.kernels.linear_attention import triton_kernels as kernels

    (n, heads, *_), (_, k, v) = U.shape, state.shape
    constants, grid, cut = _setting(exact, reset, state, U, read, write, keep)
    arrays = (state, U, write, state if read is None else read, state if keep is None else keep)
    shapes = [(n, heads, k, v), U.shape if read is not None else (1,), state.shape]
    shapes = [(shape, state.dtype) for shape in shapes]
    states, u, final = triton.launch(
        kernels.forward, arrays, shapes, grid=grid, constants=constants, warps=cut.warps, stages=cut.stages
    )
    return states, U if read is None else u, final


def _carry_forward(exact, reset, state, U, read, write, keep):
    states, u, final = _carry(exact, reset, state, U, read, write, keep)
    return (states, u, final), (states, u, read, write, keep)


def _carry_backward(exact, reset, residuals, cotangents):
    from seqlab.kernels.linear_attention import triton_kernels as kernels

    (states, u, read, write, keep), (dstates, du, dfinal) = residuals, cotangents
    constants, grid, cut = _setting(exact, reset, dfinal, u, read, write, keep)
    arrays = (states, write, *(dfinal if x is None else x for x in (read, keep)), dstates, du, dfinal)
    shapes = [(x.shape, dfinal.dtype) for x in (states, u, dfinal)]
    results = triton.launch(
        kernels.backward, arrays, shapes, grid=grid, constants=constants, warps=cut.warps, stages=cut.stages
    )
    after, dU, dstate = results
    if reset:
        states, _ = _set_apart(states)
    dwrite = _shared(jnp.einsum("nhcv,nhkv->nhck", u, after), write)
    dread = None if read is None else -jnp.einsum("nhcv,nhkv->nhck", dU, states)
    dkeep = None
    if keep is not None:
        dkeep = _shared(
            jnp.sum(after * states, axis=(2, 3) if keep.shape[-1] == 1 else 3).reshape(*states.shape[:2], -1),
            keep,
        )
    return dstate, dU if read is not None else du + dU, dread, dwrite, dkeep


_carry.defvjp(_carry_forward, _carry_backward)


def _shared(gradient, argument):
    """The gradient of an array read by several heads."""
    return gradient.reshape(*argument.shape[:2], -1, *argument.shape[2:]).sum(2)


def _setting(exact, reset, state, U, read, write, keep):
    (n, heads, c, v), k = U.shape, state.shape[1]
    cut = blocks(exact, k, v)
    constants = {
        "CHUNKS": n,
        "HEADS": heads,
        "C": c,
        "K": k,
        "V": v,
        "SHARE": heads // write.shape[1],
        "SHARE_KEEP": 1 if keep is None else heads // keep.shape[1],
        "KEEP": 0 if keep is None else keep.shape[2],
        "DELTA": read is not None,
        "RESET": reset,
        "PRECISION": "tf32x3" if exact else "tf32",
        "CP": triton.power(c, 16),
        "KP": triton.power(k, 16),
        "BV": cut.values,
    }
    return constants, (heads, triton.blocks(v, cut.values)), cut
