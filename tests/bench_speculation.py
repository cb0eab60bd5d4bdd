"""Speed of speculative decoding on repetitive text beside plain decoding: greedy, one stream, no training.

    python tests/bench_speculation.py [--width 192] [--tokens 512] [--rounds 5]

The model repeats itself, as an untrained one soon does; a text without repetitions is drawn at temperature
1. Compilation and warm-up are left out, contestants take turns in one run; each call of a stream waits until
its block is computed.
"""

import argparse
import functools
import statistics
import time


def build(kind, width):
    from flax import nnx

    from seqlab.models import Attention, Full, GatedDeltaNet, LanguageModel, Mamba

    attention = functools.partial(Attention, heads=width // 64, cache=Full(2048))
    gated = functools.partial(GatedDeltaNet, heads=width // 64)
    mixers, depth, options = {
        "attention": (attention, 5, {}),
        "mamba": (Mamba, 8, {"channel_mixer": None}),
        "hybrid": ((gated, attention), 4, {}),
    }[kind]
    return LanguageModel(256, width, depth, mixers, rngs=nnx.Rngs(0), **options)


def timed(model, tokens, temperature, draft):
    """Tokens per second, and the share of drafted tokens that were accepted."""
    import seqlab

    stream = seqlab.stream_generate(
        model, list(range(16)) * 4, temperature=temperature, block=64, draft=draft, top_logprobs=0
    )
    for _ in range(256):
        next(stream)
    begin = time.perf_counter()
    for _ in range(tokens):
        next(stream)
    return tokens / (time.perf_counter() - begin), stream.stats["acceptance"]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    import seqlab

    drafts = {"plain": None, "ngram 8": seqlab.NGram(3, 8), "ngram 16": seqlab.NGram(3, 16)}
    for kind in ("attention", "mamba", "hybrid"):
        model = build(kind, args.width)
        size = seqlab.count_params(model) / 1e6
        for text, temperature in (("repetitive", 0), ("random", 1.0)):
            rounds = [
                {name: timed(model, args.tokens, temperature, draft) for name, draft in drafts.items()}
                for _ in range(args.rounds)
            ]
            line = [
                f"{name} {statistics.median(r[name][0] for r in rounds):,.0f} tok/s, "
                f"{statistics.median(r[name][0] / r['plain'][0] for r in rounds):.2f}x, "
                f"accepted {rounds[0][name][1]:.2f}"
                for name in drafts
            ]
            print(f"{kind} {size:.1f} M, {text}: {'; '.join(line)}", flush=True)


if __name__ == "__main__":
    main()
