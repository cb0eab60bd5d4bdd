"""Many streams at once: throughput, shared prefixes and stalls, on untrained models of 2 million parameters.

    python tests/bench_serving.py [--rounds 3]

Ratios are taken within one run, the contestants in turn; compilation is left out. Peers are those of
`stream_generate`: see bench_stream.py.
"""

import argparse
import functools
import statistics
import time

import numpy as np
from flax import nnx

from seqlab import Batcher, stream_generate
from seqlab.models import Attention, Full, GatedDeltaNet, LanguageModel, Mamba
from seqlab.studies import serve_bench

MIXERS = {
    "attention": functools.partial(Attention, heads=4, cache=Full(4096)),
    "mamba": Mamba,
    "gated_delta": functools.partial(GatedDeltaNet, heads=4),
}
TOKENS = 128


def build(kind):
    return LanguageModel(256, 192, 4, mixers=MIXERS[kind], rngs=nnx.Rngs(0))


def tokens_per_second(batcher, streams):
    """Drawn by so many streams at once."""
    requests = [batcher.submit([i, 7, 9], max_tokens=TOKENS, seed=i) for i in range(streams)]
    begin = time.perf_counter()
    for request in requests:
        request.result()
    return streams * TOKENS / (time.perf_counter() - begin)


def alone(model):
    """Tokens per second of `stream_generate`."""
    begin = time.perf_counter()
    list(stream_generate(model, [1, 7, 9], max_tokens=TOKENS))
    return TOKENS / (time.perf_counter() - begin)


def throughput(kind, rounds):
    model = build(kind)
    batcher = Batcher(model, rows=16, steps=256)
    batcher.warm_up()
    alone(model)
    found = [(alone(model), *(tokens_per_second(batcher, n) for n in (1, 4, 16))) for _ in range(rounds)]
    ratios = [statistics.median(row[i] / row[0] for row in found) for i in (1, 2, 3)]
    rate = statistics.median(row[0] for row in found)
    print(f"| {kind} | {rate:,.0f} | {ratios[0]:.2f} | {ratios[1]:.2f} | {ratios[2]:.2f} |", flush=True)


def first_token(batcher, prompt, seed):
    """Seconds to the first token."""
    request = batcher.submit(prompt, max_tokens=1, seed=seed)
    request.result()
    return request.first - request.submitted


def prefixes(kind, rounds):
    batcher = Batcher(build(kind), rows=4, steps=2304, prefixes=2**30)
    batcher.warm_up()
    rng, cold, hit = np.random.default_rng(0), [], []
    for seed in range(rounds):
        shared = rng.integers(0, 256, 2000)
        for i in range(4):  # the second request finds out where the prompts part
            took = first_token(batcher, [*shared, i, *range(20)], seed)
            (cold, [], hit, hit)[i].append(took)
    ratio = statistics.median(hit) / statistics.median(cold)
    times = f"{statistics.median(cold) * 1e3:.0f} ms | {statistics.median(hit) * 1e3:.1f} ms"
    print(f"| {kind} | {times} | {ratio:.3f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    print("Tokens per second relative to stream_generate with one stream:\n")
    print("| mixer | stream_generate | 1 stream | 4 streams | 16 streams |\n|---|---:|---:|---:|---:|")
    for kind in MIXERS:
        throughput(kind, rounds)
    print("\nTime to the first token, 2,000 of 2,021 tokens of the prompt shared:\n")
    print("| mixer | nothing known | prefix known | ratio |\n|---|---:|---:|---:|")
    for kind in MIXERS:
        prefixes(kind, rounds)
    print("\nLong prompts among short ones (times in ms):\n")
    trace = serve_bench.Trace(requests=48, rate=8, long_share=0.3)
    cells = serve_bench.as_table(serve_bench.run(serve_bench.untrained(), trace))
    print("\n".join(f"| {' | '.join(row)} |" for row in [cells[0], ["---"] * len(cells[0]), *cells[1:]]))


if __name__ == "__main__":
    main()
