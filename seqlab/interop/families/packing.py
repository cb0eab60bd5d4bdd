"""Published tensors that hold the rows of several of our maps in another order.

A family says by `packed(model)` which rows of a published map become which map of ours:

    {"attention.query_key_value": {"attention.q_proj": rows, "attention.k_proj": rows, ...}}

for weights and biases of every layer alike. The rows are indices of the first axis of the published tensor.
"""

from collections.abc import Iterator, Mapping

import numpy as np

Packed = Mapping[str, Mapping[str, np.ndarray]]


class Unpacked(Mapping[str, np.ndarray]):
    """The tensors of a file with each packed one replaced by its parts, which are read on demand.

    Args:
      tensors: by their published names.
      packed: the rows of each part.
    """

    def __init__(self, tensors: Mapping[str, np.ndarray], packed: Packed):
        self._tensors = tensors
        self._parts: dict[str, tuple[str, np.ndarray | None]] = {}
        for name in tensors:
            split = _parts_of(name, packed)
            self._parts |= split if split else {name: (name, None)}

    def __getitem__(self, name: str) -> np.ndarray:
        whole, rows = self._parts[name]
        value = self._tensors[whole]
        # Tensors of another size are refused by their shapes afterwards.
        return value if rows is None or len(rows) == 0 or rows.max() >= len(value) else value[rows]

    def __contains__(self, name: object) -> bool:
        return name in self._parts

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


def pack(tensors: Mapping[str, np.ndarray], packed: Packed) -> dict[str, np.ndarray]:
    """The inverse of `Unpacked`."""
    wholes = {part: whole for whole, parts in packed.items() for part in parts}
    found: dict[str, np.ndarray] = {}
    for name, value in tensors.items():
        part = next((part for part in wholes if f".{part}." in f".{name}."), None)
        if part is None:
            found[name] = value
            continue
        rows = packed[wholes[part]]
        whole = f".{name}.".replace(f".{part}.", f".{wholes[part]}.").strip(".")
        if whole not in found:
            found[whole] = np.empty((sum(map(len, rows.values())), *value.shape[1:]), value.dtype)
        found[whole][rows[part]] = value
    return found


def _parts_of(name: str, packed: Packed) -> dict[str, tuple[str, np.ndarray]]:
    """The parts of a tensor with their rows; empty if it is not packed."""
    for whole, parts in packed.items():
        if f".{whole}." in f".{name}.":
            new = {part: f".{name}.".replace(f".{whole}.", f".{part}.").strip(".") for part in parts}
            return {new[part]: (name, rows) for part, rows in parts.items()}
    return {}
