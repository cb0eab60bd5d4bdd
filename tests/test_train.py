"""Training: the loss falls, parts of a batch add up, divergence changes nothing, and an interrupted run is
the uninterrupted one."""

import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys

import damage
import jax
import jax.numpy as jnp
import kills
import numpy as np
import optax
import pytest
import zoo
from flax import nnx
from helpers import assert_close, assert_identical

from seqlab import ByteTokenizer, split
from seqlab.models import LanguageModel
from seqlab.train import config
from seqlab.train.data import ArraySource
from seqlab.train.experiment import Experiment
from seqlab.train.folder import BusyError, claimed, locate
from seqlab.train.loop import Interruptions, NonFiniteError, run
from seqlab.train.memory import OutOfMemoryError, explained
from seqlab.train.metrics import Metrics
from seqlab.train.optim import adamw, decayed, schedule
from seqlab.train.packing import pack
from seqlab.train.quality import quality_of
from seqlab.train.step import TrainState, init_state, next_token_loss, train_step

pytestmark = pytest.mark.filterwarnings("default")  # grain and orbax warn as they please


@dataclasses.dataclass
class Text:
    """A few documents of a text that can be learnt."""

    tokenizer = ByteTokenizer()

    def train(self, seed):
        return self._windows(range(20), seed)

    def validation(self):
        return self._windows(range(20, 24), 0)

    def _windows(self, which, seed):
        rng = np.random.default_rng(0)
        documents = [np.frombuffer(b"one law " * int(rng.integers(4, 20)), np.uint8) for _ in range(24)]
        return pack(ArraySource([documents[i] for i in which]), 32, seed)


# For what does not depend on the model: compiled in no time.
TINY = functools.partial(LanguageModel, 256, 16, 1, zoo.MIXERS["pooling"], channel_mixer=None)


def experiment(model=None, **options):
    model = model or functools.partial(
        LanguageModel, 256, 16, 2, (zoo.MIXERS["gated_linear_conv"], zoo.MIXERS["window"])
    )
    defaults = {
        "steps": 30,
        "batch_size": 8,
        "log_every": 5,
        "validate_every": 30,
        "checkpoint_every": 7,
        "validation_windows": 16,
    }
    return Experiment(model, Text(), functools.partial(adamw, peak=1e-2, warmup=3), **defaults | options)


@functools.cache
def uninterrupted(tmp):
    return run(experiment(), tmp)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return uninterrupted(folder), folder


def test_a_run_learns_and_leaves_what_it_promises(finished):
    result, folder = finished
    assert result.status == "finished" and result.step == 30
    assert result.validation < 4.0  # bits a byte; 8 before training
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    assert sorted(losses) == [5, 7, 10, 14, 15, 20, 21, 25, 28, 30]
    assert losses[30] < 0.6 * losses[5]
    assert rows[-1] == {"step": 30, "validation_bits_per_token": result.validation}
    assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert list(folder.glob("events.out.tfevents.*"))
    starts = [json.loads(line) for line in (folder / "env.jsonl").read_text().splitlines()]
    assert starts and all(start["versions"]["jax"] == jax.__version__ for start in starts)


def test_an_interrupted_run_ends_bit_identical(finished, tmp_path, monkeypatch):
    """Twice by SIGTERM between steps, resumed by the same call; the second time from a checkpoint of the
    resumed run."""
    for at in (9, 17):
        from seqlab.train import loop

        original, count = loop.Progress.advance, iter(range(1, 100))

        def advance(self, step, original=original, at=at, count=count):
            next(count)
            original(self, step)
            if step == at:
                os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(loop.Progress, "advance", advance)
        stopped = run(experiment(), tmp_path)
        assert (stopped.status, stopped.step) == ("SIGTERM", at)
        monkeypatch.undo()
    result = run(experiment(), tmp_path)
    assert_identical(result.state, finished[0].state)
    read = lambda folder: {  # noqa: E731
        (row["step"], row["loss"])
        for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        if "loss" in row
    }
    assert dict(read(finished[1]))[30] == dict(read(tmp_path))[30]


def test_a_run_does_not_go_on_with_other_data(finished):
    changed = experiment()
    changed.data._windows = lambda which, seed: pack(ArraySource([np.arange(400) % 7]), 32, seed)
    with pytest.raises(ValueError, match="begun on other data"):
        run(changed, finished[1])


def test_a_finished_run_is_left_alone(finished):
    before = sorted((path, path.stat().st_mtime_ns) for path in (finished[1] / "checkpoints").rglob("*"))
    assert run(experiment(), finished[1]).step == 30
    assert before == sorted(
        (path, path.stat().st_mtime_ns) for path in (finished[1] / "checkpoints").rglob("*")
    )


def small_step(accumulate=1, loss=next_token_loss):
    static, params = split(LanguageModel(31, 16, 1, zoo.MIXERS["pooling"], rngs=nnx.Rngs(0)))
    optimizer = adamw(10, peak=1e-2, warmup=0)
    state = init_state(static, params, optimizer)
    return jax.jit(functools.partial(train_step, static, optimizer, loss, accumulate)), state


def batch(seed=0, rows=8, length=12):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 31, (rows, length + 1)).astype(np.int32)
    # Unequal weights, so that a mean of means would be wrong.
    valid = np.arange(length)[None] < rng.integers(3, length, (rows, 1))
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "valid": valid,
        "reset": rng.random((rows, length)) < 0.1,
    }


@pytest.mark.parametrize("accumulate", [8])
def test_accumulated_parts_are_the_big_batch(accumulate):
    whole, state = small_step()
    parts, _ = small_step(accumulate)
    for seed in range(2):
        expected, figures = whole(state, batch(seed))
        actual, same = parts(state, batch(seed))
        assert_close(same, figures, 2e-5)
        # Adam divides by the gradient's own size: compare what it was given, its first moments.
        assert_close(jax.tree.leaves(actual.optimizer), jax.tree.leaves(expected.optimizer), 1e-4)


def test_a_batch_that_is_not_finite_changes_nothing():
    def poisoned(model, data):
        total, count = next_token_loss(model, data)
        return total * jnp.where(data["inputs"][0, 0] == 1, jnp.nan, 1.0), count

    step, state = small_step(loss=poisoned)
    bad, good = batch(), batch()
    bad["inputs"][0, 0], good["inputs"][0, 0] = 1, 2
    after, figures = step(state, bad)
    assert not figures.finite and not np.isfinite(figures.loss)
    assert_identical(after, state)
    after, figures = step(state, good)
    assert figures.finite and after.step == 1


def test_a_run_that_diverges_stops_with_the_step_and_keeps_the_good_checkpoint(tmp_path):
    def spoilt(model, data, bad=b"o"[0]):
        total, count = next_token_loss(model, data)
        # Once it has moved far enough.
        return total + jnp.where(jnp.mean(model.embedding.weight[...] ** 2) > 5e-4, jnp.inf, 0.0), count

    with pytest.raises(
        NonFiniteError, match=r"step (\d+): loss inf.*last good checkpoint is step \d+"
    ) as error:
        run(experiment(TINY, loss=spoilt, checkpoint_every=2, log_every=1), tmp_path)
    at = int(str(error.value).split()[1].rstrip(":"))
    saved = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit())
    assert saved and saved[-1] < at


@pytest.mark.parametrize("what", ["validation", "checkpoint", "parameters"])
def test_what_is_not_finite_is_no_checkpoint_to_go_back_to(what, tmp_path, monkeypatch):
    """Loss and gradient of step 4 are finite; what it makes of the parameters is not worth saving."""
    from seqlab.train import loop, step

    def judged_nan(model, data):
        total, count = next_token_loss(model, data)
        return jnp.where(jnp.mean(model.embedding.weight[...] ** 2) > 4.1e-4, jnp.nan, total), count

    every = {"validation": 1, "checkpoint": 30, "parameters": 30}[what]
    tried = experiment(TINY, metric=judged_nan, validate_every=every, checkpoint_every=1, log_every=1)
    if what == "parameters":
        tried = experiment(TINY, checkpoint_every=1, log_every=1)
        finite = step.all_finite
        monkeypatch.setattr(
            loop,
            "all_finite",
            lambda params: finite(params) & (jnp.mean(params["embedding.weight"] ** 2) < 4.1e-4),
        )
    with pytest.raises(
        NonFiniteError, match=r"step \d+: (nan on the held-out|parameters).*--extend"
    ) as error:
        run(tried, tmp_path)
    at = int(str(error.value).split()[1].rstrip(":"))
    assert f"last good checkpoint is step {at - 1} " in str(error.value) and at > 1
    assert max(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == at - 1
    if what == "validation":
        assert rows_of(tmp_path)[-1] == {"step": at, "validation_judged_nan": "nan"}


def test_a_validation_that_an_interruption_has_left_out_is_made_up_for(tmp_path, monkeypatch):
    from seqlab.train import loop

    original = loop.Progress.advance

    def advance(self, step):
        original(self, step)
        if step == 10:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop.Progress, "advance", advance)
    small = {"steps": 12, "validate_every": 5, "log_every": 1}
    assert run(experiment(TINY, **small), tmp_path).status == "SIGTERM"
    assert [row["step"] for row in rows_of(tmp_path) if len(row) == 2] == [5]
    monkeypatch.undo()
    run(experiment(TINY, **small), tmp_path)
    assert [row["step"] for row in rows_of(tmp_path) if len(row) == 2] == [5, 10, 12]


def test_schedule_and_decay():
    rate = schedule(100, peak=1.0, final=0.1, warmup=10)
    np.testing.assert_allclose(
        [rate(0), rate(5), rate(10), rate(55), rate(100)], [0, 0.5, 1, 0.55, 0.1], atol=1e-6
    )
    params = split(zoo.model("lm_hybrid"))[1]
    spared = {name for name, acts in decayed(params).items() if not acts}
    assert {
        "backbone.norm.weight",
        "backbone.blocks.0.mixer.A_log",
        "backbone.blocks.0.mixer.dt_proj.bias",
    } <= spared
    assert (
        not {
            "embedding.weight",
            "backbone.blocks.1.mixer.qkv.weight",
            "backbone.blocks.0.mixer.x_proj.weight",
        }
        & spared
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, "steps must be a positive integer"),
        ({"batch_size": 6, "accumulate": 4}, "accumulate must divide"),
        ({"keep": True}, "keep"),
    ],
)
def test_bad_experiments_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        experiment(**options)


def test_train_state_survives_the_checkpoint_form():
    from seqlab.train.loop import _from_dict, _to_dict

    _, params = split(zoo.model("lm_mamba"))
    state = TrainState(jnp.asarray(3), params, optax.adamw(1e-3).init(params))
    assert_identical(_from_dict(_to_dict(state), state), state)


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_one_run_at_a_time_trains_in_a_folder(tmp_path):
    with (
        claimed(tmp_path),
        pytest.raises(BusyError, match=rf"{tmp_path}: another run .*process {os.getpid()} on"),
    ):
        run(experiment(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]
    # A killed process leaves no lock, though a child of it lives on.
    code = """
import os, pathlib, sys, time
from seqlab.train.folder import claimed
with claimed(pathlib.Path(sys.argv[1])):
    if not os.fork():
        print("in", flush=True)  # the child: by now it has let go
    time.sleep(60)
"""
    held = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        assert held.stdout.readline() == b"in\n"
        with pytest.raises(BusyError, match=f"process {held.pid} on"), claimed(tmp_path):
            pass
        held.kill()
        held.wait()
        with claimed(tmp_path):
            os.killpg(held.pid, 0)  # the child is there
    finally:
        os.killpg(held.pid, signal.SIGKILL)
        held.stdout.close()


def test_where_a_folder_lies(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    monkeypatch.chdir(tmp_path / "there")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("../link/run") == locate("~/there/run") == locate("run") == tmp_path / "there" / "run"
    with pytest.raises(ValueError, match="null character"):
        locate("a\0b")


@pytest.mark.parametrize(
    "damage", [b"\xb6\xff\n", b"5\n", b'{"loss": 1.0}\n', b"[" * 100000 + b"\n", b'{"step": "4"}\n']
)
def test_damaged_metrics_are_left_out(tmp_path, damage):
    good = b'{"step": 5, "loss": 1.5}\n'
    (tmp_path / "metrics.jsonl").write_bytes(good + damage + b'{"step": 6, "loss": NaN}\n' + good[:9])
    with Metrics(tmp_path, 6, quality_of(next_token_loss)) as metrics:
        assert metrics.rows == [{"step": 5, "loss": 1.5}, {"step": 6, "loss": "NaN"}]
        metrics.write(7, loss=float("nan"), other=float("-inf"))
    assert rows_of(tmp_path)[-1] == {"step": 7, "loss": "nan", "other": "-inf"}


def test_points_are_in_the_events_as_soon_as_in_the_metrics(tmp_path):
    """After a kill no point of metrics.jsonl is missing."""
    from tensorboardX.proto.event_pb2 import Event

    metrics = Metrics(tmp_path, 0, quality_of(next_token_loss))
    for step in (1, 2, 3):
        metrics.write(step, loss=1.0 / step)
    [file] = tmp_path.glob("events.out.tfevents.*")
    data, at, found = file.read_bytes(), 0, []
    while at < len(data):  # records: length, checksum, bytes, checksum
        size = int.from_bytes(data[at : at + 8], "little")
        event = Event.FromString(data[at + 12 : at + 12 + size])
        found += [event.step for value in event.summary.value if value.tag == "loss"]
        at += 16 + size
    assert found == [1, 2, 3]
    metrics.__exit__()


def test_a_terminal_that_has_gone_does_not_end_a_run(monkeypatch):
    class Gone:
        def isatty(self):
            return True

        def write(self, text):
            raise OSError(5, "Input/output error")

        def flush(self):
            raise OSError(5, "Input/output error")

    from seqlab.train.metrics import Progress
    from seqlab.train.processes import say

    progress = Progress(10)
    monkeypatch.setattr(sys, "stderr", Gone())
    say("a line")
    with progress:
        progress.advance(1)
        progress.report(1, loss="2")
        progress.say("another")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sys,
            "stderr",
            type("Pipe", (), {"isatty": lambda self: False, "write": Gone.write, "flush": Gone.flush})(),
        )
        Progress(10).say("a line")


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interruptions() as interruption:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not interruption.came(True)
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with Interruptions() as interruption:
            os.kill(os.getpid(), signal.SIGHUP)
            assert interruption.came(True) and interruption.name == "SIGHUP"
    finally:
        signal.signal(signal.SIGHUP, before)


def test_memory_that_runs_out_says_what_to_change():
    tried = experiment(batch_size=6, accumulate=2)
    with (
        pytest.raises(
            OutOfMemoryError,
            match=r"while training \(RESOURCE_EXHAUSTED: .*parameters, .* kB.*batch_size \(now 6\)"
            r".*accumulate \(now 2\)",
        ),
        explained("training", tried),
    ):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes.\nmore")
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), explained("training", tried):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


def test_a_run_goes_on_longer_when_asked_and_says_so(tmp_path, capsys):
    cfg = config.fiddle(config.load("lm_mamba"), "tiny")
    for line in (
        "model.depth=1",
        "model.dim=16",
        "steps=4",
        "batch_size=4",
        "data.length=16",
        "log_every=2",
        "checkpoint_every=2",
    ):
        cfg = config.override(cfg, line)
    assert run(config.build(cfg), tmp_path, cfg).step == 4
    longer = config.override(config.override(cfg, "steps=6"), "keep=1")
    with pytest.raises(config.ConfigError, match=r"steps: 4 -> 6\n.*--extend"):
        run(config.build(longer), tmp_path, longer)
    assert run(config.build(longer), tmp_path, longer, extend=True).step == 6
    *_, first, last = [json.loads(line) for line in (tmp_path / "env.jsonl").read_text().splitlines()]
    assert (first["step"], first["changes"]) == (0, [])
    assert (last["step"], sorted(last["changes"])) == (4, ["keep: 3 -> 1", "steps: 4 -> 6"])
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["6"]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_random_moments_a_run_ends_bit_identical(processes, tmp_path):
    """Whole processes, killed whenever they are; `python tests/kills.py` does it thirty times."""
    assert kills.campaign(tmp_path, 4, processes, seed=1).kills == 4


@pytest.mark.slow
@pytest.mark.parametrize("damaged", [r"^(config.json|data.txt)$", "4/(manifest|commit)"])
def test_damage_to_a_run_is_detected_or_harmless(damaged, tmp_path):
    """Some files here; `python tests/damage.py` does it to every one, and writes the table of the docs."""
    found = damage.survey(tmp_path, damaged)
    page = damage.PAGE.read_text()
    for kind, cells in found.items():
        [line] = [line for line in page.splitlines() if line.startswith(f"| {kind} ")]
        assert line == damage.table({kind: cells}).splitlines()[2]


def test_the_model_of_step_0_is_a_function_of_the_seed():
    from seqlab.train.loop import build

    first, again, other = (build(experiment(TINY, seed=seed))[1] for seed in (0, 0, 1))
    assert_identical(first, again)
    assert not np.array_equal(first["embedding.weight"], other["embedding.weight"])
    assert first.keys() == split(nnx.eval_shape(lambda: TINY(rngs=nnx.Rngs(0))))[1].keys()
