"""Variations of any config, one verb each; they change a config in place. `seqlab train lm_mamba --fiddler "longer(4)"` applies them."""

import fiddle as fdl
from fiddle import selectors

from seqlab.models import Attention, GatedDeltaNet, GatedLinearAttention, Mamba2, Window


def tiny(cfg: fdl.Config) -> None:
    """Shrink model, windows and run to what a test can afford: seconds, and still every kind of layer."""
    model = cfg.model
    model.dim, model.depth = 16, len(model.mixers) if isinstance(model.mixers, tuple | list) else 1
    for mixer in (Attention, GatedDeltaNet, GatedLinearAttention):
        selectors.select(cfg, mixer, check_nonempty=False).set(heads=2)
    selectors.select(cfg, Mamba2, check_nonempty=False).set(head_dim=8, state_size=8)
    selectors.select(cfg, Window, check_nonempty=False).set(window=8, sinks=2)
    cfg.data.length, cfg.batch_size, cfg.accumulate = 32, 4, 1
    cfg.steps, cfg.log_every, cfg.checkpoint_every, cfg.validate_every, cfg.validation_windows = 4, 2, 2, 4, 4


def bf16(cfg: fdl.Config) -> None:
    """Compute in bfloat16; parameters, states and sums stay float32."""
    cfg.model.dtype = "bfloat16"


def remat(cfg: fdl.Config) -> None:
    """Keep the blocks' inputs alone for the backward pass and compute the rest again: less memory, a third more time."""
    cfg.model.remat = "block"


def scan_layers(cfg: fdl.Config) -> None:
    """Compile one pattern of layers instead of all of them."""
    cfg.model.scan_layers = True


def accumulate(cfg: fdl.Config, parts: int = 4) -> None:
    """The same batch in `parts` parts, one after the other."""
    cfg.accumulate = parts


def longer(cfg: fdl.Config, factor: int = 2) -> None:
    """Train for `factor` times as many steps."""
    cfg.steps *= factor


def stretch(cfg: fdl.Config, factor: int = 2) -> None:
    """Windows `factor` times as long, with the tokens of a batch kept."""
    if cfg.batch_size % factor:
        raise ValueError(f"factor must divide batch_size={cfg.batch_size}, got {factor}")
    cfg.data.length *= factor
    cfg.batch_size //= factor
