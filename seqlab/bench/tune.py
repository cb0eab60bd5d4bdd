"""Faster block sizes for this device, by trial: `seqlab bench OP --tune FILE`.

Starting from the current blocks of a case, each size is halved and doubled while that is faster. A candidate
is accepted if it compiles, passes verification as in every benchmark, and is faster than the best so far in
the same comparison.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from seqlab.bench import BenchError, Plan, cases, parity, timing, truth
from seqlab.bench.cases import Case
from seqlab.kernels.blocks import Row, asked_by, use_blocks

GAIN = 0.02  # relative; smaller gains are noise
# Bounds of sizes by name; other fields, such as a precision, are fixed. `stages` change by one.
BOUNDS = {
    "channels": (8, 4096),
    "chunk": (8, 512),
    "keys": (16, 256),
    "rows": (16, 256),
    "stages": (1, 5),
    "steps": (8, 2048),
    "stretch": (32, 4096),
    "tile": (128, 1024),
    "values": (16, 256),
    "warps": (1, 16),
}


class Trial(NamedTuple):
    """A candidate: its time and that of the previous best in the same comparison, or the reason why it has
    none."""

    row: Row
    seconds: float | None
    best_seconds: float | None
    why: str


class Tuned(NamedTuple):
    """The result for a case: the best row of a kernel, and the times of the case with it and with the
    previous blocks."""

    case: Case
    implementation: str
    row: Row
    seconds: float
    before: float
    trials: list[Trial]


def tune(planned: Plan, rounds: int = 5) -> Iterator[Tuned]:
    """Tune each kernel of every case, with its first implementation. If several cases share a row, the first
    decides."""
    if planned.interpret:
        raise BenchError("--tune needs times, and --interpret has none")
    rows: dict[tuple[str, int, int], Row] = {}
    for case, names in zip(planned.cases, planned.contestants, strict=True):
        inputs, (_, expected) = (case.arguments, case.cotangents()), truth(case)
        for row in asked_by(case.timed(names[0]), inputs):
            if row.place not in rows:
                found = _climb(case, names[0], inputs, expected, list(rows.values()), row, rounds)
                rows[row.place] = found.row
                yield found
    if not rows:
        raise BenchError(
            f"{planned.cases[0].op.name} has no block sizes that {planned.contestants[0][0]} takes at this "
            "shape"
        )


def _climb(
    case: Case, name: str, inputs: Any, expected: Any, others: list[Row], row: Row, rounds: int
) -> Tuned:
    first = best = _program(case, name, inputs, [*others, row])
    trials, seen, ahead = [], [row.blocks], list(neighbours(row))
    while ahead:
        candidate = ahead.pop(0)
        if candidate.blocks in seen:
            continue
        seen.append(candidate.blocks)
        try:
            program = _program(case, name, inputs, [*others, candidate])
        # Sizes that a compiler or a kernel rejects are skipped, for whatever reason.
        except Exception as error:
            trials.append(
                Trial(candidate, None, None, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
            )
            continue
        _, wrong = parity(case, program.result, expected)
        if wrong:
            trials.append(Trial(candidate, None, None, f"wrong: {wrong}"))
            continue
        times = timing.race({"best": best.measure, "new": program.measure}, rounds)
        trials.append(Trial(candidate, times["new"], times["best"], ""))
        if times["new"] < (1 - GAIN) * times["best"]:
            row, best, ahead = candidate, program, list(neighbours(candidate))
    times = timing.race({"before": first.measure, "after": best.measure}, rounds)
    return Tuned(case, name, row, times["after"], times["before"], trials)


def _program(case: Case, name: str, inputs: Any, rows: list[Row]) -> timing.Program:
    with use_blocks(rows):
        return timing.repeated(case.timed(name), inputs)


def neighbours(row: Row) -> Iterator[Row]:
    """The same blocks with one size changed."""
    for name, value in row.blocks.items():
        if name in BOUNDS:
            least, most = BOUNDS[name]
            for size in (value + 1, value - 1) if name == "stages" else (2 * value, value // 2):
                if least <= size <= most:
                    yield row._replace(blocks=row.blocks | {name: size})


def record(found: Tuned) -> dict[str, Any]:
    """A result as plain data: first the row that `seqlab.use_blocks` reads, then how it was found."""
    trials = [{"blocks": trial.row.blocks, **trial._asdict()} for trial in found.trials]
    return {
        **found.row._asdict(),
        "seconds": found.seconds,
        "seconds_before": found.before,
        "implementation": found.implementation,
        "name": found.case.name,
        "shape": cases.describe(found.case.spec),
        "dtype": found.case.dtype,
        "gradients": found.case.gradients,
        "trials": [{key: value for key, value in trial.items() if key != "row"} for trial in trials],
    }
