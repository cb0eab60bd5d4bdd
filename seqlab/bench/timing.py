"""Time on the device: loops of calls inside of one program, contestants in turn, and what this machine can do
at most."""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

LEAST = 0.1  # seconds of one measurement: asking for a program takes less than a thousandth of it
LONG = 1.0  # seconds from which on a call is timed alone
CALLS = 3, 1000  # of one measurement, at least and at most


class Program(NamedTuple):
    """A compiled call: what it returned, how long compiling took, and what measures the seconds of one
    call."""

    program: Callable[[Any], Any]
    result: Any
    compile_seconds: float
    measure: Callable[[], float]


class Ceilings(NamedTuple):
    """What this machine has reached: bytes a second of a copy, operations a second of a product of
    matrices."""

    bytes: float
    flops: float


def compiled(function: Callable[[Any], Any], arguments: Any) -> Program:
    """`function(arguments)`, compiled and called."""
    begin = time.perf_counter()
    program = jax.jit(function).lower(arguments).compile()
    seconds = time.perf_counter() - begin
    return Program(
        program, jax.block_until_ready(program(arguments)), seconds, lambda: _seconds(program, arguments)
    )


def repeated(function: Callable[[Any], Any], arguments: Any) -> Program:
    """The same for calls that take little time: the seconds are those of one of many.

    They are the less of two upper bounds. Calls in a loop of one program leave Python out, but what XLA moves
    out of a loop it has to keep in memory, which can cost more than it saves. Calls that are asked for one
    after another cost the host's time, if that is more.
    """
    once = compiled(function, arguments)
    seconds = min(once.measure() for _ in range(2))
    if seconds > LONG:
        return once
    calls = calls_of(seconds)
    loop, idle = (_looped(body, arguments, once.result, calls) for body in (function, None))

    def launched(arguments):
        for _ in range(calls - 1):
            once.program(arguments)
        return once.program(arguments)

    def measure():
        inside = _seconds(loop, arguments) - _seconds(idle, arguments)
        return min(max(inside, 0.0) or math.inf, _seconds(launched, arguments)) / calls

    return once._replace(measure=measure)


def calls_of(seconds: float) -> int:
    """How many calls of so many seconds make a measurement."""
    return min(max(CALLS[0], math.ceil(LEAST / seconds)), CALLS[1])


def _looped(
    function: Callable[[Any], Any] | None, arguments: Any, results: Any, calls: int
) -> Callable[[Any], Any]:
    """A program of so many calls, each after the one before; with None what that costs beside the calls.

    What stays the same in a loop XLA computes before it, behind an optimization barrier too. So the first
    number of every argument is
    written anew before every call, plus a 0 that is made of a number of the last results: in a loop of its
    own, since what is written there is written in place, and fused with nothing.
    """

    def corner(x):
        return jax.lax.slice(x, (0,) * x.ndim, (1,) * x.ndim)

    def run(arguments):
        own = jax.tree.map(corner, arguments)

        def body(_, carry):
            arguments, last, zero = carry

            def write(_, arguments):
                numbers = jax.tree.map(
                    lambda x: x | (zero != 0) if x.dtype == bool else x + zero.astype(x.dtype), own
                )
                return jax.tree.map(
                    lambda x, number: jax.lax.dynamic_update_slice(x, number, (0,) * x.ndim),
                    arguments,
                    numbers,
                )

            arguments = jax.lax.fori_loop(0, 2, write, arguments)
            last = last if function is None else function(arguments)
            number = corner(jax.tree.leaves(last)[0]).reshape(()).astype(jnp.float32)
            return arguments, last, jnp.nan_to_num(number) * 0.0

        return jax.lax.fori_loop(0, calls, body, (arguments, results, jnp.zeros(())))[1]

    program = jax.jit(run).lower(arguments).compile()
    jax.block_until_ready(program(arguments))
    return program


def _seconds(program: Callable[[Any], Any], arguments: Any) -> float:
    begin = time.perf_counter()
    jax.block_until_ready(program(arguments))
    return time.perf_counter() - begin


def race(contestants: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Median seconds of each; they take turns, so that what else the machine does meets all of them."""
    times = [{name: measure() for name, measure in contestants.items()} for _ in range(rounds)]
    return {name: statistics.median(t[name] for t in times) for name in contestants}


def ceilings(dtype: Any, rounds: int) -> Ceilings:
    """Of a large copy, and of a large product of matrices of `dtype`, float32 with all its digits."""
    cells, size = (2**25, 2048) if jax.default_backend() == "cpu" else (2**27, 8192)
    x, a = jnp.zeros((cells,), jnp.float32), jnp.ones((size, size), dtype)
    with jax.default_matmul_precision("highest"):
        programs = {"copy": repeated(lambda x: x + 1, x), "product": repeated(lambda a: a @ a, a)}
        times = race({name: program.measure for name, program in programs.items()}, rounds)
    return Ceilings(2 * x.nbytes / times["copy"], 2 * size**3 / times["product"])
