"""The Haar transform: both implementations against the definition, exact inverses at any size, energy kept,
gradients, what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, random

from seqlab.kernels.dwt import dwt, idwt
from seqlab.kernels.dwt.specs import SPECS, inputs

IMPLEMENTATIONS = ("reference", "xla")


def by_hand(x, levels):
    """Cell by cell in float64."""
    low, bands = np.asarray(x, np.float64), []
    for _ in range(levels):
        low = np.pad(low, [(0, 0), (0, low.shape[1] % 2), (0, low.shape[2] % 2), (0, 0)])
        a, b, c, d = low[:, ::2, ::2], low[:, ::2, 1::2], low[:, 1::2, ::2], low[:, 1::2, 1::2]
        bands.append(np.stack([a + b - c - d, a - b + c - d, a - b - c + d], axis=-1) / 2)
        low = (a + b + c + d) / 2
    return low, bands


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", SPECS)
def test_the_definition_and_its_inverse(name, implementation):
    spec = SPECS[name]
    x = inputs(spec)["x"]
    tolerance = 1e-2 if spec.dtype == "bfloat16" else 1e-6

    @jax.jit
    def there_and_back(x):
        low, bands = dwt(x, spec.levels, implementation=implementation)
        return (low, bands), idwt(low, bands, x.shape[1:3], implementation=implementation)

    transform, back = there_and_back(x)
    assert_close(transform, by_hand(x, spec.levels), tolerance)
    assert {leaf.dtype for leaf in jax.tree.leaves(transform)} == {x.dtype}
    assert_close(back, x, 3 * tolerance)
    energy = sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(transform))
    assert_close(energy, jnp.sum(jnp.square(x.astype(jnp.float32))), tolerance)


def test_the_inverse_is_the_transpose_and_so_the_gradient():
    """Of an orthonormal map of even size the pullback is the inverse: in both implementations, and for idwt
    the other way round."""
    x = random(0, 2, 4, 8, 3)

    @functools.partial(jax.jit, static_argnums=0)
    def pulled(implementation, x):
        wavelets, pull = jax.vjp(lambda x: dwt(x, 2, implementation=implementation), x)
        _, pull_back = jax.vjp(lambda low, bands: idwt(low, bands, implementation=implementation), *wavelets)
        return wavelets, pull(wavelets)[0], pull_back(x)

    for implementation in IMPLEMENTATIONS:
        wavelets, back, forth = pulled(implementation, x)
        assert_close(back, x, 1e-6)
        assert_close(forth, wavelets, 1e-6)


def test_what_is_refused():
    x = jnp.ones((1, 4, 6, 2))
    for bad, message in (
        ((x[0],), r"\[b, h, w, d\]"),
        ((x.astype(int),), "floating"),
        ((x, 0), "levels must be"),
    ):
        with pytest.raises(ValueError, match=message):
            dwt(*bad)
    low, bands = jnp.ones((1, 1, 2, 2)), [jnp.ones((1, 2, 3, 2, 3)), jnp.ones((1, 1, 2, 2, 3))]
    with pytest.raises(ValueError, match=r"bands\[1\]"):
        idwt(jnp.ones((1, 1, 1, 2)), bands)
    with pytest.raises(ValueError, match="the side"):
        idwt(low, bands, (5, 6))
    with pytest.raises(ValueError, match="did you mean 'xla'"):
        dwt(x, implementation="xls")
