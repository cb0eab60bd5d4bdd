"""Optimizers: optax, with the choices of a sequence model made once."""

import re

import jax.numpy as jnp
import optax

from seqlab.module import Params

# Never decayed: norms, biases, the parameters of recurrences, whose size has a meaning, and MambaMixer's sums, which are at home at 1.
NO_DECAY = r"(^|\.)(bias|A_log|D|dt_bias|.*norm\.weight|scale|alpha|beta|theta|gamma)$"


def adamw(
    steps: int,
    *,
    peak: float = 1e-3,
    final: float = 0.1,
    warmup: int = 100,
    b1: float = 0.9,
    b2: float = 0.95,
    weight_decay: float = 0.1,
    clip: float | None = 1.0,
) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101) under a linear warm-up and a cosine to `final` times the peak, gradients clipped by their global norm."""
    if steps < 1 or warmup < 0 or peak <= 0:
        raise ValueError(f"steps and peak must be positive and warmup not negative, got steps={steps}, peak={peak}, warmup={warmup}")
    rate = schedule(steps, peak=peak, final=final, warmup=warmup)
    decay = optax.adamw(rate, b1=b1, b2=b2, weight_decay=weight_decay, mask=decayed)
    return decay if clip is None else optax.chain(optax.clip_by_global_norm(clip), decay)


def schedule(steps: int, *, peak: float, final: float = 0.1, warmup: int = 100) -> optax.Schedule:
    """Learning rate by step: from 0 to `peak` in `warmup` steps, then a cosine to `final * peak` at `steps`."""
    warmup = min(warmup, steps // 2)
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(steps, warmup + 1), final * peak)


def decayed(params: Params) -> dict[str, bool]:
    """Which parameters weight decay acts on: matrices, by name."""
    return {name: leaf.ndim >= 2 and re.search(NO_DECAY, name) is None for name, leaf in params.items()}


def global_norm(tree: Params) -> jnp.ndarray:
    """Euclidean norm of all leaves together, in float32."""
    return optax.tree.norm(tree).astype(jnp.float32)
