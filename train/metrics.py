"""Metrics of a run: `metrics.jsonl`, TensorBoard events, `curves.png`, and one line on the terminal."""

import contextlib
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

from seqlab.train.processes import print_error
from seqlab.train.quality import Quality


class Metrics:
    """Writer of the metrics of one run folder. After a resume, lines past `step` are dropped, since they are
    written again."""

    def __init__(self, workdir: pathlib.Path, step: int, quality: Quality):
        self.path, self._quality = workdir / "metrics.jsonl", quality
        self.rows = [row for row in read_rows(self.path) if row["step"] <= step]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(as_json(row) + "\n" for row in self.rows))
        os.replace(temporary, self.path)
        self._file = self.path.open("a")
        self._events = _Events(workdir, step + 1)

    def write(self, step: int, **values: float) -> None:
        """Append one line; a number that is not finite is written as a string, so that the file stays
        JSON."""
        row = json.loads(as_json({"step": step, **values}))
        self.rows.append(row)
        self._file.write(as_json(row) + "\n")
        self._file.flush()
        self._events.write(step, values)

    def has(self, step: int, name: str) -> bool:
        """Whether there is a value of that name for `step`."""
        return any(row["step"] == step and name in row for row in self.rows)

    def draw(self) -> None:
        """Draw the loss and the validation curve into `curves.png`."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 3.2), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, 2)
        titles = {
            "loss": "training loss",
            f"validation_{self._quality.name}": f"validation: {self._quality.words}",
        }
        for ax, (name, title) in zip(axes, titles.items(), strict=True):
            points = [(row["step"], row[name]) for row in self.rows if isinstance(row.get(name), int | float)]
            ax.plot(
                *zip(*points, strict=True), lw=1.2, marker="." if len(points) < 30 else None
            ) if points else None
            ax.set_xlabel("step")
            ax.set_title(title, fontsize=10)
            ax.grid(alpha=0.3)
        figure.savefig(self.path.with_name("curves.png"), dpi=110)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.draw()
        self._file.close()
        self._events.close()


class _Events:
    """TensorBoard events, flushed before `write` returns: with a queue, a kill would lose points that
    metrics.jsonl has and that the resumed run does not write again."""

    def __init__(self, folder: pathlib.Path, purge: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._file = EventsWriter(str(folder / "events"), f".{os.getpid()}")
        start = SessionLog(status=SessionLog.START)  # TensorBoard hides what other files have from `purge` on
        self._file.write_event(Event(step=purge, wall_time=time.time(), session_log=start))

    def write(self, step: int, values: dict[str, float]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        event = Event(step=step, wall_time=time.time(), summary=Summary(value=scalars))
        self._file.write_event(event)
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def as_json(value: Any, indent: int | None = None) -> str:
    """`value` as standard JSON: non-finite floats are the strings "nan", "inf" and "-inf"."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def from_json(text: str | bytes) -> Any:
    """The inverse of `as_json`."""
    return _floats(json.loads(text))


def _floats(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _floats(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_floats(item) for item in value]
    return float(value) if value in ("nan", "inf", "-inf") else value


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, without truncated or damaged ones: the file is for people, and no run
    depends on it."""
    rows = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            row = json.loads(line, parse_constant=str)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and type(row.get("step")) is int:
            rows.append(row)
    return rows


class Progress:
    """A progress bar on a terminal, one line per report elsewhere; both on stderr."""

    def __init__(self, total: int, start: int = 0):
        self._bar = None
        self._total, self._start, self._begin = total, start, time.perf_counter()
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True, smoothing=0.1)

    def advance(self, step: int) -> None:
        """`step` steps are dispatched."""
        if self._bar is not None:
            with self._without_a_terminal():
                self._bar.update(step - self._bar.n)

    def report(self, step: int, **values: str) -> None:
        """Show the latest figures."""
        if self._bar is not None:
            self._bar.set_postfix(values, refresh=False)
            return
        done = step - self._start
        left = (time.perf_counter() - self._begin) / max(done, 1) * (self._total - step)
        self.say(
            f"step {step}/{self._total}  "
            + "  ".join(f"{k} {v}" for k, v in values.items())
            + f"  ETA {left:.0f}s"
        )

    def say(self, line: str) -> None:
        """A line that does not break the bar."""
        if self._bar is not None:
            with self._without_a_terminal():
                self._bar.write(line, file=sys.stderr)
        else:
            print_error(line)

    @contextlib.contextmanager
    def _without_a_terminal(self) -> Iterator[None]:
        """Drop the bar and continue if its terminal is gone."""
        try:
            yield
        except (OSError, ValueError):
            self._bar = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._bar is not None:
            with self._without_a_terminal():
                self._bar.close()
