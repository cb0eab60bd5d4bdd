"""Data: a source of documents, windows packed from it, batches by step number.

    source = FileSource()                                # documents: files of Python's standard library
    windows = pack(source, length=1024, seed=0)          # indexable windows
    batches = Batches(windows, batch_size=32, seed=0)    # indexable batches, by step
    for batch in batches.iterate(start_step): ...

The batch of a step depends only on the data, the seed and the step, not on the number of processes or
workers, nor on where a run was interrupted. The position in the data is therefore the step, and resuming
needs nothing else.
"""

import fnmatch
import hashlib
import operator
import os
import pathlib
import stat
import sysconfig
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, UInt8

from seqlab.checks import UserError, check_choice, expanded
from seqlab.train.packing import DataSource, Item, Windows, pack

__all__ = [
    "ArraySource",
    "Batches",
    "DataSource",
    "FileSource",
    "Item",
    "TfdsSource",
    "Windows",
    "pack",
    "validation_batches",
]

# Content of the standard library's folder that is not its sources.
_NOT_SOURCES = ("site-packages", "dist-packages", "test", "tests", "idle_test", "turtledemo", "__pycache__")


@runtime_checkable
class Items(Protocol):
    """The elements of batches: indexable dictionaries of arrays, such as `Windows`."""

    def __len__(self) -> int:
        """The number of items."""

    def __getitem__(self, index: int) -> Item:
        """Item `index`; always the same arrays, with equal shapes for all items."""


class FileSource:
    """The bytes of files, one document per file.

    `paths` are files and folders; folders are read recursively in sorted order, without names that begin with
    a dot and without following links to folders. None means the sources of the Python standard library, which
    every machine has. `include` and `exclude` are patterns ("*.py"): the first for file names, the second for
    the names of files and folders; either also for whole paths below the folder ("docs/*.md") if it has a
    slash.

    A file belongs to validation if a hash of its path below its folder falls into the share `validation`; the
    split does not change when files are added, and no file is in both. If one side would be empty, it gets
    one file; of a single file, validation is the last `validation` of its bytes.

    Files are listed and opened at construction, and read on demand.

    Raises:
      FileNotFoundError, PermissionError (OSError): naming the missing or unreadable path.
      ValueError: nothing found, naming the searched paths and patterns; an unknown split; a share outside [0,
        1).
    """

    def __init__(
        self,
        paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
        split: str = "train",
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        validation: float = 1 / 20,
    ) -> None:
        check_choice(split, ("train", "validation"), "split")
        if not 0 <= validation < 1:
            raise UserError(
                f"validation: got {validation}, expected a share of the data, 0 <= validation < 1"
            )
        if paths is None:
            paths, include, exclude = (
                sysconfig.get_paths()["stdlib"],
                include or ("*.py",),
                (*_NOT_SOURCES, *exclude),
            )
        roots = [
            expanded("paths", path) for path in ([paths] if isinstance(paths, str | os.PathLike) else paths)
        ]
        files = _list_files(roots, include or ("*",), exclude)
        self._documents = _choose(files, split, validation)
        if not self._documents:
            raise UserError(
                f"no data for {split}: looked in {', '.join(map(str, roots)) or 'no paths at all'} for "
                f"{', '.join(include or '*')}"
                f" and found {len(files)} files that are not empty (validation share {validation:g})"
            )

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: int) -> UInt8[np.ndarray, " t"]:
        path, begin, end = self._documents[index]
        with open(path, "rb") as file:
            file.seek(begin)
            data = file.read(end - begin)
        if len(data) != end - begin:
            raise OSError(f"{path}: became shorter while it was in use")
        return np.frombuffer(data, np.uint8)

    @property
    def files(self) -> list[pathlib.Path]:
        """The files of this split, in order."""
        return [path for path, _, _ in self._documents]


_Listed = tuple[pathlib.Path, str, int]  # where, its path below its root, its size


def _list_files(roots: list[pathlib.Path], include: Sequence[str], exclude: Sequence[str]) -> list[_Listed]:
    files: dict[str, _Listed] = {}  # by real path: a file under two roots counts once
    for root in roots:
        if not root.exists():
            raise FileNotFoundError(f"paths: {root} does not exist")
        for path, name in (
            [(root, root.name)]
            if not root.is_dir()
            else sorted(_walk(root, exclude), key=lambda found: found[1])
        ):
            if path != root and not any(_matches(pattern, name) for pattern in include):
                continue
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):  # opening a pipe would block
                if path == root:
                    raise OSError(f"paths: {root} is neither a file nor a folder")
                continue
            with open(path, "rb"):  # raises now instead of hours later
                pass
            if status.st_size:
                files.setdefault(os.path.realpath(path), (path, name, status.st_size))
    return list(files.values())


def _walk(root: pathlib.Path, exclude: Sequence[str]) -> Iterator[tuple[pathlib.Path, str]]:
    def fail(error: OSError) -> None:
        raise error

    for folder, folders, names in os.walk(root, onerror=fail):
        below = pathlib.Path(folder).relative_to(root)

        def kept(name: str, below: pathlib.Path = below) -> bool:
            return not name.startswith(".") and not any(
                _matches(pattern, (below / name).as_posix()) for pattern in exclude
            )

        folders[:] = filter(kept, folders)
        for name in filter(kept, names):
            yield pathlib.Path(folder, name), (below / name).as_posix()


def _matches(pattern: str, name: str) -> bool:
    return fnmatch.fnmatchcase(name if "/" in pattern else name.rpartition("/")[2], pattern)


def _choose(files: list[_Listed], split: str, validation: float) -> list[tuple[pathlib.Path, int, int]]:
    if len(files) == 1 and validation:
        [(path, _, size)] = files
        cut = size - round(size * validation)
        begin, end = (0, cut) if split == "train" else (cut, size)
        return [(path, begin, end)] if end > begin else []
    share = [_share(name) for _, name, _ in files]
    held_out = {index for index, value in enumerate(share) if value < validation}
    if validation and files:
        held_out = held_out or {share.index(min(share))}
        if len(held_out) == len(files):
            held_out.remove(share.index(max(share)))
    return [
        (path, 0, size)
        for index, (path, _, size) in enumerate(files)
        if (index in held_out) == (split == "validation")
    ]


def _share(name: str) -> float:
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


class ArraySource:
    """Documents in memory: 1-D arrays of integer tokens."""

    def __init__(self, arrays: Sequence[Int[np.ndarray, " t"]]) -> None:
        self._arrays = arrays

    def __len__(self) -> int:
        return len(self._arrays)

    def __getitem__(self, index: int) -> Int[np.ndarray, " t"]:
        return np.asarray(self._arrays[index])


class TfdsSource:
    """A split of a prepared TensorFlow Datasets data set, read without TensorFlow.

    `name` may carry a configuration and a version ("wiki40b/en:1.3.0"), `split` a range ("train[:10%]").
    Feature `key` is a document: text as its UTF-8 bytes, a 1-D integer feature as it is. Nothing is
    downloaded or prepared here.

    Raises:
      ValueError: the data set is not prepared, or not in a format with random access, with instructions; an
        unknown split or feature; a feature that is neither text nor integers.
    """

    def __init__(
        self,
        name: str,
        split: str = "train",
        key: str = "text",
        data_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        import tensorflow_datasets as tfds

        features, self._source = tfds_source(name, split, data_dir)
        if key not in features:
            raise UserError(
                f"key: data set {name!r} has no feature {key!r}, but {', '.join(map(repr, features))}"
            )
        self._text = isinstance(features[key], tfds.features.Text)
        if not self._text and not (
            features[key].shape == (None,) and np.issubdtype(features[key].np_dtype, np.integer)
        ):
            raise UserError(
                f"key: feature {key!r} of data set {name!r} is {features[key]}, expected Text or 1-D integers"
            )
        self._key = key

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Int[np.ndarray, " t"]:
        value = self._source[index][self._key]
        return np.frombuffer(value, np.uint8) if self._text else np.asarray(value)


def tfds_source(name: str, split: str, data_dir: str | os.PathLike[str] | None = None) -> tuple[Any, Any]:
    """The features of a prepared TFDS data set and an indexable split of it; raises like `TfdsSource`."""
    import tensorflow_datasets as tfds

    where = "the default folder of tensorflow_datasets" if data_dir is None else os.fspath(data_dir)
    remedy = (
        f"prepare it once with tfds.builder({name!r}, data_dir={data_dir and os.fspath(data_dir)!r}, "
        "file_format='array_record')"
        ".download_and_prepare()"
    )
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        raise UserError(
            f"data set {name!r} is not in {where}, nor known to tensorflow_datasets; if it exists, {remedy}"
        ) from error
    if not builder.is_prepared():
        raise UserError(f"data set {name!r} is not prepared in {where}; {remedy}")
    try:
        return builder.info.features, builder.as_data_source(split)
    except NotImplementedError as error:  # a format that can only be read from the start
        stored = builder.info.file_format.value
        raise UserError(
            f"data set {name!r} in {where} is stored as {stored}; delete it and {remedy}"
        ) from error


class Batches:
    """The batch of every step, without end: `batches[step]`, or `batches.iterate(start_step)` with
    prefetching.

    Every epoch has another order of `items`, drawn from `seed`; batches may span two epochs. A batch is a
    dictionary of arrays [batch_size / process_count, ...]: process p has rows p, p + process_count, ... of
    the batch of all processes, which is the same for any number of them. The default is the current JAX
    process.

    If `items` has a method augment(item, random), every row is its result, with a generator that depends only
    on `seed` and the row's number in the run.

    `workers` processes prepare batches in `iterate`; with 0, a thread does, which suffices for windows in
    memory. Each worker holds a copy of `items`. As always with processes, a script that uses them needs
    `if __name__ == "__main__":`.

    Raises:
      ValueError: fewer items than `batch_size`, or a `batch_size` that the processes cannot share equally.
    """

    def __init__(
        self,
        items: Items,
        batch_size: int,
        seed: int,
        process_index: int | None = None,
        process_count: int | None = None,
        workers: int = 0,
    ) -> None:
        import grain

        index, count = _process(process_index, process_count)
        rows = _rows(batch_size, count)
        if len(items) < batch_size:
            raise UserError(
                f"too little data: {len(items)} windows, and one batch takes batch_size = {batch_size}"
            )
        if workers < 0:
            raise UserError(f"workers: got {workers}, expected 0 or more")
        # Grain seeds epoch e with seed + e: without mixing, the first epoch of seed 1 would be the second of
        # seed 0.
        mixed = int(np.random.SeedSequence(seed).generate_state(1)[0])
        order = grain.MapDataset.source(items).shuffle(seed=mixed).repeat()
        # Before rows are divided among processes: the draws for a row do not depend on its process.
        if hasattr(items, "augment"):
            order = order.random_map(items.augment, seed=mixed)
        # Slice, batch, and only then parallelise: in any other order the batches depend on the number of
        # workers.
        self._batches = order[index::count].batch(rows)
        self._workers = workers

    def __getitem__(self, step: int) -> Item:
        return self._batches[_step(step)]

    def iterate(self, start_step: int = 0) -> Iterator[Item]:
        """The batches of `start_step`, `start_step + 1`, ..., prepared ahead; equal to `batches[step]`
        whatever `workers` is.

        Preparation starts immediately and ends with the iterator: at its `close()`, when it is deleted, or at
        exit.
        """
        import grain

        batches = self._batches[_step(start_step) :].to_iter_dataset(
            grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)
        )
        if self._workers:
            from absl import flags

            # Grain reads absl flags in its workers, and most programs do not parse any.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            batches = batches.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=2)
            )
        return _Ahead(iter(batches))


class _Ahead(Iterator[Item]):
    """Wrapper of a Grain iterator that closes it before the interpreter shuts down."""

    def __init__(self, iterator: Any) -> None:
        iterator.start_prefetch()
        self._owned = [iterator]
        self.close = weakref.finalize(self, _close, self._owned)

    def __next__(self) -> Item:
        if not self._owned:
            raise StopIteration
        return next(self._owned[0])


def _close(owned: list[Any]) -> None:
    while owned:
        owned.pop().close()


class _FixedBatches(Sequence[Item]):
    def __init__(self, items: Items, indices: list[range]) -> None:
        self._items = items
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Item:
        rows = [
            self._items[row] if row < len(self._items) else _padding(self._items[0])
            for row in self._indices[operator.index(index)]
        ]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def validation_batches(
    items: Items,
    batch_size: int,
    limit: int | None = None,
    process_index: int | None = None,
    process_count: int | None = None,
) -> Sequence[Item]:
    """The items in their order, once, in batches: at most `limit` of them, and the same every time.

    Missing rows of the last batch are zeros with `valid` False, so every batch has the same shape and every
    process the same number of batches. Rows are divided among processes as in `Batches`.

    Raises:
      ValueError: no items, a limit below 1, or a `batch_size` that the processes cannot share equally.
    """
    index, count = _process(process_index, process_count)
    _rows(batch_size, count)
    if not len(items):
        raise UserError("too little data: no windows for validation")
    if limit is not None and limit < 1:
        raise UserError(f"limit: got {limit}, expected at least one batch, or None for all")
    total = -(-len(items) // batch_size)
    chosen = range(total if limit is None else min(limit, total))
    return _FixedBatches(
        items, [range(step * batch_size + index, (step + 1) * batch_size, count) for step in chosen]
    )


def _padding(item: Item) -> Item:
    if "valid" not in item:
        raise UserError(
            f"items with {', '.join(sorted(item))} have no `valid`, so the rows that a last batch lacks "
            "cannot be told apart"
        )
    return {name: np.zeros_like(value) for name, value in item.items()}


def _step(step: int) -> int:
    step = operator.index(step)
    if step < 0:
        raise IndexError(f"step: got {step}, expected 0 or more")
    return step


def _rows(batch_size: int, process_count: int) -> int:
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"batch_size: got {batch_size}, expected a positive multiple of the number of processes, "
            f"{process_count}"
        )
    return batch_size // process_count


def _process(index: int | None, count: int | None) -> tuple[int, int]:
    if index is None and count is None:
        import jax

        return jax.process_index(), jax.process_count()
    if index is None or count is None or not 0 <= index < count:
        raise UserError(
            f"process_index: got {index} of process_count {count}, expected 0 <= process_index < "
            "process_count, or neither"
        )
    return index, count
