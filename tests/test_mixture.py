"""The mixture of experts: equal to every expert computed densely, in values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import assert_close, random

import seqlab
from seqlab.models import MixtureOfExperts
from seqlab.models.mixture import grouped_product


def dense(model, x):
    """Every expert for every row, of which the chosen are taken."""
    p = np.asarray(jax.nn.softmax(x @ model.router.weight[...], axis=-1), np.float64)
    y = np.zeros(x.shape)
    for i, row in enumerate(np.asarray(x, np.float64)):
        best = np.argsort(-p[i])[: model.chosen]
        weights = p[i][best] / (p[i][best].sum() if model.normalize else 1.0)
        for e, weight in zip(best, weights, strict=True):
            gate, up = np.split(row @ np.asarray(model.gate_up[e], np.float64), 2)
            y[i] += weight * (gate / (1 + np.exp(-gate)) * up) @ np.asarray(model.down[e], np.float64)
    return y


@pytest.mark.parametrize("rows", [3, 41])
@pytest.mark.parametrize("normalize", [True, False])
def test_it_is_the_weighted_sum_of_the_chosen_experts(rows, normalize):
    model = MixtureOfExperts(8, hidden=6, experts=5, chosen=3, normalize=normalize, rngs=nnx.Rngs(0))
    x = random(1, 1, rows, 8)
    assert_close(model(x)[0][0], dense(model, x[0]), 1e-5)


def test_groups_of_any_size_and_their_gradients():
    x, weight = random(0, 40, 6), random(1, 4, 6, 5)
    for sizes in ([40, 0, 0, 0], [0, 0, 0, 40], [9, 0, 23, 8], [10, 10, 10, 10]):
        owner = np.repeat(np.arange(4), sizes)

        def gathered(x, weight, owner=owner):
            return jnp.einsum("ni,nio->no", x, weight[owner])

        def grouped(x, weight, sizes=sizes):
            return grouped_product(x, weight, jnp.asarray(sizes))

        for function in (lambda f: f(x, weight), lambda f: jax.grad(total(f), (0, 1))(x, weight)):
            for ours, theirs in zip(*map(jax.tree.leaves, map(function, (grouped, gathered))), strict=True):
                assert_close(ours, theirs, 1e-5, str(sizes))


def total(function):
    return lambda x, weight: jnp.sum(jnp.sin(function(x, weight)))


def test_balance_adds_the_gradient_of_the_balancing_loss_alone():
    x, valid = random(2, 2, 20, 8), np.arange(20) < np.array([[20], [7]])
    plain, balanced = (
        MixtureOfExperts(8, hidden=6, experts=4, balance=balance, rngs=nnx.Rngs(0)) for balance in (0, 0.5)
    )
    static, params = seqlab.split(balanced)
    assert_close(balanced(x, None, None, valid)[0], plain(x, None, None, valid)[0], 0)

    def objective(params, static):
        return jnp.sum(jnp.sin(seqlab.merge(static, params)(x, None, None, valid)[0]))

    def loss(params):  # Switch Transformer, equations 4 to 6, times the number of steps
        p = jax.nn.softmax(x[valid] @ params["router.weight"], axis=-1)
        shares = jax.nn.one_hot(jax.lax.top_k(p, 2)[1], 4).mean(axis=(0, 1))
        return 0.5 * 4 * jnp.sum(shares * p.mean(axis=0)) * valid.sum()

    whole = jax.grad(objective)(params, static)
    parts = jax.grad(objective)(params, seqlab.split(plain)[0])
    for name, more in jax.grad(loss)(params).items():
        assert_close(whole[name], parts[name] + more, 1e-4, name)


def test_what_cannot_be_is_refused():
    for options, message in (
        ({"chosen": 9}, "chosen must not exceed experts=8, got 9"),
        ({"shared_gate": True}, "shared_gate needs shared_hidden"),
        ({"activation": "sil"}, "did you mean 'silu'"),
    ):
        with pytest.raises(ValueError, match=message):
            MixtureOfExperts(8, rngs=nnx.Rngs(0), **options)
