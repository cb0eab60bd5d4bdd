"""The commands that serve streams, and that measure how they are served."""

import argparse
import dataclasses
import json
import pathlib
from typing import Any

from seqlab.cli.common import add_json, add_run, enable_compile_cache, load, say


def add_commands(commands: Any) -> None:
    """Add the commands."""
    _add_serve(commands)
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


def _add_serve(commands: Any) -> None:
    serving = commands.add_parser(
        "serve", help="serve a model over HTTP, in the dialect of OpenAI's completions and chat"
    )
    add_run(serving)
    serving.add_argument(
        "--host", default="127.0.0.1", help="address; default %(default)s, this machine only"
    )
    serving.add_argument("--port", type=int, default=8000, help="default %(default)s; 0 for any free one")
    serving.add_argument(
        "--api-key", metavar="KEY", help="required from clients; default $SEQLAB_API_KEY, else none"
    )
    serving.add_argument("--name", help="of the model; default the folder's")
    serving.add_argument("--cache", metavar="POLICY", help="the cache policy of attention layers")
    for name, default, text in (
        ("rows", 8, "streams at once"),
        ("token-budget", 256, "tokens per step"),
        ("steps", 4096, "longest stream, where caches grow"),
        ("max-waiting", 256, "requests that wait; more are refused"),
        ("max-body-bytes", 2**20, "bytes of a request"),
        ("prefix-bytes", 2**28, "bytes of states kept by prefixes of prompts; 0 for none"),
        ("top-logprobs", 5, "likeliest tokens that a client may ask for"),
    ):
        serving.add_argument(
            f"--{name}", type=int, default=default, metavar="N", help=f"{text}; default %(default)s"
        )
    serving.add_argument("--max-tokens", type=int, metavar="N", help="tokens per answer; default no bound")
    serving.add_argument(
        "--drain-seconds",
        type=float,
        default=30.0,
        metavar="X",
        help="time for streams to finish after SIGTERM; default %(default)s",
    )
    serving.add_argument(
        "--state-folder", type=pathlib.Path, metavar="DIR", help="where unfinished streams are saved then"
    )
    serving.add_argument("--no-warm-up", action="store_true", help="compile when requests need it")
    serving.set_defaults(run=_serve)


def _serve(args: argparse.Namespace) -> int:
    import os

    from seqlab.checks import UserError
    from seqlab.serving.batcher import Batcher

    try:
        from seqlab.serving.server.app import Service
        from seqlab.serving.server.run import serve
    except ImportError as error:
        raise UserError(f"the server needs {error.name}: pip install 'seqlab[serve]'") from error
    enable_compile_cache()
    if not 0 <= args.port < 2**16:
        raise UserError(f"--port must be from 0 to 65535, got {args.port}")
    run = load(args)
    if run.tokenizer is None:
        raise UserError(f"{args.workdir} has no tokenizer: there is nothing to serve as text")
    batcher = Batcher(
        run.model,
        args.rows,
        cache=args.cache,
        tokenizer=run.tokenizer,
        token_budget=args.token_budget,
        steps=args.steps,
        waiting=args.max_waiting,
        prefixes=args.prefix_bytes,
        top_logprobs=args.top_logprobs,
    )
    key = args.api_key or os.environ.get("SEQLAB_API_KEY")
    if key is None and args.host not in ("127.0.0.1", "::1", "localhost"):
        say(f"warning: {args.host} may be reached from other machines, and there is no --api-key")
    if not args.no_warm_up:
        done = batcher.warm_up()
        say(f"{done['programs']} programs compiled in {done['seconds']:.1f} s")
    chat = run.chat if getattr(run.tokenizer, "template", None) is not None else None
    service = Service(
        batcher,
        args.name or args.workdir.resolve().name,
        chat,
        key,
        body_limit=args.max_body_bytes,
        token_limit=args.max_tokens,
    )
    return serve(
        service,
        args.host,
        args.port,
        drain_seconds=args.drain_seconds,
        state_folder=args.state_folder,
        say=say,
    )


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
