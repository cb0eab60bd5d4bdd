"""Sampling of tokens from logits. Every setting is a traced array with one value per row: new values do not
recompile."""

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from seqlab.checks import UserError, shown

COLDEST = 1e-6  # a temperature below it takes the likeliest token: float32 logits have no finer differences
_CANDIDATES = 128  # sorted first; all are sorted only where a row keeps more of them
_ROUNDING = 2.0**-20  # of a cumulative sum of float32 probabilities
_SLOTS = 8  # places for biased tokens and for tokens that end a row; more of them: the next power of two


class Sampling(NamedTuple):
    """Settings of sampling: one value for all rows, or an array [b] with one per row.

    `temperature`: 0 takes the likeliest token. Otherwise the `top_k` likeliest are kept (None or 0: all), of
    those the fewest with total probability `top_p` (None: all), of those the ones with at least `min_p` times
    the probability of the likeliest. `repetition_penalty` divides positive and multiplies negative logits of
    tokens seen lately (arXiv 1909.05858); `presence_penalty` is subtracted from the logits of those,
    `frequency_penalty` once per occurrence. `bias_tokens`, `bias` [b, n]: numbers added to logits; tokens
    beyond the vocabulary are ignored.
    """

    temperature: Any = 1.0
    top_k: Any = None
    top_p: Any = None
    min_p: Any = 0.0
    repetition_penalty: Any = 1.0
    presence_penalty: Any = 0.0
    frequency_penalty: Any = 0.0
    bias_tokens: Any = None
    bias: Any = None


def draw(
    logits: Float[Array, "b v"], seed: UInt32[Array, " b"], index: Int[Array, " b"], sampling: Sampling
) -> Int[Array, " b"]:
    """One token per row. A row's draw depends only on its seed and position, not on the batch or the
    block."""
    return sample(logits, seed, index, sampling)[0]


def sample(
    logits: Float[Array, "b v"], seed: UInt32[Array, " b"], index: Int[Array, " b"], sampling: Sampling
) -> tuple[Int[Array, " b"], Float[Array, " b"]]:
    """One token per row, and its log-probability under the sampling distribution: 0 for greedy rows."""
    temperature = _per_row(sampling.temperature, 1.0, jnp.float32, logits)
    warm = temperature >= COLDEST
    likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def drawn() -> tuple[Array, Array]:
        scaled = tempered(logits, sampling)
        noise = jax.vmap(
            lambda s, i: jax.random.gumbel(jax.random.fold_in(jax.random.key(s), i), logits.shape[1:])
        )(seed, index)
        token = jnp.where(warm, jnp.argmax(scaled + noise, axis=-1).astype(jnp.int32), likeliest)
        logprob = jnp.take_along_axis(jax.nn.log_softmax(scaled), token[:, None], axis=1)[:, 0]
        return token, jnp.where(warm, logprob, 0.0)

    return jax.lax.cond(jnp.any(warm), drawn, lambda: (likeliest, jnp.zeros(likeliest.shape)))


def tempered(logits: Float[Array, "b v"], sampling: Sampling) -> Float[Array, "b v"]:
    """`logits` divided by the temperature, with -inf at tokens that are not sampled; of greedy rows filtered
    only."""
    temperature = _per_row(sampling.temperature, 1.0, jnp.float32, logits)
    # Relative to the largest logit nothing overflows, whatever the temperature.
    largest = jnp.max(logits, axis=-1, keepdims=True)
    scaled = (logits - largest) / jnp.where(temperature >= COLDEST, temperature, 1.0)[:, None]
    return filtered(scaled, sampling)


def probabilities(logits: Float[Array, "b v"], sampling: Sampling) -> Float[Array, "b v"]:
    """The distribution that `sample` draws from: of greedy rows all on the likeliest token."""
    warm = _per_row(sampling.temperature, 1.0, jnp.float32, logits) >= COLDEST
    sure = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[1])
    return jnp.where(warm[:, None], jax.nn.softmax(tempered(logits, sampling)), sure)


def filtered(logits: Float[Array, "b v"], sampling: Sampling) -> Float[Array, "b v"]:
    """`logits` with -inf at tokens excluded by top-k, top-p and min-p; of equal ones the lowest stay."""
    vocabulary = logits.shape[1]
    top_k = _per_row(sampling.top_k, 0, jnp.int32, logits)
    top_k = jnp.where((top_k < 1) | (top_k > vocabulary), vocabulary, top_k)
    top_p = _per_row(sampling.top_p, 1.0, jnp.float32, logits)
    min_p = _per_row(sampling.min_p, 0.0, jnp.float32, logits)

    def narrowed() -> Array:
        first = min(_CANDIDATES, vocabulary)
        last, enough = _last_kept(*jax.lax.top_k(logits, first), logits, top_k, top_p)
        if first < vocabulary:
            # Selected per row, so that a row does not depend on its neighbours.
            last = jax.lax.cond(
                jnp.all(enough), lambda: last, lambda: _either(enough, last, _of_all(logits, top_k, top_p))
            )
        value, token = (part[:, None] for part in last)
        kept = (logits > value) | ((logits == value) & (jnp.arange(vocabulary) <= token))
        return jnp.where(kept, logits, -jnp.inf)

    some = jnp.any((top_k < vocabulary) | (top_p < 1.0))
    logits = jax.lax.cond(some, narrowed, lambda: logits)
    largest = jnp.max(logits, axis=-1, keepdims=True)
    least = largest + jnp.where(min_p > 0, jnp.log(min_p) - _ROUNDING, -jnp.inf)[:, None]
    return jnp.where(logits < least, -jnp.inf, logits)


def _last_kept(
    values: Float[Array, "b n"], tokens: Int[Array, "b n"], logits: Array, top_k: Array, top_p: Array
) -> tuple[tuple[Array, Array], Bool[Array, " b"]]:
    """Logit and id of the last token kept by a row, from its sorted likeliest tokens, and whether these
    suffice."""
    size = values.shape[1]
    place = jnp.arange(size)
    among = place < top_k[:, None]
    # top_p is a share of the probability left by top_k.
    weights = jnp.where(among, jnp.exp(values - values[:, :1]), 0.0)
    whole = jnp.where(
        top_k < logits.shape[1],
        jnp.sum(weights, axis=1),
        jnp.sum(jnp.exp(logits - values[:, :1]), axis=1),
    )
    wanted = jnp.where(top_p < 1.0, top_p * (1 - _ROUNDING), jnp.inf) * whole
    reached = jnp.cumsum(weights, axis=1)
    before = jnp.concatenate([jnp.zeros_like(reached[:, :1]), reached[:, :-1]], axis=1)
    kept = jnp.maximum(jnp.sum(among & (before < wanted[:, None]), axis=1), 1)
    enough = (top_k <= size) | (reached[:, -1] >= wanted) | (size == logits.shape[1])
    last = (kept - 1)[:, None]
    return (
        jnp.take_along_axis(values, last, axis=1)[:, 0],
        jnp.take_along_axis(tokens, last, axis=1)[:, 0],
    ), enough


def _of_all(logits: Array, top_k: Array, top_p: Array) -> tuple[Array, Array]:
    order = jnp.argsort(-logits, axis=-1, stable=True).astype(jnp.int32)
    ordered = jnp.take_along_axis(logits, order, axis=1)
    return _last_kept(ordered, order, logits, top_k, top_p)[0]


def _either(choice: Array, one: tuple[Array, ...], other: tuple[Array, ...]) -> tuple[Array, ...]:
    return tuple(jnp.where(choice, a, b) for a, b in zip(one, other, strict=True))


def adjusted(
    logits: Float[Array, "b v"], recent: Int[Array, "b r"], known: Int[Array, " b"], sampling: Sampling
) -> Float[Array, "b v"]:
    """`logits` with the bias and the penalties for the last `known` [b] of `recent` tokens."""
    batch, vocabulary = logits.shape
    rows = jnp.arange(batch)[:, None]
    repetition = _per_row(sampling.repetition_penalty, 1.0, jnp.float32, logits)
    presence = _per_row(sampling.presence_penalty, 0.0, jnp.float32, logits)
    frequency = _per_row(sampling.frequency_penalty, 0.0, jnp.float32, logits)

    def penalised(logits: Array) -> Array:
        seen = jnp.arange(recent.shape[1]) >= recent.shape[1] - known[:, None]
        places = jnp.where(seen, recent, vocabulary)
        count = jnp.zeros(logits.shape, jnp.float32).at[rows, places].add(1.0, mode="drop")
        scale = repetition[:, None]
        repeated = jnp.where(logits > 0, logits / scale, logits * scale)
        less = presence[:, None] + frequency[:, None] * count
        return jnp.where(count > 0, repeated - less, logits)

    some = jnp.any((repetition != 1) | (presence != 0) | (frequency != 0))
    if sampling.bias is None:
        return jax.lax.cond(some, penalised, lambda logits: logits, logits)

    def both(logits: Array) -> Array:
        logits = logits.at[rows, sampling.bias_tokens].add(sampling.bias, mode="drop")
        return jax.lax.cond(some, penalised, lambda logits: logits, logits)

    return jax.lax.cond(some | jnp.any(sampling.bias != 0), both, lambda logits: logits, logits)


def alters(sampling: Sampling) -> Bool[Array, ""]:
    """Whether any row is not greedy."""
    warm = jnp.any(jnp.asarray(sampling.temperature) >= COLDEST)
    scaled = jnp.any(jnp.asarray(sampling.repetition_penalty) != 1)
    less = jnp.any(
        (jnp.asarray(sampling.presence_penalty) != 0) | (jnp.asarray(sampling.frequency_penalty) != 0)
    )
    return warm | scaled | less | jnp.any(jnp.asarray(sampling.bias) != 0)


def _per_row(value: Any, default: float, dtype: Any, logits: Array) -> Array:
    return jnp.broadcast_to(jnp.asarray(default if value is None else value, dtype), logits.shape[:1])


def check_sampling(
    temperature: Any = 1.0,
    top_k: Any = None,
    top_p: Any = None,
    *,
    min_p: Any = None,
    repetition_penalty: Any = 1.0,
    presence_penalty: Any = 0.0,
    frequency_penalty: Any = 0.0,
    logit_bias: Any = None,
    rows: int = 1,
    vocab_size: int = 2**31 - 1,
) -> Sampling:
    """The settings of `rows` rows as numpy arrays; ValueError naming the one that is out of range.

    Each is one value or a sequence of one per row; `logit_bias` one {token: bias} or one per row.
    """
    least = np.finfo(np.float32).tiny
    most = np.finfo(np.float32).max
    finite = f"a finite number, |x| <= {most:.2g}"

    def floats(name: str, value: Any, default: float, check: Any, expected: str) -> np.ndarray:
        found = per_row(name, value, rows, default, lambda x: is_number(x) and check(float(x)), expected)
        return np.clip(np.asarray(found, np.float64), -most, most).astype(np.float32)

    in_share = "greater than 0 and at most 1, or None"
    bias_tokens, bias = _check_bias(logit_bias, rows, vocab_size)
    return Sampling(
        floats("temperature", temperature, 1.0, lambda x: 0 <= x < np.inf, "0 (the likeliest) or more"),
        np.minimum(
            per_row("top_k", top_k, rows, 0, lambda x: is_integer(x) and x > 0, "1 or more, or None"),
            2**31 - 1,
        ).astype(np.int32),
        floats("top_p", top_p, 1.0, lambda x: 0 < x <= 1, in_share),
        floats("min_p", min_p, 0.0, lambda x: 0 <= x <= 1, "from 0 to 1, or None"),
        floats(
            "repetition_penalty",
            repetition_penalty,
            1.0,
            lambda x: least <= x <= most,
            "greater than 0 (1: none)",
        ),
        floats("presence_penalty", presence_penalty, 0.0, lambda x: abs(x) <= most, finite),
        floats("frequency_penalty", frequency_penalty, 0.0, lambda x: abs(x) <= most, finite),
        bias_tokens,
        bias,
    )


def per_row(name: str, value: Any, rows: int, default: Any, check: Any, expected: str) -> list[Any]:
    """One value per row from one value or a sequence of `rows`; None is `default`. ValueError naming `name`
    where `check` refuses one."""
    if hasattr(value, "__array__"):
        try:
            value = np.asarray(value).tolist()
        except Exception as error:  # whatever the other library raises
            raise UserError(
                f"{name} must be {expected}, got an array that cannot be read ({error})"
            ) from error
    values = [value] * rows
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        if len(value) != rows:
            raise UserError(
                f"{name}: got {len(value)} values {shown(value)}, expected one value or one for each of "
                f"{rows} rows"
            )
        values = list(value)
    for one in values:
        if one is not None and not check(one):
            raise UserError(f"{name} must be {expected}, or one such value per row, got {shown(value)}")
    return [default if one is None else one for one in values]


def is_number(value: Any) -> bool:
    """Whether `value` is a real number, NaN and booleans apart."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool | np.bool_):
        return False
    try:
        return not math.isnan(float(value))
    except OverflowError:  # an integer that no float64 holds
        return False


def is_integer(value: Any) -> bool:
    """Whether `value` is an integer and no boolean."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool | np.bool_)


def slots(lists: Sequence[Sequence[Any]], fill: Any, dtype: Any) -> np.ndarray:
    """The lists as rows of one array [b, n], n a power of two of at least 8, so that few programs differ."""
    size = _SLOTS
    while size < max(map(len, lists), default=0):
        size *= 2
    array = np.full((len(lists), size), fill, dtype)
    for row, values in enumerate(lists):
        array[row, : len(values)] = values
    return array


def _check_bias(value: Any, rows: int, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    expected = "{token: bias}, with tokens of the vocabulary and biases below infinity"
    biases = [value] * rows if value is None or isinstance(value, Mapping) else value
    if isinstance(biases, str | bytes) or not isinstance(biases, Sequence):
        raise UserError(f"logit_bias must be {expected}, or one such value per row, got {shown(value)}")
    if len(biases) != rows:
        raise UserError(f"logit_bias: got {len(biases)} values, expected one or one for each of {rows} rows")
    for one in biases:
        if one is None:
            continue
        if not isinstance(one, Mapping) or not all(
            is_integer(token)
            and 0 <= token < vocab_size
            and is_number(bias)
            and bias <= np.finfo(np.float32).max
            for token, bias in one.items()
        ):
            raise UserError(f"logit_bias must be {expected}, got {shown(one)} (vocabulary of {vocab_size})")
    biases = [one or {} for one in biases]
    with np.errstate(over="ignore"):  # what float32 cannot hold forbids the token, as -inf does
        values = slots([list(map(float, one.values())) for one in biases], 0.0, np.float64).astype(np.float32)
    return slots([list(one) for one in biases], 2**31 - 1, np.int32), values
