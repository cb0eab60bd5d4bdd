"""Every product of a retention, a storage and a selection: its definition written down query by query, and
the streaming contract."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import assert_close, random
from test_cache import turned

from seqlab import verify_streaming
from seqlab.models import Attention
from seqlab.models.cache import Blocks, Exact, Scores, parse_cache
from seqlab.models.layers import rotate

LENGTH, SLOTS = 45, 48
RETENTIONS = (f"full({SLOTS})", "window(16)", "sinks(2)+window(16)", "sinks(2)+window(16)+absolute")
STORAGES = ("", "int4(group=4, residual=8)", "int8(group=2, residual=4, values=2)")
SELECTIONS = ("", "moba(4, 2)", "moba(8, 2)")


def words(*parts):
    return "+".join(filter(None, parts))


PRODUCTS = [words(*parts) for parts in itertools.product(RETENTIONS, STORAGES, SELECTIONS)]
PRODUCTS += [
    words("sinks(4)+full(52)", storage, selection) for storage in STORAGES for selection in SELECTIONS
][1:]
PRODUCTS += ["full(8)+grows+int4(group=4, residual=8)+moba(4, 2)"]
QUICK = ("sinks(2)+window(16)+int4(group=4, residual=8)+moba(4, 2)",)
ALL = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PRODUCTS]


def quantized(x, bits):
    """Numbers [n, ...] that share a scale and a least value along the first axis, as their codes give them
    back."""
    least, scale = x.min(0), (x.max(0) - x.min(0)) / (2**bits - 1)
    scale = np.where(scale > 0, scale, 1)
    return np.round((x - least) / scale) * scale + least


def coded(storage, k, v):
    """Keys [t, g, k] behind the sinks as coded over steps, values as coded over channels."""
    t, group = len(k), storage.group
    keys = np.concatenate([quantized(k[i : i + group], storage.bits) for i in range(0, t, group)])
    parts = np.moveaxis(v.reshape(*v.shape[:2], -1, group), -1, 0)
    return keys, np.moveaxis(quantized(parts, storage.v_bits), 0, -1).reshape(v.shape)


def defined(policy, q, k, v):
    """The definition in float64: unturned [t, h, k], [t, g, k], [t, g, v] -> [t, h, v]."""
    kept, storage, selection = policy.retention, policy.storage, policy.selection
    (t, h, width), g, sinks = q.shape, k.shape[1], kept.sinks
    k = np.stack([turned(x, i) for i, x in enumerate(k)])
    keys, values = (k, v) if storage == Exact() else coded(storage, k[sinks:], v[sinks:])
    keys, values = (np.concatenate([x[:sinks], y[-t + sinks :]]) for x, y in ((k, keys), (v, values)))
    out = np.zeros((t, h, v.shape[2]))
    for i, head in np.ndindex(t, h):
        u, group, query = i - sinks, head * g // h, turned(q[i], i)[head]
        first = 0 if kept.ends else max(0, u - kept.ring + 1)
        seen = list(range(first, u + 1))
        if isinstance(selection, Blocks):
            size, own = selection.block, u // selection.block
            first = 0 if kept.ends else max(0, (own - kept.ring // size + 1) * size)
            behind = k[sinks:, group]
            likes = {m: query @ behind[m * size : (m + 1) * size].mean(0) for m in range(first // size, own)}
            chosen = [own, *sorted(likes, key=likes.get)[::-1][: selection.top_k - 1]]
            seen = [j for j in range(u + 1) if j // size in chosen]
        near = (
            seen if storage == Exact() else [j for j in seen if j >= u // storage.residual * storage.residual]
        )
        close = seen if storage == Exact() else [j for j in seen if j >= u - storage.residual]
        some_k = [k[sinks + j, group] if j in near else keys[sinks + j, group] for j in seen]
        some_v = [v[sinks + j, group] if j in close else values[sinks + j, group] for j in seen]
        first_ones = range(min(sinks, i + 1))
        place = min(i, sinks + u - first) if kept.in_cache else i
        at_sinks = turned(q[i], place)[head]
        logits = [at_sinks @ k[j, group] for j in first_ones] + [query @ key for key in some_k]
        weights = np.exp(np.array(logits) / np.sqrt(width))
        out[i, head] = weights / weights.sum() @ np.array([*v[: len(first_ones), group], *some_v])
    return out


@pytest.mark.parametrize("spec", ALL)
def test_a_product_is_what_its_parts_say(spec):
    """Whole, in chunks, and step by step, in rings that are wrapped."""
    policy = parse_cache(spec)
    assert parse_cache(str(policy)) == policy
    q, k, v = random(0, 1, LENGTH, 4, 8), random(1, 1, LENGTH, 2, 8), random(2, 1, LENGTH, 2, 16)
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        q, k, v = (jnp.asarray(x, jnp.float64) for x in (q, k, v))
        expected = defined(policy, *(np.asarray(x[0]) for x in (q, k, v)))[None]
        scores = Scores(functools.partial(rotate, base=10_000.0))

        @jax.jit
        def call(q, k, v, state=None):
            return policy(q, k, v, state, None, None, scores)

        if spec not in QUICK:
            assert_close(call(q, k, v)[0], expected, 2e-6, "whole")
        for chunk in (15, 1):
            state, outputs = policy.init_state(1, 2, 8, jnp.float64, v_width=16), []
            for begin in range(0, LENGTH, chunk):
                here = slice(begin, begin + chunk)
                state = policy.with_room(state, min(begin + chunk, LENGTH)) if "grows" in spec else state
                out, _, state = call(q[:, here], k[:, here], v[:, here], state)
                outputs.append(out)
            assert_close(jnp.concatenate(outputs, axis=1), expected, 2e-6, f"chunks of {chunk}")


@pytest.mark.slow
@pytest.mark.parametrize("spec", PRODUCTS)
def test_a_product_obeys_the_contract(spec):
    """Chunks, steps, padding, resets with what is not finite, empty chunks and rows."""
    spec = spec.replace("full(8)", "full(48)")
    mixer = Attention(16, heads=4, kv_heads=2, head_dim=8, v_head_dim=16, cache=spec, rngs=nnx.Rngs(0))
    verify_streaming(mixer, length=41, dtype="float64", gradients=False).raise_for_failure()


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec", ["sinks(2)+window(24)+moba(8, 2)", "full(64)+int4(group=4, residual=32)+moba(8, 2)"]
)
def test_steps_of_blocks_that_are_taken_back_were_never_there(spec):
    mixer = Attention(16, heads=2, head_dim=8, cache=spec, rngs=nnx.Rngs(0))
    x, call = random(3, 2, 30, 16), jax.jit(lambda x, state=None, valid=None: mixer(x, state, None, valid))
    _, early = call(x[:, :13], mixer.init_state(2))
    _, late = call(x[:, 13:21], early)
    valid = jnp.arange(8) < jnp.asarray([[3], [0]])
    _, kept = call(x[:, 13:21], early, valid)
    back = mixer.rewind(late, jnp.asarray([5, 8]))
    assert_close(call(x[:, 21:], back)[0], call(x[:, 21:], kept)[0], 2e-5)
