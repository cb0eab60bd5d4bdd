"""The commands that use a trained model: cache-bench, stream, eval, export, show."""

import argparse
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from seqlab.checks import UserError
from seqlab.cli.common import (
    add_json,
    add_run,
    add_set,
    add_text,
    enable_compile_cache,
    load,
    say,
)


def add_commands(commands: Any) -> None:
    """Add the commands that use a trained model."""
    _add_cache_bench(commands)
    _add_stream(commands)
    _add_eval(commands)
    _add_export(commands)
    _add_show(commands)


def _add_cache_bench(commands: Any) -> None:
    bench = commands.add_parser(
        "cache-bench",
        help="compare cache policies on a trained model, by quality and cost; a table and a figure",
    )
    add_run(bench)
    bench.add_argument(
        "--caches", metavar="A,B,...", help='caches, such as "full(2048),sinks(4)+window(252)+int4,duo(0.75)"'
    )
    bench.add_argument(
        "--length",
        type=int,
        metavar="N",
        help="steps of the held-out streams; default four times the training length",
    )
    bench.add_argument("--rows", type=int, metavar="N", help="held-out streams")
    bench.add_argument(
        "--items",
        type=int,
        default=16,
        metavar="N",
        help="contexts with passkeys per depth; default %(default)s",
    )
    bench.add_argument(
        "--turns", type=int, default=4, metavar="N", help="questions to a shared context; default %(default)s"
    )
    bench.add_argument(
        "--fit-gates",
        type=int,
        metavar="STEPS",
        help="first fit DuoAttention's gates, saved in the run's folder",
    )
    bench.add_argument(
        "--out", type=pathlib.Path, metavar="DIR", help="folder of the figures; default WORKDIR/cache_bench"
    )
    add_text(bench)
    add_json(bench)
    bench.set_defaults(run=_cache_bench)


_PENALTIES = {
    "repetition": "divide positive logits of the last 512 tokens by X, multiply negative ones",
    "presence": "subtract X from the logits of the last 512 tokens",
    "frequency": "subtract X from the logits of the last 512 tokens per occurrence",
}


def _add_stream(commands: Any) -> None:
    stream = commands.add_parser("stream", help="generate text with a trained model, indefinitely by default")
    add_run(stream)
    stream.add_argument("--prompt", default="", metavar="TEXT", help="the prompt; - reads it from stdin")
    stream.add_argument("--max-tokens", type=int, metavar="N", help="default: no end (Ctrl-C stops)")
    stream.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        metavar="T",
        help="0 takes the likeliest token; default %(default)s",
    )
    stream.add_argument("--top-k", type=int, metavar="K", help="sample from the K likeliest tokens")
    stream.add_argument(
        "--top-p", type=float, metavar="P", help="sample from the smallest set of total probability P"
    )
    stream.add_argument(
        "--min-p",
        type=float,
        metavar="P",
        help="sample from tokens with at least P times the likeliest one's probability",
    )
    for name, does in _PENALTIES.items():
        stream.add_argument(f"--{name}-penalty", type=float, metavar="X", help=does)
    stream.add_argument(
        "--bias",
        action="append",
        default=[],
        metavar="TOKEN=X",
        help="add X to the logit of a token id; -inf forbids it; may be repeated",
    )
    stream.add_argument("--seed", type=int, default=0)
    stream.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="stop after this text; may be repeated",
    )
    stream.add_argument(
        "--include-stop",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also print the stop text; default: yes",
    )
    stream.add_argument(
        "--top-logprobs",
        type=int,
        default=0,
        metavar="N",
        help="print one line of JSON per token, with the N likeliest tokens and their log-probabilities",
    )
    stream.add_argument(
        "--cache",
        metavar="SPEC",
        help="cache policy instead of that of training, e.g. sinks(4)+window(1020)+int4",
    )
    stream.add_argument(
        "--draft",
        metavar="D",
        help="speculative decoding: ngram, early-exit:K (the first K layers), or a model's folder",
    )
    stream.add_argument(
        "--chat",
        action="store_true",
        help="treat the prompt as a message for the chat template; without one, chat interactively",
    )
    stream.add_argument("--system", metavar="TEXT", help="with --chat: the system message")
    stream.set_defaults(run=_stream)


def _add_eval(commands: Any) -> None:
    evaluate = commands.add_parser(
        "eval", help="evaluate a trained model on held-out data with the task's metric"
    )
    add_run(evaluate)
    add_set(evaluate, "change fields of the data, such as data.length=1024")
    add_text(evaluate)
    evaluate.add_argument("--length", type=int, metavar="N", help="tokens per window of text")
    add_json(evaluate)
    evaluate.set_defaults(run=_eval)


def _add_export(commands: Any) -> None:
    exporting = commands.add_parser(
        "export", help="export a trained model for use without seqlab: safetensors and StableHLO"
    )
    add_run(exporting)
    exporting.add_argument(
        "--out", type=pathlib.Path, metavar="DIR", help="a new folder; default WORKDIR/export"
    )
    exporting.add_argument(
        "--chunk",
        type=int,
        default=64,
        metavar="N",
        help="steps of a prompt per call; default %(default)s",
    )
    exporting.add_argument(
        "--platforms", default="cpu,cuda,tpu", metavar="A,B", help="target platforms; default %(default)s"
    )
    exporting.add_argument("--cache", metavar="SPEC", help="cache policy, as for stream")
    exporting.set_defaults(run=_export)


def _add_show(commands: Any) -> None:
    showing = commands.add_parser(
        "show", help="plot predictions and feature maps of an image model for held-out pictures"
    )
    add_run(showing)
    showing.add_argument("--count", type=int, default=6, metavar="N", help="pictures; default %(default)s")
    showing.add_argument(
        "--output", type=pathlib.Path, metavar="FILE", help="default: show.png in the run folder"
    )
    showing.set_defaults(run=_show)


def _cache_bench(args: argparse.Namespace) -> int:
    from seqlab.studies import cache_bench, gates, report

    enable_compile_cache()
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
    say(f"{planned.folder}: cache_bench.json, cache_bench.md, cache_bench.png")
    return 0


def _stream(args: argparse.Namespace) -> int:
    from seqlab.models.attention import bytes_per_step, with_cache
    from seqlab.streaming.generate import stream_generate
    from seqlab.studies import runs
    from seqlab.studies.conversation import Conversation

    enable_compile_cache()
    run = load(args)
    if run.tokenizer is None:
        kind = (
            "model of numbers, not of tokens"
            if getattr(run.model, "origin", None) is None
            else "folder without a tokenizer.json"
        )
        raise runs.RunError(f"{args.workdir} is a {kind}: there is nothing to stream as text")
    if args.system is not None and not args.chat:
        raise runs.RunError("--system is for --chat")
    options = _options(args)
    if args.draft is not None:
        options["draft"] = _draft(args)
    prompt = _typed() if args.prompt == "-" else args.prompt
    talk = Conversation(run, args.system, **options) if args.chat else None
    stream = None if talk else stream_generate(run.model, prompt, tokenizer=run.tokenizer, **options)
    if args.cache:
        say(
            f"cache {args.cache}: {bytes_per_step(with_cache(run.model, args.cache), run.model.dtype):,.1f} "
            "bytes a remembered step"
        )
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # an unsupported character must not end the stream
    code = 0
    try:
        for tokens in map(talk.say, [prompt] if prompt else _lines()) if talk else [stream]:
            for token in tokens:
                print(_shown(token, args.top_logprobs), end="", flush=True)
            if not args.top_logprobs:
                print(flush=True)
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # the reader has seen enough; Python's own flush at exit must not complain again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    stream = talk.stream if talk else stream
    if stream is None:  # nothing was said
        return code
    stats = stream.stats
    say(
        f"\n{stats['tokens']} tokens, {stats['tokens_per_second']:,.0f} tokens/s; {stats['state_bytes']:,} "
        "bytes of state; "
        f"{stats['programs']} programs compiled in {stats['compile_seconds']:.1f} s"
        + (f"; {stats['acceptance']:.0%} of {stats['draft_tokens']} drafted accepted" if args.draft else "")
    )
    return code


def _draft(args: argparse.Namespace) -> Any:
    """The draft of `stream_generate`."""
    from seqlab.streaming.drafts import Draft, EarlyExit, NGram
    from seqlab.studies import runs

    kind, _, layers = args.draft.partition(":")
    if args.draft == "ngram":
        return NGram()
    if kind == "early-exit":
        if not layers.isdecimal():
            raise UserError(f"--draft: got {args.draft!r}, expected early-exit:K with a number of layers")
        return EarlyExit(int(layers))
    return Draft(runs.load(args.draft, trust=args.trust).model)


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `stream_generate`."""
    names = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "stop", "cache", "include_stop")
    options = {name: getattr(args, name) for name in (*names, "top_logprobs")}
    penalties = {f"{name}_penalty": getattr(args, f"{name}_penalty") for name in _PENALTIES}
    options |= {name: value for name, value in penalties.items() if value is not None}
    if args.bias:
        options["logit_bias"] = dict(map(_bias, args.bias))
    return options


def _bias(text: str) -> tuple[int, float]:
    token, _, value = text.partition("=")
    try:
        return int(token), float(value)
    except ValueError:
        raise UserError(
            f"--bias: got {text!r}, expected a token's number and what is added, such as 42=-1.5"
        ) from None


def _shown(token: Any, top: int) -> str:
    """The printed form of a token: its text, or JSON."""
    from seqlab.train.metrics import as_json

    if not top:
        return token.text
    likeliest = [{"token": one, "logprob": value} for one, value in token.top]
    record = {"token": token.token, "text": token.text, "logprob": token.logprob, "top": likeliest}
    return as_json(record | {"finished": token.finished}) + "\n"


def _typed() -> str:
    """All of stdin."""
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UserError(f"--prompt -: stdin is not written in {error.encoding} ({error})") from error


def _lines() -> Iterator[str]:
    """Lines typed by the user, until the end of input."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError as error:
            raise UserError(f"--chat: stdin is not written in {error.encoding} ({error})") from error
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")


def _with_other_data(base: Any, assignments: Sequence[str]) -> Any:
    """A run's config with other data or metric, and the same model."""
    from seqlab.train import config

    cfg = base
    for assignment in assignments:
        cfg = config.override(cfg, assignment)
    fixed = [line for line in config.diff(base, cfg) if line.startswith("model")]
    if fixed:
        raise config.ConfigError(f"model.* cannot be overridden when evaluating a trained run: {fixed[0]}")
    return cfg


def _eval(args: argparse.Namespace) -> int:
    from seqlab.studies import runs, texts
    from seqlab.train import config
    from seqlab.train.metrics import as_json

    enable_compile_cache()
    run = load(args)
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
            f"{args.workdir}, step {run.step}: {quality.sentence(result.value)}{perplexity} over "
            f"{result.targets:,} "
            "targets"
        )
    return 0


def _export(args: argparse.Namespace) -> int:
    from seqlab.interop import export
    from seqlab.models.attention import with_cache

    run = load(args)
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
    enable_compile_cache()
    print(show(args.workdir, step=args.step, trust=args.trust, count=args.count, path=args.output))
    return 0
