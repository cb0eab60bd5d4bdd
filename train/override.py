"""Configs as trees: their fields, the types of these, and assignments such as `model.mixers[0].heads=8`.

Fiddle knows the fields of a constructor but not their types, and shares objects that appear twice. Here a
config is a tree: `tree` copies one so that nothing is shared, `fields` reads a constructor's signature, `fit`
checks a value against an annotation.
"""

import ast
import collections.abc
import dataclasses
import importlib
import inspect
import numbers
import re
import reprlib
import types
import typing
from typing import Any, NamedTuple

import fiddle as fdl
from flax import nnx

from seqlab.checks import UserError, nearest
from seqlab.names import imported


class ConfigError(UserError):
    """An invalid config. The message begins with the path, as on the command line."""


class Field(NamedTuple):
    """An argument of a constructor. `hint` is Any without an annotation, `default` is
    `inspect.Parameter.empty` where it is required."""

    hint: Any
    default: Any


_REQUIRED = inspect.Parameter.empty
_HANDED_OVER = ("rngs",)  # given to modules by their builder, never by a config


def fields(call: Any) -> dict[str, Field] | None:
    """The arguments of a function or class by name; None if it takes `**kwargs`."""
    target = call
    if inspect.isclass(call) and "__signature__" not in vars(call) and issubclass(call, nnx.Module):
        target = call.__init__  # the metaclass of NNX hides the signature
    try:
        parameters = list(inspect.signature(target).parameters.values())
    except ValueError:  # a builtin without a signature
        return None
    if target is not call:
        parameters = parameters[1:]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    annotated = call.__init__ if inspect.isclass(call) else call
    try:
        hints = typing.get_type_hints(annotated, include_extras=False)
    except (NameError, TypeError, AttributeError):  # names that exist for type checkers only
        hints = {
            name: hint
            for name, hint in getattr(annotated, "__annotations__", {}).items()
            if not isinstance(hint, str)
        }
    kept = [p for p in parameters if p.kind is not p.VAR_POSITIONAL and p.name not in _HANDED_OVER]
    return {p.name: Field(hints.get(p.name, Any), p.default) for p in kept}


def tree(value: Any, defaults: bool = False) -> Any:
    """A copy of a config in which nothing is shared; with `defaults` every argument that has a default is
    written out.

    Module classes and frozen dataclasses given as plain values become nodes, so that their fields can be
    inspected and set.
    """
    if isinstance(value, fdl.Buildable):
        call = fdl.get_callable(value)
        arguments = {name: tree(argument, defaults) for name, argument in value.__arguments__.items()}
        if defaults:
            for name, field in (fields(call) or {}).items():
                if name not in arguments and field.default is not _REQUIRED:
                    arguments[name] = tree(field.default, defaults)
            order = list(fields(call) or arguments)
            arguments = {name: arguments[name] for name in sorted(arguments, key=order.index)}
        return type(value)(call, **arguments)
    if inspect.isclass(value) and issubclass(value, nnx.Module):
        return tree(fdl.Partial(value), defaults)
    if dataclasses.is_dataclass(value) and not inspect.isclass(value):
        return tree(
            fdl.Config(
                type(value), **{f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
            ),
            defaults,
        )
    if type(value) in (tuple, list):
        return type(value)(tree(item, defaults) for item in value)
    if type(value) is dict:
        return {key: tree(item, defaults) for key, item in value.items()}
    return value


def children(node: Any) -> list[tuple[str, Any]]:
    """The parts of a node, each with its path component: ".heads" or "[0]"; none for a plain value."""
    if isinstance(node, fdl.Buildable):
        return [(f".{name}", value) for name, value in node.__arguments__.items()]
    if type(node) in (tuple, list):
        return [(f"[{i}]", value) for i, value in enumerate(node)]
    if type(node) is dict:
        return [(f"[{key!r}]", value) for key, value in node.items()]
    return []


def override(cfg: fdl.Config, assignment: str) -> fdl.Config:
    """A copy of `cfg` with `path=value` applied, for instance "model.mixers[0].heads=8".

    The value is a Python literal in which bare words are strings. Where a constructor is expected it is the
    name of one: a class of `seqlab.models`, or "module:name". Raises ConfigError for a field that does not
    exist and for a value that does not fit its annotation.
    """
    path, equals, text = assignment.partition("=")
    if not equals or not path.strip():
        raise ConfigError(f"{assignment!r}: expected path=value, such as model.dim=128")
    keys = [name or int(index) for name, index in re.findall(r"([A-Za-z_]\w*)|\[?(-?\d+)\]?", path)]
    if not re.fullmatch(r"\s*[A-Za-z_]\w*(\.[A-Za-z_]\w*|\.\d+|\[-?\d+\])*\s*", path):
        raise ConfigError(f"{path.strip()!r}: expected names and indices, such as model.mixers[0].heads")
    return _assigned(tree(cfg), keys, text.strip(), "", Any)


def check(cfg: Any, where: str = "") -> None:
    """Raise ConfigError if an argument in `cfg` does not match the annotation of its constructor, or does not
    exist."""
    if isinstance(cfg, fdl.Buildable):
        known = fields(fdl.get_callable(cfg))
        for name, value in cfg.__arguments__.items():
            field = _field(known, name, cfg, where)
            _fitted(value, field, _join(where, f".{name}"))
    for step, value in children(cfg):
        check(value, _join(where, step))


def fit(value: Any, hint: Any) -> Any:
    """`value` converted for the annotation `hint`: an int becomes a float, a list a tuple, a name the
    constructor of that name.

    Raises TypeError if it does not fit. An annotation that says nothing about values accepts every one.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in (Any, object):
        return value
    if hint is None or hint is type(None):
        return _require(value is None, value)
    if origin in (typing.Union, types.UnionType):
        return _fit_any(value, arguments)
    if origin is typing.Literal:
        return _require(any(value == option and type(value) is type(option) for option in arguments), value)
    if hint in (bool, str, bytes):
        return _require(isinstance(value, hint), value)
    if hint is int:
        return _require(isinstance(value, numbers.Integral) and not isinstance(value, bool), value)
    if hint is float:
        return float(_require(isinstance(value, numbers.Real) and not isinstance(value, bool), value))
    if hint in (tuple, list, dict):
        origin = hint
    if origin in (tuple, list, collections.abc.Sequence):
        return _fit_sequence(value, origin, arguments)
    if origin in (dict, collections.abc.Mapping):
        return _require(isinstance(value, dict), value)
    if origin is collections.abc.Callable or hint in (collections.abc.Callable, typing.Callable):
        value = _factory(value) if isinstance(value, str) else value
        return _require(isinstance(value, fdl.Partial) or callable(value), value)
    if inspect.isclass(hint) and not getattr(hint, "_is_protocol", False):
        return _fit_class(value, hint)
    return value


def named(name: str) -> Any:
    """The class of `seqlab.models` called `name` (GatedDeltaNet or gated_delta_net), or the object named
    "module:name"."""
    if ":" in name:
        try:
            return imported(name)
        except UserError:
            raise
        except Exception as error:  # of the module that is imported, which may be the user's own
            reason = (
                ""
                if isinstance(error, ImportError | AttributeError | ValueError)
                else type(error).__name__ + ": "
            )
            raise ConfigError(f"{name!r} cannot be imported: {reason}{error}") from error
    models = importlib.import_module("seqlab.models")
    known = [
        each
        for each in models.__all__
        if inspect.isclass(getattr(models, each)) and issubclass(getattr(models, each), nnx.Module)
    ]
    name = {_plain(each): each for each in known}.get(_plain(name), name)
    if name not in known:
        raise ConfigError(
            f"{name!r} is no module of seqlab.models{nearest(name, known)} (others are named as module:Name)"
        )
    return getattr(models, name)


def _factory(name: str) -> fdl.Partial:
    """The constructor of that name, as a factory."""
    found = named(name)
    try:
        return fdl.Partial(found)
    except (TypeError, ValueError) as error:  # nothing that can be called; a builtin that hides its arguments
        raise ConfigError(f"{name!r} is {reprlib.repr(found)}, no constructor ({error})") from error


def _plain(name: str) -> str:
    return name.replace("_", "").lower()


def _assigned(node: Any, keys: list[str | int], text: str, where: str, hint: Any) -> Any:
    """`node` with the value of `text` at the end of `keys`."""
    key, rest = keys[0], keys[1:]
    if isinstance(node, fdl.Buildable):
        field = _field(fields(fdl.get_callable(node)), key, node, where)
        here = _join(where, f".{key}")
        if not rest:
            value = _fitted(_parse(text), field, here, text)
        else:
            current = node.__arguments__.get(key, tree(field.default))
            if current is _REQUIRED:
                raise ConfigError(f"{here} is not set, so it has no fields")
            value = _assigned(current, rest, text, here, field.hint)
        setattr(node, key, value)
        return node
    if type(node) in (tuple, list):
        if not isinstance(key, int) or not -len(node) <= key < len(node):
            raise ConfigError(f"{where}: got {key!r}, expected an index from 0 to {len(node) - 1}")
        here = f"{where}[{key}]"
        items = list(node)
        element = Field(_element(hint, key), _REQUIRED)
        items[key] = (
            _assigned(node[key], rest, text, here, element.hint)
            if rest
            else _fitted(_parse(text), element, here, text)
        )
        return type(node)(items)
    raise ConfigError(f"{where} is {_show_value(node)}, which has no field {key!r}")


def _field(known: dict[str, Field] | None, name: Any, node: fdl.Buildable, where: str) -> Field:
    if known is None:
        return Field(Any, _REQUIRED)
    if name not in known:
        owner = getattr(fdl.get_callable(node), "__name__", "")
        raise ConfigError(
            f"{_join(where, f'.{name}')}: {owner} has no field {str(name)!r}{nearest(str(name), known)}"
        )
    return known[name]


def _fitted(value: Any, field: Field, where: str, text: str | None = None) -> Any:
    """`value` converted for the field; `text` is the original, for string fields whose value looks like a
    number."""
    if value is None and field.default is None:
        return None
    try:
        return fit(value, field.hint)
    except TypeError:
        if text is not None and isinstance(value, int | float) and not isinstance(value, bool):
            try:
                return fit(text, field.hint)
            except (TypeError, ConfigError):
                pass
        raise ConfigError(f"{where}: got {_show_value(value)}, expected {_show(field.hint)}") from None
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


class _Words(ast.NodeTransformer):
    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Constant(node.id)


def literal(node: ast.expr) -> Any:
    """The value of a Python literal in which bare words are strings. Raises ValueError otherwise."""
    return ast.literal_eval(_Words().visit(node))


def _parse(text: str) -> Any:
    """A Python literal in which bare words are strings; anything else is the string itself."""
    try:
        return literal(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return text


def _fit_any(value: Any, hints: tuple[Any, ...]) -> Any:
    if any(hint is type(value) for hint in hints):  # `int | float` keeps an int, `str | Path` a str
        return value
    failure: Exception = TypeError()
    for hint in hints:
        try:
            return fit(value, hint)
        except ConfigError as error:  # a wrong name is more informative than a wrong type
            failure = error
        except TypeError:
            continue
    raise failure


def _fit_sequence(value: Any, origin: Any, arguments: tuple[Any, ...]) -> Any:
    container = list if origin is list else tuple
    if isinstance(value, str) and str in arguments:  # a single word for a tuple of words
        return container([value])
    _require(isinstance(value, tuple | list), value)
    if origin is tuple and arguments and arguments[-1] is not Ellipsis:
        _require(len(value) == len(arguments), value)
        return tuple(fit(item, hint) for item, hint in zip(value, arguments, strict=True))
    return container(fit(item, arguments[0]) if arguments else item for item in value)


def _fit_class(value: Any, hint: type) -> Any:
    """An instance, or a node that will build one. What a function returns is not known before it is
    called."""
    if isinstance(value, fdl.Config):
        call = fdl.get_callable(value)
        return _require(not inspect.isclass(call) or issubclass(call, hint), value)
    return _require(isinstance(value, hint), value)


def _require(condition: bool, value: Any) -> Any:
    if not condition:
        raise TypeError
    return value


def _element(hint: Any, index: int) -> Any:
    """The annotation of one item of a sequence annotated `hint`."""
    for option in (
        typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    ):
        if typing.get_origin(option) in (tuple, list, collections.abc.Sequence):
            arguments = typing.get_args(option)
            return arguments[0] if len(arguments) == 1 or arguments[-1] is Ellipsis else arguments[index]
    return Any


def _join(where: str, step: str) -> str:
    return where + step if where else step.removeprefix(".")


def _show(hint: Any) -> str:
    """A readable form of an annotation."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is type(None):
        return "None"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_show, arguments))
    if origin is typing.Literal:
        return "one of " + ", ".join(map(repr, arguments))
    if origin is collections.abc.Callable:
        return "a constructor (its name)"
    if origin in (tuple, list, collections.abc.Sequence) and arguments:
        return f"a tuple of {_show(arguments[0])}"
    return getattr(hint, "__name__", str(hint))


def _show_value(value: Any) -> str:
    if isinstance(value, fdl.Buildable):
        return getattr(fdl.get_callable(value), "__name__", "a node")
    return reprlib.repr(value)
