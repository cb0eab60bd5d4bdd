"""Batch normalisation that streams: in evaluation it is one affine map per channel."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from seqlab.checks import check_positive
from seqlab.module import Module
from seqlab.shapes import Maps, Steps, accumulator
from seqlab.state import mask_steps


class BatchNorm(Module):
    """(x - mean) / sqrt(var + eps) * weight + bias, mean and variance per channel (arXiv 1502.03167).

    In evaluation, the initial mode of a model, these are the running statistics: an affine map, so streaming
    is exact. In training (`model.train()`, as everywhere in NNX; seqlab's training step calls it) they are
    those of the batch, over rows and valid steps: rows are then not independent, a chunk differs from the
    whole, and the streaming contract does not hold. Every training call updates the running statistics,

        running <- (1 - momentum) running + momentum batch

    with the unbiased variance. They are `nnx.BatchStat`: in the dictionary of parameters by name, saved and
    loaded like them, but without gradient, update or decay.

    Args:
      momentum: the weight of the new batch, 0.1 as in PyTorch (Flax calls that 0.9).
    """

    def __init__(self, dim: int, *, eps: float = 1e-5, momentum: float = 0.1, rngs: nnx.Rngs | None = None):
        self.weight = nnx.Param(jnp.ones((check_positive("dim", dim),)))
        self.bias = nnx.Param(jnp.zeros((dim,)))
        self.running_mean = nnx.BatchStat(jnp.zeros((dim,)))
        self.running_var = nnx.BatchStat(jnp.ones((dim,)))
        self.eps, self.momentum, self.use_running_average = eps, momentum, True

    def __call__(self, x: Float[Array, "b t d"], valid: Steps | None = None) -> Float[Array, "b t d"]:
        wide = mask_steps(x.astype(accumulator(x.dtype)), valid)
        if self.use_running_average:
            mean, var = self.running_mean[...].astype(wide.dtype), self.running_var[...].astype(wide.dtype)
        else:
            mean, var = self._measure(wide, valid)
        y = (wide - mean) * (jax.lax.rsqrt(var + self.eps) * self.weight[...].astype(wide.dtype)) + self.bias[
            ...
        ].astype(wide.dtype)
        return mask_steps(y.astype(x.dtype), valid)

    def _measure(self, x: Array, valid: Steps | None) -> tuple[Array, Array]:
        """Mean and biased variance of a batch whose invalid steps are zero; updates the running
        statistics."""
        seen = x.shape[0] * x.shape[1] if valid is None else jnp.sum(valid, dtype=x.dtype)
        count = jnp.maximum(seen, 1)
        mean = jnp.sum(x, axis=(0, 1)) / count
        # Centred values sum to zero: the variance has no gradient through the mean.
        centred = mask_steps(x - jax.lax.stop_gradient(mean), valid)
        # jnp.square would keep another array for the gradient.
        var = jnp.sum(centred * centred, axis=(0, 1)) / count
        for statistic, batch in (
            (self.running_mean, mean),
            (self.running_var, var * (count / jnp.maximum(count - 1, 1))),
        ):
            old = statistic[...]
            moved = old + self.momentum * (jax.lax.stop_gradient(batch).astype(old.dtype) - old)
            statistic[...] = jnp.where(seen > 0, moved, old)
        return mean, var


def normed(norm: nnx.Module, x: Maps, valid: Steps | None) -> Maps:
    """norm(x) for norms of any kind; batch statistics exclude invalid steps."""
    return norm(x, valid) if isinstance(norm, BatchNorm) else norm(x)
