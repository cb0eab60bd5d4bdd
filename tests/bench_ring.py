"""The longest sequence that can be trained on in a fixed memory, on one device and on eight: python
tests/bench_ring.py

Nothing is run: XLA says what the compiled gradient of the loss would hold on each device, what is given and
returned included.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from seqlab import merge, split
from seqlab.models import Attention, Full, GatedDeltaNet, LanguageModel, Mamba
from seqlab.parallel.sharding import make_mesh
from seqlab.train.step import next_token_loss

DEVICES = 8
MIXERS = {
    "attention": functools.partial(Attention, heads=4, kv_heads=1, cache=Full(1 << 20)),
    "mamba": functools.partial(Mamba, state_size=8),
    "gated_delta": functools.partial(GatedDeltaNet, heads=4),
}


def bytes_needed(mixer, devices, time, dim=64, depth=4):
    """Bytes of each device for the gradient of the loss of one sequence of `time` tokens."""
    model = nnx.eval_shape(
        lambda: LanguageModel(256, dim, depth, MIXERS[mixer], remat="block", rngs=nnx.Rngs(0))
    )
    static, params = split(model)

    def step(params, batch):
        return jax.value_and_grad(lambda params: next_token_loss(merge(static, params), batch)[0])(params)

    mesh = make_mesh(data=1, sequence=devices, devices=jax.devices()[:devices])
    place = None if mesh is None else NamedSharding(mesh, PartitionSpec(None, "sequence"))
    batch = {"inputs": jnp.int32, "targets": jnp.int32, "valid": bool}
    batch = {name: jax.ShapeDtypeStruct((1, time), dtype, sharding=place) for name, dtype in batch.items()}
    if mesh is None:
        compiled = jax.jit(step).lower(params, batch).compile()
    else:
        with jax.set_mesh(mesh):
            compiled = jax.jit(step).lower(params, batch).compile()
    memory = compiled.memory_analysis()
    return (
        memory.temp_size_in_bytes
        + memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
    )


def longest(mixer, devices, budget, unit=1024):
    """The longest time, a multiple of `unit` for each device, that fits into `budget` bytes of each."""
    unit *= devices
    low, high = 1, 2
    while bytes_needed(mixer, devices, high * unit) <= budget:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if bytes_needed(mixer, devices, middle * unit) <= budget else (low, middle)
    return low * unit


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--budget", type=float, default=512, metavar="MIB", help="memory of a device; default %(default)s"
    )
    parser.add_argument("--mixers", nargs="+", default=list(MIXERS), choices=list(MIXERS))
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    for mixer in args.mixers:
        one, several = (longest(mixer, n, args.budget * 2**20) for n in (1, DEVICES))
        print(
            f"{mixer:12} 1 device {one:9,} tokens   {DEVICES} devices {several:9,} tokens   "
            f"{several / one:.2f} times",
            flush=True,
        )


if __name__ == "__main__":
    main()
