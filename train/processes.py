"""Runs with several processes, usually one per machine: connecting, work of the first process, loss of a
process.

    one machine       seqlab train CONFIG --set mesh.data=-1 --distributed 127.0.0.1:9876,2,0
                      the same with ,2,1 in another shell
    SLURM, TPU pods   srun seqlab train CONFIG --set mesh.data=-1 --distributed

All processes run the same command on the same shared run folder; each reads its own rows of every batch.
"""

import contextlib
import itertools
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from seqlab.checks import UserError

_PATIENCE = 20.0  # seconds of waiting for others before a message
_barriers = itertools.count()  # all processes come to the same ones in the same order


def join(spec: str) -> None:
    """Connect to the other processes of the run: "auto", or "HOST:PORT,COUNT,INDEX" where HOST is the machine
    of process 0.

    Must be called before devices are used. Raises ValueError for an invalid `spec`, and if the processes do
    not connect.
    """
    if spec == "auto":
        try:
            jax.distributed.initialize()
        except (ValueError, RuntimeError) as error:  # no cluster that JAX knows; devices already in use
            raise UserError(
                f"distributed: this is no cluster that tells who is who ({_line(error)}): say "
                "HOST:PORT,COUNT,INDEX"
            ) from error
        return
    found = re.fullmatch(r"(\S+:\d+),(\d+),(\d+)", spec)
    if not found or not int(found[3]) < int(found[2]):
        raise UserError(
            f"distributed: got {spec!r}, expected HOST:PORT,COUNT,INDEX with INDEX from 0 to COUNT - 1, or "
            "nothing"
        )
    address, count, index = found[1], int(found[2]), int(found[3])
    with _patience(f"{count} processes to meet at {address}"):
        try:
            jax.distributed.initialize(address, count, index, heartbeat_timeout_seconds=30)
        # The address is in use or unreachable, or other processes are missing.
        except (ValueError, RuntimeError) as error:
            raise UserError(
                f"distributed: {count} processes did not meet at {address} ({_line(error)})"
            ) from error


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).partition("\n")[0]


def first() -> bool:
    """Whether this is the process that writes files and messages."""
    return jax.process_index() == 0


def say(line: str) -> None:
    """Print a line to stderr, from the first process only."""
    if first():
        print_error(line)


def print_error(line: str) -> None:
    """Print a line to stderr, if it still exists: a lost terminal must not end a run."""
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


def barrier(what: str) -> None:
    """Wait for all processes, without a time limit of minutes.

    It uses the coordinator: on CPUs a first collective times out after 30 seconds, and some processes compile
    longer.
    """
    if jax.process_count() > 1:
        from jax._src import distributed

        with _patience(what):
            distributed.global_state.client.wait_at_barrier(f"seqlab {next(_barriers)}: {what}", 3_600_000)


def first_then_others(function: Callable[[], None], what: str) -> None:
    """`function()` in the first process, and when it is done in the others."""
    if first():
        function()
    barrier(what)
    if not first():
        function()


def first_decides(function: Callable[[], None], what: str) -> None:
    """`function()` in the first process alone; a UserError that it raises is raised in all of them."""
    if jax.process_count() == 1:
        function()
        return
    from jax._src import distributed

    client, key = distributed.global_state.client, f"seqlab {next(_barriers)}: {what}"
    if first():
        try:
            function()
        except (UserError, OSError) as error:
            client.key_value_set(key, str(error))
            raise
        client.key_value_set(key, "")
        return
    with _patience(what):
        refusal = client.blocking_key_value_get(key, 3_600_000)
    if refusal:
        raise UserError(refusal)


def anywhere(flag: bool) -> bool:
    """Whether `flag` is true in any process; all must call it."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


@contextlib.contextmanager
def together(saved: Callable[[], list[int]]) -> Iterator[None]:
    """Within the block the loss of another process ends this one, with exit code 4 and the last of the steps
    that are `saved`.

    Immediately: an orderly shutdown, which closes checkpoint files and disconnects, would wait for the lost
    process.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1 or "RESOURCE_EXHAUSTED" in str(error):
            raise
        steps = saved()
        good = f"the last checkpoint is step {steps[-1]}" if steps else "there is no checkpoint yet"
        print(
            f"seqlab train: error: process {jax.process_index()} of {jax.process_count()} has lost another "
            "one: "
            f"{str(error).splitlines()[0]}\n"
            f"{good}; the same command goes on from there, on as many processes as there are",
            file=sys.stderr,
            flush=True,
        )
        os._exit(4)


@contextlib.contextmanager
def _patience(what: str) -> Iterator[None]:
    """Print what is waited for if the block takes long."""

    def complain() -> None:
        who = f"process {jax.process_index()}" if jax.distributed.is_initialized() else "this process"
        print(f"{who} has waited {_PATIENCE:.0f} s for the others: {what}", file=sys.stderr, flush=True)

    timer = threading.Timer(_PATIENCE, complain)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class Silent:
    """Placeholder for objects of the first process, such as metrics files and progress bars: accepts every
    call and does nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments, **keywords: None

    def __enter__(self) -> "Silent":
        return self

    def __exit__(self, *exception: Any) -> None:
        pass
