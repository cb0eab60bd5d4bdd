"""Manifests of checkpoint steps: leaves by name, each with the hash of its bytes, against which it is
verified when read.

A state is a nested dictionary with string keys; `flatten` names its leaves by their keys joined with "/".
Arrays are described in the manifest and stored by Orbax; Python numbers and strings, empty arrays and empty
dictionaries are in the manifest itself.
"""

import concurrent.futures
import hashlib
import json
import math
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from seqlab.checks import UserError
from seqlab.train.folder import plain

State = dict[str, Any]
Leaves = dict[str, tuple[tuple[str, ...], Any]]  # by name, in the order of the names: keys and value
Entry = dict[str, Any]  # one leaf in a manifest, or a manifest

FORMAT = "seqlab.checkpoint.1"
COMMIT = "commit_success.txt"  # the file that is written last
MANIFEST = "manifest/manifest.json"
_GROUP = 2**30  # bytes of arrays in host memory at a time while a step is read


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, is damaged, or does not fit; the message names the step and the leaf
    or file."""


class DamageError(Exception):
    """The reason why a step cannot be used. `committed` is False for an unfinished save."""

    def __init__(self, reason: str, committed: bool = True) -> None:
        super().__init__(reason)
        self.committed = committed


def flatten(tree: Mapping[str, Any]) -> Leaves:
    """The leaves of a state by name.

    Raises:
      TypeError: naming a key that is no string, or a leaf that cannot be stored.
      ValueError: naming two leaves with the same name.
    """
    leaves: Leaves = {}

    def visit(keys: tuple[str, ...], value: Any) -> None:
        name = "/".join(keys)
        if isinstance(value, Mapping) and (value or not keys):
            for key in value:
                if not isinstance(key, str) or not key:
                    raise TypeError(
                        f"{name or 'state'}: key {key!r}; the keys of a checkpoint are non-empty strings"
                    )
                visit((*keys, key), value[key])
        elif name in leaves:
            raise UserError(f"two leaves are named {name!r}: {leaves[name][0]} and {keys}")
        else:
            leaves[name] = (keys, _checked(name or "state", value))

    visit((), tree)
    # A stored array is a folder with its name: none may be inside another.
    for name, (keys, _) in leaves.items():
        outer = next((part for part in _prefixes(name) if part in leaves), None)
        if outer is not None:
            raise UserError(
                f"leaf {keys} cannot be stored inside leaf {leaves[outer][0]}; rename one of them"
            )
    return dict(sorted(leaves.items()))


def _prefixes(name: str) -> Iterator[str]:
    return (name[: match.start()] for match in re.finditer("/", name))


def _checked(name: str, value: Any) -> Any:
    if isinstance(value, bool | int | float | str | Mapping) and not isinstance(value, np.generic):
        return value
    dtype = getattr(value, "dtype", None)
    if dtype is None or not hasattr(value, "shape"):
        raise TypeError(
            f"{name}: a {type(value).__name__}; a checkpoint holds nested dictionaries of arrays, numbers "
            "and strings"
        )
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        raise TypeError(
            f"{name}: a typed PRNG key; save jax.random.key_data(key), and restore with "
            "jax.random.wrap_key_data"
        )
    if not (jnp.issubdtype(dtype, np.number) or dtype == np.bool_):
        raise TypeError(f"{name}: an array of {dtype}; a checkpoint holds arrays of numbers")
    if isinstance(value, np.ndarray | np.generic):
        value = np.asarray(value)
        return value if dtype.isnative else value.astype(dtype.newbyteorder("="))
    return value


def nested(leaves: list[tuple[list[str], Any]]) -> State:
    """The state with these leaves: keys and value. The inverse of `flatten`."""
    state: State = {}
    for keys, value in leaves:
        node = state
        for key in keys[:-1]:
            node = node.setdefault(key, {})
        node[keys[-1]] = value
    return state


def check_fit(entries: list[Entry], template: Leaves, folder: pathlib.Path) -> None:
    """Raise CheckpointError, naming the first few differences, unless names, shapes and dtypes agree."""
    saved = {entry["name"]: _kind(entry) for entry in entries}
    wanted = {entry["name"]: _kind(entry) for entry in describe(template, hashed=False)}
    missing, extra = sorted(wanted.keys() - saved.keys()), sorted(saved.keys() - wanted.keys())
    other = [
        f"{name} is {saved[name]}, expected {wanted[name]}"
        for name in sorted(saved.keys() & wanted.keys())
        if saved[name] != wanted[name]
    ]
    problems = [
        ("not in the checkpoint", missing),
        ("only in the checkpoint", extra),
        ("of another kind", other),
    ]
    if missing or extra or other:
        found = "; ".join(f"{len(names)} {what}: {few(names)}" for what, names in problems if names)
        raise CheckpointError(f"{folder} does not fit the state that is asked for: {found}")


def _kind(entry: Entry) -> str:
    if "dtype" in entry:
        return f"{entry['dtype']}{entry['shape']}"
    if "empty" in entry:
        return "an empty dictionary"
    return f"a Python {'float' if 'float' in entry else type(entry['value']).__name__}"


def describe(leaves: Leaves, hashed: bool = True) -> list[Entry]:
    """The manifest entries of `leaves`; without hashes for templates, which have no bytes."""
    entries: list[Entry] = []
    hashes = []
    for _, value in leaves.values() if hashed else ():
        if isinstance(value, jax.Array) and value.is_fully_addressable:
            value.copy_to_host_async()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for name, (keys, value) in leaves.items():
            entry: Entry = {"name": name, "keys": list(keys)}
            if isinstance(value, Mapping):
                entry["empty"] = True
            elif isinstance(value, float) and not math.isfinite(value):
                entry["float"] = str(value)  # JSON has no such numbers
            elif not hasattr(value, "dtype"):
                entry["value"] = value
            else:
                entry |= {"shape": list(value.shape), "dtype": str(value.dtype)}
                if hashed:
                    hashes.append((entry, pool.submit(_sha256, _on_host(value))))
            entries.append(entry)
        for entry, future in hashes:
            entry["sha256"] = future.result()
    return entries


def _on_host(value: Any) -> np.ndarray:
    if isinstance(value, jax.Array) and not (value.is_fully_addressable or value.is_fully_replicated):
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(value, tiled=True))
    return np.asarray(value)


def _sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8)).hexdigest()


def sealed(manifest: Entry) -> Entry:
    """`manifest` with its own hash."""
    body = {name: value for name, value in manifest.items() if name != "sha256"}
    return {**body, "sha256": hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()}


def read_manifest(folder: pathlib.Path, step: int) -> Entry:
    """The manifest of `step`. Raises DamageError if it is not committed, missing, changed or that of another
    step."""
    if not (folder / COMMIT).is_file():
        raise DamageError(f"it was never committed: {COMMIT} is missing", committed=False)
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        if manifest != sealed(manifest):
            raise UserError("it does not match its own hash")
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DamageError(f"{MANIFEST}: {brief(error)}") from error
    if manifest["format"] != FORMAT:
        raise CheckpointError(f"{folder} has format {manifest['format']!r}, this version reads {FORMAT!r}")
    if manifest["step"] != step:
        raise DamageError(f"it is a copy of step {manifest['step']} under another number")
    return manifest


def read(folder: pathlib.Path, only: str | None, step: int) -> Iterator[tuple[Entry, Any]]:
    """Every leaf of `step` in `folder`, or those below the key `only`, with its value, arrays on the host and
    verified. Raises DamageError naming a leaf."""
    group: list[Entry] = []
    size = 0
    for entry in read_manifest(folder, step)["leaves"]:
        if only not in (None, entry["keys"][0]):
            continue
        count = int(np.prod(entry.get("shape", [0])))
        if count == 0:
            yield entry, _held(entry)
            continue
        group.append(entry)
        size += count * jnp.dtype(entry["dtype"]).itemsize
        if size >= _GROUP:
            yield from _read_arrays(folder, group)
            group, size = [], 0
    yield from _read_arrays(folder, group)


def _held(entry: Entry) -> Any:
    """The value of a leaf stored in the manifest."""
    if "dtype" in entry:
        return np.zeros(entry["shape"], jnp.dtype(entry["dtype"]))
    return float(entry["float"]) if "float" in entry else entry.get("value", {})


def _read_arrays(folder: pathlib.Path, entries: list[Entry]) -> Iterator[tuple[Entry, np.ndarray]]:
    with plain(folder) as reached:
        arrays = _arrays(reached / "state", entries)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for entry, array, digest in zip(entries, arrays, pool.map(_sha256, arrays), strict=True):
            if (list(array.shape), str(array.dtype)) != (entry["shape"], entry["dtype"]):
                raise DamageError(
                    f"leaf {entry['name']}: {array.dtype}{list(array.shape)} on disk, {_kind(entry)} in the "
                    "manifest"
                )
            if digest != entry["sha256"]:
                raise DamageError(f"leaf {entry['name']}: its bytes have changed since they were saved")
            yield entry, array


def _arrays(folder: pathlib.Path, entries: list[Entry]) -> list[np.ndarray]:
    # Arrays are read by TensorStore, as Orbax does; directly, so that an error names its leaf and no thread
    # logs it. The default context would keep caches that hide later changes.
    import tensorstore

    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 10**8}})
    base = {"driver": "file", "path": f"{folder}/"}
    specs = [
        {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": base, "path": f"{entry['name']}/"}}
        for entry in entries
    ]
    opened = [tensorstore.open(spec, context=context, open=True) for spec in specs]
    begun = [
        _attempt(entry, lambda store=store: store.result().read())
        for entry, store in zip(entries, opened, strict=True)
    ]
    return [
        _attempt(entry, lambda future=future: np.asarray(future.result()))
        for entry, future in zip(entries, begun, strict=True)
    ]


def _attempt(entry: Entry, action: Callable[[], Any]) -> Any:
    try:
        return action()
    except Exception as error:
        raise DamageError(f"leaf {entry['name']}: {brief(error)}") from error


def few(names: list[Any], count: int = 3) -> str:
    """The first few of `names`, and how many more there are."""
    rest = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(map(str, names[:count])) + rest


def brief(error: BaseException) -> str:
    """An error in one line."""
    text = str(error).partition("\n")[0].partition(" [tensorstore_spec=")[0].strip()
    return f"{type(error).__name__}: {text[:400]}"
