"""Comparison of models on one task and one budget: trained one after the other, then one table and one
figure.

Every candidate is an ordinary run in its own folder below `workdir`, so an interrupted comparison resumes,
finished runs are kept, and each can be streamed, evaluated or trained from its folder. compare.json,
compare.md and compare.png are in `workdir` and rewritten by every call from the results of the runs.
"""

import functools
import os
import pathlib
import re
import statistics
import time
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import fiddle as fdl
import jax
import jax.numpy as jnp
from flax import nnx

from seqlab.checks import UserError
from seqlab.mixer import as_mixer, width_of
from seqlab.module import Module, count_params, in_evaluation, merge, split
from seqlab.state import state_bytes
from seqlab.streaming.generate import BeyondTraining, stream_generate
from seqlab.studies import report, runs
from seqlab.train import config
from seqlab.train.data import Batches
from seqlab.train.loop import NonFiniteError, held_out_batches, run
from seqlab.train.metrics import as_json, read_rows
from seqlab.train.quality import Quality, quality_of
from seqlab.train.tasks.examples import numbers
from seqlab.train.trial import check_fits

COLUMNS = ("name", "parameters", "state bytes", "train tokens/s", "stream tokens/s")
_MAY_DIFFER = ("model", "optimizer", "accumulate", "log_every", "validate_every", "checkpoint_every", "keep")
_STREAMED = 256  # steps for measuring the speed of streaming


class Row(NamedTuple):
    """A trained candidate: sizes, speeds (without compilation), and its metric at `step`.

    `state_bytes` and `stream_tokens_per_second` are of one stream, None for a model that cannot stream. A
    diverged run has neither speeds nor a metric; `diverged` has the reason.
    """

    name: str
    workdir: str
    step: int
    parameters: int
    state_bytes: int | None
    train_tokens_per_second: float | None
    stream_tokens_per_second: float | None
    quality: float | None
    diverged: str | None = None


class Comparison(NamedTuple):
    """The result: `status` is "finished" or the interrupting signal; `rows` are those of finished runs."""

    status: str
    quality: Quality
    rows: list[Row]


def plan(
    names: Sequence[str],
    mixers: str | None = None,
    fiddlers: Sequence[str] = (),
    steps: int | None = None,
    assignments: Sequence[str] = (),
) -> dict[str, fdl.Config]:
    """The candidates by name: each config, or each with each of `mixers`, "mamba,attention(heads=2)"; the
    rest is applied to all of them.

    Raises:
      ConfigError: anything that `seqlab train` would refuse; duplicate names; data, steps or another part of
        the budget that differ.
    """
    found: dict[str, fdl.Config] = {}
    specs = [None] if mixers is None else _specs(mixers)
    for name in names:
        stem = pathlib.Path(name).stem
        for spec in specs:
            cfg = functools.reduce(config.fiddle, fiddlers, config.load(name))
            cfg = cfg if spec is None else config.fiddle(cfg, _fiddler(spec))
            given = ([] if steps is None else [f"steps={steps}"]) + list(assignments)
            cfg = functools.reduce(config.override, given, cfg)
            title = stem if spec is None else spec if len(names) == 1 else f"{stem} {spec}"
            if report.file_name(title) in map(report.file_name, found):
                raise config.ConfigError(f"duplicate candidate {title!r}: each has a folder of its name")
            found[title] = cfg
    first, *others = found
    for other in others:
        lines = [
            line
            for line in config.diff(found[first], found[other])
            if re.split(r"[.\[:]", line)[0] not in _MAY_DIFFER
        ]
        if lines:
            raise config.ConfigError(
                f"{first} and {other} cannot be compared, since not only their models differ:"
                f"{config.listed(lines)}"
            )
    return found


def compare(candidates: dict[str, fdl.Config], workdir: str | os.PathLike[str]) -> Comparison:
    """Train the remaining candidates one after the other, measure all, and write compare.json, compare.md and
    compare.png.

    A diverged run is reported in its row; the others are still trained.

    Raises:
      ConfigError, ValueError, OSError: as in training; errors in a config, the data or a folder of another
        config are raised before anything is trained or created.
    """
    workdir = pathlib.Path(workdir)
    experiments = {name: config.build(cfg) for name, cfg in candidates.items()}
    first = next(iter(experiments.values()))
    batches = Batches(first.data.train(first.seed), first.batch_size, first.seed)
    held_out_batches(first)
    for name, experiment in experiments.items():
        try:
            check_fits(experiment, batches[0])
        except UserError as error:
            raise config.ConfigError(f"{name}: {error}") from error
    folders = {name: workdir / report.file_name(name) for name in candidates}
    fingerprint = getattr(first.data.train(first.seed), "fingerprint", None)
    for name, cfg in candidates.items():  # checks first
        config.differences(cfg, folders[name], fingerprint=fingerprint)
    rows, quality = [], quality_of(first.metric)
    for name, experiment in experiments.items():
        try:
            result = run(experiment, folders[name], candidates[name])
        except NonFiniteError as error:
            rows.append(_diverged(name, folders[name], experiment, str(error)))
            continue
        if result.status != "finished":
            return Comparison(result.status, quality, rows)
        rows.append(measure(name, folders[name], experiment))
    comparison = Comparison("finished", quality, rows)
    _write(comparison, first, workdir)
    return comparison


def measure(name: str, workdir: pathlib.Path, experiment: Any) -> Row:
    """The results of a finished run. Those of training are read from its folder; streaming is measured
    now."""
    trained = runs.load(workdir, trust=True)  # the config that was just trained
    logged, key = read_rows(workdir / "metrics.jsonl"), f"validation_{quality_of(experiment.metric).name}"
    worth = {row["step"]: row[key] for row in logged if key in row}
    value = (
        float(worth[trained.step])
        if trained.step in worth
        else runs.evaluate(trained.model, experiment).value
    )
    speeds = [
        row["tokens_per_second"] for row in logged if isinstance(row.get("tokens_per_second"), int | float)
    ]
    streams = getattr(trained.model, "causal", False) and hasattr(trained.model, "init_state")
    return Row(
        name,
        str(workdir),
        trained.step,
        count_params(trained.model),
        state_bytes(trained.model) if streams else None,
        statistics.median(speeds) if speeds else None,
        stream_speed(trained) if streams else None,
        value,
    )


def _diverged(name: str, workdir: pathlib.Path, experiment: Any, error: str) -> Row:
    """The row of a diverged run: its size and last step."""
    logged = [row["step"] for row in read_rows(workdir / "metrics.jsonl")]
    model = nnx.eval_shape(lambda: experiment.model(rngs=nnx.Rngs(0)))
    return Row(name, str(workdir), max(logged, default=0), count_params(model), None, None, None, None, error)


def stream_speed(trained: runs.Run) -> float:
    """Steps per second of one stream, single steps, without compilation."""
    model, capacity = trained.model, as_mixer(trained.model).capacity
    steps = _STREAMED if capacity is None else max(1, min(_STREAMED, capacity - 1))
    if trained.tokenizer is not None and as_mixer(model).vocab_size is not None:
        names = numbers(model.vocab_size)  # a model may know more tokens than its task has names for
        stream = stream_generate(
            model, [0], max_tokens=steps, temperature=0, tokenizer=names, block=max(1, steps // 8)
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", BeyondTraining)  # the speed is asked for, not the text
            for _ in stream:
                pass
        return stream.stats["tokens_per_second"]
    return _step_speed(as_mixer(model).unrolled(), steps)


def _step_speed(model: Module, steps: int) -> float:
    """The same for a model of numbers: a compiled loop over single steps."""
    static, params = split(in_evaluation(model))

    @jax.jit
    def loop(params: Any, state: Any, inputs: jax.Array) -> tuple[Any, jax.Array]:
        def step(state: Any, x: jax.Array) -> tuple[Any, jax.Array]:
            y, state = merge(static, params)(x, state)
            return state, y

        return jax.lax.scan(step, state, inputs)

    width = width_of(model)
    arguments = params, model.init_state(1), jnp.zeros((steps, 1, 1, width))
    jax.block_until_ready(loop(*arguments))
    begin = time.perf_counter()
    jax.block_until_ready(loop(*arguments))
    return steps / (time.perf_counter() - begin)


def as_table(comparison: Comparison) -> list[list[str]]:
    """Header and rows as text."""
    quality = comparison.quality
    cells = [[*COLUMNS, f"{quality.words} ({quality.better} is better)"]]
    for row in comparison.rows:
        sizes = [f"{row.parameters:,}", "-" if row.state_bytes is None else f"{row.state_bytes:,}"]
        speeds = [
            "-" if speed is None else f"{speed:,.0f}"
            for speed in (row.train_tokens_per_second, row.stream_tokens_per_second)
        ]
        cells.append([row.name, *sizes, *speeds, "diverged" if row.quality is None else f"{row.quality:.4f}"])
    return cells


def _specs(text: str) -> list[str]:
    """The items of "a,b(x=1, y=2)": split at the commas outside parentheses."""
    found = report.split_specs(text)
    if not all(found):
        raise config.ConfigError(
            f"mixers: expected names with commas between them, such as mamba,attention(heads=2), got {text!r}"
        )
    return found


def _fiddler(spec: str) -> str:
    """mamba(state_size=4) as the call of the fiddler: mixer(mamba, state_size=4); module:Name is quoted."""
    name, opened, options = spec.partition("(")
    name = repr(name) if ":" in name and not name.startswith(("'", '"')) else name
    return f"mixer({name}, {options}" if opened else f"mixer({name})"


def _write(comparison: Comparison, experiment: Any, workdir: pathlib.Path) -> None:
    budget = {name: getattr(experiment, name) for name in ("steps", "batch_size", "seed")} | {
        "data": repr(experiment.data)
    }
    record = {
        "quality": comparison.quality._asdict(),
        **budget,
        "rows": [row._asdict() for row in comparison.rows],
    }
    table = report.as_markdown(as_table(comparison))
    report.write(workdir / "compare.json", as_json(record, indent=1) + "\n")
    report.write(
        workdir / "compare.md",
        f"{experiment.steps:,} steps of {experiment.batch_size} on `{experiment.data!r}`\n\n{table}",
    )
    draw(comparison, workdir / "compare.png")


def draw(comparison: Comparison, path: pathlib.Path) -> None:
    """The figure: metric against bytes of state, and training curves."""
    with report.figure(path, columns=2) as (worth, learning):
        for row in comparison.rows:
            points = [
                (r["step"], r["loss"])
                for r in read_rows(pathlib.Path(row.workdir) / "metrics.jsonl")
                if isinstance(r.get("loss"), float)
            ]
            (line,) = (
                learning.plot(*zip(*points, strict=True), lw=1.2, label=row.name)
                if points
                else learning.plot([], [], label=row.name)
            )
            if row.state_bytes is not None and row.quality is not None:
                worth.plot([row.state_bytes], [row.quality], "o", color=line.get_color())
                worth.annotate(
                    row.name,
                    (row.state_bytes, row.quality),
                    xytext=(6, 4),
                    textcoords="offset points",
                    fontsize=8,
                )
        worth.set(
            xlabel="state of one stream (bytes)",
            ylabel=comparison.quality.words,
            title=f"{comparison.quality.better} is better",
        )
        if any(row.state_bytes for row in comparison.rows):
            worth.set_xscale("log", base=2)
            worth.margins(x=0.3, y=0.15)
        learning.set(xlabel="step", ylabel="training loss", title="training")
        learning.legend(fontsize=8)
