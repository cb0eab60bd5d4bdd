"""Checks of arguments. Errors name the argument, the value, what was expected and, for names, the nearest
valid one."""

import difflib
import numbers
import os
import pathlib
from collections.abc import Iterable, Sequence


class UserError(ValueError):
    """An error that the user can fix; the message says how. The command line prints it in one line, with exit
    code 2."""


def check_choice(value: str, valid: Sequence[str], what: str) -> None:
    """Refuse a name that is not in `valid`, with the nearest valid one."""
    if value not in valid:
        near = difflib.get_close_matches(str(value), valid, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"{what}: got {value!r}, expected one of {', '.join(map(repr, valid))}{hint}")


def check_positive(name: str, value: int) -> int:
    """`value` as an int, refused unless it is a positive integer."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise UserError(f"{name} must be a positive integer, got {value!r}")
    return int(value)


def check_divides(name: str, value: int | None, whole_name: str, whole: int) -> int:
    """`value`, or `whole` for None; refused unless it divides `whole`."""
    if value is None:
        return whole
    if whole % check_positive(name, value):
        raise UserError(f"{name} must divide {whole_name}={whole}, got {value}")
    return int(value)


def check_at_least(name: str, value: int, least: int, why: str = "") -> None:
    """Refuse a value that is not an integer of at least `least`; `why` explains the bound."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        reason = f" ({why})" if why else ""
        raise UserError(f"{name} must be an integer of at least {least}{reason}, got {value!r}")


def shown(value: object, most: int = 80) -> str:
    """`value` in an error message: the beginning of its repr, on one line."""
    return " ".join(repr(value).split())[:most]


def expanded(name: str, path: str | os.PathLike[str]) -> pathlib.Path:
    """The path, with `~` expanded."""
    text = os.fspath(path)
    if "\0" in text:
        raise UserError(f"{name}: got {text!r}, and no path holds a null character")
    try:
        return pathlib.Path(text).expanduser()
    except RuntimeError as error:  # "~nobody"
        raise UserError(f"{name}: got {text!r}, and nobody has that home folder ({error})") from error


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the nearest known name, if one is near, and all of them."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    return (f"; did you mean {near[0]!r}?" if near else ".") + f" Valid: {', '.join(known) or 'none'}"
