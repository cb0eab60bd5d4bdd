"""The Triton kernels on a GPU: first whether they are right, then how fast they are beside what else there is.

    python tests/bench_gpu.py [--only attention scan ...] [--quick] [--rounds 5]

Parity: every spec of every op, values and gradients, against the definition in float64. Then every case is checked once more at its own
size, and only where both held a ratio is printed. The contestants take turns in one run; a time is that of the device, from loops of calls
inside of one program (JAX) or between events (PyTorch). PyTorch, flash-linear-attention, mamba-ssm and causal-conv1d take part where they
can be imported. Ceilings are a copy and a product of matrices, measured in the same run.
"""

import argparse
import functools
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

KERNEL = "triton_gpu"
OPS = ("conv", "scan", "attention", "linear_attention", "decode_attention")
# Float32 products are made of three in TF32, and exponentials are the hardware's.
VALUES, GRADIENTS = 5e-5, 2e-4
BFLOAT16 = 2.0**-8  # what is handed back was rounded to 8 bits


class Case(NamedTuple):
    """A call of an op, what it must at least read and write and compute forwards, and its peers outside of JAX."""

    op: str
    name: str
    arguments: dict[str, Any]
    options: dict[str, Any]
    bytes: float
    flops: float
    peers: dict[str, Callable[..., Any]]  # name -> what makes something to time of a case


# --- parity


def parity(op: str, names: tuple[str, ...] | None = None) -> list[str]:
    """What is wrong on the specs of an op, a line each."""
    wrong = []
    for name, run, truth in _specs(op):
        if names is not None and name not in names:
            continue
        try:
            found, expected = run(), truth()
        except NotImplementedError as reason:
            print(f"  {op} {name}: declined, {reason}", flush=True)
            continue
        if error := difference(found, expected):
            wrong.append(f"{op} {name}: {error}")
    return wrong


def _specs(op):
    """(name, run by the kernels, the definition in float64) of every spec; the tests of the op know how to call it."""
    tests = __import__(f"test_kernels_{op}")
    if op == "decode_attention":
        for name, spec in tests.SPECS.items():
            arguments = tests.inputs(spec)
            run = functools.partial(tests.decode_attention, **arguments, implementation=KERNEL)
            yield name, lambda run=run: (run(), ()), lambda spec=spec, a=arguments: (tests.by_hand(spec, **a), ())
        return
    if op == "attention":
        from seqlab.kernels.attention.specs import make

        for name, spec in tests.SPECS.items():
            call = make(spec)
            yield (
                name,
                functools.partial(tests.with_gradients, call, tests.cotangents_of(call), KERNEL),
                functools.partial(tests.truth, name),
            )
        return
    for name, spec in tests.SPECS.items():
        arguments = tests.inputs(spec)
        chunk = {} if op == "conv" else {"chunk": spec.chunk}
        run = functools.partial(tests.run, arguments, tests.cotangents_of(arguments), implementation=KERNEL, **chunk)
        yield name, run, functools.partial(tests.truth, name)


def difference(found: Any, expected: Any, most: tuple[float, float] = (VALUES, GRADIENTS)) -> str:
    """Where (values, gradients) differ by more than they may, relative to the largest magnitude; nothing if nowhere."""
    for tolerance, actual, wanted in zip(most, found, expected, strict=True):
        pairs = zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(wanted), strict=True)
        for (path, a), e in pairs:
            allowed = tolerance + (BFLOAT16 if a.dtype == jnp.bfloat16 else 0.0)
            a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
            same = np.array_equal(np.isfinite(a), np.isfinite(e))
            a, e = np.where(np.isfinite(a), a, 0), np.where(np.isfinite(e), e, 0)
            error = np.abs(a - e).max(initial=0.0) / max(np.abs(e).max(initial=0.0), 1e-6)
            if not same or error > allowed:
                return f"{jax.tree_util.keystr(path)} differs by {error:.1e}, allowed {allowed:.1e}" + (
                    "" if same else ", and in what is finite"
                )
    return ""


# --- time


def gradient(function: Callable[..., Any]) -> Callable[..., Any]:
    """Values and the gradients by all floating-point arguments, for cotangents that are the values themselves."""

    def both(arguments):
        floats = {name: x for name, x in arguments.items() if x is not None and jnp.issubdtype(x.dtype, jnp.floating)}
        values, pull = jax.vjp(lambda floats: function({**arguments, **floats}), floats)
        return values, pull(jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, 0), values))[0]

    return both


def prepared(function: Callable[[Any], Any], arguments: Any, calls: int) -> Callable[[], float]:
    """A function that runs `calls` calls inside of one program and gives the seconds of one."""

    def loop(arguments):
        first = function(arguments)
        return jax.lax.fori_loop(1, calls, lambda _, last: function(jax.lax.optimization_barrier((arguments, last))[0]), first)

    compiled = jax.jit(loop).lower(arguments).compile()
    jax.block_until_ready(compiled(arguments))

    def once():
        begin = time.perf_counter()
        jax.block_until_ready(compiled(arguments))
        return (time.perf_counter() - begin) / calls

    return once


def in_torch(function: Callable[[], Any], calls: int) -> Callable[[], float]:
    """The same for a function of PyTorch."""
    import torch

    function()

    def once():
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(calls):
            function()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3 / calls

    return once


def race(contestants: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Median seconds of each, in turns."""
    times = [{name: once() for name, once in contestants.items()} for _ in range(rounds)]
    return {name: statistics.median(t[name] for t in times) for name in contestants}


def ceilings(calls: int, rounds: int, size: int = 8192) -> tuple[float, float]:
    """Bytes a second of a copy and operations a second of a product of matrices in bfloat16."""
    x = jnp.zeros((size * size,), jnp.float32)
    a = jnp.ones((size, size), jnp.bfloat16)
    times = race({"copy": prepared(lambda x: x + 1, x, calls), "product": prepared(lambda a: a @ a, a, calls)}, rounds)
    return 2 * x.nbytes / times["copy"], 2 * size**3 / times["product"]


def compare(case: Case, calls: int, rounds: int, most: tuple[float, float]) -> None:
    """Print the times of a case, forwards and with gradients; ratios only where the kernels are right."""
    from seqlab import kernels

    def of(name):
        return lambda arguments: getattr(kernels, case.op)(**arguments, **case.options, implementation=name)

    with jax.default_matmul_precision("highest"):
        wide = {key: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x for key, x in case.arguments.items()}
        expected = jax.jit(gradient(of("xla")))(wide)
    try:
        found = jax.jit(gradient(of(KERNEL)))(case.arguments)
    except NotImplementedError as reason:
        print(f"{case.op} {case.name}: declined, {reason}")
        return
    # Of a product of numbers in bfloat16 the factors are rounded as well as the result.
    allowed = (BFLOAT16, 4 * BFLOAT16) if any(x.dtype == jnp.bfloat16 for x in case.arguments.values()) else (VALUES, GRADIENTS)
    if error := difference(found, expected, allowed):
        print(f"{case.op} {case.name}: WRONG, so no figures: {error}")
        return
    for what in ("forward", "forward and backward"):
        wrap = gradient if what != "forward" else lambda function: function
        contestants = {name: prepared(wrap(of(name)), case.arguments, calls) for name in (KERNEL, "xla")}
        for name, make in case.peers.items():
            try:
                contestants[name] = make(case, what != "forward", calls)
            except Exception as error:  # a peer that is not there, or not for this case, is no reason to stop
                print(f"  without {name}: {type(error).__name__} {str(error).splitlines()[0] if str(error) else ''}")
        times = race(contestants, rounds)
        ours, factor = times[KERNEL], 1.0 if what == "forward" else 3.0  # a gradient reads and computes twice as much again, or more
        share = (
            f"{factor * case.bytes / ours / most[0]:.0%} of the copy's bytes/s, {factor * case.flops / ours / most[1]:.0%} of the product's"
        )
        print(f"{case.op} {case.name}, {what}: {ours * 1e6:.0f} us ({share})")
        for name, seconds in times.items():
            if name != KERNEL:
                print(f"    {seconds / ours:.2f}x of {name} ({seconds * 1e6:.0f} us)", flush=True)


def compare_decoding(calls: int, rounds: int, most: tuple[float, float], short: int) -> None:
    """Decoding from few bits beside decoding from bfloat16, by the bytes of their caches."""
    from seqlab.kernels.attention import attention
    from seqlab.kernels.decode_attention import decode_attention
    from seqlab.kernels.decode_attention.specs import BENCHMARKS, inputs

    for name, spec in BENCHMARKS.items():
        spec = spec._replace(s=spec.s // short)
        a = inputs(spec)
        with jax.default_matmul_precision("highest"):
            expected = decode_attention(**a, implementation="xla")
        if error := difference((decode_attention(**a, implementation=KERNEL), ()), (expected, ()), (BFLOAT16, 0.0)):
            print(f"decode_attention {name}: WRONG, so no figures: {error}")
            continue
        wide = {"q": a["q"][:, None], "k": _normal(spec.b, spec.g, spec.s, spec.k), "v": _normal(spec.b, spec.g, spec.s, spec.v, seed=1)}

        def plain(a):
            return attention(a["q"], a["k"].swapaxes(1, 2), a["v"].swapaxes(1, 2), implementation=KERNEL)

        contestants = {f"{KERNEL}, {spec.bits} bits": (lambda a: decode_attention(**a, implementation=KERNEL), a)}
        contestants |= {f"xla, {spec.bits} bits": (lambda a: decode_attention(**a, implementation="xla"), a)}
        contestants |= {f"{KERNEL}, bfloat16": (plain, wide)}
        times = race({key: prepared(function, arrays, calls) for key, (function, arrays) in contestants.items()}, rounds)
        ours, moved = times[f"{KERNEL}, {spec.bits} bits"], _size(*jax.tree.leaves(a))
        print(f"decode_attention {name}: {ours * 1e6:.0f} us, {moved / ours / most[0]:.0%} of the copy's bytes/s")
        for key, seconds in list(times.items())[1:]:
            print(f"    {seconds / ours:.2f}x of {key} ({seconds * 1e6:.0f} us)", flush=True)


# --- peers


def cudnn(case, gradients, calls):
    """cuDNN through `jax.nn.dot_product_attention`."""
    options = {"is_causal": case.options["causal"], "implementation": "cudnn"}

    def function(arguments):
        return jax.nn.dot_product_attention(arguments["q"], arguments["k"], arguments["v"], **options)

    return prepared(gradient(function) if gradients else function, case.arguments, calls)


def _tensors(case, names, gradients):
    import torch

    kinds = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    arrays = [case.arguments[name] for name in names]
    host = [torch.from_numpy(np.asarray(x, np.float32)) for x in arrays]
    return [x.to("cuda", kinds[a.dtype.name]).requires_grad_(gradients) for x, a in zip(host, arrays, strict=True)]


def _torch_loop(function, tensors, gradients, calls):
    import torch

    def step():
        out = function(*tensors)
        out = out[0] if isinstance(out, tuple) else out
        if gradients:
            torch.autograd.grad(out, tensors, out.detach())

    return in_torch(step, calls)


def sdpa(case, gradients, calls):
    """PyTorch's scaled_dot_product_attention."""
    import torch

    q, k, v = (x.detach().transpose(1, 2).contiguous().requires_grad_(gradients) for x in _tensors(case, "qkv", False))

    def function(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=case.options["causal"], enable_gqa=True)

    return _torch_loop(function, [q, k, v], gradients, calls)


def mamba_ssm(case, gradients, calls):
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    u, delta, A, B, C = (x.detach() for x in _tensors(case, ("u", "delta", "A", "B", "C"), False))
    turned = [x.transpose(1, 2).contiguous() for x in (u, delta)] + [A.float()] + [x.transpose(1, 2).contiguous() for x in (B, C)]
    return _torch_loop(selective_scan_fn, [x.requires_grad_(gradients) for x in turned], gradients, calls)


def causal_conv1d(case, gradients, calls):
    from causal_conv1d import causal_conv1d_fn

    x, weight, bias = (x.detach() for x in _tensors(case, ("x", "weight", "bias"), False))
    turned = [x.transpose(1, 2), weight.T.contiguous(), bias]
    return _torch_loop(causal_conv1d_fn, [x.requires_grad_(gradients) for x in turned], gradients, calls)


def fla(name, arguments, module):
    """A kernel of flash-linear-attention; `arguments` are ours in its order."""

    def make(case, gradients, calls):
        import importlib

        function = getattr(importlib.import_module(f"fla.ops.{module}"), name)
        return _torch_loop(function, _tensors(case, arguments, gradients), gradients, calls)

    return make


# --- cases


def cases(quick: bool = False) -> list[Case]:
    """What is timed; `quick` for sizes that only show that everything runs."""
    short = 64 if quick else 1
    return [*_conv_cases(short), *_scan_cases(short), *_attention_cases(short), *_linear_cases(short)]


def _normal(*shape, dtype="bfloat16", scale=1.0, seed=0):
    return (scale * jax.random.normal(jax.random.key(seed + sum(shape)), shape, jnp.float32)).astype(dtype)


def _size(*arrays):
    return float(sum(x.nbytes for x in arrays))


def _conv_cases(short):
    for b, t, d in ((1, 2048 // short, 1536), (8, 4096 // short, 2048)):
        arguments = {"x": _normal(b, t, d), "weight": _normal(4, d), "bias": _normal(d)}
        yield Case("conv", f"[{b}, {t}, {d}]", arguments, {}, 2 * _size(arguments["x"]), 8.0 * b * t * d, {"causal-conv1d": causal_conv1d})


def _scan_cases(short):
    n = 16
    for b, t, e in ((1, 2048 // short, 1536), (8, 4096 // short, 2048), (8, 65536 // short, 1536)):
        arguments = {"u": _normal(b, t, e), "delta": jax.nn.softplus(_normal(b, t, e, seed=1) - 3).astype(jnp.bfloat16)}
        arguments |= {"A": -jnp.exp(_normal(e, n, dtype="float32")), "B": _normal(b, t, n, seed=2), "C": _normal(b, t, n, seed=3)}
        moved = _size(*arguments.values(), arguments["u"])
        yield Case("scan", f"[{b}, {t}, {e}] n={n}", arguments, {}, moved, 7.0 * b * t * e * n, {"mamba-ssm": mamba_ssm})


def _attention_cases(short):
    sizes = [(4, 2048, 2048, 16, 16, 64), (4, 4096, 4096, 16, 16, 128), (1, 16384, 16384, 16, 4, 128), (4, 4096, 4096, 8, 8, 256)]
    sizes += [(1, 1, 8192, 32, 8, 128), (8, 1, 32768, 32, 8, 128), (1, 1, 131072, 32, 8, 128)]
    for b, t, s, h, g, k in sizes:
        t, s = max(t // short, 1), s // short
        arguments = {"q": _normal(b, t, h, k), "k": _normal(b, s, g, k, seed=1), "v": _normal(b, s, g, k, seed=2)}
        pairs = b * h * t * s * (0.5 if t > 1 else 1.0)
        moved = _size(*arguments.values(), arguments["q"])
        peers = {"cuDNN": cudnn, "PyTorch": sdpa} if t == s else {}
        yield Case("attention", f"{b} x {t} over {s}, {h} on {g} heads of {k}", arguments, {"causal": True}, moved, 4.0 * pairs * k, peers)


def _linear_cases(short):
    for b, t, h, k in ((4, 2048 // short, 16, 64), (4, 4096 // short, 16, 128)):
        q, key, v = (_normal(b, t, h, k, seed=seed) for seed in range(3))
        key = (key / jnp.linalg.norm(key.astype(jnp.float32), axis=-1, keepdims=True)).astype(q.dtype)
        base = {"q": q, "k": key, "v": v}
        head = -jax.nn.softplus(_normal(b, t, h, dtype="float32", seed=3))
        channel = -0.1 * jax.nn.softplus(_normal(b, t, h, k, dtype="float32", seed=4))
        beta = jax.nn.sigmoid(_normal(b, t, h, seed=5))
        kinds = {
            "simple gated": ({"decay": head}, fla("chunk_simple_gla", ("q", "k", "v", "decay"), "simple_gla")),
            "gated": ({"decay": channel}, fla("chunk_gla", ("q", "k", "v", "decay"), "gla")),
            "delta": ({"beta": beta}, fla("chunk_delta_rule", ("q", "k", "v", "beta"), "delta_rule")),
            "gated delta": (
                {"decay": head, "beta": beta},
                fla("chunk_gated_delta_rule", ("q", "k", "v", "decay", "beta"), "gated_delta_rule"),
            ),
        }
        for name, (more, peer) in kinds.items():
            arguments = {**base, **more}
            moved, flops = _size(*arguments.values(), v), b * t * h * (4.0 * 64 * k + 4.0 * k * k)
            yield Case("linear_attention", f"{name} [{b}, {t}, {h}, {k}]", arguments, {}, moved, flops, {"flash-linear-attention": peer})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=OPS, choices=OPS)
    parser.add_argument("--quick", action="store_true", help="sizes and calls that only show that everything runs")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory too
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))  # a bare checkout is enough
    from seqlab.kernels import triton

    try:
        triton.available()
    except NotImplementedError as reason:
        raise SystemExit(f"the Triton kernels do not run here: {reason}") from None
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, Python {sys.version.split()[0]}")
    right = set()
    for op in args.only:
        wrong = parity(op)
        print(f"{op}: " + ("all specs are those of float64" if not wrong else "WRONG\n  " + "\n  ".join(wrong)), flush=True)
        right |= set() if wrong else {op}
    calls = 2 if args.quick else 20
    most = ceilings(calls, args.rounds, 1024 if args.quick else 8192)
    print(f"ceilings: {most[0] / 1e12:.2f} TB/s of a copy, {most[1] / 1e12:.0f} TFLOP/s of a product of matrices in bfloat16")
    for case in cases(args.quick):
        if case.op in args.only:
            if case.op not in right:
                print(f"{case.op} {case.name}: no figures, since its specs fail")
                continue
            compare(case, calls, args.rounds, most)
    if "decode_attention" in right:
        compare_decoding(calls, args.rounds, most, 64 if args.quick else 1)
    if len(right) < len(args.only):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
