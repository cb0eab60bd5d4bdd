"""Placement of a run on a mesh: its state is created with its shardings, and each batch is distributed by
rows and steps.

On one device nothing is done.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from seqlab.checks import UserError
from seqlab.kernels.attention.ring import use_layout
from seqlab.module import Params
from seqlab.parallel.sharding import AXES, BATCH, MeshSizes, param_shardings
from seqlab.train.step import TrainState


@contextlib.contextmanager
def spread(sizes: MeshSizes) -> Iterator[Mesh | None]:
    """Within the block computations run on a mesh of these `sizes`; None for a single device."""
    mesh = sizes.make()
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh), use_layout(sizes.layout):
        yield mesh


def state_shardings(state: TrainState, mesh: Mesh | None) -> TrainState | None:
    """Shardings of a (possibly abstract) state: parameters by their rules, the optimizer's state like its
    parameters."""
    if mesh is None:
        return None
    params, everywhere = param_shardings(state.params, mesh), NamedSharding(mesh, PartitionSpec())

    def beside(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = getattr(path[-1], "key", None) if path else None
        return params[name] if name in params and state.params[name].shape == leaf.shape else everywhere

    return TrainState(everywhere, params, jax.tree_util.tree_map_with_path(beside, state.optimizer))


def begin(
    make: Callable[..., TrainState], params: Params, mesh: Mesh | None
) -> tuple[TrainState, TrainState | None]:
    """The initial state `make(params)`, and its shardings."""
    if mesh is None:
        return make(params), None
    shardings = state_shardings(jax.eval_shape(make, params), mesh)
    return jax.jit(make, out_shardings=shardings)(params), shardings


def place(batch: dict[str, Any], mesh: Mesh | None) -> dict[str, Any]:
    """`batch`, this process's share of it, on the devices: rows over `data` and `fsdp`, time over `sequence`
    if it is divisible.

    Raises:
      ValueError: the rows cannot be divided equally.
    """
    if mesh is None:
        return batch
    shared = share(mesh)[1]

    def put(leaf: np.ndarray) -> jax.Array:
        rows, groups = len(leaf) * shared, _groups(mesh)
        if rows % groups:
            raise UserError(
                "batch_size (of each of the `accumulate` parts) must be a multiple of data * fsdp = "
                f"{groups}, got {rows}"
            )
        time = "sequence" if leaf.ndim > 1 and leaf.shape[1] % mesh.shape["sequence"] == 0 else None
        sharding = NamedSharding(mesh, PartitionSpec(BATCH, time) if leaf.ndim > 1 else PartitionSpec(BATCH))
        if jax.process_count() == 1:
            return jax.device_put(leaf, sharding)
        if shared == 1:  # every process has the whole batch and takes what is its own
            return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])
        return jax.make_array_from_process_local_data(sharding, leaf, (rows, *leaf.shape[1:]))

    return jax.tree.map(put, batch)


def share(mesh: Mesh | None) -> tuple[int, int]:
    """The part of every batch read by this process, and the number of parts: (0, 1) if a row is split over
    several processes."""
    index, count = jax.process_index(), jax.process_count()
    if mesh is None or count == 1:
        return index, count
    rows = np.moveaxis(mesh.devices, [AXES.index(name) for name in BATCH], range(len(BATCH))).reshape(
        -1, mesh.size // _groups(mesh)
    )
    owners = [{device.process_index for device in row} for row in rows]
    alone = all(len(owner) == 1 for owner in owners)
    return (index, count) if alone and len(rows) % count == 0 else (0, 1)


def _groups(mesh: Mesh) -> int:
    return mesh.shape["data"] * mesh.shape["fsdp"]
