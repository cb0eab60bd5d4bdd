"""Shapes for tests and benchmarks, as plain data."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from seqlab.kernels.blocks import ANY, WIDEST, Table, everywhere
from seqlab.kernels.facts import Facts, Sample, heads


class Spec(NamedTuple):
    """One call of `linear_attention`: v has h heads, q and k have g, or h where it is 0.

    `decay` is None, "constant" (the retention of RetNet), "head" or "channel"; `beta` None, "head" or
    "value". A step decays by about exp(-strength), and if `sudden` is not 0 some steps (or channels of steps)
    by exp(-sudden).
    """

    b: int
    t: int
    h: int
    k: int
    v: int
    g: int = 0
    decay: str | None = None
    beta: str | None = None
    chunk: int | None = None
    reset: bool = False
    valid: bool = False
    strength: float = 0.1
    sudden: float = 0.0
    dtype: str = "float32"


SPECS = {
    # every kind, in chunks of which the last is incomplete
    "linear": Spec(2, 29, 3, 8, 6, chunk=8),
    "retention": Spec(2, 29, 3, 8, 6, decay="constant", chunk=8),
    "head_decay": Spec(2, 29, 3, 8, 6, decay="head", chunk=8),
    "channel_decay": Spec(2, 29, 3, 8, 6, decay="channel", chunk=8, strength=4.0),
    "delta": Spec(2, 29, 3, 8, 6, beta="head", chunk=8),
    "gated_delta": Spec(2, 29, 3, 8, 6, decay="head", beta="head", chunk=8),
    "channel_delta": Spec(2, 29, 3, 8, 6, decay="channel", beta="head", chunk=8),
    "value_delta": Spec(2, 21, 2, 8, 6, decay="head", beta="value", chunk=8),
    # shapes
    "groups": Spec(2, 19, 6, 5, 4, g=2, decay="head", chunk=16),
    "one_group": Spec(2, 19, 4, 8, 4, g=1, decay="channel", beta="head", chunk=16),
    "one_step": Spec(3, 1, 4, 8, 6, g=2, decay="channel", beta="head", reset=True, valid=True),
    "shorter_than_a_chunk": Spec(2, 5, 2, 8, 6, decay="head", beta="head"),
    "one_channel_in_chunks_of_one": Spec(2, 5, 2, 1, 1, decay="channel", beta="head", chunk=1),
    "default_chunk": Spec(1, 150, 1, 8, 6, decay="head"),
    # sequences
    "resets": Spec(3, 37, 2, 8, 6, decay="channel", chunk=16, reset=True),
    "resets_masked": Spec(3, 37, 2, 8, 6, decay="head", beta="head", chunk=16, reset=True, valid=True),
    "resets_masked_plain": Spec(3, 37, 2, 8, 6, chunk=16, reset=True, valid=True),
    "resets_masked_value": Spec(
        3, 21, 2, 8, 6, decay="channel", beta="value", chunk=8, reset=True, valid=True
    ),
    # decays that would overflow, or lose all digits, as differences of sums over a chunk
    "strong_channel": Spec(2, 40, 2, 8, 6, decay="channel", chunk=32, strength=50.0),
    "sudden": Spec(2, 40, 2, 8, 6, decay="head", chunk=32, sudden=50.0),
    "sudden_channel": Spec(2, 40, 2, 8, 6, decay="channel", chunk=32, sudden=50.0),
    "abrupt": Spec(2, 40, 2, 8, 6, decay="head", beta="head", chunk=32, sudden=1e4),
    "abrupt_channel": Spec(2, 40, 2, 8, 6, decay="channel", beta="head", chunk=32, sudden=1e4),
    "bfloat16": Spec(
        2, 37, 4, 8, 6, g=2, decay="head", beta="head", chunk=16, reset=True, valid=True, dtype="bfloat16"
    ),
}

BENCHMARKS = {
    "linear": Spec(4, 2048, 4, 64, 64),
    "head_decay": Spec(4, 2048, 4, 64, 64, decay="head"),
    "channel_decay": Spec(4, 2048, 4, 64, 64, decay="channel"),
    "channel_decay_strong": Spec(4, 2048, 4, 64, 64, decay="channel", strength=5.0),
    "delta": Spec(4, 2048, 4, 64, 64, beta="head"),
    "gated_delta": Spec(4, 2048, 4, 64, 64, decay="head", beta="head"),
    "channel_delta": Spec(4, 2048, 4, 64, 64, decay="channel", beta="head"),
    "value_delta": Spec(4, 2048, 4, 64, 64, decay="head", beta="value"),
    "mamba2_130m_layer": Spec(1, 2048, 24, 128, 64, g=1, decay="head"),
    "decode": Spec(8, 1, 16, 128, 128, decay="head", beta="head"),
}

LARGE = {
    f"{name}_{width}": Spec(4, time, 16, width, width, decay=decay, beta=beta, dtype="bfloat16")
    for time, width in ((2048, 64), (4096, 128))
    for name, decay, beta in (
        ("head_decay", "head", None),
        ("channel_decay", "channel", None),
        ("delta", None, "head"),
        ("gated_delta", "head", "head"),
        ("channel_delta", "channel", "head"),
    )
}


def inputs(spec: Spec, seed: int = 0) -> dict[str, jax.Array | None]:
    """Random arguments of `linear_attention` by name; None where the spec has none. With beta the keys have
    unit length."""
    random, (b, t, h, k, v) = np.random.default_rng(seed), spec[:5]
    queries, keys = random.normal(size=(2, b, t, spec.g or h, k))
    if spec.beta:
        keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    decay = beta = None
    if spec.decay == "constant":
        decay = np.log1p(-(2.0 ** (-5 - np.arange(h))))
    elif spec.decay:
        decay = -spec.strength * random.gamma(
            2.0, 0.5, size=(b, t, h, k) if spec.decay == "channel" else (b, t, h)
        )
        if spec.sudden:
            decay = np.where(random.random(decay.shape) < 0.15, -spec.sudden, decay)
    if spec.beta:
        beta = random.uniform(0.0, 2.0, size=(b, t, h, v) if spec.beta == "value" else (b, t, h))
    cast = {"q": queries, "k": keys, "v": random.normal(size=(b, t, h, v)), "beta": beta}
    wide = {"decay": decay, "initial_state": random.normal(size=(b, h, k, v))}
    return {
        **{name: None if x is None else jnp.asarray(x, spec.dtype) for name, x in cast.items()},
        **{name: None if x is None else jnp.asarray(x, jnp.float32) for name, x in wide.items()},
        "reset": jnp.asarray(random.random((b, t)) < 0.15) if spec.reset else None,
        "valid": jnp.asarray(random.random((b, t)) < 0.7) if spec.valid else None,
    }


FACTS = Facts(
    lambda s: s.b * s.t * s.h * s.k * s.v * (8.0 if s.beta else 4.0),
    lambda s: (s.t, s.t),
    lambda s: s.b * s.t * s.h * s.k * s.v,
)


def _chunks(steps: int, values: int, warps: int, stages: int) -> dict[str, Any]:
    return {"steps": steps, "values": values, "warps": warps, "stages": stages}


# By kernel, bytes per number, and the largest width of an entry.
BLOCKS: Table = {
    # By kind: longer chunks cost more in the triangular solve and in channel decays than they save.
    "linear_attention/xla/plain": everywhere(chunk=64),
    "linear_attention/xla/delta": everywhere(chunk=32),
    "linear_attention/xla/channel": everywhere(chunk=32),
    "linear_attention/xla/value": everywhere(chunk=16),
    # Steps of a chunk, values of a program, whose state [k, values] is in registers.
    "linear_attention/triton_gpu/carry": {
        2: {64: _chunks(64, 64, 4, 2), 128: _chunks(64, 32, 4, 2), 256: _chunks(32, 16, 4, 1)},
        4: {64: _chunks(64, 32, 4, 1), 128: _chunks(32, 16, 8, 1)},
    },
    # Steps of a chunk and of a block, in which heads wider than the lanes leave less room: the vector memory
    # of a v4 has 16 MiB.
    **{
        f"linear_attention/pallas_tpu/{kind}": {
            ANY: {128: {"chunk": chunk, "steps": 512}, WIDEST: {"chunk": chunk, "steps": 128}}
        }
        for kind, chunk in (("plain", 128), ("delta", 64), ("channel", 64), ("value", 16))
    },
}


def _sample() -> Sample:
    return (heads(0), heads(1), heads(2)), {"decay": jax.nn.log_sigmoid(heads(3))}


# Small calls by the names of the ops, for `seqlab doctor`.
SAMPLES = {"linear_attention": _sample}
