"""Options of the originals that no recorded case has: their equations written out in NumPy, step by step, as
cases for the adapters of `tests/parity`."""

import json

import numpy as np
import pytest
from parity import Case


def case_of(folder, meta, precision="float32", **arrays):
    """A golden case in `folder`; of the arrays' names the group is what stands before two underscores."""
    named = {name.replace("__", ".", 1): value for name, value in arrays.items()}
    path = folder / "case.npz"
    np.savez(path, meta=json.dumps(meta), **named)
    return Case(path, precision)


def grouped(prefix, values):
    return {f"{prefix}__{name}": value for name, value in values.items()}


def softmax(x):
    p = np.exp(x - x.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def turned(x, positions, base=1e4):
    """x [..., t, d] by the angles of its positions [t], the halves of a head in pairs."""
    half = x.shape[-1] // 2
    angles = np.asarray(positions)[:, None] * base ** (-np.arange(half) / half)
    cos, sin = np.cos(angles), np.sin(angles)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def in_heads(x, heads):
    return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)


# --- KIVI


def coded(x, group, bits):
    """Codes of the last axis, and scale and least value of its groups."""
    parts = x.reshape(*x.shape[:-1], -1, group)
    least = parts.min(-1, keepdims=True)
    scale = (parts.max(-1, keepdims=True) - least) / (2**bits - 1)
    codes = np.rint((parts - least) / scale)
    return codes.reshape(x.shape).astype(np.uint32), scale[..., 0], least[..., 0]


def decoded(codes, scale, least):
    if not codes.size:
        return codes.astype(float)
    group = codes.shape[-1] // scale.shape[-1]
    return codes * scale.repeat(group, -1) + least.repeat(group, -1)


def packed(codes, bits):
    words = codes.reshape(*codes.shape[:-1], -1, 32 // bits) << np.arange(0, 32, bits, dtype=np.uint32)
    return words.sum(-1, dtype=np.uint32).view(np.int32)


def kivi_case(folder, *, k_bits, v_bits, group, residual, prefill, steps, heads=4, kv_heads=2, width=16):
    rng, hidden, time = np.random.default_rng(k_bits + 10 * v_bits), 24, prefill + steps
    sizes = {"q": heads * width, "k": kv_heads * width, "v": kv_heads * width}
    weights = {f"{name}_proj.weight": rng.normal(size=(size, hidden)) / 5 for name, size in sizes.items()}
    weights["o_proj.weight"] = rng.normal(size=(hidden, heads * width)) / 8
    weights = {name: value.astype(np.float32).astype(float) for name, value in weights.items()}
    x = rng.normal(size=(2, time, hidden)).astype(np.float32).astype(float)
    q, k, v = (
        in_heads(x @ weights[f"{name}_proj.weight"].T, heads if name == "q" else kv_heads) for name in "qkv"
    )
    q, k = turned(q, np.arange(time)), turned(k, np.arange(time))
    coarse_v = decoded(*coded(v, group, v_bits))
    outputs = []
    for t in range(time):
        keys, values = k[:, :, : t + 1].copy(), v[:, :, : t + 1].copy()
        if t >= prefill:
            old_k, old_v = t // residual * residual, max(0, t - residual)
            over_time = keys[:, :, :old_k].swapaxes(2, 3)
            keys[:, :, :old_k] = decoded(*coded(over_time, group, k_bits)).swapaxes(2, 3)
            values[:, :, :old_v] = coarse_v[:, :, :old_v]
        keys, values = (y.repeat(heads // kv_heads, 1) for y in (keys, values))
        p = softmax(np.einsum("bhd,bhsd->bhs", q[:, :, t], keys) / np.sqrt(width))
        y = np.einsum("bhs,bhsd->bhd", p, values)
        outputs.append(y.reshape(2, -1) @ weights["o_proj.weight"].T)
    ends = range(prefill, time + 1)
    old_k, old_v = time // residual * residual, max(0, time - residual)
    k_code, k_scale, k_min = coded(k[:, :, :old_k].swapaxes(2, 3), group, k_bits)
    v_code, v_scale, v_min = coded(v[:, :, :old_v], group, v_bits)
    expected = {
        "attn_out": np.stack(outputs, 1),
        "lens_kq_kres_vq_vres_total": [
            [n // residual * residual, n % residual, max(0, n - residual), min(n, residual), n] for n in ends
        ],
        "final_k_code": packed(k_code, k_bits),
        "final_k_scale": k_scale,
        "final_k_min": k_min,
        "final_k_residual": k[:, :, old_k:],
        "final_v_code": packed(v_code, v_bits),
        "final_v_scale": v_scale,
        "final_v_min": v_min,
        "final_v_residual": v[:, :, old_v:],
    }
    meta = {
        "hidden": hidden,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": width,
        "tolerance": "atol 2e-5",
    }
    meta |= {"k_bits": k_bits, "v_bits": v_bits, "group_size": group, "residual_length": residual}
    meta |= {"prefill": prefill, "decode_steps": steps, "rope_theta": 1e4}
    arrays = grouped("param", weights) | grouped("out", expected) | {"in__x": x}
    return case_of(folder, meta, **arrays)


@pytest.mark.parametrize(
    "options",
    [
        {"k_bits": 2, "v_bits": 4, "group": 8, "residual": 16, "prefill": 19, "steps": 16},
        *(
            pytest.param(options, marks=pytest.mark.slow)
            for options in (
                {"k_bits": 4, "v_bits": 2, "group": 16, "residual": 16, "prefill": 9, "steps": 26},
                {"k_bits": 8, "v_bits": 2, "group": 4, "residual": 32, "prefill": 32, "steps": 34},
                {"k_bits": 2, "v_bits": 8, "group": 8, "residual": 32, "prefill": 70, "steps": 3},
                {"k_bits": 4, "v_bits": 4, "group": 8, "residual": 8, "prefill": 1, "steps": 20, "heads": 2},
            )
        ),
    ],
    ids=lambda o: f"k{o['k_bits']}v{o['v_bits']}",
)
def test_kivi_codes_keys_and_values_in_bits_of_their_own(options, tmp_path):
    from parity import kivi

    case = kivi_case(tmp_path, **options)
    kivi.check(case)
    case.finish()
