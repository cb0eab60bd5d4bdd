"""Files of published models, read as data and only inside their folder.

A published folder is untrusted: its index, links and headers may contain anything. Nothing outside the folder
is read, and damaged files are refused in one line that names them.
"""

import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes  # noqa: F401 - makes bfloat16 a dtype of NumPy, which the files need
import numpy as np

from seqlab.checks import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_DTYPES = ("F64", "F32", "F16", "BF16")
_OTHER_FORMS = {
    "*.bin": "weights of PyTorch's pickle format, which runs code when it is read: save them as safetensors "
    "(transformers' save_pretrained does)",
    "consolidated*.safetensors": "weights under Mistral's own names: use the files that transformers reads",
    "adapter_model.safetensors": "a LoRA adapter alone: merge it into its model first (merge_and_unload)",
    "*.gguf": "a GGUF file: pass the file itself instead of its folder",
}


class PretrainedError(UserError):
    """A folder without a published model, or with an unsupported one; the message names the cause."""


class Folder:
    """The files of a published model.

    Args:
      path: the folder; a snapshot in the hub's cache may link to the blobs of its own repository there.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = pathlib.Path(path)
        root = self.path.resolve()
        self._roots = [root]
        if root.parent.name == "snapshots":
            self._roots.append(root.parent.parent / "blobs")

    def file(self, name: str) -> pathlib.Path | None:
        """The file of that name; None if missing.

        Raises:
          PretrainedError: `name` is a path, or the file is a link out of the folder.
        """
        if name != os.path.basename(name) or "\\" in name or "\0" in name or name in ("", ".", ".."):
            raise PretrainedError(
                f"{self.path}: {name!r} is no plain file name: nothing outside the folder is read"
            )
        path = self.path / name
        if not path.is_file():
            return None
        real = path.resolve()
        if not any(real.is_relative_to(root) for root in self._roots):
            raise PretrainedError(f"{path} leads to {real}: nothing outside the folder is read")
        return path

    def text(self, name: str) -> str | None:
        """The text of a file; None if missing. Raises PretrainedError if it cannot be read."""
        path = self.file(name)
        if path is None:
            return None
        try:
            return path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PretrainedError(f"{path} cannot be read: {error}") from error

    def json(self, name: str) -> dict[str, Any]:
        """The object in a JSON file, with numbers that JSON lacks as transformers writes them
        ({"__float__": "Infinity"}); empty if the file is missing. Raises PretrainedError for anything
        else."""
        text = self.text(name)
        if text is None:
            return {}
        try:
            found = json.loads(text, object_hook=number)
        except (ValueError, RecursionError) as error:
            raise PretrainedError(f"{self.path / name} is not JSON: {error}") from error
        if not isinstance(found, dict):
            raise PretrainedError(f"{self.path / name}: expected an object, got {type(found).__name__}")
        return found

    def tensors(self) -> "Tensors":
        """The weights. Raises PretrainedError if a file is missing or damaged."""
        return Tensors(self._shards())

    def _shards(self) -> list[pathlib.Path]:
        if self.file(INDEX) is not None:
            named = self.json(INDEX).get("weight_map")
            if (
                not isinstance(named, dict)
                or not all(isinstance(name, str) for name in named.values())
                or not named
            ):
                raise PretrainedError(f"{self.path / INDEX}: weight_map must name a file for each tensor")
            names = sorted(set(named.values()))
        else:
            names = [SINGLE]
        files = {name: self.file(name) for name in names}
        missing = [name for name, path in files.items() if path is None]
        if missing:
            found = [why for pattern, why in _OTHER_FORMS.items() if any(self.path.glob(pattern))]
            raise PretrainedError(
                f"{self.path} lacks {', '.join(missing)}" + (f"; it holds {found[0]}" if found else "")
            )
        return [path for path in files.values() if path is not None]


class Tensors(Mapping[str, np.ndarray]):
    """The tensors of safetensors files by name. Each is read on demand; 16-bit tensors are converted to
    float32, exactly.

    Raises:
      PretrainedError: a damaged header, a duplicate tensor, or one that is not floating point.
    """

    def __init__(self, files: list[pathlib.Path]):
        from safetensors import safe_open

        self._files: dict[str, Any] = {}
        self._paths: dict[str, pathlib.Path] = {}
        for path in files:
            try:
                file = safe_open(path, framework="numpy")
                names = list(file.keys())
                kinds = {name: file.get_slice(name).get_dtype() for name in names}
            except Exception as error:  # the library's own, OSError, and what its header makes of numbers
                raise PretrainedError(f"{path} is damaged or no safetensors file: {error}") from error
            twice = sorted(self._files.keys() & set(names))
            if twice:
                raise PretrainedError(f"{path}: tensor {twice[0]} is also in {self._paths[twice[0]].name}")
            odd = sorted(name for name, kind in kinds.items() if kind not in _DTYPES)
            if odd:
                raise PretrainedError(
                    f"{path}: tensor {odd[0]} is stored as {kinds[odd[0]]}, expected one of "
                    f"{', '.join(_DTYPES)}: "
                    "quantized weights are not supported"
                )
            self._files |= dict.fromkeys(names, file)
            self._paths |= dict.fromkeys(names, path)

    def __getitem__(self, name: str) -> np.ndarray:
        file = self._files[name]
        try:
            value = np.asarray(file.get_tensor(name))
        except Exception as error:
            raise PretrainedError(f"{self._paths[name]}: tensor {name} cannot be read: {error}") from error
        return value.astype(np.float32) if value.dtype.itemsize < 4 else value

    def __contains__(self, name: object) -> bool:
        return name in self._files  # without reading it

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the header."""
        return tuple(self._files[name].get_slice(name).get_shape())


def number(found: dict[str, Any]) -> Any:
    """An object of a JSON file; a non-finite number where it stands for one, as transformers writes them
    ({"__float__": "Infinity"})."""
    if found.keys() == {"__float__"} and found["__float__"] in ("Infinity", "-Infinity", "NaN"):
        return float(found["__float__"].replace("Infinity", "inf"))
    return found
