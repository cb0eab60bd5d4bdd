"""The table of docs/reference/families.md: what every published family has been tested for, on small random
models of transformers. `python tests/test_families.py` writes it.

The checks of logits and files of `tests/test_pretrained.py` are quick; those of this file are slow.
"""

import json
import math
import pathlib
import subprocess
import sys
import tempfile

import fiddle as fdl
import fiddle.selectors
import jax
import numpy as np
import pytest
from flax import nnx

if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import seqlab
from seqlab.interop.export import bundle
from seqlab.interop.families import families, family_of, model_config, published_config
from seqlab.interop.folder import Folder, number
from seqlab.interop.huggingface import save_pretrained
from seqlab.models import Attention
from seqlab.models.attention import with_cache
from seqlab.module import params_of
from seqlab.state import state_bytes

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDER = ROOT / "tests" / "pretrained"
PAGE = ROOT / "docs" / "reference" / "families.md"
FIXTURES = sorted(path.name for path in FOLDER.iterdir())
COLUMNS = ("config", "logits", "cached decode", "saved", "sinks + window", "int4 cache", "export")
HEAD = """# Families of published models

Every family that `seqlab.load` reads and `seqlab.save_pretrained` writes, as tested on a small random model
that transformers made (`tests/make_pretrained.py`). The table is written by `python tests/test_families.py`.

- config: every key is used, known to have no effect, or refused; it is written again with the same meaning.
- logits, cached decode: the largest difference from transformers' single pass, of a whole sequence and of a
  stream in chunks and steps. Logits are about 5.
- saved: the tensors and files are those of transformers, bit for bit.
- sinks + window: a stream with `sinks(2)+window(6)` beyond its window in constant state, the largest
  difference between chunks and single steps.
- int4 cache: the mean error of the logits with `full(64)+int4(group=8, residual=8)`, relative to their size,
  of a new model of the family with wider heads.
- export: `seqlab export` generates the same tokens without seqlab.

transformers 5.24 decodes its own Bamba with a cache differently from its single pass; here both are the
single pass.

"""


def tokens_and_logits(name):
    expected = np.load(FOLDER / name / "expected.npz")
    return expected["tokens"], expected["logits"]


def attends(model):
    return any(isinstance(module, Attention) for _, module in nnx.iter_modules(model))


def streamed(model, tokens, sizes):
    """Logits of a stream in chunks of these sizes, and its state."""
    static, params = seqlab.split(model)
    run = compiled(static)
    state, pieces, begin = model.init_state(len(tokens)), [], 0
    for size in sizes:
        logits, state = run(params, tokens[:, begin : begin + size], state)
        pieces.append(np.asarray(logits))
        begin += size
    return np.concatenate(pieces, axis=1), state


def compiled(static):
    return jax.jit(lambda params, x, state: seqlab.merge(static, params)(x, state))


def bound(error):
    """The least power of ten above an error."""
    assert np.isfinite(error)
    return "0" if error == 0 else f"1e{math.ceil(math.log10(error)):+03d}"


def config(model, name):
    described = Folder(FOLDER / name).json("config.json")
    with pytest.raises(ValueError, match="unheard_of"):
        model_config(described | {"unheard_of": 1})
    again = json.loads(json.dumps(published_config(model)), object_hook=number)
    rebuilt = nnx.eval_shape(lambda: fdl.build(model_config(again))(rngs=nnx.Rngs(0)))
    assert seqlab.split(rebuilt)[0].names == seqlab.split(model)[0].names
    return "yes"


def logits(model, name):
    tokens, expected = tokens_and_logits(name)
    return bound(np.abs(np.asarray(model(tokens)[0]) - expected).max())


def cached(model, name):
    tokens, expected = tokens_and_logits(name)
    steps = tokens.shape[1]
    return bound(np.abs(streamed(model, tokens, [6, *[1] * (steps - 6)])[0] - expected).max())


def saved(model, name):
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder)
        again = params_of(seqlab.load(folder).model)
    for key, value in params_of(model).items():
        np.testing.assert_array_equal(again[key], value)
    return "yes"


def sinks(model, name):
    if not attends(model):
        return "no attention"
    model = with_cache(model, "sinks(2)+window(6)")
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (1, 40), np.int32)
    one, state = streamed(model, tokens, [5] * 8)
    two, _ = streamed(model, tokens, [1] * 40)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert size == state_bytes(model)
    return bound(np.abs(one - two).max())


def int4(model, name):
    if not attends(model):
        return "no attention"
    cfg = model_config(Folder(FOLDER / name).json("config.json"))
    for part in fdl.selectors.select(cfg, Attention):
        part.head_dim, part.rotary_width = 16, None  # whole words of 32 bits
    wide = fdl.build(cfg)(rngs=nnx.Rngs(0))
    tokens, _ = tokens_and_logits(name)
    steps = [1] * tokens.shape[1]
    exact, _ = streamed(with_cache(wide, "full(64)"), tokens, steps)
    found, _ = streamed(with_cache(wide, "full(64)+int4(group=8, residual=8)"), tokens, steps)
    return f"{np.abs(found - exact).mean() / np.abs(exact).mean():.1%}"


def export(model, name):
    prompt = [3, 1, 4, 1, 5, 9]
    with tempfile.TemporaryDirectory() as folder:
        bundle(model, pathlib.Path(folder) / "b", chunk=4, platforms=("cpu",))
        code = f"import run; print([int(token[0]) for token in run.generate([{prompt}], 5)])"
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=f"{folder}/b", capture_output=True, text=True, check=True)
    stream = seqlab.stream_generate(model, prompt, max_tokens=5, temperature=0)
    assert json.loads(done.stdout) == [token.token for token in stream]
    return "yes"


def row(name):
    """The row of a fixture."""
    model = seqlab.load(FOLDER / name).model
    cells = [check(model, name) for check in (config, logits, cached, saved, sinks, int4, export)]
    described = Folder(FOLDER / name).json("config.json")
    return f"| {name} | {family_of(described).CLASS} | {' | '.join(cells)} |"


def rows_of(text):
    return {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}


def test_the_table_has_every_family_and_every_family_a_fixture():
    listed = [name for name in rows_of(PAGE.read_text()) if name not in ("model", "---")]
    assert listed == FIXTURES
    described = [Folder(FOLDER / name).json("config.json") for name in FIXTURES]
    assert {each["model_type"] for each in described} == set(families())


@pytest.mark.slow
@pytest.mark.parametrize("name", FIXTURES)
def test_a_row_of_the_table_is_what_is_measured(name):
    shown, found = (
        [cell.strip() for cell in line.split("|")] for line in (rows_of(PAGE.read_text())[name], row(name))
    )
    for one, other in zip(shown, found, strict=True):  # rounding differs between versions and flags
        if one.endswith("%"):
            assert abs(float(one[:-1]) - float(other[:-1])) <= 0.5
        elif one.startswith("1e-"):
            assert float(other) <= min(10 * float(one), 1e-4)
        else:
            assert one == other


def test_errors_are_bounded_by_powers_of_ten():
    assert [bound(error) for error in (0, 3e-6, 1e-5, 0.2)] == ["0", "1e-05", "1e-05", "1e+00"]


if __name__ == "__main__":
    table = [f"| model | class in transformers | {' | '.join(COLUMNS)} |", "| --- " * 9 + "|"]
    for each in FIXTURES:
        table.append(row(each))
        print(table[-1], flush=True)
    PAGE.write_text(HEAD + "\n".join(table) + "\n")
