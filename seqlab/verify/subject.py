"""The mixer under test as a pure function, with what it is run on."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from seqlab.checks import UserError
from seqlab.mixer import Mixer, State, as_mixer, width_of
from seqlab.module import Params, Static, in_evaluation, merge, split
from seqlab.shapes import accumulator


@dataclasses.dataclass(frozen=True)
class Subject:
    """The mixer under test.

    Attributes:
      static, params, constants: the mixer taken apart; gradients are taken with respect to `params`.
      inputs: tokens [b, t] or activations [b, t, d].
      state: the fresh state of so many rows.
      bound: the allowed error relative to scale.
      lookahead, exact: as the mixer declares them.
    """

    static: Static
    params: Params
    constants: Params
    inputs: Array
    state: Callable[[int], State]
    bound: float
    lookahead: int
    exact: bool

    def mixer(self, params: Params | None = None) -> Any:
        """The mixer itself, with `params` in place of its own."""
        return merge(self.static, (self.params if params is None else params) | self.constants)

    @functools.cached_property
    def apply(self) -> Callable[..., tuple[Array, State]]:
        """y, state = apply(params, x, state, reset, valid), compiled once for each shape."""
        return jax.jit(lambda params, x, state, reset, valid: self.mixer(params)(x, state, reset, valid))

    @functools.cached_property
    def gradients(self) -> Callable[..., tuple[Any, ...]]:
        """Of a random projection of outputs and final state, with respect to the parameters and, where they
        are real, the inputs."""

        def apply(params, x, state, reset, valid):
            return self.mixer(params)(x, state, reset, valid)

        def loss(params, x, valid, lengths):
            y, state = _chain(apply, params, x, lengths, self.state(x.shape[0]), None, valid)
            y = jnp.where(valid.reshape(valid.shape + (1,) * (y.ndim - 2)), y, 0)
            return projected((y, state))

        return jax.jit(jax.grad(loss, argnums=(0, 1) if is_real(self.inputs) else (0,)), static_argnums=3)

    def run(
        self,
        x: Array,
        lengths: Sequence[int] = (),
        reset: Array | None = None,
        valid: Array | None = None,
        state: State = None,
    ) -> tuple[Array, State]:
        """Outputs and final state of `x` in chunks of these lengths (one chunk by default), from a fresh
        state by default.

        Flags are always given, so that a chunk length costs one compilation, not one for each combination of
        flags.
        """
        reset = jnp.zeros(x.shape[:2], bool) if reset is None else reset
        valid = jnp.ones(x.shape[:2], bool) if valid is None else valid
        state = self.state(x.shape[0]) if state is None else state
        return _chain(self.apply, self.params, x, lengths or (x.shape[1],), state, reset, valid)


def subject_of(
    mixer: Mixer, inputs: Array | None, shape: tuple[int, int], dtype: str, bound: float, seed: int
) -> Subject:
    """`mixer` in evaluation mode and in `dtype`, on `inputs` or on random ones of `shape` (b, t).

    Raises:
      ValueError: inputs of another rank, or too few rows or steps.
    """
    static, arrays = split(in_evaluation(mixer))
    if dtype == "float64":
        arrays = {
            name: jnp.asarray(leaf, jnp.float64) if is_real(leaf) else leaf for name, leaf in arrays.items()
        }
    params = {name: leaf for name, leaf in arrays.items() if name in static.learnt and is_real(leaf)}
    constants = {name: leaf for name, leaf in arrays.items() if name not in params}
    if inputs is None:
        rng = np.random.default_rng(seed)
        if as_mixer(mixer).vocab_size is not None:
            inputs = jnp.asarray(rng.integers(0, mixer.vocab_size, shape), jnp.int32)
        else:
            inputs = jnp.asarray(rng.normal(size=(*shape, width_of(mixer))), dtype)
    if inputs.ndim not in (2, 3) or inputs.shape[0] < 2 or inputs.shape[1] < 12:
        raise UserError(
            f"inputs must be [b, t] tokens or [b, t, d] with b >= 2 and t >= 12, got shape {inputs.shape}"
        )
    state = functools.partial(mixer.init_state, dtype=dtype)
    return Subject(
        static, params, constants, inputs, state, bound, as_mixer(mixer).lookahead, as_mixer(mixer).exact
    )


def projected(tree: Any) -> Array:
    """One number in which every number of `tree` counts, each with a random weight: what gradients are taken
    of."""
    real = [leaf for leaf in jax.tree.leaves(tree) if is_real(leaf)]
    weights = [jax.random.normal(jax.random.key(i), leaf.shape) for i, leaf in enumerate(real)]
    return sum(
        jnp.sum(leaf.astype(accumulator(leaf.dtype)) * weight)
        for leaf, weight in zip(real, weights, strict=True)
    )


def is_real(leaf: Any) -> bool:
    """Whether an array holds floating-point numbers."""
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _chain(apply, params, x, lengths, state, reset, valid):
    assert sum(lengths) == x.shape[1]
    outputs, start = [], 0
    for length in lengths:
        here = slice(start, start + length)
        flags = (None if flag is None else flag[:, here] for flag in (reset, valid))
        y, state = apply(params, x[:, here], state, *flags)
        outputs.append(y)
        start += length
    return jnp.concatenate(outputs, axis=1), state
