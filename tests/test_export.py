"""Bundles run in a process that has no seqlab, on numbers of rows never seen before, and give the same
bits."""

import functools
import json
import pathlib
import subprocess
import sys

import figures
import jax
import numpy as np
import pytest
import zoo
from flax import nnx

from seqlab import cli, load, merge, split, stream_generate
from seqlab.interop.export import ExportError, bundle, streaming_functions
from seqlab.models import TSM2, Attention, Full, LanguageModel
from seqlab.tokenizers import FileTokenizer
from seqlab.train.tasks.examples import numbers

ALONE = """
import importlib.util, json, sys
import numpy as np
sys.path.insert(0, sys.argv[1])
import run
rows = np.load(sys.argv[2])
results = []
for count in (1, 3):
    outputs, state = run.read(rows[:count])
    stepped, after = run.STEP(run.PARAMS, rows[:count, 0], state)
    results += [outputs, stepped, *state, *after]
np.savez(sys.argv[3], *results)
assert not any(name.partition(".")[0] in ("seqlab", "flax") for name in sys.modules), "needs nothing but jax"
"""


def here(model, rows, chunk):
    """The result of `ALONE`, computed by the model itself."""
    static, params = split(model)

    @jax.jit
    def read(params, inputs, valid, state):
        outputs, state = merge(static, params)(inputs, state, None, valid)
        return outputs, state

    @jax.jit
    def step(params, inputs, state):
        outputs, state = merge(static, params)(inputs[:, None], state)
        return outputs[:, 0], state

    results = []
    for count in (1, 3):
        state = model.init_state(count)
        for begin in range(0, rows.shape[1], chunk):
            part = rows[:count, begin : begin + chunk]
            padded = np.pad(part, [(0, 0), (0, chunk - part.shape[1]), *[(0, 0)] * (rows.ndim - 2)])
            valid = np.broadcast_to(np.arange(chunk) < part.shape[1], (count, chunk))
            outputs, state = read(params, padded, valid, state)
        stepped, after = step(params, rows[:count, 0], state)
        results += [outputs[:, part.shape[1] - 1], stepped, *jax.tree.leaves(state), *jax.tree.leaves(after)]
    return results


@pytest.mark.parametrize("name", ["lm_hybrid", pytest.param("sequence_hybrid", marks=pytest.mark.slow)])
def test_a_bundle_gives_the_same_bits_without_seqlab(name, tmp_path):
    model, rng = zoo.model(name), np.random.default_rng(0)
    rows = (
        rng.integers(0, 31, (3, 13)).astype(np.int32)
        if name == "lm_hybrid"
        else rng.normal(size=(3, 13, 3)).astype(np.float32)
    )
    np.save(tmp_path / "rows.npy", rows)
    folder = bundle(model, tmp_path / "bundle", chunk=8)
    assert {path.name for path in folder.iterdir()} == {
        *("weights.safetensors", "init_state.bin", "prefill.bin", "step.bin", "manifest.json", "run.py")
    }
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["platforms"] == ["cpu", "cuda", "tpu"] and manifest["published"].startswith("none: ")
    command = [sys.executable, "-c", ALONE, folder, tmp_path / "rows.npy", tmp_path / "out.npz"]
    subprocess.run(list(map(str, command)), check=True, cwd=tmp_path)
    out = np.load(tmp_path / "out.npz")
    expected = here(model, rows, 8)
    assert len(out.files) == len(expected)
    for name, value in zip(out.files, expected, strict=True):
        np.testing.assert_array_equal(out[name], np.asarray(value), err_msg=name)
    with pytest.raises(FileExistsError, match="nothing is overwritten"):
        bundle(model, folder, chunk=8)


def test_the_command_line_exports_published_families_as_such_and_the_loader_generates(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    source = pathlib.Path(__file__).parent / "pretrained" / "llama"
    assert cli.main(["export", str(source), "--out", "out", "--chunk", "4", "--platforms", "cpu"]) == 0
    assert "out/published/model.safetensors" in capsys.readouterr().out
    assert json.loads(pathlib.Path("out/published/config.json").read_text())["model_type"] == "llama"
    prompt = [3, 1, 4, 1, 5, 9]
    code = f"import run; print([int(token[0]) for token in run.generate([{prompt}], 5)])"
    made = subprocess.run(
        [sys.executable, "-c", code], check=True, cwd="out", capture_output=True, text=True
    ).stdout
    model = load(source).model
    expected = [
        token.token
        for token in stream_generate(model, prompt, max_tokens=5, temperature=0, tokenizer=numbers(48))
    ]
    assert json.loads(made) == expected
    assert cli.main(["export", str(source), "--out", "out", "--platforms", "cpu"]) == 2
    assert "out exists: nothing is overwritten" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["words", "bytes", "numbers"])
def test_a_bundle_reads_and_writes_text_as_the_model_does(kind, tmp_path):
    """run.py in its own process beside files of a stranger, which it does not import."""
    tokenizer, size, prompt = None, 256 if kind == "bytes" else 300, "w5 w6"
    if kind == "words":
        tokenizers = pytest.importorskip("tokenizers")
        words = {word: i for i, word in enumerate(["<s>", "</s>", *(f"w{i}" for i in range(298))])}
        made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
        made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
        made.save(str(tmp_path / "tokenizer.json"))
        tokenizer = FileTokenizer(tmp_path / "tokenizer.json", eos=[1])
    attention = functools.partial(Attention, heads=2, cache=Full(64))
    model = LanguageModel(size, 16, 1, attention, tie_embeddings=False, rngs=nnx.Rngs(0))
    folder = bundle(model, tmp_path / "b", chunk=4, platforms=("cpu",), tokenizer=tokenizer)
    for name in ("jax", "json", "numpy", "tokenizers"):
        (folder / f"{name}.py").write_text(f"raise SystemExit('{name}.py of the bundle was imported')")
    command = [sys.executable, str(folder / "run.py"), prompt, "6"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    if kind == "numbers":
        assert done.returncode == 1 and "has no tokenizer" in done.stderr
        return
    stream = stream_generate(model, prompt, max_tokens=6, temperature=0, tokenizer=tokenizer)
    assert done.stdout == "".join(token.text for token in stream) + "\n", done.stderr
    again = subprocess.run([*command[:2], "text"], capture_output=True, text=True)
    assert again.returncode == 1 and "usage" in again.stderr


@pytest.mark.parametrize(
    "model, options, message",
    [
        (lambda: TSM2(1, 16, 4, dim=8, depth=1, rngs=nnx.Rngs(0)), {}, "TSM2 has no streaming form"),
        (lambda: zoo.model("lm_mamba"), {"chunk": 0}, "chunk must be a positive integer, got 0"),
        (
            lambda: zoo.model("lm_mamba"),
            {"platforms": ["cpu", "gpu"]},
            "platforms: got gpu, expected some of cpu, cuda, tpu",
        ),
    ],
)
def test_what_cannot_be_exported_is_refused(model, options, message, tmp_path):
    with pytest.raises(ExportError, match=message):
        bundle(model(), tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_every_mixer_that_keeps_the_width_exports():
    rows = []
    for name, mixer in zoo.MIXERS.items():
        made = mixer(16, rngs=nnx.Rngs(0))
        if not made.causal or jax.eval_shape(made, jax.ShapeDtypeStruct((1, 2, 16), np.float32))[0].shape != (
            1,
            2,
            16,
        ):
            continue
        model = LanguageModel(31, 16, 1, functools.partial(mixer), channel_mixer=None, rngs=nnx.Rngs(0))
        functions, _ = streaming_functions(model, 8)
        rows.append([f"`{name}`", *(f"{len(functions[part].serialize()):,}" for part in ("prefill", "step"))])
    claim = (
        "Mixers of the test zoo in a model of one layer, exported for cpu, cuda and tpu and any number of "
        "rows: bytes of StableHLO."
    )
    figures.keep("exports", "Exported mixers", claim, ["mixer", "prefill", "step"], rows)
    assert len(rows) > 30
