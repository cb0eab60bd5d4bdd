"""Published weights: every name finds its place, and what does not fit is refused by name."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqlab import params_of
from seqlab.interop.convert import convert, published_names
from seqlab.models import DeltaNet, LanguageModel, Mamba, Mamba2


def model(mixer, channel_mixer=None, **options):
    extra = {} if channel_mixer is None else {"channel_mixer": channel_mixer}
    return LanguageModel(
        11,
        16,
        2,
        mixer,
        **({"channel_mixer": None} if channel_mixer is None else extra),
        rngs=nnx.Rngs(0),
        **options,
    )


def state_dict(target, architecture=None, splits=None):
    """A made-up state dict for `target`: numbers from a seed, in PyTorch's layout, joined maps as separate
    tensors."""
    rng, tensors = np.random.default_rng(0), {}
    params = params_of(target)
    for ours, theirs in published_names(target, architecture).items():
        shape = params[ours].shape
        widths = [shape[-1]] if len(theirs) == 1 else splits[shape[-1]]
        for name, width in zip(theirs, widths, strict=True):
            value = rng.normal(size=(*shape[:-1], width)).astype(np.float32)
            if re.search(r"conv1d\.weight$", name):
                value = value.T[:, None]
            elif value.ndim == 2 and name.endswith("weight") and "embeddings" not in name:
                value = value.T
            tensors[name] = value
    return tensors


@pytest.mark.parametrize("mixer", [Mamba, Mamba2])
def test_a_language_model_takes_the_names_of_the_published_checkpoints(mixer):
    target = model(
        lambda dim, rngs: mixer(dim, state_size=4, **({"head_dim": 8} if mixer is Mamba2 else {}), rngs=rngs)
    )
    tensors = state_dict(target, "mamba")
    assert {"backbone.embeddings.weight", "backbone.layers.1.norm.weight", "backbone.norm_f.weight"} <= set(
        tensors
    )
    assert "backbone.layers.0.mixer.conv1d.bias" in tensors
    # A tied head is in the file a second time.
    tensors["lm_head.weight"] = tensors["backbone.embeddings.weight"]
    params = params_of(convert(target, tensors, architecture="mamba"))
    np.testing.assert_array_equal(
        params["backbone.blocks.1.mixer.in_proj.weight"], tensors["backbone.layers.1.mixer.in_proj.weight"].T
    )
    np.testing.assert_array_equal(
        params["backbone.blocks.0.mixer.conv.weight"],
        tensors["backbone.layers.0.mixer.conv1d.weight"][:, 0].T,
    )
    np.testing.assert_array_equal(params["embedding.weight"], tensors["backbone.embeddings.weight"])


def test_maps_that_are_one_here_and_several_there_are_joined():
    from seqlab.models import SwiGLU

    target = model(lambda dim, rngs: DeltaNet(dim, heads=2, rngs=rngs), SwiGLU, tie_embeddings=False)
    tensors = state_dict(target, "fla", {48: [16, 16, 16], 128: [64, 64]})
    params = params_of(
        convert(
            target,
            {f"file.{name}": value for name, value in tensors.items()},
            architecture="fla",
            prefix="file.",
        )
    )
    joined = np.concatenate([tensors[f"model.layers.0.attn.{name}_proj.weight"] for name in "qkv"]).T
    np.testing.assert_array_equal(params["backbone.blocks.0.mixer.qkv.weight"], joined)
    joined = np.concatenate([tensors[f"model.layers.1.mlp.{name}_proj.weight"] for name in ("gate", "up")]).T
    np.testing.assert_array_equal(params["backbone.blocks.1.channel_mixer.gate_up.weight"], joined)
    np.testing.assert_array_equal(params["head.weight"], tensors["lm_head.weight"].T)


def test_what_does_not_fit_is_refused_by_name():
    target = Mamba(8, state_size=4, rngs=nnx.Rngs(0))
    tensors = state_dict(target)
    before = {name: np.asarray(value) for name, value in params_of(target).items()}
    with pytest.raises(
        KeyError, match=r"no tensor conv1d.weight for parameter conv.weight; did you mean conv1d.wieght"
    ):
        convert(target, {name.replace("1d.weight", "1d.wieght"): value for name, value in tensors.items()})
    with pytest.raises(
        ValueError,
        match=r"in_proj.weight has shape \(8, 31\) in this layout, parameter in_proj.weight needs \(8, 32\)",
    ):
        convert(target, tensors | {"in_proj.weight": tensors["in_proj.weight"][:-1]})
    with pytest.raises(ValueError, match=r"conv1d.weight has shape \(16, 4\), expected \[d, 1, w\]"):
        convert(target, tensors | {"conv1d.weight": tensors["conv1d.weight"][:, 0]})
    with pytest.raises(
        ValueError, match="1 tensors have no place in the model: extra; wrong options or architecture"
    ):
        convert(target, tensors | {"extra": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"architecture.*'mamb'.*did you mean 'mamba'"):
        convert(target, tensors, architecture="mamb")
    for name, value in params_of(target).items():
        np.testing.assert_array_equal(value, before[name], err_msg="the model itself is left alone")
