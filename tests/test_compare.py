"""`seqlab compare`: several models on one task and one budget, resumable, never mixed up; one table and one
figure."""

import json
import pathlib

import pytest

import seqlab
import seqlab.cli.model
import seqlab.cli.train
from seqlab import cli
from seqlab.module import count_params
from seqlab.state import state_bytes
from seqlab.studies import compare, report
from seqlab.train import config, loop

pytestmark = pytest.mark.filterwarnings("default")  # grain and orbax warn as they please

TINY = ["--fiddler", "tiny", "--steps", "4", "--workdir", "out"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder that the tests of this file fill one after the other."""
    return tmp_path_factory.mktemp("compare")


@pytest.fixture(autouse=True)
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    # the session's own is in use
    for commands in (cli.model, cli.train):
        monkeypatch.setattr(commands, "enable_compile_cache", lambda: None)


def test_mixers_of_one_config_are_trained_and_measured(capsys, monkeypatch):
    # stopped in the second run, then continued by the same command
    arguments = [
        "compare",
        "mqar",
        "--mixers",
        "mamba(state_size=2, expand=1),attention(heads=2)",
        *TINY,
        "--set",
        "data.vocab_size=24",
    ]
    original, stops = compare.run, iter((False, True))

    def stopped(experiment, workdir, cfg):
        return loop.Result("SIGTERM", 0, None, None) if next(stops) else original(experiment, workdir, cfg)

    with monkeypatch.context() as patch:
        patch.setattr(compare, "run", stopped)
        assert cli.main(arguments) == 143
    assert capsys.readouterr().out == ""
    first = pathlib.Path("out/mamba_state_size=2_expand=1")
    saved = {path: path.stat().st_mtime_ns for path in (first / "checkpoints").rglob("*")}
    assert cli.main(arguments) == 0
    printed = capsys.readouterr()
    assert {path: path.stat().st_mtime_ns for path in (first / "checkpoints").rglob("*")} == saved, (
        "a finished run is left alone"
    )
    assert "is complete: 4 steps" in printed.err

    header, *lines = printed.out.splitlines()
    assert header.split("  ")[0] == "name" and header.endswith("accuracy (higher is better)")
    assert [line.split("  ")[0] for line in lines] == ["mamba(state_size=2, expand=1)", "attention(heads=2)"]
    record = json.loads(pathlib.Path("out/compare.json").read_text())
    assert record["quality"] == {"name": "accuracy", "words": "accuracy", "better": "higher"}
    assert (record["steps"], record["batch_size"]) == (4, 4)
    for row, workdir in zip(record["rows"], (first, "out/attention_heads=2"), strict=True):
        model = seqlab.load(workdir).model
        assert (row["step"], row["parameters"], row["state_bytes"]) == (
            4,
            count_params(model),
            state_bytes(model),
        )
        assert row["train_tokens_per_second"] > 0 and row["stream_tokens_per_second"] > 0
        logged = [
            json.loads(line) for line in pathlib.Path(workdir, "metrics.jsonl").read_text().splitlines()
        ]
        assert row["quality"] == logged[-1]["validation_accuracy"]
    assert record["rows"][0]["state_bytes"] == 4 * 16 * (2 + 3)
    assert record["rows"][1]["state_bytes"] >= 4 * 2 * 16 * 32, "all keys and values of 32 steps"
    assert pathlib.Path("out/compare.png").read_bytes()[:4] == b"\x89PNG"
    assert "| name | parameters |" in pathlib.Path("out/compare.md").read_text()


def test_a_model_of_numbers_is_measured_step_by_step(capsys):
    assert (
        cli.main(
            [
                "compare",
                "digits",
                "--json",
                "--fiddler",
                "tiny",
                "--set",
                "steps=2",
                "model.mixers[0].state_size=2",
            ]
        )
        == 0
    )
    record = json.loads(capsys.readouterr().out)
    assert record["workdir"] == "runs/compare_digits"
    (row,) = record["rows"]
    assert row["name"] == "digits" and row["stream_tokens_per_second"] > 0 and 0 <= row["quality"] <= 1
    assert cli.main(["stream", "runs/compare_digits/digits"]) == 2
    assert "is a model of numbers, not of tokens" in capsys.readouterr().err
    assert cli.main(["eval", "runs/compare_digits/digits"]) == 0
    assert "step 2: accuracy 0." in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["mqar", "induction"],
            "mqar and induction cannot be compared, since not only their models differ:\n  data: ",
        ),
        (["mqar", "mqar"], "duplicate candidate 'mqar'"),
        (["mqar", "--mixers", "mambo"], "'mambo' is no module of seqlab.models; did you mean 'Mamba'"),
        (["mqar", "--mixers", "mamba,,attention"], "mixers: expected names with commas between them"),
        (["mqar", "--mixers", "mamba", "--steps", "0"], "steps must be a positive integer, got 0"),
        (["mqar", "--set", "batch_size=99999"], "too little data"),
        (["mqar", "--mixers", "rwkv,attention(heads=2)", "--fiddler", "tiny"], "'rwkv' is no module"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_work(arguments, message, capsys):
    assert cli.main(["compare", *arguments, "--workdir", "refused"]) == 2
    assert message in capsys.readouterr().err
    assert not pathlib.Path("refused").exists()


def test_a_folder_of_another_comparison_is_refused(capsys):
    before = sorted(pathlib.Path("out").rglob("*"))
    assert (
        cli.main(
            [
                "compare",
                "mqar",
                "--mixers",
                "swiglu,attention(heads=2)",
                *TINY,
                "--set",
                "data.vocab_size=24",
                "seed=5",
            ]
        )
        == 2
    )
    assert (
        "out/attention_heads=2 belongs to another config (saved -> given):\n  seed: 0 -> 5"
        in capsys.readouterr().err
    )
    assert sorted(pathlib.Path("out").rglob("*")) == before


def test_a_run_that_diverges_is_a_row_that_says_so(folder, monkeypatch):
    cfgs = compare.plan(
        ["mqar"], "attention(heads=2),mamba(state_size=2, expand=1)", ["tiny"], 4, ["data.vocab_size=24"]
    )
    original = compare.run

    def diverging(experiment, workdir, cfg):
        if "attention" in workdir.name:
            raise loop.NonFiniteError("step 3: loss inf")
        return original(experiment, workdir, cfg)

    monkeypatch.setattr(compare, "run", diverging)
    lost, sound = compare.compare(cfgs, folder / "out").rows
    assert (lost.quality, lost.diverged, lost.state_bytes) == (None, "step 3: loss inf", None)
    assert lost.parameters > 0 and sound.diverged is None and 0 <= sound.quality <= 1
    assert json.loads((folder / "out/compare.json").read_text())["rows"][0]["diverged"] == "step 3: loss inf"
    assert "| diverged |" in (folder / "out/compare.md").read_text()


def test_a_plan_is_configs_and_nothing_more():
    names = list(compare.plan(["lm_mamba", "lm_gated_delta"], fiddlers=["tiny"]))
    assert names == ["lm_mamba", "lm_gated_delta"]
    both = compare.plan(
        ["lm_mamba", "lm_gated_delta"],
        "mamba(state_size=4, expand=1),attention",
        ["width(32)"],
        7,
        ["data.length=64"],
    )
    assert list(both) == [
        f"{name} {mixer}"
        for name in ("lm_mamba", "lm_gated_delta")
        for mixer in ("mamba(state_size=4, expand=1)", "attention")
    ]
    for cfg in both.values():
        assert (cfg.steps, cfg.data.length, cfg.model.dim) == (7, 64, 32)
    assert both["lm_mamba attention"].model.mixers.cache.capacity == 256
    different = config.override(config.load("lm_mamba"), "optimizer.peak=0.1")
    assert config.diff(config.load("lm_mamba"), different) == ["optimizer.peak: 0.003 -> 0.1"]


def test_tables():
    rows = [
        compare.Row("a", "x/a", 5, 1234, 64, 10.4, 2000.0, 0.5),
        compare.Row("bcd", "x/bcd", 5, 7, None, 1.0, None, 0.25),
    ]
    result = compare.Comparison("finished", compare.Quality("mse", "squared error", "lower"), rows)
    assert report.as_text(compare.as_table(result)).splitlines() == [
        "name  parameters  state bytes  train tokens/s  stream tokens/s  squared error (lower is better)",
        "a          1,234           64              10            2,000                           0.5000",
        "bcd            7            -               1                -                           0.2500",
    ]
    assert report.as_markdown(compare.as_table(result)).splitlines()[1:3] == [
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| a | 1,234 | 64 | 10 | 2,000 | 0.5000 |",
    ]
