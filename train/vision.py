"""Losses and metrics of image models: over classes, positions and pictures.

A batch has `inputs` [b, h, w, c], `targets`, and `valid` [b], or [b, h, w] for dense targets. Targets are
classes (integers) or shares of all classes (numbers, one axis more), as mixup makes them; of super-resolution
they are pictures.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from seqlab.train.quality import metric
from seqlab.train.step import Batch

_Sums = tuple[Float[Array, ""], Float[Array, ""]]


def class_loss(model: Any, batch: Batch, smoothing: float = 0.0) -> _Sums:
    """Cross entropy in nats, summed over the valid targets, and their number. `smoothing` of every target is
    spread over all classes."""
    logits = model(batch["inputs"]).astype(jnp.float32)
    log_p = jax.nn.log_softmax(logits, axis=-1)
    targets = batch["targets"]
    if targets.ndim == logits.ndim:
        likely = jnp.sum(targets * log_p, axis=-1)
    else:
        likely = jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    losses = -(1 - smoothing) * likely - smoothing * jnp.mean(log_p, axis=-1)
    return _total(losses, batch["valid"])


@metric("top-1 accuracy", better="higher")
def top1(model: Any, batch: Batch) -> _Sums:
    """The number of valid targets that are the likeliest class, and the number of targets; per position for
    dense targets."""
    right = jnp.argmax(model(batch["inputs"]), axis=-1) == batch["targets"]
    return _total(right, batch["valid"])


@metric("mean IoU", better="higher")
def mean_iou(model: Any, batch: Batch) -> _Sums:
    """Intersection over union of predicted and true positions, the mean over an image's classes, summed over
    images; and their number.

    A class counts for an image if it is in its targets or predictions. Metrics over whole data sets, which
    add up positions first, differ.
    """
    logits = model(batch["inputs"])
    classes = jnp.arange(logits.shape[-1])
    keep = batch["valid"][..., None]
    said = (jnp.argmax(logits, axis=-1)[..., None] == classes) & keep
    true = (batch["targets"][..., None] == classes) & keep
    both, either = (jnp.sum(places, axis=(1, 2), dtype=jnp.float32) for places in (said & true, said | true))
    there = either > 0
    iou = jnp.sum(both / jnp.maximum(either, 1), axis=-1) / jnp.maximum(jnp.sum(there, axis=-1), 1)
    return _total(iou, jnp.any(batch["valid"], axis=(1, 2)))


def picture_loss(model: Any, batch: Batch) -> _Sums:
    """The mean absolute error of every valid picture, summed, and their number."""
    return _total(jnp.mean(jnp.abs(_error(model, batch)), axis=(1, 2, 3)), batch["valid"])


@metric("dB PSNR a picture", better="higher")
def psnr(model: Any, batch: Batch) -> _Sums:
    """Peak signal-to-noise ratio in decibels of every valid picture with values in [0, 1], summed, and their
    number."""
    square = jnp.mean(jnp.square(jnp.clip(_error(model, batch), -1, 1)), axis=(1, 2, 3))
    return _total(-10 / math.log(10) * jnp.log(jnp.maximum(square, 1e-10)), batch["valid"])


def _error(model: Any, batch: Batch) -> Float[Array, "b h w c"]:
    return model(batch["inputs"]).astype(jnp.float32) - batch["targets"].astype(jnp.float32)


def _total(values: Array, valid: Array) -> _Sums:
    return jnp.sum(jnp.where(valid, values, 0), dtype=jnp.float32), jnp.sum(valid, dtype=jnp.float32)
