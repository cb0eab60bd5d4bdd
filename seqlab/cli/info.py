"""The commands that describe the installation: list, doctor, bench."""

import argparse
import json
import pathlib
import shutil
import sys
from typing import Any

from seqlab import kernels
from seqlab.cli.common import add_json, compile_cache


def add_commands(commands: Any) -> None:
    """Add the commands list, doctor and bench."""
    listing = commands.add_parser("list", help="mixers with their contract, configs and fiddlers")
    add_json(listing)
    listing.set_defaults(run=_list)

    doctor = commands.add_parser(
        "doctor", help="versions, devices, which kernels run here and why the others do not"
    )
    add_json(doctor)
    doctor.set_defaults(run=_doctor)

    bench = commands.add_parser("bench", help="verify and time an op against alternative implementations")
    bench.add_argument("op", help=f"one of {', '.join(kernels.__all__)}")
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
        help="float32, bfloat16 or float16; default: that of the shape or of the platform",
    )
    bench.add_argument("--backward", action="store_true", help="also gradients")
    bench.add_argument(
        "--interpret", action="store_true", help="verify the TPU kernels by simulation, without times"
    )
    bench.add_argument(
        "--rounds",
        type=int,
        default=5,
        metavar="N",
        help="times are medians of N rounds; default %(default)s",
    )
    bench.add_argument("--json", type=pathlib.Path, metavar="FILE", help="also write all results to FILE")
    bench.add_argument(
        "--tune",
        type=pathlib.Path,
        metavar="FILE",
        help="find faster block sizes instead, for seqlab.use_blocks(FILE)",
    )
    bench.set_defaults(run=_bench)


def _list(args: argparse.Namespace) -> int:
    from seqlab.tooling import catalog

    content = catalog.catalog()
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    print(json.dumps(content, indent=1) if args.json else catalog.as_text(content, width))
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from seqlab.tooling import doctor

    report = doctor.report(compile_cache())
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
