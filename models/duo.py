"""DuoAttention: one gate per key/value head, trained with frozen weights, identifies the heads that need the
whole past (arXiv 2410.10819)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from seqlab import kernels
from seqlab.checks import UserError
from seqlab.models.attention import Attention
from seqlab.models.backbone import Block
from seqlab.models.language_model import LanguageModel
from seqlab.shapes import Tokens

Gates = Float[Array, "l g"]  # one per layer and key/value head


class DuoLoss(NamedTuple):
    """`total` = `distill` + weight * `regularizer`."""

    total: Float[Array, ""]
    distill: Float[Array, ""]
    regularizer: Float[Array, ""]


def gates(model: LanguageModel) -> Gates:
    """Initial gates: every head keeps the whole past."""
    layers = [block.mixer for block in model.backbone.blocks]
    for i, mixer in enumerate(layers):
        if not isinstance(mixer, Attention):
            raise UserError(
                f"every mixer of model must be an Attention, layer {i} has a {type(mixer).__name__}"
            )
    for i, block in enumerate(model.backbone.blocks):
        if block.parallel or block.branch_scale != 1.0 or block.mixer_out_norm is not None:
            raise UserError(f"every block of model must have its default form, layer {i} has another")
    return jnp.ones((len(layers), layers[0].kv_heads))


def two_streams(
    model: LanguageModel, alpha: Gates, tokens: Tokens, *, sinks: int, window: int
) -> tuple[Float[Array, "b t d"], Float[Array, "b t d"]]:
    """Features of the model itself and of the model with gated heads, both after the final norm.

        x_full <- x_full + W_o O_full
        x_duo  <- x_duo + W_o (a O_full + (1 - a) O_str),  a = clip(alpha, 0, 1)

    O_full attends to the whole past of the full stream, and is constant with respect to the gates; O_str
    attends in the duo stream to the first `sinks` keys and the last `window`, the query's own included.
    Positions are absolute in both.
    """
    full = duo = model.embed(tokens)
    for block, gate in zip(model.backbone.blocks, _clamped(alpha), strict=True):
        whole = jax.lax.stop_gradient(_heads_of(block, full, {}))
        some = _heads_of(block, duo, {"sinks": sinks, "window": window})
        a = jnp.repeat(gate, block.mixer.heads // block.mixer.kv_heads)[:, None].astype(some.dtype)
        full, duo = (
            _rest_of(block, x, heads) for x, heads in ((full, whole), (duo, a * whole + (1 - a) * some))
        )
    return jax.lax.stop_gradient(model.backbone.norm(full)), model.backbone.norm(duo)


@jax.custom_jvp
def _clamped(alpha: Gates) -> Gates:
    """Gates between 0 and 1. At exactly 0 and 1 the full gradient passes, while that of `jnp.clip` is half of
    it: gates start at 1, and training clips them to the bounds before every step."""
    return jnp.clip(alpha, 0, 1)


@_clamped.defjvp
def _clamped_jvp(primals: tuple[Gates], tangents: tuple[Gates]) -> tuple[Gates, Gates]:
    (alpha,), (change,) = primals, tangents
    return _clamped(alpha), jnp.where((alpha >= 0) & (alpha <= 1), change, 0)


def duo_loss(
    model: LanguageModel,
    alpha: Gates,
    tokens: Tokens,
    labels: Bool[Array, "b t"],
    *,
    sinks: int,
    window: int,
    weight: float = 0.05,
) -> DuoLoss:
    """The loss of the gates: the squared distance of the two streams where `labels` is True, and the size of
    the gates."""
    full, duo = (x.astype(jnp.float32) for x in two_streams(model, alpha, tokens, sinks=sinks, window=window))
    keep = labels.astype(jnp.float32)
    distill = jnp.sum(jnp.mean(jnp.square(full - duo), axis=-1) * keep) / jnp.maximum(keep.sum(), 1)
    regularizer = jnp.mean(jnp.abs(alpha))
    return DuoLoss(distill + weight * regularizer, distill, regularizer)


def fit_gates(
    model: LanguageModel,
    batches: Any,
    *,
    steps: int,
    sinks: int,
    window: int,
    rate: float = 0.02,
    weight: float = 0.05,
) -> tuple[Gates, list[DuoLoss]]:
    """Gates trained for `steps` by AdamW without decay; `batches` gives (tokens, labels) by step.

    The learning rate rises over the first fifth and falls over the last, not below a tenth; gates stay in [0,
    1].
    """
    import optax

    def schedule(step):
        fifth = max(steps / 5, 1)
        return rate * jnp.minimum(
            1.0, jnp.maximum(jnp.minimum((step + 1) / fifth, (steps - step) / fifth), 0.1)
        )

    optimizer = optax.adamw(schedule, weight_decay=0.0)

    def objective(alpha, tokens, labels):
        loss = duo_loss(model, alpha, tokens, labels, sinks=sinks, window=window, weight=weight)
        return loss.total, loss

    @jax.jit
    def update(alpha, state, tokens, labels):
        alpha = jnp.clip(alpha, 0, 1)
        (_, loss), gradient = jax.value_and_grad(objective, has_aux=True)(alpha, tokens, labels)
        change, state = optimizer.update(gradient, state, alpha)
        return alpha + change, state, loss

    alpha, history = gates(model), []
    state = optimizer.init(alpha)
    for step in range(steps):
        alpha, state, loss = update(alpha, state, *batches(step))
        history.append(jax.device_get(loss))
    return jnp.clip(alpha, 0, 1), history


def retrieval_heads(alpha: Gates, sparsity: float, seed: int = 0) -> list[list[bool]]:
    """The heads that keep the whole past, per layer and key/value head. The share `sparsity` of all heads
    with the smallest gates streams."""
    if not 0 <= sparsity <= 1:
        raise UserError(f"sparsity must be a share between 0 and 1, got {sparsity}")
    if sparsity in (0, 1):
        return np.full(alpha.shape, sparsity == 0).tolist()
    # Ties between equal gates are broken at random.
    noisy = np.asarray(alpha, np.float64) + np.random.default_rng(seed).uniform(0, 1e-6, alpha.shape)
    return (noisy >= np.quantile(noisy, sparsity)).tolist()


def _heads_of(block: Block, x: Float[Array, "b t d"], limits: dict[str, Any]) -> Float[Array, "b t h k"]:
    mixer = block.mixer
    q, k, v, _ = mixer.project(block.mixer_norm(x))
    positions: Int[Array, "b t"] = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
    q, k = mixer.rotary(q, positions), mixer.rotary(k, positions)
    limits = limits | {"softcap": mixer.softcap, "scale": mixer.scale}
    return mixer.without_sink(*kernels.attention(q, k, v, **limits))


def _rest_of(block: Block, x: Float[Array, "b t d"], heads: Float[Array, "b t h k"]) -> Float[Array, "b t d"]:
    x = x + block.mixer.read_out(heads, block.mixer_norm(x))
    return x if block.channel_mixer is None else x + block.channel_mixer(block.channel_norm(x))[0]
