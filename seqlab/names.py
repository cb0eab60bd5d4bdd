"""Code that text names: `module:Name` in configs, on the command line and in cache words.

A name that a user types is imported like any other. A name in a file is a stranger's until the user says
otherwise: inside `restricted()` only the parts that configs are made of can be named (`PARTS`), each where it
is defined, and everything else is refused with its name, before it is imported.
"""

import contextlib
import contextvars
import importlib
import os
import sys
from collections.abc import Collection, Iterator
from typing import Any

from seqlab.checks import UserError

# What configs are made of. Modules that import by name, start processes, or write files are not among them.
PARTS = (
    "seqlab.models",
    "seqlab.parallel.sharding",
    "seqlab.train.augment",
    "seqlab.train.data",
    "seqlab.train.experiment",
    "seqlab.train.forecast",
    "seqlab.train.images",
    "seqlab.train.optim",
    "seqlab.train.quality",
    "seqlab.train.series",
    "seqlab.train.step",
    "seqlab.train.tasks",
    "seqlab.train.text",
    "seqlab.train.vision",
)
_allowed: contextvars.ContextVar[frozenset[str] | None] = contextvars.ContextVar("allowed", default=None)


class UntrustedNameError(UserError):
    """A file names code that is no part of seqlab's configs, and the user has not said that it may run."""


@contextlib.contextmanager
def restricted(more: Collection[str] = ()) -> Iterator[None]:
    """Within this block `imported` refuses what is neither a part of seqlab's configs nor one of the names
    `more`."""
    token = _allowed.set(frozenset(more))
    try:
        yield
    finally:
        _allowed.reset(token)


def imported(name: str) -> Any:
    """What "module:Name" stands for.

    Raises:
      UntrustedNameError: within `restricted`, for a name that is not allowed there; nothing has been imported
        for it.
      ImportError, AttributeError: there is no such module, or no such name in it.
    """
    module, _, attribute = name.partition(":")
    allowed = _allowed.get()
    if allowed is not None and name not in allowed:
        _check_ours(name, module, attribute)
    found = importlib.import_module(module)
    for part in attribute.split("."):
        found = getattr(found, part)
    # Names that a seqlab module imported from elsewhere are not part of seqlab.
    if allowed is not None and name not in allowed:
        _check_ours(name, str(getattr(found, "__module__", "")), str(getattr(found, "__qualname__", "_")))
    return found


def search_current_folder() -> None:
    """Let names that the user typed be found in the folder one works in, after everything that is
    installed."""
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)


def _check_ours(name: str, module: str, attribute: str) -> None:
    private = any(part.startswith("_") for part in (*module.split("."), *attribute.split(".")))
    ours = any(module == part or module.startswith(part + ".") for part in PARTS)
    if private or not ours:
        raise _refused(name)


def _refused(name: str) -> UntrustedNameError:
    return UntrustedNameError(
        f"names {name!r}, which is no part of seqlab's configs: it is not imported unless you trust the file "
        "(trust=True, on the command line --trust)"
    )
