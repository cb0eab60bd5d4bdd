"""Modules: parameters with names, and nothing else.

A `Module` holds `nnx.Param`s and hyper-parameters. State and caches are arguments and results, never
attributes. At the edge of a program `split` separates a model into a hashable description and one flat
dictionary of arrays, `{"backbone.blocks.0.mixer.q.weight": array}`; jitting, sharding, optimisation and
saving work on that dictionary, and `merge` rebuilds the model inside the jitted function. (Passing modules to
`nnx.jit` instead costs 10 to 70 times more per decode step: it traverses the objects in Python.)
"""

import functools
import inspect
import math
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

Params = dict[
    str, Any
]  # arrays by name: JAX's, NumPy's, or of an abstract model (`nnx.eval_shape`) their shapes
M = TypeVar("M", bound=nnx.Module)


class Module(nnx.Module):
    """Base of every seqlab module: an `nnx.Module` that shows the signature of its constructor.

    NNX hides it behind `(*args, **kwargs)`, so that a configuration system would accept misspelt arguments.
    Constructors take `rngs: nnx.Rngs` by keyword.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        signature = inspect.signature(cls.__init__)
        cls.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])


class Static(NamedTuple):
    """A model without its arrays: hashable, so that it can be a static argument of `jax.jit`.

    `graph`, `tree`: as NNX and JAX describe it. `names`: of the arrays, in the order of `tree`. `learnt`:
    which of them are parameters (`nnx.Param`). `keys`: the PRNG of each array that is a typed key, None for
    others.
    """

    graph: nnx.GraphDef
    tree: jax.tree_util.PyTreeDef
    names: tuple[str, ...]
    learnt: frozenset[str]
    keys: tuple[str | None, ...]


def split(model: nnx.Module) -> tuple[Static, Params]:
    """Split `model` into a hashable `Static` and a flat dictionary from name to array.

    The dictionary holds every array of the model: the parameters, and the statistics (`statistics_of`), such
    as the key and the count of an `nnx.Dropout`. Typed keys are stored as raw numbers.
    """
    static, leaves = _described(model)
    raw = (leaf if kind is None else _raw(leaf) for leaf, kind in zip(leaves, static.keys, strict=True))
    return static, dict(zip(static.names, raw, strict=True))


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
    leaves = [
        params[name] if kind is None else _typed(params[name], kind)
        for name, kind in zip(static.names, static.keys, strict=True)
    ]
    return nnx.merge(static.graph, jax.tree_util.tree_unflatten(static.tree, leaves))


def in_evaluation(model: M) -> M:
    """A copy of `model` in evaluation mode that shares its arrays: without random draws and statistics
    updates.

    NNX's own dropout starts in training mode, so streaming, verification and evaluation use this.
    """
    static, params = split(model)
    copy = merge(static, params)
    copy.eval()
    return copy


def statistics_of(static: Static) -> frozenset[str]:
    """The names of all arrays that are not an `nnx.Param` and have no gradient: running statistics, keys of
    dropout, constants."""
    return frozenset(static.names) - static.learnt


def statistics(module: nnx.Module) -> dict[str, Any]:
    """The statistics of `module` as it holds them, typed keys included, by name."""
    static, leaves = _described(module)
    named = zip(static.names, leaves, strict=True)
    return {name: leaf for name, leaf in named if name not in static.learnt}


def moved_statistics(module: nnx.Module, before: dict[str, Any]) -> Params:
    """Statistics of `module` changed by calls since `before` was returned by `statistics`, by name and as in
    `split`; none in evaluation."""
    return {
        name: leaf if _key_kind(leaf) is None else _raw(leaf)
        for name, leaf in statistics(module).items()
        if leaf is not before[name]
    }


def put_statistics(module: nnx.Module, statistics: Params) -> None:
    """Write the result of `moved_statistics` on a copy back into `module`."""
    if statistics:
        static, old = split(module)
        nnx.update(module, nnx.state(merge(static, old | statistics)))


def params_of(model: nnx.Module) -> Params:
    """The parameters of `model` by name, and the statistics of its norms (`nnx.BatchStat`), which belong to
    its weights; keys of dropout and other variables do not."""
    static, params = split(model)
    return {
        name: params[name]
        for name, part in zip(static.names, _variables(static.tree, static.names), strict=True)
        if isinstance(part, nnx.Param | nnx.BatchStat)
    }


def count_params(model_or_params: nnx.Module | Params) -> int:
    """The number of trained parameters, also of abstract models (`nnx.eval_shape`). In a dictionary every
    array counts."""
    if isinstance(model_or_params, dict):
        params = model_or_params
    else:
        static, params = split(model_or_params)
        params = {name: params[name] for name in static.learnt}
    return sum(math.prod(leaf.shape) for leaf in params.values())


def _typed(raw: Any, kind: str) -> Any:
    wrap = functools.partial(jax.random.wrap_key_data, impl=kind)
    return jax.eval_shape(wrap, raw) if isinstance(raw, jax.ShapeDtypeStruct) else wrap(raw)


def _described(model: nnx.Module) -> tuple[Static, list[Any]]:
    graph, state = nnx.split(model)
    leaves, tree = jax.tree_util.tree_flatten_with_path(state)
    names = tuple(_name(path) for path, _ in leaves)
    parts = zip(names, _variables(tree, names), strict=True)
    learnt = frozenset(name for name, part in parts if isinstance(part, nnx.Param))
    keys = tuple(_key_kind(leaf) for _, leaf in leaves)
    return Static(graph, tree, names, learnt, keys), [leaf for _, leaf in leaves]


def _variables(tree: jax.tree_util.PyTreeDef, names: tuple[str, ...]) -> list[Any]:
    """The variable of each leaf; its name for a leaf that is a plain attribute."""
    return jax.tree.leaves(
        jax.tree.unflatten(tree, names), is_leaf=lambda part: isinstance(part, nnx.Variable)
    )


def _key_kind(leaf: Any) -> str | None:
    """The PRNG of a typed key, also an abstract one; None for other arrays."""
    dtype = getattr(leaf, "dtype", None)
    return dtype._impl.name if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key) else None


def _raw(key: Any) -> Any:
    if isinstance(key, jax.ShapeDtypeStruct):
        return jax.eval_shape(jax.random.key_data, key)
    return jax.random.key_data(key)


def _name(path: tuple[Any, ...]) -> str:
    parts = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path]
    return ".".join(parts[:-1] if parts[-1] in ("value", "raw_value") else parts)
