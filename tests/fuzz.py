"""Command lines and options of streams at random: what a user can get wrong is one line, and nothing else
happens.

    python tests/fuzz.py --commands 1000 --streams 1000 [--seed 0]

Command lines come from a grammar of all commands, options, configs and fields, with the mistakes that people
make: misspelt names, parts of another kind, numbers out of range, files that are missing, damaged or folders.
They run in this process, in a folder of their own. What would take minutes (training, a bench, an export) is
cut where it would begin. Options of streams are drawn likewise; where a stream begins, every token is made
again from its definition. Everything that is found is printed, with the call that reproduces it.
"""

import argparse
import contextlib
import dataclasses
import io
import itertools
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from unittest import mock

from fuzz_grammar import STDIN, Grammar

CODES = (0, 2, 3, 130)  # done, an error of the user, diverged, interrupted
LINES = 8  # of an error message, at most
SECONDS = 60.0
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Hang(BaseException):
    """A call has taken too long."""


class Begun(BaseException):
    """Raised when expensive work starts: the call was valid."""


@dataclasses.dataclass
class Report:
    """`outcomes`: how the calls ended; `found`: the calls that did other than they should, and what."""

    outcomes: Counter = dataclasses.field(default_factory=Counter)
    found: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def add(self, call: str, fault: str) -> None:
        self.found.append((call, fault))
        self.outcomes["FAULT"] += 1


class Watch:
    """Notes what Python code writes outside the folder `allowed` while it is on."""

    def __init__(self) -> None:
        self.allowed: tuple[str, ...] = ()
        self.on, self.outside = False, []
        sys.addaudithook(self._see)

    def _see(self, event: str, arguments: tuple) -> None:
        if not self.on:
            return
        if event == "open":
            path, _, flags = arguments
            if not isinstance(path, str | bytes) or not (flags or 0) & _WRITES:
                return
        elif event in ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate", "shutil.rmtree"):
            path = arguments[0]
        else:
            return
        if isinstance(path, str | bytes):
            self._note(os.path.realpath(os.fsdecode(path)))

    def _note(self, path: str) -> None:
        if not path.startswith((*self.allowed, "/dev/", "/proc/")):
            self.outside.append(path)


@contextlib.contextmanager
def limited(seconds: float):
    """Within the block more than so many seconds of the processor, or five times as many of waiting, are a
    Hang."""

    def stop(*_):
        raise Hang

    timers = {
        signal.SIGPROF: (signal.ITIMER_PROF, seconds),
        signal.SIGALRM: (signal.ITIMER_REAL, 5 * seconds),
    }
    before = {number: signal.signal(number, stop) for number in timers}
    for timer, limit in timers.values():
        signal.setitimer(timer, limit)
    try:
        yield
    finally:
        for number, (timer, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])


class Screen(io.StringIO):
    """A stdout at which somebody presses Ctrl-C after a while."""

    def __init__(self) -> None:
        super().__init__()
        self.writes = 0

    def write(self, text: str) -> int:
        self.writes += 1
        if self.writes > 400:
            self.writes = 0
            raise KeyboardInterrupt
        return super().write(text)


def make_scene(root: pathlib.Path) -> None:
    """The files that command lines name: runs, damaged runs, data, configs, and what is none of these."""
    home = root / "home"
    home.mkdir(parents=True)
    corpus = root / "corpus"
    corpus.mkdir()
    for n in range(12):
        (corpus / f"{n}.txt").write_text(f"line {n} of a text " * 60)
    (root / "empty").mkdir()
    (root / "latin1.txt").write_bytes("café crème ".encode("latin-1") * 200)
    (root / "zero.txt").write_bytes(b"")
    (root / "binary.gguf").write_bytes(bytes(range(256)) * 8)
    (root / "series.csv").write_text("date,a,b\n" + "".join(f"{n},{n},{n * n}\n" for n in range(300)))
    (root / "broken.csv").write_bytes(b"date,a\n1,x\n\xff,2\n")
    (root / "bad.py").write_text("def base(:\n")
    (root / "none.py").write_text("x = 1\n")
    (root / "mine.py").write_text(
        "from seqlab.configs import lm_mamba\n\ndef base():\n    return lm_mamba.base()\n"
    )
    (root / "published").mkdir()
    (root / "published" / "config.json").write_text('{"model_type": "llama", "hidden_size": 8}')
    (root / "unknown").mkdir()
    (root / "unknown" / "config.json").write_text('{"model_type": "tapir"}')
    make_run(root / "run", "lm_mamba", "data.paths=corpus")
    make_run(root / "attention", "lm_attention", "data.paths=corpus")
    for name in ("run", "attention"):
        (root / name / "lock").write_text("")
    damage(root)


def make_run(folder: pathlib.Path, name: str, *changes: str) -> None:
    """A run at step 0: a folder that everything but training takes for one."""
    from flax import nnx

    from seqlab.module import split
    from seqlab.train import config, loop
    from seqlab.train.checkpoint import Checkpoints
    from seqlab.train.step import init_state

    cfg = config.fiddle(config.load(name), "tiny")
    for change in changes:
        cfg = config.override(cfg, change)
    config.prepare(cfg, folder)
    experiment = config.build(cfg)
    static, params = split(experiment.model(rngs=nnx.Rngs(0)))
    state = init_state(static, params, experiment.optimizer(experiment.steps))
    with Checkpoints(folder / "checkpoints") as checkpoints:
        checkpoints.save(1, loop._to_dict(state), wait=True)


def damage(root: pathlib.Path) -> None:
    """Copies of a run, each with something wrong."""

    def copy(name: str) -> pathlib.Path:
        shutil.copytree(root / "run", root / name)
        return root / name

    for file in copy("truncated").rglob("*"):
        if file.is_file() and "checkpoints" in file.parts:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    for file in copy("zeroed").rglob("*"):
        if file.is_file() and "checkpoints" in file.parts:
            file.write_bytes(b"")
    shutil.rmtree(copy("bare") / "checkpoints")
    (copy("hollow") / "checkpoints" / "1" / "commit_success.txt").unlink(missing_ok=True)
    (copy("garbled") / "config.json").write_bytes(b"\xff\xfe{]")
    (copy("list") / "config.json").write_text("[1, 2]")
    (copy("nothing") / "config.json").write_text("")
    (copy("stranger") / "config.json").write_text(
        '{"format": "seqlab.config.1", "config": {"$call": "os:getcwd"}}'
    )
    (copy("gated") / "gates.json").write_bytes(b"{\xff")
    (copy("benched") / "cache_bench").mkdir()
    (root / "benched" / "cache_bench" / "settings.json").write_text("not JSON")
    folder = copy("config_is_a_folder")
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()


@contextlib.contextmanager
def cut(real: int):
    """Within the block all but `real` trainings are cut where they would begin, and all benches and exports;
    with `real` 0 streams and evaluations, too."""
    from seqlab.bench import cases, timing, tune
    from seqlab.interop import export
    from seqlab.streaming import generate
    from seqlab.studies import cache_bench, gates
    from seqlab.train import loop

    left, run, make = [real], loop._run, cases.make

    def case(op, name, spec, *arguments):
        if cases._specs(op.name).FACTS.held(spec) > 2e6:
            raise Begun
        return make(op, name, spec, *arguments)

    def train(experiment, *arguments):
        if left[0] < 1 or experiment.data.tokenizer is None:  # models of images take minutes to compile
            raise Begun
        left[0] -= 1
        short = {
            "steps": 1,
            "validation_windows": 1,
            "log_every": 1,
            "checkpoint_every": 1,
            "validate_every": 1,
        }
        return run(dataclasses.replace(experiment, **short), *arguments)

    def begun(*_, **__):
        raise Begun

    with contextlib.ExitStack() as stack:
        for module, name, stub in (
            (loop, "_run", train),
            (cases, "make", case),
            (timing, "ceilings", begun),
            (timing, "compiled", begun),
            (timing, "repeated", begun),
            (tune, "tune", begun),
            (cache_bench, "run", begun),
            (gates, "fit_gates", begun),
            (export.jax_export, "export", begun),
        ):
            stack.enter_context(mock.patch.object(module, name, stub))
        if not real:
            stack.enter_context(mock.patch.object(generate, "Stream", begun))
            stack.enter_context(mock.patch.object(loop, "validate", begun))
        yield


def run_command(line: list[str], stdin: bytes, root: pathlib.Path, watch: Watch, seconds: float = SECONDS):
    """The outcome of the command line `line`, in a word, and the fault in it ("" for none)."""
    from seqlab import cli

    out, err = Screen(), io.StringIO()
    typed = io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8")
    new = [word for flag, word in itertools.pairwise(line) if flag == "--workdir" and word]
    new = [
        pathlib.Path(word)
        for word in new
        if "\0" not in word and len(word) < 200 and not os.path.exists(word)
    ]
    code, fault = None, ""
    watch.allowed, watch.outside, watch.on = (os.path.realpath(root),), [], True
    try:
        with (
            limited(seconds),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            mock.patch.object(sys, "stdin", typed),
        ):
            code = cli.main(line)
    except SystemExit as end:
        code = end.code
        if code not in (0, 2):
            fault = f"SystemExit {code!r}"
    except Begun:
        return "begun", ""
    except Hang:
        fault = f"more than {seconds:.0f} s"
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        place = next(
            (
                f
                for f in reversed(frames)
                if "site-packages" not in f.filename and "/lib/python" not in f.filename
            ),
            None,
        )
        at = f"{pathlib.Path(place.filename).name}:{place.lineno}" if place else "unknown"
        fault = f"{type(error).__name__}: {str(error)[:300]} (at {at})"
    else:
        said = err.getvalue()
        if code not in CODES:
            fault = f"code {code!r}"
        elif "Traceback" in said:
            fault = "a traceback"
        elif code == 2:
            message = said[said.rfind(f"seqlab {line[0]}: error: ") :]
            if ": error: " not in message:
                fault = f"code 2 and no error: {said[-200:]!r}"
            elif not 1 <= message.count("\n") <= LINES:
                fault = f"an error of {message.count(chr(10))} lines: {message[:300]!r}"
            elif message.strip().endswith("error:"):
                fault = "an error without words"
            elif line[0] in ("train", "compare") and any(path.exists() for path in new):
                fault = f"{new} was made for a run that was refused: {message[:200]!r}"
    finally:
        watch.on = False
    if not fault and watch.outside:
        fault = f"wrote outside: {watch.outside[:3]}"
    return f"code {code}", fault


def commands(
    count: int, seed: int, root: pathlib.Path, watch: Watch, real: int = 5, verbose: bool = False
) -> Report:
    """Run `count` command lines in `root`, where a scene was made."""
    rng, report = random.Random(seed), Report()
    grammar = Grammar(rng)
    with cut(real):
        for number in range(count):
            line, stdin = grammar.command(), rng.choice(STDIN)
            begin = time.perf_counter()
            outcome, fault = run_command(line, stdin, root, watch)
            if verbose:
                print(
                    f"{number} {time.perf_counter() - begin:.1f}s {outcome} {fault} {line!r:.300}", flush=True
                )
            report.outcomes[outcome] += 1
            if fault:
                report.add(f"seed {seed}, number {number}: {line!r:.600}", fault)
    return report


@contextlib.contextmanager
def scratch():
    """A folder to work in, which is where the home, temporary files and compiled programs are, too."""
    with tempfile.TemporaryDirectory(prefix="seqlab-fuzz-") as name:
        root = pathlib.Path(os.path.realpath(name)) / "work"
        root.mkdir()
        places = {
            "HOME": root / "home",
            "XDG_CACHE_HOME": root / "cache",
            "TMPDIR": root / "tmp",
            "MPLCONFIGDIR": root / "mpl",
        }
        for key in ("TMPDIR", "MPLCONFIGDIR"):
            places[key].mkdir()
        before, path = os.getcwd(), list(sys.path)
        with mock.patch.dict(
            os.environ, {key: str(value) for key, value in places.items()} | {"HF_HUB_OFFLINE": "1"}
        ):
            tempfile.tempdir = None
            os.chdir(root)
            try:
                make_scene(root)
                yield root
            finally:
                os.chdir(before)
                sys.path[:] = path
                tempfile.tempdir = None


def main() -> int:
    """Draw, run, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--commands", type=int, default=1000)
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--real", type=int, default=20, help="trainings of one step that are not cut")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_args()
    faults = 0
    sys.dont_write_bytecode = True
    with scratch() as root:
        import fuzz_streams

        kinds = {
            "commands": lambda: commands(args.commands, args.seed, root, Watch(), args.real, args.verbose),
            "streams": lambda: fuzz_streams.streams(args.streams, args.seed, args.verbose),
        }
        for name, draw in kinds.items():
            begin = time.perf_counter()
            report = draw()
            for call, fault in report.found:
                print(f"FAULT {fault}\n    {call}", flush=True)
            ends = ", ".join(f"{count} {outcome}" for outcome, count in sorted(report.outcomes.items()))
            print(f"{name}, seed {args.seed}: {ends}; {time.perf_counter() - begin:.0f} s", flush=True)
            faults += len(report.found)
    return 1 if faults else 0


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.path[:0] = [
        str(pathlib.Path(__file__).resolve().parent.parent),
        str(pathlib.Path(__file__).resolve().parent),
    ]
    sys.exit(main())
