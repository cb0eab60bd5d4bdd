"""A request as bytes, so that another process can go on with it: settings, progress and the stream's state.

The format is safetensors with JSON in its metadata: reading it runs no code, and all settings are checked
again by whoever receives them.
"""

import json
from collections.abc import Set
from typing import Any, NamedTuple

import jax
import numpy as np

from seqlab.checks import UserError
from seqlab.state import from_arrays, to_arrays
from seqlab.streaming.states import StreamState

_FORMAT = "seqlab.request.1"


class Parcel(NamedTuple):
    """A request on its way. `prompt` [t]. `options`: the arguments of `Batcher.submit`. `read`: tokens of the
    prompt that the state has seen; `drawn`: tokens drawn since; `before`: steps of the stream before the
    prompt. `continued`: whether it began with a state. `state`: None before the first step."""

    prompt: np.ndarray
    options: dict[str, Any]
    read: int
    drawn: int
    before: int
    continued: bool
    state: StreamState | None


def pack(parcel: Parcel) -> bytes:
    """`parcel` as bytes."""
    from safetensors.numpy import save

    arrays, dtypes = ({}, {}) if parcel.state is None else to_arrays(parcel.state)
    values = jax.tree.leaves(parcel.options["logits_values"])
    arrays = {f"state.{name}": array for name, array in arrays.items()}
    arrays |= {f"values.{i}": np.ascontiguousarray(leaf) for i, leaf in enumerate(values)}
    arrays["prompt"] = np.asarray(parcel.prompt, np.int64)
    options = {name: _plain(value) for name, value in parcel.options.items() if name != "logits_values"}
    about = parcel._asdict() | {"options": options, "dtypes": dtypes, "has_state": parcel.state is not None}
    about = {name: value for name, value in about.items() if name not in ("prompt", "state")}
    return save(arrays, metadata={"format": _FORMAT, "request": json.dumps(about)})


def unpack(data: bytes, names: Set[str], like: StreamState, values: Any) -> Parcel:
    """The parcel in `data`.

    Args:
      names: of the options that it must have.
      like: a state of one row, of any size, of the model that is to go on.
      values: an example of the values of the batcher's function of logits.
    Raises:
      ValueError: `data` is no request, or that of another model.
    """
    from safetensors import SafetensorError, deserialize

    try:
        about = json.loads(_metadata(data)["request"])
        arrays = {name: _array(part) for name, part in deserialize(data)}
        state = None
        if about["has_state"]:
            own = {
                name.removeprefix("state."): array for name, array in arrays.items() if name[:6] == "state."
            }
            state = from_arrays(own, about["dtypes"], like, "request", any_size=True)
        options = {name: _given(value) for name, value in about["options"].items()}
        if (own := options.keys() | {"logits_values"}) != names:
            raise UserError(f"data has other options than expected: {sorted(own ^ names)[:3]}")
        leaves, tree = jax.tree.flatten(values)
        given = [arrays[f"values.{i}"] for i in range(len(leaves)) if f"values.{i}" in arrays]
        options["logits_values"] = jax.tree.unflatten(tree, given) if given else None
        counts = [int(about[name]) for name in ("read", "drawn", "before")]
        return Parcel(arrays["prompt"], options, *counts, bool(about["continued"]), state)
    except UserError:
        raise
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"data is no request that a batcher has handed over ({error!r:.100})") from error


def _metadata(data: bytes) -> dict[str, str]:
    size = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + size])["__metadata__"]
    if metadata.get("format") != _FORMAT:
        raise UserError(f"data has the format {metadata.get('format')!r}, expected {_FORMAT!r}")
    return metadata


def _array(part: dict[str, Any]) -> np.ndarray:
    names = {"F32": "f4", "F64": "f8", "F16": "f2", "BOOL": "?"} | {
        f"{kind}{8 * size}": f"{kind.lower()}{size}" for kind in "IU" for size in (1, 2, 4, 8)
    }
    return np.frombuffer(part["data"], np.dtype(names[part["dtype"]])).reshape(part["shape"])


def _plain(value: Any) -> Any:
    """`value` for JSON, which knows neither bytes nor infinity nor keys that are numbers."""
    if isinstance(value, bytes | bytearray | memoryview):
        return {"bytes": bytes(value).hex()}
    if hasattr(value, "items"):
        return {"pairs": [[int(token), str(float(bias))] for token, bias in value.items()]}
    if hasattr(value, "__array__"):
        return np.asarray(value).tolist()
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(part) for part in value]
    return value


def _given(value: Any) -> Any:
    """The inverse of `_plain`."""
    if isinstance(value, list):
        return [_given(part) for part in value]
    if isinstance(value, dict):
        if "bytes" in value:
            return bytes.fromhex(value["bytes"])
        return {token: float(bias) for token, bias in value["pairs"]}
    return value
