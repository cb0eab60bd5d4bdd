"""Building the experiment of a config, with all checks first."""

import importlib
import inspect
import re
import reprlib
from collections.abc import Callable
from typing import Any

import fiddle as fdl
from flax import nnx

from seqlab.checks import nearest
from seqlab.models.kinds import class_of, kind_of
from seqlab.train.experiment import Experiment
from seqlab.train.optim import check_factory, check_transformation
from seqlab.train.override import ConfigError, check, children, tree


def build(cfg: fdl.Config) -> Experiment:
    """The experiment that `cfg` describes, after the types of all fields, every constructor and the shapes of
    the model were checked.

    The model is constructed abstractly: this takes no memory and compiles nothing.
    """
    check(cfg)
    try:
        experiment = fdl.build(cfg)
    except Exception as error:  # constructors fail in any way on unexpected values
        raise _located(error) from error
    if not isinstance(experiment, Experiment):
        raise ConfigError(f"the config builds {type(experiment).__name__}, expected Experiment")
    _check_model(experiment.model)
    # The same, but its factories report their paths in the config.
    trial = fdl.build(_with_places(tree(cfg)))
    model = nnx.eval_shape(lambda: trial.model(rngs=nnx.Rngs(0)))
    check_factory(experiment.optimizer)
    check_transformation(trial.optimizer(experiment.steps))
    for name in ("loss", "metric"):
        _check_sums(name, getattr(experiment, name))
    _check_data(experiment.data)
    tokenizer, size = experiment.data.tokenizer, getattr(model, "vocab_size", None)
    most = 0 if tokenizer is None else tokenizer.vocab_size
    if size is not None and size < most:
        raise ConfigError(
            f"model.vocab_size: got {size}, expected at least {most}, what the tokenizer of the data needs"
        )
    return experiment


def _check_model(factory: Any) -> None:
    """Refuse a part of a model, such as a mixer, in place of a model: parts require a width, which a model is
    not given."""
    cls = class_of(factory)
    if not inspect.isclass(cls) or _first(cls) not in ("dim", "inputs"):
        return
    try:
        inspect.signature(factory).bind(rngs=None)
    except TypeError as error:
        if cls.__name__ not in _models():
            what = kind_of(cls, "a part of a model")
            raise ConfigError(
                f"model: {cls.__name__} is {what}, expected a model{nearest(cls.__name__, _models())}"
            ) from error


def _models() -> list[str]:
    """The models of `seqlab.models`, by their names on the command line."""
    models = importlib.import_module("seqlab.models")
    classes = [getattr(models, name) for name in models.__all__]
    modules = [cls for cls in classes if inspect.isclass(cls) and issubclass(cls, nnx.Module)]
    layers = importlib.import_module("seqlab.models.layers")
    return [cls.__name__ for cls in modules if _first(cls) != "dim" and cls.__module__ != layers.__name__]


def _first(cls: type) -> str:
    return next(iter(inspect.signature(cls).parameters), "")


def _check_data(data: Any) -> None:
    """Refuse values that are not data, such as a word on the command line."""
    given = reprlib.repr(data) if isinstance(data, str) else type(data).__name__
    for name in ("train", "validation", "tokenizer"):
        if not hasattr(data, name):
            raise ConfigError(
                f"data: {given} has no {name!r}, expected data such as seqlab.train.text:Text; "
                "another kind of data needs another config"
            )


def _check_sums(name: str, function: Any) -> None:
    """Refuse a loss or metric that cannot be called as function(model, batch)."""
    try:
        inspect.signature(function).bind(None, None)
    except TypeError as error:
        given = getattr(class_of(function), "__name__", reprlib.repr(function))
        like = "seqlab.train.step:next_token_loss" if name == "loss" else "seqlab.train.quality:accuracy"
        raise ConfigError(
            f"{name}: {given} cannot be called as {name}(model, batch), as {like} is: {error}"
        ) from error
    except ValueError:  # written in C
        return


def _located(error: Exception) -> ConfigError:
    """An error of `fdl.build`, prefixed with the path as on the command line."""
    place = re.search(r"at <root>(\S*) with", getattr(error, "proxy_message", ""))
    where = place.group(1).removeprefix(".") if place else ""
    return ConfigError(f"{where}: " * bool(where) + str(getattr(error, "proxy_base_exception", error)))


class _Placed:
    """A factory that reports its path in the config when it fails, and to the module it is given to."""

    def __init__(self, call: Callable[..., Any], where: str):
        self.func, self.where = call, where

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self.func(*args, **kwargs)
        except ConfigError:
            raise
        except Exception as error:  # whatever a constructor makes of values that it does not expect
            said = (
                str(error)
                if isinstance(error, ValueError | TypeError)
                else f"{type(error).__name__}: {error}"
            )
            raise ConfigError(said if said.startswith(self.where) else f"{self.where}: {said}") from error


def _with_places(node: Any, where: str = "") -> Any:
    if isinstance(node, fdl.Buildable):
        for step, value in children(node):
            setattr(node, step[1:], _with_places(value, (where + step).removeprefix(".")))
        return fdl.Config(_Placed, node, where) if isinstance(node, fdl.Partial) else node
    if type(node) in (tuple, list):
        return type(node)(_with_places(value, where + step) for step, value in children(node))
    return node
