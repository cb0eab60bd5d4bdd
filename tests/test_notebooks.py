"""The notebooks hold code and prose, and every one of them runs from its first cell to its last.

They run as Jupyter would run them, all cells in one fresh process inside a running event loop, but without
Jupyter: nbclient and ipykernel would bring some thirty packages into the tests, to execute code that uses
IPython for one guarded line of installation.

SEQLAB_QUICK, which every notebook looks at where its sizes are set, makes them short.
"""

import ast
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
RUNNER = """
import asyncio, pathlib, sys

code = compile(pathlib.Path(sys.argv[1]).read_text(), sys.argv[1], "exec")

async def cells():
    exec(code, globals())

asyncio.run(cells())
"""


def cells(path, kind):
    """The text of the cells of a kind."""
    return [
        "".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind
    ]


def as_python(code):
    """A cell without what only IPython understands."""
    return re.sub(r"^(\s*)[%!].*$", r"\1pass", code, flags=re.MULTILINE)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_code_and_prose_alone(path):
    book = json.loads(path.read_text())
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    assert book["metadata"]["kernelspec"]["name"] == "python3"
    assert len({cell["id"] for cell in book["cells"]}) == len(book["cells"])
    for cell in book["cells"]:
        assert cell["cell_type"] in ("markdown", "code") and cell["metadata"] == {}
        assert cell["cell_type"] == "markdown" or (cell["outputs"] == [] and cell["execution_count"] is None)
    code, prose = cells(path, "code"), cells(path, "markdown")
    assert prose[0].startswith("# ")
    assert code[0] == cells(NOTEBOOKS[0], "code")[0] and 'if "google.colab" in sys.modules:' in code[0]
    assert "SEQLAB_QUICK" in "".join(code)
    for cell in code:
        ast.parse(as_python(cell))
        assert len(cell.splitlines()) <= 40, cell
    for text in code + prose:
        assert not re.search(r"/(home|work|tmp|root|Users|content|mnt)\b|[A-Z]:\\", text), text


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path):
    script = tmp_path / f"{path.stem}.py"
    script.write_text(
        "\n\n".join(f"# cell {i}\n{as_python(code)}" for i, code in enumerate(cells(path, "code"), 1))
    )
    flags = "--xla_backend_optimization_level=0"  # as in conftest.py, but without its eight devices
    mine = {"SEQLAB_QUICK": "1", "MPLBACKEND": "agg", "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, script],
        cwd=tmp_path,
        env=os.environ | mine,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
