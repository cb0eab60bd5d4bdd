"""The README's Python runs as it stands."""

import pathlib
import re

import pytest

TEXT = (pathlib.Path(__file__).resolve().parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("code", [block for block in BLOCKS if "runs/" not in block], ids=lambda code: code.strip().splitlines()[-1][:40])
def test_readme_code_runs(code):
    exec(compile(code, "README.md", "exec"), {})
