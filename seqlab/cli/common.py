"""Shared parts of commands: arguments, the compile cache, and loading of runs and published models."""

import argparse
import os
import pathlib
import sys
from typing import Any

SIGNALS = {"finished": 0, "SIGHUP": 129, "SIGINT": 130, "SIGTERM": 143}


def add_run(parser: argparse.ArgumentParser, default: str = "") -> None:
    """The arguments that name a model; `default` says what is used without one, if there need not be one."""
    text = "folder of a run or of a published model, or its id on the hub"
    parser.add_argument(
        "workdir",
        type=pathlib.Path,
        nargs="?" if default else None,
        help=f"{text}; default {default}" if default else text,
    )
    parser.add_argument("--step", type=int, help="a checkpoint; default: the last good one")
    parser.add_argument(
        "--dtype", metavar="NAME", help="compute dtype, float32 or bfloat16, instead of the config's"
    )
    parser.add_argument(
        "--trust",
        action="store_true",
        help="allow names outside seqlab in the run's config, such as your own mixers: this runs their code",
    )


def add_text(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--text",
        nargs="+",
        action="extend",
        default=[],
        metavar="PATH",
        help="evaluate on these files and folders; default: the held-out data of a run, for a published "
        "model the held-out part of Python's standard library",
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
    """The run or published model named by a command, with its options."""
    from seqlab.studies import runs

    said = {name: getattr(args, name) for name in ("trust", "dtype") if getattr(args, name)}
    return runs.load(args.workdir, args.step, **said)


def compile_cache() -> pathlib.Path:
    """The folder of compiled programs: the user's choice, else below ~/.cache."""
    import jax

    chosen = jax.config.jax_compilation_cache_dir
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    return pathlib.Path(chosen) if chosen else cache / "seqlab" / "xla"


def enable_compile_cache() -> None:
    """Cache programs that take longer than 0.3 s to compile. Only the command line does this: the library
    does not change JAX's settings."""
    import jax

    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(compile_cache()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
