"""Attention in Triton: the online softmax in tiles, gradients without atomics, and keys split among programs
in decoding."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from seqlab.kernels import triton
from seqlab.kernels.attention import xla
from seqlab.kernels.attention.xla import Places, Rule
from seqlab.kernels.blocks import find


class Blocks(NamedTuple):
    """Rows and keys of a tile, and options of Triton."""

    rows: int
    keys: int
    warps: int
    stages: int
    precision: str


WIDEST = 256  # of every table
SPLIT_KEYS = 512  # a split of the keys that is shorter costs more to merge than it saves
SPLIT_PROGRAMS = 256  # about two for every multiprocessor


def blocks(kind: str, rows: int, keys: int, width: int, itemsize: int) -> Blocks:
    """The tile for `rows` packed rows and `keys` keys of `width` numbers; matrix products need at least 16,
    and 64 suit the hardware."""
    found = Blocks(**find(f"attention/triton_gpu/{kind}", itemsize, width))
    few = 16 if rows <= 16 else triton.power(rows, 64)
    return found._replace(rows=min(found.rows, few), keys=min(found.keys, triton.power(keys, 16)))


def attention(
    q,
    k,
    v,
    *,
    left,
    right,
    sinks,
    q_positions,
    kv_positions,
    q_segments,
    kv_segments,
    softcap,
    sink_logits,
    alibi,
    scale,
):
    """See `seqlab.kernels.attention.attention`, which has checked the arguments. Positions and segments come
    in pairs or not at all."""
    _require(q, k, v, sink_logits, alibi)
    dtype = jnp.result_type(q, k, v)
    rule, places = (
        Rule(left, right, sinks, softcap, scale),
        Places(q_positions, q_segments, kv_positions, kv_segments),
    )
    sink = None if sink_logits is None else sink_logits.astype(jnp.float32)
    slopes = None if alibi is None else alibi.astype(jnp.float32)
    out, lse = _attend(rule, q.astype(dtype), k.astype(dtype), v.astype(dtype), sink, slopes, places)
    return out.astype(q.dtype), lse


def attention_gradient(q, k, v, alibi, out, lse, dout, dlse, *, left, right, sinks, softcap, scale, **places):
    """`dq, dk, dv, dalibi` for a part of the keys of an attention: `out` and `lse` are those over all
    keys."""
    _require(q, k, v, alibi, dout)
    rule = Rule(left, right, sinks, softcap, scale)
    slopes = None if alibi is None else alibi.astype(jnp.float32)
    dq, dk, dv, _, dalibi, _ = _attend_backward(
        rule, (q, k, v, None, slopes, Places(**places), out, lse), (dout, dlse)
    )
    return dq, dk, dv, dalibi


def _require(q, k, v, *others):
    triton.require(q, k, v, *others)
    if max(k.shape[3], v.shape[3]) > WIDEST:
        raise NotImplementedError(
            f"kernels for heads of up to {WIDEST} exist, got k={k.shape[3]} and v={v.shape[3]}"
        )
    if 0 in (*q.shape, *k.shape, *v.shape):
        raise NotImplementedError("nothing to attend to")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(rule, q, k, v, sink, alibi, places):
    from seqlab.kernels.attention import triton_kernels as kernels

    (b, t, h, _), (s, g), width = q.shape, k.shape[1:3], v.shape[3]
    rows = t * h // g
    cut = blocks("forward", rows, s, max(k.shape[3], width), k.dtype.itemsize)
    tiles = triton.blocks(rows, cut.rows)
    splits = splits_of(b * g * tiles, s) if t == 1 else 1
    constants = _constants(rule, q, k, v, places, cut)
    constants |= {"ALIBI": alibi is not None}
    constants |= {"ROWS": b, "SINK": sink is not None, "SPLITS": splits, "KEY_STRIDE": g, "GROUP_STRIDE": 1}
    # Keys stored as [heads, slots] are then read without a copy; the caller's transposition cancels out.
    if t == 1:
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        constants |= {"KEY_STRIDE": 1, "GROUP_STRIDE": s}
    extra = (q if x is None else x for x in (sink, alibi))
    arrays = (q, k, v, *extra, *_places(rule, places, q, s, h // g, cut))
    shapes = [
        ((splits, b, t, h, width), q.dtype if splits == 1 else jnp.float32),
        ((splits, b, t, h), jnp.float32),
    ]
    grid = (tiles * splits, g, b)
    out, lse = triton.launch(
        kernels.forward, arrays, shapes, grid=grid, constants=constants, warps=cut.warps, stages=cut.stages
    )
    out, lse = merged(out, lse)
    return out.astype(q.dtype), lse


def splits_of(programs: int, s: int) -> int:
    """The number of programs among which the keys of one tile are split, so that all multiprocessors have
    work."""
    return max(1, min(triton.blocks(SPLIT_PROGRAMS, programs), s // SPLIT_KEYS))


def merged(out: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The attention over all splits from that over each, [splits, ..., v] and [splits, ...]."""
    if len(out) == 1:
        return out[0], lse[0]
    top = jnp.max(lse, axis=0)
    weights = jnp.exp(lse - jnp.where(top == -jnp.inf, 0, top))
    total = weights.sum(0)
    some = jnp.where(total == 0, 1, total)
    return (out * (weights / some)[..., None]).sum(0), jnp.where(total == 0, -jnp.inf, top + jnp.log(some))


def _attend_forward(rule, q, k, v, sink, alibi, places):
    out, lse = _attend(rule, q, k, v, sink, alibi, places)
    return (out, lse), (q, k, v, sink, alibi, places, out, lse)


def _attend_backward(rule, residuals, cotangents):
    from seqlab.kernels.attention import triton_kernels as kernels

    (q, k, v, sink, alibi, places, out, lse), (dout, dlse) = residuals, cotangents
    (b, t, h, _), (s, g) = q.shape, k.shape[1:3]
    dead = lse == -jnp.inf  # a row that saw nothing has no gradient
    d = jnp.where(dead, 0, jnp.sum(out.astype(lse.dtype) * dout.astype(lse.dtype), axis=-1) - dlse)
    dout = dout.astype(q.dtype)
    gradients = {}
    for kernel, shapes in ((kernels.backward_keys, (k, v)), (kernels.backward_queries, (q,))):
        name = kernel.__name__
        cut = blocks(name, t * h // g, s, max(k.shape[3], v.shape[3]), k.dtype.itemsize)
        tiles = triton.blocks(s, cut.keys) if name == "backward_keys" else triton.blocks(t * h // g, cut.rows)
        constants = _constants(rule, q, k, v, places, cut) | {"ALIBI": alibi is not None}
        results = [(x.shape, x.dtype) for x in shapes]
        if name == "backward_queries":
            results.append((lse.shape if alibi is not None else (1,), jnp.float32))  # by row, of the slopes
        gradients[name] = triton.launch(
            kernel,
            (
                *(q, k, v, dout, lse, d, q if alibi is None else alibi),
                *_places(rule, places, q, s, h // g, cut),
            ),
            results,
            grid=(tiles, g, b),
            constants=constants,
            warps=cut.warps,
            stages=cut.stages,
        )
    dsink = None
    if sink is not None:
        weight = jnp.where(dead, 0, jnp.exp(sink[None, None] - jnp.where(dead, 0, lse)))
        dsink = -(weight * d).sum((0, 1)).astype(sink.dtype)
    dq, by_row = gradients["backward_queries"]
    dalibi = None if alibi is None else by_row.sum(1)
    return dq, *gradients["backward_keys"], dsink, dalibi, None


_attend.defvjp(_attend_forward, _attend_backward)


def _constants(rule, q, k, v, places, cut):
    """Constants shared by the three kernels."""
    return {
        "T": q.shape[1],
        "S": k.shape[1],
        "H": q.shape[2],
        "G": k.shape[2],
        "K": k.shape[3],
        "V": v.shape[3],
        "LEFT": -1 if rule.left is None else rule.left,
        "RIGHT": -1 if rule.right is None else rule.right,
        "SINKS": rule.sinks,
        "SOFTCAP": rule.softcap or 0.0,
        "SCALE": rule.scale,
        "PLACED": places.q_positions is not None,
        "SEGMENTS": places.q_segments is not None,
        "PRECISION": cut.precision,
        "KP": triton.power(k.shape[3], 16),
        "VP": triton.power(v.shape[3], 16),
        "BM": cut.rows,
        "BN": cut.keys,
    }


def _places(rule, places, q, s, r, cut):
    """Positions, segments, and which tiles of keys [b, row tiles, key tiles] hold anything visible to a tile
    of packed rows."""
    blank = tuple(q if x is None else x.astype(jnp.int32) for x in places)
    q_positions, q_segments, kv_positions, kv_segments = blank
    if all(x is None for x in places):
        return q_positions, kv_positions, q_segments, kv_segments, q
    ends = functools.partial(xla._ends, jnp)
    first, second = xla._positions(places, q.shape[1], s)
    needed = xla._needed(rule, ends(jnp.repeat(first, r, axis=1), cut.rows), ends(second, cut.keys))
    if places.q_segments is not None:
        q_low, q_high = ends(jnp.repeat(q_segments, r, axis=1), cut.rows, skip=0)
        k_low, k_high = ends(kv_segments, cut.keys, skip=0)
        needed = needed & (q_low[:, :, None] <= k_high[:, None]) & (k_low[:, None] <= q_high[:, :, None])
    shape = (q.shape[0], triton.blocks(q.shape[1] * r, cut.rows), triton.blocks(s, cut.keys))
    return (
        q_positions,
        kv_positions,
        q_segments,
        kv_segments,
        jnp.broadcast_to(needed, shape).astype(jnp.int8),
    )
