"""Verified checkpoints: complete or absent, every leaf hashed, with automatic fall-back to the last good
step.

Orbax writes the arrays in the background, but does not detect missing or changed bytes. Each step therefore
has a manifest with the SHA-256 of every leaf, and mismatching leaves are never returned. A save is written
under a temporary name, read back and verified, and then renamed.

    <directory>/<step>/commit_success.txt          written last
    <directory>/<step>/manifest/manifest.json      name, shape, dtype and hash of every leaf; Python values

    <directory>/<step>/state/                      the arrays, by name, in Orbax's format
    <directory>/<step>.saving-<token>              a save in progress or interrupted by a kill
    <directory>/<step>.damaged-<n>                 a damaged step whose number was needed again

A state is a nested dictionary with string keys. The name of a leaf is its keys joined with "/".
"""

import atexit
import concurrent.futures.thread  # noqa: F401 - registers the executors' exit handler, see the end
import logging
import operator
import os
import pathlib
import re
import secrets
import shutil
import threading
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from seqlab.checks import UserError, check_choice
from seqlab.train.folder import locate
from seqlab.train.manifest import (
    COMMIT,
    FORMAT,
    CheckpointError,
    DamageError,
    Entry,
    Leaves,
    State,
    brief,
    check_fit,
    describe,
    few,
    flatten,
    nested,
    read,
    read_manifest,
    sealed,
)
from seqlab.train.writing import Save, everywhere, remove_while_written

__all__ = ["CheckpointError", "Checkpoints"]

logger = logging.getLogger(__name__)

_Files = tuple[tuple[str, int, int], ...]  # of one step: name, size, time
_LEFTOVER = r"(0|[1-9][0-9]*)(\.damaged-[0-9]+|\.saving-[0-9a-f]+)?"


class Checkpoints:
    """The checkpoints of one run in `directory`, a local or mounted folder that all processes see.

    Leaves are JAX or NumPy arrays of any numeric dtype, restored bit for bit, and Python ints, floats, bools
    and strings. Typed PRNG keys are stored as `jax.random.key_data`. With several processes, all make the
    same calls.

    The newest `keep` good steps are kept. Older ones are deleted once a new one is committed; damaged steps
    do not count and are deleted when older than all of those. The first rotation of a process verifies the
    steps that it has neither saved nor restored itself.

    Use it in a `with` block, or `close` it: Python starts no threads during shutdown, so an unfinished
    background save would be lost (and an error logged).
    """

    def __init__(self, directory: str | os.PathLike[str], keep: int = 3) -> None:
        if "://" in os.fspath(directory):
            raise UserError(f"directory: got {os.fspath(directory)!r}, expected a local or mounted folder")
        if keep < 1:
            raise UserError(f"keep: got {keep}, expected at least 1")
        self.directory = locate(directory)
        self._keep = keep
        self._saver: Any = None
        self._pending: tuple[int, Save] | None = None
        # Step: the files it had when it was found good or damaged.
        self._known: dict[int, tuple[_Files, bool]] = {}

    def steps(self) -> list[int]:
        """The committed steps in order, damaged or not."""
        return [step for step in self._folders() if (self._folder(step) / COMMIT).is_file()]

    def save(self, step: int, state: State, wait: bool = False) -> None:
        """Save `state` as `step`, in the background unless `wait`; the arrays may be donated or changed once
        this returns.

        A damaged or unfinished step of that number is moved aside; a good one with the same state is kept.

        Raises:
          CheckpointError: the previous save failed (this one is then not begun), this one did, or a good
            `step` holds another state.
          TypeError, ValueError: naming a leaf that cannot be stored.
        """
        self.wait()
        step = operator.index(step)
        if step < 0:
            raise UserError(f"step: got {step}, expected 0 or more")
        leaves = flatten(state)
        manifest = sealed({"format": FORMAT, "step": step, "leaves": describe(leaves)})
        if not self._make_room(step, manifest):
            return
        # Orbax refuses empty arrays.
        arrays = {name: value for name, (_, value) in leaves.items() if getattr(value, "size", 0)}
        draft = self.directory / f"{step}.saving-{_shared_token()}"
        try:
            save = Save(self._orbax(), draft, self._folder(step), manifest, arrays)
        except Exception as error:
            raise self._failure(step, draft, error) from error
        self._pending = (step, save)
        _unfinished.add(self)
        if wait:
            self.wait()

    def try_out(self) -> None:
        """Write a small checkpoint and read it back, to detect an unusable folder before training. Raises
        CheckpointError."""
        self.wait()
        leaves = flatten({"trial": np.arange(3, dtype=np.float32)})
        manifest = sealed({"format": FORMAT, "step": 0, "leaves": describe(leaves)})
        draft = self.directory / f"0.saving-{_shared_token()}{'0' * 10}"  # as long as names will get
        error: Exception | None = None
        try:
            save = Save(
                self._orbax(), draft, None, manifest, {name: leaf[1] for name, leaf in leaves.items()}
            )
            save.wait()
            error = save.error
        except Exception as failure:
            error = failure
        if jax.process_index() == 0:
            remove_while_written(draft)
        if not everywhere(error is None):
            reason = brief(error) if error else "another process cannot write there"
            raise CheckpointError(f"{self.directory} cannot hold checkpoints: {reason}") from error

    def wait(self) -> None:
        """Wait until the save in progress is committed. Raises CheckpointError, once, if it failed."""
        if self._pending is None:
            return
        (step, save), self._pending = self._pending, None
        _unfinished.discard(self)
        save.wait()
        if not everywhere(save.error is None):
            error = save.error or OSError("another process could not write its part")
            raise self._failure(step, save.draft, error) from error
        self._known[step] = (self._files(step), True)
        self._rotate()

    def restore(
        self, step: int | None = None, like: State | None = None, only: str | None = None
    ) -> tuple[int, State] | None:
        """The newest good step and its state, or exactly `step`. None if nothing was ever committed.

        With `like`, a state of arrays or `jax.ShapeDtypeStruct`s, names, shapes and dtypes must agree, and
        leaves whose template has a sharding are restored with it, on any number of devices; the others, and
        all without `like`, are NumPy arrays. `only` names one top-level entry: the state and `like` then
        contain only it, and nothing else is read.

        A newer step that is damaged or uncommitted is skipped with a warning.

        Raises:
          CheckpointError: `step` does not exist or is damaged, naming the leaf or file; every step is
            damaged, with the reason for each; the state does not fit `like`, with the first names that
            differ.
          ValueError: the state has no entry `only`.
        """
        self.wait()
        template = None if like is None else flatten(like)
        if step is not None:
            step = operator.index(step)
            if not everywhere(self._folder(step).is_dir()):
                raise CheckpointError(
                    f"there is no step {step} in {self.directory}; there are "
                    f"{few(self.steps(), 10) or 'none'}"
                )
            try:
                return step, self._load(step, template, only)
            except DamageError as damage:
                raise CheckpointError(f"step {step} in {self.directory} is damaged: {damage}") from damage
        damages: dict[int, DamageError] = {}
        for candidate in reversed(_from_first(self._folders())):
            try:
                return candidate, self._load(candidate, template, only)
            except DamageError as damage:
                logger.warning("step %d in %s is passed over: %s", candidate, self.directory, damage)
                damages[candidate] = damage
        if any(damage.committed for damage in damages.values()):
            reasons = "; ".join(f"step {candidate}: {damage}" for candidate, damage in damages.items())
            raise CheckpointError(f"no good checkpoint in {self.directory}: {reasons}")
        return None

    def close(self) -> None:
        """Wait for the save in progress and close Orbax. Raises CheckpointError if that save failed."""
        try:
            self.wait()
        finally:
            saver, self._saver = self._saver, None
            if saver is not None:
                saver.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    # Writing

    def _orbax(self) -> Any:
        """Orbax's array writer, created on first use, since importing Orbax takes a second."""
        import orbax.checkpoint as ocp

        if self._saver is None:
            logging.getLogger("absl").addFilter(_not_a_repetition)  # once, however often
            self._saver = ocp.AsyncCheckpointer(
                ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=False),
                # Or threads wait for their folders, for minutes if the program ends before there are any.
                async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
            )
        return self._saver

    def _failure(self, step: int, draft: pathlib.Path, error: Exception) -> CheckpointError:
        """Clean up after a failed save; its files are not a checkpoint, and the disk may be full."""
        saver, self._saver = self._saver, None
        try:
            if saver is not None:
                saver.close()
        except Exception:
            logger.debug("closing after a failed save", exc_info=True)
        if jax.process_index() == 0:
            remove_while_written(draft)
        left = f"steps {few(self.steps(), 10)} are untouched" if self.steps() else "there is no earlier step"
        return CheckpointError(
            f"step {step} could not be saved to {self._folder(step)}: {brief(error)}; {left}"
        )

    def _make_room(self, step: int, manifest: Entry) -> bool:
        folder = self._folder(step)
        if everywhere(not folder.exists()):
            return True
        if self._is_good(step):
            if read_manifest(folder, step)["sha256"] == manifest["sha256"]:
                logger.info("step %d is already saved in %s", step, self.directory)
                return False
            raise CheckpointError(
                f"step {step} exists in {self.directory} with another state; move it away, or save another "
                "step"
            )
        if jax.process_index() == 0 and folder.exists():
            aside = next(
                path
                for n in range(1, 10**6)
                if not (path := folder.with_name(f"{step}.damaged-{n}")).exists()
            )
            folder.rename(aside)
            logger.warning("damaged step %d in %s is moved aside to %s", step, self.directory, aside.name)
        self._known.pop(step, None)
        everywhere(True)  # nobody writes before it is moved
        return True

    # What is on disk

    def _folder(self, step: int) -> pathlib.Path:
        return self.directory / str(step)

    def _folders(self, pattern: str = r"(0|[1-9][0-9]*)") -> list[int]:
        if not self.directory.is_dir():
            return []
        found = (re.fullmatch(pattern, path.name) for path in self.directory.iterdir() if path.is_dir())
        return sorted(int(match[1]) for match in found if match)

    def _files(self, step: int) -> _Files:
        found = []
        for folder, _, names in os.walk(self._folder(step)):
            for name in names:
                status = os.stat(os.path.join(folder, name))
                found.append((os.path.join(folder, name), status.st_size, status.st_mtime_ns))
        return tuple(sorted(found))

    def _is_good(self, step: int) -> bool:
        files = self._files(step)
        known, good = self._known.get(step, (None, False))
        if not everywhere(known == files):
            try:
                _agreed(lambda: [None for _ in read(self._folder(step), None, step)])
                good = True
            except DamageError as damage:
                logger.warning("step %d in %s is damaged: %s", step, self.directory, damage)
                good = False
            self._known[step] = (files, good)
        return good

    def _rotate(self) -> None:
        committed, leftover = _from_first(self.steps()), _from_first(self._folders(_LEFTOVER))
        if len(committed) < self._keep or leftover[0] >= committed[-self._keep]:
            return
        good = 0
        for oldest in reversed(committed):
            good += self._is_good(oldest)
            if good == self._keep:
                break
        else:
            return  # fewer good steps than are to be kept: nothing goes
        if jax.process_index() == 0:
            for path in self.directory.iterdir():
                match = re.fullmatch(_LEFTOVER, path.name)
                if match and int(match[1]) < oldest:
                    _delete(path)
        everywhere(True)  # all see the same steps afterwards

    def _load(self, step: int, template: Leaves | None, only: str | None) -> State:
        def load() -> State:
            folder = self._folder(step)
            entries = read_manifest(folder, step)["leaves"]
            if only is not None:
                check_choice(
                    only,
                    tuple(sorted({entry["keys"][0] for entry in entries})),
                    f"only, an entry of {folder}",
                )
                entries = [entry for entry in entries if entry["keys"][0] == only]
            if template is not None:
                check_fit(entries, template, folder)
            like = {name: value for name, (_, value) in (template or {}).items()}
            return nested(
                [
                    (entry["keys"], _placed(entry["name"], value, like))
                    for entry, value in read(folder, only, step)
                ]
            )

        files = self._files(step)
        try:
            state = _agreed(load)
        except DamageError:
            self._known[step] = (files, False)
            raise
        if only is None:
            self._known[step] = (files, True)
        return state


_unfinished: set[Checkpoints] = set()


def _finish() -> None:
    """At exit without close(): complete the last save, or report that it was lost."""
    for checkpoints in tuple(_unfinished):
        try:
            checkpoints.wait()
        except CheckpointError as error:
            logger.error(
                "the program ended before a checkpoint was saved; close() the checkpoints, or use `with`: %s",
                error,
            )


# Exit handlers run in reverse order of registration, and executors stop their threads in one: waiting for a
# save after that never ends (Orbax gives up after five minutes). This handler is therefore registered with
# theirs and after them; `atexit` alone would run too late.
getattr(threading, "_register_atexit", atexit.register)(_finish)


def _placed(name: str, value: Any, like: Mapping[str, Any]) -> Any:
    template = like.get(name)
    sharding = getattr(template, "sharding", None)
    if sharding is None or not isinstance(value, np.ndarray):
        return value
    if isinstance(template, jax.Array) and not template.committed:  # stays free to go where the others are
        array = jnp.asarray(value)
    else:
        array = jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])
    if array.dtype != value.dtype:
        raise CheckpointError(
            f"{name} is {value.dtype} and JAX makes it {array.dtype}: enable jax_enable_x64, or ask for a "
            "NumPy array"
        )
    return array


def _shared_token() -> str:
    """A unique name for a save, the same in all processes."""
    token = secrets.randbits(31)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        token = int(multihost_utils.broadcast_one_to_all(np.int32(token)))
    return f"{token:08x}"


def _from_first(steps: list[int]) -> list[int]:
    """The steps seen by process 0, in all processes: others may see an older state of a shared folder."""
    if jax.process_count() == 1:
        return steps
    from jax.experimental import multihost_utils

    count = int(multihost_utils.broadcast_one_to_all(np.int32(len(steps))))
    mine = np.array(steps if jax.process_index() == 0 else [0] * count, np.int32)
    return np.asarray(multihost_utils.broadcast_one_to_all(mine)).tolist() if count else []


def _agreed(function: Callable[[], Any]) -> Any:
    """The result of `function`; if one process finds damage, all raise."""
    result, damage = None, None
    try:
        result = function()
    except DamageError as error:
        damage = error
    if not everywhere(damage is None):
        raise damage or DamageError("another process finds it damaged")
    return result


def _delete(folder: pathlib.Path) -> None:
    try:
        (folder / COMMIT).unlink(missing_ok=True)  # first: half a deletion must not look like a checkpoint
        shutil.rmtree(folder)
    except OSError as error:
        logger.warning("%s is no longer needed and could not be deleted: %s", folder, error)


def _not_a_repetition(record: logging.LogRecord) -> bool:
    """Orbax logs a failed save four times with its traceback before it raises it; here it is raised once."""
    return not (record.exc_info and "orbax" in pathlib.PurePath(record.pathname).parts)
