"""Quality of bounded caches compared with full attention, on models trained here: StreamingLLM, KIVI,
DuoAttention at a laptop's size.

Each model is trained once for all tests of this file, in the folder SEQLAB_RUNS where it is named: a run that
is finished there is used.
"""

import itertools
import json
import os
import pathlib

import figures
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import seqlab
from seqlab.models.attention import with_cache
from seqlab.models.cache import Full, Quantized
from seqlab.module import merge, split
from seqlab.state import state_bytes
from seqlab.studies import cache_bench, gates
from seqlab.train import config, loop

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # grain and orbax warn as they please

STREAM, DENSE = 51_200, 8192


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a config's finished run."""
    folder = pathlib.Path(os.environ.get("SEQLAB_RUNS") or tmp_path_factory.mktemp("runs"))

    def train(name):
        cfg = config.load(name)
        config.prepare(cfg, folder / name)
        assert loop.run(config.build(cfg), folder / name).status == "finished"
        return folder / name

    return train


def benched(workdir, out, caches, **sizes):
    """A bench and its rows by cache."""
    bench = cache_bench.run(cache_bench.plan(workdir, ",".join(caches), out=out, **sizes))
    return bench, {row.cache: row for row in bench.rows}


def recomputed(model, tokens, targets, edges, window):
    """A row of a bench whose every prediction is made by the trained form, from at least `window` steps
    before it read anew."""
    static, params = split(model)

    @jax.jit
    def nats(params, tokens, targets):
        logits = merge(static, params)(tokens)[0].astype(jnp.float32)
        return (
            jax.nn.logsumexp(logits, axis=-1)
            - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        )

    found = np.zeros(tokens.shape)
    for begin in range(0, tokens.shape[1] - window, window):
        # As every window of training began.
        piece = np.concatenate([tokens[:, :1], tokens[:, begin + 1 : begin + 2 * window]], axis=1)
        fresh = 0 if begin == 0 else window
        found[:, begin + fresh : begin + 2 * window] = nats(
            params, piece, targets[:, begin : begin + 2 * window]
        )[:, fresh:]
    means = [float(found[:, a:b].mean()) for a, b in itertools.pairwise(edges)]
    counts = [len(tokens) * (b - a) for a, b in itertools.pairwise(edges)]
    return cache_bench.Row("recomputed", 0, 0.0, means, counts, None, None, None)


def test_sinks_keep_a_stream_alive_where_a_window_and_attention_over_everything_break(trained, tmp_path):
    """The figure of StreamingLLM (arXiv 2309.17453): trained on 512 bytes, streamed over 51,200 held-out
    ones.

    Attention over everything is followed for 8,192 bytes: on to the end it would cost forty times as much and
    stay as bad.
    """
    workdir = trained("lm_streaming")
    dense, window, sinks, in_place = (
        f"full({DENSE})",
        "window(256)",
        "sinks(4)+window(252)+absolute",
        "sinks(4)+window(252)",
    )
    sizes = {"rows": 4, "items": 1, "turns": 1}
    bench, rows = benched(workdir, tmp_path / "bounded", [window, sinks, in_place], length=STREAM, **sizes)
    short, everything = benched(workdir, tmp_path / "dense", [dense], length=DENSE, **sizes)
    assert short.edges == bench.edges[: len(short.edges)], "the same buckets of the same streams"
    streams = cache_bench.plan(workdir, in_place, out=tmp_path / "unused", length=STREAM, **sizes).streams
    rows["recomputed"] = recomputed(
        seqlab.load(workdir).model, streams["inputs"], streams["targets"], bench.edges, 256
    )
    rows |= everything
    print(json.dumps({"edges": bench.edges, **{name: row.nats for name, row in rows.items()}}))

    parts = [(0, 256), (256, 512), (512, 1024), (1024, 8192), (8192, STREAM)]
    worth = {name: [between(row, bench.edges, *part) for part in parts] for name, row in rows.items()}
    ratio = {
        name: np.asarray([x / y for x, y in zip(found, worth["recomputed"], strict=True) if x])
        for name, found in worth.items()
    }
    claim = (
        "A byte model (four layers of width 128, full attention, rotary positions) trained on windows of "
        f"512 bytes of Python source, each begun by the same token, is streamed over four times {STREAM:,} "
        "bytes of held-out source. Full attention fails beyond the trained length. A plain window "
        "degrades once the first token has left it, since attention uses that token as a sink. Four sinks "
        "with a window, at positions counted in the cache, perform like a window recomputed for every "
        "prediction."
    )
    table = [
        [
            f"`{name}`",
            f"{row.state_bytes:,}" if row.state_bytes else "-",
            *("-" if x is None else f"{x:.3f}" for x in worth[name]),
        ]
        for name, row in rows.items()
    ]
    header = ["cache", "state bytes", *(f"perplexity, {a:,} to {b:,}" for a, b in parts)]
    figures.keep(
        "streamingllm",
        "Attention sinks",
        claim,
        header,
        table,
        lambda ax: cache_bench.curves(ax, bench, list(rows.values())),
    )
    assert (ratio[dense][2:] > [1.1, 1.5]).all() and (ratio[dense][2:] > ratio[window][2:4]).all(), ratio
    assert (ratio[window][1:] > ratio[in_place][1:] + 0.02).all(), ratio
    assert abs(ratio[in_place] - 1).max() < 0.01, ratio


def between(row, edges, begin, end):
    """Perplexity from one position to another; None where the row ends before."""
    inside = [begin <= a and b <= end for a, b in itertools.pairwise(edges)]
    return row.perplexity(inside[: len(row.nats)]) if end <= edges[len(row.nats)] else None


def test_two_bits_hold_nearly_what_sixteen_do(trained, tmp_path):
    """KIVI (arXiv 2402.02750): a fifth of the bytes at 8,192 steps, perplexity within two percent."""
    workdir = trained("lm_streaming")
    caches = [
        "full(512)",
        *(f"full(512)+int{bits}(group=32, residual={rest})" for bits in (8, 4, 2) for rest in (128, 32)),
    ]
    bench, rows = benched(workdir, tmp_path / "bench", caches, length=512, rows=32, items=1, turns=1)
    model, everywhere = seqlab.load(workdir).model, [True] * (len(bench.edges) - 1)
    exact = rows["full(512)"].perplexity(everywhere)
    sixteen = state_bytes(with_cache(model, Full(8192)), dtype=jnp.float16)
    share, table = {}, []
    for name, row in rows.items():
        bits, rest = (
            (int(name[name.index("int") + 3]), int(name.split("=")[-1][:-1])) if "int" in name else (16, 0)
        )
        coded = Quantized(8192, bits=bits, group=32, residual=rest, half_groups=True) if rest else Full(8192)
        share[name] = state_bytes(with_cache(model, coded), dtype=jnp.float16) / sixteen
        worth = row.perplexity(everywhere)
        table.append(
            [bits, rest or "-", f"{share[name]:.3f}", f"{worth:.4f}", f"{100 * (worth / exact - 1):+.2f} %"]
        )
    claim = (
        "The model above with a quantized cache: old keys quantized per channel, old values per step, in "
        "groups of 32, the newest steps exact. Perplexity over 32 held-out windows of 512 bytes; bytes "
        "relative to float16 with room for 8,192 steps, including scales and exact steps."
    )
    figures.keep(
        "kivi",
        "A cache quantized to two bits",
        claim,
        ["bits", "exact steps", "bytes", "perplexity", "against exact"],
        table,
    )
    two = "full(512)+int2(group=32, residual=128)"
    assert share[two] <= 0.21
    assert rows[two].perplexity(everywhere) <= 1.02 * exact, table
    assert all(rows[name].perplexity(everywhere) <= 1.002 * exact for name in caches if "int8" in name), table


def test_a_quarter_of_the_heads_finds_what_all_of_them_find(trained, tmp_path):
    """DuoAttention (arXiv 2410.10819): gates say which heads need the whole past."""
    workdir = trained("passkeys")
    fitted = gates.fit(workdir, 200, keys=8)
    full, mixed = "full(128)", "duo(0.75)"
    caches = [
        full,
        mixed,
        "duo(0.5)",
        "duo(0.875)",
        f"sinks({fitted.sinks})+window({fitted.window})",
        "sinks(4)+window(47)",
    ]
    _, rows = benched(workdir, tmp_path / "bench", caches, rows=64, items=64, turns=8)
    share = {name: row.state_bytes / rows[full].state_bytes for name, row in rows.items()}
    found = {
        name: (np.mean(row.passkey), np.mean(row.requests), np.mean(row.turns)) for name, row in rows.items()
    }
    table = [
        [f"`{name}`", f"{share[name]:.3f}", *(f"{value:.3f}" for value in found[name])] for name in caches
    ]
    claim = (
        "A small attention model (two layers of two heads) is trained to retrieve digits hidden in source "
        "code. One gate per head is fitted by distillation with frozen weights, and the heads with the "
        f"smallest gates keep {fitted.sinks} sinks and a window of {fitted.window} of 128 steps. Passkeys: "
        "one digit at five depths. Requests: eight digits in one context, each queried on a copy of the "
        "cache; turns: one after the other on the same cache."
    )
    figures.keep(
        "duoattention",
        "Retrieval heads",
        claim,
        ["cache", "bytes", "passkeys", "requests", "turns"],
        table,
    )
    print(fitted.alpha, *table, sep="\n")
    assert found[full][0] >= 0.9
    assert share[mixed] <= 0.4
    assert found[mixed][0] >= 0.95 * found[full][0]
    assert found["sinks(4)+window(47)"][0] < 0.7, (
        "as many bytes spent on a window for all heads lose what it has left"
    )
