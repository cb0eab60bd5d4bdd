"""Device times: loops of calls inside one program, contestants in turn, and the machine's ceilings."""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

LEAST = 0.1  # seconds per measurement: dispatching a program takes less than a thousandth of it
LONG = 1.0  # calls longer than this are timed singly
CALLS = 3, 1000  # per measurement, minimum and maximum


class Program(NamedTuple):
    """A compiled call: its result, its compile time, and a function that measures the seconds of one call."""

    program: Callable[[Any], Any]
    result: Any
    compile_seconds: float
    measure: Callable[[], float]


class Ceilings(NamedTuple):
    """Measured ceilings of this machine: bytes per second of a copy, operations per second of a matrix
    product."""

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
    """The same for short calls: seconds per call of many.

    This is the smaller of two upper bounds. Calls in a loop of one program exclude Python, but values that
    XLA moves out of the loop must be kept in memory, which can cost more than it saves. Calls dispatched one
    after another include the host's time, if that is longer.
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
    """The number of calls of this duration per measurement."""
    return min(max(CALLS[0], math.ceil(LEAST / seconds)), CALLS[1])


def _looped(
    function: Callable[[Any], Any] | None, arguments: Any, results: Any, calls: int
) -> Callable[[Any], Any]:
    """A program of a number of dependent calls; with None, only its overhead.

    XLA computes loop-invariant values before the loop, even behind an optimization barrier. Therefore the
    first entry of every argument is rewritten before every call, plus a 0 computed from the last results;
    this is done in a separate loop, so that it is written in place and not fused.
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
    """Median seconds of each; they alternate, so that other load on the machine affects all of them."""
    times = [{name: measure() for name, measure in contestants.items()} for _ in range(rounds)]
    return {name: statistics.median(t[name] for t in times) for name in contestants}


def ceilings(dtype: Any, rounds: int) -> Ceilings:
    """The ceilings: a large copy, and a large matrix product of `dtype`, float32 at full precision."""
    cells, size = (2**25, 2048) if jax.default_backend() == "cpu" else (2**27, 8192)
    x, a = jnp.zeros((cells,), jnp.float32), jnp.ones((size, size), dtype)
    with jax.default_matmul_precision("highest"):
        programs = {"copy": repeated(lambda x: x + 1, x), "product": repeated(lambda a: a @ a, a)}
        times = race({name: program.measure for name, program in programs.items()}, rounds)
    return Ceilings(2 * x.nbytes / times["copy"], 2 * size**3 / times["product"])
