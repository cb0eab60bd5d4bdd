"""`seqlab cache-bench`: figures that can be computed otherwise too, resumable, never mixed up; refused before
work."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

import seqlab
import seqlab.cli.model
import seqlab.cli.train
from seqlab import cli
from seqlab.models.attention import with_cache
from seqlab.state import state_bytes
from seqlab.studies import cache_bench, gates
from seqlab.train.tasks import Quiz

pytestmark = pytest.mark.filterwarnings("default")  # grain and orbax warn as they please

CACHES = "full(64),sinks(2)+window(8)+in_place,full(64)+int4(group=8, residual=8)"
SIZES = ["--length", "64", "--rows", "2", "--items", "3", "--turns", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with one trained run."""
    folder = tmp_path_factory.mktemp("cache_bench")
    (folder / "corpus").mkdir()
    rng = np.random.default_rng(0)
    for i in range(6):
        (folder / "corpus" / f"{i}.txt").write_text(" ".join(rng.choice(["one", "two", "three"], 200)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for commands in (cli.model, cli.train):
            patch.setattr(commands, "enable_compile_cache", lambda: None)
        changes = ["data.paths=corpus", "data.length=16", "data.lead=True", "model.depth=2"]
        assert (
            cli.main(["train", "lm_attention", "--fiddler", "tiny", "--set", *changes, "--workdir", "run"])
            == 0
        )
    return folder


@pytest.fixture(autouse=True)
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    # the session's own is in use
    for commands in (cli.model, cli.train):
        monkeypatch.setattr(commands, "enable_compile_cache", lambda: None)


def test_figures_are_those_of_the_whole_sequence_at_once(capsys, monkeypatch):
    arguments = ["cache-bench", "run", "--caches", CACHES, *SIZES]
    assert cli.main(arguments) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["cache", "state", "bytes"] and "ppl to 16" in header
    record = json.loads(pathlib.Path("run/cache_bench/cache_bench.json").read_text())
    assert [row["cache"] for row in record["rows"]] == [
        "full(64)",
        "sinks(2)+window(8)+in_place",
        "full(64)+int4(group=8, residual=8)",
    ]
    assert record["edges"] == [0, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64]
    planned = cache_bench.plan("run", CACHES, length=64, rows=2, items=3, turns=2)
    tokens, targets = planned.streams["inputs"], planned.streams["targets"]
    assert tokens.shape == (2, 64) and not tokens[:, 0].any() and (tokens[:, 1:] == targets[:, :-1]).all()
    for row, line in zip(record["rows"], lines, strict=True):
        model = with_cache(seqlab.load("run").model, row["cache"])
        logits = np.asarray(model(jnp.asarray(tokens))[0], np.float64)
        top = logits.max(-1, keepdims=True)
        nats = (
            top
            + np.log(np.exp(logits - top).sum(-1, keepdims=True))
            - np.take_along_axis(logits, targets[..., None], 2)
        )[..., 0]
        expected = [nats[:, a:b].mean() for a, b in zip(record["edges"], record["edges"][1:], strict=False)]
        np.testing.assert_allclose(row["nats"], expected, rtol=1e-4)
        assert row["targets"] == [
            2 * (b - a) for a, b in zip(record["edges"], record["edges"][1:], strict=False)
        ]
        assert row["state_bytes"] == state_bytes(model) and row["tokens_per_second"] > 0
        assert (len(row["passkey"]), len(row["requests"]), len(row["turns"])) == (5, 2, 2)
        shown = line.removeprefix(row["cache"]).split()
        assert float(shown[4]) == pytest.approx(np.exp(nats[:, :16].mean()), rel=1e-4)
        assert float(shown[5]) == pytest.approx(np.exp(nats[:, 16:].mean()), rel=1e-4)
    assert pathlib.Path("run/cache_bench/cache_bench.png").read_bytes()[:4] == b"\x89PNG"
    assert "| full(64) |" in pathlib.Path("run/cache_bench/cache_bench.md").read_text()

    # again: what is there stays, what is missing is measured
    kept, _, gone = sorted(pathlib.Path("run/cache_bench/caches").iterdir())
    assert (kept.name, gone.name) == ("full_64.json", "sinks_2_window_8_in_place.json")
    before = kept.stat().st_mtime_ns
    gone.unlink()
    names = []
    row = cache_bench.Row(**record["rows"][1])
    monkeypatch.setattr(cache_bench, "measure", lambda name, *_: names.append(name) or row)
    assert cli.main([*arguments, "--json"]) == 0
    assert names == ["sinks(2)+window(8)+in_place"] and kept.stat().st_mtime_ns == before
    assert json.loads(capsys.readouterr().out) == record

    # other settings are another folder's
    assert cli.main([*arguments[:-1], "1"]) == 2
    assert (
        "run/cache_bench belongs to another bench (saved -> given):\n  context: 42 -> 28\n  turns: 2 -> 1"
        in capsys.readouterr().err
    )
    assert gone.exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--caches", "windo(8)"], "did you mean 'window'"),
        (["--caches", "full(63)"], "cache full(63) ends after 63 steps, and the longest stream has 64"),
        (["--caches", "full(64),full(64)"], "caches: duplicate entry"),
        (["--caches", "full(64)+int4"], "group must divide the 8 channels"),
        (["--caches", "duo(0.5)"], "needs gates, and none were fitted"),
        (["--caches", "duo(half)"], "must be duo(s)"),
        (["--rows", "500"], "500 streams of 64 steps are more than the"),
        (["--items", "0"], "items must be a positive integer, got 0"),
        (["--out", "corpus"], "corpus holds something else"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_work(arguments, message, capsys):
    before = sorted(pathlib.Path().rglob("*"))
    assert cli.main(["cache-bench", "run", *SIZES, "--out", "refused", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert sorted(pathlib.Path().rglob("*")) == before


def test_without_a_choice_everything_is_measured_that_fits_the_heads():
    layer = seqlab.load("run").model.backbone.blocks[0].mixer
    assert cache_bench.defaults(layer, 64, 256, duo=True) == [
        "full(256)",
        "full(256)+int8(group=8, residual=16)",
        "full(256)+int4(group=8, residual=16)",
        "window(8)",
        "sinks(4)+window(4)+absolute",
        "sinks(4)+window(4)",
        "sinks(4)+window(4)+int4(group=8, residual=16)",
        "duo(0.75)",
    ]
    planned = cache_bench.plan("run", length=64, rows=1, items=1, turns=2, out="unused")
    assert len(planned.policies) == 7 and planned.settings.context == 42


def test_questions_go_to_copies_or_to_one_conversation():
    """A reader that knows what it has read, but only the last bytes of it, in place of a model."""

    class Reader:
        def init_state(self, batch):
            return [b""] * batch

    def read(state, tokens, targets=None, remembers=66):
        rows = [before + bytes(row.astype(np.uint8)) for before, row in zip(state, tokens, strict=True)]
        right = np.zeros(tokens.shape, bool)
        if targets is not None:
            for i, (before, row) in enumerate(zip(state, tokens.astype(np.uint8), strict=True)):
                known = (before + bytes(row[:4]))[-remembers:]
                place = known.find(bytes(row[:4]))
                right[i] = place < len(known) - 4  # found somewhere before the question itself
        return None, right, rows

    context = b"......<ab=1><cd=2>" + b"." * 46
    questions, answers = [b"<cd=", b"<ab=", b"<cd="], [b"2>", b"1>", b"2>"]
    asked = Quiz(
        *(
            np.frombuffer(b"".join(x), np.uint8).reshape(1, *shape)
            for x, shape in zip(([context], questions, answers), ((64,), (3, 4), (3, 2)), strict=True)
        )
    )
    assert cache_bench.answered(read, Reader(), asked, copies=True) == [1.0, 1.0, 1.0]
    # Earlier questions are nearer.
    assert cache_bench.answered(read, Reader(), asked, copies=False) == [1.0, 0.0, 1.0]


def test_gates_are_fitted_once_and_make_a_cache(capsys):
    assert (
        cli.main(
            [
                "cache-bench",
                "run",
                "--fit-gates",
                "2",
                "--caches",
                "duo(0.5)",
                "--out",
                "refused",
                "--rows",
                "500",
            ]
        )
        == 2
    )
    fitted = gates.load("run", 4)
    assert (np.shape(fitted.alpha), fitted.sinks, fitted.window, fitted.length) == ((2, 2), 4, 8, 57)
    stamp = pathlib.Path("run/gates.json").stat().st_mtime_ns
    assert gates.fit("run", 2) == fitted and pathlib.Path("run/gates.json").stat().st_mtime_ns == stamp
    assert gates.load("run", 3) is None, "another checkpoint's"
    caches = gates.policies("duo(0.5)", fitted, capacity=64)
    assert len(caches) == 2 and {policy.span for policy in caches} <= {64, 12}
    with pytest.raises(ValueError, match=r"fitted otherwise \(saved -> given\):\n  steps: 2 -> 3"):
        gates.fit("run", 3)
