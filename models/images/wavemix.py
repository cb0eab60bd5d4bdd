"""WaveMix: wavelets mix positions, transposed convolutions return to full resolution (arXiv 2203.03689,
2205.14375).

A network is the image backbone with one stage, no norms and no channel mixer: x + mixer(x), the mixer being
one of the blocks here.
"""

import functools
from typing import ClassVar

import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from seqlab import kernels
from seqlab.checks import UserError, check_divides, check_positive
from seqlab.models.batch_norm import BatchNorm
from seqlab.models.images.metaformer import ImageBackbone, ImageClassifier
from seqlab.models.images.parts import Conv, ConvTranspose, ImageMixer, Map, batch_normed
from seqlab.models.layers import ACTIVATIONS, Factory, Identity
from seqlab.models.legendre.lmu import uniform_linear
from seqlab.models.stochastic import Dropout
from seqlab.module import Module

partial = functools.partial
gelu = ACTIVATIONS["gelu"]


def packed(low: Map, bands: Float[Array, "b i j d 3"]) -> Map:
    """The output of a level, [b, i, j, 4 d]: all channels of the low band, then the other three per
    channel."""
    return jnp.concatenate([low, bands.reshape(*bands.shape[:3], -1)], axis=-1)


class FeedForward(Module):
    """norm(spread(down(dropout(gelu(up x))))): a perceptron at every position, then twice the resolution."""

    torch_names: ClassVar = {"up": "0", "down": "3", "spread": "4", "norm": "5"}

    def __init__(
        self, inputs: int, inner: int, hidden: int, outputs: int, *, dropout: float = 0.0, rngs: nnx.Rngs
    ):
        self.up = uniform_linear(inputs, inner, rngs=rngs)
        self.dropout = Dropout(dropout, rngs=rngs) if dropout else None
        self.down = uniform_linear(inner, hidden, rngs=rngs)
        self.spread = ConvTranspose(hidden, outputs, 4, stride=2, padding=1, rngs=rngs)
        self.norm = BatchNorm(outputs)

    def __call__(self, x: Map) -> Float[Array, "b i j o"]:
        x = gelu(self.up(x))
        x = self.down(x if self.dropout is None else self.dropout(x))
        return batch_normed(self.norm, self.spread(x))


class WaveMixing(ImageMixer):
    """The block of WaveMix (its second version), without the residual stream; with one level, that
    of WaveMix-Lite.

        y = reduction(x), a quarter of the channels
        z_1 .. z_L = the levels of its Haar transform, dim channels each
        t_L = FF_L(z_L)        t_j = FF_j([z_j, t_{j+1}])        the output is t_1

    Maps may have any size; the excess from levels of odd length is cropped. (The original asks for multiples
    of 2^levels.)

    Args:
      levels: of the transform.
      expand: the width of the perceptrons is expand * dim.
      hidden: channels that go into the transposed convolutions, dim by default.
      dropout: in the perceptrons.

    Pitfalls:
      Bands are packed per channel, three numbers each, after the low band of all channels. Another order
        trains as well, but does not fit published weights.
    """

    def __init__(
        self,
        dim: int,
        *,
        levels: int = 3,
        expand: int = 2,
        hidden: int | None = None,
        dropout: float = 0.0,
        rngs: nnx.Rngs,
    ):
        self.dim, self.levels = dim, check_positive("levels", levels)
        hidden = dim if hidden is None else check_positive("hidden", hidden)
        self.reduction = uniform_linear(dim, _quarter(dim), rngs=rngs)
        for j in range(1, levels + 1):
            inputs, outputs = dim + (dim // 2 if j < levels else 0), dim if j == 1 else dim // 2
            part = FeedForward(
                inputs, check_positive("expand", expand) * dim, hidden, outputs, dropout=dropout, rngs=rngs
            )
            setattr(self, self._name(j), part)  # separate attributes, to keep the published names

    def _name(self, level: int) -> str:
        return "feedforward" if self.levels == 1 else f"feedforward{level}"

    def mix(self, x: Map) -> Map:
        low, levels = self.reduction(x), []
        for _ in range(self.levels):
            size = low.shape[1:3]
            low, (bands,) = kernels.dwt(low)
            levels.append((size, packed(low, bands)))
        t = None
        for j, ((height, width), z) in reversed(list(enumerate(levels, 1))):
            z = z if t is None else jnp.concatenate([z, t], axis=-1)
            t = getattr(self, self._name(j))(z)[:, :height, :width]
        return t


class ParallelWaveMixing(ImageMixer):
    """The block of WaveMix's first version: all levels through one perceptron in parallel, and a convolution
    over their results.

        y = reduction(x)        t_j = spread_j(down(gelu(up z_j))) back at full resolution
        norm(gelu(depthwise([t_1 .. t_L])))

    A spread of level j has a kernel of 2^j + 2 at stride 2^j. `levels` divides dim; the other arguments are
    those of `WaveMixing`.
    """

    torch_names: ClassVar = {
        "up": "feedforward.0",
        "down": "feedforward.3",
        "depthwise": "depthconv.0",
        "norm": "depthconv.2",
    }

    def __init__(
        self,
        dim: int,
        *,
        levels: int = 4,
        expand: int = 2,
        hidden: int | None = None,
        dropout: float = 0.0,
        rngs: nnx.Rngs,
    ):
        check_divides("levels", levels, "dim", dim)
        self.dim, self.levels = dim, levels
        hidden = dim if hidden is None else check_positive("hidden", hidden)
        self.reduction = uniform_linear(dim, _quarter(dim), rngs=rngs)
        self.up = uniform_linear(dim, check_positive("expand", expand) * dim, rngs=rngs)
        self.dropout = Dropout(dropout, rngs=rngs) if dropout else None
        self.down = uniform_linear(expand * dim, hidden, rngs=rngs)
        for j in range(1, levels + 1):
            setattr(
                self,
                f"ff{j}",
                ConvTranspose(hidden, dim // levels, 2**j + 2, stride=2**j, padding=1, rngs=rngs),
            )
        self.depthwise = Conv(dim, dim, 5, padding=2, groups=dim, rngs=rngs)
        self.norm = BatchNorm(dim)

    def mix(self, x: Map) -> Map:
        low, spread = self.reduction(x), []
        for j in range(1, self.levels + 1):
            low, (bands,) = kernels.dwt(low)
            y = self._dropped(self.down(self._dropped(gelu(self.up(packed(low, bands))))))
            spread.append(getattr(self, f"ff{j}")(y)[:, : x.shape[1], : x.shape[2]])
        return batch_normed(self.norm, gelu(self.depthwise(jnp.concatenate(spread, axis=-1))))

    def _dropped(self, x: Map) -> Map:
        return x if self.dropout is None else self.dropout(x)


class ShuffleWaveMixing(ImageMixer):
    """The block of WaveMix's third version: one level, whose channels become positions by a pixel shuffle
    without weights.

        norm(conv3x3(shuffle(dropout(gelu(up packed(dwt(reduction(x))))))))

    Four channels become a cell of 2 × 2 positions: a perceptron of width 4 dim leaves dim channels.
    """

    torch_names: ClassVar = {"up": "feedforward.0", "conv": "feedforward.4", "norm": "feedforward.5"}

    def __init__(self, dim: int, *, dropout: float = 0.0, rngs: nnx.Rngs):
        self.dim = dim
        self.reduction = uniform_linear(dim, _quarter(dim), rngs=rngs)
        self.up = uniform_linear(dim, 4 * dim, rngs=rngs)
        self.dropout = Dropout(dropout, rngs=rngs) if dropout else None
        self.conv, self.norm = Conv(dim, dim, 3, padding=1, rngs=rngs), BatchNorm(dim)

    def mix(self, x: Map) -> Map:
        low, (bands,) = kernels.dwt(self.reduction(x))
        y = gelu(self.up(packed(low, bands)))
        y = rearrange(
            y if self.dropout is None else self.dropout(y), "b i j (d p q) -> b (i p) (j q) d", p=2, q=2
        )
        return batch_normed(self.norm, self.conv(y[:, : x.shape[1], : x.shape[2]]))


def _quarter(dim: int) -> int:
    if check_positive("dim", dim) % 4:
        raise UserError(f"dim must be a multiple of 4, the number of a transform's bands, got {dim}")
    return dim // 4


class PatchStem(Module):
    """WaveMix's stem for classification: two 3 × 3 convolutions, one over non-overlapping `patch` × `patch`
    patches, gelu, norm."""

    torch_names: ClassVar = {"convs": "", "norm": "4"}

    def __init__(self, inputs: int, dim: int, *, patch: int = 4, rngs: nnx.Rngs):
        first = (
            Conv(inputs, _quarter(dim), 3, padding=1, rngs=rngs),
            Conv(dim // 4, dim // 2, 3, padding=1, rngs=rngs),
        )
        self.convs = nnx.List([*first, Conv(dim // 2, dim, patch, stride=patch, rngs=rngs)])
        self.norm = BatchNorm(dim)

    def __call__(self, x: Map) -> Float[Array, "b i j o"]:
        for conv in self.convs:
            x = conv(x)
        return batch_normed(self.norm, gelu(x))


class StridedStem(Module):
    """The other stem: two strided 3 × 3 convolutions. With stride 1 it keeps the resolution."""

    torch_names: ClassVar = {"convs": ""}

    def __init__(self, inputs: int, dim: int, *, stride: int = 2, rngs: nnx.Rngs):
        options = {"stride": stride, "padding": 1, "rngs": rngs}
        self.convs = nnx.List([Conv(inputs, dim // 2, 3, **options), Conv(dim // 2, dim, 3, **options)])

    def __call__(self, x: Map) -> Float[Array, "b i j o"]:
        for conv in self.convs:
            x = conv(x)
        return x


def wave_backbone(
    dim: int = 192,
    depth: int = 16,
    *,
    mixer: Factory = WaveMixing,
    stem: Factory = PatchStem,
    inputs: int = 3,
    rngs: nnx.Rngs,
) -> ImageBackbone:
    """WaveMix-`dim`/`depth` without its head: published with dropout 0.5 in its mixers."""
    return ImageBackbone(
        (dim,), (depth,), mixer, inputs=inputs, channel_mixer=None, norm=Identity, stem=stem, rngs=rngs
    )


def wavemix(
    outputs: int = 1000,
    dim: int = 192,
    depth: int = 16,
    *,
    mixer: Factory = WaveMixing,
    stem: Factory = PatchStem,
    inputs: int = 3,
    dtype: str = "float32",
    rngs: nnx.Rngs,
) -> ImageClassifier:
    """WaveMix for classification, "WaveMix-192/16" by default: the mean of the last map, and a linear head.

    Published weights: convert(model, tensors, architecture="wavemix").
    """
    backbone = partial(wave_backbone, dim, depth, mixer=mixer, stem=stem, inputs=inputs)
    return ImageClassifier(outputs, backbone, norm=None, dtype=dtype, rngs=rngs)
