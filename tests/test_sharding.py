"""Placement by rule: the right axes on eight devices, nothing at all on one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from jax.sharding import PartitionSpec

from seqlab import merge, params_of, split
from seqlab.parallel.sharding import constrain, make_mesh, param_shardings


def test_one_device_needs_no_mesh():
    mesh = make_mesh(devices=jax.devices()[:1])
    assert mesh is None and param_shardings({}, mesh) is None
    x = jnp.arange(6.0)
    assert constrain(x, "data") is x


def test_rules_split_what_divides():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2, "sequence": 1}
    specs = {
        name: sharding.spec
        for name, sharding in param_shardings(params_of(zoo.model("lm_hybrid")), mesh).items()
    }
    assert specs["embedding.weight"] == PartitionSpec(None, "fsdp")  # 31 tokens do not split in two
    assert specs["backbone.blocks.1.mixer.qkv.weight"] == PartitionSpec("fsdp", "tensor")
    assert specs["backbone.blocks.1.mixer.out.weight"] == PartitionSpec("tensor", "fsdp")
    assert specs["backbone.blocks.0.mixer.A_log"] == PartitionSpec()


def test_stacked_layers_keep_their_first_axis_whole():
    specs = param_shardings(params_of(zoo.model("lm_hybrid_scanned")), make_mesh(fsdp=2, tensor=4, data=1))
    assert specs["backbone.blocks.1.mixer.qkv.weight"].spec == PartitionSpec(None, "fsdp", "tensor")


def test_a_sharded_model_computes_the_same():
    net, mesh = zoo.model("lm_hybrid"), make_mesh(data=2, fsdp=2, tensor=2)
    static, params = split(net)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 31, (4, 20)))
    expected = net(tokens)[0]
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, param_shardings(params, mesh))
        logits = jax.jit(
            lambda params, tokens: merge(static, params)(constrain(tokens, ("data", "fsdp")))[0]
        )(placed, tokens)
    np.testing.assert_allclose(np.asarray(logits), np.asarray(expected), atol=2e-5)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [({"data": 3}, "does not fit 8"), ({"data": -1, "tensor": -1}, "only one"), ({"tensor": 0}, "tensor")],
)
def test_meshes_that_do_not_fit_are_refused(sizes, words):
    with pytest.raises(ValueError, match=words):
        make_mesh(**sizes)
