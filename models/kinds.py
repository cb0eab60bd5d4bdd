"""Checks of the parts of a model by kind: a mixer where a mixer is expected, a norm where a norm is.

Parts are given as factories, often by name on the command line, and a part of another kind would only fail
when the model is called. Models build their parts by `make_mixer` and `make_norm`, which check at once.
"""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from flax import nnx

from seqlab.checks import UserError, nearest, shown


def make_mixer(name: str, factory: Callable[..., Any], *sizes: int, rngs: nnx.Rngs, **options: Any) -> Any:
    """factory(*sizes, rngs=rngs, **options), checked to be a mixer: a module called as (x, state, reset,
    valid).

    Args:
      name: the name of the argument; a factory from a config has its own path (`where`).
    Raises:
      ValueError: it is something else; the message has the names of mixers.
    """
    return _checked("mixer", _is_mixer, name, factory, sizes, rngs, options)


def make_norm(name: str, factory: Callable[..., Any], *sizes: int, rngs: nnx.Rngs, **options: Any) -> Any:
    """The same for a norm: a module of x alone, without a state."""
    return _checked("norm", _is_norm, name, factory, sizes, rngs, options)


def _checked(
    kind: str,
    fits: Callable[[type], bool],
    name: str,
    factory: Callable[..., Any],
    sizes: tuple[int, ...],
    rngs: nnx.Rngs,
    options: dict[str, Any],
) -> Any:
    if not callable(factory):
        raise UserError(
            f"{name} must be the factory of a {kind}, called as {name}(dim, rngs=...), got {shown(factory)}"
        )
    cls = class_of(factory)
    # Linear maps and convolutions are called like norms, but have a width on both sides.
    first = next(iter(inspect.signature(cls).parameters), "") if inspect.isclass(cls) else ""
    if not inspect.isclass(cls) or (fits(cls) and first != "inputs"):
        made = factory(*sizes, rngs=rngs, **options)
        cls = type(made)
        if fits(cls):
            return made
    place = getattr(factory, "where", name)
    raise UserError(
        f"{place}: {cls.__name__} is {kind_of(cls, f'no {kind}')}, expected a "
        f"{kind}{nearest(cls.__name__, _known(fits))}"
    )


def class_of(factory: Any) -> Any:
    """The class or function that a factory finally calls."""
    while hasattr(factory, "func"):
        factory = factory.func
    return factory


def kind_of(cls: type, otherwise: str = "") -> str:
    """Whether `cls` is "a mixer" or "a norm"; `otherwise` if neither."""
    if _is_mixer(cls):
        return "a mixer"
    return "a norm" if _is_norm(cls) and _needs_a_width_alone(cls) else otherwise


def _is_mixer(cls: type) -> bool:
    return _takes(cls, 4)


def _is_norm(cls: type) -> bool:
    return _takes(cls, 1) and not hasattr(cls, "init_state")


def _takes(cls: type, count: int) -> bool:
    """Whether instances of `cls` can be called with this many arrays."""
    if not any("__call__" in vars(base) for base in cls.__mro__):
        return False
    try:
        inspect.signature(cls.__call__).bind(None, *[None] * count)
    except TypeError:
        return False
    except ValueError:  # no signature available
        return True
    return True


def _known(fits: Callable[[type], bool]) -> list[str]:
    """The matching classes of `seqlab.models` that need only a width."""
    models = importlib.import_module("seqlab.models")
    classes = {name: getattr(models, name) for name in models.__all__}
    return [
        name
        for name, cls in classes.items()
        if inspect.isclass(cls) and issubclass(cls, nnx.Module) and fits(cls) and _needs_a_width_alone(cls)
    ]


def _needs_a_width_alone(cls: type) -> bool:
    parameters = inspect.signature(cls).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.name != "rngs"] == ["dim"]
