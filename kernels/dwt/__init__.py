"""The two-dimensional Haar wavelet transform of maps, and its exact inverse.

Implementations: `reference` (a 4 × 4 matrix on every cell), `xla` (sums and differences; the default on all
platforms).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from seqlab.checks import UserError
from seqlab.kernels.dispatch import Op

_op = Op("dwt", __name__, ("reference", "xla"))
_inverse = Op("idwt", __name__, ("reference", "xla"))


def dwt(
    x: Float[Array, "b h w d"], levels: int = 1, *, implementation: str | None = None
) -> tuple[Float[Array, "b i j d"], list[Float[Array, "b i j d 3"]]]:
    """The orthonormal Haar transform of every channel, applied `levels` times to the low band.

    Of a cell of 2 × 2 places with a, b above and c, d below,

        low = (a + b + c + d) / 2        bands = (a + b - c - d) / 2, (a - b + c - d) / 2, (a - b - c + d) / 2

    which are high-pass along the height, along the width, along both. A side of odd length is padded with one
    zero, so that a level maps n positions to ceil(n / 2).

    Args:
      x: [b, h, w, d], floating.
      levels: 1 or more.
      implementation: "reference" or "xla"; None: chosen by `seqlab.kernels.dispatch`.

    Returns:
      low [b, i, j, d] of the last level, and the bands [b, i, j, d, 3] of every level, the finest first.
      Reshaped to [b, i, j, 3 d], the bands of a channel are adjacent.

    Raises:
      ValueError: if an argument has the wrong shape or type, or `implementation` is unknown.

    Source: the transform of pytorch_wavelets ("db1", mode "zero"), as WaveMix uses it (arXiv 2205.14375).
    """
    if x.ndim != 4 or not jnp.issubdtype(x.dtype, jnp.floating) or 0 in x.shape[1:3]:
        raise UserError(
            f"x must be a floating-point array [b, h, w, d] with h, w >= 1, got {x.dtype}{x.shape}"
        )
    if isinstance(levels, bool) or not isinstance(levels, int) or levels < 1:
        raise UserError(f"levels must be a positive integer, got {levels!r}")
    bands = []
    for _ in range(levels):
        x, high = _op(_even(x), implementation=implementation)
        bands.append(high)
    return x, bands


def idwt(
    low: Float[Array, "b i j d"],
    bands: list[Float[Array, "b i j d 3"]],
    shape: tuple[int, int] | None = None,
    *,
    implementation: str | None = None,
) -> Float[Array, "b h w d"]:
    """The inverse of `dwt`: x of `low` and `bands`, up to rounding.

    Args:
      low, bands: as returned by `dwt`.
      shape: (h, w) of x; by default twice that of the finest bands, as for even sides.
      implementation: as in `dwt`.

    Raises:
      ValueError: if the bands do not fit `low` or `shape`.
    """
    sizes = (
        [shape or tuple(2 * n for n in bands[0].shape[1:3]), *(high.shape[1:3] for high in bands)]
        if bands
        else []
    )
    for j in reversed(range(len(bands))):
        high, size = bands[j], sizes[j]
        if high.shape != (*low.shape, 3) or tuple(-(-n // 2) for n in size) != low.shape[1:3]:
            raise UserError(
                f"bands[{j}] {high.shape} and the side {size} that it belongs to do not fit low {low.shape}"
            )
        low = _inverse(low, high, implementation=implementation)[:, : size[0], : size[1]]
    return low


def _even(x: Array) -> Array:
    """Pad every side of odd length with a zero."""
    odd = [(0, n % 2 if axis in (1, 2) else 0) for axis, n in enumerate(x.shape)]
    return jnp.pad(x, odd) if any(after for _, after in odd) else x
