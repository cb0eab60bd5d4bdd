"""Block sizes: kernels take those that are chosen, files are for one device, and the tuner keeps what is
right and faster."""

import json

import jax
import numpy as np
import pytest
from helpers import assert_close, assert_identical

import seqlab
from seqlab import bench, cli, kernels
from seqlab.bench import cases, timing, tune
from seqlab.kernels import blocks, pallas
from seqlab.kernels.blocks import ANY, WIDEST, Row


def case_of(op, *shape, gradients=False):
    [(name, spec)] = cases.chosen_shapes(cases.op_named(op), list(shape)).items()
    return cases.make(cases.op_named(op), name, spec, gradients=gradients)


def asked(op, implementation, *shape, gradients=False):
    case = case_of(op, *shape, gradients=gradients)
    return blocks.asked_by(case.timed(implementation), (case.arguments, case.cotangents()))


def written(path, rows, **changes):
    path.write_text(
        json.dumps({"device": blocks.device(), "rows": [row._asdict() for row in rows], **changes})
    )
    return path


def test_the_table_is_for_kernels_that_there_are():
    for kernel, table in blocks.tables().items():
        op, implementation, _ = kernel.split("/")
        assert implementation in cases.op_named(op).implementations, kernel
        for widths in table.values():
            assert list(widths) == sorted(widths), kernel
            for sizes in widths.values():
                assert sizes.keys() <= {*tune.BOUNDS, "precision"}, kernel
                if implementation == "triton_gpu":
                    assert all(
                        value & (value - 1) == 0
                        for name, value in sizes.items()
                        if name not in ("stages", "precision")
                    ), sizes


def test_what_a_call_takes_its_blocks_from():
    with pallas.lowering():
        assert asked("attention", "pallas_tpu", "k=128", "t=4", "s=4") == [
            Row("attention/pallas_tpu/tile", ANY, 128, {"tile": 512})
        ]
        assert asked("attention", "pallas_tpu", "k=129", "t=4", "s=4")[0].blocks == {"tile": 256}
    assert asked("linear_attention", "xla", "gated_delta", "t=40") == [
        Row("linear_attention/xla/delta", ANY, WIDEST, {"chunk": 32})
    ]
    assert asked("linear_attention", "xla", "gated_delta", "t=40", "chunk=8") == []
    assert asked("dwt", "xla", "small") == []


def test_chosen_blocks_are_those_of_the_call():
    case, row = (
        case_of("linear_attention", "head_decay", "b=1", "t=40"),
        Row("linear_attention/xla/plain", ANY, WIDEST, {"chunk": 8}),
    )
    function = jax.jit(case.call("xla"))
    before = function(case.arguments)
    with seqlab.use_blocks([row]):  # the function is traced anew
        chosen = function(case.arguments)
        assert asked("linear_attention", "xla", "head_decay", "t=40") == [row]
    assert_identical(
        chosen,
        jax.jit(lambda a: kernels.linear_attention(**a, chunk=8, implementation="xla"))(case.arguments),
    )
    assert any(not np.array_equal(a, b) for a, b in zip(chosen, before, strict=True))
    assert_identical(function(case.arguments), before)


def test_an_interpreted_kernel_runs_in_the_chosen_blocks(monkeypatch):
    grids, call = [], pallas.call
    monkeypatch.setattr(
        pallas, "call", lambda *a, grid, **options: grids.append(grid) or call(*a, grid=grid, **options)
    )
    case = case_of("conv", "b=1", "t=40", "d=4")
    with pallas.interpreted(), seqlab.use_blocks([Row("conv/pallas_tpu/tile", ANY, WIDEST, {"steps": 16})]):
        values = jax.jit(case.call("pallas_tpu"))(case.arguments)
    assert grids == [(1, 1, 3)]
    assert_close(values, bench.truth(case)[1], case.allowed[0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"device": "abacus"},
            "was measured on abacus, and this is .*: `seqlab bench OP --tune` measures here",
        ),
        (
            {"rows": [("attention/triton_gpu/foward", 2, 64, {})]},
            "did you mean 'attention/triton_gpu/forward'",
        ),
        (
            {"rows": [("attention/triton_gpu/forward", 2, 96, {})]},
            "has rows for bytes=2 width=64, .*, got bytes=2 width=96",
        ),
        ({"rows": [("attention/triton_gpu/forward", 2, 64, {"row": 16})]}, "did you mean 'rows'"),
        (
            {"rows": [("attention/triton_gpu/forward", 2, 64, {"rows": "16"})]},
            "rows: got '16', expected something like 128",
        ),
        ({"rows": [("attention/triton_gpu/forward", 2, 64, {"rows": 0})]}, "rows: got 0"),
    ],
)
def test_a_file_that_is_not_for_this_device_or_no_kernel_is_refused(content, message, tmp_path):
    rows = [Row(*row) for row in content.pop("rows", [])]
    with (
        pytest.raises(ValueError, match=message),
        seqlab.use_blocks(written(tmp_path / "blocks.json", rows, **content)),
    ):
        pass


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"rows": []}',
        '{"device": "", "rows": [{"kernel": "scan/xla/chunk"}]}',
        '{"device": "", "rows": 3}',
    ],
)
def test_a_file_that_the_tuner_has_not_written_is_refused(text, tmp_path):
    (tmp_path / "blocks.json").write_text(text)
    with pytest.raises(
        ValueError, match=r"blocks.json: expected what `seqlab bench OP --tune FILE` writes, got \w+Error: "
    ):
        blocks.load(tmp_path / "blocks.json")


def test_the_environment_names_a_file_for_a_process(tmp_path, monkeypatch):
    row = Row("scan/xla/chunk", ANY, WIDEST, {"steps": 16})
    monkeypatch.setenv("SEQLAB_BLOCKS", str(written(tmp_path / "blocks.json", [row])))
    assert asked("scan", "xla", "t=40") == [row]
    with seqlab.use_blocks([]):  # the code has the last word
        assert asked("scan", "xla", "t=40")[0].blocks == {"steps": 64}
    written(tmp_path / "other.json", [row], device="abacus")
    monkeypatch.setenv("SEQLAB_BLOCKS", str(tmp_path / "other.json"))
    with pytest.raises(ValueError, match="was measured on abacus"):
        asked("scan", "xla", "t=40")


@pytest.fixture
def clock(monkeypatch):
    """A machine on which tiles of 16 steps are best, 128 do not compile, and 8 are fastest of all, and
    wrong."""

    def repeated(function, arguments):
        [row] = blocks.asked_by(function, arguments)
        steps = row.blocks["steps"]
        if steps == 128:
            raise RuntimeError("out of shared memory\nat great length")
        result = jax.jit(function)(arguments)
        return timing.Program(
            None, jax.tree.map(lambda x: x * 1.01, result) if steps == 8 else result, 0.0, lambda: steps / 16
        )

    monkeypatch.setattr(timing, "repeated", repeated)


def test_the_tuner_keeps_what_is_right_and_faster(clock):
    [found] = tune.tune(bench.plan("scan", ["xla"], ["b=1", "t=70", "e=4", "n=2"]), rounds=1)
    assert found.row == Row("scan/xla/chunk", ANY, WIDEST, {"steps": 16}) and (
        found.seconds,
        found.before,
    ) == (1.0, 4.0)
    tried = {trial.row.blocks["steps"]: trial for trial in found.trials}
    assert tried.keys() == {128, 32, 16, 8}
    assert tried[128].why == "RuntimeError: out of shared memory" and tried[128].seconds is None
    assert (tried[32].seconds, tried[32].best_seconds) == (2.0, 4.0) and (
        tried[16].seconds,
        tried[16].best_seconds,
    ) == (1.0, 2.0)
    assert tried[8].why.startswith("wrong: [0] differs by 1.0e-02, allowed")


@pytest.mark.slow
def test_the_tuner_of_an_interpreted_kernel(clock):
    case = case_of("conv", "b=1", "t=20", "d=4")
    planned = bench.Plan([case], [["pallas_tpu"]], [{}], False)
    with pallas.interpreted(), seqlab.use_blocks([]):
        row = Row("conv/pallas_tpu/tile", ANY, WIDEST, {"steps": 32, "channels": 512})
        inputs = (case.arguments, case.cotangents())
        found = tune._climb(case, planned.contestants[0][0], inputs, bench.truth(case)[1], [], row, 1)
    assert found.row.blocks["steps"] == 16 and {
        trial.row.blocks["steps"] for trial in found.trials if trial.why
    } == {8}


def test_what_the_command_finds_is_what_kernels_take(clock, capsys, tmp_path):
    file = tmp_path / "found.json"
    words = [
        "bench",
        "scan",
        "--impl",
        "xla",
        "--shape",
        "b=1",
        "t=70",
        "e=4",
        "n=2",
        "--rounds",
        "1",
        "--tune",
        str(file),
    ]
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    assert (
        "scan/xla/chunk (any number, any width): steps=16\n  1 s, 4 s before; 2 other sizes tried, 2 left out"
        in printed
    )
    content = json.loads(file.read_text())
    assert content["device"] == blocks.device() and content["jax"] == jax.__version__
    assert content["rows"][0]["shape"] == "b=1 t=70 e=4 n=2" and len(content["rows"][0]["trials"]) == 4
    with seqlab.use_blocks(file):
        assert asked("scan", "xla", "t=40")[0].blocks == {"steps": 16}


def test_tuning_needs_blocks_and_times(capsys, tmp_path):
    assert (
        cli.main(
            ["bench", "dwt", "--shape", "small", "b=1", "--impl", "xla", "--tune", str(tmp_path / "x.json")]
        )
        == 2
    )
    assert "dwt has no block sizes that xla takes at this shape" in capsys.readouterr().err
    words = [
        "bench",
        "conv",
        "--shape",
        "b=1",
        "t=9",
        "d=4",
        "--impl",
        "pallas_tpu",
        "--interpret",
        "--tune",
        str(tmp_path / "x.json"),
    ]
    assert cli.main(words) == 2
    assert (
        "--tune needs times, and --interpret has none" in capsys.readouterr().err
        and not (tmp_path / "x.json").exists()
    )


def test_sizes_are_changed_one_at_a_time_and_within_bounds():
    row = Row(
        "attention/triton_gpu/forward",
        4,
        128,
        {"rows": 32, "keys": 16, "warps": 16, "stages": 1, "precision": "ieee"},
    )
    changed = [
        {name: size for name, size in other.blocks.items() if row.blocks[name] != size}
        for other in tune.neighbours(row)
    ]
    assert changed == [{"rows": 64}, {"rows": 16}, {"keys": 32}, {"warps": 8}, {"stages": 2}]
