"""Time split over the devices of the mesh axis `sequence` (clause C5 of the streaming contract): the same
function, with 1/N of the memory per device.

Models need no extra code. Under `jax.set_mesh(make_mesh(sequence=8))` arrays [b, t, ...] are global and
stored on the devices in equal segments of time. XLA places pointwise operations; operations that mix steps,
the kernels, call `split` with the work of one device. A segment of a linear recurrence is an affine map of
its state

    S -> M S + N            (M2, N2) after (M1, N1) = (M2 M1, M2 N1 + N2)

so the incoming state of every segment is computed from all earlier ones in log2 N rounds of messages, each of
the size of a state (`carried`; LASP, arXiv 2404.02882, sends it from device to device). A nonlinear
recurrence has no such map: the devices work one after the other (`relay`), which saves only memory. Softmax
attention sends its keys around a ring: see `kernels.attention`.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Bool

AXIS = "sequence"

_within_steps = jax.make_user_context(default_value=False)  # part of jax.jit's cache keys


def parts(time: int) -> int:
    """The number of segments of `time` steps: 1 outside a mesh with the axis, inside `split`, and for fewer
    steps than devices."""
    mesh = jax.sharding.get_abstract_mesh()
    if (
        _within_steps.value
        or mesh.empty
        or AXIS not in mesh.axis_names
        or mesh.axis_types[mesh.axis_names.index(AXIS)] != AxisType.Auto
    ):
        return 1
    devices = mesh.shape[AXIS]
    return devices if time >= devices else 1


@contextlib.contextmanager
def within_steps() -> Iterator[None]:
    """Within the block the second axis of arrays is not time, and nothing is split along it."""
    with _within_steps(True):
        yield


def split(
    function: Callable[[Any, Any], tuple[Any, Any]], timed: Any, whole: Any, multiple: int = 1
) -> tuple[Any, Any]:
    """`function(timed, whole)` -> (timed, whole) on every device, with its own segment of the timed arrays
    [b, t, ...] and all of the others.

    Segments have one length, a multiple of `multiple`; the end is padded with zeros (False: see `all_valid`),
    which are cropped from the results. Results in `whole` must be equal on all devices: see `of_last`.
    """
    time = jax.tree.leaves(timed)[0].shape[1]
    unit = parts(time) * multiple
    timed = jax.tree.map(
        lambda x: jnp.pad(x, ((0, 0), (0, -x.shape[1] % unit), *((0, 0),) * (x.ndim - 2))), timed
    )
    stretch, everywhere = PartitionSpec(None, AXIS), PartitionSpec()
    mapped = jax.shard_map(
        function, in_specs=(stretch, everywhere), out_specs=(stretch, everywhere), axis_names={AXIS}
    )
    timed, whole = jax.jit(mapped)(timed, whole)
    return jax.tree.map(lambda x: x[:, :time], timed), whole


def all_valid(
    valid: Bool[Array, "b t"] | None, shape: tuple[int, ...], multiple: int = 1
) -> Bool[Array, "b t"] | None:
    """`valid`, or flags that distinguish the steps [b, t] from the padding of `split`, if there is any."""
    return jnp.ones(shape[:2], bool) if valid is None and shape[1] % (parts(shape[1]) * multiple) else valid


# --- inside `split`


def place() -> Array:
    """The index of this segment."""
    return jax.lax.axis_index(AXIS)


def count() -> int:
    """The number of segments."""
    return jax.lax.axis_size(AXIS)


def shift(x: Any, by: int = 1, around: bool = False) -> Any:
    """The value of the device `by` segments earlier; zeros if there is none, unless `around`."""
    n = count()
    pairs = [(i, (i + by) % n) for i in range(n) if around or 0 <= i + by < n]
    return jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, AXIS, pairs), x)


def before(x: Any, after: Callable[[Any, Any], Any]) -> Any:
    """The exclusive scan over segments with an associative `after(later, earlier)`, in log2 N rounds; zeros
    on the first device."""
    distance = 1
    while distance < count() - 1:
        joined, enough = after(x, shift(x, distance)), place() >= distance
        x = jax.tree.map(functools.partial(jnp.where, enough), joined, x)
        distance *= 2
    return shift(x)


def of_last(x: Any) -> Any:
    """The value of the last device, on all devices."""
    last = place() == count() - 1
    return jax.tree.map(lambda leaf: jax.lax.psum(jnp.where(last, leaf, jnp.zeros((), leaf.dtype)), AXIS), x)


def continues(reset: Bool[Array, "b t"] | None, valid: Bool[Array, "b t"] | None) -> Bool[Array, " b"] | None:
    """Whether the sequence that enters a segment continues beyond it; None if nothing could end it."""
    if reset is None:
        return None
    return ~jnp.any(reset if valid is None else reset & valid, axis=1)


class Stretch(NamedTuple):
    """The affine map of a segment of time: its final state from zero, its `map` M, and where it has one
    [b]."""

    end: Array
    map: Any
    goes_on: Array | None


def carried(
    stretch: Stretch,
    initial: Array | None,
    act: Callable[[Any, Array], Array] = jnp.multiply,
    compose: Callable[[Any, Any], Any] | None = None,
) -> Array:
    """The incoming state [b, ...] of this segment, with `initial` (default: zeros) for the first.

    `act(M, state)` applies a map, `compose(M2, M1)` composes two, `act` itself by default. A segment with map
    None forgets.
    """

    def kept(stretch: Stretch, state: Array) -> Array:
        if stretch.goes_on is not None:  # before the product, since a forgotten state may be NaN
            state = jnp.where(stretch.goes_on.reshape(-1, *(1,) * (state.ndim - 1)), state, 0)
        return act(stretch.map, state)

    def after(later: Stretch, earlier: Stretch) -> Stretch:
        goes_on = None if later.goes_on is None else later.goes_on & earlier.goes_on
        return Stretch(
            later.end + kept(later, earlier.end), (compose or act)(later.map, earlier.map), goes_on
        )

    first = place() == 0
    if stretch.map is None:
        start = shift(stretch.end)
    else:
        if initial is not None:
            stretch = stretch._replace(
                end=jnp.where(first, stretch.end + kept(stretch, initial), stretch.end)
            )
        start = before(stretch, after).end
    return start if initial is None else jnp.where(first, initial, start)


def relay(
    run: Callable[[Any, Any, Any], tuple[Any, Any]], state: Any, floats: Any, rest: Any
) -> tuple[Any, Any]:
    """`run(state, floats, rest)` -> (outputs, state) on one device after the other, each from the final state
    of the previous one.

    Floats and states are differentiated, `rest` is not. Returns the outputs of every segment and the state
    after the last.
    """
    state, floats = _varying((state, floats))
    outputs, end = _relay(run, state, floats, rest)
    return outputs, of_last(end)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _relay(run, state, floats, rest):
    return _relay_forward(run, state, floats, rest)[0]


def _relay_forward(run, state, floats, rest):
    # The rounds are unrolled: with several loops that send messages, jaxlib 0.10 on a CPU gave wrong numbers
    # or failed a check in rendezvous.h. Such loops may run concurrently, and all messages have one channel,
    # so they seem to be mixed up.
    here, start = place(), state

    def outcome(start, *_):
        return _varying(run(start, floats, rest))

    outputs, end = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(run, state, floats, rest)
    )
    outputs, end = _varying((outputs, end))
    for i in range(count()):
        outputs, end = jax.lax.cond(here == i, outcome, lambda _, *done: done, start, outputs, end)
        start = _chosen(here == i + 1, shift(end), start)
    return (outputs, end), (start, floats, rest)


def _relay_backward(run, residuals, cotangents):
    start, floats, rest = residuals
    d_outputs, d_end = cotangents
    here = place()

    def gradients(d_end):
        _, pull = jax.vjp(lambda start, floats: _varying(run(start, floats, rest)), start, floats)
        return pull((d_outputs, d_end))

    nothing = d_start, d_floats = jax.tree.map(jnp.zeros_like, (start, floats))
    for i in reversed(range(count())):
        d_start, d_floats = jax.lax.cond(
            here == i, lambda d_end, *_: gradients(d_end), lambda _, *done: done, d_end, d_start, d_floats
        )
        received = jax.tree.map(jnp.add, d_end, shift(d_start, -1))
        d_end = _chosen(here == i - 1, received, d_end)
    return _chosen(here == 0, d_start, nothing[0]), d_floats, None


_relay.defvjp(_relay_forward, _relay_backward)


def _varying(tree: Any) -> Any:
    """Mark a tree as varying over devices, as required for the carries of loops over segments and for their
    gradients."""
    zero = 0 * place()
    return jax.tree.map(lambda leaf: leaf + zero.astype(leaf.dtype), tree)


def _chosen(flag: Array, new: Any, old: Any) -> Any:
    return jax.tree.map(functools.partial(jnp.where, flag), new, old)


# --- running counts


def running_sum(x: Array) -> Array:
    """`jnp.cumsum` of x [b, t] along time, in int32."""
    return _running(lambda x: jnp.cumsum(x, axis=1, dtype=jnp.int32), jnp.add, x)


def running_max(x: Array) -> Array:
    """The running maximum of x [b, t]."""
    return _running(functools.partial(jax.lax.cummax, axis=1), jnp.maximum, x)


def _running(local: Callable[[Array], Array], join: Callable[[Array, Array], Array], x: Array) -> Array:
    if parts(x.shape[1]) == 1:
        return local(x)

    def stretch(x, _):
        y = local(x)
        return jnp.where(place() == 0, y, join(y, before(y[:, -1], join)[:, None])), ()

    return split(stretch, x, ())[0]
