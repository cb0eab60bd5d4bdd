"""Out-of-memory errors: the part of a run that failed, and config fields that reduce memory."""

import contextlib
from collections.abc import Iterator

import jax
from flax import nnx

from seqlab.checks import UserError
from seqlab.module import count_params, split
from seqlab.train.experiment import Experiment


class OutOfMemoryError(UserError):
    """The devices or the host have too little memory; the message says what to change."""


@contextlib.contextmanager
def explained(what: str, experiment: Experiment) -> Iterator[None]:
    """Within the block, running out of memory raises OutOfMemoryError that names `what` was being done."""
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
            f"{count_params(model):,} parameters, {_readable(size)}; their gradients and the optimizer's "
            f"state take {_readable(3 * size)} more with Adam. To reduce it: a smaller batch_size (now "
            f"{experiment.batch_size}) or more parts of it, accumulate (now {experiment.accumulate}); "
            "shorter windows (data.length); a smaller model; more devices, mesh.fsdp (now "
            f"{experiment.mesh.fsdp})"
        ) from error


def _readable(size: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"
