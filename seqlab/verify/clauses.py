"""The clauses of the contract, one function each: from the mixer under test to the checks of it."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.errors import TraceContextError
from jaxtyping import Array

from seqlab.mixer import State, as_mixer
from seqlab.module import split
from seqlab.state import put_rows, take_rows
from seqlab.verify.report import GRADIENT_SLACK, Check, compare, identical
from seqlab.verify.subject import Subject, is_real

_EXEMPT = "declares exact = False"


def chunks(subject: Subject, rng: np.random.Generator, gradients: bool) -> list[Check]:
    """C1: no split of a sequence changes anything; an empty chunk is a chunk."""
    x, n = subject.inputs, subject.lookahead
    time = x.shape[1]
    parallel, none = subject.apply(subject.params, x, None, None, None)
    plain, _ = subject.apply(subject.params, x, subject.state(x.shape[0]), None, None)
    whole, final = subject.run(x)
    late = f", {n} steps late" if n else ""
    restart = (
        "a call with several steps starts from a fresh state, or positions or windows count from the chunk"
    )
    checks = [
        _chunk_check(
            f"streamed whole = parallel form{late}",
            subject,
            whole[:, n:],
            parallel[:, : time - n],
            "the training form and the streaming form are two codes that differ in a border",
        ),
        _chunk_check("reset and valid all idle = none given", subject, whole, plain),
        Check("C1", "no state in, no state out", none is None, because="a state is returned in training"),
    ]
    splits = _splits(time, rng)
    for name, lengths in splits.items():
        y, state = subject.run(x, lengths)
        checks.append(_chunk_check(f"{name} = whole: outputs", subject, y, whole, restart))
        checks.append(_chunk_check(f"{name} = whole: final state", subject, state, final, restart))
    checks.append(_empty(subject, final))
    if gradients:
        valid = jnp.ones(x.shape[:2], bool)
        expected, actual = (
            subject.gradients(subject.params, x, valid, lengths)
            for lengths in ((time,), splits["two chunks"])
        )
        cut = "a stop_gradient or an integer cast cuts the state off"
        checks.append(
            _chunk_check("two chunks = whole: gradients", subject, actual, expected, cut, GRADIENT_SLACK)
        )
    return checks


def padding(subject: Subject, rng: np.random.Generator, gradients: bool) -> list[Check]:
    """C2: invalid steps neither change nor output anything."""
    x, n = subject.inputs, subject.lookahead
    batch, time = x.shape[:2]
    lengths = np.asarray([time - _cut(time), _cut(time)])[np.arange(batch) % 2]  # ragged rows
    leak = (
        "steps are multiplied by the mask (0 * NaN is NaN) where jnp.where or seqlab.state.mask_steps is "
        "needed"
    )
    moved = "the state decays, shifts or counts at invalid steps"
    checks, silent = [], []
    for side in ("right", "left"):
        first = np.zeros(batch, int) if side == "right" else time - lengths
        steps = np.arange(time)[None]
        valid = jnp.asarray((steps >= first[:, None]) & (steps < (first + lengths)[:, None]))
        y, state = subject.run(_fill(x, valid, rng), valid=valid)
        silent.append(jnp.where(_wide(valid, y), 0, y))
        outputs, states = [], []
        for row in range(batch):
            here = slice(int(first[row]), int(first[row] + lengths[row]))
            alone, last = subject.run(x[row : row + 1, here])
            outputs.append((y[row : row + 1, here][:, n:], alone[:, n:]))
            states.append((take_rows(state, [row]), last))
        name = f"ragged rows padded with NaN on the {side}"
        checks.append(compare("C2", f"{name}: outputs", *zip(*outputs, strict=True), subject.bound, leak))
        checks.append(compare("C2", f"{name}: state", *zip(*states, strict=True), subject.bound, moved))
    zeros = [jnp.zeros_like(y) for y in silent]
    because = "the output is not masked: end with seqlab.state.mask_steps(y, valid)"
    checks.append(compare("C2", "outputs at padding are 0", silent, zeros, 0.0, because))
    _, before = subject.run(x)
    nothing = jnp.zeros((batch, time), bool)
    for name, start in (("the state", before), ("a state that holds NaN", _poisoned(before))):
        _, after = subject.run(_fill(x, nothing, rng), valid=nothing, state=start)
        checks.append(identical("C2", f"a chunk of padding leaves {name} bit-identical", after, start, moved))
    if gradients:
        valid = jnp.asarray(np.arange(time)[None] < lengths[:, None])
        blank = jnp.where(_wide(valid, x), x, 0)
        clean, dirty = (
            subject.gradients(subject.params, y, valid, (time,)) for y in (blank, _fill(x, valid, rng))
        )
        because = "NaN is removed after it was used: its gradient is 0 * NaN"
        name, bound = "NaN in the padding leaves gradients alone", subject.bound * GRADIENT_SLACK
        checks.append(compare("C2", name, dirty, clean, bound, because))
    return checks


def resets(subject: Subject) -> list[Check]:
    """C3: a reset starts a fresh sequence, whatever was before."""
    x, n = subject.inputs, subject.lookahead
    batch, time = x.shape[:2]
    at = _cut(time)
    second, last = subject.run(x[:, at:])
    again = jnp.asarray(np.arange(time - at)[None] == 0).repeat(batch, 0)
    _, used = subject.run(x)
    kept = "something of the state is not reset: a position, a convolution's last steps, a count"
    held = "the old state is multiplied by 0 (0 * NaN is NaN) where jnp.where is needed"
    checks = []
    for name, start, because in (("used", used, kept), ("broken (NaN)", _poisoned(used), held)):
        y, state = subject.run(x[:, at:], reset=again, state=start)
        what = f"reset of a {name} state = a fresh state"
        checks.append(compare("C3", what, (y[:, n:], state), (second[:, n:], last), subject.bound, because))
    if n:
        note = f"looks {n} steps ahead: a reset would cut its delay line"
        return [*checks, Check("C3", "packed documents = separate documents", None, note=note)]
    flags = jnp.asarray(np.arange(time)[None] == at).repeat(batch, 0)
    first, _ = subject.run(x[:, :at])
    packed, final = subject.run(x, reset=flags)
    joined = jnp.concatenate([first, second], axis=1)
    what = "packed documents = separate documents"
    checks.append(compare("C3", f"{what}: outputs", packed, joined, subject.bound, kept))
    checks.append(compare("C3", f"{what}: state", final, last, subject.bound, kept))
    return [*checks, *_broken_documents(subject, at, flags, (second, last))]


def constant_state(subject: Subject) -> Check:
    """C4: shapes and dtypes of the state stay."""

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
        because="keys are concatenated to it, or a product promoted its dtype",
    )


def rows(subject: Subject) -> list[Check]:
    """C6: a row neither sees nor touches its neighbours."""
    x = subject.inputs
    batch, time = x.shape[:2]
    half = _cut(time)
    _, state = subject.run(x[:, :half])
    rest, final = subject.run(x[:, half:], state=state)
    order = list(range(batch))[::-1]
    turned = subject.run(x[jnp.asarray(order), half:], state=take_rows(state, order))
    expected = (rest[jnp.asarray(order)], take_rows(final, order))
    alone = subject.run(x[1:2, half:], state=take_rows(state, [1]))
    there = (rest[1:2], take_rows(final, [1]))
    moved = put_rows(state, [0], take_rows(state, [1]))
    swapped, _ = subject.run(x[:, half:].at[0].set(x[1, half:]), state=moved)
    bound, mixed = subject.bound, "something is taken over the batch: a norm, a maximum, a count of steps"
    kept = "a row replaced leaves its neighbours bit-identical"
    return [
        compare("C6", "rows in another order: outputs and state", turned, expected, bound, mixed),
        compare("C6", "a row taken out = the row in its batch", alone, there, bound, mixed),
        identical("C6", kept, swapped[1:], rest[1:], mixed),
        compare("C6", "a forked row continues as the original", swapped[:1], rest[1:2], bound, mixed),
    ]


def rows_of_whole(subject: Subject) -> list[Check]:
    """C6 of a mixer that is not causal."""
    x = subject.inputs
    y, _ = subject.apply(subject.params, x, None, None, None)
    alone, _ = subject.apply(subject.params, x[1:2], None, None, None)
    return [compare("C6", "a row alone = the row in its batch", alone, y[1:2], subject.bound)]


def hidden_state(subject: Subject) -> list[Check]:
    """C7: two equal calls are the same function of the same arrays, and a fresh state is memory of its
    own."""
    because = "state is kept on the module: make it an argument and a result"
    what = "a call changes nothing on the module"
    mixer, x = subject.mixer(), subject.inputs
    state = subject.state(x.shape[0])
    before = split(mixer)
    try:
        programs = [_program(mixer, x, state if as_mixer(mixer).causal else None) for _ in range(2)]
        changed = _changed(before, split(mixer))
    except (TraceContextError, jax.errors.UnexpectedTracerError) as error:
        first = str(error).partition("\n")[0][:100]
        return [Check("C7", what, False, float("inf"), note=first, because=because)]
    if not changed and programs[0] != programs[1]:
        changed = ["the second call is another program than the first"]
    note = f"changed: {', '.join(changed[:3])}" if changed else ""
    return [
        Check("C7", what, not changed, float(len(changed)), note=note, because=because),
        _own_buffers(subject, state),
    ]


def _program(mixer: Any, x: Array, state: State) -> str:
    # New functions each time: JAX would hand out its trace of the first call.
    traced = jax.make_jaxpr(lambda x, state: mixer(x, state))(x, state)
    return re.sub(r"\b0x[0-9a-f]+|\bid=\d+", "", str(traced))


def _changed(before: Any, after: Any) -> list[str]:
    """The names of arrays that are other arrays than before, and a word for all else."""
    (static, arrays), (static_after, arrays_after) = before, after
    names = [
        name
        for name, leaf in arrays_after.items()
        if name not in static.names or not _same(leaf, arrays[name])
    ]
    return names or ([] if static == static_after else ["attributes of the module"])


def _same(leaf: Any, other: Any) -> bool:
    concrete = not isinstance(leaf, jax.core.Tracer)
    return leaf is other or (concrete and np.asarray(leaf).tobytes() == np.asarray(other).tobytes())


def _own_buffers(subject: Subject, state: State) -> Check:
    """Donating a fresh state must destroy nothing else."""
    what, seen, shared = "leaves of a fresh state share no memory", {}, []
    own = {f"parameter {name}": leaf for name, leaf in (subject.params | subject.constants).items()}
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
    for name, leaf in (own | leaves).items():
        if leaf.size and len(leaf.devices()) == 1:
            place = leaf.unsafe_buffer_pointer()
            shared += [f"{seen[place]} and {name}"] if place in seen and name in leaves else []
            seen[place] = name
    because = "one array stands in several places of the state: make each by a call of its own"
    note = ", ".join(shared[:3])
    return Check("C7", what, not shared, float(len(shared)), note=note, because=because)


def _chunk_check(
    what: str, subject: Subject, actual: Any, expected: Any, because: str = "", slack: float = 1.0
) -> Check:
    """A comparison of C1, from which approximations exempt themselves."""
    if not subject.exact:
        return Check("C1", what, None, note=_EXEMPT)
    return compare("C1", what, actual, expected, subject.bound * slack, because)


def _splits(length: int, rng: np.random.Generator) -> dict[str, tuple[int, ...]]:
    long = _cut(length)
    pieces = [long, *[1] * ((length - long) % 5), *[5] * ((length - long) // 5)]
    return {
        "two chunks": (long, length - long),
        "mixed chunks": tuple(int(piece) for piece in rng.permutation(pieces)),
        "step by step": (1,) * length,
    }


def _cut(length: int) -> int:
    """The length of the first of two parts; other checks reuse the two lengths, since each requires a
    compilation."""
    return length // 2 - 3


def _empty(subject: Subject, state: State) -> Check:
    """A chunk of no steps: no outputs, and the state as it was."""
    what, x = "a chunk of no steps changes nothing", subject.inputs
    because = "the last step is read where there is none"
    try:
        y, after = subject.run(x[:, :0], state=state)
    except (TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        first = str(error).partition("\n")[0][:100]
        return Check("C1", what, False, float("inf"), note=first, because=because)
    check = identical("C1", what, after, state, because)
    return check if y.shape[1] == 0 else Check("C1", what, False, note=f"outputs {y.shape}", because=because)


def _broken_documents(subject: Subject, at: int, flags: Array, expected: tuple[Array, State]) -> list[Check]:
    """A document after one that is not finite, on top of a state that is not, in every way to run them."""
    x, time = subject.inputs, subject.inputs.shape[1]
    broken = jnp.asarray([jnp.nan, jnp.inf, -jnp.inf])[np.arange(x.shape[0]) % 3]
    before = jnp.asarray(np.arange(time) < at)
    bad = jnp.where(before[None, :, None], broken[:, None, None].astype(x.dtype), x) if is_real(x) else x
    held = "what lies before the reset is multiplied by 0 (0 * NaN is NaN) where jnp.where is needed"
    checks, start = [], _poisoned(subject.run(x)[1])
    for name, lengths in (("one chunk", (time,)), ("step by step", (1,) * time)):
        y, state = subject.run(bad, lengths, reset=flags, state=start)
        what = f"a document after a broken one, {name}"
        checks.append(compare("C3", what, (y[:, at:], state), expected, subject.bound, held))
    y, _ = subject.apply(subject.params, bad, None, flags, None)
    what = "a document after a broken one, parallel form"
    return [*checks, compare("C3", what, y[:, at:], expected[0], subject.bound, held)]


def _poisoned(state: State) -> State:
    """`state` with NaN in every real number."""
    return jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan) if is_real(leaf) else leaf, state)


def _fill(x: Array, valid: Array, rng: np.random.Generator) -> Array:
    """`x` with rubbish where steps are invalid: NaN, or other tokens."""
    if is_real(x):
        return jnp.where(valid[..., None], x, jnp.nan)
    return jnp.where(valid, x, jnp.asarray(rng.permutation(np.asarray(x).ravel()).reshape(x.shape)))


def _wide(valid: Array, y: Array) -> Array:
    return valid.reshape(valid.shape + (1,) * (y.ndim - 2))
