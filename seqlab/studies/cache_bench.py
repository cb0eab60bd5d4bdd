"""Comparison of cache policies on a trained model: quality, bytes of state and speed.

Measured are perplexity by position on held-out streams, passkey retrieval at several depths, and questions to
a shared context, each to a copy of the cache (multi-request) or one after the other to the same one
(multi-turn), as in SCBench (arXiv 2412.10319). An answer is correct if each of its digits is the likeliest
byte, as in greedy decoding.

Each policy has its own results file, so an interrupted comparison resumes; cache_bench.json, cache_bench.md
and cache_bench.png are rewritten by every call.
"""

import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, Int

from seqlab.checks import UserError
from seqlab.mixer import as_mixer
from seqlab.models.attention import Attention, with_cache
from seqlab.models.cache import Window, parse_cache
from seqlab.module import Module, in_evaluation, merge, split
from seqlab.state import State
from seqlab.studies import compare, gates, report, runs, texts
from seqlab.tokenizers import ByteTokenizer
from seqlab.train.experiment import Experiment
from seqlab.train.metrics import as_json, from_json
from seqlab.train.packing import Windows
from seqlab.train.tasks.passkeys import FRAME, Quiz, digits_of, haystacks, quiz

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
COLUMNS = (
    "cache",
    "state bytes",
    "of the first",
    "tokens/s",
    "bits a token",
    "ppl to {n}",
    "ppl beyond",
    "pass key",
    "requests",
    "turns",
)
_CHUNK = 256


class BenchError(UserError):
    """An invalid request, found before any work."""


class Settings(NamedTuple):
    """The settings of a comparison, the same for all policies of a folder.

    `rows` held-out streams of `length` steps, of a model trained on `trained`; contexts of `context` steps:
    `items` for every depth and
    for the `turns` questions to a shared context. `step`: the checkpoint.
    """

    step: int
    trained: int
    length: int
    rows: int
    context: int
    items: int
    turns: int


class Row(NamedTuple):
    """The results of a policy.

    `nats`, `targets`: mean cross entropy and number of targets by bucket of positions, see `edges`. Shares of
    correct answers: `passkey` by depth, `requests` and `turns` by turn; None if the model does not read
    bytes. `tokens_per_second`: decoding, one stream.
    """

    cache: str
    state_bytes: int
    tokens_per_second: float
    nats: list[float]
    targets: list[int]
    passkey: list[float] | None
    requests: list[float] | None
    turns: list[float] | None

    def perplexity(self, buckets: Sequence[bool]) -> float | None:
        """The mean over some buckets; None if they are empty."""
        chosen = [
            (nats, count)
            for nats, count, take in zip(self.nats, self.targets, buckets, strict=True)
            if take and count
        ]
        total = sum(count for _, count in chosen)
        return float(np.exp(sum(nats * count for nats, count in chosen) / total)) if total else None


class Bench(NamedTuple):
    """`edges`: bucket i holds the positions from edges[i] up to edges[i + 1]."""

    settings: Settings
    edges: list[int]
    rows: list[Row]


class Plan(NamedTuple):
    """A checked plan for `run`."""

    trained: runs.Run
    experiment: Experiment
    settings: Settings
    policies: dict[str, Any]
    streams: Any
    folder: pathlib.Path


def plan(
    workdir: str | os.PathLike[str],
    caches: str | None = None,
    *,
    step: int | None = None,
    length: int | None = None,
    rows: int | None = None,
    items: int = 16,
    turns: int = 4,
    out: str | os.PathLike[str] | None = None,
    trust: bool = False,
    dtype: str | None = None,
    text: Sequence[str | os.PathLike[str]] = (),
) -> Plan:
    """The plan for the run in `workdir`: the given caches, "full(2048),sinks(4)+window(252)+int4", or a
    default choice.

    `trust` and `dtype` as in `runs.load`. `duo(s)` makes the share s of all heads streaming heads by the
    fitted gates (`seqlab.studies.gates`). Nothing is written.

    A published model is measured on `text`, files and folders, or on held-out sources of the Python standard
    library; by default in one stream of four times its training length, or as much as the text has.

    Raises:
      BenchError, ValueError: a cache that is invalid, does not fit the heads or is shorter than the streams;
        a model without attention or without tokens; too little held-out data; a folder with results of other
        settings.
    """
    trained = runs.load(workdir, step, trust=trust, dtype=dtype)
    model = as_mixer(trained.model).unrolled()
    trained = trained._replace(model=model)
    layers = [module for _, module in nnx.iter_modules(model) if isinstance(module, Attention)]
    if not layers or as_mixer(model).vocab_size is None:
        raise BenchError(f"{workdir} has no attention over tokens: there is no cache to choose")
    for name, value in {"length": length, "rows": rows, "items": items, "turns": turns}.items():
        if value is not None and value < 1:
            raise BenchError(f"{name} must be a positive integer, got {value}")
    experiment = texts.experiment_of(trained, text)
    trained = trained._replace(tokenizer=experiment.data.tokenizer)
    if texts.is_published(trained):
        streams, window = _held_out(experiment, length, rows or 1, texts.trained_length(trained))
    else:
        streams, window = _held_out(experiment, length, rows)
    context = max(window, (turns + 1) * 2 * (digits_of(experiment.data) + FRAME))
    settings = Settings(
        trained.step, window, streams["inputs"].shape[1], streams["inputs"].shape[0], context, items, turns
    )
    fitted = gates.load(workdir, trained.step)
    most = max(settings.length, context)
    names = (
        report.split_specs(caches)
        if caches is not None
        else defaults(layers[0], window, most, fitted is not None)
    )
    if len(set(map(report.file_name, names))) < len(names):
        raise BenchError(f"caches: duplicate entry in {caches}")
    policies = {name: _policy(name, model, fitted, most) for name in names}
    home = pathlib.Path(workdir)
    folder = pathlib.Path(out or (home.parent if home.is_file() else home) / "cache_bench")
    _check_folder(folder, settings)
    return Plan(trained, experiment, settings, policies, streams, folder)


def defaults(layer: Attention, trained: int, most: int, duo: bool) -> list[str]:
    """The default caches: full, quantized, windows of half the trained length (or the model's own), and
    DuoAttention if gates were fitted."""
    window = layer.cache.window if isinstance(layer.cache, Window) else max(8, trained // 2)
    group = next((g for g in (32, 16, 8, 4) if layer.head_dim % g == 0), layer.head_dim)
    residual = max(group, min(128, trained // 4) // group * group)
    coded = "" if (group, residual) == (32, 128) else f"(group={group}, residual={residual})"
    sinks = f"sinks(4)+window({window - 4})"
    bits = [b for b in (8, 4, 2) if layer.head_dim * b % 32 == 0]
    return [
        f"full({most})",
        *[f"full({most})+int{b}{coded}" for b in bits],
        *[f"window({window})", f"{sinks}+absolute", sinks],
        *[f"{sinks}+int{b}{coded}" for b in bits if b == 4],
        *(["duo(0.75)"] if duo else []),
    ]


def run(planned: Plan) -> Bench:
    """Measure the missing policies, and write the table, the plot and all results as JSON."""
    settings, folder = planned.settings, planned.folder
    (folder / "caches").mkdir(parents=True, exist_ok=True)
    report.write(folder / "settings.json", as_json(settings._asdict(), indent=1) + "\n")
    bounds, quizzes = edges(settings), _quizzes(planned)
    found = []
    for name, policy in planned.policies.items():
        file = folder / "caches" / f"{report.file_name(name)}.json"
        if not file.exists():
            begin = time.perf_counter()
            row = measure(name, policy, planned, bounds, quizzes)
            report.write(file, as_json(row._asdict(), indent=1) + "\n")
            print(f"{name}: {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
        found.append(Row(**from_json(file.read_text()) | {"cache": name}))
    bench = Bench(settings, bounds, found)
    record = {
        "settings": settings._asdict(),
        "edges": bounds,
        "depths": DEPTHS,
        "rows": [row._asdict() for row in found],
    }
    report.write(folder / "cache_bench.json", as_json(record, indent=1) + "\n")
    report.write(folder / "cache_bench.md", report.as_markdown(as_table(bench)))
    draw(bench, folder / "cache_bench.png")
    return bench


def measure(
    name: str, policy: Any, planned: Plan, bounds: Sequence[int], quizzes: Sequence[Quiz] | None
) -> Row:
    """All results of the model under one policy."""
    model = with_cache(planned.trained.model, policy)
    read = _reader(model)
    streams = planned.streams
    nats, _, _ = read(_fresh(model, *streams["inputs"].shape), streams["inputs"], streams["targets"])
    place = np.broadcast_to(np.arange(nats.shape[1]), nats.shape)[streams["valid"]]
    counts, _ = np.histogram(place, bounds)
    sums, _ = np.histogram(place, bounds, weights=nats[streams["valid"]])
    passkey = requests = turns = None
    if quizzes is not None:
        *single, shared = quizzes
        passkey = [answered(read, model, asked, copies=True)[0] for asked in single]
        requests, turns = (answered(read, model, shared, copies=copies) for copies in (True, False))
    speed = compare.stream_speed(planned.trained._replace(model=model))
    means = (sums / np.maximum(counts, 1)).tolist()
    held = jax.eval_shape(lambda: _fresh(model, 1, nats.shape[1]))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(held))
    return Row(name, size, speed, means, counts.tolist(), passkey, requests, turns)


def answered(read: Callable[..., Any], model: Module, asked: Quiz, copies: bool) -> list[float]:
    """The share of correct answers by turn: each question to a copy of the state after the context, or to the
    state after the last answer.

    Later questions follow the correct answers to earlier ones, as in SCBench.
    """
    state = read(_fresh(model, *asked.joined().shape), asked.context)[2]
    shares = []
    for question, answer in zip(asked.questions.swapaxes(0, 1), asked.answers.swapaxes(0, 1), strict=True):
        turn = np.concatenate([question, answer], axis=1)
        _, right, after = read(state, turn, np.roll(turn, -1, axis=1))
        # Without the byte that ends the answer.
        shares.append(float(right[:, question.shape[1] - 1 : -2].all(axis=1).mean()))
        state = state if copies else after
    return shares


def edges(settings: Settings) -> list[int]:
    """Half octaves around the trained length, from 16 steps or an eighth of it on."""
    least, bounds = min(16, max(1, settings.trained // 8)), {0, settings.length}
    for half in range(-64, 65):
        place = round(settings.trained * 2 ** (half / 2))
        bounds |= {place} if least <= place < settings.length else set()
    return sorted(bounds)


def as_table(bench: Bench) -> list[list[str]]:
    """Header and rows as text: bits over all positions, perplexities up to the trained length and beyond,
    shares of correct answers."""
    ends = bench.edges[1:]
    near = [end <= bench.settings.trained for end in ends]
    header = [column.format(n=f"{bench.settings.trained:,}") for column in COLUMNS]
    cells = [header]
    for row in bench.rows:
        bits = np.log2(row.perplexity([True] * len(near)))
        worth = [bits, row.perplexity(near), row.perplexity([not take for take in near])]
        shares = [
            None if found is None else float(np.mean(found))
            for found in (row.passkey, row.requests, row.turns)
        ]
        cells.append(
            [
                row.cache,
                f"{row.state_bytes:,}",
                f"{row.state_bytes / bench.rows[0].state_bytes:.3f}",
                f"{row.tokens_per_second:,.0f}",
                *("-" if value is None else f"{value:.3f}" for value in worth),
                *("-" if value is None else f"{value:.2f}" for value in shares),
            ]
        )
    return cells


def draw(bench: Bench, path: pathlib.Path) -> None:
    """The plot: perplexity by position, and retrieval against bytes of state."""
    with report.figure(path, columns=2) as (by_place, by_bytes):
        curves(by_place, bench)
        # Without any retrieval scores, plot bits per token.
        found = any(sum([*row.passkey, *row.requests]) for row in bench.rows if row.requests is not None)
        for row in bench.rows:
            worth = (
                np.mean([*row.passkey, *row.requests])
                if found
                else np.log2(row.perplexity([True] * len(row.nats)))
            )
            by_bytes.plot([row.state_bytes], [worth], "o")
            by_bytes.annotate(
                row.cache, (row.state_bytes, worth), xytext=(4, 3), textcoords="offset points", fontsize=6
            )
        by_bytes.set_xscale("log", base=2)
        by_bytes.margins(x=0.3, y=0.15)
        by_bytes.set(
            xlabel="state of one stream (bytes)", ylabel="answers right" if found else "bits a token"
        )


def curves(ax: Any, bench: Bench, rows: Sequence[Row] | None = None) -> None:
    """Perplexity by position, on logarithmic axes, with the training length marked; for `rows` instead of the
    plan's."""
    middle = [
        (begin * end) ** 0.5 if begin else end / 2
        for begin, end in zip(bench.edges[:-1], bench.edges[1:], strict=True)
    ]
    for row in bench.rows if rows is None else rows:
        ax.plot(middle[: len(row.nats)], np.exp(row.nats), lw=1.2, label=row.cache)
    ax.axvline(bench.settings.trained, color="grey", lw=0.8, ls=":")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    ax.set(xlabel="position in the stream (dotted: trained length)", ylabel="perplexity a token")
    ax.legend(fontsize=6)


def _fresh(model: Module, batch: int, steps: int) -> State:
    """The state of fresh streams, with room for `steps` steps if the cache grows."""
    state = model.init_state(batch)
    return as_mixer(model).with_room(state, steps)


def _reader(model: Module) -> Callable[..., tuple[Float[np.ndarray, "b t"], Bool[np.ndarray, "b t"], State]]:
    """read(state, tokens, targets) -> cross entropies, whether the likeliest token is the target, the state
    after them."""
    static, params = split(in_evaluation(model))

    @jax.jit
    def score(
        params: Any, state: State, tokens: jax.Array, targets: jax.Array, valid: jax.Array
    ) -> tuple[jax.Array, jax.Array, State]:
        logits, state = merge(static, params)(tokens, state, None, valid)
        logits = logits.astype(jnp.float32)
        nats = (
            jax.nn.logsumexp(logits, axis=-1)
            - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        )
        return nats, jnp.argmax(logits, axis=-1) == targets, state

    def read(state: State, tokens: Int[np.ndarray, "b t"], targets: Int[np.ndarray, "b t"] | None = None):
        found = []
        for arrays in _chunks(tokens, tokens if targets is None else targets):
            nats, right, state = score(params, state, *arrays)
            found.append((np.asarray(nats), np.asarray(right)))
        nats, right = (
            np.concatenate(parts, axis=1)[:, : tokens.shape[1]] for parts in zip(*found, strict=True)
        )
        return nats, right, state

    return read


def _chunks(*arrays: Int[np.ndarray, "b t"]) -> Iterator[tuple[np.ndarray, ...]]:
    """Chunks of one size, smaller for short inputs, with masks of real steps."""
    time = arrays[0].shape[1]
    size = _CHUNK if time > _CHUNK // 8 else _CHUNK // 8
    for begin in range(0, time, size):
        pieces = [array[:, begin : begin + size] for array in arrays]
        count = pieces[0].shape[1]
        padded = [np.pad(piece, ((0, 0), (0, size - count))).astype(np.int32) for piece in pieces]
        yield *padded, np.broadcast_to(np.arange(size) < count, padded[0].shape)


def _held_out(
    experiment: Experiment, length: int | None, rows: int | None, trained: int | None = None
) -> tuple[dict[str, np.ndarray], int]:
    """Streams [b, t] of held-out tokens with their targets and which of these count, and the training length,
    `trained` if the windows do not have it.

    Text continues from document to document as one stream, which begins as in generation; each example of a
    task is a separate stream.
    """
    windows = experiment.data.validation()
    first = windows[0]["inputs"]
    if isinstance(windows, Windows):
        rows, bos = rows or 8, experiment.data.tokenizer.bos
        stride = (len(windows.stream) - 1) // rows
        if trained is not None and length is None:
            length = min(4 * trained, stride)
        length = length or 4 * len(first)
        if stride < length:
            raise BenchError(
                f"{rows} streams of {length:,} steps are more than the {len(windows.stream):,} tokens held "
                "out"
            )
        count = length + (bos is None)  # a stream begins with the token that begins texts, if there is one
        text = np.stack([windows.stream[i * stride : i * stride + count] for i in range(rows)]).astype(
            np.int32
        )
        if bos is not None:
            text = np.concatenate([np.full((rows, 1), bos, np.int32), text], axis=1)
        streams = {"inputs": text[:, :-1], "targets": text[:, 1:], "valid": np.ones((rows, length), bool)}
        return streams, trained or len(first)
    if length not in (None, len(first)):
        raise BenchError(f"length: the examples of {experiment.data!r} have {len(first)} steps, got {length}")
    items = [windows[i] for i in range(min(rows or 64, len(windows)))]
    return {name: np.stack([item[name] for item in items]) for name in ("inputs", "targets", "valid")}, len(
        first
    )


def _policy(name: str, model: Module, fitted: gates.Gates | None, most: int) -> Any:
    """A policy, or one per layer; refused if it does not fit the model or the streams."""
    policy = gates.policies(name, fitted, capacity=most) if name.startswith("duo") else parse_cache(name)
    served = with_cache(model, policy)
    jax.eval_shape(lambda: served.init_state(1))
    capacity = served.capacity
    if capacity is not None and capacity < most:
        raise BenchError(f"cache {name} ends after {capacity:,} steps, and the longest stream has {most:,}")
    return policy


def _check_folder(folder: pathlib.Path, settings: Settings) -> None:
    file = folder / "settings.json"
    if not file.exists():
        if folder.exists() and any(folder.iterdir()):
            raise BenchError(f"{folder} holds something else: choose another folder")
        return
    saved = json.loads(file.read_text())
    lines = [
        f"\n  {name}: {saved.get(name)} -> {value}"
        for name, value in settings._asdict().items()
        if saved.get(name) != value
    ]
    if lines:
        raise BenchError(
            f"{folder} belongs to another bench (saved -> given):{''.join(lines)}\nchoose another folder, "
            "or the same settings"
        )


def _quizzes(planned: Plan) -> list[Quiz] | None:
    """A context with one key for every depth, and contexts with several; None if tokens are not bytes. The
    same for all policies."""
    if (
        not isinstance(planned.trained.tokenizer, ByteTokenizer)
        or planned.trained.model.vocab_size < ByteTokenizer.vocab_size
    ):
        return None
    settings, rng, data = (
        planned.settings,
        np.random.default_rng(0),
        planned.experiment.data,
    )
    digits, paths = digits_of(data), getattr(data, "paths", ())

    def asked(keys: int, depth: float | None) -> Quiz:
        hay = haystacks(rng, settings.items, settings.context - keys * (digits + FRAME), paths, "validation")
        return quiz(rng, hay, keys=keys, digits=digits, depth=depth)

    return [*(asked(1, depth) for depth in DEPTHS), asked(settings.turns, None)]
