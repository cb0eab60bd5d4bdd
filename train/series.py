"""Forecasting data: windows of several series, split, scaled and cut by the standard protocol (Informer's
code, arXiv 2012.07436).

    data = CsvSeries(path="ETTh1.csv", length=512, horizon=96)
    windows = data.train(seed=0)        # windows[i] = {"inputs": [512, m], "targets": [96, m], "valid": [96]}

A series is split by time into training, validation and test, and scaled by mean and standard deviation of its
training part. Windows begin at every step. Targets of a split lie in that split; inputs of the first windows
of validation and test reach back into the split before.
"""

import csv
import dataclasses
import functools
import hashlib
import operator
import os
import re
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from seqlab.checks import UserError, check_choice, expanded
from seqlab.train.packing import Item

_MONTH = 30 * 24  # hours: the months of the Electricity Transformer Temperature data have 30 days
RULES = ("auto", "ett_hour", "ett_minute", "ratio")


class Table(NamedTuple):
    """Series by name: `values` [s, m] float64, one row per step."""

    names: tuple[str, ...]
    values: Float[np.ndarray, "s m"]


class SeriesWindows:
    """The windows whose targets lie in steps [begin, end) of `values` [s, m]: window i forecasts `horizon`
    steps from begin + i on.

    `inputs` [length, m] are the steps before them and may lie before `begin`; training starts `length` steps
    late, since nothing precedes the first step. `valid` [horizon] is all True; it is False in windows that
    pad a batch.
    """

    def __init__(
        self, values: Float[np.ndarray, "s m"], begin: int, end: int, length: int, horizon: int
    ) -> None:
        self.values, self.length, self.horizon = values, length, horizon
        self.begin, self._count = max(begin, length), max(end - horizon + 1 - max(begin, length), 0)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Item:
        index = operator.index(index)
        if not -self._count <= index < self._count:
            raise IndexError(f"window {index} of {self._count}")
        at = self.begin + index % self._count
        inputs, targets = self.values[at - self.length : at], self.values[at : at + self.horizon]
        return {"inputs": inputs, "targets": targets, "valid": np.ones(self.horizon, np.bool_)}

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change if any window does: a resumed run can verify that its data are
        the same."""
        place = (self.values.shape, self.begin, self._count, self.length, self.horizon)
        return hashlib.sha256(repr(place).encode() + np.ascontiguousarray(self.values).tobytes()).hexdigest()[
            :16
        ]


def split_ends(steps: int, rule: str) -> tuple[int, int, int]:
    """The ends of training, validation and test, for a series of `steps` steps.

    "ett_hour" and "ett_minute": 12, 4 and 4 months of 30 days, of hours or of quarters of an hour; what
    follows is not used. "ratio": the first 0.7, and of what remains the last 0.2 of the whole are the test.
    """
    check_choice(rule, RULES[1:], "borders")
    if rule == "ratio":
        return int(steps * 0.7), steps - int(steps * 0.2), steps
    month = _MONTH * (4 if rule == "ett_minute" else 1)
    if steps < 20 * month:
        raise UserError(
            f"borders={rule!r} takes 20 months, {20 * month} steps, and the series has {steps}; did you "
            "mean 'ratio'?"
        )
    return 12 * month, 16 * month, 20 * month


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeriesData:
    """The common base of the sources below. Abstract: a source has `table`.

    Args:
      length, horizon: steps of the inputs and of the targets of a window.
      columns: names of the series, in order; none takes all.
      borders: how time is split, see `split_ends`; "auto": by name for files ETTh... and ETTm..., otherwise
        "ratio".
    Raises:
      ValueError: an argument of another kind; where data are asked for, an unknown column, or a split too
        short for one window.
    """

    length: int = 96
    horizon: int = 24
    columns: tuple[str, ...] = ()
    borders: str = "auto"

    def __post_init__(self) -> None:
        for name in ("length", "horizon"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"{name} must be a positive number of steps, got {value!r}")
        if not isinstance(self.columns, tuple) or not all(
            isinstance(item, str) and item for item in self.columns
        ):
            raise UserError(f"columns must be a tuple of strings that are not empty, got {self.columns!r}")
        check_choice(self.borders, RULES, "borders")

    @property
    def tokenizer(self) -> None:
        """Inputs are numbers."""

    def table(self) -> Table:
        """All series of the source."""
        raise NotImplementedError

    @property
    def title(self) -> str:
        """The name of the source, for messages and for "auto"."""
        raise NotImplementedError

    def train(self, seed: int) -> SeriesWindows:
        """The training windows, in the order of time: `seed` plays no part, `Batches` shuffles them."""
        return self._windows("train")

    def validation(self) -> SeriesWindows:
        """The validation windows."""
        return self._windows("validation")

    def test(self) -> SeriesWindows:
        """The test windows, for reported results."""
        return self._windows("test")

    def _windows(self, split: str) -> SeriesWindows:
        names, values = self.table()
        for name in self.columns:
            check_choice(name, names, "columns")
        values = values[:, [names.index(name) for name in self.columns]] if self.columns else values
        ends = split_ends(len(values), self._rule())
        places = dict(
            zip(("train", "validation", "test"), zip((0, *ends[:2]), ends, strict=True), strict=True)
        )
        begin, end = places[split]
        if end - self.horizon < max(begin, self.length):
            raise UserError(
                f"{self.title}: {split} has steps {begin} to {end}, too few for a window of "
                f"length={self.length} and horizon={self.horizon}"
            )
        return SeriesWindows(_scaled(values, ends[0]), begin, end, self.length, self.horizon)

    def _rule(self) -> str:
        if self.borders != "auto":
            return self.borders
        found = re.match("ETT([hm])", self.title)
        return {"h": "ett_hour", "m": "ett_minute"}[found.group(1)] if found else "ratio"


def _scaled(values: Float[np.ndarray, "s m"], train: int) -> Float[np.ndarray, "s m"]:
    """(values - mean) / deviation by the first `train` steps, float32; a series that is constant there is
    only shifted."""
    mean, deviation = values[:train].mean(axis=0), values[:train].std(axis=0)
    scaled = ((values - mean) / np.where(deviation > 0, deviation, 1.0)).astype(np.float32)
    scaled.setflags(write=False)
    return scaled


@dataclasses.dataclass(frozen=True, kw_only=True)
class CsvSeries(SeriesData):
    """A CSV file in the format of ETT: a header, then a date and a number for every series on each line, in
    the order of time."""

    path: str

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.path, str) or not self.path:
            raise UserError(f"path must be the path of a CSV file, got {self.path!r}")

    @property
    def title(self) -> str:
        return os.path.basename(self.path)

    def table(self) -> Table:
        """Raises OSError where the file cannot be read, ValueError naming the line and column of what is not
        a finite number."""
        try:
            with open(expanded("path", self.path), newline="", encoding="utf-8-sig") as file:
                header, values = self._read(csv.reader(file))
        except (UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{self.path}: it is no CSV file in UTF-8 ({error})") from error
        return Table(tuple(header[1:]), np.asarray(values, np.float64).reshape(-1, len(header) - 1))

    def _read(self, lines: Any) -> tuple[list[str], list[list[float]]]:
        header = next(lines, [])
        if len(header) < 2:
            raise UserError(
                f"{self.path}: expected a header with a date and the names of series, got "
                f"{','.join(header)!r}"
            )
        return header, [
            _numbers(line, header, f"{self.path}, line {lines.line_num}") for line in lines if line
        ]


def _numbers(line: list[str], header: list[str], where: str) -> list[float]:
    if len(line) != len(header):
        raise UserError(f"{where}: {len(line)} fields under {len(header)} names")
    numbers = []
    for name, text in zip(header[1:], line[1:], strict=True):
        try:
            numbers.append(float(text))
        except ValueError:
            numbers.append(float("nan"))
        if not np.isfinite(numbers[-1]):
            raise UserError(f"{where}: {name} is {text!r}, expected a finite number")
    return numbers


# The measured series of statsmodels that are long enough, and the columns that only count time.
STATSMODELS = ("co2", "elnino", "macrodata", "nile", "sunspots")
_TIME = ("YEAR", "year", "quarter")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StatsmodelsSeries(SeriesData):
    """A measured series that comes with statsmodels, so it needs no download.

    co2 (weekly, Mauna Loa, 2284 steps), elnino (monthly sea-surface temperature, 732 steps), macrodata
    (quarterly, US, 12 series, 203 steps), nile (yearly flow, 100 steps), sunspots (yearly, 309 steps). A
    missing value (co2 has some) repeats the one before it, so nothing of the future gets into the past.
    """

    name: str

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.name, STATSMODELS, "name")

    @property
    def title(self) -> str:
        return self.name

    def table(self) -> Table:
        """Raises ValueError where statsmodels is not installed."""
        try:
            import statsmodels.datasets
        except ImportError as error:
            raise UserError(
                f"the series {self.name!r} comes with statsmodels, which is not installed: pip install "
                "statsmodels"
            ) from error
        frame = getattr(statsmodels.datasets, self.name).load_pandas().data
        frame = frame.drop(columns=[name for name in _TIME if name in frame])
        if self.name == "elnino":  # a year a row, a month a column
            return Table(("temperature",), frame.to_numpy(np.float64).reshape(-1, 1))
        return Table(tuple(map(str, frame.columns)), frame.ffill().to_numpy(np.float64))
