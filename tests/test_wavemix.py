"""WaveMix: published sizes, convolutions and transposed ones against JAX's own, maps of any size, statistics
in training."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import abstract, assert_close, random

from seqlab import merge, split
from seqlab.interop.convert import convert, published_names
from seqlab.kernels.dwt import dwt
from seqlab.models.images import (
    ImageToMap,
    ParallelWaveMixing,
    PatchStem,
    ShuffleWaveMixing,
    StridedStem,
    WaveMixing,
    wave_backbone,
    wavemix,
)
from seqlab.models.images.convolution import convolve, convolve_transposed
from seqlab.models.images.wavemix import packed
from seqlab.module import count_params, statistics_of
from seqlab.parallel.sharding import MeshSizes
from seqlab.train.placement import begin, place, spread
from seqlab.train.step import init_state, train_step

partial = functools.partial

STRIDED, LITE = partial(StridedStem, stride=1), partial(WaveMixing, levels=1)
PUBLISHED = {  # millions as the repository prints them
    "27.86": partial(wavemix, 1000, 192, 16),
    "12.49": partial(wavemix, 1000, 192, 16, mixer=LITE),
    "3.04": partial(wavemix, 10, 144, 7, mixer=LITE, stem=STRIDED),
    "17.07": partial(wavemix, 10, 320, 8, mixer=LITE, stem=STRIDED),
    "16.29": partial(wavemix, 200, 256, 12, mixer=LITE, stem=STRIDED),
    "28.45": partial(
        wavemix, 365, 256, 12, mixer=partial(WaveMixing, levels=2), stem=partial(PatchStem, patch=8)
    ),
}


@pytest.mark.parametrize("millions", PUBLISHED)
def test_the_parameters_of_published_models(millions):
    count = count_params(abstract(PUBLISHED[millions]))
    assert f"{count / 1e6:.2f}" == millions


def pulled(function, x, weight):
    """The value of a function of a map and filters, and its gradients for a cotangent that is always the
    same."""

    @jax.jit
    def run(x, weight):
        y, pull = jax.vjp(function, x, weight)
        return y, pull(random(2, *y.shape))

    return run(x, weight)


@pytest.mark.parametrize(
    "kernel, stride, padding, channels",
    [(3, 1, 1, (3, 5)), (3, 2, 1, (3, 5)), (7, 4, 2, (3, 4)), (3, 1, 0, (96, 96)), (3, 2, 1, (96, 96))],
)
def test_a_convolution_and_its_gradients_are_those_of_jax(kernel, stride, padding, channels):
    """Sides of 8 and 7: with a stride some places at the end are in no window, and others only with their
    beginning."""
    x, weight = random(0, 2, 8, 7, channels[0]), random(1, kernel, kernel, *channels)

    def plain(x, weight):
        return jax.lax.conv_general_dilated(
            x, weight, (stride,) * 2, ((padding,) * 2,) * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    assert_close(
        pulled(lambda x, weight: convolve(x, weight, stride, padding), x, weight),
        pulled(plain, x, weight),
        1e-5,
    )


@pytest.mark.parametrize(
    "kernel, stride, padding, channels",
    [
        (4, 2, 1, (3, 5)),
        (4, 2, 1, (96, 96)),
        (10, 8, 1, (3, 5)),
        (3, 2, 0, (3, 5)),
        (2, 3, 0, (3, 5)),
        (6, 2, 2, (3, 5)),
        (6, 4, 1, (96, 96)),
    ],
)
def test_a_transposed_convolution_is_the_pullback_of_a_convolution(kernel, stride, padding, channels):
    x, weight = random(0, 2, 4, 3, channels[0]), random(1, kernel, kernel, *channels)
    sides = ((n - 1) * stride - 2 * padding + kernel for n in (4, 3))
    zero = jnp.zeros((2, *sides, channels[1]))

    def conv(y, weight):
        names = ("NHWC", "HWOI", "NHWC")
        return jax.lax.conv_general_dilated(
            y, weight, (stride,) * 2, ((padding,) * 2,) * 2, dimension_numbers=names
        )

    def pullback(x, weight):
        return jax.vjp(lambda y: conv(y, weight), zero)[1](x)[0]

    assert_close(
        pulled(lambda x, weight: convolve_transposed(x, weight, stride, padding), x, weight),
        pulled(pullback, x, weight),
        1e-5,
    )


def test_maps_of_any_size_come_back_in_their_size():
    mixers = [partial(WaveMixing, levels=3), partial(ParallelWaveMixing, levels=2), ShuffleWaveMixing]
    for mixer in mixers:
        module = mixer(8, rngs=nnx.Rngs(0))
        for size in ((8, 16), (7, 5), (1, 3)):
            assert jax.eval_shape(module.mix, jax.ShapeDtypeStruct((2, *size, 8), jnp.float32)).shape == (
                2,
                *size,
                8,
            )
    with pytest.raises(ValueError, match="multiple of 4"):
        WaveMixing(6, rngs=nnx.Rngs(0))


def test_the_third_version_shuffles_as_pytorch_does():
    """Channel 4 c + 2 p + q of a place is channel c of its cell's place (p, q)."""
    mixer, x = ShuffleWaveMixing(4, rngs=nnx.Rngs(0)), random(0, 1, 4, 4, 4)
    mixer.conv.weight[...] = jnp.zeros((3, 3, 4, 4)).at[1, 1].set(jnp.eye(4))
    mixer.conv.bias[...] = jnp.zeros((4,))
    low, (bands,) = dwt(mixer.reduction(x))
    inner = jax.nn.gelu(mixer.up(packed(low, bands)), approximate=False)
    y = np.asarray(mixer.mix(x)) * np.sqrt(1 + 1e-5)
    for c in range(4):
        for p in range(2):
            for q in range(2):
                assert_close(y[:, p::2, q::2, c], inner[..., 4 * c + 2 * p + q], 1e-5)


def small(head="classes", **options):
    backbone = partial(
        wave_backbone,
        8,
        2,
        mixer=partial(WaveMixing, levels=2, dropout=0.3),
        stem=partial(StridedStem, stride=2),
    )
    if head == "classes":
        return wavemix(
            3, 8, 1, mixer=partial(WaveMixing, levels=1, dropout=0.3), stem=STRIDED, rngs=nnx.Rngs(0)
        )
    return ImageToMap(3, backbone, rngs=nnx.Rngs(0), **options)


def test_heads_double_the_resolution():
    x = jax.ShapeDtypeStruct((2, 16, 24, 3), jnp.float32)
    for widths, shape in (((4, 2), (16, 24)), ((4, 2, 2), (32, 48)), ((), (4, 6))):
        assert jax.eval_shape(small("map", widths=widths), x).shape == (2, *shape, 3)
    names = published_names(small("map", widths=(4, 2)), "wavemix")
    assert names["head.parts.2.weight"] == ("expand.2.weight",)
    assert names["backbone.stages.0.blocks.1.mixer.feedforward2.norm.running_var"] == (
        "layers.1.feedforward2.5.running_var",
    )
    with pytest.raises(KeyError, match="no tensor"):
        convert(
            small("map", widths=(4, 2)), {"conv.0.weight": np.zeros((4, 3, 3, 3))}, architecture="wavemix"
        )


def test_a_training_step_measures_statistics_and_draws_anew_whatever_the_accumulation():
    """Norms see every part of a batch, keys move on, and neither is learnt; a second run from the same state
    is the same run."""
    static, params = split(small())
    statistics = statistics_of(static)
    assert {name.rpartition(".")[2] for name in statistics} == {"running_mean", "running_var", "key"}

    def loss(model, batch):
        return jnp.sum(jnp.square(model(batch["inputs"]) - batch["targets"])), jnp.float32(
            batch["inputs"].shape[0]
        )

    batch = {"inputs": np.asarray(random(0, 4, 4, 4, 3)), "targets": np.asarray(random(1, 4, 3))}
    optimizer = optax.sgd(0.0)
    step = jax.jit(partial(train_step, static, optimizer, loss, 2))
    state = init_state(static, params, optimizer)
    after, metrics = step(state, batch)
    again, _ = step(state, batch)
    assert metrics.finite
    assert {name for name in params if not np.array_equal(after.params[name], params[name])} == statistics
    assert all(np.array_equal(after.params[name], again.params[name]) for name in params)

    @jax.jit
    def halves(params):
        model = merge(static, params)
        model.train()
        model(batch["inputs"][:2])
        model(batch["inputs"][2:])
        return split(model)[1]

    assert_close(after.params, halves(params), 1e-5)

    with spread(MeshSizes(data=2)) as mesh:  # statistics are those of all rows, wherever they lie
        spread_out, shardings = begin(partial(init_state, static, optimizer=optimizer), params, mesh)
        on_two = jax.jit(partial(train_step, static, optimizer, loss, 2), out_shardings=(shardings, None))
        new, _ = on_two(spread_out, place(batch, mesh))
    assert_close(jax.device_get(new.params), after.params, 1e-5)
