"""The bench: right first, then fast; and its clock counts every call."""

import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqlab import bench, cli
from seqlab.bench import cases, peers, timing
from seqlab.kernels.blocks import device


@pytest.fixture
def quick(monkeypatch):
    """Measurements that are too short to mean anything."""
    monkeypatch.setattr(timing, "LEAST", 1e-6)
    monkeypatch.setattr(timing, "ceilings", lambda dtype, rounds: timing.Ceilings(1e9, 1e12))


def seqlab(*words):
    return cli.main(["bench", *words])


def test_every_contestant_is_right_and_then_timed(quick, capsys, tmp_path):
    assert (
        seqlab(
            "conv",
            "--shape",
            "b=1",
            "t=9",
            "d=4",
            "--backward",
            "--rounds",
            "2",
            "--json",
            str(tmp_path / "found.json"),
        )
        == 0
    )
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["platform"] == "cpu" and found["jax"] == jax.__version__ and found["device"] == device()
    forward, both = found["cases"]
    assert (forward["gradients"], both["gradients"], both["truth"]) == (False, True, "reference in float64")
    assert forward["bytes"] == 4 * (2 * 9 * 4 + 4 * 4 + 4 + 3 * 4)  # x, y, weight, bias and the final state
    assert forward["flops"] == 2 * 4 * 9 * 4 and both["flops"] == 3 * forward["flops"]
    for case in found["cases"]:
        first, reference, other = case["contestants"]
        assert (first["name"], reference["name"], other["name"]) == (
            "xla",
            "reference",
            "lax.conv_general_dilated",
        )
        assert max(first["error"], reference["error"]) < min(case["allowed"]) and first["ratio"] == 1.0
        assert other["ratio"] == other["seconds"] / first["seconds"]
        assert first["copy_share"] == pytest.approx(case["bytes"] / first["seconds"] / 1e9)
        assert case["left_out"]["triton_gpu"] == "needs a GPU; JAX runs on cpu here"
    assert "without pallas_tpu: compiled for TPUs" in capsys.readouterr().out


def test_what_is_wrong_gets_no_time(quick, capsys, monkeypatch, tmp_path):
    xla = importlib.import_module("seqlab.kernels.conv.xla")
    right = xla.conv
    monkeypatch.setattr(xla, "conv", lambda *a: (right(*a)[0].at[0, 3, 1].mul(1.001), right(*a)[1]))
    assert (
        seqlab(
            "conv", "--shape", "b=1", "t=9", "d=5", "--rounds", "1", "--json", str(tmp_path / "found.json")
        )
        == 1
    )
    printed = capsys.readouterr().out
    assert "xla is WRONG, so it gets no time: [0] differs by" in printed
    xla, *others = json.loads((tmp_path / "found.json").read_text())["cases"][0]["contestants"]
    assert (
        xla["seconds"] is None
        and "ratio" not in xla
        and all(row["seconds"] and row["ratio"] is None for row in others)
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["skan"], "did you mean 'scan'?"),
        (["scan", "--impl", "xlla"], "did you mean 'xla'?"),
        (
            ["scan", "--impl", "triton_gpu"],
            "scan triton_gpu does not run here: needs a GPU; JAX runs on cpu here",
        ),
        (
            ["scan", "--impl", "pallas_tpu"],
            "compiled for TPUs, and the platform here is cpu; --interpret simulates it",
        ),
        (["scan", "--shape", "row"], "did you mean 'rows'?"),
        (["scan", "--shape", "T=3"], "field of a shape of scan: got 'T'"),
        (["scan", "--shape", "t=-3"], "--shape t: got '-3', expected int"),
        (["scan", "--shape", "reset=1"], "--shape reset: got '1', expected bool"),
        (["scan", "--dtype", "bf16"], "did you mean 'bfloat16'?"),
        (["decode_attention", "--backward"], "decode_attention has no gradient"),
        (["scan", "--rounds", "0"], "--rounds must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_is_said_before_any_work(words, message, capsys, monkeypatch):
    monkeypatch.setattr(timing, "compiled", None)
    shape = [] if "--shape" in words else ["--shape", "t=4"]
    assert seqlab(*words, *shape) == 2
    assert message in capsys.readouterr().err


def test_a_simulation_is_right_or_wrong_and_never_fast(capsys, monkeypatch):
    monkeypatch.setattr(timing, "race", None)
    assert (
        seqlab(
            "conv",
            "--shape",
            "b=1",
            "t=9",
            "d=4",
            "--interpret",
            "--impl",
            "pallas_tpu",
            "--dtype",
            "bfloat16",
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert (
        "interpreted: no time, for a simulation has none" in printed
        and "ms" not in printed
        and "x " not in printed
    )


def test_every_call_of_a_loop_is_computed():
    """XLA takes what does not change out of loops: here everything would."""
    calls = []

    def host(x):
        calls.append(x.copy())
        return x * 2

    def function(arguments):
        return jax.pure_callback(host, jax.ShapeDtypeStruct((3,), jnp.float32), arguments["x"]), arguments[
            "flag"
        ]

    arguments = {"x": jnp.arange(3.0), "flag": jnp.array([True, False])}
    results = (jnp.full(3, jnp.nan), jnp.array([False, False]))
    out, flag = timing._looped(function, arguments, results, 7)(arguments)
    # Compiled programs are called once before.
    assert len(calls) == 2 * 7 and all(np.array_equal(x, [0, 1, 2]) for x in calls)
    assert out.tolist() == [0, 2, 4] and flag.tolist() == [True, False]
    same = timing._looped(None, arguments, results, 7)(arguments)
    assert np.isnan(same[0]).all() and len(calls) == 2 * 7


def test_times_are_medians_and_contestants_take_turns():
    order, times = [], {"a": iter([1.0, 9.0, 3.0]), "b": iter([5.0, 5.0, 2.0])}

    def contestant(name):
        def measure():
            order.append(name)
            return next(times[name])

        return measure

    assert timing.race({name: contestant(name) for name in "ab"}, 3) == {"a": 3.0, "b": 5.0}
    assert order == ["a", "b"] * 3


@pytest.mark.slow
def test_the_ceilings_are_those_of_this_machine():
    found = timing.ceilings("float32", 1)
    assert 1e8 < found.bytes < 1e13 and 1e9 < found.flops < 1e15


def test_where_the_definition_is_too_large_the_chunks_are_the_truth(monkeypatch):
    [(name, spec)] = cases.chosen_shapes(cases.op_named("conv"), ["b=1", "t=9", "d=4"]).items()
    case = cases.make(cases.op_named("conv"), name, spec)
    source, values = bench.truth(case)
    monkeypatch.setattr(cases, "_DENSE", 0)
    other, again = bench.truth(case)
    assert (source, other) == ("reference in float64", "xla in float64") and values[0].dtype == again[
        0
    ].dtype == np.float64
    np.testing.assert_allclose(values[0], again[0], rtol=1e-12)
    assert (
        bench._contestants(case, [], False)[1]["reference"]
        == "it would take too much memory; --impl reference insists"
    )


def test_a_peer_that_computes_something_else_is_left_out(quick, monkeypatch):
    planned = bench.plan("conv", ["xla"], ["b=1", "t=9", "d=4"])
    half = peers._in_jax(lambda a: a["x"] / 2)
    monkeypatch.setattr(peers, "of", lambda case: {"half": half, "nobody": lambda *_: {}["nobody"]})
    [outcome] = bench.run(planned, 1)
    assert [result.name for result in outcome.results] == ["xla"]
    assert outcome.left_out["half"].startswith("computes something else: its output differs by")
    assert outcome.left_out["nobody"] == "KeyError: 'nobody'"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("op", "shape", "others"),
    [
        ("attention", ["train_512", "t=33", "s=33", "b=1"], {"jax.nn.dot_product_attention"}),
        ("attention", ["decode_4096", "s=65"], {"jax.nn.dot_product_attention"}),
        ("block_attention", ["t=33", "n=4", "block=8", "h=2", "g=2"], set()),
        ("decode_attention", ["b=1", "s=64", "h=2", "g=1", "k=32", "v=32"], {"a cache of numbers"}),
        ("dwt", ["small", "b=2"], set()),
        ("linear_attention", ["gated_delta", "b=1", "t=40"], set()),
        ("lmu", ["rows", "b=1", "t=40"], set()),
        ("scan", ["rows", "b=1", "t=40", "e=16"], set()),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_op_is_right_here_with_its_peers(op, shape, others, dtype, quick):
    for outcome in bench.run(bench.plan(op, [], shape, dtype, cases.has_gradients(op)), 1):
        assert [result.wrong for result in outcome.results] == [""] * len(outcome.results), outcome
        assert {result.name for result in outcome.results} >= others | {"xla", "reference"}
        assert all(result.seconds > 0 for result in outcome.results)
        shares = {row["name"]: row.get("copy_share", 0.0) > 0 for row in bench.record(outcome)["contestants"]}
        # This moves more bytes than the case.
        assert shares == {name: name != "a cache of numbers" for name in shares}


@pytest.mark.slow
@pytest.mark.parametrize("time", [40, 600])
@pytest.mark.parametrize(
    ("op", "shape"),
    [("attention", ["k=16", "v=16"]), ("conv", ["d=8"]), ("linear_attention", []), ("scan", ["e=8"])],
)
def test_interpreted_gradients_in_bfloat16_err_as_the_length_of_their_sums_allows(op, shape, time):
    words = ["b=1", f"t={time}", *[f"s={time}"] * (op == "attention"), *shape]
    [outcome] = list(
        bench.run(bench.plan(op, ["pallas_tpu", "xla"], words, "bfloat16", backward=True, interpret=True), 1)
    )[1:]
    assert [result.wrong for result in outcome.results] == ["", ""] and all(
        1e-4 < result.error < 0.02 for result in outcome.results
    )
