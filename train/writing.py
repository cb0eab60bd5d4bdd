"""A save of a checkpoint: written to a temporary folder, read back, and only then renamed.

    <step>.saving-<token>/    a draft, used by no other save <step>/                   the draft under its
    final name, once all of it was verified

Orbax writes the arrays, from all processes; the first process does the rest. A failed save may leave threads
that still write, into their own draft, which is never read.
"""

import contextlib
import errno
import json
import os
import pathlib
import shutil
import threading
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from seqlab.train.folder import plain
from seqlab.train.manifest import COMMIT, MANIFEST, DamageError, Entry, read


class Save:
    """A save in progress.

    Args:
      saver: Orbax's AsyncCheckpointer for the arrays.
      draft: the new folder to write to, created by the first process.
      folder: what the draft is renamed to, or None for a trial, which is only read back.
      manifest: the manifest against which files are verified.
      arrays: by name, none of them empty; they may change once the constructor has returned.
    """

    def __init__(
        self,
        saver: Any,
        draft: pathlib.Path,
        folder: pathlib.Path | None,
        manifest: Entry,
        arrays: Mapping[str, Any],
    ) -> None:
        self.error: Exception | None = None
        self.draft = draft
        self._saver, self._folder, self._manifest = saver, folder, manifest
        self._reached = contextlib.ExitStack()
        try:
            _make(draft)
            if arrays:
                import orbax.checkpoint as ocp

                reached = self._reached.enter_context(plain(draft))
                saver.save(reached / "state", args=ocp.args.PyTreeSave(dict(arrays)))
        except BaseException:
            self._reached.close()
            raise
        self._thread = threading.Thread(target=self._complete, name=f"seqlab save {draft.name}")
        self._thread.start()

    def wait(self) -> None:
        """Wait until the save is complete or has failed; `error` says which, for this process."""
        self._thread.join()

    def _complete(self) -> None:
        try:
            self._saver.wait_until_finished()
            if jax.process_index() == 0:
                self._commit()
        except Exception as error:
            self.error = error
        finally:
            self._reached.close()

    def _commit(self) -> None:
        path = self.draft / MANIFEST
        path.parent.mkdir()
        path.write_text(json.dumps(self._manifest, allow_nan=False))
        (self.draft / COMMIT).write_text("written and read back\n")
        try:
            for _ in read(self.draft, None, self._manifest["step"]):
                pass
        except DamageError as damage:
            raise OSError(f"what was written cannot be read back: {damage}") from damage
        if self._folder is None:
            return
        _to_disk(self.draft)
        self.draft.rename(self._folder)
        _synchronize(self._folder.parent)


def remove_while_written(folder: pathlib.Path) -> None:
    """Remove a folder into which threads of a failed save may still be writing."""
    for _ in range(50):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)


def everywhere(flag: bool) -> bool:
    """Whether `flag` is true in all processes; also a barrier."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(np.all(multihost_utils.process_allgather(np.asarray(flag))))


def _make(draft: pathlib.Path) -> None:
    """The folder, made by the first process and seen by all. Raises OSError in all processes if not."""
    error: OSError | None = None
    if jax.process_index() == 0:
        try:
            draft.mkdir(parents=True)
        except OSError as failure:
            error = failure
    if not everywhere(error is None):
        raise error or OSError("the first process could not make the folder")
    if not everywhere(draft.is_dir()):
        raise OSError(f"{draft.parent}: not all processes see this folder")


def _to_disk(folder: pathlib.Path) -> None:
    """Flush everything below `folder` to disk."""
    for place, _, names in os.walk(folder):
        for name in names:
            _synchronize(pathlib.Path(place, name))
        _synchronize(pathlib.Path(place))


def _synchronize(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):  # some file systems cannot say
            raise
    finally:
        os.close(descriptor)
