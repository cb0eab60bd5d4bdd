"""The commands that train: train, compare."""

import argparse
import pathlib
from typing import Any

from seqlab.checks import UserError
from seqlab.cli.common import (
    SIGNALS,
    add_changes,
    add_json,
    enable_compile_cache,
    say,
)


def add_commands(commands: Any) -> None:
    """Add the commands train and compare."""
    train = commands.add_parser("train", help="train a config, or resume a run")
    train.add_argument(
        "config", help="a name (`seqlab list` shows them) or the path of a Python file with base()"
    )
    train.add_argument("--workdir", type=pathlib.Path, metavar="DIR", help="run folder; default runs/CONFIG")
    add_changes(train)
    train.add_argument(
        "--start",
        metavar="PATH",
        help="begin with the model and the weights of a run, of a published folder, its id on the hub, or "
        "of a GGUF file, and its tokenizer, instead of the config's model",
    )
    train.add_argument(
        "--lora", type=int, metavar="RANK", help="with --start: freeze the weights, train low-rank maps"
    )
    train.add_argument(
        "--extend",
        action="store_true",
        help="resume a run with other steps or another optimizer",
    )
    train.add_argument(
        "--distributed",
        nargs="?",
        const="auto",
        metavar="HOST:PORT,COUNT,INDEX",
        help="run as one of several processes; without a value on SLURM and TPU pods",
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
    add_changes(comparing)
    add_json(comparing)
    comparing.set_defaults(run=_compare)


def _train(args: argparse.Namespace) -> int:
    from seqlab.studies.finetune import begin_from
    from seqlab.train import config, processes
    from seqlab.train.loop import run

    if args.distributed:
        processes.join(args.distributed)
    cfg = base = config.load(args.config)
    if args.start is not None:
        cfg = begin_from(cfg, args.start, args.lora)
    elif args.lora is not None:
        raise UserError("--lora is for --start: random weights are not frozen")
    for call in args.fiddler:
        cfg = config.fiddle(cfg, call)
    for assignment in args.set:
        cfg = config.override(cfg, assignment)
    experiment = config.build(cfg)
    workdir = args.workdir or pathlib.Path("runs") / pathlib.Path(args.config).stem
    changes = "".join(f"\n  {line}" for line in config.diff(base, cfg))
    title = f"{args.config} in {workdir}" + (f", changed:{changes}" if changes else "")
    enable_compile_cache()
    return SIGNALS[run(experiment, workdir, cfg, args.extend, title).status]


def _compare(args: argparse.Namespace) -> int:
    from seqlab.studies import compare, report
    from seqlab.train.metrics import as_json

    candidates = compare.plan(args.configs, args.mixers, args.fiddler, args.steps, args.set)
    workdir = args.workdir or pathlib.Path("runs") / "_".join(
        ["compare", *(pathlib.Path(name).stem for name in args.configs)]
    )
    enable_compile_cache()
    result = compare.compare(candidates, workdir)
    if result.status == "finished":
        record = {
            "workdir": str(workdir),
            "quality": result.quality._asdict(),
            "rows": [row._asdict() for row in result.rows],
        }
        print(as_json(record) if args.json else report.as_text(compare.as_table(result)))
        say(f"{workdir}: compare.json, compare.md, compare.png")
    return SIGNALS[result.status]
