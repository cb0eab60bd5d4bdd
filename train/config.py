"""Configs: loading, changing, printing, saving, comparing and building.

    cfg = load("lm_hybrid")                        # a file of configs/, or any Python file with `base()`
    cfg = override(cfg, "model.mixers[0].heads=8")
    prepare(cfg, workdir)                          # config.json and config.txt; refused for another run's
    folder experiment = build(cfg)                        # checked, including the model's shapes, before any
    work

Configs are Fiddle's: calls represented as data. Functions here raise ConfigError for user errors.
"""

import ast
import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import json
import math
import os
import pathlib
import pkgutil
import re
import sys
import traceback
from collections.abc import Callable, Collection
from typing import Any

import fiddle as fdl

from seqlab import names as names_of_code
from seqlab.checks import nearest
from seqlab.train.construct import build
from seqlab.train.folder import fingerprint_of, has_steps, locate
from seqlab.train.override import ConfigError, children, fields, fit, literal, named, override, tree

__all__ = [
    "ConfigError",
    "build",
    "diff",
    "differences",
    "fiddle",
    "fiddlers",
    "flat",
    "from_json",
    "load",
    "names",
    "names_in",
    "override",
    "prepare",
    "read",
    "to_json",
]

FORMAT = "seqlab.config.1"
_FILE_MODULE = "_seqlab_config_"  # config files outside the package are imported under this prefix
_MAY_CHANGE = ("mesh", "keep", "log_every", "checkpoint_every", "validate_every")  # no effect on the numbers
_EXTENDABLE = ("steps", "optimizer")  # of the steps to come, if the user asks for it
_PLACES = ("path", "paths", "folder", "root")  # fields of `data`: where it lies, not what it is
_NOT_CONFIGS = ("parts", "fiddlers")


def names() -> list[str]:
    """The configs that come with seqlab."""
    package = importlib.import_module("seqlab.configs")
    return sorted(
        found.name for found in pkgutil.iter_modules(package.__path__) if found.name not in _NOT_CONFIGS
    )


def load(name_or_path: str | os.PathLike[str]) -> fdl.Config:
    """The config of that name in `seqlab.configs`, or the result of `base()` of a Python file."""
    name = os.fspath(name_or_path)
    is_path = name.endswith(".py") or os.sep in name
    if is_path and not pathlib.Path(name).is_file():
        raise ConfigError(f"{name}: no such file")
    if not is_path and name not in names():
        raise ConfigError(
            f"no config {name!r}{nearest(name, names())} (or the path of a Python file with base())"
        )
    try:
        module = (
            _import_file(pathlib.Path(name)) if is_path else importlib.import_module(f"seqlab.configs.{name}")
        )
        if not callable(getattr(module, "base", None)):
            raise ConfigError(f"{name}: expected a function base() that returns the config")
        cfg = module.base()
    except ConfigError:
        raise
    except Exception as error:
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if pathlib.Path(frame.filename).name == pathlib.Path(name).name
        ]
        raise ConfigError(
            f"{name}{f', line {lines[-1]}' if lines else ''}: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(cfg, fdl.Config):
        raise ConfigError(f"{name}: base() returned {type(cfg).__name__}, expected a fiddle Config")
    return cfg


def fiddlers() -> dict[str, Callable[..., None]]:
    """The functions of `seqlab.configs.fiddlers` by name."""
    module = importlib.import_module("seqlab.configs.fiddlers")
    return {
        name: f
        for name, f in vars(module).items()
        if inspect.isfunction(f) and f.__module__ == module.__name__ and name[0] != "_"
    }


def fiddle(cfg: fdl.Config, call: str) -> fdl.Config:
    """A copy of `cfg` changed by a fiddler of `seqlab.configs.fiddlers`: "tiny", or with arguments
    "longer(4)"."""
    known, changed = fiddlers(), tree(cfg)
    name = call.partition("(")[0].strip()
    if name not in known:
        raise ConfigError(f"no fiddler {name!r}{nearest(name, known)}")
    function, hints = known[name], fields(known[name]) or {}
    try:
        values, keywords = _arguments(call)
        bound = inspect.signature(function).bind(changed, *values, **keywords)
        given = {
            key: value for key, value in bound.arguments.items() if key in hints and value is not changed
        }
        bound.arguments |= {key: fit(value, hints[key].hint) for key, value in given.items()}
    except (SyntaxError, ValueError, TypeError) as error:
        expected = ", ".join(map(str, list(inspect.signature(function).parameters.values())[1:]))
        raise ConfigError(f"fiddler {call!r}: expected {name}({expected})") from error
    try:
        function(*bound.args, **bound.kwargs)
    except (ValueError, TypeError, AttributeError, ArithmeticError, LookupError) as error:
        raise ConfigError(f"fiddler {call!r}: {error}") from error
    return changed


def flat(cfg: fdl.Config) -> str:
    """The operative config as text: every field of every constructor, defaults included, one `path = value`
    per line."""
    return "".join(f"{path} = {value}\n" for path, value in _leaves(tree(cfg, defaults=True)).items())


def diff(old: fdl.Config, new: fdl.Config) -> list[str]:
    """The differences of two operative configs, one `path: old -> new` per field."""
    before, after = _leaves(tree(old, defaults=True)), _leaves(tree(new, defaults=True))
    paths = dict.fromkeys(path for path in [*after, *before] if before.get(path) != after.get(path))
    # Of a constructor that was replaced, the fields that went with it are no news.
    gone = {
        path
        for path in paths
        if path not in after and any(path.startswith((f"{other}.", f"{other}[")) for other in paths)
    }
    return [
        f"{path}: {before.get(path, 'absent')} -> {after.get(path, 'absent')}"
        for path in paths
        if path not in gone
    ]


def to_json(cfg: fdl.Config) -> str:
    """The operative config as JSON, with current defaults written out, so that it builds the same if they
    change.

    Raises ConfigError for a value that JSON cannot hold or that could not be imported when it is read.
    """
    content = {"format": FORMAT, "config": _encode(tree(cfg), "")}
    return json.dumps({**content, "sha256": _digest(content)}, indent=1, allow_nan=False) + "\n"


def from_json(text: str, *, trust: bool | Collection[str] = False) -> fdl.Config:
    """The inverse of `to_json`.

    Args:
      trust: whether names outside seqlab are imported: all of them, none, or those named "module:Name". Code
        named by a config runs when it is imported and when the config is built.

    Raises:
      ConfigError: not a saved config; a name in it does not exist (any more) or is not trusted.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"not JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ConfigError(
            f"not a saved config: expected the format {FORMAT!r}, which runs have (published models have a "
            "model_type)"
        )
    seal = content.pop("sha256", None)
    if seal not in (None, _digest(content)):
        raise ConfigError(
            "it has changed since it was written (sha256); if you have changed it, remove the line with "
            "sha256"
        )
    with contextlib.nullcontext() if trust is True else names_of_code.restricted(trust or ()):
        cfg = _decode(content.get("config"), "")
    if not isinstance(cfg, fdl.Buildable):
        raise ConfigError("not a saved config: it holds no constructor")
    return cfg


def read(file: pathlib.Path, *, trust: bool | Collection[str] = False) -> fdl.Config:
    """The config in config.json of a run; `trust` and errors as for `from_json`, with the file in front."""
    try:
        return from_json(file.read_text(encoding="utf-8"), trust=trust)
    except (ConfigError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: {error}") from error


def names_in(cfg: fdl.Config) -> set[str]:
    """Every "module:Name" in the saved form of `cfg`."""
    found: set[str] = set()

    def collect(value: Any) -> None:
        if isinstance(value, dict):
            found.update(value[key] for key in ("$call", "$partial", "$name") if key in value)
            value = list(value.values())
        if isinstance(value, list):
            for item in value:
                collect(item)

    collect(_encode(tree(cfg), ""))
    return found


def prepare(
    cfg: fdl.Config,
    workdir: str | os.PathLike[str],
    extend: bool = False,
    fingerprint: str | None = None,
) -> list[str]:
    """Write config.json and config.txt into a run folder, and return the differences of `cfg` from their
    previous content, one `path: old -> new` per field.

    A folder without a checkpoint belongs to no config yet: files of an earlier start are replaced. Arguments
    and errors are those of `differences`; nothing is changed if it raises.
    """
    workdir = locate(workdir)
    file = workdir / "config.json"
    changes = differences(cfg, workdir, extend, fingerprint)
    if changes or not file.exists() or not has_steps(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        _write(workdir / "config.txt", flat(cfg))
        _write(file, to_json(cfg))
    return changes


def differences(
    cfg: fdl.Config,
    workdir: str | os.PathLike[str],
    extend: bool = False,
    fingerprint: str | None = None,
) -> list[str]:
    """The differences of `cfg` from the config of the run in `workdir`, one `path: old -> new` per field; []
    without a run with a checkpoint.

    Fields without effect on the numbers may differ: the mesh, the number of checkpoints kept, the intervals
    of checkpoints, logging and validation, and the location of the data if their `fingerprint` is that of the
    run. With `extend` the steps and the optimizer may differ too; they apply from the last checkpoint on. New
    fields with their default value are not a difference.

    Raises:
      ConfigError: anything else differs, naming it; the folder holds checkpoints of an unknown config; or
        `cfg` cannot be saved.
    """
    workdir = locate(workdir)
    if workdir.exists() and not workdir.is_dir():
        raise ConfigError(f"{workdir} is not a folder")
    to_json(cfg)
    if not has_steps(workdir):
        return []
    file = workdir / "config.json"
    if not file.exists():
        raise ConfigError(f"{workdir} holds checkpoints and no config.json: choose another folder")
    changes = diff(read(file, trust=names_in(cfg)), cfg)
    same = fingerprint is not None and fingerprint_of(workdir) == fingerprint
    refused = [line for line in changes if not _may_change(line, extend, same)]
    if refused:
        lines = listed(refused)
        hint = "choose another folder, or the same config"
        if all(_may_change(line, True, same) for line in refused):
            hint += "; or go on from its last checkpoint with these: --extend"
        raise ConfigError(f"{workdir} belongs to another config (saved -> given):{lines}\n{hint}")
    return changes


def listed(lines: list[str], most: int = 5) -> str:
    """The end of a message: one of `lines` below another, and how many more than `most` there are."""
    more = [f"and {len(lines) - most} more"] if len(lines) > most else []
    return "".join(f"\n  {line:.200}" for line in [*lines[:most], *more])


def _may_change(line: str, extend: bool, same_data: bool) -> bool:
    path = re.split(r": ", line, maxsplit=1)[0]
    names = re.sub(r"\[[^\]]*\]", "", path).split(".")
    moved = same_data and names[0] == "data" and names[-1] in _PLACES
    return names[0] in _MAY_CHANGE or moved or (extend and names[0] in _EXTENDABLE)


def _import_file(path: pathlib.Path) -> Any:
    name = _FILE_MODULE + re.sub(r"\W", "_", path.stem)
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _arguments(text: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The literals in "name(1, factor=2)", with bare words as strings; none in "name"."""
    call = ast.parse(text.strip(), mode="eval").body
    if not isinstance(call, ast.Call):
        return (), {}
    return tuple(map(literal, call.args)), {keyword.arg: literal(keyword.value) for keyword in call.keywords}


def _leaves(node: Any, where: str = "experiment") -> dict[str, str]:
    """Every node and value by path, as text. A container of plain values is one value."""
    if isinstance(node, fdl.Buildable):
        found = {where: _name(fdl.get_callable(node))}
    elif _holds_nodes(node):
        found = {where: f"{type(node).__name__} of {len(node)}"}
    else:
        return {where: _name(node) if callable(node) else repr(node)}
    for step, value in children(node):
        found |= _leaves(value, where + step if where != "experiment" else step[1:])
    return found


def _holds_nodes(value: Any) -> bool:
    return any(
        isinstance(item, fdl.Buildable) or callable(item) or _holds_nodes(item) for _, item in children(value)
    )


def _name(call: Any) -> str:
    return f"{getattr(call, '__module__', '?')}:{getattr(call, '__qualname__', repr(call))}"


def _encode(value: Any, where: str) -> Any:
    """JSON of a tree. Constructors are objects with their name, tuples are arrays, other values objects with
    a $ key."""
    if isinstance(value, fdl.Buildable):
        return _encode_call(value, where)
    if type(value) is tuple:
        return [_encode(item, where + step) for step, item in children(value)]
    if type(value) is list:
        return {"$list": [_encode(item, where + step) for step, item in children(value)]}
    if type(value) is dict and all(isinstance(key, str) for key in value):
        return {"$dict": {key: _encode(item, f"{where}[{key!r}]") for key, item in value.items()}}
    if type(value) is float and not math.isfinite(value):
        return {"$float": str(value)}  # JSON has no such numbers
    if value is None or type(value) in (bool, int, float, str):
        return value
    if callable(value):
        return {"$name": _importable(value, where)}
    raise ConfigError(f"{where}: a saved config cannot hold {value!r} of type {type(value).__name__}")


def _encode_call(node: fdl.Buildable, where: str) -> dict[str, Any]:
    call, found = fdl.get_callable(node), {}
    known = fields(call) or {}
    for name in sorted({*known, *node.__arguments__}, key=[*known, *node.__arguments__].index):
        here = f"{where}.{name}".removeprefix(".")
        if name in node.__arguments__:
            found[name] = _encode(node.__arguments__[name], here)
        elif known[name].default is not inspect.Parameter.empty:
            with contextlib.suppress(ConfigError):  # a default that JSON cannot hold stays with the code
                found[name] = _encode(tree(known[name].default), here)
    return {"$partial" if isinstance(node, fdl.Partial) else "$call": _importable(call, where), **found}


def _importable(call: Any, where: str) -> str:
    """The importable "module:name" of `call`."""
    name = _name(call)
    module, _, attribute = name.partition(":")
    found = sys.modules.get(module)
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if module == "__main__" or module.startswith(_FILE_MODULE):
        raise ConfigError(
            f"{where or 'config'}: {attribute} is defined in the config file; put it into a module that a "
            "run can import again"
        )
    if found is not call:
        raise ConfigError(
            f"{where or 'config'}: {name} cannot be imported again by that name; use a function or class of "
            "a module"
        )
    return name


def _decode(value: Any, where: str) -> Any:
    if isinstance(value, list):
        return tuple(_decode(item, f"{where}[{i}]") for i, item in enumerate(value))
    if not isinstance(value, dict):
        return value
    if "$list" in value:
        return list(_decode(value["$list"], where))
    if isinstance(value.get("$dict"), dict):
        return {key: _decode(item, f"{where}[{key!r}]") for key, item in value["$dict"].items()}
    if "$float" in value:
        return float(value["$float"])
    if "$name" in value:
        return _imported(value["$name"], where)
    kind = fdl.Partial if "$partial" in value else fdl.Config
    call = _imported(value.get("$partial", value.get("$call")), where)
    known = fields(call)
    arguments = {
        key: _decode(item, f"{where}.{key}".removeprefix("."))
        for key, item in value.items()
        if not key.startswith("$")
    }
    unknown = [key for key in arguments if known is not None and key not in known]
    if unknown:
        raise ConfigError(
            f"{where or 'config'}: {_name(call)} has no field {unknown[0]!r} any "
            f"more{nearest(unknown[0], known)}"
        )
    try:
        return kind(call, **arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where or 'config'}: {error}") from error


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _imported(name: Any, where: str) -> Any:
    if not isinstance(name, str) or ":" not in name:
        raise ConfigError(
            f"{where or 'config'}: expected the name of a constructor, module:name, got {name!r}"
        )
    try:
        return named(name)
    except names_of_code.UntrustedNameError as error:
        raise ConfigError(f"{where or 'config'}: {error}") from error


def _write(path: pathlib.Path, text: str) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
