"""Low-rank adaptation: a trained model whose weights are frozen, and small trained maps beside its linear
ones (LoRA, arXiv 2106.09685)."""

import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from seqlab.checks import UserError, check_positive
from seqlab.models.layers import Linear, LowRankMap
from seqlab.module import M, Module, merge, split

TARGETS = (r"qkv", r"out", r"in_proj", r"out_proj", r"gate_up", r"up", r"down")
# Maps whose weights are used directly and not by a call of the layer.
_UNCALLED = (r"dt_proj", r"embedding")


class Frozen(nnx.BatchStat):
    """A weight that is not trained: it belongs to the model like a running statistic, which nothing moves."""


def lora(
    model: Callable[..., Module],
    *,
    rank: int = 8,
    scale: float = 2.0,
    targets: Sequence[str] = TARGETS,
    rngs: nnx.Rngs,
) -> Module:
    """A model with frozen weights and, beside every linear map that is a target, a trained one:

        y = x W + scale (x A) B,  A [in, rank] normal with standard deviation 1 / sqrt(in), B = 0

    So it begins as the model itself. `merged` adds the products to the weights.

    Args:
      model: the factory of the model, called as model(rngs=rngs).
      rank: r of the maps.
      scale: alpha / r of the paper.
      targets: regular expressions of the last part of a map's name: "qkv" or "down", for instance.

    Raises:
      ValueError: a target that names no linear map of the model, or one whose weights are used directly.
    """
    check_positive("rank", rank)
    made = model(rngs=rngs)
    for target in targets:
        if any(re.fullmatch(target, name) for name in _UNCALLED):
            raise UserError(f"targets: {target!r} names a map without a low-rank form")
    chosen = [
        module
        for path, module in nnx.iter_modules(made)
        if isinstance(module, Linear) and any(re.fullmatch(target, str(path[-1])) for target in targets)
    ]
    if not chosen:
        known = {str(path[-1]) for path, module in nnx.iter_modules(made) if isinstance(module, Linear)}
        raise UserError(f"targets: {targets!r} names no map of the model, which has {sorted(known)}")
    for _, module in nnx.iter_modules(made):
        for name, value in vars(module).items():
            if isinstance(value, nnx.Param):
                setattr(module, name, Frozen(value[...]))
    for module in chosen:
        *lead, inputs, outputs = module.weight.shape
        module.adapter = LowRankMap(inputs, rank, outputs, scale=scale, lead=tuple(lead), rngs=rngs)
    return made


def has_lora(model: Module) -> bool:
    """Whether `model` has low-rank maps beside its own."""
    return any(isinstance(module, LowRankMap) for _, module in nnx.iter_modules(model))


def merged(model: M) -> M:
    """A copy of `model` with W + scale A B in place of each weight with a low-rank map, and all weights
    trainable again; itself without any."""
    if not has_lora(model):
        return model
    copy = merge(*split(model))
    for _, module in nnx.iter_modules(copy):
        if isinstance(module, Linear) and module.adapter is not None:
            product = _product(module.adapter.down[...], module.adapter.up[...], module.adapter.scale)
            module.weight[...] = module.weight[...] + product
            del module.adapter
    for _, module in nnx.iter_modules(copy):
        for name, value in vars(module).items():
            if isinstance(value, Frozen):
                setattr(module, name, nnx.Param(value[...]))
    return copy


def _product(down: jax.Array, up: jax.Array, scale: float) -> jax.Array:
    """scale A B, summed in float64."""
    return jnp.asarray(np.matmul(np.asarray(down, np.float64), np.asarray(up, np.float64)) * scale, up.dtype)
