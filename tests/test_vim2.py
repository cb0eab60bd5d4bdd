"""ViM2: the order of its scans, maps of any size, weights that belong to a resolution, sums inside a
stage."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import abstract, assert_close, random

from seqlab import merge, split
from seqlab.models import GroupedChannelMixer, SelectiveMixer
from seqlab.models.images import (
    Downsample,
    FourScans,
    ImageClassifier,
    InRows,
    ViM2Backbone,
    scan_orders,
    vim2,
)

partial = functools.partial


def test_a_map_of_one_row_is_scanned_twice_in_each_direction():
    assert scan_orders(2, 3).tolist() == [
        [0, 1, 2, 3, 4, 5],
        [0, 3, 1, 4, 2, 5],
        [5, 4, 3, 2, 1, 0],
        [5, 2, 4, 1, 3, 0],
    ]
    mixer, x = FourScans(4, state_size=2, rngs=nnx.Rngs(0)), random(0, 2, 2, 3, 4)

    @jax.jit
    def by_orders(c):
        tokens, total = c.reshape(2, 6, -1), 0.0
        for direction, order in zip(mixer.directions, scan_orders(2, 3), strict=True):
            total = total + direction(tokens[:, order])[0][:, np.argsort(order)]
        return total.reshape(c.shape), sum(mixer._scanned(k, c) for k in range(4))

    assert_close(*by_orders(random(1, 2, 2, 3, 8)), 1e-5)
    far = jax.jit(jax.grad(lambda x: mixer.mix(x)[0, 0, 0].sum()))(x)
    assert (np.abs(np.asarray(far[0])).max(axis=-1) > 0).all(), "every place reaches every other"
    assert not np.asarray(far[1]).any()


def shape_of(model, images):
    static, params = split(model)
    y = jax.eval_shape(lambda params, images: merge(static, params)(images), params, images)
    return [part.shape for part in y] if isinstance(y, list) else y.shape


def test_channel_mixers_of_the_paper_belong_to_a_resolution_and_grouped_ones_do_not():
    stem = partial(Downsample, kernel=2, padding=0)
    build = partial(ViM2Backbone, (8, 16), (2, 1), stem=stem, token_mixer=partial(FourScans, state_size=2))
    fixed = abstract(partial(ImageClassifier, 3, partial(build, image=(8, 6)), norm=None))
    images = jax.ShapeDtypeStruct((2, 8, 6, 3), jnp.float32)
    assert shape_of(fixed, images) == (2, 3)
    assert [stage.channel_mixers[0].mixer.tokens for stage in fixed.backbone.stages] == [12, 2]
    with pytest.raises(ValueError, match="tokens=12"):
        shape_of(fixed, jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32))
    grouped = partial(InRows, mixer=partial(GroupedChannelMixer, mixer=partial(SelectiveMixer, state_size=2)))
    free = abstract(partial(build, image=None, channel_mixer=grouped))
    assert shape_of(free, jax.ShapeDtypeStruct((1, 12, 10, 3), jnp.float32)) == [(1, 6, 5, 8), (1, 3, 2, 16)]


def test_an_unknown_size_is_refused():
    with pytest.raises(ValueError, match="size: got 'l'"):
        vim2("l", rngs=nnx.Rngs(0))
