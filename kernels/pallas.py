"""What the Pallas kernels for TPUs share: where they run, how they are called, how they multiply.

A kernel is compiled where JAX's default platform is a TPU. Elsewhere it declines, except inside one of two
blocks:

    with interpreted():     its steps are simulated on the CPU, memory that nobody wrote holds NaN and reads
    out of bounds raise
    with lowering():        it is lowered for a TPU that is not here, as `jax.export(..., platforms=["tpu"])`
    and AOT compilation need it

Every array has its time padded to whole tiles by the caller, or its kernel masks the steps behind the end:
what lies there is undefined.
Index maps count blocks, an axis each, so that no product of extents is ever computed: arrays may have more
than 2**31 elements.
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

# InterpretParams, or "lower"; jax.jit takes it into the keys of its caches.
_mode = jax.make_user_context(default_value=None)


@contextlib.contextmanager
def interpreted(params: pltpu.InterpretParams | None = None) -> Iterator[None]:
    """Within the block `implementation="pallas_tpu"` is interpreted on the CPU: slow, and stricter than a
    TPU."""
    with _mode(pltpu.InterpretParams() if params is None else params):
        yield


@contextlib.contextmanager
def lowering() -> Iterator[None]:
    """Within the block `implementation="pallas_tpu"` is traced for a TPU, whatever the platform; it cannot be
    run here."""
    with _mode("lower"):
        yield


def require(*arrays: Array | None) -> None:
    """Decline where no TPU runs the kernel, or where it could not compute what the arrays ask for."""
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
    """One kernel over a grid whose first `parallel` axes are independent of each other; the others are walked
    in order, the last fastest.

    `out` has shape and dtype of every result. `tables` are small arrays of integers that every index map gets
    after the block's indices, and the kernel before everything else. Inside shard_map results vary over the
    mesh axes over which any array does.
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


# Of the 128 MiB of vector memory that TPUs have had since v5; the compiler's own limit is 16
_MEMORY = 64 * 2**20


def vector(shape: tuple[int, ...], dtype: Any = jnp.float32) -> Any:
    """Scratch memory in the vector units' reach."""
    return pltpu.VMEM(shape, dtype)


def dot(x: Array, y: Array, *, transposed: bool = False) -> Array:
    """x [a, c] times y [c, b], or `transposed` times y [b, c], in float32: exactly enough for the dtype of
    the arguments.

    float32 arguments keep their digits (six passes of the bfloat16 unit), bfloat16 ones are products of one
    pass.
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
    """The least multiple of `multiple` that is not less than `size`."""
    return -(-size // multiple) * multiple


def block(size: int, most: int) -> int:
    """The extent of a block of an axis: all of it where it is short, for an extent need not fill a tile if it
    is the array's."""
    return size if size <= most else most


def places(shape: tuple[int, ...], axis: int) -> Array:
    """The index along one axis, as an array."""
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)
