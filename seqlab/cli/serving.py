"""The command that measures how streams are served."""

import argparse
import dataclasses
import json
import pathlib
from typing import Any

from seqlab.cli.common import add_json, add_run, enable_compile_cache, load, say


def add_commands(commands: Any) -> None:
    """Add the command."""
    bench = commands.add_parser(
        "serve-bench",
        help="latencies and throughput of many streams under random load, by scheduling policy",
    )
    add_run(bench, default="an untrained model of 2 million parameters")
    bench.add_argument(
        "--policies", metavar="A,B,...", help="sarathi, prefill-first, decode-first; default all of them"
    )
    bench.add_argument(
        "--rows", type=int, default=16, metavar="N", help="streams at once; default %(default)s"
    )
    bench.add_argument(
        "--token-budget", type=int, default=256, metavar="N", help="tokens per step; default %(default)s"
    )
    bench.add_argument("--cache", metavar="POLICY", help="the cache policy of attention layers")
    bench.add_argument(
        "--prefix-bytes", type=int, default=0, metavar="N", help="bytes of shared prefixes; default none"
    )
    trace = bench.add_argument_group("load")
    for name, kind, default, text in (
        ("requests", int, 32, "number of requests"),
        ("rate", float, 4.0, "requests per second (Poisson); 0 for all at once"),
        ("prompt-tokens", int, 32, "mean length of short prompts"),
        ("max-tokens", int, 64, "tokens per answer"),
        ("long-share", float, 0.2, "share of long prompts"),
        ("long-tokens", int, 2000, "length of long prompts"),
        ("shared-tokens", int, 0, "length of a prefix that short prompts share"),
        ("seed", int, 0, "seed of the load"),
    ):
        letter = "N" if kind is int else "X"
        trace.add_argument(
            f"--{name}", type=kind, default=default, metavar=letter, help=f"{text}; default %(default)s"
        )
    bench.add_argument(
        "--out", type=pathlib.Path, metavar="DIR", help="also write a table and a figure there"
    )
    add_json(bench)
    bench.set_defaults(run=_serve_bench)


def _serve_bench(args: argparse.Namespace) -> int:
    from seqlab.serving.schedule import POLICIES
    from seqlab.studies import report, serve_bench

    enable_compile_cache()
    names = [field.name for field in dataclasses.fields(serve_bench.Trace)]
    trace = serve_bench.Trace(**{name: getattr(args, name) for name in names})
    run = None if args.workdir is None else load(args)
    model, tokenizer = (serve_bench.untrained(), None) if run is None else (run.model, run.tokenizer)
    policies = POLICIES if args.policies is None else report.split_specs(args.policies)
    options = {"rows": args.rows, "token_budget": args.token_budget, "cache": args.cache}
    result = serve_bench.run(
        model, trace, policies, prefix_bytes=args.prefix_bytes, tokenizer=tokenizer, **options
    )
    if args.json:
        print(json.dumps(dataclasses.asdict(result)))
    else:
        print(report.as_text(serve_bench.as_table(result)))
    if args.out is not None:
        serve_bench.write(result, args.out)
        say(f"{args.out}: serve_bench.json, serve_bench.md, serve_bench.png")
    return 0
