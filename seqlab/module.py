"""Modules: parameters with names, and nothing else.

A `Module` holds `nnx.Param`s and hyper-parameters. State and caches are arguments and results, never
attributes. At the edge of a program `split` takes a model apart into a hashable description and one flat
dictionary of arrays, `{"backbone.blocks.0.mixer.q.weight": array}`; everything that is jitted, sharded,
optimised or saved works on that dictionary, and `merge` puts the model together inside the jitted function.
(Handing modules to `nnx.jit` instead costs 10 to 70 times more per decode step: it walks the objects in
Python.)
"""

import inspect
import math
from typing import Any, NamedTuple

import jax
from flax import nnx

Params = dict[str, jax.Array]


class Module(nnx.Module):
    """Base of every seqlab module: an `nnx.Module` that shows the signature of its constructor.

    NNX hides it behind `(*args, **kwargs)`, so a configuration system accepts misspelt arguments without a
    word. Constructors take
    `rngs: nnx.Rngs` by keyword.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        signature = inspect.signature(cls.__init__)
        cls.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])


class Static(NamedTuple):
    """What remains of a model without its arrays: hashable, so that it can be a static argument of
    `jax.jit`."""

    graph: nnx.GraphDef
    tree: jax.tree_util.PyTreeDef
    names: tuple[str, ...]


def split(model: nnx.Module) -> tuple[Static, Params]:
    """Take `model` apart into a hashable `Static` and a flat dictionary from parameter name to array."""
    graph, state = nnx.split(model)
    leaves, tree = jax.tree_util.tree_flatten_with_path(state)
    names = tuple(_name(path) for path, _ in leaves)
    return Static(graph, tree, names), dict(zip(names, (leaf for _, leaf in leaves), strict=True))


def merge(static: Static, params: Params) -> Any:
    """The inverse of `split`; works on tracers.

    Raises:
      KeyError: if `params` lacks a parameter of the model or holds one that it does not have.
    """
    if params.keys() != set(static.names):
        missing, extra = set(static.names) - params.keys(), params.keys() - set(static.names)
        raise KeyError(
            f"params do not fit the model: missing {sorted(missing)[:5]}, not in the model "
            f"{sorted(extra)[:5]}"
        )
    return nnx.merge(
        static.graph, jax.tree_util.tree_unflatten(static.tree, [params[name] for name in static.names])
    )


def statistics_of(static: Static) -> frozenset[str]:
    """The names of what training measures and no gradient reaches (`nnx.BatchStat`): running means and
    variances."""
    variables = jax.tree.leaves(
        jax.tree.unflatten(static.tree, static.names), is_leaf=lambda part: isinstance(part, nnx.Variable)
    )
    return frozenset(
        name
        for name, variable in zip(static.names, variables, strict=True)
        if isinstance(variable, nnx.BatchStat)
    )


def params_of(model: nnx.Module) -> Params:
    """The parameters of `model` by name."""
    return split(model)[1]


def count_params(model_or_params: nnx.Module | Params) -> int:
    """How many numbers are learnt; abstract models (`nnx.eval_shape`) count too. In a dictionary every array
    counts."""
    if isinstance(model_or_params, dict):
        params = model_or_params
    else:
        static, params = split(model_or_params)
        params = {name: leaf for name, leaf in params.items() if name not in statistics_of(static)}
    return sum(math.prod(leaf.shape) for leaf in params.values())


def _name(path: tuple[Any, ...]) -> str:
    parts = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path]
    return ".".join(parts[:-1] if parts[-1] in ("value", "raw_value") else parts)
