"""The catalog: mixers with their contract, configs, fiddlers. `seqlab list` prints it."""

import ast
import importlib
import importlib.util
import inspect
import re
from typing import Any

from flax import nnx

from seqlab.module import count_params
from seqlab.state import state_bytes

DIM = 64  # the width at which mixers are compared


def catalog() -> dict[str, list[dict[str, Any]]]:
    """`mixers`, `configs` and `fiddlers`, each a list of plain dictionaries. Nothing is allocated: mixers are
    built abstractly."""
    return {"mixers": [_mixer(cls) for cls in mixers()], "configs": _configs(), "fiddlers": _fiddlers()}


def mixers() -> list[type]:
    """The mixer classes of `seqlab.models`: the protocol of `seqlab.Mixer`, with a width as first
    argument."""
    models = importlib.import_module("seqlab.models")
    classes = [getattr(models, name) for name in models.__all__]
    return sorted((cls for cls in classes if _mixes(cls)), key=lambda cls: cls.__name__)


def as_text(content: dict[str, list[dict[str, Any]]], width: int | None = None) -> str:
    """The catalog as tables, lines cut at `width` characters."""
    columns = ("name", "causal", "lookahead", "exact", "state_bytes", "parameters", "source", "summary")
    lines = [
        f"Mixers (state of one stream in bytes and parameters at width {DIM})",
        *_table(content["mixers"], columns),
    ]
    lines += ["", "Configs (seqlab train NAME)", *_table(content["configs"], ("name", "summary"))]
    lines += ["", "Fiddlers (--fiddler NAME)", *_table(content["fiddlers"], ("name", "summary"))]
    return "\n".join(
        line if width is None or len(line) <= width else f"{line[: width - 1]}…" for line in lines
    )


def _mixes(value: Any) -> bool:
    if not (
        inspect.isclass(value)
        and issubclass(value, nnx.Module)
        and isinstance(getattr(value, "causal", None), bool)
    ):
        return False
    return next(iter(inspect.signature(value).parameters), None) == "dim"


def _mixer(cls: type) -> dict[str, Any]:
    try:
        mixer: Any = nnx.eval_shape(lambda: cls(DIM, rngs=nnx.Rngs(0)))
    except TypeError:  # it has further required arguments, on which its size depends
        mixer, size = cls, {"state_bytes": None, "parameters": None}
    else:
        size = {
            "state_bytes": state_bytes(mixer) if mixer.causal else None,
            "parameters": count_params(mixer),
        }
    contract = {name: _plain(getattr(mixer, name, None)) for name in ("causal", "lookahead", "exact")}
    documents = (cls.__doc__ or "", inspect.getmodule(cls).__doc__ or "")
    sources = [
        found.group(1) for text in documents if (found := re.search(r"arXiv[ :](\d{4}\.\d{4,5})", text))
    ]
    origin = {
        "source": f"arXiv {sources[0]}" if sources else "",
        "module": cls.__module__,
        "summary": _summary(cls.__doc__),
    }
    return {"name": cls.__name__, **contract, **size, **origin}


def _plain(value: Any) -> bool | int | None:
    return value if isinstance(value, bool | int) else None  # a property has no value on the class


def _configs() -> list[dict[str, Any]]:
    from seqlab.train import config

    found = []
    for name in config.names():
        text = importlib.util.find_spec(f"seqlab.configs.{name}").loader.get_source(f"seqlab.configs.{name}")
        found.append({"name": name, "summary": _summary(ast.get_docstring(ast.parse(text)))})
    return found


def _fiddlers() -> list[dict[str, Any]]:
    from seqlab.train import config

    found = []
    for name, function in config.fiddlers().items():
        arguments = [
            str(parameter) for parameter in list(inspect.signature(function).parameters.values())[1:]
        ]
        found.append(
            {
                "name": f"{name}({', '.join(arguments)})" if arguments else name,
                "summary": _summary(function.__doc__),
            }
        )
    return found


def _summary(text: str | None) -> str:
    """The first paragraph of a docstring, in one line."""
    return " ".join((text or "").strip().partition("\n\n")[0].split())


def _table(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> list[str]:
    table = [
        [column.replace("_", " ") for column in columns],
        *([_cell(row[column]) for column in columns] for row in rows),
    ]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    return [
        "  " + "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in table
    ]


def _cell(value: bool | int | str | None) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else value
