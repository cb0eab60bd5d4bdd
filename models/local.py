"""Local mixers of sequences: a gated short convolution, and PoolFormer's pooling and WaveMix's wavelets in
one dimension.

The last two are not published in this form: they are the image mixers (`seqlab.models.images`) made causal,
so that they stream.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from seqlab import kernels
from seqlab.checks import check_positive
from seqlab.models.layers import ACTIVATIONS, Linear, ShortConv
from seqlab.module import Module
from seqlab.shapes import Activations, Steps
from seqlab.state import State, mask_steps


class GatedShortConv(Module):
    """A short causal convolution between two gates that depend on the input.

        B, C, u = in_proj(x);  y = out_proj(C * conv(B * u))

    Args:
      width: taps of the convolution.
      bias: biases of the projections and of the convolution.

    The state is the last width - 1 values of B * u.

    Source: LFM2 (arXiv 2511.23404).

    Pitfalls:
      The convolution has no activation. It sees `width` steps: models alternate it with attention.
    """

    causal, lookahead, exact = True, 0, True

    def __init__(
        self, dim: int, *, width: int = 3, bias: bool = False, out_scale: float = 1.0, rngs: nnx.Rngs
    ):
        self.dim = check_positive("dim", dim)
        self.in_proj = Linear(dim, 3 * dim, bias=bias, rngs=rngs)
        self.conv = ShortConv(dim, width=width, bias=bias, activation=None, rngs=rngs)
        self.out_proj = Linear(dim, dim, bias=bias, scale=out_scale, rngs=rngs)

    def init_state(self, batch: int, dtype: jax.typing.DTypeLike = jnp.float32) -> Float[Array, "b p d"]:
        return self.conv.init_state(batch, dtype)

    def __call__(
        self,
        x: Activations,
        state: State | None = None,
        reset: Steps | None = None,
        valid: Steps | None = None,
    ) -> tuple[Activations, State | None]:
        before, after, u = jnp.split(self.in_proj(mask_steps(x, valid)), 3, axis=-1)
        y, state = self.conv(before * u, state, reset, valid)
        return mask_steps(self.out_proj(after * y), valid), state


class PoolingState(NamedTuple):
    """`window` [b, size-1, d+1]: the last inputs, and a channel of ones marking real ones."""

    window: Float[Array, "b p c"]


class CausalPooling(Module):
    """The mean of the last `size` inputs, of fewer at the beginning, minus the current one; no parameters.

        y_t = mean(x_{t-size+1} .. x_t) - x_t

    PoolFormer's mixer in one dimension without look-ahead; the current input is subtracted because the
    residual stream adds it.

    Args:
      size: steps in the mean, the current one included.

    Source: PoolFormer (arXiv 2111.11418); the causal form is ours.

    Pitfalls:
      Without the residual stream this is a high-pass instead of a low-pass filter.
      The norm before it must be pointwise in time, like RMSNorm: PoolFormer's own uses statistics of the
        whole map and cannot stream.
      The receptive field grows with depth: `depth` layers see depth * (size - 1) steps back.
    """

    causal, lookahead, exact = True, 0, True

    def __init__(self, dim: int, *, size: int = 3, rngs: nnx.Rngs | None = None):
        self.dim, self.size = check_positive("dim", dim), check_positive("size", size)

    def init_state(self, batch: int, dtype: jax.typing.DTypeLike = jnp.float32) -> PoolingState:
        return PoolingState(jnp.zeros((batch, self.size - 1, self.dim + 1), dtype))

    def __call__(
        self,
        x: Activations,
        state: State | None = None,
        reset: Steps | None = None,
        valid: Steps | None = None,
    ) -> tuple[Activations, State | None]:
        x = mask_steps(x, valid)
        counted = jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1)
        window = None if state is None else state.window
        total, window = window_sum(counted, self.size, window, reset, valid)
        mean = total[..., :-1] / jnp.maximum(total[..., -1:], 1)
        return mask_steps(mean - x, valid), (None if state is None else PoolingState(window))


class WaveletState(NamedTuple):
    """`window` [b, 2^levels-1, r]: the last inputs of the transform."""

    window: Float[Array, "b p r"]


class CausalWavelets(Module):
    """A causal undecimated Haar transform, and a perceptron over its bands.

        u = reduction(x), r channels;  S_j = the sum of the last 2^j values of u
        high_j = (2 S_{j-1} - S_j) / 2^{j/2}, j = 1 .. L;  low = S_L / 2^{L/2}
        y = down(gelu(up([low, high_1 .. high_L])))

    WaveMix's mixer in one dimension: high_j is the newer half of 2^j steps minus the older one. The image
    form halves the resolution at each level and would have to wait for complete pairs; here every step has
    its own transform, without delay. Inputs before the beginning count as 0.

    Args:
      levels: L; the reach is 2^L steps, the current one included.
      expand: the perceptron's width is expand * dim.
      reduced: r, by default a quarter of dim, rounded up.

    Source: WaveMix (arXiv 2203.03689); the causal form is ours.

    Pitfalls:
      The reach doubles with each level, and so does the state: 2^levels - 1 values of r channels.
      The transform is not decimated: neighbouring steps share most inputs, and energy is not preserved.
    """

    causal, lookahead, exact = True, 0, True

    def __init__(
        self,
        dim: int,
        *,
        levels: int = 4,
        expand: int = 2,
        reduced: int | None = None,
        out_scale: float = 1.0,
        rngs: nnx.Rngs,
    ):
        self.dim, self.levels = check_positive("dim", dim), check_positive("levels", levels)
        self.reduced = -(-dim // 4) if reduced is None else check_positive("reduced", reduced)
        self.reduction = Linear(dim, self.reduced, bias=True, rngs=rngs)
        self.up = Linear(
            (levels + 1) * self.reduced, check_positive("expand", expand) * dim, bias=True, rngs=rngs
        )
        self.down = Linear(expand * dim, dim, bias=True, scale=out_scale, rngs=rngs)

    def init_state(self, batch: int, dtype: jax.typing.DTypeLike = jnp.float32) -> WaveletState:
        return WaveletState(jnp.zeros((batch, 2**self.levels - 1, self.reduced), dtype))

    def __call__(
        self,
        x: Activations,
        state: State | None = None,
        reset: Steps | None = None,
        valid: Steps | None = None,
    ) -> tuple[Activations, State | None]:
        u = mask_steps(self.reduction(mask_steps(x, valid)), valid)
        window = None if state is None else state.window
        bands, total = [], u
        for j in range(1, self.levels + 1):
            past = None if window is None else window[:, window.shape[1] - (2**j - 1) :]
            wider, last = window_sum(u, 2**j, past, reset, valid)
            bands.append((2 * total - wider) / math.sqrt(2**j))
            total = wider
        bands = [total / math.sqrt(2**self.levels), *bands]
        y = self.down(ACTIVATIONS["gelu"](self.up(jnp.concatenate(bands, axis=-1))))
        return mask_steps(y, valid), (None if state is None else WaveletState(last))


def window_sum(
    x: Activations, size: int, state: Float[Array, "b p d"] | None, reset: Steps | None, valid: Steps | None
) -> tuple[Activations, Float[Array, "b p d"]]:
    """The sum of the last `size` inputs of every channel, and the last size - 1 inputs: a convolution with
    ones."""
    return kernels.conv(
        x, jnp.ones((size, x.shape[-1]), x.dtype), initial_state=state, reset=reset, valid=valid
    )
