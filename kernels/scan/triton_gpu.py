"""The selective scan in Triton: one kernel forwards, one backwards, each a scan over the steps of a tile
inside a loop over tiles."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from seqlab.kernels import triton
from seqlab.kernels.blocks import find


class Blocks(NamedTuple):
    """Steps of a tile, and channels and warps forwards and backwards. States are kept per tile, so both
    directions use the same tiles."""

    steps: int
    channels: tuple[int, int]
    warps: tuple[int, int]


def blocks(t: int, e: int, itemsize: int, chunk: int | None) -> Blocks:
    """The tile for a call; `chunk` limits its steps."""
    found = [find(f"scan/triton_gpu/{kind}", itemsize, e) for kind in ("forward", "backward")]
    channels = [min(each["channels"], triton.power(e)) for each in found]
    return Blocks(
        min(found[0]["steps"], triton.power(min(t, chunk or t), 2)),
        tuple(channels),
        tuple(each["warps"] for each in found),
    )


def scan(u, delta, A, B, C, initial_state, reset, *, chunk=None):
    """`y, final_state`; see `xla.scan` for the arguments. `chunk` bounds the steps between two states that
    are kept."""
    triton.require(u, delta, A, B, C, initial_state)
    reset = None if reset is None else reset.astype(jnp.int8)
    cut = blocks(*u.shape[1:], u.dtype.itemsize, chunk)
    y, h = _scan(cut, u, delta, A, B, C, jnp.swapaxes(initial_state, 1, 2), reset)
    return y, jnp.swapaxes(h, 1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(cut, *arguments):
    return _forward(cut, *arguments)[0]


def _forward(cut, u, delta, A, B, C, h, reset):
    from seqlab.kernels.scan import triton_kernels as kernels

    (b, t, e), n = u.shape, A.shape[1]
    channels, warps = cut.channels[0], cut.warps[0]
    constants = {"T": t, "E": e, "N": n, "RESET": reset is not None, "BT": cut.steps, "BE": channels}
    arrays = (u, delta, A.T.astype(h.dtype), B, C, h, u if reset is None else reset)
    shapes = [(u.shape, u.dtype), ((b, triton.blocks(t, cut.steps) + 1, n, e), h.dtype)]
    grid = (triton.blocks(e, channels), b)
    y, states = triton.launch(
        kernels.forward, arrays, shapes, grid=grid, constants=constants, warps=warps, stages=1
    )
    return (y, states[:, -1]), (u, delta, A, B, C, reset, states)


def _backward(cut, residuals, cotangents):
    from seqlab.kernels.scan import triton_kernels as kernels

    (u, delta, A, B, C, reset, states), (dy, dend) = residuals, cotangents
    (b, t, e), n, wide = u.shape, A.shape[1], states.dtype
    channels, warps = cut.channels[1], cut.warps[1]
    parts, tiles = triton.blocks(e, channels), states.shape[1] - 1
    constants = {
        "ROWS": b,
        "T": t,
        "E": e,
        "N": n,
        "RESET": reset is not None,
        "BT": cut.steps,
        "BE": channels,
    }
    arrays = (u, delta, A.T.astype(wide), B, C, u if reset is None else reset, states, dy, dend)
    shapes = [(u.shape, u.dtype), (delta.shape, delta.dtype), ((b, tiles, n, e), wide)]
    shapes += [((parts, b, t, n), wide), ((parts, b, t, n), wide), ((b, 2, n, e), wide)]
    results = triton.launch(
        kernels.backward, arrays, shapes, grid=(parts, b), constants=constants, warps=warps, stages=1
    )
    du, ddelta, dA, dB, dC, carry = results
    return (
        du,
        ddelta,
        dA.sum((0, 1)).T.astype(A.dtype),
        dB.sum(0).astype(B.dtype),
        dC.sum(0).astype(C.dtype),
        carry[:, 0],
        None,
    )


_scan.defvjp(_forward, _backward)
