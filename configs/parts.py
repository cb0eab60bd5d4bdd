"""Shared parts of configs. Modules are `fdl.Partial` (the model builds them, layer by layer), values are
`fdl.Config`."""

import fiddle as fdl

from seqlab.models import (
    Attention,
    Full,
    GatedDeltaNet,
    GatedLinearAttention,
    LanguageModel,
    Mamba,
    Mamba2,
    Window,
)
from seqlab.train.augment import GEOMETRIC, Augment
from seqlab.train.experiment import Experiment
from seqlab.train.images import DigitImages
from seqlab.train.optim import adamw
from seqlab.train.quality import accuracy
from seqlab.train.step import Loss
from seqlab.train.text import Text
from seqlab.train.vision import class_loss, top1

BYTES = 256  # the vocabulary of the byte tokenizer


def language_run(
    model: fdl.Partial, *, length: int = 256, lead: bool = False, peak: float = 3e-3, **run: int
) -> fdl.Config:
    """A byte language model trained on the sources of the Python standard library; `run` are fields of
    `Experiment`."""
    data = fdl.Config(Text, length=length, lead=lead)
    return fdl.Config(Experiment, model=model, data=data, optimizer=fdl.Partial(adamw, peak=peak), **run)


def byte_model(dim: int, depth: int, *mixers: fdl.Partial, **options: object) -> fdl.Partial:
    """A language model over bytes with these mixers, alternating; `options` are fields of `LanguageModel`."""
    return fdl.Partial(LanguageModel, vocab_size=BYTES, dim=dim, depth=depth, mixers=mixers, **options)


def task_run(model: fdl.Partial, data: fdl.Config, *, peak: float = 3e-3, **run: int) -> fdl.Config:
    """A run of a model on a task, with accuracy as its metric. Small runs use no weight decay."""
    optimizer = fdl.Partial(adamw, peak=peak, weight_decay=0.0)
    return fdl.Config(Experiment, model=model, data=data, optimizer=optimizer, metric=accuracy, **run)


def image_run(
    model: fdl.Partial,
    data: fdl.Config,
    *,
    metric: Loss = top1,
    loss: Loss | fdl.Partial | None = None,
    peak: float = 3e-3,
    **run: int,
) -> fdl.Config:
    """A run of an image model, with accuracy as its default metric, evaluated with averaged parameters."""
    optimizer = fdl.Partial(adamw, peak=peak, b2=0.999, weight_decay=0.05, average=0.98)
    loss = fdl.Partial(class_loss, smoothing=0.1) if loss is None else loss
    return fdl.Config(
        Experiment, model=model, data=data, optimizer=optimizer, loss=loss, metric=metric, **run
    )


def digit_images() -> fdl.Config:
    """scikit-learn's digits, moved by up to a place and turned, sheared or shifted once."""
    return fdl.Config(
        DigitImages, augment=fdl.Config(Augment, shift=1, operations=1, magnitude=5.0, names=GEOMETRIC)
    )


def token_model(
    vocab_size: int, dim: int, depth: int, *mixers: fdl.Partial, **options: object
) -> fdl.Partial:
    """A model over a task's tokens; without channel mixers unless `options` name one, since tasks test the
    mixers' memory."""
    return fdl.Partial(
        LanguageModel,
        vocab_size=vocab_size,
        dim=dim,
        depth=depth,
        mixers=mixers,
        **({"channel_mixer": None} | options),
    )


def attention(capacity: int, heads: int = 4, **options: object) -> fdl.Partial:
    """Full attention over up to `capacity` steps."""
    return fdl.Partial(Attention, heads=heads, cache=fdl.Config(Full, capacity=capacity), **options)


def window_attention(window: int, sinks: int = 4, heads: int = 4) -> fdl.Partial:
    """Attention over the last `window` steps and the first `sinks`, in constant memory."""
    return fdl.Partial(Attention, heads=heads, cache=fdl.Config(Window, window=window, sinks=sinks))


def gated_linear(heads: int = 4, conv_width: int | None = 4) -> fdl.Partial:
    """Gated linear attention with a short convolution, which it needs to compare neighbouring tokens."""
    return fdl.Partial(GatedLinearAttention, heads=heads, conv_width=conv_width)


def mamba(state_size: int = 16) -> fdl.Partial:
    """The selective state-space mixer with the published sizes."""
    return fdl.Partial(Mamba, state_size=state_size)


def mamba2(head_dim: int = 32, state_size: int = 64) -> fdl.Partial:
    """The state-space mixer with one decay per head; heads and state smaller than published, for models of
    this size."""
    return fdl.Partial(Mamba2, head_dim=head_dim, state_size=state_size)


def gated_delta(heads: int = 4) -> fdl.Partial:
    """The gated delta rule with the published convolution, gate and norm."""
    return fdl.Partial(GatedDeltaNet, heads=heads)
