"""The parts of a quantized cache: its state, what is recent, and attention over that."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from seqlab.kernels.decode_attention import Coded
from seqlab.models.cache.common import Scores
from seqlab.models.cache.quantize import Groups
from seqlab.shapes import Keys, LogSumExp, Queries, Values, accumulator
from seqlab.state import Segments

Partial = tuple[Float[Array, "b t h v"], LogSumExp]  # an attention over some of the keys, to be merged


class QuantizedState(NamedTuple):
    """`sink_k`, `sink_v` [b, g, sinks, k]: the first steps, exact. `k`, `v`: packed codes [b, g, words, s] by
    slot, with scale and least value [b, g, s / group, k] of keys, over steps, and [b, g, k / group, s] of
    values, over channels. `rest_k`, `rest_v` [b, g, residual, k]: the newest steps, exact, in a ring.
    `length` [b]: steps seen."""

    sink_k: Float[Array, "b g n k"]
    sink_v: Float[Array, "b g n v"]
    k: Coded
    v: Coded
    rest_k: Float[Array, "b g r k"]
    rest_v: Float[Array, "b g r v"]
    length: Int[Array, " b"]


class Recent(NamedTuple):
    """The residual and then the chunk, as one list of e steps: keys and values [b, e, g, k], exact and
    dequantized, the `groups` that each key is quantized by, the `places` [b, e] of the steps behind the sinks
    (below 0: a sink), their `segments` [b, e] (0 for nothing), and which keys are not quantized yet, `open_`
    [b, e]."""

    k: Array
    coded_k: Array
    v: Array
    coded_v: Array
    groups: Groups
    places: Array
    segments: Array
    open_: Array


def attend_recent(
    rule: Any,
    q: Queries,
    place: Int[Array, "b t"],
    where: Segments,
    recent: Recent,
    whole: Array,
    scores: Scores,
    picked: Any = None,
) -> Partial:
    """Dense attention over the residual and the chunk, each key and value as the query sees it, or exactly
    in the rows where `whole` [b, 1, 1]. `rule` says what that is, `picked` which blocks each query reads."""
    (b, t, h, width), g = q.shape, recent.v.shape[2]
    acc, residual = accumulator(q.dtype), rule.residual
    queries = q.reshape(b, t, g, h // g, width)
    place, u = place[:, :, None], recent.places[:, None, :]
    see = (recent.segments[:, None, :] == where.ids[:, :, None]) & (where.ids > 0)[:, :, None]
    see = see & (u >= 0) & (u <= place) & rule.retention.sees(place, u)
    exact_k = whole | (u >= place // residual * residual)
    exact_v = whole | (u >= place - residual)
    x = jnp.where(
        exact_k[:, None, None],
        _logits(queries, recent.k, scores, acc),
        _logits(queries, recent.coded_k, scores, acc),
    )
    see = see[:, :, None] if picked is None else see[:, :, None] & picked.sees(recent.places)
    p, lse = _weights(x, see)
    # 0 * NaN is NaN: padding must hold numbers.
    here = (recent.segments > 0)[:, :, None, None]
    v, coded_v = (jnp.where(here, x, 0).astype(acc) for x in (recent.v, recent.coded_v))
    out = jnp.einsum("bgrts,bsgv->btgrv", p, coded_v)
    near = jnp.where(exact_v[:, None, None], p, 0)
    out = out + jnp.einsum("bgrts,bsgv->btgrv", near, v - coded_v)
    return out.reshape(b, t, h, -1).astype(q.dtype), lse


def attend_masked(q: Queries, k: Keys, v: Values, see: Bool[Array, "b t _ s"], scores: Scores) -> Partial:
    """Dense attention over the keys that each query head sees; `see` may have one head for all."""
    (b, t, h, width), g, acc = q.shape, k.shape[2], accumulator(q.dtype)
    x = _logits(q.reshape(b, t, g, h // g, width), k, scores, acc)
    p, lse = _weights(x, see)
    v = jnp.where(see.any((1, 2))[:, :, None, None], v, 0).astype(acc)
    return jnp.einsum("bgrts,bsgv->btgrv", p, v).reshape(b, t, h, -1).astype(q.dtype), lse


def _weights(x: Array, see: Bool[Array, "b t _ s"]) -> tuple[Array, LogSumExp]:
    """The weights [b, g, r, t, s] of logits of the same shape where `see`, and their log-sum-exp [b, t,
    h]."""
    b, g, r, t, s = x.shape
    heads = (g, r) if see.shape[2] > 1 else (1, 1)
    x = jnp.where(see.swapaxes(1, 2).reshape(b, *heads, t, s), x, -jnp.inf)
    row_max = jax.lax.stop_gradient(jnp.maximum(x.max(-1, keepdims=True), jnp.finfo(x.dtype).min))
    p = jnp.exp(x - row_max)
    row_sum = p.sum(-1, keepdims=True)
    safe_sum = jnp.where(row_sum == 0, 1, row_sum)
    lse = jnp.where(row_sum == 0, -jnp.inf, row_max + jnp.log(safe_sum))
    return p / safe_sum, jnp.moveaxis(lse[..., 0], 3, 1).reshape(b, t, g * r)


def _logits(q: Array, k: Array, scores: Scores, acc: jax.typing.DTypeLike) -> Array:
    """Logits [b, g, r, t, e]."""
    scale = q.shape[-1] ** -0.5 if scores.scale is None else scores.scale
    x = jnp.einsum("btgrk,bsgk->bgrts", q, k, preferred_element_type=acc) * scale
    return x if scores.softcap is None else scores.softcap * jnp.tanh(x / scores.softcap)


def put_slot(x: Array, values: Array, slot: Int[Array, " b"], keep: Bool[Array, " b"]) -> Array:
    """x [b, g, s, .] with values [b, g, .] in one slot of each row, where `keep`."""
    rows, heads = jnp.arange(x.shape[0])[:, None], jnp.arange(x.shape[1])[None]
    slot = jnp.where(keep, slot, x.shape[2])[:, None]  # out of range: the scatter drops the write
    return x.at[rows, heads, slot].set(values.astype(x.dtype), mode="drop")


def put_slots(x: Array, values: Array, first: Int[Array, " b"], keep: Bool[Array, " b"], axis: int) -> Array:
    """x [b, g, s, .] (`axis` 2) or [b, g, ., s] (`axis` 3) with values of the same layout in the slots of
    each row from `first` on, where `keep`."""
    rows, heads = jnp.arange(x.shape[0])[:, None, None], jnp.arange(x.shape[1])[:, None]
    slots = first[:, None] + jnp.arange(values.shape[axis])
    slots = jnp.where(keep[:, None], slots, x.shape[axis])[:, None]
    index = (rows, heads, slice(None), slots) if axis == 3 else (rows, heads, slots)
    values = jnp.moveaxis(values, 3, 2) if axis == 3 else values
    return x.at[index].set(values.astype(x.dtype), mode="drop")
