"""Attention with time split over devices: queries stay, keys and values go around a ring (Ring Attention,
arXiv 2310.01889).

On every device, with the block of keys that is there, one after another:

    (out, lse) <- merge((out, lse), attention(q, block))          while the next block is in transit

The backward pass needs only q, k, v, out and lse: the blocks go around once more, followed by their
gradients. The contribution of a block to the gradients depends on the others through out and lse alone, since
exp(X - lse) are the weights of its keys in the whole.

Under a causal mask the last of N devices has nearly 2N times the work of the first if segments are
contiguous, and all wait for it. Two layouts distribute positions evenly; segments are exchanged once per
call:

    zigzag      device r has the chunks r and 2N-1-r of 2N
    striped     device r has positions r, r+N, r+2N, ...
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from seqlab.checks import UserError, check_choice
from seqlab.kernels.dispatch import Op, vary_alike
from seqlab.parallel import sequence_parallel
from seqlab.parallel.sequence_parallel import AXIS, shift

LAYOUTS = ("contiguous", "zigzag", "striped")

_layout = jax.make_user_context(default_value="contiguous")  # jax.jit takes it into the keys of its caches


class Block(NamedTuple):
    """The data sent around: keys and values [b, s, g, k] and their positions and segments [b, s]. `segments`
    None: one sequence."""

    k: Array
    v: Array
    positions: Array
    segments: Array | None


class Options(NamedTuple):
    """Static configuration: the op, its gradient and their options, and how many blocks each device has to
    see."""

    op: Op
    slopes: Op
    limits: tuple[tuple[str, Any], ...]
    blocks: int

    def attend(
        self, q: Array, alibi: Array | None, positions: Array, segments: Array | None, block: Block
    ) -> tuple[Array, Array]:
        places = _places(positions, segments, block)
        return self.op(q, block.k, block.v, sink_logits=None, alibi=alibi, **places, **dict(self.limits))

    def gradient(
        self,
        q: Array,
        alibi: Array | None,
        positions: Array,
        segments: Array | None,
        block: Block,
        *results: Array,
    ) -> tuple[Array, Array, Array, Array | None]:
        places = _places(positions, segments, block)
        return self.slopes(q, block.k, block.v, alibi, *results, **places, **dict(self.limits))


def _places(positions: Array, segments: Array | None, block: Block) -> dict[str, Array | None]:
    return {
        "q_positions": positions,
        "q_segments": segments,
        "kv_positions": block.positions,
        "kv_segments": block.segments,
    }


def permutation(layout: str, devices: int, time: int) -> Int[np.ndarray, " t"]:
    """The positions held by the devices in `layout`, in the order of devices: [time].

    Raises:
      ValueError: an unknown layout, or a time that it cannot divide.
    """
    check_choice(layout, LAYOUTS, "layout")
    unit = 2 * devices if layout == "zigzag" else devices
    if time % unit:
        raise UserError(f"time must be a multiple of {unit} for {layout} over {devices} devices, got {time}")
    positions = np.arange(time, dtype=np.int32)
    if layout == "striped":
        return positions.reshape(-1, devices).T.ravel()
    if layout == "zigzag":
        chunks = positions.reshape(2 * devices, -1)
        return np.concatenate([chunks[i] for r in range(devices) for i in (r, 2 * devices - 1 - r)])
    return positions


@contextlib.contextmanager
def use_layout(layout: str) -> Iterator[None]:
    """Within the block, attention over devices distributes positions in `layout`; functions compiled outside
    are traced again."""
    check_choice(layout, LAYOUTS, "layout")
    with _layout(layout):
        yield


def ring(
    op: Op,
    gradient: Op,
    q,
    k,
    v,
    *,
    q_positions,
    kv_positions,
    q_segments,
    kv_segments,
    sink_logits,
    alibi,
    **limits,
):
    """Attention of global arrays whose time is split over the mesh axis `sequence`; arguments as for an
    implementation."""
    (b, t), s, layout = q.shape[:2], k.shape[1], _layout.value
    devices = sequence_parallel.parts(t)
    multiple = {"contiguous": 1, "zigzag": 2, "striped": devices}[layout]
    blocks = devices
    if q_positions is None:
        q_positions, kv_positions = (
            jnp.broadcast_to(jnp.arange(n, m, dtype=jnp.int32), (b, m - n)) for n, m in ((s - t, s), (0, s))
        )
        windowed = limits["left"] is not None and limits["right"] == 0 and not limits["sinks"]
        if windowed and layout == "contiguous" and s == t:
            stretch = -(-t // devices)
            blocks = min(devices, 1 + -(-limits["left"] // stretch))  # those behind are out of every window
    # Mark the steps that pad the last segment.
    if q_segments is None and (t % (devices * multiple) or s % (devices * multiple)):
        q_segments, kv_segments = jnp.ones((b, t), jnp.int32), jnp.ones((b, s), jnp.int32)
    options = Options(op, gradient, tuple(sorted(limits.items())), blocks)

    def stretch(timed, alibi):
        (q, q_positions, q_segments), block = jax.tree.map(functools.partial(_dealt, layout), timed)
        block = Block(*block)
        _, alibi = vary_alike(q, alibi)
        out, lse = _ring(options, q, alibi, q_positions, q_segments, block)
        return jax.tree.map(functools.partial(_collected, layout), (out.astype(q.dtype), lse)), ()

    keys = (k, v, kv_positions, kv_segments)
    (out, lse), _ = sequence_parallel.split(stretch, ((q, q_positions, q_segments), keys), alibi, multiple)
    return (out, lse) if sink_logits is None else with_sink(out, lse, sink_logits, q_segments)


def with_sink(out: Array, lse: Array, sink: Array, segments: Array | None) -> tuple[Array, Array]:
    """The weights after adding a sink logit."""
    z = jnp.broadcast_to(sink.astype(lse.dtype), lse.shape)
    z = z if segments is None else jnp.where((segments == 0)[..., None], -jnp.inf, z)
    total = jnp.logaddexp(lse, z)
    kept = jnp.where(lse == -jnp.inf, 0, jnp.exp(lse - jnp.where(total == -jnp.inf, 0, total)))
    return (out * kept[..., None]).astype(out.dtype), total


# --- around the ring


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(
    options: Options,
    q: Array,
    alibi: Array | None,
    positions: Array,
    segments: Array | None,
    block: Block,
) -> tuple[Array, Array]:
    return _forward(options, q, alibi, positions, segments, block)[0]


def _forward(
    options: Options,
    q: Array,
    alibi: Array | None,
    positions: Array,
    segments: Array | None,
    block: Block,
):
    from seqlab.kernels.attention import merge

    def visit(block, out, lse):
        return merge(out, lse, *options.attend(q, alibi, positions, segments, block))

    def step(carry, _):
        following = shift(carry[0], around=True)  # on its way while this block is read
        return (following, *visit(*carry)), None

    following = shift(block, around=True) if options.blocks > 1 else None
    out, lse = options.attend(q, alibi, positions, segments, block)
    out = out.astype(lse.dtype)
    if options.blocks > 1:
        (last, out, lse), _ = jax.lax.scan(step, (following, out, lse), length=options.blocks - 2)
        out, lse = visit(last, out, lse)
    return (out, lse), (q, alibi, positions, segments, block, out, lse)


def _backward(options: Options, residuals: Any, cotangents: tuple[Array, Array]):
    q, alibi, positions, segments, block, out, lse = residuals

    def visit(block, own, dblock):
        dq, dk, dv, dalibi = options.gradient(q, alibi, positions, segments, block, out, lse, *cotangents)
        return jax.tree.map(lambda x, y: x + y.astype(x.dtype), (own, dblock), ((dq, dalibi), (dk, dv)))

    def step(carry, _):
        block, own, dblock = carry
        following = shift(block, around=True)
        own, dblock = visit(block, own, dblock)
        return (following, own, shift(dblock, around=True)), None  # gradients follow their block

    zeros = jax.tree.map(lambda x: jnp.zeros_like(x, lse.dtype), ((q, alibi), (block.k, block.v)))
    (block, own, dblock), _ = jax.lax.scan(step, (block, *zeros), length=options.blocks - 1)
    (dq, dalibi), dblock = visit(block, own, dblock)
    if options.blocks > 1:
        dblock = shift(dblock, 1 - options.blocks, around=True)  # home
    dk, dv = (x.astype(y.dtype) for x, y in zip(dblock, (block.k, block.v), strict=True))
    dalibi = None if alibi is None else dalibi.astype(alibi.dtype)
    return dq.astype(q.dtype), dalibi, None, None, Block(dk, dv, None, None)


_ring.defvjp(_forward, _backward)


# --- into a layout and back: x [b, c, ...], this device's stretch


def _dealt(layout: str, x: Array) -> Array:
    """From contiguous segments to `layout`."""
    n = sequence_parallel.count()
    if layout == "striped":
        # Step i n + j of a segment of c steps goes to device j (n divides c).
        x = x.reshape(len(x), x.shape[1] // n, n, *x.shape[2:])
        x = jax.lax.all_to_all(x, AXIS, split_axis=2, concat_axis=1, tiled=True)
        return x.reshape(len(x), -1, *x.shape[3:])
    if layout == "zigzag":
        return _exchanged(x, [(i // 2, i % 2, min(i, 2 * n - 1 - i), int(i >= n)) for i in range(2 * n)])
    return x


def _collected(layout: str, x: Array) -> Array:
    """From `layout` to contiguous segments."""
    n = sequence_parallel.count()
    if layout == "striped":
        x = x.reshape(len(x), x.shape[1], 1, *x.shape[2:])
        x = jax.lax.all_to_all(x, AXIS, split_axis=1, concat_axis=2, tiled=True)
        return x.reshape(len(x), -1, *x.shape[3:])
    if layout == "zigzag":
        return _exchanged(x, [(min(i, 2 * n - 1 - i), int(i >= n), i // 2, i % 2) for i in range(2 * n)])
    return x


def _exchanged(x: Array, moves: list[tuple[int, int, int, int]]) -> Array:
    """Halves of segments sent from (device, half) to (device, half)."""
    halves = jnp.split(x, 2, axis=1)
    received = [jnp.zeros_like(half) for half in halves]
    for old in (0, 1):
        for new in (0, 1):
            pairs = [(source, target) for source, half, target, place in moves if (half, place) == (old, new)]
            if pairs:
                received[new] = received[new] + jax.lax.ppermute(halves[old], AXIS, pairs)
    return jnp.concatenate(received, axis=1)
