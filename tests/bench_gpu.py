"""The Triton kernels on a GPU: first whether they are right, then whether they are as fast as is claimed.

    python tests/bench_gpu.py [--only attention scan ... training] [--quick] [--rounds 5] [--json FILE]

Parity first: every spec of every op, values and gradients, against the definition in float64; an op that
fails gets no figures. Then what
`seqlab bench OP` does, at the shapes that are large enough for such a machine, and for every claim whether it
held here: attention beside cuDNN and PyTorch, decoding beside the bandwidth of a copy, caches in few bits
beside those in bfloat16, the selective scan beside mamba-ssm, linear attention beside flash-linear-attention,
and a training step beside the one that XLA makes alone. A peer takes part where it can be imported. Ends with
1 where something is wrong, claims that do not hold included.
"""

import argparse
import functools
import os
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

KERNEL = "triton_gpu"
OPS = ("conv", "scan", "attention", "linear_attention", "decode_attention")
# Float32 products are made of three in TF32, and exponentials are the hardware's.
VALUES, GRADIENTS = 5e-5, 2e-4
BFLOAT16 = 2.0**-8  # what is handed back was rounded to 8 bits

# How many times our time a peer must take at least; and the share of a copy's bandwidth that decoding must
# reach.
PEERS = {
    ("attention", "cuDNN"): 0.9,
    ("attention", "PyTorch SDPA"): 0.9,
    ("decode_attention", "a cache of numbers"): 2.0,
    ("linear_attention", "flash-linear-attention"): 1.0,
    ("scan", "mamba-ssm"): 1.0,
}
COPY = 0.8
TRAINING = 1.5

# Sizes that only show that everything runs: changes of the first shape of an op.
QUICK = {
    "attention": ["b=1", "t=40", "s=40", "h=2", "g=2", "k=16", "v=16"],
    "conv": ["b=1", "t=9", "d=5"],
    "decode_attention": ["b=1", "s=64", "h=2", "g=1", "k=32", "v=32"],
    "linear_attention": ["b=1", "t=20", "h=2", "k=8", "v=8"],
    "scan": ["b=1", "t=9", "e=5", "n=2"],
}


# --- parity


def parity(op: str, names: tuple[str, ...] | None = None) -> list[str]:
    """Errors on the specs of an op, one line each."""
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


def _specs(op: str) -> Iterator[tuple[str, Callable[[], Any], Callable[[], Any]]]:
    """(name, run by the kernels, the definition in float64) of every spec; the tests of the op know how to
    call it."""
    tests = __import__(f"test_kernels_{op}")
    if op == "decode_attention":
        for name, spec in tests.SPECS.items():
            arguments = tests.inputs(spec)
            run = functools.partial(tests.decode_attention, **arguments, implementation=KERNEL)
            yield (
                name,
                lambda run=run: (run(), ()),
                lambda spec=spec, a=arguments: (tests.by_hand(spec, **a), ()),
            )
        return
    if op == "attention":
        from seqlab.kernels.attention.specs import make

        for name, spec in tests.SPECS.items():
            call = make(spec)
            run = functools.partial(tests.with_gradients, call, tests.cotangents_of(call), KERNEL)
            yield name, run, functools.partial(tests.truth, name)
        return
    for name, spec in tests.SPECS.items():
        arguments = tests.inputs(spec)
        chunk = {} if op == "conv" else {"chunk": spec.chunk}
        run = functools.partial(
            tests.run, arguments, tests.cotangents_of(arguments), implementation=KERNEL, **chunk
        )
        yield name, run, functools.partial(tests.truth, name)


def difference(found: Any, expected: Any) -> str:
    """The location where values or gradients differ by more than allowed, relative to the largest magnitude;
    nothing if nowhere."""
    from seqlab.bench import distance

    for tolerance, actual, wanted in zip((VALUES, GRADIENTS), found, expected, strict=True):
        pairs = zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(wanted), strict=True)
        for (path, a), e in pairs:
            allowed = tolerance + (BFLOAT16 if a.dtype == jnp.bfloat16 else 0.0)
            error = distance(np.asarray(a, np.float64), np.asarray(e, np.float64))
            if error > allowed:
                return f"{jax.tree_util.keystr(path)} differs by {error:.1e}, allowed {allowed:.1e}"
    return ""


# --- claims


class Claim(NamedTuple):
    """The claim for a case, the measurement, and whether it holds."""

    case: str
    what: str
    found: float
    wanted: float

    @property
    def held(self) -> bool:
        return self.found >= self.wanted

    def __str__(self) -> str:
        verdict = "holds" if self.held else "FAILS"
        return f"{verdict}: {self.case}: {self.what} {self.found:.2f}, claimed {self.wanted}"


def claims(record: dict[str, Any]) -> list[Claim]:
    """The claims that a case of `seqlab bench` is about, the kernel first among its contestants."""
    title = f"{record['op']} {record['name']}{', backward too' if record['gradients'] else ''}"
    first, *others = record["contestants"]
    decoding = record["name"].startswith(("decode_", "numbers_"))
    if not first["seconds"] or (decoding and record["gradients"]) or record["name"].startswith("int8"):
        return []
    if decoding:
        return [Claim(title, "share of a copy's bytes/s", first["copy_share"], COPY)]
    rows = [(row, PEERS.get((record["op"], row["name"]))) for row in others]
    return [
        Claim(title, f"times as fast as {row['name']}", row["ratio"], wanted)
        for row, wanted in rows
        if wanted and row.get("ratio")
    ]


def compare(op: str, rounds: int, shape: list[str]) -> tuple[list[dict[str, Any]], int]:
    """Print what `seqlab bench` finds for an op, forwards and backwards; its records, and how many results
    are wrong."""
    from seqlab import bench
    from seqlab.bench import cases, show

    planned, records, wrong = (
        bench.plan(op, [KERNEL, "xla"], shape, "bfloat16", cases.has_gradients(op)),
        [],
        0,
    )
    for outcome in bench.run(planned, rounds):
        print(f"\n{show.as_text(outcome)}", flush=True)
        records.append(bench.record(outcome))
        wrong += sum(bool(result.wrong) for result in outcome.results)
    return records, wrong


# --- training

MODELS = ("mamba", "attention")


def training(kind: str, rounds: int, quick: bool) -> Claim | str:
    """A step of a model of 130 million parameters in bfloat16, with the kernels and with XLA alone; or what
    is wrong with it."""
    import seqlab
    from seqlab.bench import timing

    step, arguments = _step(
        kind, *((64, 2, 2, 32) if quick else (768, 24 if kind == "mamba" else 12, 8, 2048))
    )
    programs = {}
    for name in (KERNEL, "xla"):
        with seqlab.use_implementation((name, "xla")):
            programs[name] = timing.compiled(lambda both: step(*both), arguments)
    ours, theirs = (programs[name].result[1] for name in (KERNEL, "xla"))
    for what in ("loss", "norm"):
        a, e = (float(getattr(metrics, what)) for metrics in (ours, theirs))
        if not abs(a - e) <= 8 * BFLOAT16 * abs(e):
            return f"WRONG: training {kind}: {what} {a:.5f} with the kernels and {e:.5f} with XLA alone"
    times = timing.race({name: program.measure for name, program in programs.items()}, rounds)
    print(
        f"\ntraining {kind}: "
        + ", ".join(f"{name} {seconds * 1e3:.1f} ms" for name, seconds in times.items())
    )
    return Claim(
        f"training step, {kind} of 130 M",
        "times as fast as XLA alone",
        times["xla"] / times[KERNEL],
        TRAINING,
    )


def _step(
    kind: str, dim: int, depth: int, batch: int, length: int
) -> tuple[Callable[..., Any], tuple[Any, Any]]:
    from flax import nnx

    from seqlab.models import Attention, LanguageModel, Mamba
    from seqlab.module import split
    from seqlab.train.optim import adamw
    from seqlab.train.step import init_state, next_token_loss, train_step

    options = (
        {"mixers": Mamba, "channel_mixer": None}
        if kind == "mamba"
        else {"mixers": functools.partial(Attention, heads=dim // 64)}
    )
    vocabulary = 50304 if dim == 768 else 256
    model = LanguageModel(
        vocabulary, dim, depth, dtype="bfloat16", scan_layers=True, rngs=nnx.Rngs(0), **options
    )
    static, params = split(model)
    optimizer = adamw(1000, peak=1e-4)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, vocabulary, (batch, length + 1)), jnp.int32)
    inputs = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "valid": jnp.ones((batch, length), bool)}
    return functools.partial(train_step, static, optimizer, next_token_loss, 1), (
        init_state(static, params, optimizer),
        inputs,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", default=(*OPS, "training"), choices=(*OPS, "training"))
    parser.add_argument("--quick", action="store_true", help="sizes that only show that everything runs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write everything there, too")
    args = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory too
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))  # a bare checkout is enough
    from seqlab import bench
    from seqlab.kernels import triton

    try:
        triton.available()
    except NotImplementedError as reason:
        raise SystemExit(f"the Triton kernels do not run here: {reason}") from None
    about = bench.about()
    print(f"{about['device']}, JAX {about['jax']}, Python {sys.version.split()[0]}", flush=True)
    records, found, bad = [], [], 0
    for op in (op for op in OPS if op in args.only):
        wrong = parity(op)
        print(
            f"\n{op}: " + ("all specs are those of float64" if not wrong else "WRONG, so no figures"),
            *wrong,
            sep="\n  ",
            flush=True,
        )
        bad += len(wrong)
        if not wrong:
            more, count = compare(op, args.rounds, QUICK[op] if args.quick else [])
            records, bad = records + more, bad + count
            found += [claim for record in more for claim in claims(record)]
    found += [training(kind, args.rounds, args.quick) for kind in MODELS if "training" in args.only]
    bad += sum(isinstance(claim, str) for claim in found)
    if not args.quick:  # small sizes claim nothing
        print("\n" + "\n".join(map(str, found)))
        bad += sum(isinstance(claim, Claim) and not claim.held for claim in found)
    if args.json:
        bench.write(args.json, {**about, "cases": records, "claims": [str(claim) for claim in found]})
    if bad:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
