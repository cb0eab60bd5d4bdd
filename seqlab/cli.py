"""The command line. It imports nothing heavy before it knows what to do: `seqlab --help` answers at once.

Exit codes: 0 done; 2 for what a user can put right (one line on stderr); 3 where training diverged; 4 where
another process of the run was lost; 129, 130 and 143 after SIGHUP, SIGINT and SIGTERM, with a checkpoint saved
where training was under way; 1 for a result that `bench` finds wrong, and with a traceback for everything else,
which is a bug.
"""

import argparse
import json
import os
import pathlib
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from seqlab.names import search_current_folder

_SIGNALS = {"finished": 0, "SIGHUP": 129, "SIGINT": 130, "SIGTERM": 143}
_EPILOG = """\
exit codes: 0 done; 1 bench found something wrong; 2 an error of yours, in one line; 3 the training diverged; 129/130/143 interrupted
(training saves a checkpoint first, and the same command goes on from there)"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line with `arguments` (those of the process by default); returns the exit code."""
    args = parser().parse_args(arguments)
    try:
        if _names_code(args):
            search_current_folder()
        return args.run(args)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        code = _exit_code(error)
        if code is None or args.traceback:
            raise
        print(f"seqlab {args.command}: error: {error}", file=sys.stderr)
        if getattr(args, "json", None) is True:  # who reads JSON gets JSON
            print(json.dumps({"error": str(error)}))
        return code


def _names_code(args: argparse.Namespace) -> bool:
    """Whether the user typed the name of code (a config file, `module:Name`) or trusts the names of a file: only then
    may modules lie in the folder one works in."""
    given = (
        getattr(args, name, None)
        for name in ("config", "configs", "fiddler", "set", "mixers", "cache", "caches")
    )
    texts = [text for value in given if value for text in ([value] if isinstance(value, str) else value)]
    typed = any(re.search(r"[A-Za-z_][\w.]*:[A-Za-z_]|\.py$", text) for text in texts)
    return typed or getattr(args, "trust", False)


def _exit_code(error: Exception) -> int | None:
    """2 for a user's error, 3 for divergence, None for a bug. A ValueError is the user's if seqlab says so;
    Python says it of bugs too."""
    from seqlab.train.checkpoint import CheckpointError
    from seqlab.train.loop import NonFiniteError

    if isinstance(error, NonFiniteError):
        return 3
    return (
        2
        if isinstance(error, OSError | CheckpointError)
        or (isinstance(error, ValueError) and _raised_here(error))
        else None
    )


def _raised_here(error: Exception) -> bool:
    """Whether `error` comes from a `raise` statement of seqlab."""
    import dis

    last = error.__traceback__
    while last.tb_next is not None:
        last = last.tb_next
    ours = last.tb_frame.f_globals.get("__name__", "").partition(".")[0] == "seqlab"
    return ours and dis.opname[last.tb_frame.f_code.co_code[last.tb_lasti]] == "RAISE_VARARGS"


def parser() -> argparse.ArgumentParser:
    """The whole command line; nothing heavy is imported for it."""
    from seqlab import __version__

    top = argparse.ArgumentParser(
        prog="seqlab",
        description="Efficient sequence models in JAX: train them in parallel, stream them for ever.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"seqlab {__version__}")
    top.add_argument("--traceback", action="store_true", help="show the Python traceback of every error")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_making(commands)
    _add_using(commands)
    _add_telling(commands)
    return top


def _add_making(commands: Any) -> None:
    """The commands that train."""
    train = commands.add_parser("train", help="train a config, or go on with a run")
    train.add_argument(
        "config", help="a name (`seqlab list` shows them) or the path of a Python file with base()"
    )
    train.add_argument("--workdir", type=pathlib.Path, metavar="DIR", help="run folder; default runs/CONFIG")
    _add_changes(train)
    train.add_argument(
        "--extend",
        action="store_true",
        help="go on with a run though steps or the optimizer are not those it began with",
    )
    train.add_argument(
        "--distributed",
        nargs="?",
        const="auto",
        metavar="HOST:PORT,COUNT,INDEX",
        help="as one of several processes; alone where the cluster knows (SLURM, TPU pods)",
    )
    train.set_defaults(run=_train)

    comparing = commands.add_parser(
        "compare", help="train configs, or one with several mixers, on one budget; a table and a figure"
    )
    comparing.add_argument("configs", nargs="+", metavar="config", help="names or paths, as for train")
    comparing.add_argument(
        "--mixers",
        metavar="A,B,...",
        help='each config with each of these, such as "mamba(state_size=4),attention"',
    )
    comparing.add_argument("--steps", type=int, metavar="N", help="updates of every run")
    comparing.add_argument(
        "--workdir", type=pathlib.Path, metavar="DIR", help="folder of the runs; default runs/compare_CONFIGS"
    )
    _add_changes(comparing)
    _add_json(comparing)
    comparing.set_defaults(run=_compare)


def _add_using(commands: Any) -> None:
    """The commands that do something with a trained model."""
    bench = commands.add_parser(
        "cache-bench",
        help="what a trained model is worth with other caches, and what they cost; a table and a figure",
    )
    _add_run(bench)
    bench.add_argument(
        "--caches", metavar="A,B,...", help='caches, such as "full(2048),sinks(4)+window(252)+int4,duo(0.75)"'
    )
    bench.add_argument(
        "--length",
        type=int,
        metavar="N",
        help="steps of the held-out streams; default four times the trained length",
    )
    bench.add_argument("--rows", type=int, metavar="N", help="held-out streams")
    bench.add_argument(
        "--items",
        type=int,
        default=16,
        metavar="N",
        help="contexts with pass keys, for every depth; default %(default)s",
    )
    bench.add_argument(
        "--turns", type=int, default=4, metavar="N", help="questions to a shared context; default %(default)s"
    )
    bench.add_argument(
        "--fit-gates",
        type=int,
        metavar="STEPS",
        help="first fit DuoAttention's gates, kept in the run's folder",
    )
    bench.add_argument(
        "--out", type=pathlib.Path, metavar="DIR", help="folder of the figures; default WORKDIR/cache_bench"
    )
    _add_text(bench)
    _add_json(bench)
    bench.set_defaults(run=_cache_bench)

    stream = commands.add_parser("stream", help="generate text with a trained model, live and without end")
    _add_run(stream)
    stream.add_argument("--prompt", default="", metavar="TEXT", help="- reads it from stdin")
    stream.add_argument("--max-tokens", type=int, metavar="N", help="default: no end (Ctrl-C stops)")
    stream.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        metavar="T",
        help="0 takes the likeliest token; default %(default)s",
    )
    stream.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    stream.add_argument(
        "--top-p", type=float, metavar="P", help="draw from the smallest set of probability P"
    )
    stream.add_argument("--seed", type=int, default=0)
    stream.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end after this text; may be given several times",
    )
    stream.add_argument(
        "--cache",
        metavar="SPEC",
        help="what attention remembers instead of what it was trained with, e.g. sinks(4)+window(1020)+int4",
    )
    stream.add_argument(
        "--chat",
        action="store_true",
        help="the prompt is a message, written by the model's chat template; without one, talk line by line",
    )
    stream.add_argument("--system", metavar="TEXT", help="with --chat: the message from the system")
    stream.set_defaults(run=_stream)

    evaluate = commands.add_parser(
        "eval", help="what a trained model is worth on the held-out data, in the figure of its task"
    )
    _add_run(evaluate)
    _add_set(evaluate, "change fields of the data, such as data.length=1024")
    _add_text(evaluate)
    evaluate.add_argument("--length", type=int, metavar="N", help="tokens a window of text")
    _add_json(evaluate)
    evaluate.set_defaults(run=_eval)

    exporting = commands.add_parser(
        "export", help="a trained model for programs without seqlab: safetensors and StableHLO"
    )
    _add_run(exporting)
    exporting.add_argument(
        "--out", type=pathlib.Path, metavar="DIR", help="a new folder; default WORKDIR/export"
    )
    exporting.add_argument(
        "--chunk",
        type=int,
        default=64,
        metavar="N",
        help="steps of a prompt that are read at once; default %(default)s",
    )
    exporting.add_argument(
        "--platforms", default="cpu,cuda,tpu", metavar="A,B", help="what it can run on; default %(default)s"
    )
    exporting.add_argument("--cache", metavar="SPEC", help="what attention remembers, as for stream")
    exporting.set_defaults(run=_export)

    showing = commands.add_parser(
        "show", help="draw what a model of images says of held-out pictures, and its feature maps"
    )
    _add_run(showing)
    showing.add_argument("--count", type=int, default=6, metavar="N", help="pictures; default %(default)s")
    showing.add_argument(
        "--output", type=pathlib.Path, metavar="FILE", help="default: show.png in the folder of the run"
    )
    showing.set_defaults(run=_show)


def _add_telling(commands: Any) -> None:
    """The commands that say what there is."""
    listing = commands.add_parser("list", help="mixers with their contract, configs and fiddlers")
    _add_json(listing)
    listing.set_defaults(run=_list)

    doctor = commands.add_parser(
        "doctor", help="versions, devices, which kernels run here and why the others do not"
    )
    _add_json(doctor)
    doctor.set_defaults(run=_doctor)

    bench = commands.add_parser(
        "bench", help="how fast an op is here beside others that compute the same, once it is right"
    )
    bench.add_argument("op", help="attention, conv, decode_attention, linear_attention, scan, ...")
    bench.add_argument(
        "--impl",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="implementations; default: all that run here",
    )
    bench.add_argument(
        "--shape",
        nargs="+",
        action="extend",
        default=[],
        metavar="WORD",
        help="named shapes, and changes such as t=512",
    )
    bench.add_argument(
        "--dtype",
        help="float32, bfloat16 or float16; default: that of the shape, or what the platform is made for",
    )
    bench.add_argument("--backward", action="store_true", help="gradients too")
    bench.add_argument(
        "--interpret", action="store_true", help="simulate the kernels for TPUs: are they right? No times"
    )
    bench.add_argument(
        "--rounds", type=int, default=5, metavar="N", help="times are medians of so many; default %(default)s"
    )
    bench.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write everything there, too")
    bench.add_argument(
        "--tune",
        type=pathlib.Path,
        metavar="FILE",
        help="find faster block sizes instead, for seqlab.use_blocks(FILE)",
    )
    bench.set_defaults(run=_bench)


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "workdir",
        type=pathlib.Path,
        help="the folder of a run or of a published model, or the id of one at the hub",
    )
    parser.add_argument("--step", type=int, help="a checkpoint; default: the last good one")
    parser.add_argument(
        "--dtype", metavar="NAME", help="compute in float32 or bfloat16, instead of what the config says"
    )
    parser.add_argument(
        "--trust",
        action="store_true",
        help="import what the run's config names outside seqlab, your own mixers for instance: that runs its code",
    )


def _add_text(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--text",
        nargs="+",
        action="extend",
        default=[],
        metavar="PATH",
        help="measure on these files and folders; default: what a run holds out, for a published model the held-out "
        "part of Python's standard library",
    )


def _add_changes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--fiddler",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help='variations, such as tiny or "longer(4)"',
    )
    _add_set(parser, "change fields after the fiddlers, such as model.dim=192")


def _add_set(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="PATH=VALUE", help=text)


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def _train(args: argparse.Namespace) -> int:
    from seqlab.train import config, processes
    from seqlab.train.loop import run

    if args.distributed:
        processes.join(args.distributed)
    cfg = base = config.load(args.config)
    for call in args.fiddler:
        cfg = config.fiddle(cfg, call)
    for assignment in args.set:
        cfg = config.override(cfg, assignment)
    experiment = config.build(cfg)
    workdir = args.workdir or pathlib.Path("runs") / pathlib.Path(args.config).stem
    changes = "".join(f"\n  {line}" for line in config.diff(base, cfg))
    title = f"{args.config} in {workdir}" + (f", changed:{changes}" if changes else "")
    _enable_compile_cache()
    return _SIGNALS[run(experiment, workdir, cfg, args.extend, title).status]


def _compare(args: argparse.Namespace) -> int:
    from seqlab.studies import compare, report
    from seqlab.train.metrics import as_json

    candidates = compare.plan(args.configs, args.mixers, args.fiddler, args.steps, args.set)
    workdir = args.workdir or pathlib.Path("runs") / "_".join(
        ["compare", *(pathlib.Path(name).stem for name in args.configs)]
    )
    _enable_compile_cache()
    result = compare.compare(candidates, workdir)
    if result.status == "finished":
        record = {
            "workdir": str(workdir),
            "quality": result.quality._asdict(),
            "rows": [row._asdict() for row in result.rows],
        }
        print(as_json(record) if args.json else report.as_text(compare.as_table(result)))
        _say(f"{workdir}: compare.json, compare.md, compare.png")
    return _SIGNALS[result.status]


def _cache_bench(args: argparse.Namespace) -> int:
    from seqlab.studies import cache_bench, gates, report

    _enable_compile_cache()
    if args.fit_gates is not None:
        gates.fit(args.workdir, args.fit_gates, trust=args.trust)
    sizes = {
        name: getattr(args, name)
        for name in ("step", "length", "rows", "items", "turns", "out", "trust", "dtype", "text")
    }
    planned = cache_bench.plan(args.workdir, args.caches, **sizes)
    result = cache_bench.run(planned)
    if args.json:
        print((planned.folder / "cache_bench.json").read_text(), end="")
    else:
        print(report.as_text(cache_bench.as_table(result)))
    _say(f"{planned.folder}: cache_bench.json, cache_bench.md, cache_bench.png")
    return 0


def _load(args: argparse.Namespace) -> Any:
    """The run or published model that a command names, with what was said of it."""
    from seqlab.studies import runs

    said = {name: getattr(args, name) for name in ("trust", "dtype") if getattr(args, name)}
    return runs.load(args.workdir, args.step, **said)


def _stream(args: argparse.Namespace) -> int:
    from seqlab.models.attention import bytes_per_step, with_cache
    from seqlab.streaming.generate import stream_generate
    from seqlab.studies import runs
    from seqlab.studies.conversation import Conversation

    _enable_compile_cache()
    run = _load(args)
    if run.tokenizer is None:
        kind = (
            "model of numbers, not of tokens"
            if run.model.origin is None
            else "folder without a tokenizer.json"
        )
        raise runs.RunError(f"{args.workdir} is a {kind}: there is nothing to stream as text")
    if args.system is not None and not args.chat:
        raise runs.RunError("--system is for --chat")
    names = ("max_tokens", "temperature", "top_k", "top_p", "seed", "stop", "cache")
    options = {name: getattr(args, name) for name in names}
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    talk = Conversation(run, args.system, **options) if args.chat else None
    stream = None if talk else stream_generate(run.model, prompt, tokenizer=run.tokenizer, **options)
    if args.cache:
        _say(
            f"cache {args.cache}: {bytes_per_step(with_cache(run.model, args.cache), run.model.dtype):,.1f} "
            "bytes a remembered step"
        )
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character is no reason to stop
    code = 0
    try:
        for tokens in map(talk.say, [prompt] if prompt else _lines()) if talk else [stream]:
            for token in tokens:
                print(token.text, end="", flush=True)
            print(flush=True)
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # the reader has seen enough; Python's own flush at exit must not complain again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    stream = talk.stream if talk else stream
    if stream is None:  # nothing was said
        return code
    stats = stream.stats
    _say(
        f"\n{stats['tokens']} tokens, {stats['tokens_per_second']:,.0f} tokens/s; {stats['state_bytes']:,} "
        "bytes of state; "
        f"{stats['programs']} programs compiled in {stats['compile_seconds']:.1f} s"
    )
    return code


def _lines() -> Iterator[str]:
    """What a person types, line by line, until there is no more."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")


def _with_other_data(base: Any, assignments: Sequence[str]) -> Any:
    """A run's config with other data or metric; its model stays what it is."""
    from seqlab.train import config

    cfg = base
    for assignment in assignments:
        cfg = config.override(cfg, assignment)
    fixed = [line for line in config.diff(base, cfg) if line.startswith("model")]
    if fixed:
        raise config.ConfigError(f"the model of a run is what it is, and cannot be set: {fixed[0]}")
    return cfg


def _eval(args: argparse.Namespace) -> int:
    from seqlab.studies import runs, texts
    from seqlab.train import config
    from seqlab.train.metrics import as_json

    _enable_compile_cache()
    run = _load(args)
    experiment = texts.experiment_of(run, args.text, args.length)
    if args.set and isinstance(experiment.data, texts.HeldOutText):
        raise config.ConfigError(f"--set {args.set[0]}: text has no fields to set: use --text and --length")
    if args.set:
        experiment = config.build(_with_other_data(run.config, args.set))
    result = runs.evaluate(run.model, experiment)
    quality = result.quality
    record = {
        "workdir": str(args.workdir),
        "step": run.step,
        quality.name: result.value,
        "targets": result.targets,
    }
    perplexity = ""
    if isinstance(experiment.data, texts.HeldOutText):
        record["perplexity"] = 2**result.value
        perplexity = f" (perplexity {record['perplexity']:.4f})"
    if args.json:
        print(as_json(record))
    else:
        print(
            f"{args.workdir}, step {run.step}: {quality.sentence(result.value)}{perplexity} over {result.targets:,} "
            "targets"
        )
    return 0


def _export(args: argparse.Namespace) -> int:
    from seqlab.interop import export
    from seqlab.models.attention import with_cache

    run = _load(args)
    model = with_cache(run.model, args.cache) if args.cache else run.model
    folder = export.bundle(
        model,
        args.out or (args.workdir.parent if args.workdir.is_file() else args.workdir) / "export",
        chunk=args.chunk,
        platforms=args.platforms.split(","),
        about={"workdir": str(args.workdir), "step": run.step},
        tokenizer=run.tokenizer,
    )
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            print(f"{path}  {path.stat().st_size:,} bytes")
    return 0


def _show(args: argparse.Namespace) -> int:
    from seqlab.studies.runs import RunError
    from seqlab.studies.show import show

    if args.count < 1:
        raise RunError(f"--count must be at least 1, got {args.count}")
    _enable_compile_cache()
    print(show(args.workdir, step=args.step, trust=args.trust, count=args.count, path=args.output))
    return 0


def _list(args: argparse.Namespace) -> int:
    from seqlab.tooling import catalog

    content = catalog.catalog()
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    print(json.dumps(content, indent=1) if args.json else catalog.as_text(content, width))
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from seqlab.tooling import doctor

    report = doctor.report(_compile_cache())
    print(json.dumps(report, indent=1) if args.json else doctor.as_text(report))
    return 0


def _bench(args: argparse.Namespace) -> int:
    from seqlab import bench
    from seqlab.bench import show

    if args.rounds < 1:
        raise bench.BenchError(f"--rounds must be at least 1, got {args.rounds}")
    planned = bench.plan(args.op, args.impl, args.shape, args.dtype, args.backward, args.interpret)
    if args.tune:
        show.show_tuning(planned, args.rounds, args.tune)
        return 0
    return 1 if show.show(planned, args.rounds, args.json) else 0


def _compile_cache() -> pathlib.Path:
    """Where compiled programs are kept: where the user says, else below ~/.cache."""
    import jax

    chosen = jax.config.jax_compilation_cache_dir
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    return pathlib.Path(chosen) if chosen else cache / "seqlab" / "xla"


def _enable_compile_cache() -> None:
    """Keep what takes longer than 0.3 s to compile. Only the command line does this: a library leaves JAX's
    settings alone."""
    import jax

    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(_compile_cache()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
