"""Pages of docs/reference, generated from the code:

    python -m seqlab.tooling.reference_pages docs/reference

The command line comes from its parser, Python names from their docstrings, tables from properties of objects.
Nothing is measured: a page is the same on every machine, and a test compares it with the code.
"""

import argparse
import ast
import importlib
import importlib.util
import inspect
import pathlib
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx

import seqlab
from seqlab import cli
from seqlab.kernels import dispatch
from seqlab.models import Attention
from seqlab.models.attention import bytes_per_step
from seqlab.models.cache import (
    All,
    Blocks,
    Cache,
    Exact,
    Full,
    Heads,
    Ints,
    MoBA,
    Quantized,
    Window,
    duo,
    parse_cache,
)
from seqlab.state import state_bytes
from seqlab.tooling import catalog, doctor
from seqlab.tooling.mixer_pages import prose, wrapped

_CACHES = (
    *(
        "full(4096)",
        "full(4096)+grows",
        "window(1024)",
        "sinks(4)+window(1020)",
        "sinks(4)+window(1020)+absolute",
        "sinks(4)+window(1020, turn=512)",
    ),
    *(
        "full(4096)+int8",
        "full(4096)+int4",
        "full(4096)+int2",
        "sinks(4)+window(1020)+int4",
        "moba(64, 4)+full(4096)",
    ),
    "moba(64, 4)+window(1024)",
    "sinks(4)+window(1024)+int4+moba(64, 4)",
)


PAGES = ("cli", "python", "configs", "caches", "support")


def page(name: str) -> str:
    """The text of one of `PAGES`."""
    write = {"cli": command_line, "python": python, "configs": configs, "caches": caches, "support": support}[
        name
    ]
    return wrapped(write().rstrip() + "\n")


def write(folder: str | pathlib.Path) -> list[pathlib.Path]:
    """Write all pages into `folder`."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.md" for name in PAGES]
    for path in paths:
        path.write_text(page(path.stem), encoding="utf-8")
    return paths


# The command line.


def command_line() -> str:
    """Every command with its arguments."""
    top = cli.parser()
    (commands,) = (action for action in top._actions if isinstance(action, argparse._SubParsersAction))
    helps = {choice.dest: choice.help for choice in commands._choices_actions}
    parts = ["# Command line", f"{top.description} `python -m seqlab` is the same program.", _options(top)]
    parts += [f"```text\n{top.epilog}\n```"]
    for name, parser in commands.choices.items():
        parts += [
            f"## seqlab {name}",
            f"{helps[name][0].upper()}{helps[name][1:]}.",
            f"```text\n{_usage(name, parser)}\n```",
            _options(parser),
        ]
    return "\n\n".join(part for part in parts if part)


def _usage(name: str, parser: argparse.ArgumentParser) -> str:
    words = [_form(action) for action in parser._actions if not action.option_strings]
    words += [
        f"[{_form(action)}]" for action in parser._actions if action.option_strings and action.dest != "help"
    ]
    return textwrap.fill(
        f"seqlab {name} {' '.join(words)}", 100, subsequent_indent="    ", break_on_hyphens=False
    )


def _form(action: argparse.Action) -> str:
    """An argument as it is written."""
    value = action.metavar or action.dest.upper()
    if not action.option_strings:
        value = action.metavar or action.dest
        return f"{value} [{value} ...]" if action.nargs == "+" else value
    more = {0: "", "?": f" [{value}]", "+": f" {value} [{value} ...]"}.get(action.nargs, f" {value}")
    return action.option_strings[-1] + more


def _options(parser: argparse.ArgumentParser) -> str:
    actions = [action for action in parser._actions if action.dest not in ("help", "command")]
    rows = [
        (f"`{_form(action)}`", _cell((action.help or "") % {"default": action.default})) for action in actions
    ]
    return _table(("argument", ""), rows) if rows else ""


# Python names.


def python() -> str:
    """Public functions and classes, and those of seqlab.models and seqlab.kernels except mixers."""
    models = importlib.import_module("seqlab.models")
    mixers = catalog.mixers()
    parts = [
        "# Python",
        "The public names of seqlab, and the parts of models. Mixers have [their own "
        "pages](../mixers/README.md).",
    ]
    parts += [
        "## seqlab",
        *(
            _entry(getattr(seqlab, name), f"seqlab.{name}")
            for name in seqlab.__all__
            if not name.startswith("__")
        ),
    ]
    others = [value for name in models.__all__ if (value := getattr(models, name)) not in mixers]
    parts += ["## seqlab.models", *(_entry(value, f"seqlab.models.{value.__name__}") for value in others)]
    parts += [
        "## seqlab.kernels",
        *(_entry(function, f"seqlab.kernels.{name}") for name, function in _functions().items()),
    ]
    return "\n\n".join(part for part in parts if part)


def _functions() -> dict[str, Callable[..., Any]]:
    """The public functions of ops by name; an internal op, such as a gradient, has none."""
    found = {op.name: getattr(importlib.import_module(op.package), op.name, None) for op in doctor.ops()}
    return {name: function for name, function in found.items() if callable(function)}


def _entry(value: Any, name: str) -> str:
    """A heading, the signature as in the source, and the docstring."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(value))).body[0]
    parts = [f"### {name}"]
    if isinstance(tree, ast.FunctionDef):
        return "\n\n".join([*parts, _signature(name, tree), prose(value.__doc__ or "")])
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    if "__init__" in functions:
        parts.append(_signature(name, functions["__init__"]))
    else:
        fields = [ast.unparse(node) for node in tree.body if isinstance(node, ast.AnnAssign)]
        fields += [
            f"{name}: {ast.unparse(node.returns)}" for name, node in functions.items() if _is_member(node)
        ]
        parts += ["```text\n" + "\n".join(fields) + "\n```"] * bool(fields)
    parts.append(prose(value.__doc__ or ""))
    for method, node in functions.items():
        if not method.startswith("_") and ast.get_docstring(node) and not node.decorator_list:
            parts.append(f"**{method}**\n\n{_signature(method, node)}\n\n{prose(ast.get_docstring(node))}")
    return "\n\n".join(parts)


def _is_member(node: ast.FunctionDef) -> bool:
    """Whether it is a read-only attribute of a protocol, declared and not computed."""
    return ast.unparse(node.body[-1]) == "..." and [ast.unparse(d) for d in node.decorator_list] == [
        "property"
    ]


def _signature(name: str, node: ast.FunctionDef) -> str:
    """The call as in the source, with one argument per line if it is long."""
    node.args.args = [arg for arg in node.args.args if arg.arg != "self"]
    arguments = ast.unparse(node.args)
    end = f" -> {ast.unparse(node.returns)}" if node.returns and node.name != "__init__" else ""
    if len(line := f"{name}({arguments}){end}") > 100:
        split, depth = "", 0
        for letter in arguments:
            depth += (letter in "([{") - (letter in ")]}")
            split += ",\n   " if letter == "," and not depth else letter
        line = f"{name}(\n    {split},\n){end}"
    return f"```text\n{line}\n```"


# Configs, caches, support.


def configs() -> str:
    """The configs that come with seqlab, fiddlers, and the fields of a run."""
    from seqlab.train import config
    from seqlab.train.experiment import Experiment

    parts = [
        "# Configs and fiddlers",
        "`seqlab train NAME` runs one. How to write one: [how-to/config.md](../how-to/config.md).",
        "## Configs",
    ]
    for name in config.names():
        text = ast.get_docstring(
            ast.parse(pathlib.Path(importlib.import_module(f"seqlab.configs.{name}").__file__).read_text())
        )
        parts.append(f"### {name}\n\n{prose(text)}")
    rows = [(f"`{entry['name']}`", _cell(entry["summary"])) for entry in catalog.catalog()["fiddlers"]]
    parts += [
        "## Fiddlers",
        "Variations of any config, applied in order: `--fiddler NAME`.",
        _table(("fiddler", ""), rows),
    ]
    return "\n\n".join([*parts, "## Fields of a run", _entry(Experiment, Experiment.__name__)])


def caches() -> str:
    """Capacity and cost of each cache, with its string form."""
    rows = []
    named = [(f"`{words}`", parse_cache(words)) for words in _CACHES]
    named.insert(
        2, ("`seqlab.models.cache.duo((True, False), capacity=4096)`", duo((True, False), capacity=4096))
    )
    for words, policy in named:
        mixer = nnx.eval_shape(lambda policy=policy: Attention(128, heads=2, cache=policy, rngs=nnx.Rngs(0)))
        ends = (
            "never, in more memory"
            if getattr(policy, "grows", False)
            else "never"
            if mixer.capacity is None
            else f"after {mixer.capacity:,} steps"
        )
        cost = f"{bytes_per_step(mixer, jnp.float16):,.1f}", f"{state_bytes(mixer, 1, jnp.float16):,}"
        rows.append((words, type(policy).__name__, ends, f"{policy.span:,}", *cost))
    head = ("terms", "policy", "a stream ends", "steps kept", "bytes per step", "total bytes")
    return "\n\n".join(
        [
            "# Caches",
            "Cache policies of attention: as a string for `--cache` and `stream_generate(cache=...)`, as an "
            "object in configs and models.",
            "## Terms",
            prose(parse_cache.__doc__),
            "## Cost",
            "One layer with two heads of 64 channels in float16, one stream, before it grows. All of "
            "them satisfy the streaming contract.",
            _table(head, rows),
            "Quantized caches store scales with the codes, and the newest steps exactly, so four bits take "
            "more than a quarter of the memory of 16.",
            "## Policies",
            *(
                _entry(cls, f"seqlab.models.cache.{cls.__name__}")
                for cls in (Cache, Full, Window, Exact, Ints, All, Blocks, Heads, Quantized, MoBA)
            ),
            _entry(duo, "seqlab.models.cache.duo"),
        ]
    )


def support() -> str:
    """Mixers and their properties; kernels and their implementations."""
    rows = []
    for entry, cls in zip(catalog.catalog()["mixers"], catalog.mixers(), strict=True):
        name, back = entry["name"], _word(hasattr(cls, "rewind") or entry["state_bytes"] == 0)
        facts = [_word(entry[key]) for key in ("causal", "lookahead", "exact", "state_bytes", "parameters")]
        rows.append(
            (
                f"[{name}](../mixers/{name}.md)",
                *facts,
                back if entry["causal"] else "-",
                entry["source"] or "-",
            )
        )
    head = ("mixer", "causal", "lookahead", "exact", "state bytes", "parameters", "can be rewound", "source")
    kernels = []
    for op in doctor.ops():
        order = [
            ", ".join(name for name in dispatch._PREFERENCE[platform] if name in op.implementations)
            for platform in ("cpu", "gpu", "tpu")
        ]
        kernels.append((f"`{op.name}`", ", ".join(op.implementations), *order))
    return "\n\n".join(
        [
            "# Support tables",
            "## Mixers",
            f"At width {catalog.DIM}, one stream in float32; `-` if it depends on arguments without a "
            "default. Every causal mixer "
            "takes chunks of any length, `reset` and `valid`, and is checked by `pytest "
            "tests/test_streaming.py`.",
            _table(head, rows),
            "## Kernels",
            "Implementations, and the one selected by `implementation=None` on each platform: the first that "
            "does not decline. `seqlab doctor` tries them on the current machine.",
            _table(("op", "implementations", "on CPU", "on GPU", "on TPU"), kernels),
            "Each supports all calls of its op, with values and gradients, `reset`, `valid` and states, "
            "except those it declines with `NotImplementedError`: `reference` and `xla` none, others as "
            "listed, with ... for values inserted at run time.",
            _table(("op", "implementation", "declines with"), _declined()),
        ]
    )


def _declined() -> list[tuple[str, str, str]]:
    """The messages of NotImplementedError of all implementations: first the shared ones, then those of each
    op."""
    pairs = [
        (f"`{op.name}`", name, f"{op.package}.{name}") for op in doctor.ops() for name in op.implementations
    ]
    shared = [
        ("all", name, f"seqlab.kernels.{name.partition('_')[0]}")
        for name in dict.fromkeys(name for _, name, _ in pairs)
    ]
    rows = []
    for op, name, module in [*shared, *pairs]:
        found = importlib.util.find_spec(module)
        reasons = _reasons(pathlib.Path(found.origin).read_text()) if found else []
        rows += [(op, name, _cell("; ".join(reasons)))] * bool(reasons)
    return rows


def _reasons(source: str) -> list[str]:
    """The messages of the NotImplementedErrors that a source raises."""
    raised = [
        node.exc
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)
    ]
    texts = [
        call.args[0]
        for call in raised
        if isinstance(call.func, ast.Name) and call.func.id == "NotImplementedError" and call.args
    ]
    parts = [text.values if isinstance(text, ast.JoinedStr) else [text] for text in texts]
    return [
        "".join(part.value if isinstance(part, ast.Constant) else "..." for part in message)
        for message in parts
    ]


def _word(value: bool | int | None) -> str:
    return "-" if value is None else ("no", "yes")[value] if isinstance(value, bool) else f"{value:,}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ("---",) * len(head), *rows))


if __name__ == "__main__":
    for path in write(sys.argv[1] if len(sys.argv) > 1 else "docs/reference"):
        print(path)
