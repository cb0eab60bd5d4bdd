"""Convolutions of maps: dense ones and their transposes, each the other's gradient; depthwise ones.

XLA's convolutions on a CPU are fast in one layout, [b, h, w, in] by [h, w, in, out]. The gradients that JAX
derives use others: some are converted, others, and all of those in a loop (parts of a batch, for instance),
are computed element by element, ten to a hundred times slower. They are therefore written out here; other
platforms use JAX's own.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from seqlab.models.layers import matmul
from seqlab.shapes import accumulator

Map = Float[Array, "b h w d"]
Filters = Float[Array, "p q d o"]

_NAMES = ("NHWC", "HWIO", "NHWC")
# Input channels × output channels from which one matrix product per filter entry is faster than a
# convolution.
_WIDE = 1 << 13


def convolve(x: Map, weight: Filters, stride: int, padding: int) -> Float[Array, "b i j o"]:
    """y[i] = sum over p of x[stride i + p - padding] W[p], for both axes, over zeros beyond the border."""
    return (_convolve if jax.default_backend() == "cpu" else _plain)(x, weight, stride, padding)


def convolve_transposed(x: Map, weight: Filters, stride: int, padding: int) -> Float[Array, "b i j o"]:
    """y[stride i + p - padding] += x[i] W[p], for both axes: a side of n becomes (n - 1) stride - 2 padding +
    kernel.

    Products with zeros are avoided, unlike in a convolution of the map dilated with zeros. If the stride
    divides the kernel, all stride × stride positions of a cell see the same neighbours, and one convolution
    computes them. Otherwise one matrix product computes all contributions, and sums of shifted parts place
    them.
    """
    return (_spread if jax.default_backend() == "cpu" else _spread_plain)(x, weight, stride, padding)


def grouped(x: Map, weight: Filters, stride: int, padding: int, groups: int) -> Float[Array, "b i j o"]:
    """Grouped convolution, computed by XLA and differentiated by JAX."""
    borders = ((padding,) * 2,) * 2
    return jax.lax.conv_general_dilated(
        x, weight, (stride,) * 2, borders, dimension_numbers=_NAMES, feature_group_count=groups
    )


def _plain(x: Map, weight: Filters, stride: int, padding: int) -> Array:
    return grouped(x, weight, stride, padding, 1)


def _spread_plain(x: Map, weight: Filters, stride: int, padding: int) -> Array:
    size = [
        (n - 1) * stride - 2 * padding + kernel
        for n, kernel in zip(x.shape[1:3], weight.shape[:2], strict=True)
    ]
    return _spread_to(size, x, weight, stride, padding)


def _spread_to(size: Sequence[int], x: Map, weight: Filters, stride: int, padding: int) -> Array:
    """`size` positions of the full output, from `padding` on; zeros beyond its end."""
    if weight.shape[0] % stride == 0 and weight.shape[1] % stride == 0:
        y, first = _by_cells(size, x, weight, stride, padding), padding % stride
    else:
        y = matmul(x, rearrange(weight, "p q d o -> d (p q o)"))
        y = rearrange(y, "b i j (p q o) -> b i p j q o", p=weight.shape[0], q=weight.shape[1])
        y, first = _overlapped(_overlapped(y, 3, stride), 1, stride), padding
    ends = [(-first, first + wanted - there, 0) for wanted, there in zip(size, y.shape[1:3], strict=True)]
    return jax.lax.pad(y, jnp.zeros((), y.dtype), [(0, 0, 0), *ends, (0, 0, 0)])


def _by_cells(size: Sequence[int], x: Map, weight: Filters, stride: int, padding: int) -> Array:
    """y[stride c + r] = sum over a of x[c - a] W[r + stride a], for the cells c with a position in the
    output."""
    cells = rearrange(weight, "(a p) (e q) d o -> a e d (p q o)", p=stride, q=stride)[::-1, ::-1]
    first = padding // stride
    borders = [
        (reach - 1 - first, -(-(padding + n) // stride) - there)
        for reach, n, there in zip(cells.shape[:2], size, x.shape[1:3], strict=True)
    ]
    y = jax.lax.conv_general_dilated(x, cells, (1, 1), borders, dimension_numbers=_NAMES)
    return rearrange(y, "b i j (p q o) -> b (i p) (j q) o", p=stride, q=stride)


def _overlapped(y: Array, axis: int, stride: int) -> Array:
    """Axes (i, p) of positions and their contributions, summed into one axis of positions."""
    n, kernel = y.shape[axis : axis + 2]
    parts = -(-kernel // stride)  # how many neighbouring cells of `stride` positions one position reaches
    padding = [(0, 0)] * y.ndim
    padding[axis + 1] = (0, parts * stride - kernel)
    y = jnp.pad(y, padding)
    total = 0
    for a in range(parts):
        part = jax.lax.slice_in_dim(y, a * stride, (a + 1) * stride, axis=axis + 1)
        ends = [(0, 0)] * y.ndim
        ends[axis] = (a, parts - 1 - a)
        total = total + jnp.pad(part, ends)
    return total.reshape(*y.shape[:axis], (n + parts - 1) * stride, *y.shape[axis + 2 :])


def _filter_gradient(
    x: Map, dy: Map, kernel: Sequence[int], stride: int, padding: int, swapped: bool = False
) -> Filters:
    """sum over positions i of x[stride i + p - padding]^T dy[i], for every p; `swapped`: transposed."""
    (rows, columns), (_, height, width, outputs) = kernel, dy.shape
    ends = [
        (n - 1) * stride + k - padding - size
        for n, k, size in zip((height, width), kernel, x.shape[1:3], strict=True)
    ]
    if x.shape[3] * outputs < _WIDE:
        borders = [(padding, end) for end in ends]
        # A convolution that sums over the batch, with the gradient map as its filter.
        x, dy = (x.transpose(3, 1, 2, 0), dy.transpose(1, 2, 0, 3))
        y = jax.lax.conv_general_dilated(
            x, dy, (1, 1), borders, rhs_dilation=(stride,) * 2, dimension_numbers=_NAMES
        )
        return y.transpose(1, 2, 3, 0) if swapped else y.transpose(1, 2, 0, 3)
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *((padding, end, 0) for end in ends), (0, 0, 0)])
    seeds = dy.reshape(-1, outputs)

    # A loop over rows of the filter: a program of all products would take long to compile.
    def row(p: Array) -> Array:
        window = jax.lax.dynamic_slice_in_dim(x, p, (height - 1) * stride + 1, 1)[:, ::stride]
        taps = [window[:, :, q : q + (width - 1) * stride + 1 : stride] for q in range(columns)]
        pairs = [
            (seeds, tap) if swapped else (tap, seeds)
            for tap in (tap.reshape(-1, tap.shape[-1]) for tap in taps)
        ]
        return jnp.stack([matmul(left.T, right, accumulator(x.dtype)) for left, right in pairs])

    return jax.lax.map(row, jnp.arange(rows)).astype(x.dtype)


def _convolve_bwd(stride: int, padding: int, residuals: tuple[Map, Filters], dy: Map) -> tuple[Map, Filters]:
    x, weight = residuals
    dx = _spread_to(x.shape[1:3], dy, weight.swapaxes(2, 3), stride, padding)
    return dx, _filter_gradient(x, dy, weight.shape[:2], stride, padding)


def _spread_bwd(stride: int, padding: int, residuals: tuple[Map, Filters], dy: Map) -> tuple[Map, Filters]:
    x, weight = residuals
    dweight = _filter_gradient(dy, x, weight.shape[:2], stride, padding, swapped=True)
    return _plain(dy, weight.swapaxes(2, 3), stride, padding), dweight


_convolve = jax.custom_vjp(_plain, nondiff_argnums=(2, 3))
_convolve.defvjp(
    lambda x, weight, stride, padding: (_plain(x, weight, stride, padding), (x, weight)), _convolve_bwd
)
_spread = jax.custom_vjp(_spread_plain, nondiff_argnums=(2, 3))
_spread.defvjp(
    lambda x, weight, stride, padding: (_spread_plain(x, weight, stride, padding), (x, weight)), _spread_bwd
)


@jax.custom_vjp
def depthwise(x: Map, weight: Float[Array, "p q d"]) -> Map:
    """Depthwise convolution by filters of odd size with zero padding: sums of shifted products, which are
    fast on a CPU."""
    (_, height, width, _), (rows, columns, _) = x.shape, weight.shape
    padded = _bordered(x, weight).astype(accumulator(x.dtype))

    # A loop over rows of the filter: a program of all products would take long to compile.
    def row(p: int, total: Array) -> Array:
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

    # One position at a time: a reduction over all of them would not fuse with its products.
    def place(n: int, total: Array) -> Array:
        i, j = n // width, n % width
        window = jax.lax.dynamic_slice(padded, (0, i, j, 0), (b, rows, columns, d))
        return total + window * jax.lax.dynamic_slice(dy_wide, (0, i, j, 0), (b, 1, 1, d))

    dweight = jax.lax.fori_loop(0, height * width, place, jnp.zeros((b, rows, columns, d), wide)).sum(0)
    return depthwise(dy, weight[::-1, ::-1]), dweight.astype(weight.dtype)


depthwise.defvjp(lambda x, weight: (depthwise(x, weight), (x, weight)), _depthwise_bwd)
