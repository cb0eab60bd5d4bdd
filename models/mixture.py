"""A mixture of experts as a channel mixer, without capacity: no token is ever dropped, so an output does not
depend on what else is in the batch."""

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from seqlab.checks import UserError, check_choice, check_positive
from seqlab.models.layers import ACTIVATIONS, Linear, SwiGLU
from seqlab.module import Module
from seqlab.shapes import Maps, Steps, accumulator
from seqlab.state import State, mask_steps

# Of so few rows each one's weights are gathered; of more, rows are sorted by expert.
_FEW_ROWS = 16


class MixtureOfExperts(Module):
    """Channel mixer: the sum of `chosen` of `experts` gated MLPs, weighted by a softmax router (Shazeer et
    al., arXiv 1701.06538), as in Mixtral (arXiv 2401.04088) and Qwen3 (arXiv 2505.09388):

        p = softmax(W_r x),  y = sum of p_e down_e(activation(gate_e x) * up_e x) over the largest p_e

    Pointwise in time, without state. Rows are sorted by expert and multiplied group by group (MegaBlocks,
    arXiv 2211.15841), so the work is that of `chosen` experts, and none is dropped.

    Args:
      dim: model width d.
      hidden: hidden width of one expert; default as in `SwiGLU`, divided by `chosen`.
      experts, chosen: how many there are, and how many a step uses.
      normalize: whether the weights of the chosen sum to 1 (Mixtral); else they are those of the softmax over
        all (Qwen2-MoE).
      shared_hidden: hidden width of one more expert, which every step uses; None for none. `shared_gate`:
        whether its output is multiplied by sigmoid(w x) (Qwen2-MoE).
      activation: of the experts.
      balance: weight of the loss that balances the experts, experts * sum_e f_e P_e, where f_e is the share
        of steps that chose e and P_e its mean probability (Switch Transformer, arXiv 2101.03961). Only its
        gradient is added, once per valid step: for objectives that sum over steps, as that of the trainer.

    Pitfalls:
      Without `balance` training may use a few experts only; with it the gradient of a step depends on the
        rest of its batch. Nearly equal probabilities are ordered by rounding errors, so two programs may
        choose another expert of two that tie.
    """

    causal, lookahead, exact = True, 0, True
    torch_names: ClassVar = {
        "router": "gate",
        "gate_up": ("experts.{}.gate_proj.weight", "experts.{}.up_proj.weight"),
        "down": "experts.{}.down_proj.weight",
        "shared": "shared_expert",
        "shared_gate": "shared_expert_gate",
    }
    torch_layout: ClassVar = {"gate_up": "[out, in]", "down": "[out, in]"}

    def __init__(
        self,
        dim: int,
        *,
        hidden: int | None = None,
        experts: int = 8,
        chosen: int = 2,
        normalize: bool = True,
        shared_hidden: int | None = None,
        shared_gate: bool = False,
        activation: str = "silu",
        balance: float = 0.0,
        out_scale: float = 1.0,
        rngs: nnx.Rngs,
    ):
        check_choice(activation, tuple(ACTIVATIONS), "activation")
        self.dim, self.activation, self.normalize, self.balance = dim, activation, normalize, balance
        self.experts, self.chosen = check_positive("experts", experts), check_positive("chosen", chosen)
        if chosen > experts:
            raise UserError(f"chosen must not exceed experts={experts}, got {chosen}")
        if shared_gate and shared_hidden is None:
            raise UserError("shared_gate needs shared_hidden, got None")
        hidden = -(-8 * dim // (3 * 64 * chosen)) * 64 if hidden is None else check_positive("hidden", hidden)
        self.router = Linear(dim, experts, rngs=rngs)
        shapes = (experts, dim, 2 * hidden), (experts, hidden, dim)
        up, down = (jax.random.normal(rngs.params(), shape) for shape in shapes)
        self.gate_up = nnx.Param(up / math.sqrt(dim))
        self.down = nnx.Param(down * (out_scale / math.sqrt(hidden)))
        self.shared = (
            None
            if shared_hidden is None
            else SwiGLU(dim, hidden=shared_hidden, activation=activation, out_scale=out_scale, rngs=rngs)
        )
        self.shared_gate = Linear(dim, 1, rngs=rngs) if shared_gate else None

    @property
    def torch_stacks(self) -> dict[str, int]:
        """How many published matrices each array stacks."""
        return {"gate_up": self.experts, "down": self.experts}

    def init_state(self, batch: int, dtype: jax.typing.DTypeLike = jnp.float32) -> tuple[()]:
        return ()

    def __call__(
        self,
        x: Maps,
        state: State | None = None,
        reset: Steps | None = None,
        valid: Steps | None = None,
    ) -> tuple[Maps, State | None]:
        x = mask_steps(x, valid)
        rows = x.reshape(-1, self.dim)
        there = None if valid is None else valid.reshape(-1)
        weights, chosen = self.route(rows, there)
        y = jnp.sum(self._expert(rows, chosen) * weights[..., None].astype(x.dtype), axis=1)
        if self.shared is not None:
            more, _ = self.shared(rows)
            gate = None if self.shared_gate is None else jax.nn.sigmoid(self.shared_gate(rows))
            y = y + (more if gate is None else more * gate)
        return y.reshape(x.shape), state

    def route(
        self, x: Float[Array, "n d"], valid: Float[Array, " n"] | None = None
    ) -> tuple[Float[Array, "n k"], Int[Array, "n k"]]:
        """Weights and numbers of the chosen experts of each row, the largest first; weights are float32."""
        probabilities = jax.nn.softmax(self.router(x, accumulator(x.dtype)), axis=-1)
        weights, chosen = jax.lax.top_k(probabilities, self.chosen)
        if self.normalize:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        if self.balance:
            weights = _with_loss(weights, self.balance * self._imbalance(probabilities, chosen, valid))
        return weights, chosen

    def _imbalance(self, probabilities: Array, chosen: Array, valid: Array | None) -> Float[Array, ""]:
        """The balancing loss, times the number of valid rows."""
        keep = jnp.ones(chosen.shape[0]) if valid is None else valid.astype(jnp.float32)
        count = jnp.maximum(jnp.sum(keep), 1.0)
        hits = jax.nn.one_hot(chosen, self.experts).sum(axis=1) / self.chosen
        shares = jnp.sum(hits * keep[:, None], axis=0) / count
        return self.experts * jnp.sum(shares * jnp.sum(probabilities * keep[:, None], axis=0))

    def _expert(self, x: Float[Array, "n d"], chosen: Int[Array, "n k"]) -> Float[Array, "n k d"]:
        """What the chosen experts make of each row."""
        up, down = self.gate_up[...].astype(x.dtype), self.down[...].astype(x.dtype)
        act, flat = ACTIVATIONS[self.activation], chosen.reshape(-1)
        few = isinstance(x.shape[0], int) and flat.shape[0] <= _FEW_ROWS
        if few:
            order, back = None, None
            rows = jnp.repeat(x, self.chosen, axis=0)
        else:
            order = jnp.argsort(flat)
            back = jnp.argsort(order)
            rows = x[order // self.chosen]
        groups = flat if few else jnp.bincount(flat, length=self.experts)
        product = _gathered_product if few else grouped_product
        gate, above = jnp.split(product(rows, up, groups), 2, axis=-1)
        y = product(act(gate) * above, down, groups)
        return (y if back is None else y[back]).reshape(*chosen.shape, self.dim)


def grouped_product(
    x: Float[Array, "n i"], weight: Float[Array, "e i o"], sizes: Int[Array, " e"]
) -> Float[Array, "n o"]:
    """x_r W_e for rows sorted by group e, of which group e has `sizes[e]`; sizes add up to n.

    On a CPU, whose `jax.lax.ragged_dot` multiplies every row with every matrix, in blocks of rows of one
    group.
    """
    if jax.default_backend() != "cpu" or not isinstance(x.shape[0], int):
        return jax.lax.ragged_dot(x, weight, sizes.astype(jnp.int32))
    n, groups = x.shape[0], weight.shape[0]
    block = int(np.clip(2 ** math.ceil(math.log2(max(n / groups, 1))), 8, 128))
    blocks = -(-sizes // block)
    ends = jnp.cumsum(blocks)
    number = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(n), side="right")  # the group of each row
    begins = jnp.cumsum(sizes) - sizes
    slots = (ends - blocks)[number] * block + jnp.arange(n) - begins[number]
    most = n // block + groups  # blocks that any sizes need
    padded = jnp.zeros((most * block, x.shape[1]), x.dtype).at[slots].set(x, unique_indices=True)
    owner = jnp.minimum(jnp.searchsorted(ends, jnp.arange(most), side="right"), groups - 1)
    y = _block_product(padded.reshape(most, block, -1), weight, owner)
    return y.reshape(most * block, -1)[slots]


def _gathered_product(x: Array, weight: Array, number: Array) -> Array:
    """x_r W_e(r) for a few rows."""
    return jnp.einsum("ni,nio->no", x, weight[number])


@jax.custom_vjp
def _block_product(
    x: Float[Array, "m b i"], weight: Float[Array, "e i o"], owner: Int[Array, " m"]
) -> Float[Array, "m b o"]:
    """x_m W_owner(m), one block after the other."""
    return jax.lax.map(lambda item: item[0] @ weight[item[1]], (x, owner))


def _block_forward(x: Array, weight: Array, owner: Array) -> tuple[Array, Any]:
    return _block_product(x, weight, owner), (x, weight, owner)


def _block_backward(saved: Any, dy: Array) -> tuple[Array, Array, None]:
    x, weight, owner = saved

    def add(dw: Array, item: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        block, gradient, e = item
        # In place: the loop carries one array, of which it changes one matrix.
        return dw.at[e].add(block.T @ gradient), gradient @ weight[e].T

    dw, dx = jax.lax.scan(add, jnp.zeros_like(weight), (x, dy, owner))
    return dx, dw, None


_block_product.defvjp(_block_forward, _block_backward)


@jax.custom_vjp
def _with_loss(x: Array, loss: Float[Array, ""]) -> Array:
    """`x`; in the gradient, as if `loss` were added to the objective."""
    return x


_with_loss.defvjp(lambda x, loss: (x, None), lambda _, dx: (dx, jnp.ones(())))
