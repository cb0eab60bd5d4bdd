"""Streaming TSM2: a forecast at every step of an endless series, from states of constant size (see `tsm2` for
the published form)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from seqlab.checks import UserError
from seqlab.models.layers import Factory
from seqlab.models.state_space.mambamixer import SelectiveMixer
from seqlab.models.state_space.tsm2 import EPSILON, Forecast, Forecaster, Series
from seqlab.resets import sealed
from seqlab.shapes import Steps, accumulator
from seqlab.state import State, mask_steps, segments, select_rows


class Scale(NamedTuple):
    """Exponentially weighted statistics of the past: the total weight [b, 1], the mean [b, m] and the sum of
    squared deviations."""

    weight: Float[Array, "b 1"]
    mean: Float[Array, "b m"]
    squares: Float[Array, "b m"]

    @property
    def deviation(self) -> Array:
        return jnp.sqrt(self.squares / jnp.maximum(self.weight, 1.0) + EPSILON)


class StreamingTSM2State(NamedTuple):
    """`recent` [b, p-1, m]: the steps that the next patch may need. `seen` [b]: steps of the sequence so far,
    modulo the stride after its first complete patch. `tokens` [b, n-1, m, d]: the last outputs of the stack,
    `count` [b] of them from this sequence. `forecast` [b, h, m]: the current one until the next patch is
    complete. `scale` is () without RevIN."""

    recent: Float[Array, "b p m"]
    seen: Int[Array, " b"]
    scale: Scale | tuple[()]
    stack: State
    tokens: Float[Array, "b n m d"]
    count: Int[Array, " b"]
    forecast: Forecast


class StreamingTSM2(Forecaster):
    """TSM2 with statistics of the past only, so that it forecasts at every step and streams.

    `model(x, state, reset, valid)` maps a chunk [b, t, m] of any length to [b, t, horizon, m]: at every step
    the forecast of the `horizon` steps after the latest complete patch; zeros before the first patch of a
    sequence. Patches end at steps P, P + S, P + 2 S, ... of a sequence; the state keeps an incomplete patch
    at the end of a chunk.

    `model.forecast(x)` is the forecast [b, horizon, m] of the steps after x [b, t, m], t >= P, the form used
    in training: the last output of a fresh stream whose patches end where x ends (so the first (t - P) mod S
    steps are not read).

    Two things differ from the published form, which looks ahead: norms use statistics over the variates and
    channels of one patch instead of over time, and RevIN, if `reversible`, uses mean and standard deviation
    of the past at the end of a patch, with weights that decay by 1 - 1/length per step; a forecast is scaled
    back by those of its own patch. The head reads the last n tokens, with zeros if a sequence has fewer,
    while the states of the time mixers reach back indefinitely. Arguments are those of `TSM2`; `length` sets
    n and the memory of RevIN.

    Raises:
      ValueError: an impossible size, or an x of another shape.

    Source: TSM2 in MambaMixer (arXiv 2403.19888 v1), made causal here.
    """

    causal = True

    def __init__(
        self,
        variates: int,
        length: int,
        horizon: int,
        *,
        patch: int = 16,
        stride: int = 8,
        dim: int = 32,
        depth: int = 2,
        mixer: Factory = SelectiveMixer,
        reversible: bool = True,
        final_sum: bool = True,
        rngs: nnx.Rngs,
    ):
        sizes = {"patch": patch, "stride": stride, "dim": dim, "depth": depth}
        super().__init__(
            variates, length, horizon, **sizes, mixer=mixer, norm="step", final_sum=final_sum, rngs=rngs
        )
        self.reversible = reversible

    @property
    def dim(self) -> int:
        """The input width, the number of variates."""
        return self.variates

    def init_state(self, batch: int, dtype: jax.typing.DTypeLike = jnp.float32) -> StreamingTSM2State:
        return StreamingTSM2State(
            recent=jnp.zeros((batch, self.patch - 1, self.variates), dtype),
            seen=jnp.zeros((batch,), jnp.int32),
            scale=self._no_scale(batch, dtype),
            stack=self.stack.init_state(batch, dtype),
            tokens=jnp.zeros((batch, self.patches - 1, self.variates, self.width), dtype),
            count=jnp.zeros((batch,), jnp.int32),
            forecast=jnp.zeros((batch, self.horizon, self.variates), dtype),
        )

    def _no_scale(self, batch: int, dtype: jax.typing.DTypeLike) -> Scale | tuple[()]:
        widths = (1, self.variates, self.variates) if self.reversible else ()
        scale = [jnp.zeros((batch, width), accumulator(dtype)) for width in widths]
        return Scale(*scale) if scale else ()

    def forecast(self, x: Series) -> Forecast:
        """The forecast [b, horizon, m] of the steps after x [b, t, m], t >= patch."""
        self.check(x)
        if x.shape[1] < self.patch:
            raise UserError(f"x must have at least patch={self.patch} steps, got {x.shape[1]}")
        x = x[:, (x.shape[1] - self.patch) % self.stride :]
        patches = self.cut(x)
        if self.reversible:
            scale = running_scale(x, self._no_scale(len(x), x.dtype), None, None, 1 - 1 / self.length)
            scale = Scale(*(leaf[:, self.patch - 1 :: self.stride] for leaf in scale))
            patches = ((patches - scale.mean[..., None]) / scale.deviation[..., None]).astype(x.dtype)
        tokens, _ = self.stack(self.embed(patches))
        missing = max(self.patches - tokens.shape[1], 0)
        tokens = jnp.pad(tokens[:, -self.patches :], ((0, 0), (missing, 0), (0, 0), (0, 0)))
        y = self.read(tokens)
        return (y * scale.deviation[:, -1:] + scale.mean[:, -1:]).astype(x.dtype) if self.reversible else y

    def __call__(
        self,
        x: Series,
        state: StreamingTSM2State | None = None,
        reset: Steps | None = None,
        valid: Steps | None = None,
    ) -> tuple[Float[Array, "b t h m"], StreamingTSM2State | None]:
        self.check(x)
        batch, time, _ = x.shape
        if time == 0:
            return jnp.zeros((batch, 0, self.horizon, self.variates), x.dtype), state
        if reset is None:
            return self._called(x, state, None, valid)
        return sealed(
            lambda arrays, state: self._called(*arrays, state, reset, valid), (x,), state, reset, valid
        )

    def _called(
        self, x: Series, state: StreamingTSM2State | None, reset: Steps | None, valid: Steps | None
    ) -> tuple[Float[Array, "b t h m"], StreamingTSM2State | None]:
        batch, time, _ = x.shape
        old = self.init_state(batch, x.dtype) if state is None else state
        order, kept, total = None, None, jnp.full((batch,), time, jnp.int32)
        # Move the valid steps of each row to the front; the code below does not need their positions.
        if valid is not None:
            order, total = front(valid), jnp.sum(valid, axis=1, dtype=jnp.int32)
            kept, x = jnp.arange(time) < total[:, None], rows(mask_steps(x, valid), order)
            reset = None if reset is None else rows(reset & valid, order)
        y, new = self._packed(x, old, reset, kept, total)
        if valid is not None:
            y = mask_steps(rows(y, jnp.argsort(order, axis=1)), valid)
        return y, (None if state is None else new)

    def _packed(
        self,
        x: Series,
        old: StreamingTSM2State,
        reset: Steps | None,
        kept: Steps | None,
        total: Int[Array, " b"],
    ) -> tuple[Float[Array, "b t h m"], StreamingTSM2State]:
        """The call for rows whose first `total` steps are valid and whose others are zeros."""
        P, S, n, (batch, time, _) = self.patch, self.stride, self.patches, x.shape
        steps = segments((batch, time), old.seen, reset, kept)
        age = steps.positions + 1
        whole = (age >= P) & ((age - P) % S == 0) & (True if kept is None else kept)
        started = steps.length >= P  # the continued sequence has a patch

        # Patches, in at most ceil(t / S) slots, because two are never closer than S steps. Slots without a
        # patch are not valid.
        slots, patches = front(whole)[:, : -(-time // S)], jnp.sum(whole, axis=1, dtype=jnp.int32)
        there = jnp.arange(slots.shape[1]) < patches[:, None]
        history = jnp.concatenate([old.recent, x], axis=1)
        values = rows(history, slots[..., None] + jnp.arange(P)).swapaxes(2, 3)
        scale = ()
        if self.reversible:
            scales = running_scale(x, old.scale, reset, kept, 1 - 1 / self.length)
            at = Scale(*(rows(leaf, slots) for leaf in scales))
            values = ((values - at.mean[..., None]) / at.deviation[..., None]).astype(x.dtype)
            scale = select_rows(total > 0, Scale(*(last(leaf, total) for leaf in scales)), old.scale)

        # The stack; sequences without a patch leave its state unchanged.
        first = there & (rows(age, slots) == P)
        tokens, stack = self.stack(self.embed(values), old.stack, first, there)
        stack = select_rows(started, stack, self.stack.init_state(batch, x.dtype))

        # A forecast for every slot, from the last n tokens of its sequence.
        chain = segments(there.shape, old.count, first, there)
        memory = jnp.concatenate([old.tokens, tokens], axis=1)
        seen = memory[:, jnp.arange(slots.shape[1])[:, None] + jnp.arange(n)]
        own = jnp.arange(n) >= n - 1 - chain.positions[..., None]
        made = self.read(jnp.where(own[..., None, None], seen, 0))
        made = (
            (made * at.deviation[:, :, None] + at.mean[:, :, None]).astype(x.dtype)
            if self.reversible
            else made
        )
        latest = jnp.cumsum(whole, axis=1) - 1
        y = jnp.where(
            (latest >= 0)[..., None, None], rows(made, jnp.maximum(latest, 0)), old.forecast[:, None]
        )
        y = jnp.where((age >= P)[..., None, None], y, 0)

        count = jnp.where(started, jnp.minimum(chain.length, n - 1), 0)
        recent = _tail(history, total, steps.length, P - 1)
        seen = jnp.where(started, P + (steps.length - P) % S, steps.length)
        forecast = select_rows(total > 0, last(y, total), old.forecast)
        return y, StreamingTSM2State(
            recent, seen, scale, stack, _tail(memory, patches, count, n - 1), count, forecast
        )


def running_scale(x: Series, old: Scale, reset: Steps | None, kept: Steps | None, decay: float) -> Scale:
    """Mean and squared deviations of every variate over the past of every step [b, t, ...], weighted by
    decay^(steps ago).

    Two segments of time merge by weight (Chan, Golub and LeVeque 1983), which stays accurate for a series far
    from 0.
    """
    wide = x.astype(accumulator(x.dtype))
    fades = jnp.full((*x.shape[:2], 1), decay, wide.dtype)
    fades = fades if reset is None else jnp.where(reset[..., None], 0.0, fades)
    weights = jnp.ones_like(fades)
    if kept is not None:
        fades, weights = jnp.where(kept[..., None], fades, 1.0), kept[..., None].astype(wide.dtype)
    stretches = (fades, weights, wide, jnp.zeros_like(wide))
    stretches = tuple(
        jnp.concatenate([a[:, None], b], axis=1)
        for a, b in zip((jnp.ones_like(old.weight), *old), stretches, strict=True)
    )

    def merge(left: tuple[Array, ...], right: tuple[Array, ...]) -> tuple[Array, ...]:
        (fade, weight, mean, squares), (fade_r, weight_r, mean_r, squares_r) = left, right
        weight = fade_r * weight
        total = weight + weight_r
        share, apart = weight_r / jnp.where(total > 0, total, 1.0), mean_r - mean
        merged = jnp.where(weight > 0, mean + share * apart, mean_r)
        return fade * fade_r, total, merged, fade_r * squares + squares_r + weight * share * jnp.square(apart)

    return Scale(*(leaf[:, 1:] for leaf in jax.lax.associative_scan(merge, stretches, axis=1)[1:]))


def front(flags: Bool[Array, "b t"]) -> Int[Array, "b t"]:
    """Indices of the set flags in order, followed by those of the others."""
    return jnp.argsort(~flags, axis=1, stable=True)


def rows(x: Array, index: Int[Array, "b *i"]) -> Array:
    """x[b, index[b]] for every row b: [b, s, *d] and [b, *i] -> [b, *i, *d]."""
    return jax.vmap(lambda values, here: values[here])(x, index)


def last(x: Float[Array, "b t *d"], total: Int[Array, " b"]) -> Float[Array, "b *d"]:
    """Step `total` - 1 of every row."""
    return rows(x, jnp.maximum(total - 1, 0))


def _tail(
    x: Float[Array, "b s *d"], begin: Int[Array, " b"], own: Int[Array, " b"], size: int
) -> Float[Array, "b size *d"]:
    """`size` entries of every row from `begin` on, zeroed except the last `own`, which belong to its
    sequence."""
    keep = jnp.arange(size) >= size - own[:, None]
    return mask_steps(rows(x, begin[:, None] + jnp.arange(size)), keep)
