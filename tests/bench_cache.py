"""A step with sinks and a window beside the same window computed anew for every token (the paper: up to
22.2x, arXiv 2309.17453).

    python tests/bench_cache.py [--windows 256 512 1024 2048 4096] [--tokens 32] [--rounds 5] [--json FILE]

One stream; every contestant runs to the end of each token before it begins the next one. Ratios are taken
within one run, the contestants in turn; compilation is left out.
"""

import argparse
import functools
import json
import pathlib
import statistics
import time


def build(window):
    from flax import nnx

    from seqlab.models import Attention, LanguageModel, Window

    policies = {
        "sinks and window": Window(window - 4, 4),
        "in place": Window(window - 4, 4, positions="cache"),
    }
    return {
        name: LanguageModel(256, 128, 4, functools.partial(Attention, heads=4, cache=cache), rngs=nnx.Rngs(0))
        for name, cache in policies.items()
    }


def streamed(model, tokens):
    """A function that takes `tokens` single steps behind a full cache."""
    import jax
    import jax.numpy as jnp

    from seqlab.module import merge, split

    static, params = split(model)

    @functools.partial(jax.jit, donate_argnums=2)
    def step(params, token, state):
        logits, state = merge(static, params)(token, state)
        return jnp.argmax(logits[:, -1:], axis=-1), state

    def run():
        # No array may be donated twice.
        token, state = (jnp.zeros((1, 1), jnp.int32), jax.tree.map(jnp.copy, model.init_state(1)))
        for _ in range(tokens):
            token, state = jax.block_until_ready(step(params, token, state))

    return run


def recomputed(model, window, tokens):
    """A function that reads the last `window` tokens anew for each of `tokens`."""
    import jax
    import jax.numpy as jnp

    from seqlab.module import merge, split

    static, params = split(model)

    @jax.jit
    def step(params, text):
        net = merge(static, params)
        features, _ = net.features(text)
        token = jnp.argmax(net.read_out(features[:, -1:]), axis=-1).astype(text.dtype)
        return jnp.concatenate([text[:, 1:], token], axis=1)

    def run():
        text = jnp.zeros((1, window), jnp.int32)
        for _ in range(tokens):
            text = jax.block_until_ready(step(params, text))

    return run


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--windows", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    args = parser.parse_args()
    records = []
    for window in args.windows:
        models = build(window)
        few = max(2, args.tokens // 8)  # reading a window anew takes long
        contestants = {name: (streamed(model, args.tokens), args.tokens) for name, model in models.items()}
        contestants["recomputed"] = recomputed(models["sinks and window"], window, few), few
        for run, _ in contestants.values():
            run()
        rounds = [
            {name: timed(run) / count for name, (run, count) in contestants.items()}
            for _ in range(args.rounds)
        ]
        seconds = {name: statistics.median(r[name] for r in rounds) for name in contestants}
        ratios = {name: statistics.median(r["recomputed"] / r[name] for r in rounds) for name in models}
        records.append({"window": window, "seconds": seconds, "times": ratios})
        line = [
            f"{name} {seconds[name] * 1e3:.2f} ms" + (f" ({ratios[name]:.1f}x)" if name in ratios else "")
            for name in contestants
        ]
        print(f"window {window}: " + ", ".join(line), flush=True)
    if args.json:
        args.json.write_text(json.dumps(records, indent=1) + "\n")


def timed(run):
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
