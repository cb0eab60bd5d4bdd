"""Models of images: published sizes, any resolution, stochastic depth, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import abstract, assert_close, assert_identical, random

from seqlab import split
from seqlab.interop.convert import convert, published_names
from seqlab.models import MLP
from seqlab.models.images import (
    METAFORMERS,
    Conv,
    IdentityMixing,
    ImageAttention,
    ImageBackbone,
    ImageClassifier,
    ImagePyramid,
    Pooling,
    RandomMixing,
    SepConv,
    SpatialLinear,
    metaformer,
    poolformer,
)
from seqlab.models.images.convolution import depthwise
from seqlab.models.stochastic import DropPath, draw
from seqlab.module import count_params, params_of, statistics_of

partial = functools.partial

# Millions of parameters as the papers and their repositories print them (arXiv 2111.11418, 2210.13452), and
# all digits.
POOLFORMER = {
    "s12": ("11.92", 11_915_176),
    "s24": ("21.39", 21_388_968),
    "s36": ("30.86", 30_862_760),
    "m36": ("56.17", 56_172_520),
    "m48": ("73.47", 73_473_448),
}
SECOND = {"s12": 11_891_712, "s24": 21_341_464, "s36": 30_791_216, "m36": 56_077_168, "m48": 73_346_056}
METAFORMER = {
    **{
        f"{name}_{size}": (f"{count / 1e6:.0f}", count)
        for name in ("identityformer", "randformer")
        for size, count in SECOND.items()
    },
    "poolformerv2_s12": ("11.89", SECOND["s12"]),
    **{
        f"poolformerv2_{size}": (millions, SECOND[size])
        for size, millions in (("s24", "21"), ("s36", "31"), ("m36", "56"), ("m48", "73"))
    },
    "convformer_s18": ("26.77", 26_774_448),
    "convformer_s36": ("40", 40_012_152),
    "convformer_m36": ("57", 57_051_640),
    "convformer_b36": ("100", 99_882_616),
    "caformer_s18": ("26.34", 26_341_656),
    "caformer_s36": ("39", 39_297_102),
    "caformer_m36": ("56", 56_204_878),
    "caformer_b36": ("99", 98_753_614),
}


def others_slow(names):
    """The smallest and the largest of a kind with every run, the others with the long one."""
    return [
        name
        if name.rpartition("_")[2] in ("s12", "s18", "b36")
        else pytest.param(name, marks=pytest.mark.slow)
        for name in names
    ]


@pytest.mark.parametrize("size", others_slow(POOLFORMER))
def test_poolformer_has_the_parameters_of_the_paper(size):
    millions, count = POOLFORMER[size]
    assert count_params(abstract(partial(poolformer, size))) == count
    assert f"{count / 1e6:.2f}" == millions


@pytest.mark.parametrize("name", others_slow(METAFORMERS))
def test_metaformers_have_the_parameters_of_the_paper(name):
    millions, count = METAFORMER[name]
    assert count_params(abstract(partial(metaformer, name))) == count
    assert f"{count / 1e6:.{len(millions.partition('.')[2])}f}" == millions


def test_what_randformer_never_learns_is_not_counted():
    static, params = split(abstract(partial(metaformer, "randformer_s12")))
    frozen = sum(params[name].size for name in statistics_of(static))
    assert frozen == 6 * 196**2 + 2 * 49**2  # "11.9 + 0.2" in the paper


SMALL = partial(ImageBackbone, (8, 12), (2, 1), layer_scale=0.5, channel_mixer=partial(MLP, expand=2))


def classifier(mixers=Pooling, **options):
    return ImageClassifier(5, partial(SMALL, mixers, **options), rngs=nnx.Rngs(0))


def test_pooling_is_the_mean_of_the_places_that_there_are():
    x = np.asarray(random(0, 2, 5, 4, 3))
    expected = np.zeros_like(x)
    for i in range(5):
        for j in range(4):
            expected[:, i, j] = (
                x[:, max(i - 2, 0) : i + 3, max(j - 2, 0) : j + 3].mean(axis=(1, 2)) - x[:, i, j]
            )
    assert_close(Pooling(3, size=5)(x)[0], expected, 1e-6)
    one = np.asarray(random(1, 2, 1, 1, 3))
    assert_close(Pooling(3)(one)[0], np.zeros_like(one), 1e-6)
    with pytest.raises(ValueError, match="odd"):
        Pooling(3, size=4)(x)


@pytest.mark.parametrize("kernel", [1, 3, 7])
def test_depthwise_convolutions_are_those_of_lax(kernel):
    x, weight, dy = random(0, 2, 5, 4, 3), random(1, kernel, kernel, 3), random(2, 2, 5, 4, 3)

    def slow(x, weight):
        padding, names = [(kernel // 2,) * 2] * 2, ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, weight[:, :, None], (1, 1), padding, dimension_numbers=names, feature_group_count=3
        )

    def run(function):
        y, pull = jax.vjp(function, x, weight)
        return y, pull(dy)

    assert_close(jax.jit(partial(run, depthwise))(), jax.jit(partial(run, slow))(), 1e-5)


def test_attention_is_attention_over_places():
    mixer, x = ImageAttention(8, head_dim=4, bias=True, rngs=nnx.Rngs(0)), random(0, 2, 3, 4, 8)
    q, k, v = np.split(np.asarray(x @ mixer.qkv.weight[...], np.float64).reshape(2, 12, 3, 2, 4), 3, axis=2)
    logits = np.einsum("btigk,bsigk->bgts", q, k) / 2
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    y = np.einsum("bgts,bsigk->btgk", weights, v).reshape(2, 3, 4, 8)
    assert_close(mixer(x)[0], y @ np.asarray(mixer.proj.weight[...], np.float64), 1e-5)


def test_maps_of_any_size_halve_from_stage_to_stage():
    model = classifier((Pooling, (partial(SepConv, kernel=3), IdentityMixing)))
    for height, width in ((32, 32), (36, 28), (33, 47)):
        images = jax.ShapeDtypeStruct((2, height, width, 3), jnp.float32)
        shapes = [y.shape[1:] for y in jax.eval_shape(model.features, images)]
        first = (height + 1) // 4, (width + 1) // 4
        assert shapes == [(*first, 8), (*((n + 1) // 2 for n in first), 12)]
        assert jax.eval_shape(model, images).shape == (2, 5)


@pytest.mark.parametrize("mixer", [RandomMixing, SpatialLinear])
def test_a_matrix_over_places_belongs_to_its_resolution(mixer):
    module, x = mixer(4, tokens=6, rngs=nnx.Rngs(0)), random(0, 2, 2, 3, 4)
    matrix = module.matrix[...] if mixer is RandomMixing else module.fc.weight[...].T
    assert_close(
        module(x)[0].reshape(2, 6, 4), np.einsum("st,btd->bsd", matrix, np.asarray(x).reshape(2, 6, 4)), 1e-5
    )
    if mixer is RandomMixing:
        assert_close(matrix.sum(axis=1), np.ones(6), 1e-6)
    with pytest.raises(ValueError, match="tokens=6 places"):
        module(x[:, :, :2])
    with pytest.raises(ValueError, match="valid must be None"):
        module(x, None, None, jnp.ones((2, 6), bool))


def test_the_hybrids_of_the_first_paper_find_their_names():
    """A round trip through the published names: every parameter comes back, from where the original keeps
    it."""
    attention = partial(ImageAttention, head_dim=4, bias=True)
    stages = partial(
        ImageBackbone, (4, 4, 8, 8), (1, 1, 1, 1), (Pooling, Pooling, Pooling, attention), layer_scale=1.0
    )
    model = ImageClassifier(3, partial(stages, positions=(None, None, None, (2, 2))), rngs=nnx.Rngs(0))
    names = published_names(model, "metaformer_pppa")
    assert names["backbone.positions.0.weight"] == ("network.6.pos_embed",)
    assert names["backbone.stages.3.blocks.0.mixer.qkv.weight"] == ("network.7.0.token_mixer.qkv.weight",)
    assert names["backbone.downs.3.conv.bias"] == ("network.5.proj.bias",)
    back = {
        1: np.asarray,
        2: np.transpose,
        3: lambda w: w.transpose(2, 0, 1)[None],
        4: lambda w: w.transpose(3, 2, 0, 1),
    }
    tensors = {
        theirs: back[leaf.ndim](np.asarray(leaf))
        for name, leaf in params_of(model).items()
        for theirs in names[name]
    }
    blank = ImageClassifier(3, partial(stages, positions=(None, None, None, (2, 2))), rngs=nnx.Rngs(1))
    assert_identical(params_of(convert(blank, tensors, architecture="metaformer_pppa")), params_of(model))
    assert jax.eval_shape(model, jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)).shape == (1, 3)
    with pytest.raises(ValueError, match="the embedding belongs"):
        jax.eval_shape(model, jax.ShapeDtypeStruct((1, 96, 64, 3), jnp.float32))


def test_stochastic_depth_drops_whole_rows_in_training_only():
    drop, x = DropPath(0.4, rngs=nnx.Rngs(0)), jnp.ones((400, 3, 2, 5))
    assert_identical(drop(x), x)
    drop.train()
    first, second = np.asarray(drop(x)), np.asarray(drop(x))
    rows = first[:, 0, 0, 0]
    assert set(np.unique(rows)) == {0.0, np.float32(1 / 0.6)}
    assert_identical(first, np.broadcast_to(rows[:, None, None, None], first.shape))
    assert abs((rows == 0).mean() - 0.4) < 0.08
    assert not np.array_equal(first, second), "every call draws anew"
    again = DropPath(0.4, rngs=nnx.Rngs(0))
    again.train()
    assert_identical(np.asarray(again(x)), first)


@pytest.mark.parametrize("rate", [0.5, 0.25, 0.1, 0.999])
def test_dropout_keeps_what_it_should_whatever_bits_say_the_rate(rate):
    keep = np.asarray(draw(jax.random.key(0), rate, (500, 203)))
    assert keep.shape == (500, 203)
    assert abs(keep.mean() - (1 - rate)) < 5 * np.sqrt(rate * (1 - rate) / keep.size)
    # Neighbouring seeds must give independent draws.
    for other in (keep[:, 1:], keep[:, 2:], keep[:, 4:]):
        same = keep[:, : other.shape[1]] & other
        assert abs(same.mean() - (1 - rate) ** 2) < 0.006


def test_rates_grow_with_depth_and_keys_are_no_weights():
    model = classifier(drop_path=0.2)
    rates = [
        None if block.drop_path is None else block.drop_path.rate
        for stage in model.backbone.stages
        for block in stage.blocks
    ]
    assert rates == [None, 0.1, 0.2]
    static, params = split(model)
    keys = {name for name in params if name.endswith("drop_path.key")}
    assert keys == statistics_of(static) and len(keys) == 2
    assert not any(name.endswith("key") for name in published_names(model, "poolformer"))


def test_what_cannot_be_built_is_refused():
    with pytest.raises(ValueError, match="one for each of 2 stages, got 3"):
        classifier((Pooling,) * 3)
    with pytest.raises(ValueError, match="same stages"):
        ImageBackbone((8, 8), (1,), Pooling, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="did you mean 's24'"):
        poolformer("s21", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="groups must divide"):
        Conv(6, 6, 3, groups=4, rngs=nnx.Rngs(0))


def test_a_pyramid_norms_every_stage():
    model = ImagePyramid(partial(SMALL, Pooling), rngs=nnx.Rngs(0))
    for y in jax.jit(lambda x: model(x))(random(0, 2, 16, 12, 3)):
        assert np.abs(np.asarray(y).mean(axis=(1, 2, 3))).max() < 1e-5
        assert_close(np.asarray(y).std(axis=(1, 2, 3)), np.ones(2), 1e-3)
    assert published_names(model, "poolformer")["norms.1.weight"] == ("norm2.weight",)
