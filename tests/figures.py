"""Results of the slow tests of claims, saved for docs/science.md.

    SEQLAB_FIGURES=docs/figures pytest -m slow tests/test_science_recall.py     measure, assert and save
    python tests/figures.py                                                     rewrite the page

A result is a JSON file (title, claim, table) and, if something is drawn, a picture of the same name. Without
SEQLAB_FIGURES the tests assert and save nothing.
"""

import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from seqlab.tooling.mixer_pages import wrapped

DOCS = pathlib.Path(__file__).resolve().parent.parent / "docs"
# As on the page; others follow by name.
ORDER = ("recall", "selective_copying", "delay_line", "digits_seen", "forecasting")


def keep(
    name: str,
    title: str,
    claim: str,
    header: Sequence[str],
    rows: Sequence[Sequence[Any]],
    draw: Callable[[Any], None] | None = None,
) -> None:
    """Write `name`.json and, drawn on a matplotlib axis by `draw`, `name`.png; rewrite the page."""
    if not (folder := os.environ.get("SEQLAB_FIGURES")):
        return
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    command = f"pytest -m slow {os.environ['PYTEST_CURRENT_TEST'].partition(' ')[0]}"
    record = {
        "title": title,
        "claim": claim,
        "command": command,
        "picture": draw is not None,
        "header": header,
        "rows": rows,
    }
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    if draw is not None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 3.6), layout="constrained")
        FigureCanvasAgg(figure)
        ax = figure.subplots()
        ax.grid(alpha=0.3)
        draw(ax)
        figure.savefig(folder / f"{name}.png", dpi=110)
    if folder.resolve() == DOCS / "figures":
        (DOCS / "science.md").write_text(page())


def page(folder: pathlib.Path = DOCS / "figures") -> str:
    """The page of all saved results."""
    records = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    known = [name for name in ORDER if name in records]
    parts = [
        "# Measured claims\n\nEach claim is a test: its command trains the models, asserts the claim, and "
        "with `SEQLAB_FIGURES=docs/figures` writes the table and the figure below."
    ]
    for name in known + sorted(set(records) - set(known)):
        record = records[name]
        table = [record["header"], ["---"] + ["---:"] * (len(record["header"]) - 1), *record["rows"]]
        parts += [f"## {record['title']}", record["claim"], "    " + record["command"]]
        parts += [f"![{record['title']}](figures/{name}.png)"] * record["picture"]
        parts += ["\n".join(f"| {' | '.join(map(str, line))} |" for line in table)]
    return wrapped("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    (DOCS / "science.md").write_text(page())
