"""The causal forms of pooling and wavelets: their numbers. tests/test_streaming.py tests their contract."""

import jax
import numpy as np
from flax import nnx
from helpers import assert_close, random

from seqlab.models import CausalPooling, CausalWavelets


def test_pooling_is_the_mean_of_the_past():
    x = np.asarray(random(0, 2, 7, 3))
    expected = np.stack([x[:, max(t - 3, 0) : t + 1].mean(axis=1) - x[:, t] for t in range(7)], axis=1)
    assert_close(jax.jit(lambda x: CausalPooling(3, size=4)(x)[0])(x), expected, 1e-6)


def test_wavelets_are_halves_minus_halves():
    mixer, x = CausalWavelets(8, levels=3, rngs=nnx.Rngs(0)), random(0, 2, 11, 8)
    # Zeros before the beginning.
    u = np.pad(np.asarray(mixer.reduction(x), np.float64), [(0, 0), (8, 0), (0, 0)])
    bands = []
    for t in range(8, 19):
        here = [u[:, t - 7 : t + 1].sum(axis=1) / 8**0.5]
        for half in (1, 2, 4):
            newer, older = (
                u[:, t - half + 1 : t + 1].sum(axis=1),
                u[:, t - 2 * half + 1 : t - half + 1].sum(axis=1),
            )
            here.append((newer - older) / (2 * half) ** 0.5)
        bands.append(np.concatenate(here, axis=-1))
    z = np.stack(bands, axis=1) @ np.asarray(mixer.up.weight[...], np.float64) + np.asarray(
        mixer.up.bias[...], np.float64
    )
    y = np.asarray(jax.nn.gelu(z, approximate=False), np.float64) @ np.asarray(
        mixer.down.weight[...], np.float64
    )
    assert_close(jax.jit(lambda x: mixer(x)[0])(x), y + np.asarray(mixer.down.bias[...]), 1e-5)
