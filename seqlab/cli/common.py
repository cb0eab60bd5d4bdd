"""What commands share: arguments, the compile cache, and how a run or a published model is loaded."""

import argparse
import os
import pathlib
import sys
from typing import Any

SIGNALS = {"finished": 0, "SIGHUP": 129, "SIGINT": 130, "SIGTERM": 143}


def add_run(parser: argparse.ArgumentParser) -> None:
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


def add_text(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--text",
        nargs="+",
        action="extend",
        default=[],
        metavar="PATH",
        help="measure on these files and folders; default: what a run holds out, for a published model the held-out "
        "part of Python's standard library",
    )


def add_changes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--fiddler",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help='variations, such as tiny or "longer(4)"',
    )
    add_set(parser, "change fields after the fiddlers, such as model.dim=192")


def add_set(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="PATH=VALUE", help=text)


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def load(args: argparse.Namespace) -> Any:
    """The run or published model that a command names, with what was said of it."""
    from seqlab.studies import runs

    said = {name: getattr(args, name) for name in ("trust", "dtype") if getattr(args, name)}
    return runs.load(args.workdir, args.step, **said)


def compile_cache() -> pathlib.Path:
    """Where compiled programs are kept: where the user says, else below ~/.cache."""
    import jax

    chosen = jax.config.jax_compilation_cache_dir
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    return pathlib.Path(chosen) if chosen else cache / "seqlab" / "xla"


def enable_compile_cache() -> None:
    """Keep what takes longer than 0.3 s to compile. Only the command line does this: a library leaves JAX's
    settings alone."""
    import jax

    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(compile_cache()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
