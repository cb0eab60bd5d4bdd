"""The folder of a run: its path, its lock, and paths that libraries accept."""

import contextlib
import datetime
import errno
import json
import os
import pathlib
import socket
import tempfile
from collections.abc import Iterator

from seqlab.checks import UserError, expanded

_LOCK = "lock"
_ODD = frozenset("[]*?\\")  # Orbax takes paths for patterns, and TensorStore a backslash for a slash


class BusyError(UserError):
    """Another process is training in the folder; the message says which."""


def locate(workdir: str | os.PathLike[str]) -> pathlib.Path:
    """The folder as an absolute path without `~`, `..` and links."""
    return pathlib.Path(os.path.realpath(expanded("workdir", workdir)))


def has_steps(workdir: pathlib.Path) -> bool:
    """Whether there is a checkpoint, good or damaged. A folder without one belongs to no run."""
    found = (workdir / "checkpoints").glob("*/commit_success.txt")
    return any(path.parent.name.isdigit() for path in found)


def fingerprint_of(workdir: pathlib.Path) -> str | None:
    """The data fingerprint in data.txt; None without one."""
    file = workdir / "data.txt"
    return file.read_text(errors="replace").strip() if file.exists() else None


@contextlib.contextmanager
def claimed(workdir: pathlib.Path) -> Iterator[None]:
    """Within the block no other process may train in `workdir`, which is created.

    The lock is the operating system's: it is released when the process ends, and not inherited by children.
    If the file system has no locks, a warning is printed.

    Raises:
      BusyError: another process, or another thread of this one, is training there.
      OSError: the folder cannot be created or written to.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(workdir / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    _held.add(descriptor)
    try:
        _lock(descriptor, workdir)
        about = {"pid": os.getpid(), "host": socket.gethostname(), "since": _now()}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, (json.dumps(about) + "\n").encode(), 0)
        yield
    finally:
        _held.discard(descriptor)
        os.close(descriptor)


def _lock(descriptor: int, workdir: pathlib.Path) -> None:
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            import sys

            print(
                f"{workdir}: this file system has no locks; make sure that no second run is started here",
                file=sys.stderr,
            )
            return
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES, errno.EAGAIN):
            raise
        raise BusyError(
            f"{workdir}: another run is training in this folder ({_holder(descriptor)}); wait for it to end, "
            "or choose another folder"
        ) from None


def _holder(descriptor: int) -> str:
    try:
        about = json.loads(os.pread(descriptor, 1000, 0))
        return f"process {about['pid']} on {about['host']}, since {about['since']}"
    except (OSError, ValueError, TypeError, KeyError):
        return "which process is not known"


def _now() -> str:
    return datetime.datetime.now().astimezone().isoformat(" ", "seconds")


_held: set[int] = set()


def _let_go() -> None:
    """Close lock descriptors in a forked child, which would otherwise keep the locks when the parent ends."""
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


@contextlib.contextmanager
def plain(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A path of the existing `folder` that libraries take literally: its own, or a temporary link."""
    text = os.fspath(folder)
    if not _ODD & set(text) and text.isprintable():
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="seqlab-") as place:
        link = pathlib.Path(place, "folder")
        link.symlink_to(folder.absolute(), target_is_directory=True)
        yield link
