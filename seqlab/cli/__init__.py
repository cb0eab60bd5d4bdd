"""The command line. Heavy imports are deferred: `seqlab --help` is immediate.

Exit codes: 0 success; 2 user error (one line on stderr); 3 training diverged; 4 another process of the run
was lost; 129, 130 and 143 after SIGHUP, SIGINT and SIGTERM, with a checkpoint saved during training; 1 if
`bench` finds incorrect results, and with a traceback for everything else, which is a bug.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence

from seqlab.checks import UserError
from seqlab.names import search_current_folder

_EPILOG = """\
exit codes: 0 success; 1 bench found incorrect results; 2 user error, in one line; 3 training diverged;
129/130/143 interrupted (training saves a checkpoint first, and the same command resumes from it)"""


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
        if getattr(args, "json", None) is True:  # JSON output for JSON readers
            print(json.dumps({"error": str(error)}))
        return code


def _names_code(args: argparse.Namespace) -> bool:
    """Whether the user typed the name of code (a config file, `module:Name`) or trusts a file: only then are
    modules searched in the current folder."""
    given = (
        getattr(args, name, None)
        for name in ("config", "configs", "fiddler", "set", "mixers", "cache", "caches")
    )
    texts = [text for value in given if value for text in ([value] if isinstance(value, str) else value)]
    typed = any(re.search(r"[A-Za-z_][\w.]*:[A-Za-z_]|\.py$", text) for text in texts)
    return typed or getattr(args, "trust", False)


def _exit_code(error: Exception) -> int | None:
    """2 for a user's error, 3 for divergence, None for a bug."""
    from seqlab.train.checkpoint import CheckpointError
    from seqlab.train.loop import NonFiniteError

    if isinstance(error, NonFiniteError):
        return 3
    return 2 if isinstance(error, OSError | CheckpointError | UserError) else None


def parser() -> argparse.ArgumentParser:
    """The whole command line; nothing heavy is imported for it."""
    from seqlab import __version__
    from seqlab.cli import info, model, serving, train

    top = argparse.ArgumentParser(
        prog="seqlab",
        description="Efficient sequence models in JAX: train them in parallel, stream them indefinitely.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"seqlab {__version__}")
    top.add_argument("--traceback", action="store_true", help="show the Python traceback of every error")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (train, model, serving, info):
        module.add_commands(commands)
    return top
