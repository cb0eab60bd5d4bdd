"""Annotations are checked as they run: every call of every function of seqlab by jaxtyping and beartype.

    python tests/annotated.py [--briefly] [NAME ...]

Mixers and models of the zoo are built, called whole and in chunks, and their states used, configs take a step
of training, all of it traced and not computed: annotations are checked while JAX traces. What looks at
numbers (rewinding, streaming, the checker) is computed. A NAME is an entry of the zoo, a config, or a
function below.
"""

import argparse
import os
import sys
import traceback

from jaxtyping import install_import_hook

os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=2 {os.environ.get('XLA_FLAGS', '')}"

# Compiling the checks of all takes seconds.
FEW = (
    "mixer",
    "state",
    "models.layers",
    "models.linear_memory",
    "models.state_space",
    "kernels.conv",
    "kernels.scan",
)
FEW = [f"seqlab.{name}" for name in FEW]

with install_import_hook(FEW if "--briefly" in sys.argv else "seqlab", "beartype.beartype"):
    import seqlab.models

import jax
import jax.numpy as jnp
import numpy as np
import zoo
from flax import nnx

import seqlab
from seqlab.mixer import as_mixer, width_of
from seqlab.module import in_evaluation
from seqlab.state import select_rows

B, T = 2, 9


def inputs_of(mixer, time=T, dtype=jnp.float32):
    if as_mixer(mixer).vocab_size is not None:
        return jnp.zeros((B, time), jnp.int32)
    return jnp.zeros((B, time, width_of(mixer)), dtype)


def traced(build, dtype=jnp.float32):
    """A mixer built, called in every form, and what can be done with its state."""

    def run():
        mixer = build()
        x, flags, state = inputs_of(mixer, dtype=dtype), jnp.ones((B, T), bool), mixer.init_state(B, dtype)
        mixer(x), mixer(x, None, flags, flags)
        state = as_mixer(mixer).with_room(state, 3 * T)
        for here in (slice(0, 5), slice(5, 6), slice(6, 6), slice(6, T)):
            y, state = mixer(x[:, here], state, flags[:, here], flags[:, here])
        y, state = mixer(x[:, :1], state)
        state = as_mixer(mixer).compact(state, 3 * T)
        mixer = as_mixer(mixer).unrolled()
        taken = seqlab.take_rows(state, [1, 0])
        return (
            y,
            select_rows(flags[:, 0], seqlab.put_rows(state, [1, 0], taken), state),
            seqlab.params_of(mixer),
        )

    jax.eval_shape(run)


def gradient(build):
    """The backward pass of a mixer, which has functions of its own."""

    def run():
        static, params = seqlab.split(in_evaluation(build()))
        learnt = {name: leaf for name, leaf in params.items() if jnp.issubdtype(leaf.dtype, jnp.floating)}

        def loss(learnt):
            mixer = seqlab.merge(static, params | learnt)
            return jnp.sum(mixer(inputs_of(mixer), mixer.init_state(B), None, jnp.ones((B, T), bool))[0])

        return jax.grad(loss)(learnt)

    jax.eval_shape(run)


def entries():
    """What is checked, by name."""
    found = {name: lambda name=name: zoo.mixer(name) for name in zoo.MIXERS}
    found |= {name: lambda name=name: zoo.model(name) for name in zoo.MODELS}
    return found


def config_step(name):
    """A step of training, and of validation, of a config."""
    from test_configs import batch_of

    from seqlab.train import config
    from seqlab.train.step import evaluate_step, init_state, train_step

    experiment = config.build(config.fiddle(config.load(name), "tiny"))
    static, params = seqlab.split(nnx.eval_shape(lambda: experiment.model(rngs=nnx.Rngs(0))))
    optimizer, batch = experiment.optimizer(experiment.steps), batch_of(experiment)

    def run(params, batch):
        state = init_state(static, params, optimizer)
        state, _ = train_step(static, optimizer, experiment.loss, experiment.accumulate, state, batch)
        return evaluate_step(static, experiment.metric, state.params, batch)

    jax.eval_shape(run, params, batch)


def states():
    """What looks at the numbers of a state."""
    for cache in (
        "full(16)",
        "sinks(2)+window(8)",
        "full(16)+moba(4, 2)",
        "full(64)+int4",
        "sinks(2)+window(64)+int4",
    ):
        layer = seqlab.models.Attention(64, heads=2, cache=cache, rngs=nnx.Rngs(0))
        x = jnp.zeros((B, 5, 64))
        state = layer(x, layer.init_state(B))[1]
        layer.adopt(state)
        try:
            layer.rewind(state, jnp.asarray([2, 0]))
        except ValueError:
            assert "int" in cache  # codes are not taken back


def laws():
    """The checker, on one device and over two."""
    mixer = seqlab.models.Mamba(8, state_size=2, rngs=nnx.Rngs(0))
    seqlab.verify_streaming(mixer, length=13).raise_for_failure()
    seqlab.verify_devices(mixer, length=13, gradients=False, thorough=False).raise_for_failure()


def streams():
    """Text out of a model, in every way of asking for it."""
    attention = zoo.partial(seqlab.models.Attention, heads=2, cache="sinks(2)+window(8)")
    model = seqlab.models.LanguageModel(
        256, 16, 2, (attention, zoo.partial(attention, cache="full(64)")), rngs=nnx.Rngs(0)
    )
    assert seqlab.warm_up(model, rows=4, steps=8, prefill_chunks=(16,), top_logprobs=2)["programs"]
    stream = seqlab.stream_generate(
        model,
        ["one", b"two", [1, 2], np.asarray([3])],
        max_tokens=[4, 5, 6, 7],
        temperature=[0.0, 1.0, 0.5, 2],
        top_k=[None, 3, 4, 5],
        top_p=0.9,
        min_p=0.01,
        seed=[1, 2, 3, 4],
        stop=["x", b"y", [1, 2]],
        stop_tokens=[3],
        repetition_penalty=1.1,
        presence_penalty=0.1,
        frequency_penalty=0.1,
        logit_bias={3: 1.0},
        prefill_chunks=(16,),
        top_logprobs=2,
    )
    tokens = list(stream)
    assert tokens[0].text is not None
    again = seqlab.stream_generate(model, state=stream.state, max_tokens=2, prefill_chunks=[16])
    assert len(list(again)) == 8
    seqlab.rewind_stream(model, again.state, 1)
    assert seqlab.state_bytes(model) and seqlab.count_params(model)


FUNCTIONS = {function.__name__: function for function in (states, laws, streams)}


def checks(names, briefly):
    """(what, function) of all that is asked for."""
    if briefly:
        yield from ((name, lambda name=name: traced(entries()[name])) for name in names)
        return
    from seqlab.train import config

    for name, build in entries().items():
        if name in names or not names:
            yield name, lambda build=build: traced(build)
            yield f"{name} bfloat16", lambda build=build: traced(build, jnp.bfloat16)
            yield f"{name} backwards", lambda build=build: gradient(build)
    for name in config.names():
        if name in names or not names:
            yield f"config {name}", lambda name=name: config_step(name)
    for name, function in FUNCTIONS.items():
        if name in names or not names:
            yield name, function


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument(
        "--briefly", action="store_true", help="entries of the zoo in float32, forwards alone"
    )
    arguments, wrong = parser.parse_args(), 0
    for name, function in checks(arguments.names, arguments.briefly):
        try:
            function()
        except Exception as error:
            wrong += 1
            place = [
                frame for frame in traceback.extract_tb(error.__traceback__) if "jaxtyp" not in frame.filename
            ][-1]
            print(
                f"{name}: {place.filename}:{place.lineno}\n{error!s:.900}\n{error.__cause__!s:.900}\n",
                flush=True,
            )
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
