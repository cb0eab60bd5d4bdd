"""Optimizers: optax with standard choices for sequence models."""

import inspect
import math
import numbers
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from seqlab.checks import UserError, check_at_least, check_choice, check_positive
from seqlab.module import Params
from seqlab.train.override import ConfigError

# Excluded from weight decay: norms, biases, parameters of recurrences, whose magnitude has a meaning, and
# MambaMixer's sums, whose neutral value is 1.
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

    Args:
      steps: of the run.
      peak, final: the peak learning rate, above 0, and the final fraction of it, 0 to 1.
      warmup: steps up to the peak.
      b1, b2: decays of the moments, in [0, 1).
      weight_decay: at least 0; only for matrices, see `decayed`.
      clip: largest global norm of a gradient, above 0; None to leave gradients as they are.
      average: decay of an exponential moving average of the parameters, see `parameter_average`; None for
        none.

    Raises:
      ValueError: an option out of its range.
    """
    _check(b1=(b1, 0, 1, "[)"), b2=(b2, 0, 1, "[)"), weight_decay=(weight_decay, 0, math.inf, "[)"))
    rate = _rate(steps, peak, final, warmup)
    decay = optax.adamw(rate, b1=b1, b2=b2, weight_decay=weight_decay, mask=decayed)
    return _chained(decay, clip, average)


def named(
    steps: int,
    *,
    name: str,
    options: dict[str, Any] | None = None,
    peak: float = 1e-3,
    final: float = 0.1,
    warmup: int = 100,
    clip: float | None = 1.0,
    average: float | None = None,
) -> optax.GradientTransformation:
    """An optimizer of optax by its name, under the schedule, the clipping and the average of `adamw`.

        --set optimizer=seqlab.train.optim:named optimizer.name=lion optimizer.options="{'b1': 0.9}"

    Args:
      name: such as "lion", "sgd", "adafactor": a function of optax that takes a `learning_rate`.
      options: its other keywords.
      steps, peak, final, warmup, clip, average: as in `adamw`.

    Raises:
      ValueError: optax has no such optimizer (with the nearest name), or it does not take an option.
    """
    known = sorted(key for key, value in vars(optax).items() if _takes_rate(value))
    check_choice(name, known, "optimizer.name")
    build = getattr(optax, name)
    for option in options or {}:
        check_choice(option, list(inspect.signature(build).parameters), f"optimizer.options of {name}")
    try:
        return _chained(build(_rate(steps, peak, final, warmup), **(options or {})), clip, average)
    except (TypeError, ValueError) as error:
        raise UserError(f"optimizer: optax.{name} with {options}: {error}") from error


def check_factory(factory: Any) -> None:
    """Refuse factories that cannot be called as factory(steps): the number of steps must not be taken for
    another argument, such as a learning rate.

    Raises:
      ConfigError: says how to name an optimizer of optax.
    """
    function = getattr(factory, "func", factory)
    label = f"{getattr(function, '__module__', '')}.{getattr(function, '__name__', function)}"
    try:
        first = next(iter(inspect.signature(function).parameters), None)
    except (ValueError, TypeError):  # written in C, or not callable
        first = None
    if first != "steps":
        hint = (
            f"; say optimizer={__name__}:named optimizer.name={function.__name__}"
            if _takes_rate(function)
            else f"; expected such as {__name__}:adamw"
        )
        raise ConfigError(
            f"optimizer: {label} cannot be called as optimizer(steps), for its first argument is "
            f"{first or 'unknown'}{hint}"
        )


def check_transformation(optimizer: Any) -> None:
    """Refuse the result of an optimizer factory unless it is an optax transformation (ConfigError)."""
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise ConfigError(f"optimizer: gives {type(optimizer).__name__}, expected an optax transformation")


def _takes_rate(function: Any) -> bool:
    if not inspect.isfunction(function):
        return False
    return next(iter(inspect.signature(function).parameters), None) == "learning_rate"


def _rate(steps: int, peak: float, final: float, warmup: int) -> optax.Schedule:
    check_positive("steps", steps)
    check_at_least("warmup", warmup, 0)
    _check(peak=(peak, 0, math.inf, "()"), final=(final, 0, 1, "[]"))
    return schedule(steps, peak=peak, final=final, warmup=warmup)


def _chained(
    optimizer: optax.GradientTransformation, clip: float | None, average: float | None
) -> optax.GradientTransformation:
    """`optimizer` between clipping and the average of the parameters."""
    if clip is not None:
        _check(clip=(clip, 0, math.inf, "()"))
    parts = [] if clip is None else [optax.clip_by_global_norm(clip)]
    parts.append(optimizer)
    parts += [] if average is None else [parameter_average(average)]
    return parts[0] if len(parts) == 1 else optax.chain(*parts)


def _check(**options: tuple[float, float, float, str]) -> None:
    """Refuse numbers outside their range: name=(value, least, greatest, brackets as in "[)")."""
    for name, (value, low, high, brackets) in options.items():
        real = isinstance(value, numbers.Real) and not isinstance(value, bool)
        above = real and (low <= value if brackets[0] == "[" else low < value)
        below = real and (value <= high if brackets[1] == "]" else value < high)
        if not (above and below):
            raise UserError(f"{name} must be in {brackets[0]}{low}, {high}{brackets[1]}, got {value!r}")


class AverageState(NamedTuple):
    """`count`: updates so far. `average`: of the parameters, by name."""

    count: Int[Array, ""]
    average: Params


def parameter_average(decay: float) -> optax.GradientTransformation:
    """An exponential moving average of the parameters, which leaves updates unchanged; it is used for
    validation and loading.

        average <- d average + (1 - d) parameters,  d = min(decay, (1 + n) / (10 + n)) after n updates

    so that a short run does not average over its beginning. It must be the last of a chain. Running
    statistics of norms are not averaged.

    Raises:
      ValueError: a decay outside [0, 1).
    """
    if not 0 <= decay < 1:
        raise UserError(f"average, the decay of the parameters' average, must be in [0, 1), got {decay!r}")

    def init(params: Params) -> AverageState:
        # A copy, because both are donated to the step.
        return AverageState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params))

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
    """The parameter average of an optimizer, by name; empty without one."""
    parts = jax.tree.leaves(optimizer_state, is_leaf=lambda part: isinstance(part, AverageState))
    return next((part.average for part in parts if isinstance(part, AverageState)), {})


def schedule(steps: int, *, peak: float, final: float = 0.1, warmup: int = 100) -> optax.Schedule:
    """Learning rate by step: from 0 to `peak` in `warmup` steps, then a cosine to `final * peak` at
    `steps`."""
    warmup = min(warmup, steps // 2)
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(steps, warmup + 1), final * peak)


def decayed(params: Params) -> dict[str, bool]:
    """The parameters subject to weight decay: matrices, by name."""
    return {name: leaf.ndim >= 2 and re.search(NO_DECAY, name) is None for name, leaf in params.items()}


def global_norm(tree: Params) -> jnp.ndarray:
    """Euclidean norm of all leaves together, in float32."""
    return optax.tree.norm(tree).astype(jnp.float32)
