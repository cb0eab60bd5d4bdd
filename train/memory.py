"""Memory that ran out: which part of a run asked for it, and which fields of the config would ask for less."""

import contextlib
from collections.abc import Iterator

import jax
from flax import nnx

from seqlab.checks import UserError
from seqlab.module import count_params, split
from seqlab.train.experiment import Experiment


class OutOfMemoryError(UserError):
    """The devices, or this machine, have less memory than the run needs; the message says what to change."""


@contextlib.contextmanager
def explained(what: str, experiment: Experiment) -> Iterator[None]:
    """Within the block memory that runs out is an OutOfMemoryError, raised while doing `what`."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        reason = str(error).partition("\n")[0].strip()
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in reason:
            raise
        model = nnx.eval_shape(lambda: experiment.model(rngs=nnx.Rngs(0)))
        _, params = split(model)
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in params.values())
        raise OutOfMemoryError(
            f"out of memory while {what} ({reason[:200] or 'MemoryError'}). The model has "
            f"{count_params(model):,} parameters, {_readable(size)}; their gradients and the optimizer's state "
            f"take {_readable(3 * size)} more with Adam. What takes less: a smaller batch_size (now "
            f"{experiment.batch_size}) or more parts of it, accumulate (now {experiment.accumulate}); shorter "
            f"windows (data.length); a smaller model; more devices to share it, mesh.fsdp (now {experiment.mesh.fsdp})"
        ) from error


def _readable(size: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"
