"""Families of published models, one file each: the meaning of their config.json, and the equivalent model.

A file of this folder that has a MODEL_TYPE is a family:

    MODEL_TYPE                its name in config.json
    CLASS                     its class in transformers
    WEIGHTS                   its naming scheme of weights, a key of `seqlab.interop.convert.ARCHITECTURES`
    MIXERS                    the class names of its mixers: a model has all of them
    from_config(keys)         the config of `LanguageModel` for a config.json
    to_config(model)          the inverse; raises PretrainedError with the reason if the family cannot
    IRRELEVANT                optional: further keys of config.json without effect on the logits
    packed(model)             optional: published tensors in which rows are in another order
                              (`seqlab.interop.families.packing`)

Unsupported options are refused (`seqlab.interop.families.keys`).
"""

import difflib
import functools
import importlib
import json
import math
import pkgutil
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import fiddle as fdl
from flax import nnx

from seqlab.interop.families.keys import Keys
from seqlab.interop.folder import PretrainedError, number
from seqlab.models import Full, LanguageModel
from seqlab.module import Module


@functools.cache
def families() -> dict[str, ModuleType]:
    """All families by model_type, grouped by mixer."""
    modules = [
        importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)
    ]
    found = [module for module in modules if hasattr(module, "MODEL_TYPE")]
    return {module.MODEL_TYPE: module for module in sorted(found, key=_order)}


def _order(family: ModuleType) -> tuple[bool, str, str]:
    """The plainest first: a model that several families could hold is saved as the first of them."""
    return family.MODEL_TYPE != "llama", family.MIXERS[0], family.MODEL_TYPE


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
    """The config.json of the published family equivalent to `model`: that which it was loaded from, if it
    still is of this family.

    Raises:
      PretrainedError: there is none, with the reason.
    """
    if not isinstance(model, LanguageModel):
        raise PretrainedError(f"only a LanguageModel has a published form, got {type(model).__name__}")
    model = model.unrolled()
    kinds = {type(block.mixer).__name__ for block in model.backbone.blocks}
    reasons = []
    loaded = getattr(model.origin, "model_type", None)
    for family in sorted(families().values(), key=lambda family: loaded != family.MODEL_TYPE):
        if kinds != set(family.MIXERS):
            continue
        try:
            return _described(model, family)
        except PretrainedError as error:
            reasons.append(str(error))
    if reasons:
        raise PretrainedError(reasons[0])
    raise PretrainedError(f"mixers: no published family here is made of {', '.join(sorted(kinds))}")


def _described(model: LanguageModel, family: ModuleType) -> dict[str, Any]:
    """The config.json of `model` in a family; PretrainedError if it would stand for another model."""
    described = {
        "model_type": family.MODEL_TYPE,
        "architectures": [family.CLASS],
        "vocab_size": model.vocab_size,
        "hidden_size": model.backbone.dim,
        "num_hidden_layers": len(model.backbone.blocks),
        "tie_word_embeddings": model.head is None,
    }
    try:
        described |= family.to_config(model)
    except AttributeError as error:  # a norm or a mixer of another kind
        raise PretrainedError(f"no {family.MODEL_TYPE}: {error}") from error
    cfg = model_config(json.loads(json.dumps(described), object_hook=number))
    same = nnx.eval_shape(lambda: fdl.build(cfg)(rngs=nnx.Rngs(0)))
    if difference := _difference(model, same, family.MODEL_TYPE):
        raise PretrainedError(difference)
    return described


# Without influence on what a model computes, or not described by a config.json.
_FREE = ("origin", "trained_length", "dtype", "remat", "scan_layers", "drop_path")


def _difference(model: Module, same: Module, name: str) -> str | None:
    """The first part in which a model differs from that which its config.json stands for."""
    theirs = dict(nnx.iter_modules(same))
    for path, module in nnx.iter_modules(model):
        where, other = ".".join(map(str, path)), theirs.pop(path, None)
        if type(other) is not type(module):
            return f"{where}: got {type(module).__name__}, and no {name} has this here"
        for key, value in vars(module).items():
            if key in _FREE or key.startswith("_") or isinstance(value, nnx.Module):
                continue
            expected = vars(other).get(key)
            if isinstance(value, nnx.Variable) and isinstance(expected, nnx.Variable):
                value, expected = value.shape, expected.shape
            if isinstance(value, Full) and isinstance(expected, Full):  # a capacity changes no number
                continue
            if isinstance(value, float) and isinstance(expected, float):
                value = expected if math.isclose(value, expected, rel_tol=1e-12) else value
            if value is not expected and value != expected:
                shown = type(value).__name__ if isinstance(value, nnx.Variable) else value
                return f"{key}: {where} has {shown!r}, and a {name} has {expected!r}"
    if theirs:
        return f"{'.'.join(map(str, next(iter(theirs))))}: missing, and every {name} has it"
    return None
