"""The token mixers of the MetaFormer papers over images (arXiv 2111.11418, 2210.13452)."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from seqlab import kernels
from seqlab.checks import UserError, check_positive
from seqlab.models.images.parts import Conv, ImageMixer, Map, StarReLU
from seqlab.models.layers import Linear
from seqlab.shapes import accumulator


def mean_around(x: Map, size: int) -> Map:
    """The mean over the size × size positions around each, without those outside the map: at a corner of 3 ×
    3 they are four."""
    if check_positive("size", size) % 2 == 0:
        raise UserError(f"size must be odd, so that a window has a middle, got {size}")
    wide = x.astype(accumulator(x.dtype))
    for axis in (1, 2):
        length, reach = x.shape[axis], size // 2
        places = np.arange(length)
        count = np.minimum(places + reach, length - 1) - np.maximum(places - reach, 0) + 1
        lags = range(-min(reach, length - 1), min(reach, length - 1) + 1)
        total = sum(_shifted(wide, axis, lag) for lag in lags)
        wide = total / jnp.asarray(count, wide.dtype).reshape((-1, 1, 1) if axis == 1 else (-1, 1))[None]
    return wide.astype(x.dtype)


def _shifted(x: Array, axis: int, lag: int) -> Array:
    """x at position i + lag, zero outside."""
    padding = [(0, 0, 0)] * x.ndim
    padding[axis] = (-lag, lag, 0)
    return jax.lax.pad(x, jnp.zeros((), x.dtype), padding)


class Pooling(ImageMixer):
    """PoolFormer's mixer: the mean around each position minus the position itself, which the residual stream
    adds again; no parameters.

    Pitfalls:
      At the border only positions inside the map count. Frameworks that include padding in the mean compute
        another function.
    """

    def __init__(self, dim: int, *, size: int = 3, rngs: nnx.Rngs | None = None):
        self.dim, self.size = dim, check_positive("size", size)

    def mix(self, x: Map) -> Map:
        return mean_around(x, self.size) - x


class IdentityMixing(ImageMixer):
    """No mixing: IdentityFormer, the baseline for mixers."""

    def __init__(self, dim: int, *, rngs: nnx.Rngs | None = None):
        self.dim = dim

    def mix(self, x: Map) -> Map:
        return x


class RandomMixing(ImageMixer):
    """RandFormer's mixer: a fixed random matrix over positions, whose rows are softmaxes of uniform numbers.

    `tokens` is the number of positions, height times width: the matrix belongs to one resolution.

    Raises:
      ValueError: the map has another number of positions.
    """

    torch_names: ClassVar = {"matrix": "random_matrix"}

    def __init__(self, dim: int, *, tokens: int = 196, rngs: nnx.Rngs):
        self.dim, self.tokens = dim, check_positive("tokens", tokens)
        self.matrix = nnx.BatchStat(
            jax.nn.softmax(jax.random.uniform(rngs.params(), (tokens, tokens)), axis=-1)
        )

    def mix(self, x: Map) -> Map:
        return over_places(x, self.matrix[...], self.tokens)


class SpatialLinear(ImageMixer):
    """A learned linear map over positions, shared by all channels; `tokens` as in `RandomMixing`."""

    def __init__(self, dim: int, *, tokens: int = 196, rngs: nnx.Rngs):
        self.dim, self.tokens = dim, check_positive("tokens", tokens)
        self.fc = Linear(tokens, tokens, rngs=rngs)

    def mix(self, x: Map) -> Map:
        return over_places(x, self.fc.weight[...].T, self.tokens)


def over_places(x: Map, matrix: Float[Array, "s s"], tokens: int) -> Map:
    """matrix x, with x as [positions, d]."""
    if x.shape[1] * x.shape[2] != tokens:
        raise UserError(
            f"x must have tokens={tokens} places, to which the matrix belongs, got {x.shape[1]} x "
            f"{x.shape[2]}"
        )
    return jnp.einsum("st,btd->bsd", matrix.astype(x.dtype), x.reshape(x.shape[0], tokens, -1)).reshape(
        x.shape
    )


class SepConv(ImageMixer):
    """ConvFormer's mixer: down(depthwise(star_relu(up x))), an inverted separable convolution (MobileNetV2's,
    arXiv 1801.04381)."""

    torch_names: ClassVar = {"up": "pwconv1", "act": "act1", "conv": "dwconv", "down": "pwconv2"}

    def __init__(self, dim: int, *, expand: int = 2, kernel: int = 7, rngs: nnx.Rngs):
        inner = check_positive("expand", expand) * dim
        self.dim = dim
        self.up, self.act = Linear(dim, inner, rngs=rngs), StarReLU(rngs=rngs)
        self.conv = Conv(inner, inner, kernel, padding=kernel // 2, groups=inner, bias=False, rngs=rngs)
        self.down = Linear(inner, dim, rngs=rngs)

    def mix(self, x: Map) -> Map:
        return self.down(self.conv(self.act(self.up(x))))


class ImageAttention(ImageMixer):
    """Softmax attention over all positions, without a position encoding: CAFormer's mixer, and with `bias`
    that of the first paper's hybrids.

    Args:
      head_dim: channels of a head, and logits are divided by its root. There are dim / head_dim heads, at
        least one.
      inner: channels of all heads together; default: head_dim for each. In the first paper's code they are
        dim, which differs where head_dim does not divide that.
      bias: of the projection behind the heads.

    Raises:
      ValueError: the heads do not divide inner.
    """

    def __init__(
        self,
        dim: int,
        *,
        head_dim: int = 32,
        inner: int | None = None,
        bias: bool = False,
        rngs: nnx.Rngs,
    ):
        self.dim, self.heads = dim, max(dim // check_positive("head_dim", head_dim), 1)
        self.scale = head_dim**-0.5
        inner = self.heads * head_dim if inner is None else check_positive("inner", inner)
        if inner % self.heads:
            raise UserError(f"inner must be a multiple of the {self.heads} heads, got {inner}")
        self.qkv = Linear(dim, 3 * inner, rngs=rngs)
        self.proj = Linear(inner, dim, bias=bias, rngs=rngs)

    def mix(self, x: Map) -> Map:
        qkv = rearrange(self.qkv(x), "b h w (three g k) -> three b (h w) g k", three=3, g=self.heads)
        y, _ = kernels.attention(*qkv, causal=False, scale=self.scale)
        return self.proj(rearrange(y, "b (h w) g k -> b h w (g k)", h=x.shape[1]))
