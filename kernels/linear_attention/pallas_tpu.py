"""Linear attention on a TPU: the chunks of `xla`, one at a time in vector memory, where the state [k, v]
stays throughout.

The equations are those of `xla`; inside a chunk every array has two axes. Sums of log decays are products
with matrices of 0 and 1, each over exactly its own steps: none is a difference of two larger sums, so that no
digits are lost next to a sudden decay. Per-step numbers are stored as rows and turned into columns through
the diagonal of a matrix.

The forward pass keeps the state before every block of some chunks. The backward pass processes blocks, and
chunks within them, in reverse; the gradient of a chunk is JAX's derivative of its function, taken when the
kernel is traced. Heads that share queries and keys are processed one after another and accumulate their
gradients in place.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from seqlab.kernels import pallas
from seqlab.kernels.blocks import find

_LEAST = 16  # minimal steps per chunk: the rows of a tile of bfloat16
_EXACT = jax.lax.Precision.HIGHEST
_FLOOR = -128.0  # exp of less is 0 in float32, and minus infinity times 0 would not be


class Config(NamedTuple):
    """Static configuration."""

    scale: float
    size: int  # steps of a chunk
    chunks: int  # of a block
    heads: int  # of a group
    decay: str | None  # "head", "channel"
    beta: str | None  # "head", "value"
    reset: bool
    precision: Any  # of products of arguments: those of bfloat16 need one pass

    @property
    def steps(self) -> int:
        return self.size * self.chunks


def linear_attention(q, k, v, decay, beta, initial_state, reset, *, scale, chunk=None):
    """`out, final_state`; see `xla.linear_attention` for the arguments. `chunk` is taken as 16 to 128."""
    pallas.require(q, k, v, decay, beta, initial_state)
    kinds = [
        None if x is None else "head" if x.shape[-1] == 1 else wide
        for x, wide in ((decay, "channel"), (beta, "value"))
    ]
    time, heads = v.shape[1], v.shape[2] // q.shape[2]
    found = find(
        f"linear_attention/pallas_tpu/{_kind(*kinds)}", k.dtype.itemsize, max(k.shape[-1], v.shape[-1])
    )
    size = min(max(chunk or found["chunk"], _LEAST), 128, max(pl.next_power_of_2(time), _LEAST))
    chunks = min(max(found["steps"] // size, 1), pl.cdiv(time, size))
    narrow = all(x.dtype == jnp.bfloat16 for x in (q, k, v))
    config = Config(
        scale, size, chunks, heads, *kinds, reset is not None, jax.lax.Precision.DEFAULT if narrow else _EXACT
    )
    out, state = _attend(config, (q, k, v, decay, beta), initial_state, reset)
    return out, state


def _kind(decay, beta):
    return "value" if beta == "value" else "channel" if decay == "channel" else "delta" if beta else "plain"


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(config, arrays, state, reset):
    return _run(config, False, arrays, state, reset)[:2]


def _forward(config, arrays, state, reset):
    out, final, starts = _run(config, True, arrays, state, reset)
    return (out, final), (arrays, reset, starts)


def _run(config, save, arrays, state, reset):
    """`out`, the final state and, to `save`, the states before the blocks [b, h, blocks, k, v]."""
    v = arrays[2]
    (b, t, h, width), (_, _, keys, values) = v.shape, state.shape
    blocks = pl.cdiv(t, config.steps)
    specs = _specs(
        config, arrays, lambda b, h, n: (b, jax.lax.div(h, config.heads), n), lambda b, h, n: (b, h, n)
    )
    once = pl.BlockSpec((None, None, keys, values), lambda b, h, n: (b, h, 0, 0))
    starts = ((b, h, blocks, keys, values), jnp.float32)
    results = [((b, h, blocks * config.steps, width), v.dtype), (state.shape, state.dtype), starts]
    out, final, *starts = pallas.call(
        functools.partial(_forward_kernel, config, save),
        [*_laid(config, arrays, reset), state],
        results[: 2 + save],
        grid=(b, h, blocks),
        in_specs=[*specs, once],
        out_specs=[
            specs[2],
            once,
            pl.BlockSpec((None, None, None, keys, values), lambda b, h, n: (b, h, n, 0, 0)),
        ][: 2 + save],
        parallel=2,
    )
    return jnp.swapaxes(out[:, :, :t], 1, 2), final, *starts


def _forward_kernel(config, save, *refs):
    *inputs, state, out, final, start = refs if save else (*refs, None)

    @pl.when(pl.program_id(2) == 0)
    def _():
        final[...] = state[...]

    if save:
        start[...] = final[...]

    def body(i, state):
        result, state = _chunk(config, *_at(config, inputs, i), state)
        out[_steps(config, i)] = result.astype(out.dtype)
        return state

    final[...] = jax.lax.fori_loop(0, config.chunks, body, final[...])


def _backward(config, residuals, cotangents):
    arrays, reset, starts = residuals
    d_out, d_state = cotangents
    (b, h, keys, values), blocks, heads = d_state.shape, starts.shape[2], config.heads

    def of_group(b, g, n, r):
        return b, g, blocks - 1 - n

    def of_head(b, g, n, r):
        return b, g * heads + r, blocks - 1 - n

    specs = _specs(config, arrays, of_group, of_head)
    start = pl.BlockSpec((None, None, None, keys, values), lambda *at: (*of_head(*at), 0, 0))
    # The states of a group are one block.
    once = pl.BlockSpec((None, heads, keys, values), lambda b, g, n, r: (b, g, 0, 0))
    laid = _laid(config, arrays, reset)
    count = sum(x is not None for x in arrays)
    sums = pallas.vector((config.steps, keys))
    *gradients, d_initial = pallas.call(
        functools.partial(_backward_kernel, config),
        [*laid, _time_last(config, d_out), starts, d_state],
        [*((x.shape, x.dtype) for x in laid[:count]), (d_state.shape, d_state.dtype)],
        grid=(b, h // heads, blocks, heads),
        in_specs=[*specs, specs[2], start, once],
        out_specs=[*specs[:count], once],
        scratch=[sums, sums, pallas.vector((config.chunks, keys, values))],
        parallel=2,
    )
    return _unlaid(config, arrays, gradients), d_initial, None


_attend.defvjp(_forward, _backward)


def _backward_kernel(config, *refs):
    count = 3 + (config.decay is not None) + (config.beta is not None)
    inputs, rest = refs[: count + config.reset], refs[count + config.reset :]
    d_out, start, d_final, *rest = rest
    gradients, (d_state, dq, dk, states) = rest[:count], rest[count:]
    head = pl.program_id(3)

    @pl.when((pl.program_id(2) == 0) & (head == 0))
    def _():
        d_state[...] = d_final[...]

    @pl.when(head == 0)
    def _():
        dq[...], dk[...] = jnp.zeros_like(dq), jnp.zeros_like(dk)

    def again(i, state):
        states[i] = state
        return _chunk(config, *_at(config, inputs, i), state)[1]

    jax.lax.fori_loop(0, config.chunks, again, start[...])

    def back(n, slope):
        i = config.chunks - 1 - n
        floats, ids = _at(config, inputs, i)
        rows = _steps(config, i)
        _, pull = jax.vjp(lambda floats, state: _chunk(config, floats, ids, state), floats, states[i])
        slopes, slope = pull((d_out[rows].astype(jnp.float32), slope))
        dq[rows] += slopes[0]
        dk[rows] += slopes[1]
        given = [kind for kind in ("channel", config.decay, config.beta) if kind]
        for ref, kind, value in zip(
            gradients[2:], given, [x for x in slopes[2:] if x is not None], strict=True
        ):
            ref[i if kind == "head" else rows] = value.astype(ref.dtype)
        return slope

    d_state[head] = jax.lax.fori_loop(0, config.chunks, back, d_state[head])

    @pl.when(head == config.heads - 1)
    def _():
        gradients[0][...], gradients[1][...] = (
            dq[...].astype(gradients[0].dtype),
            dk[...].astype(gradients[1].dtype),
        )


# --- arrays


def _filled(config, x):
    """x [b, t, ...] padded to whole blocks with steps of zeros, which have no effect."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % config.steps), *((0, 0),) * (x.ndim - 2)))


def _time_last(config, x):
    """[b, t, h, k] -> [b, h, t, k]."""
    return jnp.swapaxes(_filled(config, x), 1, 2)


def _in_rows(config, x):
    """[b, t, h] -> [b, h, chunks, 1, c]."""
    x = jnp.swapaxes(_filled(config, x), 1, 2).astype(jnp.float32)
    return x.reshape(*x.shape[:2], -1, 1, config.size)


def _laid(config, arrays, reset):
    """q, k, v, and where given decay, beta and resets, as the number of resets so far in their chunk."""
    wide = [
        _in_rows(config, x[..., 0]) if kind == "head" else _time_last(config, x)
        for x, kind in _kinds(config, arrays)
    ]
    if reset is None:
        return wide
    ids = jnp.cumsum(_filled(config, reset).reshape(len(reset), -1, config.size), axis=-1)
    return [*wide, ids.astype(jnp.float32)[:, None, :, None]]


def _unlaid(config, arrays, gradients):
    """The gradients in the layout of the arguments."""
    gradients, results = list(gradients), []
    for x in arrays:
        if x is None:
            results.append(None)
            continue
        d = gradients.pop(0)
        if d.ndim == 5:
            d = d.reshape(*d.shape[:2], -1, 1)
        results.append(jnp.swapaxes(d[:, :, : x.shape[1]], 1, 2).astype(x.dtype))
    return tuple(results)


def _kinds(config, arrays):
    kinds = ("channel", "channel", "channel", config.decay, config.beta)
    return [(x, kind) for x, kind in zip(arrays, kinds, strict=True) if x is not None]


def _specs(config, arrays, of_group, of_head):
    """Block specs for the arrays of `_laid`; the maps give row, group or head, and block of time."""
    specs = []
    for n, (x, kind) in enumerate(_kinds(config, arrays)):
        at = of_group if n < 2 else of_head
        if kind == "head":
            specs.append(
                pl.BlockSpec((None, None, config.chunks, 1, config.size), lambda *i, at=at: (*at(*i), 0, 0))
            )
        else:
            specs.append(
                pl.BlockSpec((None, None, config.steps, x.shape[-1]), lambda *i, at=at: (*at(*i), 0))
            )
    if config.reset:
        specs.append(
            pl.BlockSpec(
                (None, None, config.chunks, 1, config.size), lambda *i: (i[0], 0, of_head(*i)[2], 0, 0)
            )
        )
    return specs


def _steps(config, i):
    return pl.ds(pl.multiple_of(i * config.size, config.size), config.size)


def _at(config, refs, i):
    """Chunk i: (q, k, v, decay, beta) and the numbers of resets."""
    refs, rows, kinds = (
        list(refs),
        _steps(config, i),
        ("channel", "channel", "channel", config.decay, config.beta),
    )
    values = [
        None if kind is None else refs.pop(0)[i if kind == "head" else rows].astype(jnp.float32)
        for kind in kinds
    ]
    return tuple(values), refs[0][i] if refs else None


# --- inside a chunk: q and k [c, k], v [c, v], decay [1, c] or [c, k], beta [1, c] or [c, v], ids [1, c],
# state [k, v]


def _chunk(config, arrays, ids, state):
    """`out` [c, v] and the state after the chunk."""
    q, k, v, decay, beta = arrays
    precision = config.precision
    masks = None if ids is None else _Masks(ids)
    read, write, keep, pairs = _decays(config, decay, k)
    clean, broken = (state, None) if masks is None else _set_apart(state)

    def recall(x):
        """The read-outs of rows from the state before the chunk."""
        old = _nn(precision, read * x, clean)
        return old if masks is None else jnp.where(masks.first(old), old, 0)

    lower, strict = (_grid(config.size, operator) for operator in (jnp.greater_equal, jnp.greater))
    if masks is not None:
        lower, strict = lower & masks.same, strict & masks.same
    old = recall(q)
    if beta is None:
        u = v
    else:
        overlaps = jnp.where(strict, pairs(k), 0)
        if config.beta == "head":
            strength = _column(beta)
            u = _nn(precision, _inverse(strength * overlaps), strength * (v - recall(k)))
        else:
            u = _substitute(overlaps, beta, beta * (v - recall(k)))
    if broken is not None:
        old = jnp.where(masks.first(old) & (jnp.broadcast_to(broken, old.shape) > 0), jnp.nan, old)
    out = config.scale * (old + _nn(precision, jnp.where(lower, pairs(q), 0), u))
    written = write * k
    if masks is not None:
        written, state = jnp.where(masks.last(written), written, 0), jnp.where(masks.whole(state), state, 0)
    return out, (state if keep is None else keep * state) + _tn(precision, written, u)


def _grid(size, operator):
    """[c, c]: a comparison of row and column indices."""
    return operator(pallas.places((size, size), 0), pallas.places((size, size), 1))


def _column(row):
    """[1, c] -> [c, 1]."""
    return jnp.sum(jnp.where(_grid(row.shape[1], jnp.equal), row, 0), axis=1, keepdims=True)


class _Masks:
    """Masks of the sequences of a chunk, True = keep, for arrays with that many rows."""

    def __init__(self, ids):
        self.ids, self.end = _column(ids), jnp.max(ids, axis=1, keepdims=True)
        shape = (ids.shape[1], ids.shape[1])
        self.same = jnp.broadcast_to(self.ids, shape) == jnp.broadcast_to(ids, shape)

    def first(self, x):
        """The steps before any reset of the chunk."""
        return jnp.broadcast_to(self.ids, x.shape) == 0

    def last(self, x):
        """The steps after which no reset follows."""
        return jnp.broadcast_to(self.ids, x.shape) == jnp.broadcast_to(self.end, x.shape)

    def whole(self, x):
        """All, if the chunk has no reset."""
        return jnp.broadcast_to(self.end, x.shape) == 0


def _set_apart(state):
    """The state with non-finite columns set to 0, and the number of such entries in each, [1, v].

    Steps before and after a reset share products, where 0 * NaN is NaN, so non-finite columns must be kept
    out of them.
    """
    broken = jnp.sum(jnp.where(jnp.abs(state) < jnp.inf, 0.0, 1.0), axis=0, keepdims=True)
    return jnp.where(jnp.broadcast_to(broken, state.shape) > 0, 0, state), broken


def _decays(config, decay, k):
    """exp(b), exp(b_C - b), exp(b_C) as a column, or 1, 1 and None; and a function of x: sum_c x_rc k_sc
    exp(b_rc - b_sc), s <= r."""
    size, precision = config.size, config.precision
    if decay is None:
        return 1.0, 1.0, None, lambda x: _nt(precision, x, k)
    decay = jnp.maximum(decay, _FLOOR)
    through, behind = (
        jnp.where(_grid(size, operator), 1.0, 0.0) for operator in (jnp.greater_equal, jnp.less)
    )
    if config.decay == "head":
        # b_r - b_s = sum_i [i <= r] decay_i [i > s]
        gamma = jnp.exp(_nn(_EXACT, through * decay, jnp.where(_grid(size, jnp.greater), 1.0, 0.0)))
        read, write = (jnp.exp(jnp.sum(which * decay, axis=1, keepdims=True)) for which in (through, behind))
        return (
            read,
            write,
            jnp.exp(jnp.sum(decay, axis=1, keepdims=True)),
            lambda x: gamma * _nt(precision, x, k),
        )
    factors = [jnp.exp(_nn(_EXACT, half, decay)) for half in _halves(size)]
    read, write = (jnp.exp(_nn(_EXACT, which, decay)) for which in (through, behind))
    keep = jnp.exp(_tn(_EXACT, decay, jnp.ones((size, 1), jnp.float32)))

    def pairs(x):
        total = jnp.where(_grid(size, jnp.equal), _nt(precision, x, k), 0)
        for level, factor in enumerate(factors):
            total = jnp.where(_parted(size, level), _nt(precision, factor * x, factor * k), total)
        return total

    return read, write, keep, pairs


def _parted(size, level):
    """[c, c]: the pairs separated by the middle of a block of 2 << level steps, the column before it."""
    row, column = pallas.places((size, size), 0) >> level, pallas.places((size, size), 1) >> level
    return ((row ^ column) == 1) & (row > column)


def _halves(size):
    """For blocks of 2, 4, ... c steps, as 0 and 1: the log decays between a step and the middle of its block
    (see `xla._halving`)."""
    row, column = pallas.places((size, size), 0), pallas.places((size, size), 1)
    for level in range(size.bit_length() - 1):
        middle = ((row >> (level + 1)) * 2 + 1) << level
        right = (column >= middle) & (column <= row)
        left = (column > row) & (column < middle)
        yield jnp.where(right | left, 1.0, 0.0)


# --- products, closed under differentiation: none of them ever needs a transpose of its own


def _product(precision, x, y, dims):
    return jax.lax.dot_general(
        x, y, (dims, ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _nn(precision, x, y):
    """x y."""
    return _product(precision, x, y, ((1,), (0,)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _nt(precision, x, y):
    """x y'."""
    return _product(precision, x, y, ((1,), (1,)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tn(precision, x, y):
    """x' y."""
    return _product(precision, x, y, ((0,), (0,)))


_nn.defvjp(lambda p, x, y: (_nn(p, x, y), (x, y)), lambda p, xy, d: (_nt(p, d, xy[1]), _tn(p, xy[0], d)))
_nt.defvjp(lambda p, x, y: (_nt(p, x, y), (x, y)), lambda p, xy, d: (_nn(p, d, xy[1]), _tn(p, d, xy[0])))
_tn.defvjp(lambda p, x, y: (_tn(p, x, y), (x, y)), lambda p, xy, d: (_nt(p, xy[1], d), _nn(p, xy[0], d)))


# --- the triangular systems of the delta rule


@jax.custom_vjp
def _inverse(a):
    """(1 + a)^-1 for strictly lower triangular a [c, c], by blocks, as in `xla`."""
    size = a.shape[0]
    inverse = jnp.where(_grid(size, jnp.equal), 1.0, 0.0) - jnp.where(_parted(size, 0), a, 0)
    for level in range(1, size.bit_length() - 1):
        inverse = inverse - _nn(_EXACT, inverse, _nn(_EXACT, jnp.where(_parted(size, level), a, 0), inverse))
    return inverse


def _inverse_forward(a):
    inverse = _inverse(a)
    return inverse, inverse


_inverse.defvjp(_inverse_forward, lambda inverse, d: (-_nt(_EXACT, _tn(_EXACT, inverse, d), inverse),))


@jax.custom_vjp
def _substitute(overlaps, beta, target):
    """u [c, v] with u_r + beta_r sum_s overlaps_rs u_s = target_r: with beta per value, every value has its
    own system."""
    u = target
    for r in range(len(target)):
        u = u - beta * (overlaps[:, r : r + 1] * u[r : r + 1])
    return u


def _substitute_forward(overlaps, beta, target):
    u = _substitute(overlaps, beta, target)
    return u, (overlaps, beta, u)


def _substitute_backward(residuals, d):
    overlaps, beta, u = residuals
    turned = _tn(_EXACT, overlaps, jnp.where(_grid(len(d), jnp.equal), 1.0, 0.0))
    for r in reversed(range(len(d))):  # the transposed system, from the last row up
        d = d - turned[:, r : r + 1] * (beta[r : r + 1] * d[r : r + 1])
    return -_nt(_EXACT, beta * d, u), -d * _nn(_EXACT, overlaps, u), d


_substitute.defvjp(_substitute_forward, _substitute_backward)
