"""What a run leaves to look at: `metrics.jsonl`, TensorBoard events, `curves.png`, and one line on the
terminal."""

import json
import math
import os
import pathlib
import sys
import time
from typing import Any

from seqlab.train.quality import Quality


class Metrics:
    """Writes the metrics of one run folder. After a resume the lines past `step` are dropped: the run will
    write them again."""

    def __init__(self, workdir: pathlib.Path, step: int, quality: Quality):
        from tensorboardX import SummaryWriter

        self.path, self._quality = workdir / "metrics.jsonl", quality
        self.rows = [row for row in read_rows(self.path) if row["step"] <= step]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        os.replace(temporary, self.path)
        self._file = self.path.open("a")
        self._events = SummaryWriter(str(workdir), purge_step=step + 1)

    def write(self, step: int, **values: float) -> None:
        """Append one line; a number that is not finite is written as a string, so that the file stays
        JSON."""
        row = {
            "step": step,
            **{name: value if math.isfinite(value) else str(value) for name, value in values.items()},
        }
        self.rows.append(row)
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

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


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; one that was cut short by a kill is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
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
            self._bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._bar is not None:
            self._bar.close()
