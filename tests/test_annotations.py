"""Annotations hold: while functions run (jaxtyping, beartype), and for those who only read them (pyright)."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import venv

import pytest
from test_readme import MIXERS, PAGES, blocks, file_of, named

ROOT = pathlib.Path(__file__).resolve().parent.parent
PYRIGHT = shutil.which("pyright") or shutil.which("basedpyright")
OWN_MIXER = """
import jax
import jax.numpy as jnp
import seqlab
from flax import nnx
from jaxtyping import Array, Bool, Float
from seqlab.models import Attention, Linear, LanguageModel, Mamba, Window
from seqlab.state import State, mask_steps


class Sums(seqlab.MixerBase, seqlab.Module):
    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        self.dim, self.out = dim, Linear(dim, dim, rngs=rngs)

    def init_state(self, batch: int, dtype: jax.typing.DTypeLike = jnp.float32) -> State:
        return jnp.zeros((batch, self.dim))

    def __call__(
        self,
        x: Float[Array, "b t d"],
        state: State | None = None,
        reset: Bool[Array, "b t"] | None = None,
        valid: Bool[Array, "b t"] | None = None,
    ) -> tuple[Float[Array, "b t d"], State | None]:
        y = self.out(jnp.cumsum(mask_steps(x, valid), 1))
        return y, None if state is None else state + y[:, -1]


layer = Attention(32, heads=4, cache=Window(128, sinks=4), rngs=nnx.Rngs(0))
model = LanguageModel(256, 16, 2, (Sums, Mamba), rngs=nnx.Rngs(0))
report: seqlab.Report = seqlab.verify_streaming(layer)
size: int = seqlab.state_bytes(Sums(16, rngs=nnx.Rngs(0))) + seqlab.state_bytes(model)
same: Mamba = seqlab.convert(Mamba(16, rngs=nnx.Rngs(0)), {})
stream = seqlab.stream_generate(model, ["a", b"b", [1]], max_tokens=[1, None, 2])
text: list[str] = [token.text for token in stream]
"""
MISTAKES = """
import seqlab
from flax import nnx
from seqlab import kernels
from seqlab.models import Attention
seqlab.stream_genrate  # 1
kernels.sacn  # 2
Attention(32, heads="4", rngs=nnx.Rngs(0))  # 3
seqlab.state_bytes(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))  # 4
seqlab.load("run").model.rewnd  # 5
"""


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(("--briefly", "mamba", "gated_delta"), id="two mixers"),
        pytest.param((), id="everything", marks=pytest.mark.slow),
    ],
)
def test_annotations_are_what_is_passed(words):
    """In a process of its own: the checks are compiled in where seqlab is imported."""
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "annotated.py", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def installation(folder, how):
    """A virtual environment with the libraries of this one and with seqlab: "wheel" copies its files, as
    a wheel holds them, and "editable" is the one path that pip writes."""
    venv.create(folder, with_pip=False)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    if how == "wheel":
        shutil.copytree(ROOT / "seqlab", site / "seqlab", ignore=shutil.ignore_patterns("__pycache__"))
    else:
        (site / "seqlab.pth").write_text(f"{ROOT}\n")
    return folder / "bin" / "python"


def errors(python, folder):
    """What pyright says of the files of `folder`: (file, line, message)."""
    (folder / "pyrightconfig.json").write_text("{}")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [PYRIGHT, "--outputjson", "--level", "error", "--pythonpath", python],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    return [
        (pathlib.Path(one["file"]).name, one["range"]["start"]["line"] + 1, one["message"])
        for one in json.loads(done.stdout)["generalDiagnostics"]
    ]


@pytest.mark.slow
@pytest.mark.skipif(PYRIGHT is None, reason="pyright is not installed")
@pytest.mark.parametrize("how", ["wheel", "editable"])
def test_type_checkers_agree_with_the_examples(how, tmp_path):
    folder = tmp_path / "user"
    folder.mkdir()
    for page in [*PAGES, *MIXERS]:
        text = "import jax.numpy as jnp\nx, batch = jnp.zeros((2, 8, 64)), 2\n" if page in MIXERS else ""
        for block in (text for language, text in blocks(page) if language == "python"):
            if name := file_of(block):
                (folder / f"{name}.py").write_text(block)
            text += f"from {name} import *\n" if name else block
        (folder / f"page_{named(page).replace('/', '_').replace('-', '_')[:-3]}.py").write_text(text)
    (folder / "own_mixer.py").write_text(OWN_MIXER)
    found = errors(installation(tmp_path / "venv", how), folder)
    assert not found, "\n".join(map(str, found))


@pytest.mark.slow
@pytest.mark.skipif(PYRIGHT is None, reason="pyright is not installed")
def test_type_checkers_find_mistakes(tmp_path):
    folder = tmp_path / "user"
    folder.mkdir()
    (folder / "mistakes.py").write_text(MISTAKES)
    found = {line for _, line, _ in errors(installation(tmp_path / "venv", "wheel"), folder)}
    assert found == {number for number, line in enumerate(MISTAKES.splitlines(), 1) if "  # " in line}
