"""What models of images are made of. Images are [b, h, w, channels]; letters of an array of theirs: b, h, w (height, width), d."""

import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from seqlab.models.batch_norm import BatchNorm
from seqlab.models.layers import Factory, matmul, positive
from seqlab.module import Module
from seqlab.shapes import Steps, accumulator
from seqlab.state import State

Map = Float[Array, "b h w d"]


class ImageMixer(Module):
    """Mixes the places of a map. Abstract: a subclass defines `mix`.

    It is called like every mixer, so that blocks need not know; but a map has no order in time: there is no state, `init_state` is empty,
    and a state, resets or flags are refused.
    """

    causal, lookahead, exact = False, 0, True

    def mix(self, x: Map) -> Map:
        """The mixed map, of the same shape."""
        raise NotImplementedError

    def init_state(self, batch: int, dtype: jax.typing.DTypeLike = jnp.float32) -> tuple[()]:
        return ()

    def __call__(self, x: Map, state: State | None = None, reset: Steps | None = None, valid: Steps | None = None) -> tuple[Map, None]:
        for name, value in (("state", state), ("reset", reset), ("valid", valid)):
            if value is not None:
                raise ValueError(f"{name} must be None: {type(self).__name__} mixes the places of an image, which has no time")
        return self.mix(x), None


class Conv(Module):
    """A convolution with weights [h, w, in / groups, out]; uniform in ±1/sqrt(fan in) at the beginning, as PyTorch's."""

    torch_layout: ClassVar = {"weight": "[out, in, h, w]"}

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        *,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        bias: bool = True,
        rngs: nnx.Rngs,
    ):
        if positive("inputs", inputs) % positive("groups", groups) or positive("outputs", outputs) % groups:
            raise ValueError(f"groups must divide inputs={inputs} and outputs={outputs}, got {groups}")
        shape = (positive("kernel", kernel), kernel, inputs // groups, outputs)
        bound = 1 / math.sqrt(math.prod(shape[:3]))
        self.weight = nnx.Param(jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound))
        self.bias = nnx.Param(jax.random.uniform(rngs.params(), (outputs,), minval=-bound, maxval=bound)) if bias else None
        self.stride, self.padding, self.groups = positive("stride", stride), padding, groups

    def __call__(self, x: Map) -> Float[Array, "b i j o"]:
        weight = self.weight[...].astype(x.dtype)
        same = weight.shape[2] == 1 and x.shape[3] == weight.shape[3] and self.stride == 1 and 2 * self.padding + 1 == weight.shape[0]
        if same and jax.default_backend() == "cpu":  # XLA's own is a hundred times slower there
            y = depthwise(x, weight[:, :, 0])
        else:
            y = jax.lax.conv_general_dilated(
                x,
                weight,
                (self.stride,) * 2,
                ((self.padding,) * 2,) * 2,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=self.groups,
            )
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


@jax.custom_vjp
def depthwise(x: Map, weight: Float[Array, "p q d"]) -> Map:
    """Every channel convolved by its own odd filter, over zeros beyond the border: sums of shifted products, which a CPU is quick at."""
    (_, height, width, _), (rows, columns, _) = x.shape, weight.shape
    padded = _bordered(x, weight).astype(accumulator(x.dtype))

    def row(p: int, total: Array) -> Array:  # a loop over rows of the filter: a program of all products would take long to compile
        window = jax.lax.dynamic_slice_in_dim(padded, p, height, 1)
        return total + sum(window[:, :, q : q + width] * weight[p, q] for q in range(columns))

    return jax.lax.fori_loop(0, rows, row, jnp.zeros_like(padded, shape=x.shape)).astype(x.dtype)


def _bordered(x: Map, weight: Float[Array, "p q d"]) -> Map:
    rows, columns = (size // 2 for size in weight.shape[:2])
    return jnp.pad(x, [(0, 0), (rows, rows), (columns, columns), (0, 0)])


def _depthwise_bwd(residuals: tuple[Map, Array], dy: Map) -> tuple[Map, Array]:
    x, weight = residuals
    (b, height, width, d), (rows, columns, _) = x.shape, weight.shape
    wide = accumulator(x.dtype)
    padded, dy_wide = _bordered(x, weight).astype(wide), dy.astype(wide)

    def place(n: int, total: Array) -> Array:  # place by place: a reduction over all of them at once would not fuse with its products
        i, j = n // width, n % width
        window = jax.lax.dynamic_slice(padded, (0, i, j, 0), (b, rows, columns, d))
        return total + window * jax.lax.dynamic_slice(dy_wide, (0, i, j, 0), (b, 1, 1, d))

    dweight = jax.lax.fori_loop(0, height * width, place, jnp.zeros((b, rows, columns, d), wide)).sum(0)
    return depthwise(dy, weight[::-1, ::-1]), dweight.astype(weight.dtype)


depthwise.defvjp(lambda x, weight: (depthwise(x, weight), (x, weight)), _depthwise_bwd)


class ConvTranspose(Module):
    """A transposed convolution with weights [h, w, in, out]: every place is spread over kernel × kernel places, `stride` apart.

        y[stride i + p - padding] += W[p] x[i]        for both axes; a side of n becomes (n - 1) stride - 2 padding + kernel

    One matrix product makes all that is spread, and sums of shifted parts put it in place: no product is with a zero, as it would be in a
    convolution of the map with zeros between its places.
    """

    torch_layout: ClassVar = {"weight": "[in, out, h, w]"}

    def __init__(self, inputs: int, outputs: int, kernel: int, *, stride: int, padding: int = 0, rngs: nnx.Rngs):
        shape = (positive("kernel", kernel), kernel, positive("inputs", inputs), positive("outputs", outputs))
        bound = 1 / math.sqrt(kernel * kernel * outputs)  # PyTorch's fan in of transposed weights
        self.weight = nnx.Param(jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound))
        self.bias = nnx.Param(jax.random.uniform(rngs.params(), (outputs,), minval=-bound, maxval=bound))
        self.kernel, self.stride, self.padding = kernel, positive("stride", stride), padding

    def __call__(self, x: Map) -> Float[Array, "b i j o"]:
        y = matmul(x, rearrange(self.weight[...].astype(x.dtype), "p q d o -> d (p q o)"))
        y = rearrange(y, "b i j (p q o) -> b i p j q o", p=self.kernel, q=self.kernel)
        y = self._overlapped(self._overlapped(y, 3), 1)
        return y + self.bias[...].astype(x.dtype)

    def _overlapped(self, y: Array, axis: int) -> Array:
        """Axes (i, p) of places and what they spread, joined into one of places."""
        n, stride = y.shape[axis], self.stride
        parts = -(-self.kernel // stride)  # into how many neighbouring cells of `stride` places one place reaches
        padding = [(0, 0)] * y.ndim
        padding[axis + 1] = (0, parts * stride - self.kernel)
        y = jnp.pad(y, padding)
        total = 0
        for a in range(parts):
            part = jax.lax.slice_in_dim(y, a * stride, (a + 1) * stride, axis=axis + 1)
            ends = [(0, 0)] * y.ndim
            ends[axis] = (a, parts - 1 - a)
            total = total + jnp.pad(part, ends)
        total = total.reshape(*y.shape[:axis], (n + parts - 1) * stride, *y.shape[axis + 2 :])
        size = (n - 1) * stride - 2 * self.padding + self.kernel
        return jax.lax.slice_in_dim(total, self.padding, self.padding + size, axis=axis)


def batch_normed(norm: BatchNorm, x: Map) -> Map:
    """BatchNorm of a map: all places of all images count alike."""
    return norm(x.reshape(x.shape[0], -1, x.shape[-1])).reshape(x.shape)


class MapNorm(Module):
    """(x - mean) / sqrt(var + eps) * weight + bias, mean and variance over a whole map: group norm of one group (arXiv 1803.08494)."""

    def __init__(self, dim: int, *, eps: float = 1e-5, bias: bool = True, rngs: nnx.Rngs | None = None):
        self.weight = nnx.Param(jnp.ones((positive("dim", dim),)))
        self.bias = nnx.Param(jnp.zeros((dim,))) if bias else None
        self.eps = eps

    def __call__(self, x: Map) -> Map:
        wide, axes = x.astype(accumulator(x.dtype)), (1, 2, 3)
        centred = wide - jnp.mean(wide, axis=axes, keepdims=True)
        rate = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=axes, keepdims=True) + self.eps)
        y = centred * rate * self.weight[...].astype(wide.dtype)
        return (y if self.bias is None else y + self.bias[...].astype(wide.dtype)).astype(x.dtype)


class StarReLU(Module):
    """scale * relu(x)^2 + bias, two learnt numbers (arXiv 2210.13452).

    The paper derives 0.8944 and -0.4472, which make mean 0 and variance 1 of a unit normal; its code, and we, begin at 1 and 0.
    """

    def __init__(self, dim: int | None = None, *, rngs: nnx.Rngs | None = None):
        self.scale, self.bias = nnx.Param(jnp.ones((1,))), nnx.Param(jnp.zeros((1,)))

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        return self.scale[...].astype(x.dtype) * jnp.square(jax.nn.relu(x)) + self.bias[...].astype(x.dtype)


class Downsample(Module):
    """A strided convolution between a norm before it and one behind, either of which may be None: a stem, or the way to the next stage."""

    torch_names: ClassVar = {"norm_before": "pre_norm", "norm_after": "post_norm"}

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        kernel: int = 3,
        stride: int = 2,
        padding: int = 1,
        before: Factory | None = None,
        after: Factory | None = None,
        rngs: nnx.Rngs,
    ):
        self.norm_before = None if before is None else before(inputs, rngs=rngs)
        self.conv = Conv(inputs, outputs, kernel, stride=stride, padding=padding, rngs=rngs)
        self.norm_after = None if after is None else after(outputs, rngs=rngs)

    def __call__(self, x: Map) -> Float[Array, "b i j o"]:
        x = x if self.norm_before is None else self.norm_before(x)
        x = self.conv(x)
        return x if self.norm_after is None else self.norm_after(x)
