"""WaveMix: the transform, blocks of every version and level, networks with running statistics. Arrays there
are [b, c, h, w]."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from seqlab.interop.convert import convert
from seqlab.kernels.dwt import dwt, idwt
from seqlab.models.images import (
    ImageToMap,
    ParallelWaveMixing,
    PatchStem,
    ShuffleWaveMixing,
    StridedStem,
    WaveMixing,
    wave_backbone,
    wavemix,
)

partial = functools.partial


def check(case):
    if "low" in case.outs:
        return _check_transform(case)
    if any(name.startswith("layers.") for name in case.params):
        return _check_network(case)
    return _check_block(case)


def _image(case):
    return case.array("x").transpose(0, 2, 3, 1)


def _there(y):
    y = np.asarray(y)
    return y.transpose(0, 3, 1, 2) if y.ndim == 4 else y


def _check_transform(case):
    x, levels = _image(case), case.options["levels"]
    for implementation in ("reference", "xla"):
        low, bands = dwt(x, levels, implementation=implementation)
        case.check("low", _there(low))
        for j, high in enumerate(bands, 1):
            case.check(f"high_{j}", high.transpose(0, 3, 4, 1, 2))
        np.testing.assert_allclose(
            idwt(low, bands, x.shape[1:3], implementation=implementation), x, atol=1e-6
        )


def _mixer(case, params):
    """The kind of block that has parameters of these names."""
    o = case.options
    shapes = {"expand": o.get("mult", 2), "hidden": o.get("ff_channel")}
    if "ff1.weight" in params:
        return partial(ParallelWaveMixing, levels=o.get("levels", 4), **shapes)
    if params.get("feedforward.4.weight", np.zeros(4)).shape[-1] == 3:
        return ShuffleWaveMixing
    return partial(WaveMixing, levels=o.get("level", o.get("levels", 1)), **shapes)


def _check_block(case):
    x = _image(case)
    mixer = convert(_mixer(case, case.params)(x.shape[-1], rngs=nnx.Rngs(0)), case.params)
    notes = _record(mixer)
    y, found = jax.jit(lambda x: (mixer.mix(x), dict(notes)))(x)
    case.check_all({name: _there(value) for name, value in found.items()})
    case.check("y", _there(y))


def _record(mixer):
    """Lets `mixer` note what its named parts give, by the original's names."""
    found = {}

    def noted(name, part):
        def call(x):
            found[name] = part(x)
            return found[name]

        return call

    for name in (
        "reduction",
        "feedforward",
        *(f"{kind}{j}" for kind in ("feedforward", "ff") for j in range(1, 5)),
    ):
        if hasattr(mixer, name):
            vars(mixer)[name] = noted(name, getattr(mixer, name))
    return found


def _check_network(case):
    x, o, params = _image(case), case.options, case.params
    first = {
        name.removeprefix("layers.0."): value
        for name, value in params.items()
        if name.startswith("layers.0.")
    }
    dim, depth = o["final_dim"], o["depth"]
    if "conv.2.weight" in params:
        stem = partial(PatchStem, patch=params["conv.2.weight"].shape[-1])
    else:
        stem = partial(
            StridedStem,
            stride=o.get("stride", 1 if "expand.0.weight" in params and "num_classes" not in o else 2),
        )
    options = {"mixer": _mixer(case, first), "stem": stem, "inputs": x.shape[-1]}
    if "pool.2.weight" in params:
        model = wavemix(o["num_classes"], dim, depth, **options, rngs=nnx.Rngs(0))
    else:
        spreads = [params[f"expand.{i}.weight"].shape for i in range(8) if f"expand.{i}.weight" in params]
        *spreads, last = spreads
        model = ImageToMap(
            last[0],
            partial(wave_backbone, dim, depth, **options),
            widths=[s[1] for s in spreads],
            rngs=nnx.Rngs(0),
        )
    model = convert(model, params, architecture="wavemix")

    def run(x):
        stem = y = model.backbone.downs[0](x)
        layers = []
        for block in model.backbone.stages[0].blocks:
            layers.append(block.mixer(y)[0])  # the original adds the stream outside its layers
            y, _ = block(y)
        return {"conv": stem, "y": model(x)} | {f"layers.{i}": y for i, y in enumerate(layers)}

    case.check_all({name: _there(value) for name, value in jax.jit(run)(jnp.asarray(x)).items()})
