"""Softmax attention: causal, windowed, grouped, packed; and `merge`, which combines partial attentions.

Implementations: `reference` (dense), `xla` (tiles, memory linear in time; runs everywhere), `pallas_tpu`,
`triton_gpu`.
"""

import functools
import math
import numbers

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from seqlab.checks import UserError
from seqlab.kernels.attention.ring import ring
from seqlab.kernels.dispatch import Op, vary_alike
from seqlab.parallel import sequence_parallel
from seqlab.shapes import Keys, LogSumExp, Queries, Values

_op = Op("attention", __name__, ("reference", "xla", "pallas_tpu", "triton_gpu"))
# The gradient for a part of the keys, used by the ring.
_gradient = Op("attention_gradient", __name__, ("reference", "xla", "pallas_tpu", "triton_gpu"))


def attention(
    q: Queries,
    k: Keys,
    v: Values,
    *,
    causal: bool = True,
    window: int | tuple[int | None, int | None] | None = None,
    sinks: int = 0,
    q_positions: Int[Array, "b t"] | None = None,
    kv_positions: Int[Array, "b s"] | None = None,
    q_segments: Int[Array, "b t"] | None = None,
    kv_segments: Int[Array, "b s"] | None = None,
    softcap: float | None = None,
    sink_logits: Float[Array, " h"] | None = None,
    alibi: Float[Array, " h"] | Float[Array, "b h"] | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "b t h v"], LogSumExp]:
    """Softmax attention of queries over keys, with the log-sum-exp of its logits.

        X_ij = scale q_i·k_j;  X <- c tanh(X / c) - a |i - j|
        lse_i = log(exp z + Σ_j exp X_ij);  out_i = Σ_j exp(X_ij - lse_i) v_j

    over the keys j that query i may see: those of its segment, and where `causal` those at its position or
    before it, and where a `window` is given of these the ones inside it and the first `sinks` of the
    sequence. i and j are positions. A query that sees nothing has out = 0 and lse = -inf (lse = z with a sink
    logit) and passes no gradient to q, k, v.

    Args:
      q: [b, t, h, k]; query head i reads key/value head i // (h // g).
      k, v: [b, s, g, k] and [b, s, g, v]; g divides h. The widths k and v may differ. A cache that is read by
        one query at a time should be stored as [b, g, s, k] and passed as `cache.swapaxes(1, 2)`: `xla` then
        reads it without a copy.
      causal: hide the keys at later positions.
      window: W, how many keys a query sees, its own included; needs `causal`. Or a pair (left, right): how
        many positions before and after its own; None is unbounded, and `causal` makes right 0. W is (W - 1,
        0).
      sinks: keys at positions below this stay visible to the left of the window.
      q_positions, kv_positions: [b, t] and [b, s]; the keys may be in any order. By default the last query
        and the last key are at the same position: q_positions = arange(t) + s - t, kv_positions = arange(s).
        With this default implementations can skip invisible tiles.
      q_segments, kv_segments: [b, t] and [b, s]; queries see keys of the same segment only, and 0 is padding:
        its contents, NaN included, reach no result and no gradient, and its queries have lse = -inf. Default:
        all 1.
      softcap: c above, the bound of the logits.
      sink_logits: [h], z above: a logit without a value, which takes weight from the keys.
      alibi: [h] or [b, h], a above: subtracted from a logit per step of distance, after the softcap.
      scale: default 1 / sqrt(k).
      implementation: "reference", "xla", "pallas_tpu" or "triton_gpu"; None: chosen by
        `seqlab.kernels.dispatch`.

    Returns:
      out [b, t, h, v] in the dtype of q, and lse [b, t, h] (natural logarithm) in `accumulator` of the
      inputs' dtype. Both may be differentiated, any number of times through `reference`, once through the
      others.

    Raises:
      ValueError: if an argument has the wrong shape, type or range, or `implementation` is unknown.

    Source: FlashAttention-2 (arXiv 2307.08691) for lse; softcap of Gemma 2 (arXiv 2408.00118), sinks of
    StreamingLLM (arXiv 2309.17453), ALiBi (arXiv 2108.12409).
    """
    _check_arrays(q, k, v, sink_logits, alibi)
    left, right = _limits(causal, window)
    _check_options(sinks, softcap, scale)
    (b, t, _, width), s = q.shape, k.shape[1]
    places = {
        "q_positions": q_positions,
        "q_segments": q_segments,
        "kv_positions": kv_positions,
        "kv_segments": kv_segments,
    }
    for name, value in places.items():
        _check_integers(name, value, (b, t if name.startswith("q") else s))
    if (q_positions is None) != (kv_positions is None):
        places["q_positions"] = _rows(b, jnp.arange(s - t, s)) if q_positions is None else q_positions
        places["kv_positions"] = _rows(b, jnp.arange(s)) if kv_positions is None else kv_positions
    if q_segments is not None or kv_segments is not None:
        q_segments = places["q_segments"] = jnp.ones((b, t), jnp.int32) if q_segments is None else q_segments
        kv_segments = places["kv_segments"] = (
            jnp.ones((b, s), jnp.int32) if kv_segments is None else kv_segments
        )
        # Zero weight does not stop a NaN (0 * NaN), neither here nor in the gradients: padding is replaced
        # before it is read.
        q, k, v = (
            _without_padding(q, q_segments),
            _without_padding(k, kv_segments),
            _without_padding(v, kv_segments),
        )
    if alibi is not None:
        alibi = jnp.broadcast_to(alibi, (b, q.shape[2]))
    q, k, v, sink_logits, alibi = vary_alike(q, k, v, sink_logits, alibi)
    split = min(sequence_parallel.parts(t), sequence_parallel.parts(s)) > 1
    return (functools.partial(ring, _op, _gradient) if split else _op)(
        q,
        k,
        v,
        left=left,
        right=right,
        sinks=int(sinks),
        **places,
        softcap=None if softcap is None else float(softcap),
        sink_logits=sink_logits,
        alibi=alibi,
        scale=1 / math.sqrt(width) if scale is None else float(scale),
        implementation=implementation,
    )


def merge(
    out_a: Float[Array, "b t h v"], lse_a: LogSumExp, out_b: Float[Array, "b t h v"], lse_b: LogSumExp
) -> tuple[Float[Array, "b t h v"], LogSumExp]:
    """Attention over the union of two sets of keys, from the attentions over each.

        lse = log(exp lse_a + exp lse_b);  out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b

    Associative and commutative; an attention over no keys (out = 0, lse = -inf) is the identity, in value and
    in gradient. The keys of `a` and `b` must be disjoint, and at most one of them may include a sink logit.
    Computed in the dtype of the lse; out has that of `out_a` and `out_b`.

    Raises:
      ValueError: if the shapes do not fit each other.
    """
    if out_a.shape != out_b.shape:
        raise UserError(f"out_b must have the shape of out_a, {out_a.shape}; got {out_b.shape}")
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        if lse.shape != out_a.shape[:-1]:
            raise UserError(
                f"{name} must have the shape of out_a without its last axis, {out_a.shape[:-1]}; got "
                f"{lse.shape}"
            )
    # Shifted by a constant: lse and the weights do not depend on `top`, so no gradient needs to pass through
    # it.
    top = jnp.maximum(lse_a, lse_b)
    top = jax.lax.stop_gradient(jnp.where(top == -jnp.inf, 0, top))
    a, b = jnp.exp(lse_a - top), jnp.exp(lse_b - top)
    some = jnp.where(a + b == 0, 1, a + b)
    out = (a / some)[..., None] * out_a + (b / some)[..., None] * out_b
    return out.astype(jnp.result_type(out_a, out_b)), jnp.where(a + b == 0, -jnp.inf, top + jnp.log(some))


def _rows(b: int, positions: Array) -> Array:
    return jnp.broadcast_to(positions[None], (b, *positions.shape))


def _without_padding(x: Array, segments: Array) -> Array:
    return jnp.where((segments == 0)[:, :, None, None], jnp.zeros((), x.dtype), x)


def _check_arrays(q: Array, k: Array, v: Array, sink_logits: Array | None, alibi: Array | None) -> None:
    for name, x, axes in (("q", q, "[b, t, h, k]"), ("k", k, "[b, s, g, k]"), ("v", v, "[b, s, g, v]")):
        if x.ndim != 4 or not jnp.issubdtype(x.dtype, jnp.floating):
            raise UserError(f"{name} must be a floating-point array {axes}, got {x.dtype}{x.shape}")
    b, _, h, width = q.shape
    s, g = k.shape[1:3]
    if k.shape != (b, s, g, width) or width == 0:
        raise UserError(
            f"k must be [b, s, g, k] with b={b} rows and width k={width} > 0 as q {q.shape}, got {k.shape}"
        )
    if v.shape[:3] != (b, s, g):
        raise UserError(f"v must begin with the axes of k, [b, s, g] = {(b, s, g)}, got {v.shape}")
    if g == 0 or h % g:
        raise UserError(f"k must have a number of heads that divides the {h} heads of q, got g={g}")
    for name, x, shapes, axes in (
        ("sink_logits", sink_logits, [(h,)], f"[h] = ({h},)"),
        ("alibi", alibi, [(h,), (b, h)], f"[h] = ({h},) or [b, h] = ({b}, {h})"),
    ):
        if x is not None and (x.shape not in shapes or not jnp.issubdtype(x.dtype, jnp.floating)):
            raise UserError(f"{name} must be a floating-point array {axes}, got {x.dtype}{x.shape}")


def _limits(
    causal: bool, window: int | tuple[int | None, int | None] | None
) -> tuple[int | None, int | None]:
    """The number of positions visible to the left and right of a query; None for no limit."""
    if isinstance(window, tuple | list):
        if len(window) != 2 or any(
            x is not None and (not _is_number(x, numbers.Integral) or x < 0) for x in window
        ):
            raise UserError(
                "window must be an integer or a pair (left, right) of integers of at least 0 or None, got "
                f"{window!r}"
            )
        left, right = (None if x is None else int(x) for x in window)
        return left, 0 if causal else right
    if window is None:
        return None, 0 if causal else None
    if not _is_number(window, numbers.Integral) or window < 1:
        raise UserError(
            "window must be an integer of at least 1 (the query's own key counts), a pair (left, right) or "
            f"None, got {window!r}"
        )
    if not causal:
        raise UserError(
            f"window needs causal=True or a pair (left, right), got window={window!r} with causal={causal!r}"
        )
    return int(window) - 1, 0


def _check_options(sinks: int, softcap: float | None, scale: float | None) -> None:
    if not _is_number(sinks, numbers.Integral) or sinks < 0:
        raise UserError(f"sinks must be an integer of at least 0, got {sinks!r}")
    if softcap is not None and not (_is_number(softcap, numbers.Real) and 0 < softcap < math.inf):
        raise UserError(f"softcap must be a number above 0 or None, got {softcap!r}")
    if scale is not None and not (_is_number(scale, numbers.Real) and math.isfinite(scale)):
        raise UserError(f"scale must be a finite number or None (1 / sqrt of the width of k), got {scale!r}")


def _check_integers(name: str, value: Array | None, shape: tuple[int, int]) -> None:
    if value is not None and (value.shape != shape or not jnp.issubdtype(value.dtype, jnp.integer)):
        raise UserError(f"{name} must be an integer array of shape {shape}, got {value.dtype}{value.shape}")


def _is_number(value: object, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
