"""Shared helpers of the Triton kernels: availability checks, and launching from JAX.

A kernel takes pointers to its inputs, then to its outputs, then constants by name. Everything else is a
constant, including sizes: XLA recompiles for other shapes anyway, and known sizes determine which masks are
needed. For an absent optional input any array is passed, and a constant marks it as unused.
"""

import inspect
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from seqlab.kernels.dispatch import vary_alike

_FLOATS = ("float32", "bfloat16", "float16")
_OLDEST = 8.0  # the compute capability of Ampere, the first with bfloat16 and TF32 products


def require(*arrays: Array | None) -> None:
    """Raise NotImplementedError with the reason if kernels cannot run on this machine, or not on these
    arrays."""
    available()
    for x in arrays:
        if x is None:
            continue
        if not all(isinstance(size, int) for size in x.shape):
            raise NotImplementedError(f"sizes must be known, got {x.shape}")
        if jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.name not in _FLOATS:
            raise NotImplementedError(f"kernels for {', '.join(_FLOATS)} exist, not for {x.dtype}")


def available() -> None:
    """Raise NotImplementedError with the reason if Triton kernels cannot run on this machine."""
    if jax.default_backend() != "gpu":
        raise NotImplementedError(f"needs a GPU; JAX runs on {jax.default_backend()} here")
    try:
        import jax_triton  # noqa: F401
    except Exception as error:  # its releases check Triton and JAX in different ways
        raise NotImplementedError(f"needs jax-triton, which does not import here: {error}") from error
    capability = getattr(jax.local_devices()[0], "compute_capability", None)
    try:
        old = float(capability) < _OLDEST
    except (TypeError, ValueError):
        raise NotImplementedError(f"needs an NVIDIA GPU, got {jax.local_devices()[0].device_kind}") from None
    if old:
        raise NotImplementedError(f"needs compute capability {_OLDEST} or newer, got {capability}")


def launch(
    kernel: Any,
    inputs: Sequence[Array],
    outputs: Sequence[tuple[tuple[int, ...], Any]],
    *,
    grid: tuple[int, ...],
    constants: dict[str, Any],
    warps: int = 4,
    stages: int = 2,
) -> tuple[Array, ...]:
    """Run `kernel(*inputs, *outputs, **constants)` on every program of `grid` and return the outputs, given
    as (shape, dtype)."""
    shapes = tuple(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in outputs)

    @jax.custom_batching.sequential_vmap
    def call(*arrays):
        return call_triton(kernel, arrays, shapes, grid, constants, warps, stages)

    return tuple(vary_alike(*call(*inputs), *inputs)[: len(shapes)])


def call_triton(
    kernel: Any,
    arrays: Sequence[Array],
    shapes: tuple[jax.ShapeDtypeStruct, ...],
    grid: tuple[int, ...],
    constants: dict[str, Any],
    warps: int,
    stages: int,
) -> tuple[Array, ...]:
    """The call by jax-triton, whose releases name the result shapes differently."""
    import jax_triton

    known = inspect.signature(jax_triton.triton_call).parameters
    options = {"out_type" if "out_type" in known else "out_shape": shapes, "kernel": kernel, "grid": grid}
    options |= {"num_warps": warps, "num_stages": stages}
    if "backend_options" in known:
        options["backend_options"] = {"enable_fp_fusion": True}  # no longer the default in Triton 3.10
    return tuple(jax_triton.triton_call(*arrays, **options, **constants))


def blocks(size: int, block: int) -> int:
    """The number of blocks that cover `size`."""
    return -(-size // block)


def power(size: int, least: int = 1) -> int:
    """The smallest power of two of at least `size` and `least`, as Triton's tiles require."""
    return max(least, 1 << math.ceil(math.log2(size))) if size > 1 else least
