"""Runs that are killed at random moments end as if nothing had happened: parameters, optimizer, position and
logged losses, bit for bit.

    python tests/kills.py --kills 30 [--seed 0] [--processes 1 2]

Whole processes get SIGKILL (four of five times) or a signal that a run acts on, whenever they are: while they
import, compile, step, validate or save. Of two processes of one run, either or both. A run that ends before
its kill is replaced by a new one until there are enough kills.
"""

import argparse
import collections
import dataclasses
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np

from seqlab.train.checkpoint import Checkpoints

ROOT = pathlib.Path(__file__).parent.parent
STEPS = 200
SETTINGS = (
    f"steps={STEPS}",
    "checkpoint_every=10",
    "validate_every=50",
    "validation_windows=4",
    "log_every=10",
    "batch_size=4",
    "data.length=32",
)
_ENDED = (0, 4, 129, 130, 143)  # finished, another process lost, interrupted


@dataclasses.dataclass
class Report:
    """`kills`: how many; `moments`: what was under way, by words; `resumed`: the steps that were gone on
    from."""

    kills: int = 0
    runs: int = 0
    moments: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    resumed: list[int] = dataclasses.field(default_factory=list)


def start(folder: pathlib.Path, processes: int) -> list[subprocess.Popen]:
    """The processes of one run in `folder`."""
    line = [sys.executable, "-m", "seqlab", "train", "demo", "--fiddler", "tiny", "--workdir", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    begun = []
    for index in range(processes):
        together = [] if processes == 1 else ["--distributed", f"127.0.0.1:{port},{processes},{index}"]
        mesh = [] if processes == 1 else [f"mesh.data={processes}"]
        log = (folder.parent / f"{folder.name}.{index}.log").open("a")
        with log:
            begun.append(
                subprocess.Popen(
                    [*line, *together, "--set", *SETTINGS, *mesh], env=environment, stderr=log, stdout=log
                )
            )
    return begun


def finish(folder: pathlib.Path, processes: int) -> None:
    """Let the run end by itself."""
    codes = [process.wait(600) for process in start(folder, processes)]
    assert not any(codes), (codes, (folder.parent / f"{folder.name}.0.log").read_text()[-2000:])


def outcome(folder: pathlib.Path) -> tuple[int, dict, dict]:
    """The last step, its whole state, and the losses and validations that were logged."""
    step, state = Checkpoints(folder / "checkpoints").restore()
    logged = {}
    for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        logged |= {
            (row["step"], name): value for name, value in row.items() if name in ("loss", "gradient_norm")
        }
        logged |= {(row["step"], name): value for name, value in row.items() if name.startswith("validation")}
    return step, state, logged


def campaign(root: pathlib.Path, kills: int, processes: int, seed: int = 0) -> Report:
    """Kill runs of so many `processes` `kills` times, and compare every one of them with one left alone.

    Raises:
      AssertionError: something is not the same bit for bit, or a start failed that no kill has ended.
    """
    rng, report = np.random.default_rng([seed, processes]), Report()
    finish(root / "whole", processes)
    while report.kills < kills:
        folder = root / f"killed{report.runs}"
        report.runs += 1
        while report.kills < kills:
            if not _killed(folder, processes, rng, report):
                break
        finish(folder, processes)
        _compare(root / "whole", folder)
    return report


def _killed(folder: pathlib.Path, processes: int, rng: np.random.Generator, report: Report) -> bool:
    """Start once and kill once; False if the run was over before."""
    steps = folder / "checkpoints"
    before = _newest(steps)
    begun = start(folder, processes)
    anytime = rng.random() < 0.3
    while not anytime and _newest(steps) <= before and all(process.poll() is None for process in begun):
        time.sleep(0.02)
    time.sleep(rng.uniform(0, 8 if anytime else 1.0))
    number = signal.SIGKILL
    if rng.random() < 0.2:
        number = signal.SIGTERM if rng.random() < 0.5 else signal.SIGHUP
    victims = begun if rng.random() < 0.5 else [begun[int(rng.integers(processes))]]
    living = all(process.poll() is None for process in begun)
    moment = _moment(steps, before)
    for process in victims:
        process.send_signal(number)
    codes = [process.wait(300) for process in begun]
    if not living:
        assert not any(codes), codes
        return False
    assert all(code in _ENDED or code < 0 for code in codes), codes
    report.kills += 1
    report.moments[f"{signal.Signals(number).name} {moment}"] += 1
    report.resumed.append(max(_newest(steps), 0))
    return True


def _newest(steps: pathlib.Path) -> int:
    found = steps.glob("*/commit_success.txt") if steps.exists() else ()
    return max((int(path.parent.name) for path in found if path.parent.name.isdigit()), default=-1)


def _moment(steps: pathlib.Path, before: int) -> str:
    if _newest(steps) <= before:
        return "before the first checkpoint of the start"
    return "while saving" if any(steps.glob("*.saving-*")) else "between saves"


def _compare(whole: pathlib.Path, killed: pathlib.Path) -> None:
    expected, actual = outcome(whole), outcome(killed)
    assert actual[0] == expected[0] == STEPS
    assert jax.tree.structure(actual[1]) == jax.tree.structure(expected[1])
    for path, leaf in jax.tree_util.tree_leaves_with_path(expected[1]):
        other = actual[1]
        for key in path:
            other = other[key.key]
        assert np.asarray(other).tobytes() == np.asarray(leaf).tobytes(), jax.tree_util.keystr(path)
    # A run that acts on a signal reports once more, at the step where it stopped.
    for key, value in expected[2].items():
        if key[1] != "loss":  # a mean since the last report
            assert actual[2][key] == value, key


def main() -> None:
    """Print what was killed when; an AssertionError is a difference."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    shares = [args.kills // len(args.processes)] * len(args.processes)
    shares[0] += args.kills - sum(shares)
    for processes, kills in zip(args.processes, shares, strict=True):
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory() as root:
            report = campaign(pathlib.Path(root), kills, processes, args.seed)
        print(f"{processes} process(es): {report.kills} kills, {report.runs} runs, all equal")
        for moment, count in sorted(report.moments.items()):
            print(f"  {count:3} {moment}")
        print(f"  resumed from steps {report.resumed}; {time.perf_counter() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
