"""Named calls of attention for tests and benchmarks, and random inputs for them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from seqlab.kernels.blocks import ANY, WIDEST, Table
from seqlab.kernels.facts import Facts, Sample, heads

_EMPTY = np.iinfo(np.int32).max  # the position of an empty slot of a cache: later than every query


@dataclasses.dataclass(frozen=True)
class Spec:
    """A call: sizes by axis, options, and the kind of its positions and segments.

    `places`: "default", none given. "packed", documents of uneven lengths one after another. "padded", rows
    of one document whose padding holds NaN. "ring", keys as a ring buffer of s slots holds them for the last
    t of `seen` steps. "shuffled", keys in random order.
    """

    b: int
    t: int
    s: int
    h: int = 1
    g: int = 1
    k: int = 8
    v: int = 8
    causal: bool = True
    window: int | tuple[int | None, int | None] | None = None
    sinks: int = 0
    softcap: float | None = None
    scale: float | None = None
    sink_logits: bool = False
    alibi: bool = False
    places: str = "default"
    seen: int = 0

    @property
    def options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("causal", "window", "sinks", "softcap", "scale")}


SPECS = {
    "one": Spec(1, 1, 1),
    "grouped_odd": Spec(2, 37, 37, h=6, g=2, k=5, v=5),
    "one_kv_head": Spec(2, 19, 19, h=4),
    "wide_values": Spec(2, 21, 21, h=2, g=2, k=4, v=11),
    "narrow_values": Spec(1, 21, 21, h=2, g=1, k=12, v=3),
    "tiled": Spec(1, 200, 200, h=2),
    "tiled_offset": Spec(1, 150, 261, h=2),
    "offset": Spec(2, 5, 23, h=4, g=2),
    "more_queries_than_keys": Spec(2, 9, 4, h=2),
    "decode": Spec(2, 1, 40, h=4, g=2),
    "decode_one_kv_head": Spec(2, 1, 33, h=4, k=6, v=10),
    "decode_window_sinks": Spec(2, 1, 40, h=4, g=4, window=7, sinks=2, sink_logits=True),
    "cross": Spec(2, 13, 29, h=4, g=2, causal=False),
    "cross_tiled": Spec(1, 190, 210, h=2, causal=False, sink_logits=True),
    "softcap_scale": Spec(2, 33, 33, h=2, softcap=2.0, scale=0.7),
    "sink_logits": Spec(2, 33, 33, h=4, g=2, sink_logits=True),
    "window_one": Spec(1, 9, 9, window=1),
    **{
        f"window_{name}": Spec(1, t, t, h=2, window=8)
        for name, t in (("less_one", 7), ("even", 8), ("one_more", 9), ("twice", 16))
    },
    "window_thrice": Spec(1, 29, 29, h=2, window=8),
    "window_tiled": Spec(1, 420, 420, h=2, window=50),
    "window_sinks": Spec(2, 40, 40, h=4, g=2, window=8, sinks=3),
    "window_sinks_tiled": Spec(1, 420, 420, h=2, window=50, sinks=5, softcap=3.0, sink_logits=True),
    "window_both": Spec(2, 30, 37, h=4, g=2, causal=False, window=(5, 3)),
    "window_left_open": Spec(2, 30, 30, h=2, causal=False, window=(None, 4)),
    "window_right_open": Spec(1, 30, 21, h=2, causal=False, window=(6, None), sinks=2),
    "window_both_tiled": Spec(1, 420, 400, h=2, causal=False, window=(60, 40), sinks=3, sink_logits=True),
    "window_both_padded": Spec(3, 26, 26, h=4, g=2, causal=False, window=(4, 7), sinks=1, places="padded"),
    "window_both_shuffled": Spec(2, 23, 23, h=2, causal=False, window=(6, 2), places="shuffled"),
    "alibi": Spec(2, 33, 33, h=4, g=2, alibi=True),
    "alibi_decode": Spec(2, 1, 40, h=4, g=2, alibi=True, window=30),
    "alibi_cross": Spec(2, 13, 29, h=2, causal=False, alibi=True, sink_logits=True),
    "alibi_tiled": Spec(
        1, 260, 300, h=4, g=2, window=150, sinks=3, softcap=2.0, sink_logits=True, alibi=True
    ),
    "alibi_padded": Spec(3, 26, 26, h=2, causal=False, window=(9, 5), alibi=True, places="padded"),
    "alibi_ring": Spec(2, 6, 24, h=2, window=16, alibi=True, places="ring", seen=41),
    "packed": Spec(3, 31, 31, h=4, g=2, places="packed"),
    "packed_tiled": Spec(2, 300, 300, h=2, window=40, sinks=2, places="packed"),
    "padded": Spec(3, 26, 26, h=4, g=2, places="padded"),
    "padded_tiled": Spec(2, 290, 290, h=2, sink_logits=True, places="padded"),
    "padded_cross": Spec(3, 12, 26, h=2, causal=False, places="padded"),
    "padded_decode": Spec(3, 1, 26, h=2, g=2, sink_logits=True, places="padded"),
    "ring": Spec(2, 1, 16, h=4, g=2, window=14, sinks=2, places="ring", seen=53),
    "ring_chunk": Spec(2, 6, 24, h=2, window=16, places="ring", seen=41),
    "ring_not_full": Spec(2, 1, 16, h=2, window=16, places="ring", seen=9),
    "shuffled": Spec(2, 23, 23, h=2, window=9, sinks=1, places="shuffled"),
    "shuffled_tiled": Spec(1, 260, 260, h=2, window=100, sinks=1, places="shuffled"),
}

BENCHMARKS = {
    "train_512": Spec(4, 512, 512, h=4, g=4, k=64, v=64),
    "train_2048": Spec(4, 2048, 2048, h=4, g=4, k=64, v=64),
    "train_2048_grouped": Spec(4, 2048, 2048, h=8, g=2, k=64, v=64),
    "train_2048_window": Spec(4, 2048, 2048, h=4, g=4, k=64, v=64, window=256),
    "train_8192": Spec(1, 8192, 8192, h=4, g=4, k=64, v=64),
    "decode_4096": Spec(1, 1, 4096, h=8, g=2, k=64, v=64),
    "decode_4096_batch": Spec(8, 1, 4096, h=8, g=8, k=64, v=64),
}

LARGE = {
    "train_2048_64": Spec(4, 2048, 2048, h=16, g=16, k=64, v=64),
    "train_4096_128": Spec(4, 4096, 4096, h=16, g=16, k=128, v=128),
    "train_4096_256": Spec(4, 4096, 4096, h=8, g=8, k=256, v=256),
    "train_16384_grouped": Spec(1, 16384, 16384, h=16, g=4, k=128, v=128),
    "decode_8k": Spec(1, 1, 8192, h=32, g=8, k=128, v=128),
    "decode_32k": Spec(8, 1, 32768, h=32, g=8, k=128, v=128),
    "decode_128k": Spec(1, 1, 131072, h=32, g=8, k=128, v=128),
}


def make(spec: Spec, seed: int = 0, dtype: jax.typing.DTypeLike = jnp.float32) -> dict[str, Any]:
    """The arguments of a call of `attention`, by name: random q, k, v, places and sink logits, and the
    options of `spec`."""
    rng = np.random.default_rng(seed)
    shapes = {
        "q": (spec.b, spec.t, spec.h, spec.k),
        "k": (spec.b, spec.s, spec.g, spec.k),
        "v": (spec.b, spec.s, spec.g, spec.v),
    }
    arrays = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    places = _PLACES[spec.places](spec, rng)
    if spec.places == "padded":
        for name, segments in (("q", "q_segments"), ("k", "kv_segments"), ("v", "kv_segments")):
            arrays[name][places[segments] == 0] = np.nan
    if spec.sink_logits:
        arrays["sink_logits"] = rng.normal(size=spec.h)
    if spec.alibi:
        arrays["alibi"] = rng.uniform(0.05, 0.6, size=(spec.b, spec.h))
    return {
        **{name: jnp.asarray(x, dtype) for name, x in arrays.items()},
        **{name: jnp.asarray(x, jnp.int32) for name, x in places.items()},
        **spec.options,
    }


def _default(spec: Spec, rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {}


def _packed(spec: Spec, rng: np.random.Generator) -> dict[str, np.ndarray]:
    starts = rng.random((spec.b, spec.t)) < 4 / spec.t
    starts[:, 0] = True
    segments = np.cumsum(starts, axis=1)
    origin = np.maximum.accumulate(np.where(starts, np.arange(spec.t), 0), axis=1)
    positions = np.arange(spec.t) - origin
    return {
        "q_positions": positions,
        "kv_positions": positions,
        "q_segments": segments,
        "kv_segments": segments,
    }


def _padded(spec: Spec, rng: np.random.Generator) -> dict[str, np.ndarray]:
    kv_segments = np.ones((spec.b, spec.s), int)
    for row in kv_segments:
        row[rng.random(spec.s) < 0.3] = 0
    kv_segments[0], kv_segments[-1, spec.s // 2 :] = 1, 0
    q_segments = kv_segments[:, spec.s - spec.t :].copy()
    return {"q_segments": q_segments, "kv_segments": kv_segments}


def _ring(spec: Spec, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The last s of `seen` steps as a ring buffer of s - sinks slots after the sinks stores them; unwritten
    slots are empty."""
    kv_positions = np.full((spec.b, spec.s), _EMPTY)
    for step in range(spec.seen):
        kv_positions[
            :, step if step < spec.sinks else spec.sinks + (step - spec.sinks) % (spec.s - spec.sinks)
        ] = step
    return {
        "q_positions": np.tile(np.arange(spec.seen - spec.t, spec.seen), (spec.b, 1)),
        "kv_positions": kv_positions,
    }


def _shuffled(spec: Spec, rng: np.random.Generator) -> dict[str, np.ndarray]:
    kv_positions = np.stack([rng.permutation(spec.s) for _ in range(spec.b)])
    return {
        "q_positions": np.tile(np.arange(spec.s - spec.t, spec.s), (spec.b, 1)),
        "kv_positions": kv_positions,
    }


_PLACES = {"default": _default, "packed": _packed, "padded": _padded, "ring": _ring, "shuffled": _shuffled}


def _pairs(s: Any) -> float:
    """Queries with the keys they see."""
    seen = s.s if s.window is None else min(s.s, s.window + s.sinks)
    return s.b * s.h * s.t * seen * (0.5 if s.causal and s.window is None and s.t == s.s else 1.0)


FACTS = Facts(
    lambda s: 2 * _pairs(s) * (s.k + s.v),
    lambda s: (s.s, s.t * s.h // s.g),
    lambda s: 4.0 * s.b * s.h * s.t * s.s,
)


def _tile(rows: int, keys: int, warps: int, stages: int, precision: str = "tf32x3") -> dict[str, Any]:
    return {"rows": rows, "keys": keys, "warps": warps, "stages": stages, "precision": precision}


# By kernel, bytes per number, and the largest width of an entry.
BLOCKS: Table = {
    # Rows and keys of a tile. Three products in TF32 are as good as one in float32; for wide heads in float32
    # the tensor cores need so many registers that plain arithmetic is left.
    "attention/triton_gpu/forward": {
        2: {64: _tile(128, 64, 4, 3), 128: _tile(128, 64, 8, 2), 256: _tile(64, 64, 8, 2)},
        4: {
            32: _tile(64, 64, 4, 2),
            64: _tile(128, 64, 8, 1),
            128: _tile(32, 16, 8, 1, "ieee"),
            256: _tile(32, 16, 8, 1, "ieee"),
        },
    },
    "attention/triton_gpu/backward_keys": {
        2: {64: _tile(64, 64, 4, 2), 128: _tile(32, 64, 8, 2), 256: _tile(64, 32, 8, 1)},
        4: {64: _tile(32, 32, 8, 1), 128: _tile(16, 16, 4, 1, "ieee"), 256: _tile(16, 16, 8, 1, "ieee")},
    },
    "attention/triton_gpu/backward_queries": {
        2: {64: _tile(64, 64, 4, 2), 128: _tile(64, 64, 8, 2), 256: _tile(32, 32, 8, 1)},
        4: {64: _tile(16, 32, 4, 1), 128: _tile(32, 16, 8, 1, "ieee"), 256: _tile(16, 16, 8, 1, "ieee")},
    },
    # Queries or keys: the logits of a tile take a MiB of float32, and a few of these fit beside everything
    # else.
    "attention/pallas_tpu/tile": {ANY: {128: {"tile": 512}, WIDEST: {"tile": 256}}},
}


def _sample() -> Sample:
    return (heads(0), heads(1), heads(2)), {}


# Small calls by the names of the ops, for `seqlab doctor`.
SAMPLES = {"attention": _sample}
