"""Legendre memory units (arXiv 2102.11417): a window of the past in a few coefficients, read by a layer or
inside a recurrent cell."""

import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from seqlab import kernels
from seqlab.checks import UserError, check_choice, check_positive
from seqlab.kernels.lmu import legendre
from seqlab.kernels.lmu.legendre import legendre_at
from seqlab.models.layers import ACTIVATIONS, Linear, step_by_step
from seqlab.module import Module
from seqlab.shapes import Activations, Steps, accumulator
from seqlab.state import State, mask_steps


class Pointwise(Linear):
    """A linear map stored in PyTorch as a convolution of width 1."""

    torch_layout: ClassVar = {"weight": "[out, in, 1]"}


def uniform_linear(
    inputs: int,
    outputs: int,
    *,
    std: float | None = None,
    kind: type[Linear] = Linear,
    bias: bool = True,
    rngs: nnx.Rngs,
) -> Linear:
    """A linear map as the originals initialise it: weight and `bias` uniform in ±1/sqrt(inputs), PyTorch's
    default; with `std` the weight normal of that deviation, cut off at two of them, and the bias zero."""
    linear = kind(inputs, outputs, bias=bias, rngs=rngs)
    if std is None:
        bound = 1 / math.sqrt(inputs)
        linear.weight[...] = jax.random.uniform(rngs.params(), (inputs, outputs), minval=-bound, maxval=bound)
        if bias:
            linear.bias[...] = jax.random.uniform(rngs.params(), (outputs,), minval=-bound, maxval=bound)
    else:
        linear.weight[...] = std * jax.random.truncated_normal(rngs.params(), -2.0, 2.0, (inputs, outputs))
    return linear


class LMU(Module):
    """The parallel LMU: the last theta steps of a signal as coefficients of Legendre polynomials, and a layer
    that reads them.

        u_t = relu(W_u x_t + b_u)          m_t = Ā m_{t-1} + B̄ u_t          h_t = relu(W_h [m_t ; x_t] + b_h)

    There is no recurrence from h or m into u, so all steps can be computed at once. Ā and B̄ are constants,
    computed in float64 and not trained unless `trainable_theta`. The state is m [b, q, d], float32.

    Args:
      order: coefficients d of the memory, for each channel; by default dim.
      theta: length of the window in steps.
      channels: signals q in memory, 1 as published; they share Ā and B̄.
      hidden: outputs, by default dim.
      discretizer: "zoh", or "euler", which is unstable unless theta is well above 4 order.
      trainable_theta: whether 1/theta is a parameter, `theta_inv`, read as its magnitude; theta is its
        initial value. Ā and B̄ are then computed in every call, see `legendre_at`.
      init_std: None for PyTorch's uniform initialisation; else that of a truncated normal.

    Pitfalls:
      With one channel all inputs are projected to one scalar signal: this is the published design.
      theta must suit the data: a window much longer than needed is stored coarsely, a shorter one forgets.
        bfloat16 products would cause errors of 1 to 9 % in the memory: it is stored and updated in float32
        whatever the compute dtype.
    """

    causal, lookahead, exact = True, 0, True

    def __init__(
        self,
        dim: int,
        *,
        order: int | None = None,
        theta: float = 128.0,
        channels: int = 1,
        hidden: int | None = None,
        discretizer: str = "zoh",
        trainable_theta: bool = False,
        init_std: float | None = None,
        rngs: nnx.Rngs,
    ):
        order = dim if order is None else order
        legendre(order, theta, discretizer)  # checks the arguments
        self.dim, self.order, self.theta, self.discretizer = dim, order, theta, discretizer
        self.channels, hidden = (
            check_positive("channels", channels),
            dim if hidden is None else check_positive("hidden", hidden),
        )
        self.theta_inv = nnx.Param(jnp.asarray(1 / theta, jnp.float32)) if trainable_theta else None
        self.W_u = uniform_linear(dim, channels, std=init_std, rngs=rngs)
        self.W_h = uniform_linear(channels * order + dim, hidden, std=init_std, rngs=rngs)

    def init_state(self, batch: int, dtype: jax.typing.DTypeLike = jnp.float32) -> Float[Array, "b q d"]:
        return jnp.zeros((batch, self.channels, self.order), accumulator(dtype))

    def __call__(
        self,
        x: Activations,
        state: State | None = None,
        reset: Steps | None = None,
        valid: Steps | None = None,
    ) -> tuple[Float[Array, "b t o"], State | None]:
        x = mask_steps(x, valid)
        m, new = self.memory(jax.nn.relu(self.W_u(x)), state, reset, valid)
        h = jax.nn.relu(self.W_h(jnp.concatenate([m, x], axis=-1)))
        return mask_steps(h, valid), (None if state is None else new)

    def memory(
        self,
        u: Float[Array, "b t q"],
        state: State | None = None,
        reset: Steps | None = None,
        valid: Steps | None = None,
    ) -> tuple[Float[Array, "b t n"], Float[Array, "b q d"]]:
        """The memories of all steps, channel after channel, and the last one."""
        matrices = _matrices(self, accumulator(u.dtype))
        m, state = kernels.lmu(u, *matrices, initial_state=state, reset=reset, valid=valid)
        return m.reshape(*m.shape[:2], self.channels * self.order), state


class CellState(NamedTuple):
    """`hidden` [b, n], () if there is no feedback from it; `memory` [b, q, d]; float32."""

    hidden: Float[Array, "b n"] | tuple[()]
    memory: Float[Array, "b q d"]


class RecurrentLMU(Module):
    """The LMU cell, in which hidden state and memory drive the memory: sequential, without a parallel form.

        u_t = e_x x_t [+ e_h h_{t-1}] [+ e_m m_{t-1}] [+ e_b]          m_t = Ā m_{t-1} + B̄ u_t
        h_t = tanh(W_m m_t [+ W_x x_t] [+ W_h h_{t-1}] [+ W_b])

    The hidden part reads the memory after its update. By default this is the cell of Voelker, Kajić and
    Eliasmith ("Legendre Memory Units", NeurIPS 2019): one channel, every connection in brackets, no bias. The
    switches give the form of keras-lmu, where all are off by default; its kernels are concatenations of ours:
    kernel = [e_x ; e_h], recurrent_kernel = e_m, hidden kernel = [W_m ; W_x].

    Args:
      order: coefficients d of the memory, for each channel; by default dim.
      theta: length of the window in steps.
      hidden: outputs n, by default dim.
      channels: signals q in memory; m is flattened channel by channel.
      hidden_to_memory, memory_to_memory, input_to_hidden: the connections e_h, e_m and W_x.
      use_bias: e_b; hidden_bias: W_b.
      cell: "rnn" as above; "dense" without W_h; "none", then h_t = [m_t ; x_t] itself (m_t alone without
        `input_to_hidden`).
      activation: of the hidden part: "tanh", "sigmoid", "identity" or one of
        `seqlab.models.layers.ACTIVATIONS`.
      discretizer, trainable_theta: as in `LMU`.

    Pitfalls:
      Training is sequential in time; `LMU` has the same memory without the feedback and is parallel. All
        arithmetic of the cell is in float32 whatever the compute dtype.
    """

    causal, lookahead, exact = True, 0, True
    torch_layout: ClassVar = dict.fromkeys(("e_x", "e_h", "e_m", "W_x", "W_h", "W_m"), "[out, in]")

    def __init__(
        self,
        dim: int,
        *,
        order: int | None = None,
        theta: float = 128.0,
        hidden: int | None = None,
        channels: int = 1,
        hidden_to_memory: bool = True,
        memory_to_memory: bool = True,
        input_to_hidden: bool = True,
        use_bias: bool = False,
        hidden_bias: bool = False,
        cell: str = "rnn",
        activation: str = "tanh",
        discretizer: str = "zoh",
        trainable_theta: bool = False,
        rngs: nnx.Rngs,
    ):
        order = dim if order is None else order
        legendre(order, theta, discretizer)
        check_choice(cell, ("rnn", "dense", "none"), "cell")
        self.dim, self.order, self.theta, self.discretizer = dim, order, theta, discretizer
        self.channels, self.cell, self.input_to_hidden = (
            check_positive("channels", channels),
            cell,
            input_to_hidden,
        )
        self.activation = _activation(activation)
        memory = channels * order
        read = memory + dim * input_to_hidden
        if cell == "none" and hidden not in (None, read):
            raise UserError(
                f"hidden must be {read}, the width of what is read, where cell='none', got {hidden}"
            )
        self.outputs = read if cell == "none" else dim if hidden is None else check_positive("hidden", hidden)
        self.feeds_back = cell == "rnn" or hidden_to_memory

        def encoder(inputs: int) -> nnx.Param:
            bound = math.sqrt(3 / inputs)
            return nnx.Param(
                jax.random.uniform(rngs.params(), (inputs, channels), minval=-bound, maxval=bound)
            )

        def kernel(inputs: int) -> nnx.Param:
            std = math.sqrt(2 / (inputs + self.outputs))  # Xavier
            return nnx.Param(std * jax.random.normal(rngs.params(), (inputs, self.outputs)))

        self.theta_inv = nnx.Param(jnp.asarray(1 / theta, jnp.float32)) if trainable_theta else None
        self.e_x = encoder(dim)
        self.e_h = encoder(self.outputs) if hidden_to_memory else None
        self.e_m = nnx.Param(jnp.zeros((memory, channels))) if memory_to_memory else None
        self.e_b = nnx.Param(jnp.zeros((channels,))) if use_bias else None
        self.W_m = None if cell == "none" else kernel(memory)
        self.W_x = kernel(dim) if input_to_hidden and cell != "none" else None
        self.W_h = kernel(self.outputs) if cell == "rnn" else None
        self.W_b = nnx.Param(jnp.zeros((self.outputs,))) if hidden_bias and cell != "none" else None

    def init_state(self, batch: int, dtype: jax.typing.DTypeLike = jnp.float32) -> CellState:
        wide = accumulator(dtype)
        hidden = jnp.zeros((batch, self.outputs), wide) if self.feeds_back else ()
        return CellState(hidden, jnp.zeros((batch, self.channels, self.order), wide))

    def __call__(
        self,
        x: Activations,
        state: State | None = None,
        reset: Steps | None = None,
        valid: Steps | None = None,
    ) -> tuple[Float[Array, "b t o"], State | None]:
        wide = accumulator(x.dtype)
        names = ("e_x", "e_h", "e_m", "e_b", "W_m", "W_x", "W_h", "W_b")
        p = {name: getattr(self, name)[...].astype(wide) for name in names if getattr(self, name) is not None}
        A, B = (jnp.asarray(x, wide) for x in _matrices(self, wide))
        inputs = mask_steps(x, valid).astype(wide)
        # What depends on the inputs alone is one product for all steps.
        driven = inputs
        if self.cell != "none":  # without W_x and W_b still a number per step
            steps = jnp.zeros((*x.shape[:2], self.outputs), wide)
            driven = steps + _total(p, W_x=inputs) + p.get("W_b", 0)
        arrays = (
            _total(p, e_x=inputs) + p.get("e_b", 0),
            driven,
            reset if valid is None or reset is None else reset & valid,
            valid,
        )

        def step(
            old: CellState, now: tuple[Array | None, ...], p: dict[str, Array], A: Array, B: Array
        ) -> tuple[CellState, Array]:
            u, driven, reset, valid = now
            h, m = (
                old
                if reset is None
                else jax.tree.map(lambda leaf: _where(reset, jnp.zeros_like(leaf), leaf), old)
            )
            u = u + _total(p, e_h=h, e_m=_flat(m))
            m = jnp.matmul(m, A.T, precision=_HIGHEST) + u[:, :, None] * B
            if self.cell == "none":
                y = jnp.concatenate([_flat(m), driven], axis=-1) if self.input_to_hidden else _flat(m)
            else:
                y = self.activation(driven + _total(p, W_m=_flat(m), W_h=h))
            new = CellState(y if self.feeds_back else (), m)
            if valid is not None:
                new, y = jax.tree.map(lambda a, b: _where(valid, a, b), (new, y), (old, jnp.zeros_like(y)))
            return new, y

        start = self.init_state(x.shape[0], wide) if state is None else state
        new, y = step_by_step(step, start, arrays, p, A, B)
        return y.astype(x.dtype), (None if state is None else new)


_HIGHEST = jax.lax.Precision.HIGHEST


def _total(p: dict[str, Array], **inputs: Array | tuple[()]) -> Array | float:
    """The sum of the inputs through those of the named maps that exist."""
    products = (jnp.matmul(x, p[name], precision=_HIGHEST) for name, x in inputs.items() if name in p)
    return sum(products, start=0.0)


def _flat(m: Float[Array, "b q d"]) -> Float[Array, "b n"]:
    return m.reshape(m.shape[0], -1)


def _where(flags: Array, new: Array, old: Array) -> Array:
    return jnp.where(flags.reshape(-1, *(1,) * (new.ndim - 1)), new, old)


def _activation(name: str) -> Callable[[Array], Array]:
    more = {"tanh": jnp.tanh, "sigmoid": jax.nn.sigmoid, "identity": lambda x: x}
    check_choice(name, (*more, *ACTIVATIONS), "activation")
    return more[name] if name in more else ACTIVATIONS[name]


def _matrices(module: LMU | RecurrentLMU, dtype: jax.typing.DTypeLike) -> tuple[Any, Any]:
    """Ā and B̄: constants of the host, or of the window that is learnt."""
    if module.theta_inv is None:
        return legendre(module.order, module.theta, module.discretizer)
    inverse = jnp.abs(module.theta_inv[...].astype(dtype))
    return legendre_at(module.order, inverse, module.discretizer)
