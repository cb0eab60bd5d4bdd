"""Building blocks of image models. Images are [b, h, w, channels]; axes of arrays: b, h, w (height, width),
d."""

import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from seqlab.checks import UserError, check_positive
from seqlab.models.batch_norm import BatchNorm
from seqlab.models.images.convolution import Map, convolve, convolve_transposed, depthwise, grouped
from seqlab.models.kinds import make_norm
from seqlab.models.layers import Factory
from seqlab.module import Module
from seqlab.shapes import Steps, accumulator
from seqlab.state import State


class ImageMixer(Module):
    """A mixer of the positions of a map. Abstract: a subclass defines `mix`.

    It is called like every mixer, so that blocks need no special case. A map has no order in time:
    `init_state` is empty, and a state, resets or flags are refused.
    """

    causal, lookahead, exact = False, 0, True

    def mix(self, x: Map) -> Map:
        """The mixed map, of the same shape."""
        raise NotImplementedError

    def init_state(self, batch: int, dtype: jax.typing.DTypeLike = jnp.float32) -> tuple[()]:
        return ()

    def __call__(
        self, x: Map, state: State | None = None, reset: Steps | None = None, valid: Steps | None = None
    ) -> tuple[Map, None]:
        for name, value in (("state", state), ("reset", reset), ("valid", valid)):
            if value is not None:
                raise UserError(
                    f"{name} must be None: {type(self).__name__} mixes the places of an image, which has no "
                    "time"
                )
        return self.mix(x), None


class Conv(Module):
    """A convolution with weights [h, w, in / groups, out]; initialised uniformly in ±1/sqrt(fan in), as in
    PyTorch."""

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
        if (
            check_positive("inputs", inputs) % check_positive("groups", groups)
            or check_positive("outputs", outputs) % groups
        ):
            raise UserError(f"groups must divide inputs={inputs} and outputs={outputs}, got {groups}")
        shape = (check_positive("kernel", kernel), kernel, inputs // groups, outputs)
        bound = 1 / math.sqrt(math.prod(shape[:3]))
        self.weight = nnx.Param(jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound))
        self.bias = (
            nnx.Param(jax.random.uniform(rngs.params(), (outputs,), minval=-bound, maxval=bound))
            if bias
            else None
        )
        self.stride, self.padding, self.groups = check_positive("stride", stride), padding, groups

    def __call__(self, x: Map) -> Float[Array, "b i j o"]:
        weight = self.weight[...].astype(x.dtype)
        same = (
            weight.shape[2] == 1
            and x.shape[3] == weight.shape[3]
            and self.stride == 1
            and 2 * self.padding + 1 == weight.shape[0]
        )
        if same and jax.default_backend() == "cpu":  # XLA's own is a hundred times slower there
            y = depthwise(x, weight[:, :, 0])
        elif self.groups == 1:
            y = convolve(x, weight, self.stride, self.padding)
        else:
            y = grouped(x, weight, self.stride, self.padding, self.groups)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class ConvTranspose(Module):
    """A transposed convolution with weights [h, w, in, out]: every position contributes to kernel × kernel
    positions, `stride` apart.

        y[stride i + p - padding] += W[p] x[i]        for both axes

    A side of n becomes (n - 1) stride - 2 padding + kernel. It is the gradient of a convolution from outputs
    to inputs with the same weights, stride and padding.
    """

    torch_layout: ClassVar = {"weight": "[in, out, h, w]"}

    def __init__(
        self, inputs: int, outputs: int, kernel: int, *, stride: int, padding: int = 0, rngs: nnx.Rngs
    ):
        shape = (
            check_positive("kernel", kernel),
            kernel,
            check_positive("inputs", inputs),
            check_positive("outputs", outputs),
        )
        bound = 1 / math.sqrt(kernel * kernel * outputs)  # PyTorch's fan in of transposed weights
        self.weight = nnx.Param(jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound))
        self.bias = nnx.Param(jax.random.uniform(rngs.params(), (outputs,), minval=-bound, maxval=bound))
        self.stride, self.padding = check_positive("stride", stride), padding

    def __call__(self, x: Map) -> Float[Array, "b i j o"]:
        y = convolve_transposed(x, self.weight[...].astype(x.dtype), self.stride, self.padding)
        return y + self.bias[...].astype(x.dtype)


def batch_normed(norm: BatchNorm, x: Map) -> Map:
    """BatchNorm of a map, with statistics over all positions of all images."""
    return norm(x.reshape(x.shape[0], -1, x.shape[-1])).reshape(x.shape)


class MapNorm(Module):
    """(x - mean) / sqrt(var + eps) * weight + bias, mean and variance over a whole map: group norm of one
    group (arXiv 1803.08494)."""

    def __init__(self, dim: int, *, eps: float = 1e-5, bias: bool = True, rngs: nnx.Rngs | None = None):
        self.weight = nnx.Param(jnp.ones((check_positive("dim", dim),)))
        self.bias = nnx.Param(jnp.zeros((dim,))) if bias else None
        self.eps = eps

    def __call__(self, x: Map) -> Map:
        wide, axes = x.astype(accumulator(x.dtype)), (1, 2, 3)
        centred = wide - jnp.mean(wide, axis=axes, keepdims=True)
        rate = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=axes, keepdims=True) + self.eps)
        y = centred * rate * self.weight[...].astype(wide.dtype)
        return (y if self.bias is None else y + self.bias[...].astype(wide.dtype)).astype(x.dtype)


class StarReLU(Module):
    """scale * relu(x)^2 + bias, two learned numbers (arXiv 2210.13452).

    The paper derives 0.8944 and -0.4472, which map a unit normal to mean 0 and variance 1; its code, and this
    one, initialise to 1 and 0.
    """

    def __init__(self, dim: int | None = None, *, rngs: nnx.Rngs | None = None):
        self.scale, self.bias = nnx.Param(jnp.ones((1,))), nnx.Param(jnp.zeros((1,)))

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        return self.scale[...].astype(x.dtype) * jnp.square(jax.nn.relu(x)) + self.bias[...].astype(x.dtype)


class Downsample(Module):
    """A strided convolution with a norm before and after it, either of which may be None: a stem, or the
    transition to the next stage."""

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
        self.norm_before = None if before is None else make_norm("before", before, inputs, rngs=rngs)
        self.conv = Conv(inputs, outputs, kernel, stride=stride, padding=padding, rngs=rngs)
        self.norm_after = None if after is None else make_norm("after", after, outputs, rngs=rngs)

    def __call__(self, x: Map) -> Float[Array, "b i j o"]:
        x = x if self.norm_before is None else self.norm_before(x)
        x = self.conv(x)
        return x if self.norm_after is None else self.norm_after(x)
