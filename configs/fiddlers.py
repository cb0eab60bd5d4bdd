"""Fiddlers: variations of any config, which change it in place. `seqlab train lm_mamba --fiddler "longer(4)"`
applies them."""

from typing import Any

import fiddle as fdl
from fiddle import selectors

from seqlab.checks import UserError, check_divides, check_positive, nearest
from seqlab.models import Attention, Full, GatedDeltaNet, GatedLinearAttention, Mamba2, Window
from seqlab.train.override import fields, named


def tiny(cfg: fdl.Config) -> None:
    """Shrink model, windows and run to a few seconds, with every kind of layer, for tests."""
    model = cfg.model
    body = getattr(model, "backbone", model)  # of image models
    if "widths" in fields(fdl.get_callable(body)):
        body.widths, body.depths = (8,) * len(body.widths), (1,) * len(body.depths)
    else:
        mixers = getattr(body, "mixers", None)
        body.dim, body.depth = 16, len(mixers) if isinstance(mixers, tuple | list) else 1
    for mixer in (Attention, GatedDeltaNet, GatedLinearAttention):
        selectors.select(cfg, mixer, check_nonempty=False).set(heads=2)
    selectors.select(cfg, Mamba2, check_nonempty=False).set(head_dim=8, state_size=8)
    selectors.select(cfg, Window, check_nonempty=False).set(window=8, sinks=2)
    for name, value in {"length": 32, "keys": 1, "examples": 64, "held_out": 16}.items():
        if name in (fields(fdl.get_callable(cfg.data)) or {}):
            setattr(cfg.data, name, value)
    if "length" in fields(fdl.get_callable(model)):
        model.length = cfg.data.length
    cfg.batch_size, cfg.accumulate = 4, 1
    cfg.steps, cfg.log_every, cfg.checkpoint_every, cfg.validate_every, cfg.validation_windows = 4, 2, 2, 4, 4


def mixer(cfg: fdl.Config, name: str, **options: Any) -> None:
    """Another mixer in every layer, by its name in `seqlab list`: "mamba", or with options mixer("mamba",
    state_size=4)."""
    cls = named(name)
    known = fields(cls)
    if "cache" in known and "cache" not in options:  # the cache must hold a window
        options["cache"] = fdl.Config(Full, capacity=cfg.data.length)
    for option in options:
        if option not in known:
            raise UserError(f"{cls.__name__} has no option {option!r}{nearest(option, known)}")
    cfg.model.mixers = fdl.Partial(cls, **options)


def width(cfg: fdl.Config, dim: int) -> None:
    """Change the width of the model."""
    cfg.model.dim = dim


def bf16(cfg: fdl.Config) -> None:
    """Compute in bfloat16; parameters, states and sums stay float32."""
    cfg.model.dtype = "bfloat16"


def remat(cfg: fdl.Config) -> None:
    """Save only the blocks' inputs for the backward pass and recompute the rest: less memory, a third more
    time."""
    cfg.model.remat = "block"


def scan_layers(cfg: fdl.Config) -> None:
    """Compile one repetition of the layer pattern instead of all layers."""
    cfg.model.scan_layers = True


def accumulate(cfg: fdl.Config, parts: int = 4) -> None:
    """Split each batch into `parts` parts, processed one after the other."""
    cfg.accumulate = parts


def longer(cfg: fdl.Config, factor: int = 2) -> None:
    """Train for `factor` times as many steps."""
    cfg.steps *= check_positive("factor", factor)


def stretch(cfg: fdl.Config, factor: int = 2) -> None:
    """Make windows `factor` times as long, with the same number of tokens per batch."""
    cfg.batch_size //= check_divides("factor", factor, "batch_size", cfg.batch_size)
    cfg.data.length *= factor
