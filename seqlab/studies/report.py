"""Output of comparisons: tables for terminal and Markdown, a figure, atomically replaced files."""

import contextlib
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

Cells = Sequence[Sequence[str]]  # a header and rows


def as_text(cells: Cells) -> str:
    """A table for a terminal: the first column left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            text.rjust(size) if i else text.ljust(size)
            for i, (text, size) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    )


def as_markdown(cells: Cells) -> str:
    """The same as Markdown."""
    header, *rows = cells
    return "".join(
        f"| {' | '.join(line)} |\n" for line in [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    )


def write(path: pathlib.Path, text: str) -> None:
    """Replace a file by `text` atomically."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


@contextlib.contextmanager
def figure(path: pathlib.Path, columns: int, height: float = 4.0) -> Iterator[Sequence[Any]]:
    """Axes side by side, saved to `path` at the end of the block; its suffix determines the format."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "seqlab"}):  # reproducible files
        drawing = Figure(figsize=(5 * columns, height), layout="constrained")
        FigureCanvasAgg(drawing)
        axes = drawing.subplots(1, columns, squeeze=False)[0]
        yield axes
        for ax in axes:
            ax.grid(alpha=0.3)
        temporary = path.with_name(f"{path.stem}.tmp{path.suffix}")
        drawing.savefig(temporary, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)
        os.replace(temporary, path)


def split_specs(text: str) -> list[str]:
    """The items of "a,b(x=1, y=2)": split at the commas outside parentheses; items may be empty."""
    return [item.strip() for item in re.split(r",(?![^(]*\))", text)]


def file_name(title: str) -> str:
    """`title` with characters replaced that file systems may not allow."""
    return re.sub(r"[^\w.=-]+", "_", title).strip("_")
