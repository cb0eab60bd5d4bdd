"""Forecasting data, losses and baselines: the borders of the field, what lies in which split, numbers worked
out by hand."""

import dataclasses
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from seqlab.train.data import Batches, validation_batches
from seqlab.train.forecast import forecast_loss, forecast_mae, last_value, least_squares, scores, stacked
from seqlab.train.series import CsvSeries, SeriesWindows, StatsmodelsSeries, split_ends


def written(folder, steps, name="series.csv", columns=("HUFL", "OT")):
    """Column c of step i is 1000 c + i."""
    lines = ["date," + ",".join(columns)]
    lines += [
        f"2016-07-01 {i:05d}," + ",".join(str(1000.0 * c + i) for c in range(len(columns)))
        for i in range(steps)
    ]
    path = folder / name
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.mark.parametrize(
    ("steps", "rule", "ends"),
    [
        (17420, "ett_hour", (8640, 11520, 14400)),
        (69680, "ett_minute", (34560, 46080, 57600)),
        (100, "ratio", (70, 80, 100)),
        (26304, "ratio", (18412, 21044, 26304)),  # electricity: int(0.7 s), and int(0.2 s) from the end
    ],
)
def test_borders_are_those_of_the_field(steps, rule, ends):
    assert split_ends(steps, rule) == ends


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("ETTh1.csv", (8640 - 512 - 95, 2880 - 95, 2880 - 95)),
        ("exchange.csv", (10500 - 512 - 95, 1500 - 95, 3000 - 95)),
    ],
)
def test_the_number_of_windows_is_that_of_the_published_tables(tmp_path, name, counts):
    data = CsvSeries(path=written(tmp_path, 15000, name), length=512, horizon=96)
    assert tuple(len(windows) for windows in (data.train(0), data.validation(), data.test())) == counts


def test_targets_lie_in_their_split_and_inputs_reach_back(tmp_path):
    data = CsvSeries(path=written(tmp_path, 100), length=6, horizon=4)
    mean, deviation = np.arange(70).mean(), np.arange(70).std()
    for windows, begin, end in ((data.train(0), 6, 70), (data.validation(), 70, 80), (data.test(), 80, 100)):
        for index, first in ((0, begin), (len(windows) - 1, end - 4), (-1, end - 4)):
            steps = np.arange(first - 6, first + 4)
            expected = np.stack([(steps - mean) / deviation] * 2, axis=1)  # by the training part alone
            item = windows[index]
            np.testing.assert_allclose(item["inputs"], expected[:6], rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(item["targets"], expected[6:], rtol=1e-5, atol=1e-6)
            assert item["valid"].all() and item["inputs"].dtype == np.float32
        with pytest.raises(IndexError):
            windows[len(windows)]


def test_columns_are_chosen_by_name_and_a_constant_one_is_not_divided_by_nothing(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("date,x,y\n" + "".join(f"{i},{i},7\n" for i in range(40)))
    both, one = (
        CsvSeries(path=str(path), length=3, horizon=2, columns=columns).train(0)
        for columns in (("y", "x"), ("x",))
    )
    assert (both[0]["inputs"][:, 0] == 0).all()
    np.testing.assert_array_equal(both[0]["inputs"][:, 1:], one[0]["inputs"])


def test_fingerprints_differ_when_windows_do(tmp_path):
    data = CsvSeries(path=written(tmp_path, 100), length=6, horizon=4)
    prints = {
        data.train(0).fingerprint,
        data.validation().fingerprint,
        dataclasses.replace(data, length=5).train(0).fingerprint,
    }
    assert len(prints) == 3
    assert data.train(0).fingerprint == data.train(1).fingerprint
    values = np.array(data.train(0).values)
    values[50] += 1
    assert SeriesWindows(values, 0, 70, 6, 4).fingerprint != data.train(0).fingerprint


def test_windows_are_batched_and_a_padded_batch_counts_what_is_there(tmp_path):
    data = CsvSeries(path=written(tmp_path, 100), length=6, horizon=4)
    batch = Batches(data.train(0), 5, seed=0)[3]
    assert batch["inputs"].shape == (5, 6, 2) and batch["targets"].shape == (5, 4, 2)
    held_out = validation_batches(data.validation(), 4)
    sums = np.sum([forecast_loss(Still(4), batch) for batch in held_out], axis=0)
    assert sums[1] == len(data.validation()) * 4 * 2
    expected = scores(last_value(4), data.validation())
    np.testing.assert_allclose(sums[0] / sums[1], expected.mse, rtol=1e-5)


class Still:
    """Forecasts the last value."""

    def __init__(self, horizon):
        self.horizon = horizon

    def forecast(self, x):
        return jnp.repeat(x[:, -1:], self.horizon, axis=1)


def test_losses_count_only_what_is_valid():
    batch = {
        "inputs": jnp.zeros((2, 3, 2)),
        "targets": jnp.asarray([[[1.0, 2.0], [np.nan, 5.0]]] * 2),
        "valid": jnp.asarray([[True, False]] * 2),
    }
    assert [float(x) for x in forecast_loss(Still(2), batch)] == [10.0, 4.0]
    assert [float(x) for x in forecast_mae(Still(2), batch)] == [6.0, 4.0]


def test_baselines_find_what_they_can(tmp_path):
    ramp = CsvSeries(path=written(tmp_path, 100), length=6, horizon=4)
    step = 1 / np.arange(70).std()
    assert scores(last_value(4), ramp.test()).mse == pytest.approx((1 + 4 + 9 + 16) / 4 * step**2, rel=1e-4)
    assert scores(last_value(4), ramp.test()).mae == pytest.approx(2.5 * step, rel=1e-4)
    for relative in (False, True):  # a ramp is linear
        assert scores(least_squares(ramp.train(0), relative=relative), ramp.test()).mse < 1e-8
    noise = np.random.default_rng(0).normal(size=(300, 1)).astype(np.float32)
    windows = SeriesWindows(noise, 0, 200, 5, 2)
    x, y = stacked(windows)
    weights = np.linalg.lstsq(np.c_[x[..., 0], np.ones(len(x))], y[..., 0], rcond=None)[0]
    np.testing.assert_allclose(
        least_squares(windows)(x)[..., 0], np.c_[x[..., 0], np.ones(len(x))] @ weights, rtol=1e-6, atol=1e-9
    )
    assert np.abs(least_squares(windows, ridge=1e9)(x)).max() < 1e-3


def test_the_series_of_statsmodels():
    pytest.importorskip("statsmodels")
    sizes = {
        name: StatsmodelsSeries(name=name, length=3, horizon=1).table()
        for name in ("co2", "elnino", "macrodata", "nile", "sunspots")
    }
    assert {name: table.values.shape for name, table in sizes.items()} == {
        "co2": (2284, 1),
        "elnino": (732, 1),
        "macrodata": (203, 12),
        "nile": (100, 1),
        "sunspots": (309, 1),
    }
    assert all(np.isfinite(table.values).all() for table in sizes.values())
    # January 1950, January 1951
    assert sizes["elnino"].values[:13, 0].round(2).tolist()[::12] == [23.11, 24.19]
    assert sizes["macrodata"].names[:3] == ("realgdp", "realcons", "realinv")


def test_without_statsmodels_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "statsmodels", None)
    monkeypatch.setitem(sys.modules, "statsmodels.datasets", None)
    with pytest.raises(ValueError, match="comes with statsmodels, which is not installed"):
        StatsmodelsSeries(name="co2").train(0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("date\n1\n", "expected a header with a date and the names of series"),
        ("", "expected a header"),
        ("date,x\n1,2\n2,\n", "line 3: x is ''"),
        ("date,x\n1,2\n2,abc\n", "line 3: x is 'abc', expected a finite number"),
        ("date,x\n1,nan\n", "line 2: x is 'nan'"),
        ("date,x\n1,2,3\n", "line 2: 3 fields under 2 names"),
        ("date,x\n1,2\n", "train has steps 0 to 0, too few for a window of length=4 and horizon=2"),
    ],
)
def test_a_file_that_is_wrong(tmp_path, text, words):
    path = tmp_path / "a.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        CsvSeries(path=str(path), length=4, horizon=2).train(0)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: CsvSeries(path=""), "path must be the path of a CSV file"),
        (lambda: CsvSeries(path="a", length=0), "length must be a positive number of steps, got 0"),
        (lambda: CsvSeries(path="a", horizon=True), "horizon must be"),
        (lambda: CsvSeries(path="a", columns="OT"), "columns must be a tuple of strings"),
        (lambda: CsvSeries(path="a", borders="ett_hours"), "did you mean 'ett_hour'"),
        (lambda: StatsmodelsSeries(name="co"), "did you mean 'co2'"),
        (lambda: split_ends(100, "ett_hour"), "takes 20 months, 14400 steps, and the series has 100"),
    ],
)
def test_bad_arguments_are_named(build, words):
    with pytest.raises(ValueError, match=words):
        build()


def test_unknown_columns_and_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'OT'"):
        CsvSeries(path=written(tmp_path, 50), length=4, horizon=2, columns=("OTT",)).train(0)
    with pytest.raises(FileNotFoundError):
        CsvSeries(path=str(tmp_path / "none.csv")).train(0)
