"""Load tests of the batcher: the same arrivals under each policy, as latencies and throughput.

Streams are judged by what a reader sees: the time to the first token, and the time between deliveries of
tokens, which a long prompt of somebody else can stretch (Sarathi-Serve, arXiv 2403.02310).
"""

import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from seqlab.checks import UserError, check_at_least, check_positive
from seqlab.module import Module, count_params
from seqlab.serving.batcher import Batcher
from seqlab.serving.schedule import POLICIES
from seqlab.studies import report
from seqlab.tokenizers import ByteTokenizer, Tokenizer


class Arrival(NamedTuple):
    """A request of a trace: seconds after its beginning, prompt [t], tokens to draw."""

    at: float
    prompt: np.ndarray
    max_tokens: int


@dataclasses.dataclass(frozen=True)
class Trace:
    """Random arrivals.

    Attributes:
      requests: their number.
      rate: requests per second (Poisson); 0 for all at once.
      prompt_tokens: of short prompts, on average; they have half to one and a half times as many.
      max_tokens: drawn per request.
      long_share, long_tokens: the share of long prompts, and their length.
      shared_tokens: of a prefix that all short prompts share; 0 for none.
      seed: of all draws.
    """

    requests: int = 32
    rate: float = 4.0
    prompt_tokens: int = 32
    max_tokens: int = 64
    long_share: float = 0.2
    long_tokens: int = 2000
    shared_tokens: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("requests", "prompt_tokens", "max_tokens", "long_tokens"):
            check_positive(name, getattr(self, name))
        check_at_least("shared_tokens", self.shared_tokens, 0)
        if not self.rate >= 0:
            raise UserError(f"rate must be 0 (all at once) or more requests per second, got {self.rate}")
        if not 0 <= self.long_share <= 1:
            raise UserError(f"long_share must be from 0 to 1, got {self.long_share}")

    @property
    def longest(self) -> int:
        """Steps of the longest stream."""
        short = self.shared_tokens + self.prompt_tokens * 3 // 2 + 1
        return max(short, self.long_tokens) + self.max_tokens

    def arrivals(self, vocabulary: int) -> list[Arrival]:
        """The requests of the trace, with tokens below `vocabulary`."""
        rng = np.random.default_rng(self.seed)
        shared = rng.integers(0, vocabulary, self.shared_tokens)
        at, made = 0.0, []
        for _ in range(self.requests):
            at += rng.exponential(1 / self.rate) if self.rate else 0.0
            if rng.random() < self.long_share:
                prompt = rng.integers(0, vocabulary, self.long_tokens)
            else:
                size = int(rng.integers(self.prompt_tokens // 2, self.prompt_tokens * 3 // 2 + 1))
                prompt = np.concatenate([shared, rng.integers(0, vocabulary, max(1, size))])
            made.append(Arrival(at, prompt, self.max_tokens))
        return made


@dataclasses.dataclass(frozen=True)
class Row:
    """The latencies of a trace under a policy. Seconds: `first` to the first token, per request; `between`
    deliveries of a request's tokens, all of them. `tokens_per_second`: drawn, over the whole trace.
    `fairness`: Jain's index of the requests' tokens per second, 1 where all are equal. `stats`: of the
    batcher."""

    policy: str
    first: list[float]
    between: list[float]
    seconds: float
    tokens_per_second: float
    fairness: float
    stats: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Bench:
    """A load test: the trace, the batch, and a row per policy."""

    trace: Trace
    model: str
    rows: int
    token_budget: int
    measured: list[Row]


def untrained() -> Module:
    """An attention model of 2 million parameters: speed does not depend on what a model knows."""
    from seqlab.models import Attention, Full, LanguageModel

    mixer = functools.partial(Attention, heads=4, cache=Full(4096))
    return LanguageModel(256, 192, 4, mixers=mixer, rngs=nnx.Rngs(0))


def run(
    model: Module,
    trace: Trace,
    policies: Sequence[str] = POLICIES,
    *,
    rows: int = 16,
    token_budget: int = 256,
    prefix_bytes: int = 0,
    cache: Any = None,
    tokenizer: Tokenizer | None = None,
) -> Bench:
    """Replay `trace` under each policy, in real time, after compilation.

    Args:
      rows, token_budget, cache, tokenizer: of the batcher. `prefix_bytes`: of its prefix store.
    Raises:
      ValueError: an argument out of range.
    """
    tokenizer = ByteTokenizer() if tokenizer is None else tokenizer
    measured, arrivals = [], trace.arrivals(min(model.vocab_size, tokenizer.vocab_size))
    for policy in policies:
        batcher = Batcher(
            model,
            rows,
            cache=cache,
            tokenizer=tokenizer,
            token_budget=token_budget,
            policy=policy,
            steps=trace.longest,
            prefixes=prefix_bytes,
        )
        batcher.warm_up()
        measured.append(_replay(batcher, policy, arrivals))
    title = f"{type(model).__name__} of {count_params(model):,} parameters"
    return Bench(trace, title, rows, token_budget, measured)


def _replay(batcher: Batcher, policy: str, arrivals: Sequence[Arrival]) -> Row:
    waiting, requests, times = list(arrivals), [], {}
    begin = time.monotonic()
    while waiting or any(request.finished is None for request in requests):
        now = time.monotonic() - begin
        while waiting and waiting[0].at <= now:
            arrival = waiting.pop(0)
            requests.append(
                batcher.submit(
                    arrival.prompt, max_tokens=arrival.max_tokens, seed=len(requests), stop_tokens=()
                )
            )
            times[requests[-1]] = [begin + arrival.at]
        worked = batcher.step()
        for request in worked:
            times[request].append(time.monotonic())
        if not worked and waiting and not batcher.stats["running"]:
            time.sleep(max(0.0, min(waiting[0].at - (time.monotonic() - begin), 0.01)))
    seconds = time.monotonic() - begin
    rates = [request.tokens / (times[request][-1] - times[request][0]) for request in requests]
    return Row(
        policy,
        [marks[1] - marks[0] for marks in times.values()],
        [gap for marks in times.values() for gap in np.diff(marks[1:]).tolist()],
        seconds,
        sum(request.tokens for request in requests) / seconds,
        sum(rates) ** 2 / (len(rates) * sum(rate**2 for rate in rates)),
        batcher.stats,
    )


def as_table(bench: Bench) -> report.Cells:
    """One row per policy: times in milliseconds."""
    header = [
        "policy",
        "first p50",
        "p95",
        "p99",
        "between p50",
        "p95",
        "p99",
        "most",
        "tokens/s",
        "fairness",
    ]
    cells = [[*header, "prefix hits"]]
    for row in bench.measured:
        first = np.percentile(row.first, (50, 95, 99)) * 1e3
        between = np.percentile(row.between or [0.0], (50, 95, 99, 100)) * 1e3
        worth = [f"{x:,.0f}" for x in first] + [f"{x:,.1f}" for x in between]
        hits = f"{row.stats['prefix_hits']:.0f}"
        cells.append([row.policy, *worth, f"{row.tokens_per_second:,.0f}", f"{row.fairness:.2f}", hits])
    return cells


def write(bench: Bench, folder: pathlib.Path) -> None:
    """serve_bench.json, .md and .png in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    report.write(folder / "serve_bench.json", json.dumps(dataclasses.asdict(bench), indent=1) + "\n")
    report.write(folder / "serve_bench.md", report.as_markdown(as_table(bench)))
    with report.figure(folder / "serve_bench.png", columns=2) as axes:
        for ax, name, label in zip(
            axes, ("first", "between"), ("time to the first token", "time between deliveries"), strict=True
        ):
            for row in bench.measured:
                values = np.sort(getattr(row, name)) * 1e3
                ax.step(values, np.arange(1, len(values) + 1) / len(values), where="post", label=row.policy)
            ax.set(xscale="log", xlabel=f"{label} (ms)", ylabel="share of all")
            ax.legend(fontsize=7)
