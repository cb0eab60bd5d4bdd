"""Families of published models, one file each: the meaning of their config.json, and the equivalent model.

A file of this folder that has a MODEL_TYPE is a family:

    MODEL_TYPE                its name in config.json
    CLASS                     its class in transformers
    WEIGHTS                   its naming scheme of weights, a key of `seqlab.interop.convert.ARCHITECTURES`
    MIXER                     the class name of its mixers
    from_config(keys)         the config of `LanguageModel` for a config.json
    to_config(model)          the inverse; raises PretrainedError with the reason if the family cannot

Unsupported options are refused (`seqlab.interop.families.keys`).
"""

import difflib
import functools
import importlib
import pkgutil
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import fiddle as fdl

from seqlab.interop.families.keys import Keys
from seqlab.interop.folder import PretrainedError
from seqlab.models import LanguageModel, RMSNorm


@functools.cache
def families() -> dict[str, ModuleType]:
    """All families by model_type, grouped by mixer."""
    modules = [
        importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)
    ]
    found = [module for module in modules if hasattr(module, "MODEL_TYPE")]
    return {
        module.MODEL_TYPE: module for module in sorted(found, key=lambda each: (each.MIXER, each.MODEL_TYPE))
    }


def family_of(described: Mapping[str, Any]) -> ModuleType:
    """The family of a config.json. Raises PretrainedError for one that is not supported."""
    name = described.get("model_type")
    if not isinstance(name, str) or name not in families():
        near = difflib.get_close_matches(str(name), families(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise PretrainedError(f"model_type: got {name!r}, expected one of {', '.join(families())}{hint}")
    return families()[name]


def model_config(described: Mapping[str, Any]) -> fdl.Config:
    """The config of `LanguageModel` that a published config.json describes.

    Raises:
      PretrainedError: another family, or an option of it that is not supported; a key that is neither used
        nor known to have no effect.
    """
    family = family_of(described)
    keys = Keys(described, getattr(family, "IRRELEVANT", ()))
    cfg = family.from_config(keys)
    keys.done(family.CLASS)
    return cfg


def published_config(model: LanguageModel) -> dict[str, Any]:
    """The config.json of the published family equivalent to `model`.

    Raises:
      PretrainedError: there is none, with the reason.
    """
    if not isinstance(model, LanguageModel):
        raise PretrainedError(f"only a LanguageModel has a published form, got {type(model).__name__}")
    model = model.unrolled()
    blocks = list(model.backbone.blocks)
    kinds = {type(block.mixer).__name__ for block in blocks}
    if not all(
        isinstance(norm, RMSNorm) for norm in (model.backbone.norm, *(block.mixer_norm for block in blocks))
    ):
        raise PretrainedError("norm: published families have RMSNorm")
    reasons = []
    for family in families().values():
        if kinds != {family.MIXER}:
            continue
        try:
            special = family.to_config(model)
        except PretrainedError as error:
            reasons.append(str(error))
            continue
        common = {
            "model_type": family.MODEL_TYPE,
            "architectures": [family.CLASS],
            "vocab_size": model.vocab_size,
            "hidden_size": model.backbone.dim,
            "num_hidden_layers": len(blocks),
            "hidden_act": "silu",
            "tie_word_embeddings": model.head is None,
        }
        return common | special
    if reasons:
        raise PretrainedError(reasons[0])
    raise PretrainedError(f"mixers: no published family here is made of {', '.join(sorted(kinds))}")
