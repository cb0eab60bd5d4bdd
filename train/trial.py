"""Checks of a run on shapes only: incompatible parts are refused before anything is created or compiled."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from seqlab.checks import UserError, shown
from seqlab.module import Params, Static, split, statistics_of
from seqlab.train.experiment import Experiment
from seqlab.train.placement import share
from seqlab.train.step import Batch, evaluate_step


def check_fits(experiment: Experiment, batch: Batch, mesh: Mesh | None = None) -> None:
    """Refuse a loss, a metric, data and an optimizer that do not fit the model.

    Nothing is computed: all of them are traced, on arrays of the shapes of `batch`, this process's share of a
    batch.

    Raises:
      ValueError: one of them fails or returns an invalid result; the message says which and how.
    """
    static, params = split(nnx.eval_shape(lambda: experiment.model(rngs=nnx.Rngs(0))))
    check_sums("loss", experiment.loss, static, params, batch, experiment.accumulate, mesh)
    check_sums("metric", experiment.metric, static, params, batch, experiment.accumulate, mesh)
    optimizer = experiment.optimizer(experiment.steps)
    learnt = {name: leaf for name, leaf in params.items() if name not in statistics_of(static)}
    _tried("optimizer", lambda learnt: optimizer.update(learnt, optimizer.init(learnt), learnt), learnt)


def check_sums(
    name: str,
    function: Callable[..., Any],
    static: Static,
    params: Params,
    batch: Batch,
    parts: int = 1,
    mesh: Mesh | None = None,
) -> None:
    """Refuse a loss or metric `function` that does not give two sums for a model and one of `parts` parts of
    a batch."""
    shared = share(mesh)[1]
    shapes = {
        key: jax.ShapeDtypeStruct((len(leaf) * shared // parts, *leaf.shape[1:]), jnp.asarray(leaf).dtype)
        for key, leaf in batch.items()
    }
    made = _tried(name, functools.partial(evaluate_step, static, function), params, shapes)
    sums = made if isinstance(made, tuple) else ()
    if len(sums) != 2 or any(getattr(part, "shape", None) != () for part in sums):
        raise UserError(
            f"{name}: expected the sum over targets and their number, two scalars, got {shown(made)}"
        )
    if not jnp.issubdtype(sums[0].dtype, jnp.floating):
        raise UserError(f"{name}: expected a sum in floating point, got {sums[0].dtype}")


def _tried(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """The shapes of what `function` gives."""
    try:
        return jax.eval_shape(function, *arguments)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    except Exception as error:  # the user's own function, or one of ours for another kind of model or data
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        raise UserError(
            f"{name}: it fails on this model and these data ({reason:.200}); --traceback says where"
        ) from error
