"""The training step, a pure function compiled by the loop."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from seqlab.module import Params, Static, merge, split, statistics_of
from seqlab.parallel.sequence_parallel import parts
from seqlab.parallel.sharding import along_batch
from seqlab.shapes import Steps
from seqlab.train.optim import global_norm

Batch = dict[str, Array]
# (model, batch) -> sum over targets, number of targets.
Loss = Callable[[Any, Batch], tuple[Float[Array, ""], Float[Array, ""]]]

_LOGITS = 1 << 24  # so many at a time: 64 MiB


class TrainState(NamedTuple):
    """Everything that a step reads and writes. `step` counts the updates made; the data position is the same
    number."""

    step: Int[Array, ""]
    params: Params
    optimizer: Any


class StepMetrics(NamedTuple):
    """`loss`: mean over the targets, nats. `norm`: of the gradient before clipping. `finite`: False where the
    update was not applied."""

    loss: Float[Array, ""]
    norm: Float[Array, ""]
    finite: Array


def next_token_loss(model: Any, batch: Batch) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Cross entropy in nats, summed over the valid targets, and their number. Documents of a packed row are
    independent.

    For a model with `features` and `read_out`, the logits of a long sequence are never materialised at once
    (see `cross_entropy`).
    """
    inputs, flags = batch["inputs"], (None, batch.get("reset"), None)
    if hasattr(model, "features") and hasattr(model, "read_out"):
        return cross_entropy(
            model.read_out, model.features(inputs, *flags)[0], batch["targets"], batch["valid"]
        )
    keep = batch["valid"].astype(jnp.float32)
    return _nats(model(inputs, *flags)[0], batch["targets"], keep), jnp.sum(keep)


def cross_entropy(
    read_out: Callable[[Array], Array],
    x: Float[Array, "b t d"],
    targets: Int[Array, "b t"],
    valid: Steps,
    most: int = _LOGITS,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """-log softmax(read_out(x))[target], summed over the valid steps, and their number.

    With more than `most` logits per device, they are computed in chunks of steps, and recomputed for the
    gradient.
    """
    (b, t), devices = targets.shape, parts(targets.shape[1])
    stretch = -(-t // devices)
    needed = -(-b * stretch * jax.eval_shape(read_out, x).shape[-1] // most)
    keep = valid.astype(jnp.float32)

    if needed <= 1:
        return _nats(read_out(x), targets, keep), jnp.sum(keep)
    chunks = next((n for n in range(needed, 2 * needed) if stretch % n == 0), min(needed, stretch))
    size = -(-stretch // chunks)

    def cut(leaf: Array) -> Array:
        """[chunks, b, devices, size, ...]: every device works on its own steps."""
        leaf = jnp.pad(leaf, ((0, 0), (0, devices * chunks * size - t), *((0, 0),) * (leaf.ndim - 2)))
        return jnp.moveaxis(leaf.reshape(b, devices, chunks, size, *leaf.shape[2:]), 2, 0)

    @jax.checkpoint
    def add(total: Array, chunk: tuple[Array, ...]) -> tuple[Array, None]:
        x, targets, keep = chunk
        return total + _nats(read_out(x), targets, keep), None

    total, _ = jax.lax.scan(add, jnp.zeros(()), tuple(map(cut, (x, targets, keep))))
    return total, jnp.sum(keep)


def _nats(logits: Array, targets: Array, keep: Array) -> Array:
    logits = logits.astype(jnp.float32)
    target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.sum((jax.nn.logsumexp(logits, axis=-1) - target) * keep)


def init_state(static: Static, params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    learnt, _ = _parted(static, params)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(learnt))


def train_step(
    static: Static,
    optimizer: optax.GradientTransformation,
    loss: Loss,
    accumulate: int,
    state: TrainState,
    batch: Batch,
) -> tuple[TrainState, StepMetrics]:
    """One update from one global batch, in `accumulate` parts whose gradients sum to that of the whole.

    A batch with a non-finite loss or gradient is reported and changes nothing. Running statistics (BatchNorm)
    are updated part by part.
    """
    learnt, statistics = _parted(static, state.params)

    def objective(learnt: Params, statistics: Params, part: Batch) -> tuple[Array, tuple[Array, Params]]:
        model = merge(static, learnt | statistics)
        if statistics:
            model.train()
        total, count = loss(model, part)
        return total, (count, _parted(static, split(model)[1])[1] if statistics else {})

    gradient = jax.value_and_grad(objective, has_aux=True)
    if accumulate == 1:
        (total, (count, statistics)), grads = gradient(learnt, statistics, batch)
    else:
        parts = jax.tree.map(lambda leaf: leaf.reshape(accumulate, -1, *leaf.shape[1:]), batch)
        zero = (jnp.zeros(()), jnp.zeros(()), jax.tree.map(jnp.zeros_like, learnt))

        def add(carry, part):
            sums, statistics = carry
            part = jax.tree.map(along_batch, part)
            (total, (count, statistics)), grads = gradient(learnt, statistics, part)
            return (jax.tree.map(jnp.add, sums, (total, count, grads)), statistics), None

        ((total, count, grads), statistics), _ = jax.lax.scan(add, (zero, statistics), parts)
    count = jnp.maximum(count, 1.0)
    grads = jax.tree.map(lambda leaf: leaf / count, grads)
    norm = global_norm(grads)
    finite = jnp.isfinite(total) & jnp.isfinite(norm)
    updates, optimizer_state = optimizer.update(grads, state.optimizer, learnt)
    new = TrainState(state.step + 1, optax.apply_updates(learnt, updates) | statistics, optimizer_state)
    new = jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, state)
    return new, StepMetrics(total / count, norm, finite)


def _parted(static: Static, params: Params) -> tuple[Params, Params]:
    """Parameters updated by the optimizer, and running statistics."""
    measured = statistics_of(static)
    return {name: leaf for name, leaf in params.items() if name not in measured}, {
        name: params[name] for name in measured
    }


def all_finite(params: Params) -> Array:
    """Whether all parameters are finite numbers."""
    leaves = [leaf for leaf in params.values() if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))


def evaluate_step(static: Static, loss: Loss, params: Params, batch: Batch) -> tuple[Array, Array]:
    """Loss summed over the valid targets of a batch, and their number."""
    return loss(merge(static, params), batch)
