"""Names of code in text: `module:Name` in configs, on the command line and in cache strings.

A name typed by the user is imported. A name in a file is untrusted unless the user says otherwise: inside
`restricted()` only the parts of configs (`PARTS`) can be named, each where it is defined, and every other
name is refused before it is imported.
"""

import contextlib
import contextvars
import importlib
import os
import sys
from collections.abc import Collection, Iterator
from typing import Any

from seqlab.checks import UserError

# The parts of configs. Modules that import by name, start processes, or write files are excluded.
PARTS = (
    "seqlab.models",
    "seqlab.parallel.sharding",
    "seqlab.studies.start",
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
    """A file names code outside seqlab's configs that the user has not allowed."""


@contextlib.contextmanager
def restricted(more: Collection[str] = ()) -> Iterator[None]:
    """Within this block `imported` refuses names that are neither parts of seqlab's configs nor in `more`."""
    token = _allowed.set(frozenset(more))
    try:
        yield
    finally:
        _allowed.reset(token)


def imported(name: str) -> Any:
    """The object named "module:Name".

    Raises:
      UntrustedNameError: within `restricted`, for a name that is not allowed there; nothing has been
        imported.
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
    """Search the current folder, after everything installed, for names that the user typed."""
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
