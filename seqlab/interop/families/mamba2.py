"""Mamba-2, in transformers' form."""

import math
import numbers
from typing import Any

import fiddle as fdl

from seqlab.interop.families import mamba
from seqlab.interop.families.keys import Keys
from seqlab.interop.folder import PretrainedError
from seqlab.models import LanguageModel, Mamba2

MODEL_TYPE = "mamba2"
CLASS = "Mamba2ForCausalLM"
WEIGHTS = "mamba2"
MIXERS = ("Mamba2",)
IRRELEVANT = (*mamba.IRRELEVANT, "time_step_rank")  # Mamba-2 has no rank, but one step size per head


def from_config(keys: Keys) -> fdl.Config:
    """The config of the model for a config.json."""
    dim, heads, width = keys.size("hidden_size", 4096), keys.size("num_heads", 128), keys.size("head_dim", 64)
    if keys.has("expand") and keys.size("expand") * dim != heads * width:
        raise PretrainedError(
            f"expand: got {keys.get('expand')}, expected num_heads * head_dim / hidden_size = "
            f"{heads * width / dim:g}"
        )
    keys.expect("intermediate_size", heads * width)
    mixer = fdl.Partial(
        Mamba2,
        expand=mamba.whole("num_heads * head_dim", heads * width, dim),
        head_dim=width,
        state_size=keys.size("state_size", 128),
        groups=keys.size("n_groups", 8),
        conv_width=keys.size("conv_kernel", 4),
        dt_limit=limit(keys.get("time_step_limit")),
        conv_bias=keys.flag("use_conv_bias", True),
        bias=keys.flag("use_bias", False),
        norm_eps=keys.number("layer_norm_epsilon", 1e-5),
    )
    return mamba.language_model(keys, mixer, vocab_size=32_768, dim=4096, depth=64, tied=False)


def to_config(model: LanguageModel) -> dict[str, Any]:
    """The config.json of a model; raises PretrainedError with the reason if it is not of this family."""
    first = model.backbone.blocks[0].mixer
    for block in model.backbone.blocks:
        _check_published(block.mixer)
    return mamba.common(model) | {
        "num_heads": first.heads,
        "head_dim": first.inner // first.heads,
        "expand": first.inner // first.dim,
        "state_size": first.state_size,
        "n_groups": first.groups,
        "time_step_limit": [json_number(value) for value in first.dt_limit],
    }


def _check_published(mixer: Mamba2) -> None:
    """Refuse the variants that transformers does not have."""
    norm = mixer.norm
    found = {
        "norm": None if norm is None else norm.gate_first,
        "norm_groups": None if norm is None else norm.groups,
        "channel_skip": mixer.D.shape != (mixer.heads,),
        "ssm_channels": mixer.beside > 0,
    }
    wanted = {"norm": True, "norm_groups": mixer.groups, "channel_skip": False, "ssm_channels": False}
    for name, value in wanted.items():
        if found[name] != value:
            raise PretrainedError(f"{name}: the published Mamba2 has its default, and no other")


def limit(given: Any) -> tuple[float, float]:
    """The smallest and the largest step."""
    given = (0.0, math.inf) if given is None else given
    fine = isinstance(given, list | tuple) and len(given) == 2
    if not fine or not all(isinstance(value, numbers.Real) for value in given) or not given[0] <= given[1]:
        raise PretrainedError(f"time_step_limit: got {given!r}, expected the least and the largest step")
    return float(given[0]), float(given[1])


def json_number(value: float) -> Any:
    """A number as JSON has it; infinity as transformers 5 writes it."""
    return {"__float__": "Infinity"} if value == math.inf else value
