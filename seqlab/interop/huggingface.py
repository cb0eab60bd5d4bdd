"""Published models: folders with config.json and safetensors, as Hugging Face writes them, in and out.

`seqlab.load` reads such a folder (or fetches it by its hub id) into a model like any other: it streams with
any cache, trains and is checked by the same law. `save_pretrained` writes one that transformers reads. What a
config asks for and seqlab does not compute is refused before any weight is read.
"""

import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import fiddle as fdl
import jax.numpy as jnp
from flax import nnx

from seqlab.checks import UserError, check_choice
from seqlab.interop.convert import convert, published
from seqlab.interop.families import FAMILIES, model_config, published_config
from seqlab.interop.folder import INDEX, Folder, PretrainedError
from seqlab.models import LanguageModel
from seqlab.tokenizers import FileTokenizer, Tokenizer

_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer.json")


def is_pretrained(folder: pathlib.Path) -> bool:
    """Whether config.json in `folder` describes a published model (those of runs describe an experiment)."""
    try:
        return "model_type" in Folder(folder).json("config.json")
    except PretrainedError:
        return False


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form organisation/model, as ids of the hub do."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) is not None


def tokenizer_of(folder: pathlib.Path) -> Tokenizer | None:
    """The tokenizer of tokenizer.json in `folder`, with the first and last token that config.json names; None
    where there is none."""
    file = Folder(folder).file("tokenizer.json")
    if file is None:
        return None
    described = Folder(folder).json("config.json")
    bos, eos = (described.get(f"{name}_token_id") for name in ("bos", "eos"))
    eos = eos[0] if isinstance(eos, list) else eos
    return FileTokenizer(file, bos, eos)


def fetch(name: str) -> pathlib.Path:
    """The folder of the hub's model `name`, "organisation/model", from the local cache where it is there.

    Raises:
      PretrainedError: the optional package huggingface_hub is missing, or the model is neither cached nor to
      be had.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise PretrainedError(
            f"{name} is no folder here; for models of the hub: pip install huggingface_hub"
        ) from error
    try:
        return pathlib.Path(snapshot_download(name, allow_patterns=list(_FILES)))
    except Exception as error:  # whatever the network layer of the day raises
        raise PretrainedError(
            f"{name} is no folder here and cannot be had from the hub ({type(error).__name__}: {error})"
        ) from error


def load_pretrained(folder: str | os.PathLike[str]) -> tuple[LanguageModel, fdl.Config]:
    """The model of a folder with its weights, and the config that builds it. Parameters are float32, whatever
    they were saved in.

    Raises:
      PretrainedError: not a folder of a published model, or of one that is not supported.
      KeyError, ValueError: weights that do not fit what config.json says, by name.
    """
    source = Folder(folder)
    described = source.json("config.json")
    if "model_type" not in described:
        raise PretrainedError(f"{source.path} holds no config.json with a model_type")
    try:
        cfg = model_config(described)
        model = nnx.eval_shape(lambda: fdl.build(cfg)(rngs=nnx.Rngs(0)))
    except (ValueError, TypeError, OverflowError) as error:
        reason = str(getattr(error, "proxy_base_exception", error)).splitlines()[0]
        raise PretrainedError(f"{source.path / 'config.json'}: {reason}") from error
    try:
        return convert(model, source.tensors(), architecture=FAMILIES[described["model_type"]]), cfg
    except PretrainedError:
        raise
    except UserError as error:
        raise type(error)(f"{source.path}: {error}") from error


def save_pretrained(
    model: LanguageModel,
    folder: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    shard_bytes: int = 5_000_000_000,
) -> list[pathlib.Path]:
    """Write `model` as a published model: config.json and safetensors in parts of at most `shard_bytes`.
    Returns the files.

    Args:
      dtype: what the weights are stored in, "float32", "bfloat16" or "float16".

    Raises:
      PretrainedError: no published family computes what this model does, with the reason.
      FileExistsError: the folder holds a model already.
    """
    check_choice(dtype, ("float32", "bfloat16", "float16"), "dtype")
    from safetensors.flax import save_file

    described = published_config(model)
    folder = pathlib.Path(folder)
    taken = [path.name for pattern in _FILES[:3] for path in folder.glob(pattern)]
    if taken:
        raise FileExistsError(
            f"{folder} holds a model already ({', '.join(sorted(taken)[:3])}): nothing is overwritten"
        )
    tensors = {
        name: jnp.asarray(value, dtype)
        for name, value in published(model, FAMILIES[described["model_type"]]).items()
    }
    shards = _shards(tensors, shard_bytes)
    folder.mkdir(parents=True, exist_ok=True)
    written, where = [], {}
    for number, shard in enumerate(shards, 1):
        name = (
            "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        )
        save_file(
            shard, folder / name, metadata={"format": "pt"}
        )  # what transformers asks for, whoever wrote the file
        where |= dict.fromkeys(shard, name)
        written.append(folder / name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(x.nbytes for x in tensors.values())}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")
        written.append(folder / INDEX)
    (folder / "config.json").write_text(json.dumps(described | {"dtype": dtype}, indent=1) + "\n")
    return [*written, folder / "config.json"]


def _shards(tensors: Mapping[str, Any], limit: int) -> list[dict[str, Any]]:
    """The tensors in their order, in parts of at most `limit` bytes (a larger tensor is a part of its
    own)."""
    shards: list[dict[str, Any]] = [{}]
    size = 0
    for name, value in tensors.items():
        if shards[-1] and size + value.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = value
        size += value.nbytes
    return shards
