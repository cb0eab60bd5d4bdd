"""Shardings: a mesh of four axes, and rules from parameter names to placements. On one device everything is a
no-op.

    data      rows of the batch                     fsdp      rows of the batch, and split parameters tensor
    heads and hidden channels             sequence  time

Rules are plain data: the first regular expression that matches a parameter's name determines the split of its
axes. Axes are `Auto`, so XLA propagates placements to everything else.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from seqlab.checks import UserError
from seqlab.module import Params
from seqlab.parallel.sequence_parallel import AXIS, parts

AXES = ("data", "fsdp", "tensor", "sequence")
BATCH = ("data", "fsdp")

Rules = Sequence[tuple[str, tuple[str | None, ...]]]

# Matrices are [in, out]: those that read the residual stream split their outputs over `tensor`, those that
# write it split their inputs.
RULES: Rules = (
    (r"embedding\.weight$", ("tensor", "fsdp")),
    (r"(down|out|out_proj|dt_proj)\.weight$", ("tensor", "fsdp")),
    (r"channel_mixer\.gate_up$", ("fsdp", "tensor")),  # of experts
    (r"channel_mixer\.down$", ("tensor", "fsdp")),
    (r"\.weight$", ("fsdp", "tensor")),
)


@dataclasses.dataclass(frozen=True)
class MeshSizes:
    """The device mesh of a run: the size of every axis, -1 for all remaining devices.

    Args:
      data, fsdp: rows of the batch; `fsdp` splits the parameters too.
      tensor: heads and hidden channels.
      sequence: time.
      layout: how attention distributes positions over `sequence`: "contiguous", or "zigzag" or "striped" for
        equal work under a causal mask.
    Raises:
      ValueError: a size that is neither positive nor -1.
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    sequence: int = 1
    layout: str = "contiguous"

    def __post_init__(self) -> None:
        for name in AXES:
            size = getattr(self, name)
            if isinstance(size, bool) or not isinstance(size, int) or (size < 1 and size != -1):
                raise UserError(f"{name} must be positive, or -1 for what is left, got {size!r}")

    def make(self) -> Mesh | None:
        """The mesh; None for one device. In a single process, unneeded devices stay idle."""
        sizes = {name: getattr(self, name) for name in AXES}
        devices, known = jax.devices(), math.prod(size for size in sizes.values() if size != -1)
        if -1 not in sizes.values() and jax.process_count() == 1:
            if known > len(devices):
                raise UserError(
                    f"a mesh of {sizes} needs {known} devices, and there are {len(devices)}"
                    " (a CPU passes for several under "
                    f"XLA_FLAGS=--xla_force_host_platform_device_count={known})"
                )
            devices = devices[:known]
        return make_mesh(**sizes, devices=devices)


def make_mesh(
    *, data: int = -1, fsdp: int = 1, tensor: int = 1, sequence: int = 1, devices: Sequence[Any] | None = None
) -> Mesh | None:
    """A mesh of these sizes; one of them may be -1, for all remaining devices. None for a single device.

    Raises:
      ValueError: if the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor, "sequence": sequence}
    known = 1
    for name, size in sizes.items():
        if size != -1 and size < 1:
            raise UserError(f"{name} must be positive, or -1 for what is left, got {size}")
        known *= 1 if size == -1 else size
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise UserError(f"only one of {', '.join(free)} can be -1")
    if len(devices) % known or (not free and known != len(devices)):
        raise UserError(f"a mesh of {sizes} does not fit {len(devices)} devices")
    if free:
        sizes[free[0]] = len(devices) // known
    if len(devices) == 1:
        return None
    return jax.make_mesh(
        tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
    )


def compiler_options(mesh: Mesh | None) -> dict[str, bool] | None:
    """Compiler options of `jax.jit` and `compile` for a program on `mesh`.

    On a CPU XLA may run independent loops concurrently, and seems to mix up their messages if both send some
    (jaxlib 0.10: wrong numbers, or a failed check of `rendezvous.h`). The options make them run in order.
    """
    if mesh is None or mesh.devices.flat[0].platform != "cpu":
        return None
    return {"xla_cpu_enable_concurrency_optimized_scheduler": False}


def param_shardings(
    params: Params, mesh: Mesh | None, rules: Rules = RULES
) -> dict[str, NamedSharding] | None:
    """The placement of every parameter, by the first rule that matches its name; replicated if none does or a
    size is not divisible.

    `params` may be abstract. None without a mesh.
    """
    if mesh is None:
        return None
    return {name: NamedSharding(mesh, _spec(name, leaf.shape, mesh, rules)) for name, leaf in params.items()}


def _spec(name: str, shape: tuple[int, ...], mesh: Mesh, rules: Rules) -> PartitionSpec:
    for pattern, axes in rules:
        if re.search(pattern, name) and len(shape) >= len(axes):
            # Layers stacked for a scan have one more leading axis, which is not sharded.
            axes = (None,) * (len(shape) - len(axes)) + tuple(axes)
            return PartitionSpec(
                *(
                    axis if axis and size % mesh.shape[axis] == 0 else None
                    for axis, size in zip(axes, shape, strict=True)
                )
            )
    return PartitionSpec()


def constrain(x: Array, *axes: str | tuple[str, ...] | None) -> Array:
    """Constrain the placement of `x`: one mesh axis, several or None per axis of the array. Outside a mesh
    (`jax.set_mesh`) it does nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not set(AXES) >= set(mesh.axis_names):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))


def along_time(x: Array) -> Array:
    """Constrain the placement of activations [b, t, ...]: rows over the batch axes, time over `sequence`.

    It does nothing if time is not split.
    """
    return x if parts(x.shape[1]) == 1 else along_batch(x)


def along_batch(x: Array) -> Array:
    """The same for any batch [b, ...] or [b, t, ...], and for shorter times. It does nothing outside a
    mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    rows = tuple(name for name in BATCH if name in mesh.axis_names)
    time = (AXIS,) if x.ndim > 1 and parts(x.shape[1]) > 1 else ()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, PartitionSpec(rows or None, *time))
