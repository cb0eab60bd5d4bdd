"""Benchmark cases: op calls at the shapes of their `specs`, with FLOP and byte counts and error bounds."""

import dataclasses
import importlib
import math
import types
import typing
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from seqlab import kernels
from seqlab.checks import UserError, check_choice
from seqlab.kernels.dispatch import Op

_UNIT = 2.0**-20  # float32: products are made of three in TF32 on GPUs, exponentials are the hardware's
_BFLOAT16 = 2.0**-8  # of numbers rounded to 8 bits
_DENSE = 2**31  # bytes that a reference in float64 may take


@dataclasses.dataclass(frozen=True)
class Case:
    """A call of an op: arrays by argument, everything else in `options`; with `gradients` values and
    gradients of it."""

    op: Op
    name: str
    spec: Any
    dtype: str
    arguments: dict[str, Any]
    options: dict[str, Any]
    gradients: bool

    @property
    def title(self) -> str:
        what = "values and gradients" if self.gradients else "values"
        return f"{self.op.name} {self.name} ({describe(self.spec)}), {self.dtype}, {what}"

    @property
    def flops(self) -> float:
        """A gradient adds at least twice the operations."""
        return _specs(self.op.name).FACTS.flops(self.spec) * (3.0 if self.gradients else 1.0)

    @property
    def bytes(self) -> float:
        """Every argument is read and every result written once; with gradients twice, and the cotangents are
        read."""
        results = jax.eval_shape(self.call("xla"), self.arguments)
        once = _bytes(self.arguments) + _bytes(results)
        return once + _bytes(self.arguments) + 2 * _bytes(results) if self.gradients else once

    @property
    def allowed(self) -> tuple[float, float]:
        """The error bounds of values and gradients, relative to their largest entry. Rounding errors of a sum
        grow with the square root of its length. In bfloat16 the factors are also rounded before each sum, of
        which a gradient has up to four in sequence."""
        values, gradients = (_UNIT * max(n, 1) ** 0.5 for n in _specs(self.op.name).FACTS.sums(self.spec))
        rough = _BFLOAT16 if any(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(self.arguments)) else 0.0
        return values + 2 * rough, 4 * (max(values, gradients) + rough)

    @property
    def dense(self) -> bool:
        """Whether the reference in float64 fits."""
        return 8 * _specs(self.op.name).FACTS.held(self.spec) <= _DENSE

    def call(self, implementation: str) -> Callable[[dict[str, Any]], Any]:
        """The values by an implementation, as a function of the arguments."""
        function = getattr(kernels, self.op.name)
        return lambda arguments: function(**arguments, **self.options, implementation=implementation)

    def cotangents(self) -> Any:
        """A fixed random cotangent for every value."""
        shapes, random = jax.eval_shape(self.call("xla"), self.arguments), np.random.default_rng(7)
        return jax.tree.map(
            lambda x: jnp.asarray(random.standard_normal(x.shape, np.float32), x.dtype), shapes
        )

    def timed(self, implementation: str) -> Callable[[Any], Any]:
        """The timed function of `(arguments, cotangents)`: the values, or the values and the gradients with
        respect to all floating-point arguments."""
        return (
            with_gradients(self.call(implementation))
            if self.gradients
            else lambda both: self.call(implementation)(both[0])
        )


def with_gradients(function: Callable[[dict[str, Any]], Any]) -> Callable[[Any], Any]:
    """`(values, gradients)` of `(arguments, cotangents)`."""

    def both(inputs):
        arguments, cotangents = inputs
        floats = {
            name: x
            for name, x in arguments.items()
            if hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)
        }
        values, pull = jax.vjp(lambda floats: function({**arguments, **floats}), floats)
        return values, pull(cotangents)[0]

    return both


def _bytes(tree: Any) -> float:
    return float(sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree)))


def op_named(name: str) -> Op:
    """The op of that name; raises ValueError with the nearest name."""
    check_choice(name, kernels.__all__, "op")
    return importlib.import_module(f"seqlab.kernels.{name}")._op


def has_gradients(op: str) -> bool:
    """Whether gradients of the op can be timed."""
    return _specs(op).FACTS.gradients


def make(op: Op, name: str, spec: Any, dtype: str | None = None, gradients: bool = False) -> Case:
    """The case of a spec. A sequence starts fresh, as in training; a single step continues from a state, as
    in decoding."""
    module = _specs(op.name)
    if hasattr(spec, "dtype"):
        fields = {field: dtype for field in ("dtype", "wide") if hasattr(spec, field)} if dtype else {}
        spec = spec._replace(**fields)
        call, dtype = module.inputs(spec), spec.dtype
    else:
        dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
        call = module.make(spec, dtype=dtype)
    if getattr(spec, "t", 1) > 1:
        call.pop("initial_state", None)
    arguments = {
        key: x
        for key, x in call.items()
        if x is not None and all(isinstance(y, jax.Array) for y in jax.tree.leaves(x))
    }
    options = {key: x for key, x in call.items() if x is not None and key not in arguments}
    options |= {
        key: getattr(spec, key) for key in ("chunk", "levels") if getattr(spec, key, None) is not None
    }
    return Case(op, name, spec, dtype, arguments, options, gradients)


def shapes(op: Op) -> dict[str, Any]:
    """The named shapes of an op: those for benchmarks here, and those large enough for an accelerator."""
    return _specs(op.name).BENCHMARKS | getattr(_specs(op.name), "LARGE", {})


def default_shapes(op: Op, large: bool | None = None) -> dict[str, Any]:
    """The default shapes: `large` ones on an accelerator."""
    module = _specs(op.name)
    large = jax.default_backend() != "cpu" if large is None else large
    return getattr(module, "LARGE", module.BENCHMARKS) if large else module.BENCHMARKS


def chosen_shapes(op: Op, words: list[str]) -> dict[str, Any]:
    """The shapes selected by names and changed by words such as t=512 (of the first one if there is no
    name)."""
    known, names = shapes(op), [word for word in words if "=" not in word]
    for name in names:
        check_choice(name, tuple(known), f"shape of {op.name}")
    changes = [word.partition("=") for word in words if "=" in word]
    found = {name: known[name] for name in names} or (
        dict([next(iter(known.items()))]) if changes else default_shapes(op)
    )
    for field, _, text in changes:
        found = {name: _changed(op, spec, field, text) for name, spec in found.items()}
    return found


def _changed(op: Op, spec: Any, field: str, text: str) -> Any:
    kinds = typing.get_type_hints(type(spec))
    check_choice(field, tuple(kinds), f"field of a shape of {op.name}")
    value = _read(text, kinds[field])
    if value is _read:
        raise UserError(
            f"--shape {field}: got {text!r}, expected {getattr(kinds[field], '__name__', kinds[field])}"
        )
    return (
        spec._replace(**{field: value})
        if hasattr(spec, "_replace")
        else dataclasses.replace(spec, **{field: value})
    )


def _read(text: str, kind: Any) -> Any:
    """`text` converted to `kind`, or this function itself if it cannot be."""
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if text.lower() == "none" and type(None) in kinds:
        return None
    if bool in kinds:
        return {"true": True, "false": False}.get(text.lower(), _read)
    for one in kinds:
        try:
            value = one(text)
        except (TypeError, ValueError):
            continue
        if one is not int or value >= 0:
            return value
    return _read


def describe(spec: Any) -> str:
    """The fields of a spec that differ from their defaults, and those without one; its dtype is reported
    elsewhere."""
    if dataclasses.is_dataclass(spec):
        values = {
            field.name: (getattr(spec, field.name), field.default) for field in dataclasses.fields(spec)
        }
    else:
        values = {
            name: (value, spec._field_defaults.get(name, dataclasses.MISSING))
            for name, value in spec._asdict().items()
        }
    return " ".join(
        f"{name}={value}"
        for name, (value, default) in values.items()
        if value != default and name not in ("dtype", "wide")
    )


def _specs(name: str) -> Any:
    return importlib.import_module(f"seqlab.kernels.{name}.specs")
