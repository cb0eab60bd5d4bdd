"""Export of trained models for programs without seqlab: weights, and the streaming functions as StableHLO.

A bundle is a folder:

    weights.safetensors    parameters by seqlab's names
    init_state.bin         rows [b] (any numbers) -> state
    prefill.bin            params, inputs [b, c, ...], valid [b, c], state -> outputs [b, c, o], state
    step.bin               params, inputs [b, ...], state -> outputs [b, o], state
    manifest.json          shapes, platforms, versions, origin
    tokenizer.json         for a text model with its own tokenizer
    run.py                 a short program that streams with it; needs jax, numpy, safetensors (tokenizers)
    published/             config.json and safetensors in transformers' format, for published families

The three functions are serialized `jax.export`s for any number b of rows and every platform of the manifest;
the state is a list of arrays. `prefill` reads a prompt of any length in chunks of c steps; the last one is
padded and masked, which the streaming contract makes exact.
"""

import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from seqlab import __version__
from seqlab.checks import UserError
from seqlab.interop.families import PretrainedError
from seqlab.interop.huggingface import save_pretrained
from seqlab.kernels.dispatch import use_implementation
from seqlab.mixer import as_mixer
from seqlab.models.model import Model
from seqlab.module import in_evaluation, merge, split
from seqlab.tokenizers import ByteTokenizer, FileTokenizer, Tokenizer, begin

PLATFORMS = ("cpu", "cuda", "tpu")


class ExportError(UserError):
    """A model that cannot be exported; the message says why."""


def bundle(
    model: Model,
    folder: str | os.PathLike[str],
    *,
    chunk: int = 64,
    platforms: Sequence[str] = PLATFORMS,
    about: dict[str, Any] | None = None,
    tokenizer_file: str | os.PathLike[str] | None = None,
    tokenizer: Tokenizer | None = None,
) -> pathlib.Path:
    """Write `model` as a bundle into `folder`, which must not exist. The functions are those of the "xla"
    implementation of every op.

    Args:
      chunk: steps that `prefill` takes at once.
      platforms: platforms of the functions.
      about: further entries of the manifest.
      tokenizer_file: a tokenizer.json for texts, if it is not that of `tokenizer`.
      tokenizer: the tokenizer of texts, as of a `Run`; bytes if neither is given and the vocabulary has 256
        tokens.

    Raises:
      ExportError: the model has no streaming form, or a part cannot be exported for any number of rows.
      FileExistsError: the folder exists.
    """
    folder = pathlib.Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists: nothing is overwritten")
    if tokenizer_file is not None:
        tokenizer = FileTokenizer(tokenizer_file)
    functions, described = streaming_functions(model, chunk, platforms)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Written completely or not at all: renamed at the end.
    draft = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        from safetensors.flax import save_file

        _, params = split(model)
        save_file({name: jnp.asarray(value) for name, value in params.items()}, draft / "weights.safetensors")
        for name, function in functions.items():
            (draft / f"{name}.bin").write_bytes(function.serialize())
        try:
            save_pretrained(model, draft / "published")
            described["published"] = "published"
        except PretrainedError as error:
            described["published"] = f"none: {error}"
        described["text"], content = _text(model, tokenizer)
        if content is not None:
            (draft / "tokenizer.json").write_text(content, "utf-8")
        (draft / "manifest.json").write_text(json.dumps(described | (about or {}), indent=1) + "\n")
        (draft / "run.py").write_text(_LOADER)
        draft.chmod(0o755)
        draft.rename(folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return folder


def _text(model: Model, tokenizer: Tokenizer | None) -> tuple[dict[str, Any] | None, str | None]:
    """The manifest's entry for texts, and the content of tokenizer.json; None without a tokenizer.

    `tokens` is "bytes" or "tokenizer.json"; `prefix` and `suffix` go around a prompt's tokens, `ends` end an
    answer.
    """
    size = getattr(model, "vocab_size", 0)
    if tokenizer is None and size == ByteTokenizer.vocab_size:
        tokenizer = ByteTokenizer()
    if isinstance(tokenizer, FileTokenizer):
        described = {"tokens": "tokenizer.json", "prefix": tokenizer.prefix, "suffix": tokenizer.suffix}
        described |= {"start": tokenizer.begin("").tolist(), "ends": sorted(tokenizer.ends)}
        return described, tokenizer.as_json()
    if isinstance(tokenizer, ByteTokenizer) and size >= ByteTokenizer.vocab_size:
        first = begin(tokenizer, "").tolist()
        described = {"tokens": "bytes", "prefix": first, "suffix": [], "start": first, "ends": []}
        return described, None
    return None, None


def streaming_functions(
    model: Model, chunk: int = 64, platforms: Sequence[str] = PLATFORMS
) -> tuple[dict[str, jax_export.Exported], dict[str, Any]]:
    """`init_state`, `prefill` and `step` of a model, exported for any number of rows, and their manifest
    entries.

    Raises:
      ExportError: see `bundle`.
    """
    if chunk < 1:
        raise ExportError(f"chunk must be a positive integer, got {chunk}")
    unknown = sorted(set(platforms) - set(PLATFORMS))
    if unknown or not platforms:
        raise ExportError(
            f"platforms: got {', '.join(unknown) or 'none'}, expected some of {', '.join(PLATFORMS)}"
        )
    if not isinstance(model, Model) or not model.causal:
        raise ExportError(f"{type(model).__name__} has no streaming form, so there is no step to export")
    model = in_evaluation(model.unrolled())
    static, params = split(model)
    tree = jax.tree.structure(jax.eval_shape(lambda: model.init_state(1)))
    form, dtype = (
        ((), jnp.int32) if as_mixer(model).vocab_size is not None else ((model.inputs,), jnp.float32)
    )

    def init_state(rows: jax.Array) -> list[jax.Array]:
        return jax.tree.leaves(model.init_state(rows.shape[0]))

    def prefill(
        params: Any, inputs: jax.Array, valid: jax.Array, state: list[jax.Array]
    ) -> tuple[jax.Array, list[jax.Array]]:
        outputs, new = merge(static, params)(inputs, jax.tree.unflatten(tree, state), None, valid)
        return outputs, jax.tree.leaves(new)

    def step(params: Any, inputs: jax.Array, state: list[jax.Array]) -> tuple[jax.Array, list[jax.Array]]:
        outputs, new = merge(static, params)(inputs[:, None], jax.tree.unflatten(tree, state))
        return outputs[:, 0], jax.tree.leaves(new)

    (b,) = jax_export.symbolic_shape("b")
    array = jax.ShapeDtypeStruct
    weights = {name: array(value.shape, value.dtype) for name, value in params.items()}
    state = jax.eval_shape(init_state, array((b,), jnp.int32))
    arguments: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        "init_state": (init_state, (array((b,), jnp.int32),)),
        "prefill": (prefill, (weights, array((b, chunk, *form), dtype), array((b, chunk), jnp.bool_), state)),
        "step": (step, (weights, array((b, *form), dtype), state)),
    }
    functions = {}
    with use_implementation("xla"):
        for name, (function, given) in arguments.items():
            try:
                functions[name] = jax_export.export(jax.jit(function), platforms=platforms)(*given)
            except (TypeError, ValueError, NotImplementedError, jax.errors.JAXTypeError) as error:
                raise ExportError(
                    f"{name} cannot be exported for any number of rows: {str(error).splitlines()[0]}"
                ) from error
    described = {
        "seqlab": __version__,
        "jax": jax.__version__,
        "platforms": list(platforms),
        "chunk": chunk,
        "inputs": {"shape": ["b", "t", *form], "dtype": np.dtype(dtype).name},
        "state": [{"shape": [str(size) for size in leaf.shape], "dtype": leaf.dtype.name} for leaf in state],
        "capacity": model.capacity,
    }
    return functions, described


_LOADER = '''\
"""Streams the model of this folder: python run.py 'a prompt' 200.

It needs jax, numpy and safetensors, and for a model with a tokenizer.json the tokenizers package. It reads
the files of the folder as data and runs no other code of the folder.
"""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    del sys.path[0]  # this folder: a jax.py in it must not be imported

import json
import pathlib

import jax
import numpy as np
from safetensors.numpy import load_file

HERE = pathlib.Path(__file__).resolve().parent
ABOUT = json.loads((HERE / "manifest.json").read_text())
PARAMS = load_file(HERE / "weights.safetensors")
INIT, PREFILL, STEP = (
    jax.jit(jax.export.deserialize((HERE / f"{name}.bin").read_bytes()).call)
    for name in ("init_state", "prefill", "step")
)


def read(rows):
    """Outputs [b, o] after the last of the prompts' steps, rows [b, t, ...] of one length, and the state."""
    state, chunk = INIT(np.zeros(len(rows), np.int32)), ABOUT["chunk"]
    for begin in range(0, rows.shape[1], chunk):
        part = rows[:, begin : begin + chunk]
        padding = [(0, 0), (0, chunk - part.shape[1])] + [(0, 0)] * (rows.ndim - 2)
        valid = np.broadcast_to(np.arange(chunk) < part.shape[1], (len(rows), chunk))
        outputs, state = PREFILL(PARAMS, np.pad(part, padding).astype(ABOUT["inputs"]["dtype"]), valid, state)
    return outputs[:, part.shape[1] - 1], state


def generate(rows, count):
    """The `count` likeliest tokens after each row of tokens [b, t], one after the other."""
    outputs, state = read(np.asarray(rows))
    for _ in range(count):
        tokens = np.asarray(outputs).argmax(-1).astype(np.int32)
        yield tokens
        outputs, state = STEP(PARAMS, tokens, state)


def main(prompt, count):
    """Print what follows the prompt, up to `count` tokens or one that ends a text."""
    text = ABOUT["text"]
    if text is None:
        sys.exit("this model has no tokenizer: import this file and call generate with the numbers of tokens")
    if text["tokens"] == "bytes":
        encode = lambda text: list(text.encode())
        decode = lambda ids: bytes(i for i in ids if i < 256).decode(errors="replace")
    else:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(HERE / "tokenizer.json"))
        tokenizer.no_truncation()
        encode, decode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids, tokenizer.decode
    ids = text["prefix"] + encode(prompt) + text["suffix"] if prompt else text["start"]
    if not ids:
        sys.exit("the prompt is empty, and this model has no token that begins a text")
    read_only, made = len(decode(ids)), []
    for token in generate([ids], count):
        if int(token[0]) in text["ends"]:
            break
        made.append(int(token[0]))
    print(decode(ids + made)[read_only:])


if __name__ == "__main__":
    if len(sys.argv) != 3 or not sys.argv[2].isdecimal():
        sys.exit("usage: python run.py 'a prompt' TOKENS")
    main(sys.argv[1], int(sys.argv[2]))
'''
