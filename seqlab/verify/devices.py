"""Checks of clause C5 of the streaming contract: a sequence split over devices equals one device, for any
mixer or model, a user's own included.

print(seqlab.verify_devices(MyMixer(64, rngs=nnx.Rngs(0)), devices=8))

It needs as many devices. A machine without them offers virtual ones to a program that is started with
XLA_FLAGS=--xla_force_host_platform_device_count=8.
"""

import contextlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from seqlab.checks import UserError
from seqlab.mixer import Mixer, as_mixer
from seqlab.parallel.sharding import along_time, compiler_options, make_mesh
from seqlab.state import state_bytes
from seqlab.verify.report import BOUNDS, GRADIENT_SLACK, Check, Report, compare
from seqlab.verify.subject import Subject, projected, subject_of

_GATHER = re.compile(r"= \(?((?:f|bf)\d+\[[\d,]+\])[^=]*? all-gather(?:-start)?\(")


def verify_devices(
    mixer: Mixer,
    devices: int | Sequence[int] | None = None,
    *,
    inputs: Array | None = None,
    length: int = 29,
    batch: int = 3,
    dtype: str | None = None,
    gradients: bool = True,
    thorough: bool = True,
    bound: float | None = None,
    seed: int = 0,
) -> Report:
    """Check C5 on `mixer` with time split over `devices`, all that there are by default, and report; over
    several numbers of them, in turn.

    Compared with one device are outputs and gradients of the parallel form, on plain sequences and on packed
    and padded ones, and outputs and state of two chunks one after the other (chunked prefill). Whether in
    training devices come to hold the whole sequence is said
    too: that is correct, but neither fast nor small. Not `thorough`, only the packed parallel form is (the
      plain one of a mixer that is
    not causal). `inputs` and the rest as in `verify_streaming`; lengths need not divide.

    Raises:
      ValueError: fewer than two devices, or more than there are.
    """
    available = jax.devices()
    numbers = np.atleast_1d(len(available) if devices is None else devices).tolist()
    if not numbers or not all(2 <= number <= len(available) for number in numbers):
        raise UserError(
            f"devices must be at least 2 and at most the {len(available)} that there are, got {devices!r}"
        )
    meshes = [make_mesh(data=1, sequence=number, devices=available[:number]) for number in numbers]
    dtype = dtype or as_mixer(mixer).dtype or "float32"
    causal = as_mixer(mixer).causal
    with (
        jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext(),
        jax.default_matmul_precision("highest"),
    ):
        subject = subject_of(
            mixer, inputs, (batch, length), dtype, BOUNDS[dtype] if bound is None else bound, seed
        )
        flags, checks = _flags(subject.inputs.shape[:2], seed), []
        if thorough:
            checks += [_spread(subject, mesh) for mesh in meshes]
        if thorough or not causal:
            checks += _compared("plain", subject, meshes, _parallel(subject, gradients), None, None)
        if causal:
            checks += _compared("packed", subject, meshes, _parallel(subject, gradients), *flags)
        if thorough and causal:
            checks += _compared("packed, in two chunks", subject, meshes, _two_chunks(subject), *flags)
        size = state_bytes(mixer, 1, subject.inputs.dtype if subject.inputs.ndim == 3 else dtype)
    return Report(type(mixer).__name__, dtype, subject.inputs.shape[1], size, tuple(checks))


def _parallel(subject: Subject, gradients: bool) -> Callable[..., dict[str, Any]]:
    """Outputs of the training form and their gradients by parameters and, where they are real, inputs."""

    def forward(params, x, reset, valid):
        y, _ = subject.mixer(params)(along_time(x), None, reset, valid)
        return projected(y), y

    def both(params, x, reset, valid):
        wanted = (0, 1) if jnp.issubdtype(x.dtype, jnp.floating) else (0,)
        slopes, y = jax.grad(forward, wanted, has_aux=True)(params, x, reset, valid)
        return {"outputs": y, "gradients": slopes}

    return both if gradients else lambda *arguments: {"outputs": forward(*arguments)[1]}


def _two_chunks(subject: Subject) -> Callable[..., dict[str, Any]]:
    """Outputs and state where the second chunk goes on from the state of the first."""

    def chunks(params, x, reset, valid):
        model, state, outputs = subject.mixer(params), subject.state(len(x)), []
        cut = x.shape[1] // 2 + 1
        for here in (slice(0, cut), slice(cut, None)):
            y, state = model(along_time(x[:, here]), state, reset[:, here], valid[:, here])
            outputs.append(y)
        return {"outputs": jnp.concatenate(outputs, axis=1), "state": state}

    return chunks


def _compared(
    name: str,
    subject: Subject,
    meshes: list[Mesh],
    program: Callable[..., dict[str, Any]],
    *flags: Array | None,
) -> list[Check]:
    program = jax.jit(program, compiler_options=compiler_options(meshes[0]))
    arguments = (subject.params, subject.inputs, *flags)
    expected, slack, checks = program(*arguments), {"gradients": GRADIENT_SLACK}, []
    for mesh in meshes:
        with jax.set_mesh(mesh):
            actual = program(*arguments)
        for what, value in expected.items():
            label, bound = f"{mesh.size} devices, {name}: {what}", subject.bound * slack.get(what, 1.0)
            checks.append(compare("C5", label, actual[what], value, bound))
    return checks


def _spread(subject: Subject, mesh: Mesh) -> Check:
    """Check that a training step on time-sharded inputs does not gather the sequence."""
    x = subject.inputs
    shape = (len(x), x.shape[1] + -x.shape[1] % mesh.size, *x.shape[2:])
    x = jax.ShapeDtypeStruct(shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec(None, "sequence")))
    with jax.set_mesh(mesh):
        program = jax.jit(lambda *arguments: _parallel(subject, True)(*arguments)["gradients"][0])
        found = gathers(program.lower(subject.params, x, None, None).compile().as_text(), shape[1])
    return Check(
        "C5",
        f"{mesh.size} devices, none holds the whole sequence",
        None if found else True,
        note=", ".join(found[:3]),
    )


def gathers(program: str, time: int) -> list[str]:
    """The arrays of numbers in a compiled program that are collected from all devices and have `time` as an
    axis: shapes, each once."""
    return sorted(
        {
            shape
            for shape in _GATHER.findall(program)
            if str(time) in re.findall(r"\d+", shape.partition("[")[2])
        }
    )


def _flags(shape: tuple[int, int], seed: int) -> tuple[Array, Array]:
    """Documents that begin anywhere, steps that are missing anywhere, and a row whose end is padding."""
    rng = np.random.default_rng(seed)
    reset, valid = rng.random(shape) < 0.1, rng.random(shape) < 0.8
    valid[-1, shape[1] // 2 :] = False
    return jnp.asarray(reset), jnp.asarray(valid)
