"""Hybrids of the MetaFormer papers that no recorded case has, written out in NumPy, as cases for the adapters
of `tests/parity`."""

import math

import numpy as np
import pytest
from parity import poolformer
from test_originals import case_of, grouped, softmax


def conv(x, weight, bias, stride, padding):
    """x [b, c, h, w] under weight [o, c, k, k]."""
    k, x = weight.shape[-1], np.pad(x, ((0, 0), (0, 0), (padding,) * 2, (padding,) * 2))
    windows = np.lib.stride_tricks.sliding_window_view(x, (k, k), axis=(2, 3))[:, :, ::stride, ::stride]
    return np.einsum("bchwij,ocij->bohw", windows, weight) + bias[:, None, None]


def normed(x, w, prefix, axes):
    y = (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + 1e-5)
    return y * w[f"{prefix}.weight"][:, None, None] + w[f"{prefix}.bias"][:, None, None]


def gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def mixed(x, w, prefix):
    b, c, h, wide = x.shape
    tokens = x.reshape(b, c, -1).swapaxes(1, 2)
    if f"{prefix}fc.weight" in w:
        return np.einsum("nm,bmc->bcn", w[f"{prefix}fc.weight"], tokens).reshape(x.shape)
    if f"{prefix}qkv.weight" in w:
        heads = max(c // 32, 1)
        qkv = (tokens @ w[f"{prefix}qkv.weight"].T).reshape(b, -1, 3, heads, c // heads)
        q, k, v = (qkv[:, :, i].swapaxes(1, 2) for i in range(3))
        y = softmax(q @ k.swapaxes(2, 3) * 32**-0.5) @ v
        y = y.swapaxes(1, 2).reshape(b, -1, c) @ w[f"{prefix}proj.weight"].T + w[f"{prefix}proj.bias"]
        return y.swapaxes(1, 2).reshape(x.shape)
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=np.nan)
    around = [padded[:, :, i : i + h, j : j + wide] for i in range(3) for j in range(3)]
    return np.nanmean(around, axis=0) - x


def network(x, w, depths, axes):
    number, mids = 0, {}
    for i, depth in enumerate(depths):
        name = "patch_embed" if i == 0 else f"network.{number}"
        options = {"stride": 4, "padding": 2} if i == 0 else {"stride": 2, "padding": 1}
        mids[name] = x = conv(x, w[f"{name}.proj.weight"], w[f"{name}.proj.bias"], **options)
        number += i > 0
        if f"network.{number}.pos_embed" in w:
            x = x + w[f"network.{number}.pos_embed"]
            number += 1
        for j in range(depth):
            p = f"network.{number}.{j}"
            y = mixed(normed(x, w, f"{p}.norm1", axes), w, f"{p}.token_mixer.")
            x = x + w[f"{p}.layer_scale_1"][:, None, None] * y
            y = gelu(
                conv(normed(x, w, f"{p}.norm2", axes), w[f"{p}.mlp.fc1.weight"], w[f"{p}.mlp.fc1.bias"], 1, 0)
            )
            y = conv(y, w[f"{p}.mlp.fc2.weight"], w[f"{p}.mlp.fc2.bias"], 1, 0)
            x = x + w[f"{p}.layer_scale_2"][:, None, None] * y
        mids[f"network.{number}"] = x
        number += 1
    return normed(x, w, "norm", axes).mean((2, 3)) @ w["head.weight"].T + w["head.bias"], mids


def drawn(shapes, rng):
    values = {}
    for name, shape in shapes.items():
        scale = 0.5 / math.sqrt(max(math.prod(shape[1:]), 1)) if len(shape) > 1 else 0.5
        values[name] = scale * rng.normal(size=shape) + (len(shape) == 1 and name.endswith("weight"))
    return values


@pytest.mark.slow
@pytest.mark.parametrize(
    "kinds, norm", [("ppaa", "LayerNormChannel"), ("pppa", "GroupNorm(1)"), ("ppff", "GroupNorm(1)")]
)
def test_the_hybrids_of_the_first_paper(kinds, norm, tmp_path):
    rng, widths, depths, classes = np.random.default_rng(len(norm)), (4, 6, 36, 64), (1, 1, 2, 1), 3
    sides, shapes, number = (16, 8, 4, 2), {}, 0
    for i, (dim, depth, side, kind) in enumerate(zip(widths, depths, sides, kinds, strict=True)):
        name, before, k = ("patch_embed", 3, 7) if i == 0 else (f"network.{number}", widths[i - 1], 3)
        shapes |= {f"{name}.proj.weight": (dim, before, k, k), f"{name}.proj.bias": (dim,)}
        number += i > 0
        if kind == "a":
            shapes[f"network.{number}.pos_embed"] = (1, dim, side, side)
            number += 1
        for j in range(depth):
            p = f"network.{number}.{j}"
            for part in ("norm1", "norm2"):
                shapes |= {f"{p}.{part}.weight": (dim,), f"{p}.{part}.bias": (dim,)}
            shapes |= {f"{p}.mlp.fc1.weight": (2 * dim, dim, 1, 1), f"{p}.mlp.fc1.bias": (2 * dim,)}
            shapes |= {f"{p}.mlp.fc2.weight": (dim, 2 * dim, 1, 1), f"{p}.mlp.fc2.bias": (dim,)}
            shapes |= {f"{p}.layer_scale_1": (dim,), f"{p}.layer_scale_2": (dim,)}
            if kind == "a":
                shapes |= {f"{p}.token_mixer.qkv.weight": (3 * dim, dim)}
                shapes |= {f"{p}.token_mixer.proj.weight": (dim, dim), f"{p}.token_mixer.proj.bias": (dim,)}
            if kind == "f":
                shapes[f"{p}.token_mixer.fc.weight"] = (side**2, side**2)
        number += 1
    shapes |= {"norm.weight": (widths[-1],), "norm.bias": (widths[-1],)}
    shapes |= {"head.weight": (classes, widths[-1]), "head.bias": (classes,)}
    weights, x = drawn(shapes, rng), rng.normal(size=(2, 3, 64, 64))
    logits, mids = network(x, weights, depths, (1,) if "Layer" in norm else (1, 2, 3))
    o = {"layers": depths, "embed_dims": widths, "mlp_ratios": [2] * 4, "pool_size": 3, "norm": norm}
    o |= {"num_classes": classes, "fork_feat": False}
    meta = {"hyper": o, "layout": "[B,C,H,W]", "tol": "abs 2e-5, rel 1e-5"}
    arrays = grouped("param", weights) | grouped("mid", mids) | {"in__x": x, "out__y": logits}
    case = case_of(tmp_path, meta, **arrays)
    poolformer.check(case)
    case.finish()
    assert set(mids) <= case.compared


@pytest.mark.slow
@pytest.mark.parametrize("dim", [20, 64])
def test_attention_whose_heads_share_all_channels(dim, tmp_path):
    """20 channels are one head of 20, whose logits are divided by the root of 32 nevertheless."""
    rng = np.random.default_rng(dim)
    shapes = {"qkv.weight": (3 * dim, dim), "proj.weight": (dim, dim), "proj.bias": (dim,)}
    weights, x = drawn(shapes, rng), 3 * rng.normal(size=(2, dim, 3, 4))
    meta = {"hyper": {"head_dim": 32}, "layout": "[B,C,H,W]", "tol": "abs 2e-5, rel 1e-5"}
    arrays = grouped("param", weights) | {"in__x": x, "out__y": mixed(x, weights, "")}
    case = case_of(tmp_path, meta, **arrays)
    poolformer.check(case)
    case.finish()
