"""Shared helpers of the Pallas kernels for TPUs: where they run, how they are called, how they multiply.

A kernel is compiled where JAX's default platform is a TPU. Elsewhere it declines, except inside one of two
blocks:

    with interpreted():     simulated on the CPU; unwritten memory holds NaN, and reads out of bounds raise
    with lowering():        lowered for an absent TPU, for `jax.export(..., platforms=["tpu"])` and AOT

The caller pads time to whole tiles, or the kernel masks the steps beyond the end, which are undefined. Index
maps count blocks per axis, so that no product of extents is computed: arrays may have more than 2**31
elements.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128  # the minor extent of a tile
ROWS = 16  # the other one, of bfloat16; float32 would do with 8

# InterpretParams, or "lower"; part of jax.jit's cache keys.
_mode = jax.make_user_context(default_value=None)


@contextlib.contextmanager
def interpreted(params: pltpu.InterpretParams | None = None) -> Iterator[None]:
    """Within the block `implementation="pallas_tpu"` is interpreted on the CPU: slow, and stricter than a
    TPU."""
    with _mode(pltpu.InterpretParams() if params is None else params):
        yield


@contextlib.contextmanager
def lowering() -> Iterator[None]:
    """Within the block `implementation="pallas_tpu"` is traced for a TPU on any platform; the result cannot
    be run here."""
    with _mode("lower"):
        yield


def require(*arrays: Array | None) -> None:
    """Decline if there is no TPU, or if the kernel does not support the dtypes or sizes."""
    if _mode.value is None and jax.default_backend() != "tpu":
        raise NotImplementedError(f"compiled for TPUs, and the platform here is {jax.default_backend()}")
    for x in arrays:
        if x is None:
            continue
        if x.dtype not in (jnp.float32, jnp.bfloat16):
            raise NotImplementedError(f"takes float32 and bfloat16, which a TPU computes with, not {x.dtype}")
        if not all(isinstance(size, int) for size in x.shape):
            raise NotImplementedError(f"needs sizes that are known when it is compiled, got {x.shape}")


def call(
    kernel: Callable[..., None],
    arrays: Sequence[Array],
    out: Sequence[tuple[tuple[int, ...], Any]],
    *,
    grid: tuple[int, ...],
    in_specs: Sequence[pl.BlockSpec],
    out_specs: Sequence[pl.BlockSpec],
    scratch: Sequence[Any] = (),
    parallel: int,
    tables: Sequence[Array] = (),
) -> list[Array]:
    """One kernel over a grid whose first `parallel` axes are independent of each other; the others are
    processed in order, the last fastest.

    `out` has the shape and dtype of every result. `tables` are small integer arrays, passed to every index
    map after the block's indices and to the kernel first. Inside shard_map results vary over the mesh axes of
    any argument.
    """
    varies = max((jax.typeof(x).manual_axis_type for x in arrays), key=lambda kind: len(kind.varying))
    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(tables),
        grid=grid,
        in_specs=list(in_specs),
        out_specs=list(out_specs),
        scratch_shapes=list(scratch),
    )
    run = pl.pallas_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=varies) for shape, dtype in out],
        grid_spec=spec,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * parallel + ("arbitrary",) * (len(grid) - parallel),
            vmem_limit_bytes=_MEMORY,
        ),
        interpret=_mode.value if isinstance(_mode.value, pltpu.InterpretParams) else False,
    )
    return run(*tables, *arrays)


# TPUs since v5 have 128 MiB of vector memory; the compiler's default limit is 16 MiB.
_MEMORY = 64 * 2**20


def vector(shape: tuple[int, ...], dtype: Any = jnp.float32) -> Any:
    """Scratch in vector memory."""
    return pltpu.VMEM(shape, dtype)


def dot(x: Array, y: Array, *, transposed: bool = False) -> Array:
    """x [a, c] times y [c, b], or `transposed` times y [b, c], in float32, with the precision of the
    arguments.

    float32 arguments take six passes of the bfloat16 unit, bfloat16 arguments one.
    """
    dtype = jnp.promote_types(x.dtype, y.dtype)
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dims = (((1,), (1 if transposed else 0,)), ((), ()))
    return jax.lax.dot_general(
        x.astype(dtype), y.astype(dtype), dims, precision=precision, preferred_element_type=jnp.float32
    )


def column(row: Array) -> Array:
    """[1, a] -> [a, 1], by the transpose of whole tiles: a is a multiple of `LANES`."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T[:, :1]


def row(column: Array) -> Array:
    """[a, 1] -> [1, a]."""
    return jnp.broadcast_to(column, (column.shape[0], LANES)).T[:1]


def up(size: int, multiple: int) -> int:
    """`size` rounded up to a multiple of `multiple`."""
    return -(-size // multiple) * multiple


def block(size: int, most: int) -> int:
    """The extent of a block of an axis: the whole axis if it is short, since a full extent need not fill a
    tile."""
    return size if size <= most else most


def places(shape: tuple[int, ...], axis: int) -> Array:
    """The index along one axis, as an array."""
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)
