"""Where runs begin that begin with trained weights: parts of their configs, which only read.

`seqlab.studies.finetune.begin_from` puts them into a config.
"""

import pathlib
from collections.abc import Callable, Hashable

from seqlab.checks import UserError
from seqlab.interop import huggingface
from seqlab.interop.folder import Folder
from seqlab.interop.gguf import GGUF
from seqlab.module import Params, params_of
from seqlab.tokenizers import Tokenizer


def weights_at(path: str) -> Params:
    """The parameters by name of a trained model, as the `start` of an `Experiment`.

    Args:
      path: a run folder, a published folder or its id on the hub, or a GGUF file: whatever `seqlab.load`
        takes, whose errors are raised.
    """
    from seqlab.studies import runs

    return params_of(runs.load(path).model)


def origin_of(start: Callable[[], Params] | None) -> Hashable:
    """Tokenizer files, end tokens and chat template of the published folder that a run began with, if it is
    still there."""
    if getattr(start, "func", None) is not weights_at:
        return None
    folder = pathlib.Path(start.keywords["path"])
    return huggingface.Origin.of(Folder(folder)) if huggingface.is_pretrained(folder) else None


def tokenizer_at(path: str) -> Tokenizer:
    """The tokenizer of a published folder or GGUF file; UserError if it has none."""
    place = pathlib.Path(path)
    found = GGUF(place).tokenizer() if place.suffix == ".gguf" else huggingface.tokenizer_of(place)
    if found is None:
        raise UserError(f"{path} has no tokenizer.json: text cannot be read for it")
    return found
