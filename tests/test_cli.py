"""The command line: quick help, one-line errors with their codes, and one run from training to text."""

import json
import os
import pathlib
import platform
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

import seqlab
import seqlab.cli.common
from seqlab import cli
from seqlab.module import params_of
from seqlab.train import loop
from seqlab.train.config import ConfigError

ROOT = pathlib.Path(__file__).resolve().parent.parent
HEAVY = {
    "jax",
    "jaxlib",
    "flax",
    "numpy",
    "fiddle",
    "optax",
    "orbax",
    "grain",
    "tensorflow_datasets",
    "matplotlib",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with a corpus, and a compile cache of its own."""
    from jax.experimental.compilation_cache import compilation_cache

    (tmp_path / "corpus").mkdir()
    for n in range(30):
        (tmp_path / "corpus" / f"{n}.txt").write_text(" ".join(map(str, range(n, n + 150))))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield tmp_path
    jax.config.update("jax_compilation_cache_dir", before[0])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before[1])
    compilation_cache.reset_cache()


def train(*arguments):
    return cli.main(["train", "lm_attention", "--fiddler", "tiny", "--set", "data.paths=corpus", *arguments])


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "seqlab", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "seqlab" in imported
    assert not imported & HEAVY
    assert "seqlab" in done.stdout


def test_a_run_from_training_to_text(folder, monkeypatch, capsys):
    # whole, and interrupted by SIGTERM after step 3 and then continued: the same parameters, bit for bit
    steps = ["steps=6", "seed=5"]
    assert train(*steps, "--workdir", "whole") == 0
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "changed:\n  model.dim: 128 -> 16\n" in printed.err
    assert "step 6: validation" in printed.err

    advance = loop.Progress.advance

    def interrupted(self, step):
        advance(self, step)
        if step == 3:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Progress, "advance", interrupted)
        assert train(*steps) == 143
    assert "SIGTERM: saved step 3; the same command goes on from there" in capsys.readouterr().err
    assert seqlab.load("runs/lm_attention").step == 3
    assert train(*steps) == 0
    assert "resuming at step 3" in capsys.readouterr().err
    whole, resumed = seqlab.load("whole"), seqlab.load(folder / "runs" / "lm_attention")
    assert whole.step == resumed.step == 6
    for name, leaf in params_of(whole.model).items():
        np.testing.assert_array_equal(
            np.asarray(leaf), np.asarray(params_of(resumed.model)[name]), err_msg=name
        )

    # the same command again has nothing to do; another config is refused and changes nothing
    assert train(*steps) == 0
    assert "is complete: 6 steps" in capsys.readouterr().err
    before = {path: path.stat().st_mtime_ns for path in pathlib.Path("runs").rglob("*")}
    assert train("steps=7", "seed=5") == 2
    assert "belongs to another config (saved -> given):\n  steps: 6 -> 7\n" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in pathlib.Path("runs").rglob("*")} == before

    # evaluation gives the number that training logged
    logged = [json.loads(line) for line in pathlib.Path("whole/metrics.jsonl").read_text().splitlines()]
    logged = {
        line["step"]: line["validation_bits_per_token"]
        for line in logged
        if "validation_bits_per_token" in line
    }
    assert cli.main(["eval", "whole", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["step"] == 6
    assert abs(record["bits_per_token"] - logged[6]) < 1e-5
    assert record["targets"] == 4 * 32  # tiny validates on four windows of 32
    assert cli.main(["eval", "whole", "--step", "4", "--set", "validation_windows=8"]) == 0
    assert "whole, step 4: " in capsys.readouterr().out
    assert cli.main(["eval", "whole", "--set", "model.dim=8"]) == 2
    assert cli.main(["eval", "whole", "--step", "5"]) == 2
    assert "there is no step 5" in capsys.readouterr().err

    # text: the same from the command line as from the library, whichever folder the model comes from
    arguments = ["--prompt", "12 13 ", "--max-tokens", "20", "--seed", "3", "--temperature", "1.0"]
    assert cli.main(["stream", "whole", *arguments]) == 0
    first = capsys.readouterr()
    assert "20 tokens, " in first.err
    assert "bytes of state" in first.err
    assert "programs compiled in" in first.err
    assert cli.main(["stream", "runs/lm_attention", *arguments]) == 0
    assert capsys.readouterr().out == first.out
    tokens = seqlab.stream_generate(
        whole.model, "12 13 ", max_tokens=20, seed=3, temperature=1.0, tokenizer=whole.tokenizer
    )
    assert "".join(token.text for token in tokens) + "\n" == first.out
    assert cli.main(["stream", "whole", "--max-tokens", "-1"]) == 2

    # what took long to compile is kept, below the folder that the user's environment names
    assert pathlib.Path(jax.config.jax_compilation_cache_dir) == folder / "cache" / "seqlab" / "xla"


def test_an_interrupted_stream_says_how_it_went(folder, monkeypatch, capsys):
    class Stopped:
        def __init__(self):
            self.stats = {
                "tokens": 1,
                "tokens_per_second": 5.0,
                "state_bytes": 7,
                "programs": 2,
                "compile_seconds": 0.5,
            }

        def __iter__(self):
            yield seqlab.streaming.generate.Token(0, 0, 65, "A", 0.0, None)
            raise KeyboardInterrupt

    monkeypatch.setattr(
        "seqlab.studies.runs.load",
        lambda workdir, step: seqlab.studies.runs.Run(None, seqlab.ByteTokenizer(), None, 0),
    )
    monkeypatch.setattr("seqlab.streaming.generate.stream_generate", lambda *args, **kwargs: Stopped())
    assert cli.main(["stream", "anything"]) == 130
    printed = capsys.readouterr()
    assert printed.out == "A"
    assert "1 tokens, 5 tokens/s; 7 bytes of state; 2 programs compiled in 0.5 s" in printed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "demmo"], "no config 'demmo'; did you mean 'demo'"),
        (
            ["train", "demo", "--set", "model.dmi=3"],
            "model.dmi: LanguageModel has no field 'dmi'; did you mean 'dim'",
        ),
        (
            ["train", "demo", "--set", "model.mixers[1].cache.window=0"],
            "model.mixers[1].cache: window must be a positive integer",
        ),
        (["train", "demo", "--fiddler", "tinny"], "no fiddler 'tinny'; did you mean 'tiny'"),
        (["train", "demo", "--set", "data.paths=nowhere"], "paths: nowhere does not exist"),
        (
            ["train", "demo", "--fiddler", "tiny", "--set", "data.paths=corpus", "batch_size=9999"],
            "too little data",
        ),
        (["stream", "nowhere"], "nowhere is not the folder of a run: it does not exist"),
        (["stream", "corpus"], "corpus is not the folder of a run: it holds no config.json"),
        (["eval", "corpus/1.txt"], "corpus/1.txt is not the folder of a run: it is not a folder"),
    ],
)
def test_errors_of_the_user_are_one_line_and_code_2(folder, capsys, arguments, message):
    before = sorted(os.listdir())
    assert cli.main(arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.startswith(f"seqlab {arguments[0]}: error: ")
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert sorted(os.listdir()) == before, "nothing is made for a run that cannot start"
    with pytest.raises((ConfigError, OSError, ValueError)):
        cli.main(["--traceback", *arguments])


def test_a_run_without_a_checkpoint_says_so(folder, capsys):
    from seqlab.train import config

    config.prepare(config.fiddle(config.load("demo"), "tiny"), "run")
    assert cli.main(["stream", "run"]) == 2
    assert "run has no checkpoint yet" in capsys.readouterr().err
    pathlib.Path("run/config.json").write_text("{}")
    assert cli.main(["stream", "run"]) == 2
    assert "run/config.json: not a saved config" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["trane", "demo"], ["train"], ["stream", "x", "--top-k", "many"]])
def test_usage_errors_are_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2


def test_codes_of_training(folder, monkeypatch, capsys):
    def diverge(*arguments):
        raise loop.NonFiniteError("step 3: loss nan")

    def stop(*arguments):
        raise KeyboardInterrupt

    def fail(*arguments):
        raise TypeError("a bug")

    monkeypatch.setattr(loop, "run", diverge)
    assert train() == 3
    assert "error: step 3: loss nan" in capsys.readouterr().err
    monkeypatch.setattr(loop, "run", stop)
    assert train() == 130
    monkeypatch.setattr(loop, "run", lambda *arguments: loop.Result("SIGINT", 2, None, None))
    assert train() == 130
    monkeypatch.setattr(loop, "run", fail)
    with pytest.raises(TypeError, match="a bug"):
        train()
    monkeypatch.setattr(loop, "run", lambda *arguments: int("x"))
    with pytest.raises(ValueError, match="invalid literal"):
        train()


def test_a_bug_keeps_its_traceback(monkeypatch):
    from seqlab.studies import runs

    # a line of seqlab fails that has no raise statement: not what a user could put right
    monkeypatch.setattr(runs, "in_evaluation", lambda model: model)
    monkeypatch.setattr(runs, "split", lambda model: (1, 2, 3))
    with pytest.raises(ValueError, match="too many values to unpack") as bug:
        runs.evaluate(None, None)
    assert cli._exit_code(bug.value) is None
    with pytest.raises(ValueError, match="is not the folder of a run") as mistake:
        runs.load("nowhere")
    assert cli._exit_code(mistake.value) == 2


def test_the_users_compile_cache_is_left_alone(folder):
    cli.common.enable_compile_cache()
    assert pathlib.Path(jax.config.jax_compilation_cache_dir) == folder / "cache" / "seqlab" / "xla"
    jax.config.update("jax_compilation_cache_dir", str(folder / "mine"))
    cli.common.enable_compile_cache()
    assert pathlib.Path(jax.config.jax_compilation_cache_dir) == folder / "mine"
    assert cli.common.compile_cache() == folder / "mine"


def test_a_config_may_use_modules_of_the_working_folder(folder, capsys):
    (folder / "my_mixers.py").write_text("from seqlab.models import Mamba\n\nclass Mine(Mamba):\n    pass\n")
    assert train("model.mixers=my_mixers:Mine", "steps=1", "--fiddler", "scan_layers") == 0
    with pytest.raises(
        ValueError, match=r"config.json: model.mixers: names 'my_mixers:Mine', which is no part"
    ):
        seqlab.load("runs/lm_attention")
    assert cli.main(["stream", "runs/lm_attention", "--max-tokens", "3"]) == 2
    assert "--trust" in capsys.readouterr().err
    run = seqlab.load("runs/lm_attention", trust=True)
    assert type(run.model.backbone.blocks[0].mixer).__name__ == "Mine"
    # Layers that were scanned in training are not in decoding.
    assert cli.main(["stream", "runs/lm_attention", "--max-tokens", "3", "--trust"]) == 0
    assert "3 tokens, " in capsys.readouterr().err
    sys.modules.pop("my_mixers")


def test_list(capsys):
    assert cli.main(["list", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    mixers = {card["name"]: card for card in content["mixers"]}
    inner, states, rank = 128, 16, 4  # Mamba at width 64
    parameters = (
        64 * 2 * inner
        + inner * (4 + 1)
        + inner * (rank + 2 * states)
        + rank * inner
        + inner
        + inner * states
        + inner
        + inner * 64
    )
    assert mixers["Mamba"] | {"summary": ""} == {
        "name": "Mamba",
        "causal": True,
        "lookahead": 0,
        "exact": True,
        "state_bytes": 4 * inner * (3 + states),
        "parameters": parameters,
        "source": "arXiv 2312.00752",
        "module": "seqlab.models.state_space.mamba",
        "summary": "",
    }
    assert mixers["GatedLinearAttention"]["state_bytes"] == 4 * 32 * 64 // 4
    assert {"Attention", "SwiGLU", "MLP"} <= mixers.keys()
    assert not {"Backbone", "Block", "LanguageModel", "Linear"} & mixers.keys()
    assert all(card["summary"] for cards in content.values() for card in cards)
    configs = {card["name"]: card["summary"] for card in content["configs"]}
    assert {path.stem for path in (ROOT / "configs").glob("[!_]*.py")} == configs.keys() | {
        "parts",
        "fiddlers",
    }
    assert "longer(factor: int = 2)" in {card["name"] for card in content["fiddlers"]}
    assert cli.main(["list"]) == 0
    text = capsys.readouterr().out
    assert "  Mamba  " in text
    assert "9,728" in text
    assert "  demo  " in text


def test_doctor_tries_every_kernel(folder, capsys):
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["python"] == platform.python_version()
    assert report["versions"]["jax"] == jax.__version__
    assert report["devices"] == {"default": "cpu", "kinds": {"cpu cpu": len(jax.devices())}}
    assert report["compile_cache"] == {"path": str(folder / "cache" / "seqlab" / "xla"), "bytes": 0}
    assert report["free_disk"]["bytes"] > 0
    assert report["kernels"].keys() >= {
        path.parent.name for path in (ROOT / "kernels").glob("*/reference.py")
    }
    for name, implementations in report["kernels"].items():
        assert implementations["reference"]["error"] == 0
        assert implementations["xla"]["chosen"], f"{name}: xla is what runs on a CPU"
        assert implementations["xla"]["error"] < 1e-5
        for found in implementations.values():
            assert found["runs"] or found["reason"]


def test_doctor_says_why_a_kernel_does_not_run(monkeypatch):
    from seqlab.kernels.dispatch import Op
    from seqlab.tooling import doctor

    def load(op, name):
        raise NotImplementedError("needs a device of another kind\nand more")

    monkeypatch.setattr(Op, "load", load)
    monkeypatch.setattr(jax, "devices", lambda: (_ for _ in ()).throw(RuntimeError("no backend")))
    op = next(op for op in doctor.ops() if op.name == "scan")
    found = doctor._try(op, "xla")
    assert found == {"runs": False, "reason": "needs a device of another kind", "chosen": False}
    content = doctor.report(pathlib.Path("nowhere"))
    assert content["devices"] == {"error": "RuntimeError: no backend"}
    assert content["kernels"] == {}
    text = doctor.as_text(content | {"kernels": {"scan": {"xla": found}}})
    assert "  none: RuntimeError: no backend" in text
    assert "  scan xla: - needs a device of another kind" in text
