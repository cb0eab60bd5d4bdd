"""Pages of docs/mixers, one per mixer, from docstrings and computed facts:

    python -m seqlab.tooling.mixer_pages docs/mixers

A mixer's docstring has, in this order: a one-line summary with the equation or the idea, the equations
(indented), remarks, the arguments (`Args:`), and common mistakes (`Pitfalls:`). State, sizes and costs are
computed here.
"""

import inspect
import math
import pathlib
import re
import sys
import textwrap
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from seqlab.module import count_params, merge, split
from seqlab.tooling import catalog

_DIM = catalog.DIM
_REQUIRED = 8  # the value of arguments without a default
_TITLES = {"Args": "Arguments"}
_COLUMNS = 110


def page(cls: type) -> str:
    """The page of one mixer class, in Markdown."""
    summary, body, pitfalls = _docstring(cls)
    parts = [f"# {cls.__name__}", summary, body]
    needed = {
        p.name: _REQUIRED
        for p in list(inspect.signature(cls).parameters.values())[1:]
        if p.default is p.empty and p.name != "rngs"
    }
    mixer: Any = nnx.eval_shape(lambda: cls(_DIM, **needed, rngs=nnx.Rngs(0)))
    where = "".join(f", {name}={value}" for name, value in needed.items())
    parts += [
        f"## Contract\n\n{_contract(mixer)}",
        f"## Size at width {_DIM}{where}, one stream\n\n{_size(mixer)}",
    ]
    if mixer.causal:
        parts.append(f"## State\n\n{_state(mixer)}")
    if pitfalls:
        parts.append(f"## Pitfalls\n\n{pitfalls}")
    parts += [f"## Use\n\n{_use(cls, where, mixer.causal)}", f"## Source\n\n{_sources(cls)}"]
    return wrapped("\n\n".join(part.strip("\n") for part in parts if part.strip()) + "\n")


def write(folder: str | pathlib.Path) -> list[pathlib.Path]:
    """Write the pages of all mixers and an index into `folder`; pages of removed mixers are deleted."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pages = {f"{cls.__name__}.md": page(cls) for cls in catalog.mixers()}
    rows = [
        f"| [{cls.__name__}]({cls.__name__}.md) | {_docstring(cls)[0].replace('|', chr(92) + '|')} |"
        for cls in catalog.mixers()
    ]
    pages["README.md"] = "\n".join(["# Mixers", "", "| mixer | summary |", "| --- | --- |", *rows]) + "\n"
    for old in folder.glob("*.md"):
        if old.name not in pages:
            old.unlink()
    for name, text in pages.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in pages]


def prose(text: str, heading: str = "**{}**") -> str:
    """A docstring's body as Markdown: indented text becomes a code block, sections such as `Args:` become
    lists."""
    found = re.split(r"(?m)^(Args|Returns|Raises|Pitfalls):\n", inspect.cleandoc(text))
    parts = [_blocks(found[0])]
    for title, body in zip(found[1::2], found[2::2], strict=True):
        section = re.match(r"(?:(?: +.*)?\n)*(?: +.*)?", body).group()
        named = (re.sub(r"^([^:]+):", r"**\1**:", item) for item in _items(section))
        parts.append(
            f"{heading.format(_TITLES.get(title, title))}\n\n" + "\n".join(f"- {item}" for item in named)
        )
        parts.append(_blocks(body[len(section) :]))
    return "\n\n".join(part for part in parts if part)


def wrapped(text: str) -> str:
    """Markdown with the prose lines of more than 110 columns wrapped; code, tables and headings as they
    are."""
    parts = re.split(r"(?ms)(^```.*?^```$)", text)
    return "".join(
        part if part.startswith("```") else "\n".join(map(_wrapped_line, part.split("\n"))) for part in parts
    )


def _wrapped_line(line: str) -> str:
    if len(line) <= _COLUMNS or line.startswith(("|", "#", "    ")):
        return line
    hang = "  " if line.startswith("- ") else ""
    whole = re.sub(r"`[^`]*`", lambda code: code.group().replace(" ", "\0"), line)  # code is not broken
    options = {"subsequent_indent": hang, "break_long_words": False, "break_on_hyphens": False}
    return textwrap.fill(whole, _COLUMNS, **options).replace("\0", " ")


def _docstring(cls: type) -> tuple[str, str, str]:
    """Summary, body and pitfalls as Markdown."""
    summary, _, rest = inspect.cleandoc(cls.__doc__ or "").partition("\n\n")
    body, _, pitfalls = rest.partition("\nPitfalls:")
    return (
        " ".join(summary.split()),
        prose("\n" + body, "## {}"),  # its first line may be an equation, whose indentation counts
        "\n".join(f"- {item}" for item in _items(pitfalls)),
    )


def _blocks(text: str) -> str:
    block = r"(?m)(?:^    .*\n?(?:\s*\n(?=    ))?)+"
    return re.sub(
        block, lambda found: f"```text\n{inspect.cleandoc(found.group())}\n```\n", text.strip("\n")
    ).strip()


def _items(section: str) -> list[str]:
    """The entries of a section: each starts at the least indentation, and deeper lines continue it."""
    lines = [line for line in section.strip("\n").splitlines() if line.strip()]
    least = min((len(line) - len(line.lstrip()) for line in lines), default=0)
    text = "\n".join(line[least:] for line in lines)
    return [item.strip() for item in re.sub(r"\n +", " ", text).splitlines()]


def _contract(mixer: Any) -> str:
    causal = "Causal" if mixer.causal else "Not causal: sees the whole sequence, does not stream"
    delay = (
        f", with a look-ahead of {mixer.lookahead} steps: outputs are that many steps late"
        if mixer.lookahead
        else ""
    )
    exact = "" if mixer.exact else ", approximate when streamed"
    contract = (
        "It satisfies the streaming contract: chunks, padding, resets and other rows do not affect the "
        "result."
        if mixer.causal
        else ""
    )
    return f"{causal}{delay}{exact}. {contract}"


def _size(mixer: Any) -> str:
    rows = [("parameters", f"{count_params(mixer):,}")]
    if mixer.causal:
        leaves = jax.tree.leaves(jax.eval_shape(lambda: mixer.init_state(1)))
        rows += [
            (
                "state",
                f"{sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves):,} bytes, whatever the length",
            )
        ]
        rows += [
            (
                "one step",
                f"about {float(f'{_step_flops(mixer):.2g}'):,.0f} floating-point operations, as XLA counts "
                "them",
            )
        ]
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)])


def _step_flops(mixer: Any) -> float:
    """Operations of one streaming step of one row, which has no loop over time that XLA would not count."""
    static, params = split(mixer)
    arguments = (
        params,
        jax.ShapeDtypeStruct((1, 1, _DIM), jnp.float32),
        jax.eval_shape(lambda: mixer.init_state(1)),
    )
    lowered = jax.jit(lambda params, x, state: merge(static, params)(x, state)).lower(*arguments)
    return lowered.cost_analysis()["flops"]


def _state(mixer: Any) -> str:
    state = jax.eval_shape(lambda: mixer.init_state(1))
    leaves = jax.tree_util.tree_leaves_with_path(state)
    if not leaves:
        return "None: pointwise in time."
    named = [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in leaves]
    rows = [f"| {name or 'state'} | {list(leaf.shape)} | {leaf.dtype} |" for name, leaf in named]
    meaning = inspect.cleandoc(type(state).__doc__ or "") if hasattr(state, "_fields") else ""
    return "\n".join(
        [*([meaning, ""] if meaning else []), "| part | shape | dtype |", "| --- | --- | --- |", *rows]
    )


def _use(cls: type, needed: str, causal: bool) -> str:
    signature = ", ".join(
        str(p).split(":")[0] + _default(p)
        for p in inspect.signature(cls).parameters.values()
        if p.name != "rngs"
    )
    call = f"{cls.__name__}({_DIM}{needed}, rngs=nnx.Rngs(0))"
    line = (
        "y, state = mixer(x, mixer.init_state(batch))"
        if causal
        else "y, _ = mixer(x)  # the whole sequence at once"
    )
    code = f"from flax import nnx\nfrom seqlab.models import {cls.__name__}\n\nmixer = {call}\n{line}"
    whole = f"{cls.__name__}({signature}, rngs)"
    whole = textwrap.fill(
        whole, 100, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )
    return f"```python\n{code}\n```\n\n```text\n{whole}\n```"


def _default(parameter: inspect.Parameter) -> str:
    return "" if parameter.default is inspect.Parameter.empty else f"={parameter.default!r}"


def _sources(cls: type) -> str:
    text = (cls.__doc__ or "") + (inspect.getmodule(cls).__doc__ or "")
    found = dict.fromkeys(re.findall(r"\d{4}\.\d{4,5}", text))
    links = [f"[arXiv {number}](https://arxiv.org/abs/{number})" for number in found]
    return ", ".join([*links, f"code: `{cls.__module__}`"])


if __name__ == "__main__":
    for path in write(sys.argv[1] if len(sys.argv) > 1 else "docs/mixers"):
        print(path)
