"""Loading and saving of published models: folders with config.json and safetensors, as Hugging Face writes
them.

`seqlab.load` reads such a folder (or fetches it by its hub id) into a model like any other: it streams with
any cache, trains and satisfies the same contract. `save_pretrained` writes one that transformers reads.
Options of a config that seqlab does not implement are refused before any weight is read.
"""

import hashlib
import json
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import fiddle as fdl
import jax.numpy as jnp
from flax import nnx

from seqlab.checks import UserError, check_choice
from seqlab.interop.convert import convert, published
from seqlab.interop.families import families, family_of, model_config, published_config
from seqlab.interop.families.packing import Unpacked, pack
from seqlab.interop.folder import INDEX, Folder, PretrainedError
from seqlab.interop.gguf import GGUF
from seqlab.models import LanguageModel
from seqlab.models.lora import merged
from seqlab.models.model import check_dtype
from seqlab.tokenizers import FileTokenizer, Tokenizer

_WEIGHTS = ("config.json", "model*.safetensors", INDEX)
_TEXTS = (  # files kept with the weights: tokenizer, end tokens, chat template
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("chat_template.jinja", "chat_template.json"),
)


def is_pretrained(folder: pathlib.Path) -> bool:
    """Whether config.json in `folder` describes a published model (those of runs describe an experiment)."""
    source = Folder(folder)
    source.file("config.json")  # links out of the folder are refused
    try:
        return "model_type" in source.json("config.json")
    except PretrainedError:
        return False


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form organisation/model of hub ids."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) is not None


def tokenizer_of(folder: str | os.PathLike[str]) -> Tokenizer | None:
    """The tokenizer of a published folder; None without a tokenizer.json.

    The prefix of a text is determined by the tokenizer's own files (its post-processor, `add_bos_token` in
    tokenizer_config.json), as in transformers; `bos_token_id` only begins an empty text. End tokens are those
    of generation_config.json, else of config.json, else of tokenizer_config.json.

    Raises:
      PretrainedError: files that cannot be read, or the optional package `tokenizers` is missing.
    """
    source = Folder(folder)
    file = source.file("tokenizer.json")
    if file is None:
        return None
    described, generation = source.json("config.json"), source.json("generation_config.json")
    settings = {**source.json("special_tokens_map.json"), **source.json("tokenizer_config.json")}
    ends = _ids(generation, "eos_token_id", source) or _ids(described, "eos_token_id", source)
    start = _ids(generation, "bos_token_id", source) or _ids(described, "bos_token_id", source)
    try:
        found = FileTokenizer(
            file,
            eos=ends or None,
            settings=settings,
            template=_template(source, settings),
            start=start[0] if start else None,
        )
    except (ImportError, UserError) as error:
        raise PretrainedError(str(error)) from error
    if not ends and "eos_token" in found.names:
        end = found.number(found.names["eos_token"])
        found.eos, found.ends = end, frozenset((end,))
    return found


def _ids(described: Mapping[str, Any], key: str, source: Folder) -> tuple[int, ...]:
    """The tokens under `key`: none, one or a list."""
    given = described.get(key)
    listed = given if isinstance(given, list) else [] if given is None else [given]
    if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in listed):
        raise PretrainedError(
            f"{source.path}: {key}: got {given!r}, expected a token's number or a list of them"
        )
    return tuple(listed)


def _template(source: Folder, settings: Mapping[str, Any]) -> str | None:
    """The chat template: of its own file, or of tokenizer_config.json (there one text, or several with
    names)."""
    given = source.text("chat_template.jinja") or source.json("chat_template.json").get("chat_template")
    given = given or settings.get("chat_template")
    if isinstance(given, list):
        named = {item.get("name"): item.get("template") for item in given if isinstance(item, Mapping)}
        given = named.get("default")
    return given if isinstance(given, str) else None


def fetch(name: str) -> pathlib.Path:
    """The folder of the hub's model `name`, "organisation/model", from the local cache if it is there.

    Raises:
      PretrainedError: the optional package huggingface_hub is missing, or the model is neither cached nor
        available.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise PretrainedError(
            f"{name} is not a local folder; for models on the hub: pip install huggingface_hub"
        ) from error
    try:
        return pathlib.Path(snapshot_download(name, allow_patterns=[*_WEIGHTS, *_TEXTS]))
    except Exception as error:  # the network layer may raise anything
        raise PretrainedError(
            f"{name} is not a local folder and could not be downloaded from the hub "
            f"({type(error).__name__}: {str(error).partition(chr(10))[0]})"
        ) from error


class Origin:
    """The contents of a published folder besides its weights, which are written again when the model is
    saved.

    A loaded model has it, and so do its copies with another cache or other parameters. Two are equal if their
    contents are.

    `ids`: the token ids in config.json. `files`: the tokenizer's files by name. `model_type`: the family.
    """

    def __init__(self, ids: Mapping[str, Any], files: Mapping[str, bytes], model_type: str | None = None):
        self.ids, self.files, self.model_type = dict(ids), dict(files), model_type
        content = repr((sorted(self.ids.items()), sorted(self.files.items()), model_type))
        self._digest = hashlib.sha256(content.encode()).hexdigest()

    @classmethod
    def of(cls, source: Folder) -> "Origin":
        """That of a folder."""
        described = source.json("config.json")
        ids = {key: value for key, value in described.items() if re.fullmatch(r"(bos|eos|pad)_token_id", key)}
        files = {name: source.file(name) for name in _TEXTS}
        texts = {name: path.read_bytes() for name, path in files.items() if path is not None}
        return cls(ids, texts, described.get("model_type"))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Origin) and other._digest == self._digest

    def __hash__(self) -> int:
        return hash(self._digest)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Origin":
        return self

    def __repr__(self) -> str:
        return f"Origin({', '.join(self.files)})"


def load_pretrained(
    folder: str | os.PathLike[str], *, dtype: str | None = None
) -> tuple[LanguageModel, fdl.Config]:
    """The model of a folder with its weights, and its config.

    Args:
      dtype: the compute dtype, "float32" (default), "bfloat16" or "float64". Parameters are float32, whatever
        their stored dtype; float64 for float64.

    Raises:
      PretrainedError: not a folder of a published model, or an unsupported model.
      KeyError, ValueError: weights that do not match config.json, by name.
    """
    source = Folder(folder)
    described = source.json("config.json")
    if "model_type" not in described:
        raise PretrainedError(f"{source.path} holds no config.json with a model_type")
    model, cfg = _filled(described, source.tensors, source.path, source.path / "config.json", dtype)
    model.origin = Origin.of(source)
    return model, cfg


def load_gguf(
    path: str | os.PathLike[str], *, dtype: str | None = None
) -> tuple[LanguageModel, fdl.Config, Tokenizer]:
    """The model of a GGUF file with its weights in float32, its config, and its tokenizer.

    Args:
      dtype: as for `load_pretrained`.

    Raises:
      PretrainedError: the package gguf is missing, the file is damaged, or a model or tokenizer that is not
        supported.
      MissingTensorError, UserError: weights that do not match the file's metadata.
    """
    file = GGUF(path)
    model, cfg = _filled(file.described, lambda: file, file.path, file.path, dtype)
    tokenizer = file.tokenizer()
    files = {
        "tokenizer.json": tokenizer.as_json(),
        "tokenizer_config.json": json.dumps(tokenizer.settings, indent=1),
    }
    if tokenizer.template is not None:
        files["chat_template.jinja"] = tokenizer.template
    model.origin = Origin(
        {"bos_token_id": tokenizer.start, "eos_token_id": sorted(tokenizer.ends)},
        {name: text.encode() for name, text in files.items()},
        file.described["model_type"],
    )
    return model, cfg, tokenizer


def _filled(
    described: Mapping[str, Any],
    tensors: Callable[[], Mapping[str, Any]],
    path: pathlib.Path,
    where: pathlib.Path,
    dtype: str | None,
) -> tuple[LanguageModel, fdl.Config]:
    """The model of a config.json with its tensors, which are read once the config is accepted."""
    try:
        cfg = model_config(described)
        if dtype is not None:
            cfg.dtype = check_dtype(dtype)
        model = nnx.eval_shape(lambda: fdl.build(cfg)(rngs=nnx.Rngs(0)))
    except (ValueError, TypeError, OverflowError) as error:
        reason = str(getattr(error, "proxy_base_exception", error)).splitlines()[0]
        raise PretrainedError(f"{where}: {reason}") from error
    try:
        family = family_of(described)
        model = convert(model, _unpacked(family, model, tensors()), architecture=family.WEIGHTS)
    except PretrainedError:
        raise
    except UserError as error:
        raise type(error)(f"{path}: {error}") from error
    return model, cfg


def _unpacked(family: ModuleType, model: LanguageModel, tensors: Mapping[str, Any]) -> Mapping[str, Any]:
    packed = getattr(family, "packed", None)
    return tensors if packed is None else Unpacked(tensors, packed(model))


def save_pretrained(
    model: LanguageModel,
    folder: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    shard_bytes: int = 5_000_000_000,
) -> list[pathlib.Path]:
    """Write `model` as a published model: config.json, safetensors in parts of at most `shard_bytes`, and,
    for a model loaded from such a folder, the tokenizer's files, end tokens and chat template. Returns the
    files.

    Args:
      dtype: the dtype of the stored weights, "float32", "bfloat16" or "float16".

    Raises:
      PretrainedError: no published family can represent the model, with the reason.
      FileExistsError: the folder holds a model already.
    """
    check_choice(dtype, ("float32", "bfloat16", "float16"), "dtype")
    from safetensors.flax import save_file

    model = merged(model)
    described = published_config(model)
    folder = pathlib.Path(folder)
    kept = model.origin.files if isinstance(model.origin, Origin) else {}
    taken = [path.name for pattern in ("*.safetensors", *_WEIGHTS, *kept) for path in folder.glob(pattern)]
    if taken:
        raise FileExistsError(
            f"{folder} holds a model already ({', '.join(sorted(taken)[:3])}): nothing is overwritten"
        )
    family = families()[described["model_type"]]
    tensors = published(model, family.WEIGHTS)
    if getattr(family, "packed", None) is not None:
        tensors = pack(tensors, family.packed(model))
    tensors = {name: jnp.asarray(value, dtype) for name, value in tensors.items()}
    shards = _shards(tensors, shard_bytes)
    folder.mkdir(parents=True, exist_ok=True)
    written, where = [], {}
    for number, shard in enumerate(shards, 1):
        name = (
            "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        )
        # transformers requires this entry.
        save_file(shard, folder / name, metadata={"format": "pt"})
        where |= dict.fromkeys(shard, name)
        written.append(folder / name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(x.nbytes for x in tensors.values())}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")
        written.append(folder / INDEX)
    for name, content in kept.items():
        (folder / name).write_bytes(content)
        written.append(folder / name)
    ids = model.origin.ids if isinstance(model.origin, Origin) else {}
    (folder / "config.json").write_text(json.dumps(described | ids | {"dtype": dtype}, indent=1) + "\n")
    return [*written, folder / "config.json"]


def _shards(tensors: Mapping[str, Any], limit: int) -> list[dict[str, Any]]:
    """The tensors in their order, in parts of at most `limit` bytes (a larger tensor is a separate part)."""
    shards: list[dict[str, Any]] = [{}]
    size = 0
    for name, value in tensors.items():
        if shards[-1] and size + value.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = value
        size += value.nbytes
    return shards
