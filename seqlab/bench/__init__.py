"""Benchmarks of the ops on this machine, after verification: `seqlab bench`.

Each case is first verified on the inputs that are timed: values and gradients against the definition in
float64. Incorrect implementations are not timed. The contestants are then timed in turn; times are device
times, also given as shares of a large copy and a large matrix product measured in the same run. `timing`
measures, `cases` has the calls, `peers` the alternatives.
"""

import contextlib
import json
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from seqlab import __version__
from seqlab.bench import cases, peers, timing
from seqlab.bench.cases import Case
from seqlab.checks import UserError, check_choice
from seqlab.kernels.blocks import device
from seqlab.studies import report

_ROUGH = 0.05  # a peer that differs by more computes something else


class BenchError(UserError):
    """A user error."""


class Plan(NamedTuple):
    """The cases, and the implementations to compare in each; the first is the baseline."""

    cases: list[Case]
    contestants: list[list[str]]
    left_out: list[dict[str, str]]
    interpret: bool


class Result(NamedTuple):
    """One contestant in one case. Without `seconds` it is incorrect or interpreted; a peer has no error
    bound."""

    name: str
    error: float | None
    wrong: str
    seconds: float | None = None
    compile_seconds: float | None = None


class Outcome(NamedTuple):
    """A case with all its results, and the ceilings of its dtype."""

    case: Case
    truth: str
    results: list[Result]
    left_out: dict[str, str]
    ceilings: timing.Ceilings | None


def plan(
    op: str,
    implementations: Iterable[str] = (),
    shape: Iterable[str] = (),
    dtype: str | None = None,
    backward: bool = False,
    interpret: bool = False,
) -> Plan:
    """The plan of a benchmark. Raises BenchError or ValueError for an invalid one, before anything is
    computed.

    Args:
      op: a name of `seqlab.kernels`.
      implementations: by name; by default all that run here, and `reference` only on a CPU.
      shape: names of the op's `specs`, and changes of their fields such as "t=512".
      dtype: of the arrays; by default that of the shape.
      backward: gradients too.
      interpret: simulate the TPU kernels on this machine, to verify them without times.
    """
    chosen = cases.op_named(op)
    for name in implementations:
        check_choice(name, chosen.implementations, f"implementation of {op}")
    if dtype is not None:
        check_choice(dtype, ("float32", "bfloat16", "float16"), "dtype")
    if backward and not cases.has_gradients(op):
        raise BenchError(f"{op} has no gradient: leave out --backward")
    kinds = (False, True) if backward else (False,)
    shape = list(shape)
    specs = cases.chosen_shapes(chosen, shape)
    try:
        made = [cases.make(chosen, name, spec, dtype, g) for name, spec in specs.items() for g in kinds]
        found = [_contestants(case, list(implementations), interpret) for case in made]
    except (BenchError, OSError):
        raise
    except Exception as error:  # JAX or NumPy reject sizes in different ways
        changes = [word for word in shape if "=" in word]
        if not changes:
            raise
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise BenchError(f"--shape {' '.join(changes)}: {op} has no such shape ({reason:.200})") from error
    for case in made:
        empty = [name for name, x in case.arguments.items() if any(y.size == 0 for y in jax.tree.leaves(x))]
        if empty:
            raise BenchError(f"{case.title}: {empty[0]} is empty, there is nothing to time")
    competing, absent = zip(*found, strict=True)
    return Plan(made, list(competing), list(absent), interpret)


def _contestants(case: Case, named: list[str], interpret: bool) -> tuple[list[str], dict[str, str]]:
    """The contestants, and why other implementations are excluded."""
    found, absent = [], {}
    for name in named or _by_default(case, interpret):
        with _interpreted(interpret and name == "pallas_tpu"):
            try:
                jax.eval_shape(case.timed(name), (case.arguments, case.cotangents()))
            except NotImplementedError as reason:
                if named:
                    advice = (
                        "; pytest tests/test_triton.py interprets it"
                        if name == "triton_gpu"
                        else "; --interpret simulates it"
                    )
                    raise BenchError(f"{case.op.name} {name} does not run here: {reason}{advice}") from None
                absent[name] = str(reason)
                continue
        if name == "reference" and not named and not case.dense:
            absent[name] = "it would take too much memory; --impl reference insists"
            continue
        found.append(name)
    return found, absent


def _by_default(case: Case, interpret: bool) -> list[str]:
    kernels = [name for name in case.op.implementations if name not in ("reference", "xla")]
    return [
        *(["pallas_tpu"] if interpret else kernels),
        "xla",
        *["reference"] * (jax.default_backend() == "cpu"),
    ]


@contextlib.contextmanager
def _interpreted(wanted: bool) -> Iterator[None]:
    if not wanted:
        yield
        return
    from seqlab.kernels import pallas

    with pallas.interpreted():
        yield


def run(planned: Plan, rounds: int = 5) -> Iterator[Outcome]:
    """The outcome of every case, one after another."""
    most: dict[str, timing.Ceilings] = {}
    for case, names, left_out in zip(*planned[:3], strict=True):
        if case.dtype not in most and not planned.interpret:
            most[case.dtype] = timing.ceilings(case.dtype, rounds)
        yield _compare(case, names, dict(left_out), rounds, most.get(case.dtype), planned.interpret)


def _compare(
    case: Case,
    names: list[str],
    left_out: dict[str, str],
    rounds: int,
    most: timing.Ceilings | None,
    interpret: bool,
) -> Outcome:
    source, expected = truth(case)
    cotangents, programs, results = case.cotangents(), {}, {}
    with jax.default_matmul_precision("highest" if case.dtype == "float32" else None):
        for name in names:
            with _interpreted(interpret and name == "pallas_tpu"):
                prepare = timing.compiled if interpret else timing.repeated
                program = prepare(case.timed(name), (case.arguments, cotangents))
            error, wrong = parity(case, program.result, expected)
            results[name] = Result(name, error, wrong, None, program.compile_seconds)
            if not wrong:
                programs[name] = program
        for name, make in {} if interpret else peers.of(case).items():
            program = _peer(case, make, cotangents, expected)
            if isinstance(program, str):
                left_out[name] = program
                continue
            programs[name], results[name] = program, Result(name, None, "", None, program.compile_seconds)
    if not interpret:
        times = timing.race({name: program.measure for name, program in programs.items()}, rounds)
        results = {name: result._replace(seconds=times.get(name)) for name, result in results.items()}
    return Outcome(case, source, list(results.values()), left_out, most)


def _peer(case: Case, make: peers.Peer, cotangents: Any, expected: Any) -> timing.Program | str:
    """The program of a peer, or the reason why it is excluded."""
    try:
        program = make(case, cotangents)
    except Exception as error:  # a missing or unsuitable peer must not stop the benchmark
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    ours, theirs = (np.asarray(jax.tree.leaves(x)[0], np.float64) for x in (expected, program.result))
    error = distance(theirs, ours) if ours.shape == theirs.shape else np.inf
    return program if error <= _ROUGH else f"computes something else: its output differs by {error:.1e}"


def truth(case: Case) -> tuple[str, Any]:
    """The expected results in float64 from the same inputs: by the definition, or, if that needs too much
    memory, by `xla`, which the tests compare with the definition."""
    name = "reference" if case.dense else "xla"

    def wide(x):
        return np.asarray(x, np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x

    host = jax.devices("cpu")[0] if jax.default_backend() == "tpu" else None  # TPUs have no float64
    with jax.enable_x64(True), jax.default_device(host):
        inputs = jax.tree.map(wide, (case.arguments, case.cotangents()))
        return f"{name} in float64", jax.tree.map(np.asarray, jax.jit(case.timed(name))(inputs))


def parity(case: Case, found: Any, expected: Any) -> tuple[float, str]:
    """The largest error of values and gradients, relative to the largest entry of each array; and the
    location of an error above the bound."""
    worst, wrong = 0.0, ""
    parts = (
        zip(case.allowed, found, expected, strict=True)
        if case.gradients
        else [(case.allowed[0], found, expected)]
    )
    for allowed, actual, wanted in parts:
        pairs = zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(wanted), strict=True)
        for (path, a), e in pairs:
            error = distance(np.asarray(a, np.float64), e)
            worst = max(worst, error)
            if error > allowed and not wrong:
                what = jax.tree_util.keystr(path) or "the result"
                wrong = f"{what} differs by {error:.1e}, allowed {allowed:.1e}"
    return worst, wrong


def distance(a: np.ndarray, e: np.ndarray) -> float:
    """The largest error of `a`, relative to the largest expected entry; infinite if other entries are
    finite."""
    finite = np.isfinite(e)
    if not np.array_equal(finite, np.isfinite(a)):
        return np.inf
    a, e = np.where(finite, a, 0), np.where(finite, e, 0)
    return float(np.abs(a - e).max(initial=0.0) / max(np.abs(e).max(initial=0.0), 1e-6))


def record(outcome: Outcome) -> dict[str, Any]:
    """An outcome as plain data. Shares are of the ceilings, `ratio` is the time relative to the first
    contestant."""
    case, most = outcome.case, outcome.ceilings
    first = outcome.results[0].seconds
    rows = []
    for result in outcome.results:
        row = result._asdict()
        if result.seconds and most:
            rate, speed = case.bytes / result.seconds, case.flops / result.seconds
            if result.name not in peers.OTHER_BYTES:
                row |= {"bytes_per_second": rate, "copy_share": rate / most.bytes}
            row |= {"flops_per_second": speed, "product_share": speed / most.flops}
            row["ratio"] = result.seconds / first if first else None
        rows.append(row)
    return {
        "op": case.op.name,
        "name": case.name,
        "shape": cases.describe(case.spec),
        "dtype": case.dtype,
        "gradients": case.gradients,
        "truth": outcome.truth,
        "allowed": case.allowed[: 1 + case.gradients],
        "bytes": case.bytes,
        "flops": case.flops,
        "ceilings": most._asdict() if most else None,
        "contestants": rows,
        "left_out": outcome.left_out,
    }


def about() -> dict[str, str]:
    """The environment of a measurement."""
    return {
        "device": device(),
        "platform": jax.default_backend(),
        "jax": jax.__version__,
        "seqlab": __version__,
    }


def write(file: pathlib.Path, content: dict[str, Any]) -> None:
    """The content as JSON; an infinite error becomes null."""
    report.write(file, json.dumps(_finite(content), indent=1, allow_nan=False) + "\n")


def _finite(x: Any) -> Any:
    if isinstance(x, dict):
        return {key: _finite(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [_finite(value) for value in x]
    return None if isinstance(x, float) and not np.isfinite(x) else x
