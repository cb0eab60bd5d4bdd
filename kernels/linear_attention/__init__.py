"""Linear attention: one matrix memory per head, written by outer products and read by the query, in all
variants.

    kind                     decay                       beta
    linear attention         -                           -
    RetNet, Lightning        [h], constant in time       -
    Mamba-2 (SSD)            [b, t, h]                   -
    GLA                      [b, t, h, k]                -
    DeltaNet                 -                           [b, t, h]
    Gated DeltaNet           [b, t, h]                   [b, t, h]
    KDA                      [b, t, h, k]                [b, t, h]

Implementations: `reference` (one step in a scan), `xla` (chunks and matrix products; runs everywhere),
`pallas_tpu`, `triton_gpu`.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from seqlab.checks import UserError
from seqlab.kernels.dispatch import Op, vary_alike
from seqlab.parallel import sequence_parallel
from seqlab.resets import Broken, broken
from seqlab.shapes import Steps, accumulator
from seqlab.state import mask_steps

_op = Op("linear_attention", __name__, ("reference", "xla", "pallas_tpu", "triton_gpu"))


def linear_attention(
    q: Float[Array, "b t g k"],
    k: Float[Array, "b t g k"],
    v: Float[Array, "b t h v"],
    *,
    decay: Float[Array, "b t h k"] | Float[Array, "b t h"] | Float[Array, " h"] | None = None,
    beta: Float[Array, "b t h v"] | Float[Array, "b t h"] | None = None,
    scale: float | None = None,
    initial_state: Float[Array, "b h k v"] | None = None,
    reset: Steps | None = None,
    valid: Steps | None = None,
    chunk: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "b t h v"], Float[Array, "b h k v"]]:
    """Decayed linear attention, with or without the delta rule.

        S~  = diag(exp decay_t) S_{t-1}
        u_t = v_t,  or with beta  β_t (v_t - S~ᵀ k_t)
        S_t = S~ + k_t u_tᵀ                                       o_t = scale S_tᵀ q_t

    The decay acts before the delta rule reads, and the query reads after the update. A segment of time is an
    affine map of the state. A column of ones in v accumulates a normaliser (a sum of keys).

    Args:
      q, k: [b, t, g, k].
      v: [b, t, h, v], where g divides h: head i is read and written by query and key i // (h // g).
      decay: the logarithm of the decay, <= 0, -inf included: one number per head [b, t, h] or [h], or per key
        channel [b, t, h, k].
      beta: the strength of the delta rule, one number per head [b, t, h] or per value [b, t, h, v]; None for
        none. Keys should then have unit length and beta be in (0, 2), or the recurrence may grow without
        bound.
      scale: of the output; k ** -0.5 by default.
      initial_state: [b, h, k, v]; zeros by default.
      reset: [b, t]; where True a fresh sequence starts and the state, NaN included, is forgotten. (A NaN
        among the arguments of a valid step may reach the other steps of its chunk except in `reference`, in
        sequences before and after it too.)
      valid: [b, t]; a step with False has no effect: its inputs, NaN included, reach no other output, no
        state and no gradient, its own output is 0 and its reset is ignored.
      chunk: steps per chunk of `xla`, a power of two; None: 64, or 32 with beta or channel decays, or 16 with
        beta per value. It does not depend on t: trailing invalid steps leave the state bit-identical.
      implementation: "reference", "xla", "pallas_tpu" or "triton_gpu"; None: chosen by
        `seqlab.kernels.dispatch`.

    Returns:
      out [b, t, h, v] in the dtype of v, and the final state [b, h, k, v] in `accumulator` of the widest of
      q, k and v. Both may be differentiated, in any way through `reference`, once and in reverse through the
      others.

    Raises:
      ValueError: if an argument has the wrong shape, type or range, or `implementation` is unknown.

    Sources: arXiv 2006.16236 (linear attention), 2307.08621 (RetNet), 2405.21060 (Mamba-2), 2312.06635 (GLA),
    2406.06484 (DeltaNet),
    2412.06464 (Gated DeltaNet), 2510.26692 (KDA).
    """
    _check_arrays(q, k, v, decay, beta, initial_state)
    for name, flags in (("reset", reset), ("valid", valid)):
        if flags is not None and (flags.shape != v.shape[:2] or flags.dtype != bool):
            raise UserError(
                f"{name} must be a boolean array [b, t] = {v.shape[:2]}, got {flags.dtype}{flags.shape}"
            )
    if chunk is not None and (
        isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1 or chunk & (chunk - 1)
    ):
        raise UserError(f"chunk must be a power of two or None, got {chunk!r}")
    (b, t, h, _), width = v.shape, k.shape[-1]
    dtype = accumulator(jnp.result_type(q, k, v))
    state = (
        jnp.zeros((b, h, width, v.shape[-1]), dtype) if initial_state is None else initial_state.astype(dtype)
    )
    if t == 0:
        return v, state
    if decay is not None and decay.ndim == 1:
        decay = jnp.broadcast_to(decay[None, None], (b, t, h))
    timed, found = (q, k, v, decay, beta, reset, valid), None
    if reset is not None:
        timed, found = _set_apart(timed)
    options = {"scale": scale, "chunk": chunk, "implementation": implementation}
    if sequence_parallel.parts(t) > 1:  # steps of zeros, which fill up the last stretch, do nothing
        # With beta per value, every value has its own map [k, k], too many to send.
        per_value = beta is not None and beta.ndim == 4
        run = functools.partial(_in_turn if per_value else _stretch, options)
        out, final = sequence_parallel.split(run, timed, None if initial_state is None else state)
    else:
        out, final = _on_one_device(options, timed, state)
    if found is None:
        return out, final
    steps, rows = (flags.reshape(flags.shape + (1, 1, 1)[: 4 - flags.ndim]) for flags in found)
    return jnp.where(steps, jnp.nan, out), jnp.where(rows, jnp.nan, final)


def _set_apart(timed: tuple) -> tuple[tuple, Broken]:
    """The arguments without non-finite steps, and the effect of those. (A decay may be -inf.)"""
    *floats, reset, valid = timed
    q, k, v, decay, beta = floats
    whole = [jnp.isfinite(x) for x in (q, k, v, beta) if x is not None]
    whole += [] if decay is None else [~jnp.isnan(decay)]
    bad = ~functools.reduce(jnp.logical_and, [x.all(tuple(range(2, x.ndim))) for x in whole])
    clean = (None if x is None else mask_steps(x, ~bad) for x in floats)
    return (*clean, reset, valid), broken(bad, None, reset, valid)


def _on_one_device(options: dict, timed: tuple, state: Array) -> tuple[Array, Array]:
    q, k, v, decay, beta, reset, valid = timed
    decay, beta = (x[..., None] if x is not None and x.ndim == 3 else x for x in (decay, beta))
    if valid is not None:
        # A step with k = 0, beta = 0 and no decay leaves the state alone; selecting, not multiplying, keeps
        # NaN out.
        q, k, v, decay, beta = (None if x is None else mask_steps(x, valid) for x in (q, k, v, decay, beta))
        reset = None if reset is None else reset & valid
    arrays = vary_alike(q, k, v, decay, beta, state, reset)
    scale = k.shape[-1] ** -0.5 if options["scale"] is None else options["scale"]
    out, final_state = _op(*arrays, **(options | {"scale": scale}))
    if valid is not None:
        final_state = jnp.where(jnp.any(valid, axis=1)[:, None, None, None], final_state, state)
    return mask_steps(out, valid), final_state


def _stretch(options: dict, timed: tuple, initial_state: Array | None) -> tuple[Array, Array]:
    """The work of one device if time is split over several: first the affine map of its segment, then its
    steps from the incoming state."""
    q, k, v, decay, beta, reset, valid = timed
    run = functools.partial(
        linear_attention, q, k, decay=decay, beta=beta, reset=reset, valid=valid, **options
    )
    (b, _, h, width), size, wide = v.shape, k.shape[-1], accumulator(jnp.result_type(q, k, v))
    if beta is None:
        end, act = jax.checkpoint(lambda: run(v)[1])(), jnp.multiply
        total = (
            jnp.zeros((b, h), wide)
            if decay is None
            else jnp.sum(mask_steps(decay, valid).astype(wide), axis=1)
        )
        moved = jnp.exp(total.reshape(b, h, -1, 1))
    else:  # the product of I - beta k k' over all steps is the image of the identity
        act = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
        both = jnp.broadcast_to(jnp.eye(size, width + size, width, dtype=wide), (b, h, size, width + size))
        values = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, size)))
        end, moved = jnp.split(jax.checkpoint(lambda: run(values, initial_state=both)[1])(), [width], axis=-1)
    stretch = sequence_parallel.Stretch(end, moved, sequence_parallel.continues(reset, valid))
    out, end = run(v, initial_state=sequence_parallel.carried(stretch, initial_state, act))
    return out, sequence_parallel.of_last(end)


def _in_turn(options: dict, timed: tuple, initial_state: Array | None) -> tuple[Array, Array]:
    """The same without a map of the segment: one device after the other."""

    def run(state: Array, floats: tuple, flags: tuple) -> tuple[Array, Array]:
        q, k, v, decay, beta = floats
        return linear_attention(
            q, k, v, decay=decay, beta=beta, initial_state=state, reset=flags[0], valid=flags[1], **options
        )

    (_, k, v, *_), wide = timed, accumulator(jnp.result_type(*timed[:3]))
    empty = jnp.zeros((len(v), v.shape[2], k.shape[-1], v.shape[-1]), wide)
    return sequence_parallel.relay(
        run, empty if initial_state is None else initial_state, timed[:5], timed[5:]
    )


def _check_arrays(
    q: Array, k: Array, v: Array, decay: Array | None, beta: Array | None, initial_state: Array | None
) -> None:
    for name, x, axes in (("q", q, "b, t, g, k"), ("v", v, "b, t, h, v")):
        if x.ndim != 4 or 0 in (*x.shape[:1], *x.shape[2:]):
            raise UserError(
                f"{name} must be an array [{axes}] of one row, head and channel at least, got "
                f"{x.dtype}{x.shape}"
            )
    (b, t, h, width), (g, keys) = v.shape, q.shape[2:]
    if h % g:
        raise UserError(f"v has {h} heads, which the {g} heads of q must divide")
    wanted = {
        "q": (q, {"b, t, g, k": (b, t, g, keys)}),
        "k": (k, {"b, t, g, k": (b, t, g, keys)}),
        "v": (v, {"b, t, h, v": (b, t, h, width)}),
        "decay": (decay, {"b, t, h": (b, t, h), "b, t, h, k": (b, t, h, keys), "h": (h,)}),
        "beta": (beta, {"b, t, h": (b, t, h), "b, t, h, v": (b, t, h, width)}),
        "initial_state": (initial_state, {"b, h, k, v": (b, h, keys, width)}),
    }
    for name, (x, shapes) in wanted.items():
        if x is not None and (x.shape not in shapes.values() or not jnp.issubdtype(x.dtype, jnp.floating)):
            choices = " or ".join(f"[{axes}] = {shape}" for axes, shape in shapes.items())
            raise UserError(f"{name} must be a floating-point array {choices}, got {x.dtype}{x.shape}")
