"""Parity with the originals: one adapter a system, `check(case)`, which goes by `meta` and the names of
arrays, never by file names."""

import json
import pathlib
import re
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np


class Case:
    """One golden case: arrays in, arrays expected, and which of those were compared.

    `inputs`, `params`, `mids`, `outs` map names without their prefix to arrays, floating ones in the
    precision of this run; `meta` is what the original's run was. `check` compares; `finish` insists that
    every output was compared.
    """

    def __init__(self, path: pathlib.Path, precision: str = "float32"):
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files if name != "meta"}
            self.meta = json.loads(str(file["meta"]))
        self.precision = precision
        self.inputs, self.params, self.mids, self.outs = ({} for _ in range(4))
        groups = {"in": self.inputs, "param": self.params, "mid": self.mids, "out": self.outs}
        for name, value in arrays.items():
            group, _, rest = name.partition(".")
            kept = group in ("mid", "out")  # what is expected stays as it was written
            groups[group][rest] = (
                value.astype(precision) if np.issubdtype(value.dtype, np.floating) and not kept else value
            )
        self.options = self.meta.get("config", self.meta.get("hyper", self.meta))
        self.tolerance, self.gradient_tolerance = tolerances(self.meta, precision)
        self.compared: set[str] = set()

    def expected(self, name):
        """The expected array of that name, from the outputs or the intermediates."""
        return self.outs[name] if name in self.outs else self.mids[name]

    def check(self, name, actual, *, exact=False):
        """`actual` is the expected array within the case's tolerance (or exactly)."""
        expected = self.expected(name)
        self.compared.add(name)
        actual = np.asarray(actual)
        assert actual.shape == expected.shape, f"{name}: shape {actual.shape} is not {expected.shape}"
        if exact:
            np.testing.assert_array_equal(actual, expected, err_msg=name)
            return
        gradient = name.startswith("grad") or name in ("dq", "dk", "dv")
        rtol, atol, scaled = self.gradient_tolerance if gradient else self.tolerance
        atol += scaled * np.abs(expected[np.isfinite(expected)]).max(initial=0.0)  # an lse may be -inf
        np.testing.assert_allclose(
            actual.astype(np.float64), expected.astype(np.float64), rtol=rtol, atol=atol, err_msg=name
        )

    def check_all(self, values, **options):
        """Each of `values` (by name) that the case holds."""
        for name, value in values.items():
            if name in self.outs or name in self.mids:
                self.check(name, value, **options)

    def array(self, name):
        """An input by name, None where the case has none."""
        return None if name not in self.inputs else jnp.asarray(self.inputs[name])

    def finish(self):
        left = set(self.outs) - self.compared
        assert not left, f"the adapter does not compare {sorted(left)}"


class Tolerance(NamedTuple):
    """Relative to each number, absolute, and relative to the array's largest number."""

    rtol: float = 0.0
    atol: float = 0.0
    scaled: float = 0.0


def tolerances(meta, precision):
    """What the case asks of a run in `precision`: for values, and for gradients where it says something else
    of them."""
    text = str(meta.get("tolerance", meta.get("tol", ""))).partition("; bf16")[0]
    if "float64" in text:  # the two precisions have a bound each
        parts = {
            "float64": re.search(r"float64 (?:rel )?([\d.e-]+)", text),
            "float32": re.search(r"float32[a-z ]*?([\d.]+e-\d+)", text),
        }
        bound = Tolerance(scaled=float(parts[precision].group(1)))
        return bound, bound
    for name in ("atol", "atol_float32"):
        if name in meta:
            return (Tolerance(atol=float(meta[name])),) * 2
    values, _, gradients = text.partition("grads")
    bound = _named(values)
    single = re.search(r"(?:float32 |^)([\d.]+e-\d+)", values)  # a number alone is absolute
    bound = Tolerance(atol=float(single.group(1))) if single and bound == Tolerance() else bound
    own = _named(gradients)
    return bound, Tolerance(own.rtol or bound.rtol, own.atol or bound.atol)


def _named(text):
    found = dict(re.findall(r"(rtol|atol|abs|rel) ?([\d.]+e-?\d+)", text))
    return Tolerance(
        float(found.get("rtol", found.get("rel", 0.0))), float(found.get("atol", found.get("abs", 0.0)))
    )


def in_order(state, sinks, recent):
    """Keys, values and positions, in order, of the sinks and the last `recent` steps; a window's cache holds
    one more, the next to go."""
    positions, length = np.asarray(state.positions[0]), int(state.length[0])
    order = [
        j
        for j in np.argsort(positions)
        if positions[j] < length and (positions[j] < sinks or positions[j] >= length - recent)
    ]
    return np.asarray(state.k)[:, :, order], np.asarray(state.v)[:, :, order], positions[order]


def precisions(meta):
    """In which precisions a case is run: both where the numbers were made in float64, only that where no
    other reaches the bound."""
    if float(meta.get("atol", 1.0)) < 1e-9:
        return ("float64",)
    return (
        ("float32", "float64")
        if "float64" in str(meta.get("tolerance", meta.get("tol", "")))
        else ("float32",)
    )
