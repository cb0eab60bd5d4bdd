"""Chunked recurrences beside a `lax.scan` of their definition, forward and with gradients, at a length that matters.

    python tests/bench_kernels.py [--length 2048] [--batch 4] [--rounds 5]

Ratios are taken within one run, the contestants in turn; compilation is timed apart.
"""

import argparse
import statistics
import time


def cases(batch, length):
    """Name -> function of an implementation name that gives (function of arrays, arrays)."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from seqlab import kernels
    from seqlab.kernels.lmu import legendre

    rng = np.random.default_rng(0)

    def normal(*shape, scale=1.0):
        return jnp.asarray(rng.normal(size=shape) * scale, jnp.float32)

    heads, width, inner, states, order = 4, 64, 256, 16, 64
    q, k, v = (normal(batch, length, heads, width, scale=width**-0.5) for _ in range(3))
    k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
    scalar, channel = -jax.nn.softplus(normal(batch, length, heads)), -0.1 * jax.nn.softplus(normal(batch, length, heads, width))
    beta = jax.nn.sigmoid(normal(batch, length, heads))
    memories = {
        "linear": {},
        "simple gla, mamba2": {"decay": scalar},
        "gla": {"decay": channel},
        "delta": {"beta": beta},
        "gated delta": {"decay": scalar, "beta": beta},
        "kda": {"decay": channel, "beta": beta},
    }
    u, delta = normal(batch, length, inner), jax.nn.softplus(normal(batch, length, inner) - 3)
    A, B, C = -jnp.exp(normal(inner, states)), normal(batch, length, states), normal(batch, length, states)

    def of(op, arrays, options):
        return lambda name: lambda arrays: op(**arrays, **options, implementation=name)[0], arrays

    found = {name: of(kernels.linear_attention, {"q": q, "k": k, "v": v, **more}, {}) for name, more in memories.items()}
    found["mamba"] = of(kernels.scan, {"u": u, "delta": delta, "A": A, "B": B, "C": C}, {})
    A, B = legendre(order, 256.0)
    found["lmu"] = of(kernels.lmu, {"u": normal(batch, length, 4)}, {"A": A, "B": B})
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*")
    args = parser.parse_args()
    import jax

    print("| recurrence | forward: scan, chunked, ratio | with gradients: the same | compiles in | memory |")
    print("| --- | --- | --- | --- | --- |")
    for name, (make, arrays) in cases(args.batch, args.length).items():
        if args.only and name not in args.only:
            continue
        row = [name]
        for gradients in (False, True):
            calls = {}
            for implementation in ("reference", "xla"):
                function = make(implementation)
                if gradients:
                    function = jax.grad(lambda arrays, function=function: (function(arrays) ** 2).sum())
                begin = time.perf_counter()
                calls[implementation] = jax.jit(function).lower(arrays).compile()
                compiled = time.perf_counter() - begin
                jax.block_until_ready(calls[implementation](arrays))
            rounds = [{key: timed(call, arrays) for key, call in calls.items()} for _ in range(args.rounds)]
            slow, fast = (statistics.median(r[key] for r in rounds) for key in ("reference", "xla"))
            ratio = statistics.median(r["reference"] / r["xla"] for r in rounds)
            row.append(f"{slow * 1e3:.1f} ms, {fast * 1e3:.1f} ms, {ratio:.1f}x")
        memory = calls["xla"].memory_analysis()
        print(f"| {' | '.join(row)} | {compiled:.1f} s | {memory.temp_size_in_bytes / 2**20:.1f} MiB |", flush=True)


def timed(call, arrays):
    import jax

    begin = time.perf_counter()
    jax.block_until_ready(call(arrays))
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
