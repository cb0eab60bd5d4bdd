"""Selection of the implementation of an op, and the report of which and why.

    implementation=None           the default of the platform; always succeeds, since `xla` never declines
    implementation="name"         that one or an error, never another
    implementation=("a", "b")     the first of these that exists and does not decline, or an error

An implementation declines a call by raising `NotImplementedError(reason)`; every other error is a bug and is
not caught. Implementations are named by module and imported when first selected, so that no backend is
imported or probed before it is needed.
"""

import contextlib
import contextvars
import dataclasses
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from seqlab.checks import check_choice

# Order of preference per platform. `reference` is slow and only selected by name. Accelerator kernels are
# added once they have run on hardware: a compile error at run time could no longer fall back.
_PREFERENCE = {"gpu": ("xla",), "tpu": ("xla",), "cpu": ("xla",)}

# Contexts that are part of jax.jit's cache keys: a function traced under one value is traced again under
# another.
_forced = jax.make_user_context(default_value=None)
_explained = jax.make_user_context(default_value=None)

# An op may lack some of these; some ops have others.
NAMES = ("reference", "xla", "pallas_tpu", "triton_gpu")
Named = str | tuple[str, ...] | None

_log: contextvars.ContextVar[list["Choice"] | None] = contextvars.ContextVar("seqlab_choices", default=None)


@dataclasses.dataclass(frozen=True)
class Choice:
    """The implementation selected for a call of an op, and why preferred ones declined."""

    op: str
    implementation: str
    declined: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        reasons = "".join(f"; {name} declined: {reason}" for name, reason in self.declined)
        return f"{self.op}: {self.implementation}{reasons}"


@dataclasses.dataclass(frozen=True)
class Op:
    """An operation with several implementations.

    Each is a module of `package` with a function named like the op; all take the same arguments.
    """

    name: str
    package: str
    implementations: tuple[str, ...]

    def __call__(self, *args: Any, implementation: Named = None, **kwargs: Any) -> Any:
        named = implementation if implementation is not None else _forced.value
        if isinstance(named, str):
            result = self.load(named)(*args, **kwargs)
            _record(Choice(self.name, named))
            return result
        declined: list[tuple[str, str]] = []
        for candidate in _PREFERENCE.get(jax.default_backend(), ("xla",)) if named is None else named:
            if candidate not in self.implementations:
                check_choice(candidate, NAMES + self.implementations, f"implementation of {self.name}")
                continue
            try:
                result = self.load(candidate)(*args, **kwargs)
            except NotImplementedError as reason:
                declined.append((candidate, str(reason)))
                continue
            _record(Choice(self.name, candidate, tuple(declined)))
            return result
        if named is not None:
            reasons = (
                "; ".join(f"{name}: {reason}" for name, reason in declined)
                or f"{self.name} has {', '.join(self.implementations)}"
            )
            raise NotImplementedError(f"{self.name}: none of {named} takes this call ({reasons})")
        raise AssertionError(f"{self.name}: the xla implementation declined, which it must not: {declined}")

    def load(self, implementation: str) -> Callable[..., Any]:
        """The function of one implementation; raises ValueError if the op has none of that name."""
        check_choice(implementation, self.implementations, f"implementation of {self.name}")
        return getattr(importlib.import_module(f"{self.package}.{implementation}"), self.name)


@contextlib.contextmanager
def use_implementation(name: Named) -> Iterator[None]:
    """Within the block every op uses the implementation `name`, or the first of several that exists and does
    not decline, unless the call names one itself: `("triton_gpu", "xla")` uses Triton kernels where they
    exist.

    Functions compiled by `jax.jit` outside the block are traced again inside; None restores the platform's
    default. An executable compiled ahead of time (`jitted.lower(...).compile()`) does not change.
    """
    with _forced(name):
        yield


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Choice]:
    """The implementations that `function(*args, **kwargs)` would use here, each once, in order. The function
    is traced, not run."""
    choices: list[Choice] = []
    token = _log.set(choices)
    try:
        # A new value each time, so that jitted functions inside are traced again and report their choices.
        with _explained(object()):
            jax.eval_shape(lambda *a: function(*a, **kwargs), *args)
    finally:
        _log.reset(token)
    return list(dict.fromkeys(choices))


def _record(choice: Choice) -> None:
    choices = _log.get()
    if choices is not None:
        choices.append(choice)


def vary_alike(*arrays: Array | None) -> list[Array | None]:
    """Make all arrays vary over the mesh axes of any: inside shard_map the carry of a loop must not change
    its axes, nor a gradient differ from its argument."""
    zeros = [None if x is None else jnp.zeros_like(x, jnp.float32, shape=()) for x in arrays]
    zero = sum(x for x in zeros if x is not None)
    fits = [
        x is None or x.dtype == bool or jax.typeof(own) == jax.typeof(zero)
        for x, own in zip(arrays, zeros, strict=True)
    ]
    return [x if fit else x + zero.astype(x.dtype) for x, fit in zip(arrays, fits, strict=True)]
