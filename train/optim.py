"""Optimizers: optax, with the choices of a sequence model made once."""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from seqlab.checks import UserError
from seqlab.module import Params

# Never decayed: norms, biases, the parameters of recurrences, whose size has a meaning, and MambaMixer's
# sums, which are at home at 1.
NO_DECAY = r"(^|\.)(bias|A_log|D|dt_bias|.*norm\.weight|scale|alpha|beta|theta|gamma)$"


def adamw(
    steps: int,
    *,
    peak: float = 1e-3,
    final: float = 0.1,
    warmup: int = 100,
    b1: float = 0.9,
    b2: float = 0.95,
    weight_decay: float = 0.1,
    clip: float | None = 1.0,
    average: float | None = None,
) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101) under a linear warm-up and a cosine to `final` times the peak, gradients
    clipped by their global norm.

    With `average` an exponential moving average of the parameters is kept, with this decay; see
    `parameter_average`.
    """
    if steps < 1 or warmup < 0 or peak <= 0:
        raise UserError(
            f"steps and peak must be positive and warmup not negative, got steps={steps}, peak={peak}, "
            f"warmup={warmup}"
        )
    rate = schedule(steps, peak=peak, final=final, warmup=warmup)
    decay = optax.adamw(rate, b1=b1, b2=b2, weight_decay=weight_decay, mask=decayed)
    parts = [
        *([] if clip is None else [optax.clip_by_global_norm(clip)]),
        decay,
        *([] if average is None else [parameter_average(average)]),
    ]
    return parts[0] if len(parts) == 1 else optax.chain(*parts)


class AverageState(NamedTuple):
    """`count`: updates so far. `average`: of the parameters, by name."""

    count: Int[Array, ""]
    average: Params


def parameter_average(decay: float) -> optax.GradientTransformation:
    """Changes no update, and remembers an average of the parameters, which is what a run is validated with
    and what is loaded of it.

        average <- d average + (1 - d) parameters,  d = min(decay, (1 + n) / (10 + n)) after n updates

    so that a short run does not average over its beginning. It has to be the last of a chain. Running
    statistics of norms are no
    parameters: they stay those of training.

    Raises:
      ValueError: a decay outside [0, 1).
    """
    if not 0 <= decay < 1:
        raise UserError(f"average, the decay of the parameters' average, must be in [0, 1), got {decay!r}")

    def init(params: Params) -> AverageState:
        return AverageState(
            jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params)
        )  # a copy: both are donated to the step

    def update(updates: Params, state: AverageState, params: Params) -> tuple[Params, AverageState]:
        n = state.count.astype(jnp.float32)
        rate = 1 - jnp.minimum(decay, (1 + n) / (10 + n))
        moved = jax.tree.map(
            lambda old, leaf, step: old + rate.astype(old.dtype) * (leaf + step - old),
            state.average,
            params,
            updates,
        )
        return updates, AverageState(state.count + 1, moved)

    return optax.GradientTransformation(init, update)


def average_of(optimizer_state: Any) -> Params:
    """The parameters' average that an optimizer keeps, by name; empty where it keeps none."""
    parts = jax.tree.leaves(optimizer_state, is_leaf=lambda part: isinstance(part, AverageState))
    return next((part.average for part in parts if isinstance(part, AverageState)), {})


def schedule(steps: int, *, peak: float, final: float = 0.1, warmup: int = 100) -> optax.Schedule:
    """Learning rate by step: from 0 to `peak` in `warmup` steps, then a cosine to `final * peak` at
    `steps`."""
    warmup = min(warmup, steps // 2)
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(steps, warmup + 1), final * peak)


def decayed(params: Params) -> dict[str, bool]:
    """Which parameters weight decay acts on: matrices, by name."""
    return {name: leaf.ndim >= 2 and re.search(NO_DECAY, name) is None for name, leaf in params.items()}


def global_norm(tree: Params) -> jnp.ndarray:
    """Euclidean norm of all leaves together, in float32."""
    return optax.tree.norm(tree).astype(jnp.float32)
