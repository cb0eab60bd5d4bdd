"""Every golden case of every system that seqlab has, through seqlab's own code.

    SEQLAB_GOLDEN=FOLDER pytest tests/test_parity.py

puts other cases through the same adapters (default: tests/golden). Systems without an adapter in tests/parity
are reported as skipped.
"""

import contextlib
import importlib
import importlib.util
import json
import os
import pathlib

import jax
import numpy as np
import parity
import pytest

GOLDEN = pathlib.Path(os.environ.get("SEQLAB_GOLDEN") or pathlib.Path(__file__).parent / "golden")


def cases():
    for path in sorted(GOLDEN.glob("*/*.npz")):
        with np.load(path, allow_pickle=False) as file:
            meta = json.loads(str(file["meta"]))
        precisions = parity.precisions(meta)
        for precision in precisions:  # of our own cases the sharper one is always run
            again = precision == "float32" and len(precisions) > 1 and "SEQLAB_GOLDEN" not in os.environ
            marks = [pytest.mark.slow] * again
            yield pytest.param(path, precision, marks=marks, id=f"{path.parent.name}-{path.stem}-{precision}")


@pytest.mark.parametrize("path, precision", list(cases()))
def test_the_numbers_of_the_original(path, precision):
    if importlib.util.find_spec(f"parity.{path.parent.name}") is None:
        pytest.skip(f"seqlab has no {path.parent.name} yet")
    adapter = importlib.import_module(f"parity.{path.parent.name}")
    with jax.enable_x64(True) if precision == "float64" else contextlib.nullcontext():
        case = parity.Case(path, precision)
        adapter.check(case)
        case.finish()
