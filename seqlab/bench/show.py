"""Benchmark reports: one table per case, with caveats."""

import pathlib

from seqlab import bench
from seqlab.bench import tune
from seqlab.bench.cases import Case
from seqlab.kernels.blocks import WIDEST
from seqlab.studies import report


def show(planned: bench.Plan, rounds: int, file: pathlib.Path | None) -> int:
    """Run and print a plan, and write the results as JSON into `file`; returns the number of incorrect
    implementations."""
    about, outcomes = bench.about(), []
    print(f"{about['device']}, JAX {about['jax']} on {about['platform']}, seqlab {about['seqlab']}")
    for outcome in bench.run(planned, rounds):
        print(f"\n{as_text(outcome)}", flush=True)
        outcomes.append(outcome)
    if file is not None:
        bench.write(file, {**about, "cases": [bench.record(outcome) for outcome in outcomes]})
    return sum(bool(result.wrong) for outcome in outcomes for result in outcome.results)


def show_tuning(planned: bench.Plan, rounds: int, file: pathlib.Path) -> None:
    """Tune, print the results, and write them into `file` for `seqlab.use_blocks`."""
    about, found = bench.about(), []
    print(f"{about['device']}, JAX {about['jax']} on {about['platform']}, seqlab {about['seqlab']}")
    for each in tune.tune(planned, rounds):
        sizes = " ".join(f"{name}={value}" for name, value in each.row.blocks.items())
        kernel, size, width = each.row.place
        numbers = f"{size} bytes" if size else "any number"
        reach = f"{numbers}, {'any width' if width == WIDEST else f'up to {width} wide'}"
        print(f"\n{each.case.title}\n  {kernel} ({reach}): {sizes}")
        times = f"{_time(each.seconds)}, {_time(each.before)} before"
        tried = sum(trial.seconds is not None for trial in each.trials)
        print(f"  {times}; {tried} other sizes tried, {len(each.trials) - tried} left out", flush=True)
        found.append(tune.record(each))
        bench.write(file, {**about, "rows": found})
    print(
        f"\nwith seqlab.use_blocks({str(file)!r}), or SEQLAB_BLOCKS={file} in the environment, kernels take "
        "these"
    )


def as_text(outcome: bench.Outcome) -> str:
    """One case: incorrect implementations, times with shares of the ceilings, and excluded
    implementations."""
    case, most = outcome.case, outcome.ceilings
    lines = [
        case.title,
        f"  errors against {outcome.truth}; allowed "
        f"{' and '.join(f'{x:.1e}' for x in case.allowed[: 1 + case.gradients])}",
    ]
    if most:
        lines[-1] += (
            f"; ceilings {_rate(most.bytes, 'B')} of a copy, {_rate(most.flops, 'FLOP')} of a product"
        )
    rows = bench.record(outcome)["contestants"]
    if most and any(row["seconds"] for row in rows):
        lines.append(_indented(report.as_text(_cells(case, rows))))
    else:
        lines += [
            f"  {row['name']}: error {row['error']:.1e}, interpreted: no time, for a simulation has none"
            for row in rows
        ]
    lines += [f"  {row['name']} is WRONG, so it gets no time: {row['wrong']}" for row in rows if row["wrong"]]
    if any(row.get("copy_share", 0) > 1 for row in rows):
        lines.append("  above 100 %: the case stays in caches, which the large copy does not")
    return "\n".join([*lines, *(f"  without {name}: {reason}" for name, reason in outcome.left_out.items())])


def _cells(case: Case, rows: list[dict]) -> list[list[str]]:
    first = rows[0]["name"]
    cells = [["", "error", "time", "of the copy", "of the product", f"time / {first}'s", "compiled in"]]
    for row in rows:
        if row["seconds"] is None:
            continue
        ratio = "-" if row["ratio"] is None else f"{row['ratio']:.2f}x"
        error = "-" if row["error"] is None else f"{row['error']:.1e}"
        shares = [f"{row[share]:.0%}" if share in row else "-" for share in ("copy_share", "product_share")]
        cells.append(
            [row["name"], error, _time(row["seconds"]), *shares, ratio, f"{row['compile_seconds']:.1f} s"]
        )
    return cells


def _indented(text: str) -> str:
    return "\n".join(f"  {line}".rstrip() for line in text.splitlines())


def _time(seconds: float) -> str:
    unit, size = next((pair for pair in (("s", 1.0), ("ms", 1e-3)) if seconds >= pair[1]), ("us", 1e-6))
    return f"{seconds / size:.3g} {unit}"


def _rate(value: float, unit: str) -> str:
    prefix, size = next((pair for pair in (("T", 1e12), ("G", 1e9)) if value >= pair[1]), ("M", 1e6))
    return f"{value / size:.3g} {prefix}{unit}/s"
