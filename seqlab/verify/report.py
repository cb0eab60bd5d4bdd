"""Results of the checker: one `Check` per comparison, and a `Report` of all."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Relative to the largest magnitude of what is compared. bfloat16 keeps 8 bits: chunks round their
# intermediates at other places than the whole does, a few units of 2^-8 through a block.
BOUNDS = {"float64": 1e-10, "float32": 2e-5, "bfloat16": 4e-2}
GRADIENT_SLACK = 5  # a gradient sums over all steps


@dataclasses.dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
      clause: of the contract, "C1" to "C7".
      what: was compared with what.
      passed: None where the mixer exempts itself; `note` says why.
      error, bound: largest difference relative to scale, and what is allowed; a bound of 0 asks for equality.
      note: where it failed.
      because: what usually makes this comparison fail.
    """

    clause: str
    what: str
    passed: bool | None
    error: float = 0.0
    bound: float = 0.0
    note: str = ""
    because: str = ""

    def __str__(self) -> str:
        mark = {True: "pass", False: "FAIL", None: "-"}[self.passed]
        note = f"  {self.note}" if self.note else ""
        line = f"  {self.clause}  {self.what:<52} {mark:<5}{self._figures()}{note}"
        return line + (
            f"\n        usually because {self.because}" if self.passed is False and self.because else ""
        )

    def _figures(self) -> str:
        if self.passed is None:
            return ""
        return f"{self.error:9.1e} <= {self.bound:.0e}" if self.bound else f"{self.error:9.1e} exact"


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of `verify_streaming`. True if every check passed; prints as a table."""

    mixer: str
    dtype: str
    length: int
    state_bytes: int
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        return all(check.passed is not False for check in self.checks)

    def __bool__(self) -> bool:
        return self.ok

    def raise_for_failure(self) -> "Report":
        """The report itself, or AssertionError with the table."""
        if not self.ok:
            raise AssertionError(str(self))
        return self

    def __str__(self) -> str:
        verdict = "satisfies the streaming contract" if self.ok else "breaks the streaming contract"
        size = f"{self.state_bytes} bytes of state per row"
        head = f"{self.mixer} {verdict} ({self.dtype}, {self.length} steps, {size})"
        return "\n".join([head, *map(str, self.checks)])


def relative_error(actual: Any, expected: Any) -> tuple[float, str]:
    """The largest error over the leaves, each relative to its own scale, and its leaf; integers must be
    equal."""
    worst, where = 0.0, ""
    pairs = zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(actual), strict=True)
    for (path, e), a in pairs:
        if not jnp.issubdtype(e.dtype, jnp.floating):
            error = 0.0 if jnp.array_equal(a, e) else float("inf")
        elif not e.size:
            continue
        else:
            a64, e64 = np.asarray(a).astype(np.float64), np.asarray(e).astype(np.float64)
            error = np.abs(a64 - e64).max() / max(np.abs(e64).max(), 1e-6)
            error = float("inf") if np.isnan(error) else float(error)
        if error > worst:
            worst, where = error, jax.tree_util.keystr(path)
    return worst, where


def compare(clause: str, what: str, actual: Any, expected: Any, bound: float, because: str = "") -> Check:
    """The check that `actual` is `expected` within `bound`."""
    worst, where = relative_error(actual, expected)
    note = "" if worst <= bound else f"at {where or 'output'}"
    return Check(clause, what, worst <= bound, worst, bound, note, because)


def identical(clause: str, what: str, actual: Any, expected: Any, because: str = "") -> Check:
    """The check that all bits of `actual` are those of `expected`, NaN included."""
    pairs = zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(actual), strict=True)
    different = [
        jax.tree_util.keystr(path) or "output"
        for (path, e), a in pairs
        if (e.shape, e.dtype) != (a.shape, a.dtype) or np.asarray(e).tobytes() != np.asarray(a).tobytes()
    ]
    note = f"changed: {', '.join(different)}" if different else ""
    return Check(clause, what, not different, float(len(different)), 0.0, note, because)
