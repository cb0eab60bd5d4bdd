"""The law, checked: whole = any split into chunks = step by step, for any mixer or model, a user's own
included.

print(seqlab.verify_streaming(MyMixer(64, rngs=nnx.Rngs(0))))

C1 chunk invariance     outputs, final state and gradients do not depend on how a sequence is split
C2 padding invariance   a step with valid=False does nothing, whatever it holds, NaN included
C3 reset                reset=True starts a fresh sequence: packing documents = separate documents
C4 constant state       the state's shapes do not depend on what it has seen
C5 device invariance    a sequence split over devices equals one device
C6 row independence     rows can be taken out, put in, forked and replaced without touching their neighbours
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from seqlab.checks import UserError
from seqlab.mixer import as_mixer, width_of
from seqlab.module import Params, Static, merge, split
from seqlab.shapes import accumulator
from seqlab.state import Mixer, State, put_rows, state_bytes, take_rows

# Relative to the largest magnitude of what is compared. bfloat16 keeps 8 bits: chunks round their
# intermediates at other places than the whole does, a few units of 2^-8 through a block.
BOUNDS = {"float64": 1e-10, "float32": 2e-5, "bfloat16": 4e-2}
GRADIENT_SLACK = 5  # a gradient sums over all steps


@dataclasses.dataclass(frozen=True)
class Check:
    """One comparison: `error` relative to scale against `bound`; `passed` is None where the mixer exempts
    itself, `note` says why."""

    clause: str
    what: str
    passed: bool | None
    error: float = 0.0
    bound: float = 0.0
    note: str = ""

    def __str__(self) -> str:
        mark = {True: "pass", False: "FAIL", None: "-"}[self.passed]
        figures = (
            ""
            if self.passed is None
            else f"{self.error:9.1e} <= {self.bound:.0e}"
            if self.bound
            else f"{self.error:9.1e} exact"
        )
        return f"  {self.clause}  {self.what:<52} {mark:<5}{figures}{'  ' + self.note if self.note else ''}"


@dataclasses.dataclass(frozen=True)
class Report:
    """What `verify_streaming` found. True where every check passed; prints as a table."""

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
        verdict = "obeys the law" if self.ok else "BREAKS THE LAW"
        head = f"{self.mixer} {verdict} ({self.dtype}, {self.length} steps, {self.state_bytes} bytes of state a row)"
        return "\n".join([head, *map(str, self.checks)])


@dataclasses.dataclass(frozen=True)
class Subject:
    """The mixer under test as a pure function, its inputs, and the bounds."""

    static: Static
    params: Params
    inputs: Array  # [b, t] tokens or [b, t, d]
    state: Callable[[int], State]
    bound: float
    lookahead: int
    exact: bool

    @functools.cached_property
    def apply(self) -> Callable[..., tuple[Array, State]]:
        static = self.static
        return jax.jit(lambda params, x, state, reset, valid: merge(static, params)(x, state, reset, valid))

    @functools.cached_property
    def gradients(self) -> Callable[..., tuple[Any, ...]]:
        """Of a random projection of outputs and final state, with respect to the parameters and, where they
        are real, the inputs."""

        def apply(params, x, state, reset, valid):
            return merge(self.static, params)(x, state, reset, valid)

        def loss(params, x, valid, lengths):
            y, state = _chain(apply, params, x, lengths, self.state(x.shape[0]), None, valid)
            y = jnp.where(valid.reshape(valid.shape + (1,) * (y.ndim - 2)), y, 0)
            return projected((y, state))

        return jax.jit(jax.grad(loss, argnums=(0, 1) if _real(self.inputs) else (0,)), static_argnums=3)

    def run(
        self,
        x: Array,
        lengths: Sequence[int] = (),
        reset: Array | None = None,
        valid: Array | None = None,
        state: State = None,
    ):
        """Outputs and final state of `x` in chunks of these lengths (one chunk by default), from a fresh
        state by default.

        Flags are always given, so that a chunk length costs one compilation, not one for each combination of
        flags.
        """
        reset = jnp.zeros(x.shape[:2], bool) if reset is None else reset
        valid = jnp.ones(x.shape[:2], bool) if valid is None else valid
        state = self.state(x.shape[0]) if state is None else state
        return _chain(self.apply, self.params, x, lengths or (x.shape[1],), state, reset, valid)


def verify_streaming(
    mixer: Mixer,
    *,
    inputs: Array | None = None,
    length: int = 29,
    batch: int = 3,
    dtype: str | None = None,
    gradients: bool = True,
    bound: float | None = None,
    seed: int = 0,
) -> Report:
    """Check the law on `mixer` and report.

    Args:
      mixer: anything with the protocol of `seqlab.Mixer`: a mixer of width `mixer.dim`, or a model of
        `mixer.vocab_size` tokens or of numbers in `mixer.inputs` channels.
      inputs: what to run it on, [b, t, d] or tokens [b, t] with b >= 2, t >= 12; random of `batch` and
        `length` by default. For a window W choose lengths beyond 3 W.
      dtype: "float32", "bfloat16" or "float64"; a model's own compute dtype by default.
      gradients: also compare gradients through the chain of chunks.
      bound: allowed error relative to scale; by default that of `BOUNDS` for the dtype.
    """
    dtype = dtype or as_mixer(mixer).dtype or "float32"
    if dtype not in BOUNDS:
        raise UserError(f"dtype must be one of {', '.join(BOUNDS)}, got {dtype!r}")
    # Accelerators may take float32 products in fewer bits by default, which is a property of theirs and not
    # of the mixer.
    with (
        jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext(),
        jax.default_matmul_precision("highest"),
    ):
        subject = subject_of(
            mixer, inputs, (batch, length), dtype, BOUNDS[dtype] if bound is None else bound, seed
        )
        checks: list[Check] = []
        if not as_mixer(mixer).causal:
            checks.append(
                Check("C1", "chunks = whole", None, note="declares causal = False: only rows are checked")
            )
            checks += _rows_of_whole(subject)
        elif (constant := _constant_state(subject)).passed:
            rng = np.random.default_rng(seed)
            checks += [
                constant,
                *_chunks(subject, rng, gradients),
                *_padding(subject, rng, gradients),
                *_resets(subject),
                *_rows(subject),
            ]
        else:
            checks.append(
                constant
            )  # a state that changes its shape cannot be threaded: nothing else can be asked
        checks.append(
            Check(
                "C5", "devices = one device", None, note="ask seqlab.verify_devices, where there are several"
            )
        )
        size = state_bytes(mixer, 1, subject.inputs.dtype if subject.inputs.ndim == 3 else dtype)
    checks.sort(key=lambda check: check.clause)
    return Report(type(mixer).__name__, dtype, subject.inputs.shape[1], size, tuple(checks))


def subject_of(
    mixer: Mixer, inputs: Array | None, shape: tuple[int, int], dtype: str, bound: float, seed: int
) -> Subject:
    static, params = split(mixer)
    if dtype == "float64":
        params = {
            name: jnp.asarray(leaf, jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
            for name, leaf in params.items()
        }
    if inputs is None:
        rng = np.random.default_rng(seed)
        if as_mixer(mixer).vocab_size is not None:
            inputs = jnp.asarray(rng.integers(0, mixer.vocab_size, shape), jnp.int32)
        else:
            inputs = jnp.asarray(rng.normal(size=(*shape, width_of(mixer))), dtype)
    if inputs.ndim not in (2, 3) or inputs.shape[0] < 2 or inputs.shape[1] < 12:
        raise UserError(
            f"inputs must be [b, t] tokens or [b, t, d] with b >= 2 and t >= 12, got shape {inputs.shape}"
        )
    state = functools.partial(mixer.init_state, dtype=dtype)
    return Subject(static, params, inputs, state, bound, as_mixer(mixer).lookahead, as_mixer(mixer).exact)


def _chain(apply, params, x, lengths, state, reset, valid):
    assert sum(lengths) == x.shape[1]
    outputs, start = [], 0
    for length in lengths:
        here = slice(start, start + length)
        flags = (None if flag is None else flag[:, here] for flag in (reset, valid))
        y, state = apply(params, x[:, here], state, *flags)
        outputs.append(y)
        start += length
    return jnp.concatenate(outputs, axis=1), state


def _cut(length: int) -> int:
    """Where a sequence is cut in two; the other checks reuse the two lengths, because every one is a
    compilation."""
    return length // 2 - 3


def _splits(length: int, rng: np.random.Generator) -> dict[str, tuple[int, ...]]:
    long = _cut(length)
    pieces = [long, *[1] * ((length - long) % 5), *[5] * ((length - long) // 5)]
    return {
        "two chunks": (long, length - long),
        "mixed chunks": tuple(int(piece) for piece in rng.permutation(pieces)),
        "step by step": (1,) * length,
    }


def _chunks(subject: Subject, rng: np.random.Generator, gradients: bool) -> list[Check]:
    x, n = subject.inputs, subject.lookahead
    time = x.shape[1]
    parallel, none = subject.apply(subject.params, x, None, None, None)
    plain, _ = subject.apply(subject.params, x, subject.state(x.shape[0]), None, None)
    whole, final = subject.run(x)
    checks = [
        compare(
            "C1",
            "streamed whole = parallel form" + f", {n} steps late" * bool(n),
            subject,
            whole[:, n:],
            parallel[:, : time - n],
        ),
        compare("C1", "reset and valid all idle = none given", subject, whole, plain),
        Check("C1", "no state in, no state out", none is None),
    ]
    splits = _splits(time, rng)
    for name, lengths in splits.items():
        y, state = subject.run(x, lengths)
        checks.append(compare("C1", f"{name} = whole: outputs", subject, y, whole))
        checks.append(compare("C1", f"{name} = whole: final state", subject, state, final))
    if gradients:
        valid = jnp.ones(x.shape[:2], bool)
        expected, actual = (
            subject.gradients(subject.params, x, valid, lengths)
            for lengths in ((time,), splits["two chunks"])
        )
        checks.append(
            compare("C1", "two chunks = whole: gradients", subject, actual, expected, GRADIENT_SLACK)
        )
    return checks


def projected(tree: Any) -> Array:
    """One number in which every number of `tree` counts, each with a random weight: what gradients are taken
    of."""
    real = [leaf for leaf in jax.tree.leaves(tree) if _real(leaf)]
    weights = [jax.random.normal(jax.random.key(i), leaf.shape) for i, leaf in enumerate(real)]
    return sum(
        jnp.sum(leaf.astype(accumulator(leaf.dtype)) * weight)
        for leaf, weight in zip(real, weights, strict=True)
    )


def _real(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _padding(subject: Subject, rng: np.random.Generator, gradients: bool) -> list[Check]:
    x, n = subject.inputs, subject.lookahead
    batch, time = x.shape[:2]
    lengths = np.asarray([time - _cut(time), _cut(time)])[np.arange(batch) % 2]  # ragged rows
    checks = []
    for side in ("right", "left"):
        first = np.zeros(batch, int) if side == "right" else time - lengths
        steps = np.arange(time)[None]
        valid = jnp.asarray((steps >= first[:, None]) & (steps < (first + lengths)[:, None]))
        padded = _fill(x, valid, rng)
        y, state = subject.run(padded, valid=valid)
        outputs, states = [], []
        for row in range(batch):
            here = slice(int(first[row]), int(first[row] + lengths[row]))
            alone, last = subject.run(x[row : row + 1, here])
            outputs.append((y[row : row + 1, here][:, n:], alone[:, n:]))
            states.append((take_rows(state, [row]), last))
        checks.append(
            compare(
                "C2",
                f"ragged rows padded with NaN on the {side}: outputs",
                subject,
                *zip(*outputs, strict=True),
            )
        )
        checks.append(
            compare(
                "C2", f"ragged rows padded with NaN on the {side}: state", subject, *zip(*states, strict=True)
            )
        )
    _, before = subject.run(x)
    _, after = subject.run(
        _fill(x, jnp.zeros((batch, time), bool), rng), valid=jnp.zeros((batch, time), bool), state=before
    )
    checks.append(_identical("C2", "a chunk of padding leaves the state bit-identical", after, before))
    if gradients:
        valid = jnp.asarray(np.arange(time)[None] < lengths[:, None])
        blank = jnp.where(valid.reshape(valid.shape + (1,) * (x.ndim - 2)), x, 0)
        clean, dirty = (
            subject.gradients(subject.params, y, valid, (time,)) for y in (blank, _fill(x, valid, rng))
        )
        checks.append(
            compare("C2", "NaN in the padding leaves gradients alone", subject, dirty, clean, GRADIENT_SLACK)
        )
    return checks


def _fill(x: Array, valid: Array, rng: np.random.Generator) -> Array:
    """`x` with rubbish where steps are invalid: NaN, or other tokens."""
    if _real(x):
        return jnp.where(valid[..., None], x, jnp.nan)
    return jnp.where(valid, x, jnp.asarray(rng.permutation(np.asarray(x).ravel()).reshape(x.shape)))


def _resets(subject: Subject) -> list[Check]:
    x, n = subject.inputs, subject.lookahead
    if n:
        return [
            Check(
                "C3",
                "packed documents = separate documents",
                None,
                note=f"looks {n} steps ahead: a reset would cut its delay line",
            )
        ]
    batch, time = x.shape[:2]
    at = _cut(time)
    flags = np.zeros((batch, time), bool)
    flags[:, at] = True
    packed, final = subject.run(x, reset=jnp.asarray(flags))
    first, _ = subject.run(x[:, :at])
    second, last = subject.run(x[:, at:])
    checks = [
        compare(
            "C3",
            "packed documents = separate documents: outputs",
            subject,
            packed,
            jnp.concatenate([first, second], axis=1),
        ),
        compare("C3", "packed documents = separate documents: state", subject, final, last),
    ]
    _, used = subject.run(x)
    again, state = subject.run(
        x[:, at:], reset=jnp.asarray(np.arange(time - at)[None] == 0).repeat(batch, 0), state=used
    )
    checks.append(
        compare("C3", "reset of a used state = a fresh state", subject, (again, state), (second, last))
    )
    return checks


def _constant_state(subject: Subject) -> Check:
    def shapes(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), tree)

    x = subject.inputs
    fresh = jax.eval_shape(lambda: subject.state(x.shape[0]))
    _, used = jax.eval_shape(subject.apply, subject.params, x, fresh, None, None)
    same = shapes(fresh) == shapes(used)
    return Check(
        "C4",
        "the state keeps its shapes and dtypes",
        same,
        note="" if same else f"{shapes(fresh)} became {shapes(used)}",
    )


def _rows(subject: Subject) -> list[Check]:
    x = subject.inputs
    batch, time = x.shape[:2]
    half = _cut(time)
    _, state = subject.run(x[:, :half])
    rest, final = subject.run(x[:, half:], state=state)
    order = list(range(batch))[::-1]
    turned = subject.run(x[jnp.asarray(order), half:], state=take_rows(state, order))
    expected = (rest[jnp.asarray(order)], take_rows(final, order))
    alone = subject.run(x[1:2, half:], state=take_rows(state, [1]))
    swapped, _ = subject.run(
        x[:, half:].at[0].set(x[1, half:]), state=put_rows(state, [0], take_rows(state, [1]))
    )
    return [
        compare("C6", "rows in another order: outputs and state", subject, turned, expected),
        compare(
            "C6", "a row taken out = the row in its batch", subject, alone, (rest[1:2], take_rows(final, [1]))
        ),
        _identical("C6", "a row replaced leaves its neighbours bit-identical", swapped[1:], rest[1:]),
        compare("C6", "a forked row continues as the original", subject, swapped[:1], rest[1:2]),
    ]


def _rows_of_whole(subject: Subject) -> list[Check]:
    x = subject.inputs
    y, _ = subject.apply(subject.params, x, None, None, None)
    alone, _ = subject.apply(subject.params, x[1:2], None, None, None)
    return [compare("C6", "a row alone = the row in its batch", subject, alone, y[1:2])]


def compare(
    clause: str, what: str, subject: Subject, actual: Any, expected: Any, slack: float = 1.0
) -> Check:
    """Largest error over the leaves, each relative to its own scale; integers must be equal."""
    if not subject.exact and clause == "C1":
        return Check(clause, what, None, note="declares exact = False")
    worst, where = 0.0, ""
    for (path, e), a in zip(
        jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(actual), strict=True
    ):
        if not _real(e):
            error = 0.0 if jnp.array_equal(a, e) else float("inf")
        elif not e.size:
            continue
        else:
            a64, e64 = np.asarray(a).astype(np.float64), np.asarray(e).astype(np.float64)
            error = np.abs(a64 - e64).max() / max(np.abs(e64).max(), 1e-6)
            error = float("inf") if np.isnan(error) else float(error)
        if error > worst:
            worst, where = error, jax.tree_util.keystr(path)
    bound = subject.bound * slack
    return Check(
        clause, what, worst <= bound, worst, bound, "" if worst <= bound else f"at {where or 'output'}"
    )


def _identical(clause: str, what: str, actual: Any, expected: Any) -> Check:
    different = [
        jax.tree_util.keystr(path)
        for (path, e), a in zip(
            jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(actual), strict=True
        )
        if not np.array_equal(np.asarray(a), np.asarray(e))
    ]
    return Check(
        clause,
        what,
        not different,
        float(len(different)),
        0.0,
        f"changed: {', '.join(different)}" if different else "",
    )
