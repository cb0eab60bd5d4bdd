"""The chunked form: matrix products inside a chunk, a small recurrence from chunk to chunk.

With b_r the log decays of a chunk summed up to row r, S the state before the chunk, and the delta rule where
beta is given (Yang et al. 2024, arXiv 2312.06635, 2406.06484 and 2412.06464; Dao and Gu 2024, arXiv
2405.21060):

    P_rs = sum_c q_rc k_sc exp(b_rc - b_sc), s <= r          G_rs = sum_c k_rc k_sc exp(b_rc - b_sc), s < r
    u    = v,  or the solution of  u_r + beta_r sum_s G_rs u_s = beta_r (v_r - S' (exp(b_r) k_r))
    o    = scale ((exp(b) q) S + P u)                        S'   = exp(b_C) S + (exp(b_C - b) k)' u

A block is several chunks. The outer scan goes from block to block and works on slices of the arguments in
place; inside a block everything independent of the state is computed for all chunks at once. The gradient is
a second scan over the blocks, backwards from the states saved between them, so the memory beyond arguments
and results is that of one block, plus one state per block.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from seqlab.kernels.blocks import find
from seqlab.kernels.linear_attention.reference import step

# Elements of one array [b, block, h, k]. On a CPU a block must fit into the L2 cache (measured: blocks four
# times larger take 1.5 times as long), while an accelerator needs large blocks.
_BLOCK = {"cpu": 1 << 18}
_BLOCK_ELSEWHERE = 1 << 24
# The smallest log decay of half a chunk for which one reference row suffices: far from overflow, with
# rounding errors of about 2e-6.
_MILD = -30.0


def linear_attention(q, k, v, decay, beta, initial_state, reset, *, scale, chunk=None):
    """`out, final_state`: decay [b, t, h, 1 or k], beta [b, t, h, 1 or v], initial_state [b, h, k, v] in its
    accumulator."""
    time, dtype = q.shape[1], initial_state.dtype
    if time == 1:  # decoding: a handful of operations, no loop
        arrays = (x if x is None else x[:, 0] for x in (q, k, v, decay, beta, reset))
        final_state, out = step(
            initial_state,
            *(x if x is None or x.dtype == bool else x.astype(dtype) for x in arrays),
            scale=scale,
        )
        return out[:, None].astype(v.dtype), final_state
    size = chunk if chunk is not None else default_chunk(k, decay, beta)
    budget = _BLOCK.get(jax.default_backend(), _BLOCK_ELSEWHERE)
    return in_blocks((q, k, v, decay, beta, reset), initial_state, budget, Config(scale, size, 0))


def in_blocks(arrays, initial_state, budget, config):
    """`out, final_state` of the arguments in blocks of at most `budget` elements, padded with steps without
    effect."""
    q, _, v, *_ = arrays
    time, size = q.shape[1], config.size
    rows = v.shape[0] if isinstance(v.shape[0], int) else 1  # exported functions are for any number of rows
    most = max(1, budget // (size * rows * v.shape[2] * max(q.shape[-1], v.shape[-1])))  # chunks in a block
    chunks = -(-time // size)
    blocks = -(-chunks // most)
    length = -(-chunks // blocks) * size
    if blocks * length > time:  # a step with k = 0, no decay and no reset does nothing
        arrays = jax.tree.map(
            lambda x: jnp.pad(x, ((0, 0), (0, blocks * length - time), *((0, 0),) * (x.ndim - 2))), arrays
        )
    out, final_state = _blocks(config._replace(length=length), arrays, initial_state)
    return out[:, :time], final_state


def default_chunk(k, decay, beta):
    """Rows of a chunk, by kind."""
    wide = [x is not None and x.shape[-1] > 1 for x in (decay, beta)]
    kind = "value" if wide[1] else "channel" if wide[0] else "plain" if beta is None else "delta"
    return find(f"linear_attention/xla/{kind}", k.dtype.itemsize, k.shape[-1])["chunk"]


class Config(NamedTuple):
    """Static configuration: the scale, the steps of a chunk and of a block, and the functions that carry
    states from chunk to chunk."""

    scale: float
    size: int
    length: int
    carry: tuple[Callable, Callable] | None = None  # in place of `_plain` and `_delta`


# --- from block to block


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocks(config, arrays, state):
    return _forward(config, arrays, state)[0]


def _forward(config, arrays, state):
    def body(carry, start):
        state, out = carry
        piece, new = _either(_block, config, state, _slices(arrays, start, config.length))
        return (new, jax.lax.dynamic_update_slice_in_dim(out, piece, start, 1)), state

    v = arrays[2]
    (final_state, out), states = jax.lax.scan(
        body, (state, jnp.zeros_like(v)), jnp.arange(0, v.shape[1], config.length)
    )
    return (out, final_state), (arrays, states)


def _backward(config, residuals, cotangents):
    arrays, states = residuals
    d_out, d_state = cotangents

    def body(carry, x):
        d_state, gradients = carry
        start, state = x
        piece = jax.lax.dynamic_slice_in_dim(d_out, start, config.length, 1)
        d_arrays, d_state = _either(
            _block_gradient, config, state, _slices(arrays, start, config.length), piece, d_state
        )
        update = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=1)
        return (d_state, jax.tree.map(update, gradients, d_arrays)), None

    zeros = jax.tree.map(jnp.zeros_like, arrays[:-1])
    starts = jnp.arange(0, d_out.shape[1], config.length)
    (d_state, gradients), _ = jax.lax.scan(body, (d_state, zeros), (starts, states), reverse=True)
    return (*gradients, None), d_state


_blocks.defvjp(_forward, _backward)


def _slices(arrays, start, length):
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, length, 1), arrays)


def _either(function, config, state, arrays, *rest):
    """`function` with the fast method for channel decays if those of this block are mild, else with the
    general one."""
    decay = arrays[3]
    if decay is None or decay.shape[-1] == 1 or config.size == 1:
        return function(config, False, state, arrays, *rest)
    halves = decay.astype(state.dtype).reshape(decay.shape[0], -1, config.size // 2, *decay.shape[2:])
    mild = jnp.all(jnp.sum(halves, axis=2) >= _MILD)
    fast, general = functools.partial(function, config, True), functools.partial(function, config, False)
    return jax.lax.cond(mild, fast, general, state, arrays, *rest)


def _block_gradient(config, mild, state, arrays, d_out, d_state):
    floats, reset = arrays[:-1], arrays[-1]
    _, pull = jax.vjp(lambda floats, state: _block(config, mild, state, (*floats, reset)), floats, state)
    return pull((d_out, d_state))


# --- inside a block: n chunks of c steps, arrays [n, b, g, r, c, .] with r = h // g, or 1 where all heads of
# a group share


def _block(config, mild, state, arrays):
    """`out` [b, length, h, v] and the state after the block."""
    q, k, v, decay, beta, reset = arrays
    batch, _, heads, width = v.shape
    groups, size, dtype = q.shape[2], config.size, state.dtype

    def split(x):
        x = x.astype(dtype).reshape(batch, -1, size, groups, x.shape[2] // groups, x.shape[-1])
        return x.transpose(1, 0, 3, 4, 2, 5)

    q, k, values, decay, beta = jax.tree.map(split, (q, k, v, decay, beta))
    masks = Masks() if reset is None else _masks(reset.reshape(batch, -1, size))
    # The delta rule reads with its keys as with its queries.
    left = q if beta is None else jnp.concatenate([q, k], axis=-2)
    products = _products(left, k, decay, mild)
    scores = _where(masks.same, jnp.where(_level(size) >= -1, products.pairs[..., :size, :], 0))
    grouped = state.reshape(batch, groups, heads // groups, *state.shape[2:])
    plain, delta = config.carry or (_plain, _delta)
    if beta is None:
        old, final = plain(grouped, values, products, masks)
    else:
        overlaps = _where(masks.same, jnp.where(_level(size) >= 0, products.pairs[..., size:, :], 0))
        old, values, final = delta(grouped, values, beta, overlaps, products, masks)
    out = config.scale * (old + scores @ values)
    return out.transpose(1, 0, 4, 2, 3, 5).reshape(batch, -1, heads, width).astype(v.dtype), final.reshape(
        state.shape
    )


def _plain(state, v, products, masks):
    """The read-outs of the queries from the states before their chunks, and the state after the last."""

    def body(state, x):
        gain, keep, whole = x
        return _kept(state, keep, whole) + gain, state if whole is None else _set_apart(state)

    gain = _where(masks.last, products.write).mT @ v
    final, states = jax.lax.scan(body, state, (gain, products.keep, masks.whole))
    if masks.first is None:
        return products.read @ states, final
    states, broken = states
    return jnp.where(masks.first, jnp.where(broken, jnp.nan, products.read @ states), 0), final


def _delta(state, v, beta, overlaps, products, masks):
    """The read-outs of the queries from the states before their chunks, the written values, and the state
    after the last."""
    size = v.shape[-2]
    per_value = beta.shape[-1] > 1
    if per_value:  # every memory has its own betas, and so its own system even with shared keys
        overlaps = jnp.broadcast_to(overlaps, (*beta.shape[:-2], size, size))
    system = overlaps if per_value else _inverse(beta * overlaps)

    def body(state, x):
        system, read, write, v, beta, keep, first, whole = x
        state, broken = (state, None) if whole is None else _set_apart(state)
        old, recalled = jnp.split(read @ state, (size,), axis=-2)
        target = beta * (v - _where(first, recalled))
        u = _substitute(system, beta, target) if per_value else system @ target
        state = _kept(state, keep, whole) + write.mT @ u
        if broken is not None:
            state, old = (
                jnp.where(whole & broken, jnp.nan, state),
                jnp.where(first, jnp.where(broken, jnp.nan, old), 0),
            )
        return state, (old, u)

    write = _where(masks.last, products.write)
    final, (old, u) = jax.lax.scan(
        body, state, (system, products.read, write, v, beta, products.keep, masks.first, masks.whole)
    )
    return old, u, final


def _kept(state, keep, whole):
    state = _where(whole, state)
    return state if keep is None else keep * state


def _set_apart(state):
    """The state with non-finite columns set to 0, and a mask of these, [b, g, r, 1, v].

    Steps before and after a reset share the products of their chunk, where 0 * NaN is NaN, so non-finite
    columns must be kept out of them and of their gradients.
    """
    finite = jnp.all(jnp.isfinite(state), axis=-2, keepdims=True)
    return jnp.where(finite, state, 0), ~finite


# --- resets


class Masks(NamedTuple):
    """Masks of the sequences of a chunk: None without resets, else True = keep."""

    first: jax.Array | None = None  # [n, b, 1, 1, c, 1] the steps before any reset of their chunk
    last: jax.Array | None = None  # [n, b, 1, 1, c, 1] the steps after which no reset follows in the chunk
    whole: jax.Array | None = None  # [n, b, 1, 1, 1, 1] the chunk has no reset
    same: jax.Array | None = None  # [n, b, 1, 1, c, c] both steps belong to one sequence


def _masks(reset):
    ids = jnp.cumsum(reset, axis=-1, dtype=jnp.int32).transpose(1, 0, 2)[:, :, None, None]
    last = ids[..., -1:]
    return Masks(
        (ids == 0)[..., None],
        (ids == last)[..., None],
        last[..., None] == 0,
        ids[..., :, None] == ids[..., None, :],
    )


def _where(mask, x):
    return x if mask is None else jnp.where(mask, x, 0)


# --- decays


class Products(NamedTuple):
    """All decayed products inside the chunks; rows of `left` are queries, or queries and then keys."""

    # [n, b, g, r, rows, c] sum_c left_rc k_sc exp(b_rc - b_sc), arbitrary where s > r.
    pairs: jax.Array
    read: jax.Array  # [n, b, g, r, rows, k] exp(b) left
    write: jax.Array  # [n, b, g, r, c, k] exp(b_C - b) k
    keep: jax.Array | None  # [n, b, g, r, 1 or k, 1] exp(b_C)


def _products(left, k, decay, mild):
    size = k.shape[-2]

    def rows(x):  # one set of rows for the queries, another for the keys
        return x if left.shape[-2] == size else jnp.concatenate([x, x], axis=-2)

    if decay is None:
        return Products(left @ k.mT, left, k, None)
    if mild:
        return _mild_products(left, k, decay, rows)
    factors, read, write = _halving(decay)
    read, write, keep = rows(jnp.exp(read)) * left, jnp.exp(write) * k, jnp.exp(read[..., -1:, :]).mT
    if decay.shape[-1] == 1:
        return Products(rows(_gamma(decay)) * (left @ k.mT), read, write, keep)
    level = rows(_level(size))
    pairs = jnp.where(level == -1, left @ k.mT, 0)
    for index, factor in enumerate(factors):
        pairs = jnp.where(level == index, (rows(factor) * left) @ (factor * k).mT, pairs)
    return Products(pairs, read, write, keep)


def _halving(decay):
    """Factors of exp(b_r - b_s) by recursive halving of the chunk: the pair (r, s) is separated by the middle
    of exactly one block, where exp(b_r - b_s) = exp(b_r - b_middle) exp(b_middle - b_s), neither of which can
    overflow however strong the decay. Every sum runs over a part of a block, from or to its middle, so none
    is the difference of two larger ones: b_r - b_s after a log decay of -1e4 would lose all digits.

    Returns the factor of every row for blocks of 2, 4, ... c steps (read in the right half, write in the
    left), and the log decays from the beginning of the chunk through each row, and from after each row to its
    end.
    """
    *lead, size, width = decay.shape
    through, behind = decay, jnp.zeros_like(decay)
    factors = []
    for index in range(size.bit_length() - 1):
        halves = (*lead, size >> index + 1, 2, 1 << index, width)
        right = (np.arange(size) >> index & 1 == 1).reshape((1,) * len(lead) + (size, 1))
        factors.append(jnp.exp(jnp.where(right, through, behind)))
        sums = through.reshape(halves)[..., -1:, :]
        # The decay of the other half.
        other = jnp.broadcast_to(sums[..., ::-1, :, :], halves).reshape(decay.shape)
        through, behind = jnp.where(right, through + other, through), jnp.where(right, behind, behind + other)
    return factors, through, behind


@jax.custom_vjp
def _gamma(decay):
    """exp(b_r - b_s) [..., c, c] below the diagonal, 1 on it, 0 above, of decay [..., c, 1]."""
    level = _level(decay.shape[-2])
    gamma = jnp.where(level == -1, jnp.ones_like(decay), 0)
    for index, factor in enumerate(_halving(decay)[0]):
        gamma = jnp.where(level == index, factor * factor.mT, gamma)
    return gamma


def _gamma_forward(decay):
    gamma = _gamma(decay)
    return gamma, gamma


def _gamma_backward(gamma, d):
    strict = _level(gamma.shape[-1]) >= 0
    later = jnp.asarray((strict.mT | np.eye(gamma.shape[-1], dtype=bool))[0, 0, 0, 0], gamma.dtype)
    # Sum of the pairs with r >= i.
    through = jnp.matmul(later, jnp.where(strict, gamma * d, 0), precision=jax.lax.Precision.HIGHEST)
    # Those of them with s < i: step i decays them all.
    return (jnp.sum(jnp.where(strict, through, 0), axis=-1, keepdims=True),)


_gamma.defvjp(_gamma_forward, _gamma_backward)


def _mild_products(left, k, decay, rows):
    """One reference row for the whole chunk, its middle: one product instead of one per halving; its factors
    reach exp(-_MILD)."""
    *lead, size, width = decay.shape
    _, through, behind = _halving(decay.reshape(*lead, 2, size // 2, width))
    # exp(b - b_middle)
    middle = jnp.exp(jnp.concatenate([-behind[..., 0, :, :], through[..., 1, :, :]], axis=-2))
    # exp(b_middle), exp(b_C - b_middle)
    before, after = (jnp.exp(through[..., 0, -1:, :]), jnp.exp(through[..., 1, -1:, :]))
    left, k = rows(middle) * left, k / middle
    return Products(left @ k.mT, before * left, after * k, (before * after).mT)


def _level(size):
    """[c, c]: -1 on the diagonal, below it the index of the halving that separates row and column, -2
    above."""
    row, column = np.arange(size)[:, None], np.arange(size)[None, :]
    index = np.frexp(row ^ column)[1] - 1  # the highest bit in which they differ
    return np.where(column > row, -2, index).reshape(1, 1, 1, 1, size, size)


# --- the triangular systems of the delta rule


@jax.custom_vjp
def _inverse(a):
    """(1 + a)^-1 for strictly lower triangular a [..., c, c], by blocks: [[X, 0], [-Y a X, Y]] from the
    inverses X and Y of the halves.

    As accurate as substitution here: with keys of unit length every block of the inverse is a product of
    contractions, of size one, while the powers of a in a Neumann series grow like binomial coefficients where
    keys repeat.
    """
    level = _level(a.shape[-1])
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    inverse = jnp.where(level == -1, jnp.ones((), a.dtype), 0) - jnp.where(level == 0, a, 0)
    for index in range(1, a.shape[-1].bit_length() - 1):
        inverse = inverse - product(inverse, product(jnp.where(level == index, a, 0), inverse))
    return inverse


def _inverse_forward(a):
    inverse = _inverse(a)
    return inverse, inverse


def _inverse_backward(inverse, d):
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    return (-product(product(inverse.mT, d), inverse.mT),)


_inverse.defvjp(_inverse_forward, _inverse_backward)


@jax.custom_vjp
def _substitute(overlaps, beta, target):
    """u [..., c, v] with u_r + beta_r sum_s overlaps_rs u_s = target_r: with beta per value, every value has
    its own system."""

    def row(u, x):
        index, overlap, beta, target = x
        return jax.lax.dynamic_update_slice_in_dim(u, target - beta * (overlap @ u), index, -2), None

    return jax.lax.scan(
        row, jnp.zeros_like(target), (jnp.arange(target.shape[-2]), *map(_by_row, (overlaps, beta, target)))
    )[0]


def _substitute_forward(overlaps, beta, target):
    u = _substitute(overlaps, beta, target)
    return u, (overlaps, beta, u)


def _substitute_backward(residuals, d):
    overlaps, beta, u = residuals

    def row(scaled, x):  # the transposed system, from the last row up
        index, overlap, beta, d = x
        d_target = d - overlap @ scaled
        return jax.lax.dynamic_update_slice_in_dim(scaled, beta * d_target, index, -2), d_target

    rows = (jnp.arange(d.shape[-2]), *map(_by_row, (overlaps.mT, beta, d)))
    scaled, d_target = jax.lax.scan(row, jnp.zeros_like(d), rows, reverse=True)
    d_target = jnp.moveaxis(d_target, 0, -3)[..., 0, :]
    return -(scaled @ u.mT), -d_target * (overlaps @ u), d_target


_substitute.defvjp(_substitute_forward, _substitute_backward)


def _by_row(x):
    return jnp.moveaxis(x, -2, 0)[..., None, :]
