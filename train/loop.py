"""The training loop: data, model, state or resume, steps, validation, checkpoints, shutdown."""

import contextlib
import functools
import json
import math
import os
import pathlib
import signal
import time
from typing import Any, NamedTuple

import fiddle as fdl
import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from seqlab.checks import UserError
from seqlab.module import Params, Static, count_params, in_evaluation, split
from seqlab.parallel.sharding import compiler_options, param_shardings
from seqlab.state import state_bytes
from seqlab.train import config, processes
from seqlab.train.checkpoint import Checkpoints
from seqlab.train.data import Batches, validation_batches
from seqlab.train.experiment import Experiment
from seqlab.train.folder import claimed, fingerprint_of, has_steps, locate
from seqlab.train.memory import explained
from seqlab.train.metrics import Metrics, Progress
from seqlab.train.optim import average_of
from seqlab.train.placement import begin, place, share, spread
from seqlab.train.processes import say
from seqlab.train.quality import quality_of
from seqlab.train.step import TrainState, all_finite, evaluate_step, init_state, train_step
from seqlab.train.trial import check_fits


class NonFiniteError(RuntimeError):
    """Training diverged to a non-finite value; the message says which, when, and the last good checkpoint."""


class Result(NamedTuple):
    """The end of a run: "finished" or the name of the interrupting signal, the step, and the metric on
    held-out data."""

    status: str
    step: int
    validation: float | None
    state: TrainState


def build(experiment: Experiment, mesh: Mesh | None = None, fresh: bool = True) -> tuple[Static, Params]:
    """The model's parameters at step 0, by one compiled function, each created with its sharding: the same
    values on every mesh; or those of `experiment.start`, unless `fresh` is False."""
    static, abstract = split(in_evaluation(nnx.eval_shape(lambda: experiment.model(rngs=nnx.Rngs(0)))))
    make = jax.jit(
        lambda key: split(experiment.model(rngs=nnx.Rngs(key)))[1],
        out_shardings=param_shardings(abstract, mesh),
    )
    params = make(jax.random.key(experiment.seed))
    if experiment.start is not None and fresh:
        params = _started(params, experiment.start())
    return static, params


def _started(params: Params, given: Params) -> Params:
    """The parameters with the values of `given`, which has all of them but those of low-rank maps."""
    lacking = [name for name in params if name not in given and ".adapter." not in name]
    extra = [name for name in given if name not in params]
    if lacking or extra:
        raise UserError(
            f"start: its parameters are not those of the model: it lacks {lacking[:3]}, and the model has no "
            f"{extra[:3]}"
        )
    for name, value in given.items():
        if value.shape != params[name].shape:
            raise UserError(f"start: {name} has shape {value.shape}, expected {params[name].shape}")
    return {
        name: jax.device_put(np.asarray(given[name], leaf.dtype), leaf.sharding) if name in given else leaf
        for name, leaf in params.items()
    }


def run(
    experiment: Experiment,
    workdir: str | os.PathLike[str],
    cfg: fdl.Config | None = None,
    extend: bool = False,
    title: str = "",
) -> Result:
    """Train, resuming from the last good checkpoint in `workdir` if there is one.

    It runs on `experiment.mesh`, which may differ from the previous one. A SIGTERM, SIGINT or SIGHUP ends the
    run after the current step, with a checkpoint; with several processes, one signal ends them all at their
    next report.

    Args:
      experiment: what to train.
      workdir: the folder of the run, created if missing. Only one process may train in it.
      cfg: the config from which `experiment` was built, saved in the folder (see `config.prepare`).
      extend: allow `cfg` to differ from the run in steps and optimizer.
      title: a message for stderr after all checks have passed.

    Raises:
      NonFiniteError: training diverges: a loss, a gradient, a parameter or a validation that is not finite.
      BusyError: another run is training in `workdir`.
      ConfigError: `workdir` belongs to another config.
      OutOfMemoryError: with suggestions.
      CheckpointError: checkpoints cannot be written there, or none is good.
    """
    workdir = locate(workdir)
    with contextlib.ExitStack() as stack:
        mesh = stack.enter_context(spread(experiment.mesh))
        # Data first: errors in them should be found before anything is created or compiled.
        windows = experiment.data.train(experiment.seed)
        batches = Batches(windows, experiment.batch_size, experiment.seed, *share(mesh))
        held_out = held_out_batches(experiment, mesh)
        check_labels(experiment, windows)
        check_fits(experiment, batches[0], mesh)
        changes: list[str] = []

        fingerprint = _fingerprint(windows, experiment.data.validation())

        def claim() -> None:
            if cfg is not None:  # refused configs leave no folder
                config.differences(cfg, workdir, extend, fingerprint)
            stack.enter_context(claimed(workdir))
            changes.extend(_settle(workdir, cfg, extend, fingerprint))

        processes.first_decides(claim, f"{workdir} to be claimed")
        if title:
            say(title)
        return _run(experiment, workdir, mesh, batches, held_out, changes)


def _settle(
    workdir: pathlib.Path, cfg: fdl.Config | None, extend: bool, fingerprint: str | None
) -> list[str]:
    """Save config and data fingerprint of a run, or their changes; refuse changes that make it another
    run."""
    if cfg is not None:
        config.differences(cfg, workdir, extend, fingerprint)
    begun = fingerprint_of(workdir) if has_steps(workdir) else None
    # With other data, the same step would have another batch, or the same checkpoint another metric. Older
    # runs recorded only the training data.
    if None not in (begun, fingerprint) and begun not in (fingerprint, fingerprint.partition(".")[0]):
        raise UserError(
            f"{workdir} was begun on other data (data.txt has fingerprint {begun}, now {fingerprint}): use "
            "another workdir"
        )
    changes = [] if cfg is None else config.prepare(cfg, workdir, extend, fingerprint)
    if fingerprint is not None:
        (workdir / "data.txt").write_text(fingerprint + "\n")
    return changes


class _Programs(NamedTuple):
    """Compiled functions: the step, the metric of a batch, the check for finite parameters; and the unit and
    size of a step, such as 4096 tokens."""

    step: Any
    evaluate: Any
    sound: Any
    unit: str
    size: int


def _run(
    experiment: Experiment,
    workdir: pathlib.Path,
    mesh: Mesh | None,
    batches: Batches,
    held_out: Any,
    changes: list[str],
) -> Result:
    # Model and state.
    with explained("making the parameters and the optimizer's state", experiment):
        static, params = build(experiment, mesh, fresh=not has_steps(workdir))
        optimizer = experiment.optimizer(experiment.steps)
        state, shardings = begin(functools.partial(init_state, static, optimizer=optimizer), params, mesh)
        checkpoints = Checkpoints(workdir / "checkpoints", keep=experiment.keep)
        restored = checkpoints.restore(like=_to_dict(state))
        if restored is not None:
            state = _from_dict(restored[1], state)
        start = int(state.step)
    if processes.first():
        _write_environment(workdir, experiment, start, changes)
    say(_summary(experiment, start))
    if start >= experiment.steps:
        say(f"{workdir} is complete: {start} steps; --extend --set steps=N trains further")
        return Result("finished", start, None, state)
    checkpoints.try_out()
    with explained("compiling the training step", experiment):
        programs = _compile(experiment, static, optimizer, state, shardings, mesh, batches[start], held_out)
    with explained("training", experiment):
        return _train(experiment, workdir, mesh, programs, state, start, batches, held_out, checkpoints)


def _compile(
    experiment: Experiment,
    static: Static,
    optimizer: Any,
    state: TrainState,
    shardings: TrainState | None,
    mesh: Mesh | None,
    batch: dict[str, Any],
    held_out: Any,
) -> _Programs:
    """Compile all functions of a run, so that this does not count as time of the steps."""
    clock = time.perf_counter()
    step = functools.partial(train_step, static, optimizer, experiment.loss, experiment.accumulate)
    step = jax.jit(step, donate_argnums=0, out_shardings=None if mesh is None else (shardings, None))
    first = place(batch, mesh)
    step = step.lower(state, first).compile(compiler_options(mesh))
    evaluate = jax.jit(functools.partial(evaluate_step, static, experiment.metric))
    evaluate = evaluate.lower(judged(state), place(held_out[0], mesh)).compile(compiler_options(mesh))
    shape = first["inputs"].shape
    unit, size = ("images", shape[0]) if len(shape) == 4 else ("tokens", math.prod(shape[:2]))
    say(f"compiled the training step in {time.perf_counter() - clock:.1f} s")
    return _Programs(step, evaluate, jax.jit(all_finite), unit, size)


def _train(
    experiment: Experiment,
    workdir: pathlib.Path,
    mesh: Mesh | None,
    programs: _Programs,
    state: TrainState,
    start: int,
    batches: Batches,
    held_out: Any,
    checkpoints: Checkpoints,
) -> Result:
    quality = quality_of(experiment.metric)
    progress = Progress(experiment.steps, start) if processes.first() else processes.Silent()
    metrics = Metrics(workdir, start, quality) if processes.first() else processes.Silent()
    pending: list[Any] = []
    validation, saved, clock, seen = None, start, time.perf_counter(), 0

    def judge(number: int) -> float:
        """Validate and record the metric; raise if it is not finite."""
        value, _ = validate(programs.evaluate, judged(state), held_out, mesh)
        metrics.write(number, **{f"validation_{quality.name}": value})
        progress.say(f"step {number}: validation {quality.sentence(value)}")
        metrics.draw()
        _check_figure(value, number, saved, workdir)
        return value

    with (
        Interruptions() as interruption,
        checkpoints,
        metrics,
        progress,
        processes.together(checkpoints.steps),
    ):
        processes.barrier("the training step to be compiled")
        due = start and start % experiment.validate_every == 0
        if due and processes.anywhere(
            processes.first() and not metrics.has(start, f"validation_{quality.name}")
        ):
            judge(start)  # skipped by an interruption
        for number, batch in enumerate(batches.iterate(start), start + 1):
            state, measured = programs.step(state, place(batch, mesh))
            pending.append(measured)
            seen += programs.size
            progress.advance(number)
            last = number == experiment.steps or interruption.came(number % experiment.log_every == 0)
            validating = not interruption.acted and (last or number % experiment.validate_every == 0)
            saving = last or number % experiment.checkpoint_every == 0
            if saving or validating or number % experiment.log_every == 0:
                loss, norm = _drain(pending, number, saved, workdir)
                speed = seen / (time.perf_counter() - clock)
                metrics.write(number, loss=loss, gradient_norm=norm, **{f"{programs.unit}_per_second": speed})
                progress.report(number, loss=f"{loss:.3f}", **{f"{programs.unit}_s": f"{speed:,.0f}"})
                if not programs.sound(judged(state)):
                    raise NonFiniteError(
                        f"step {number}: parameters that are not finite; {_good(saved, workdir)}"
                    )
                clock, seen = time.perf_counter(), 0
            if validating:
                validation = judge(number)
                clock = time.perf_counter()
            if saving:
                if not validating:  # a state whose next loss is nan is not worth saving
                    value, _ = validate(programs.evaluate, judged(state), [held_out[0]], mesh)
                    _check_figure(value, number, saved, workdir)
                checkpoints.save(number, _to_dict(state), wait=last)
                saved = number
            if last:
                break

    # Shutdown.
    if interruption.acted and number < experiment.steps:
        say(f"{interruption.name}: saved step {number}; the same command goes on from there")
        return Result(interruption.name, number, validation, state)
    return Result("finished", number, validation, state)


class Interruptions:
    """Handler that records SIGTERM, SIGINT and SIGHUP for a check between steps; a second signal acts as
    usual, and ignored signals (`nohup`) stay ignored."""

    def __enter__(self) -> "Interruptions":
        self.name: str | None = None
        self.acted, self._before = False, {}
        for name in ("SIGTERM", "SIGINT", "SIGHUP"):
            number = getattr(signal, name, None)  # SIGHUP is that of POSIX
            if number is None or signal.getsignal(number) == signal.SIG_IGN:
                continue
            try:
                self._before[number] = signal.signal(number, self._note)
            except ValueError:  # not the main thread, which handles signals
                break
        return self

    def came(self, agreed: bool) -> bool:
        """Whether to stop now. Several processes stop at the same step, one at which they have `agreed` to
        exchange flags."""
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


def _drain(pending: list[Any], number: int, saved: int, workdir: pathlib.Path) -> tuple[float, float]:
    """Mean loss and last gradient norm of the steps since the last report, all of which must be finite."""
    measured = jax.device_get(pending)
    pending.clear()
    bad = [i for i, m in enumerate(measured) if not m.finite]
    if bad:
        step, m = number - len(measured) + 1 + bad[0], measured[bad[0]]
        raise NonFiniteError(
            f"step {step}: loss {m.loss}, gradient norm {m.norm}; that update was not applied, "
            f"{_good(saved, workdir)}"
        )
    return float(np.mean([m.loss for m in measured])), float(measured[-1].norm)


def _check_figure(value: float, number: int, saved: int, workdir: pathlib.Path) -> None:
    if not math.isfinite(value):
        raise NonFiniteError(
            f"step {number}: {value} on the held-out data; that step was not saved, {_good(saved, workdir)}"
        )


def _good(saved: int, workdir: pathlib.Path) -> str:
    """Advice after a divergence, which the same command would repeat."""
    if not saved:
        return f"there is no checkpoint yet ({workdir}): start again with a smaller optimizer.peak"
    return (
        f"the last good checkpoint is step {saved} ({workdir}): go on from it with a smaller rate, --extend "
        "--set optimizer.peak=..."
    )


def _fingerprint(train: Any, validation: Any) -> str | None:
    """The fingerprint of training and validation data; None if they have none."""
    found = [getattr(windows, "fingerprint", None) for windows in (train, validation)]
    return None if found[0] is None else ".".join(part for part in found if part is not None)


def check_labels(experiment: Experiment, windows: Any) -> None:
    """Refuse data with more classes than the model has outputs, before anything is trained on them."""
    targets = getattr(windows, "targets", None)
    if targets is None or getattr(windows, "classes", None) is None or not len(targets):
        return
    model = nnx.eval_shape(lambda: experiment.model(rngs=nnx.Rngs(0)))
    inputs = jax.ShapeDtypeStruct((1, *windows[0]["inputs"].shape), np.float32)
    outputs = jax.eval_shape(lambda model, x: model(x), model, inputs).shape[-1]
    if int(np.max(targets)) >= outputs:
        raise UserError(
            f"model.outputs: got {outputs}, but the data has the label {int(np.max(targets))} "
            f"({windows.classes} classes): set model.outputs={windows.classes}"
        )


def held_out_batches(experiment: Experiment, mesh: Mesh | None = None) -> Any:
    """The validation batches, the same at every step and for `seqlab eval`: windows spread over all held-out
    data."""
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
    """The parameters to evaluate: those of the run, or their average if the optimizer keeps one."""
    return state.params | average_of(state.optimizer)


def _to_dict(state: TrainState) -> dict[str, Any]:
    """A train state as a dictionary with string keys, as stored in checkpoints, independent of optax's
    containers.

    An average of the parameters is a separate entry, `average`, which can be read alone.
    """
    entries: dict[str, Any] = {"step": state.step, "params": dict(state.params), "optimizer": {}}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.optimizer):
        entry, key = _entry(path)
        entries.setdefault(entry, {})[key] = leaf
    return entries


def _entry(path: tuple[Any, ...]) -> tuple[str, str]:
    """The checkpoint entry of a leaf of the optimizer's state, and its name there."""
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    *_, field, last = ("", *name.split("/"))
    return ("average", last) if field == "average" else ("optimizer", name)


def _from_dict(saved: dict[str, Any], like: TrainState) -> TrainState:
    leaves, tree = jax.tree_util.tree_flatten_with_path(like.optimizer)
    optimizer = [saved[entry][key] for entry, key in (_entry(path) for path, _ in leaves)]
    return TrainState(saved["step"], saved["params"], jax.tree.unflatten(tree, optimizer))


def _summary(experiment: Experiment, start: int) -> str:
    model = nnx.eval_shape(lambda: experiment.model(rngs=nnx.Rngs(0)))
    state = f", {state_bytes(model):,} bytes of state a stream" if hasattr(model, "init_state") else ""
    return f"{count_params(model):,} parameters{state}; " + (
        f"resuming at step {start}" if start else "starting at step 0"
    )


def _write_environment(workdir: pathlib.Path, experiment: Experiment, start: int, changes: list[str]) -> None:
    """Append one JSON object per start: the first step, changed config fields, versions and devices."""
    import importlib.metadata
    import platform

    versions = {
        name: importlib.metadata.version(name)
        for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    }
    record = {
        "step": start,
        "changes": changes,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "devices": [f"{d.platform}:{d.device_kind}" for d in jax.devices()],
        "versions": versions,
        "parameters": count_params(nnx.eval_shape(lambda: experiment.model(rngs=nnx.Rngs(0)))),
    }
    path = workdir / "env.jsonl"
    cut = path.exists() and not path.read_bytes().endswith(b"\n")  # by a kill
    with path.open("a") as file:
        file.write(("\n" if cut else "") + json.dumps(record) + "\n")
