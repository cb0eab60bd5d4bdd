"""A training run, top to bottom: data, model, state or resume, steps, validation, checkpoints, farewell."""

import functools
import json
import math
import os
import pathlib
import signal
import time
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from seqlab.checks import UserError
from seqlab.module import Params, Static, count_params, split
from seqlab.parallel.sharding import compiler_options, param_shardings
from seqlab.state import state_bytes
from seqlab.train import processes
from seqlab.train.checkpoint import Checkpoints
from seqlab.train.data import Batches, validation_batches
from seqlab.train.experiment import Experiment
from seqlab.train.metrics import Metrics, Progress
from seqlab.train.optim import average_of
from seqlab.train.placement import begin, place, share, spread
from seqlab.train.processes import say
from seqlab.train.quality import quality_of
from seqlab.train.step import TrainState, evaluate_step, init_state, train_step


class NonFiniteError(RuntimeError):
    """The loss or the gradient stopped being finite; the message says when, and which checkpoint is good."""


class Result(NamedTuple):
    """How a run ended: "finished" or the name of the signal that interrupted it, at which step, with which
    figure on the held-out data."""

    status: str
    step: int
    validation: float | None
    state: TrainState


def build(experiment: Experiment, mesh: Mesh | None = None) -> tuple[Static, Params]:
    """The model's parameters at step 0, by one compiled function, each made where it will live: the same
    values on every mesh."""
    static, abstract = split(nnx.eval_shape(lambda: experiment.model(rngs=nnx.Rngs(0))))
    make = jax.jit(
        lambda key: split(experiment.model(rngs=nnx.Rngs(key)))[1],
        out_shardings=param_shardings(abstract, mesh),
    )
    return static, make(jax.random.key(experiment.seed))


def run(experiment: Experiment, workdir: str | os.PathLike[str]) -> Result:
    """Train, from the last good checkpoint of `workdir` if it holds one.

    It runs on the mesh that `experiment.mesh` says, which may be another one than before. A SIGTERM or SIGINT
    ends the run after the step in progress, with a checkpoint; that of one among several processes ends them
    all when they next report. Raises NonFiniteError where training diverges, and whatever the checkpoints
    raise (`CheckpointError`) where they cannot be written.
    """
    workdir = pathlib.Path(workdir).absolute()
    workdir.mkdir(parents=True, exist_ok=True)
    with spread(experiment.mesh) as mesh:
        return _run(experiment, workdir, mesh)


def _run(experiment: Experiment, workdir: pathlib.Path, mesh: Mesh | None) -> Result:
    # Data first: what is wrong with it should be known before anything is compiled.
    windows = experiment.data.train(experiment.seed)
    batches = Batches(windows, experiment.batch_size, experiment.seed, *share(mesh))
    _check_data(workdir, getattr(windows, "fingerprint", None))
    held_out = held_out_batches(experiment, mesh)

    # Model and state.
    static, params = build(experiment, mesh)
    optimizer = experiment.optimizer(experiment.steps)
    state, shardings = begin(functools.partial(init_state, static, optimizer=optimizer), params, mesh)
    checkpoints = Checkpoints(workdir / "checkpoints", keep=experiment.keep)
    restored = checkpoints.restore(like=_to_dict(state))
    if restored is not None:
        state = _from_dict(restored[1], state)
    start = int(state.step)
    if processes.first():
        _write_environment(workdir, static, params)
    say(_summary(experiment, static, params, start))
    if start >= experiment.steps:
        say(f"{workdir} is complete: {start} steps")
        return Result("finished", start, None, state)

    # Compilation, apart from the time of the steps.
    clock = time.perf_counter()
    step = functools.partial(train_step, static, optimizer, experiment.loss, experiment.accumulate)
    step = jax.jit(step, donate_argnums=0, out_shardings=None if mesh is None else (shardings, None))
    first = place(batches[start], mesh)
    step = step.lower(state, first).compile(compiler_options(mesh))
    unit, size = (
        ("images", first["inputs"].shape[0])
        if first["inputs"].ndim == 4
        else ("tokens", math.prod(first["inputs"].shape[:2]))
    )
    evaluate = jax.jit(
        functools.partial(evaluate_step, static, experiment.metric), compiler_options=compiler_options(mesh)
    )
    quality = quality_of(experiment.metric)
    say(f"compiled the training step in {time.perf_counter() - clock:.1f} s")

    # Steps.
    progress = Progress(experiment.steps, start) if processes.first() else processes.Silent()
    metrics = Metrics(workdir, start, quality) if processes.first() else processes.Silent()
    pending: list[Any] = []
    validation, saved, clock, seen = None, start, time.perf_counter(), 0
    with (
        Interruptions() as interruption,
        checkpoints,
        metrics,
        progress,
        processes.together(checkpoints.steps),
    ):
        processes.barrier("the training step to be compiled")
        for number, batch in enumerate(batches.iterate(start), start + 1):
            batch = place(batch, mesh)
            state, measured = step(state, batch)
            pending.append(measured)
            seen += size
            progress.advance(number)
            last = number == experiment.steps or interruption.came(number % experiment.log_every == 0)
            if last or not all(
                number % n
                for n in (experiment.log_every, experiment.checkpoint_every, experiment.validate_every)
            ):
                loss, norm = _drain(pending, number, saved, workdir)
                speed = seen / (time.perf_counter() - clock)
                metrics.write(number, loss=loss, gradient_norm=norm, **{f"{unit}_per_second": speed})
                progress.report(number, loss=f"{loss:.3f}", **{f"{unit}_s": f"{speed:,.0f}"})
                clock, seen = time.perf_counter(), 0
            if number % experiment.checkpoint_every == 0 or last:
                checkpoints.save(number, _to_dict(state), wait=last)
                saved = number
            if (number % experiment.validate_every == 0 or last) and not interruption.acted:
                validation, _ = validate(evaluate, judged(state), held_out, mesh)
                metrics.write(number, **{f"validation_{quality.name}": validation})
                progress.say(f"step {number}: validation {quality.sentence(validation)}")
                metrics.draw()
                clock = time.perf_counter()
            if last:
                break

    # Farewell.
    if interruption.acted and number < experiment.steps:
        say(f"{interruption.name}: saved step {number}; the same command goes on from there")
        return Result(interruption.name, number, validation, state)
    return Result("finished", number, validation, state)


class Interruptions:
    """Turns SIGTERM and SIGINT into a name to look at between steps; a second signal acts as usual."""

    def __enter__(self) -> "Interruptions":
        self.name: str | None = None
        self.acted, self._before = False, {}
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._before[number] = signal.signal(number, self._note)
            except ValueError:  # not the main thread: signals are somebody else's business
                break
        return self

    def came(self, agreed: bool) -> bool:
        """Whether to stop now. Several processes stop at one step: at one where they are `agreed` to ask each
        other."""
        if jax.process_count() == 1:
            self.acted = self.name is not None
        elif agreed and processes.anywhere(self.name is not None):
            self.acted, self.name = True, self.name or "SIGTERM"
        return self.acted

    def _note(self, number: int, frame: Any) -> None:
        self.name = signal.Signals(number).name
        signal.signal(number, self._before[number])

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _check_data(workdir: pathlib.Path, fingerprint: str | None) -> None:
    """Refuse to go on with a run on other data than it began with: the same step would be another batch."""
    path = workdir / "data.txt"
    if fingerprint is None:
        return
    if path.exists() and path.read_text().strip() != fingerprint:
        begun = path.read_text().strip()
        raise UserError(
            f"{workdir} was begun on other data (fingerprint {begun}, now {fingerprint}): use another workdir"
        )
    if processes.first():
        path.write_text(fingerprint + "\n")


def _drain(pending: list[Any], number: int, saved: int, workdir: pathlib.Path) -> tuple[float, float]:
    """Mean loss and last gradient norm of the steps since the last look, all of which must be finite."""
    measured = jax.device_get(pending)
    pending.clear()
    bad = [i for i, m in enumerate(measured) if not m.finite]
    if bad:
        step = number - len(measured) + 1 + bad[0]
        good = f"the last good checkpoint is step {saved}" if saved else "there is no checkpoint yet"
        m = measured[bad[0]]
        raise NonFiniteError(
            f"step {step}: loss {m.loss}, gradient norm {m.norm}; that update was not applied, {good} "
            f"({workdir})"
        )
    return float(np.mean([m.loss for m in measured])), float(measured[-1].norm)


def held_out_batches(experiment: Experiment, mesh: Mesh | None = None) -> Any:
    """The batches that validation is taken on: the same at every step, and for `seqlab eval`; windows spread
    over all that is held out."""
    windows = experiment.data.validation()
    count = min(experiment.validation_windows, len(windows))
    return validation_batches(
        [windows[i * len(windows) // count] for i in range(count)], experiment.batch_size, None, *share(mesh)
    )


def validate(evaluate: Any, params: Params, held_out: Any, mesh: Mesh | None = None) -> tuple[float, int]:
    """The metric over the held-out batches, and the number of targets."""
    sums = jax.device_get([evaluate(params, place(batch, mesh)) for batch in held_out])
    count = sum(count for _, count in sums)
    return float(sum(total for total, _ in sums) / max(count, 1.0)), int(count)


def judged(state: TrainState) -> Params:
    """What a run is worth is said of these: its parameters, or their average where the optimizer keeps
    one."""
    return state.params | average_of(state.optimizer)


def _to_dict(state: TrainState) -> dict[str, Any]:
    """A train state as a dictionary with string keys: what checkpoints hold, whatever optax calls its
    containers.

    An average of the parameters is an entry of its own, `average`, so that it can be read alone.
    """
    entries: dict[str, Any] = {"step": state.step, "params": dict(state.params), "optimizer": {}}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.optimizer):
        entry, key = _entry(path)
        entries.setdefault(entry, {})[key] = leaf
    return entries


def _entry(path: tuple[Any, ...]) -> tuple[str, str]:
    """The entry of a checkpoint that a leaf of the optimizer's state stands in, and its name there."""
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    *_, field, last = ("", *name.split("/"))
    return ("average", last) if field == "average" else ("optimizer", name)


def _from_dict(saved: dict[str, Any], like: TrainState) -> TrainState:
    leaves, tree = jax.tree_util.tree_flatten_with_path(like.optimizer)
    optimizer = [saved[entry][key] for entry, key in (_entry(path) for path, _ in leaves)]
    return TrainState(saved["step"], saved["params"], jax.tree.unflatten(tree, optimizer))


def _summary(experiment: Experiment, static: Static, params: Params, start: int) -> str:
    model = nnx.eval_shape(lambda: experiment.model(rngs=nnx.Rngs(0)))
    state = f", {state_bytes(model):,} bytes of state a stream" if hasattr(model, "init_state") else ""
    return f"{count_params(params):,} parameters{state}; " + (
        f"resuming at step {start}" if start else "starting at step 0"
    )


def _write_environment(workdir: pathlib.Path, static: Static, params: Params) -> None:
    """Versions and devices of this start, one JSON object a start."""
    import importlib.metadata
    import platform

    versions = {
        name: importlib.metadata.version(name)
        for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    }
    record = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "devices": [f"{d.platform}:{d.device_kind}" for d in jax.devices()],
        "versions": versions,
        "parameters": count_params(params),
    }
    with (workdir / "env.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
