"""Forecasting: losses, scores, and two baseline forecasters."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from seqlab.train.data import Items
from seqlab.train.quality import metric
from seqlab.train.step import Batch

Predict = Callable[[Float[np.ndarray, "b t m"]], Float[np.ndarray, "b h m"]]


@metric("MSE")
def forecast_loss(model: Any, batch: Batch) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Squared error of `model.forecast(inputs)` [b, h, m], summed over the valid targets, and their number:
    their ratio is the MSE.

    A loss, and a metric too. `model` is anything with `forecast`, [b, t, m] -> [b, h, m], as both forms of
    TSM2.
    """
    return _masked_sum(jnp.square(_error(model, batch)), batch)


@metric("MAE")
def forecast_mae(model: Any, batch: Batch) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The same with the absolute error: the MAE."""
    return _masked_sum(jnp.abs(_error(model, batch)), batch)


def _error(model: Any, batch: Batch) -> Float[Array, "b h m"]:
    return model.forecast(batch["inputs"]).astype(jnp.float32) - batch["targets"].astype(jnp.float32)


def _masked_sum(values: Float[Array, "b h m"], batch: Batch) -> tuple[Float[Array, ""], Float[Array, ""]]:
    keep = batch["valid"][..., None] & jnp.ones(values.shape, bool)
    return jnp.sum(jnp.where(keep, values, 0.0)), jnp.sum(keep, dtype=jnp.float32)


class Scores(NamedTuple):
    """Means over windows, horizon and series, in scaled units: squared error and absolute error."""

    mse: float
    mae: float


def scores(predict: Predict, windows: Items, batch_size: int = 256) -> Scores:
    """The scores of `predict` over all windows. The last batch is smaller, so a compiled function is compiled
    twice."""
    squared, absolute, count = 0.0, 0.0, 0
    for start in range(0, len(windows), batch_size):
        inputs, targets = stacked(windows, range(start, min(start + batch_size, len(windows))))
        error = np.asarray(predict(inputs), np.float64) - targets
        squared, absolute, count = (
            squared + np.square(error).sum(),
            absolute + np.abs(error).sum(),
            count + error.size,
        )
    return Scores(float(squared / count), float(absolute / count))


def stacked(
    windows: Items, rows: range | None = None
) -> tuple[Float[np.ndarray, "b t m"], Float[np.ndarray, "b h m"]]:
    """Inputs and targets of some windows, or of all, as two arrays."""
    items = [windows[row] for row in (range(len(windows)) if rows is None else rows)]
    return np.stack([item["inputs"] for item in items]), np.stack([item["targets"] for item in items])


def last_value(horizon: int) -> Predict:
    """The baseline that repeats the last value."""
    return lambda inputs: np.repeat(inputs[:, -1:], horizon, axis=1)


def least_squares(windows: Items, *, relative: bool = False, ridge: float = 0.0) -> Predict:
    """The least-squares linear map, with a constant, from a window to its targets, shared by the series.

    `relative` subtracts a window's last value first and adds it to the forecast, so that the map follows
    changes of level (NLinear, arXiv
    2205.13504). `ridge` is the penalty on the squared weights, the constant's included.
    """
    inputs, targets = stacked(windows)
    x, y = _by_series(inputs, relative), _by_series(targets, False)
    y = y - (_by_series(inputs[:, -1:], False) if relative else 0.0)
    x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    penalty = np.sqrt(ridge) * np.eye(x.shape[1])
    weights = np.linalg.lstsq(
        np.concatenate([x, penalty]), np.concatenate([y, np.zeros((len(penalty), y.shape[1]))]), rcond=None
    )[0]

    def predict(inputs: Float[np.ndarray, "b t m"]) -> Float[np.ndarray, "b h m"]:
        y = _by_series(inputs, relative) @ weights[:-1] + weights[-1]
        y = y.reshape(len(inputs), inputs.shape[2], -1).swapaxes(1, 2)
        return y + inputs[:, -1:] if relative else y

    return predict


def _by_series(x: Float[np.ndarray, "b t m"], relative: bool) -> Float[np.ndarray, "bm t"]:
    x = np.asarray(x, np.float64)
    x = x - x[:, -1:] if relative else x
    return x.swapaxes(1, 2).reshape(-1, x.shape[1])
