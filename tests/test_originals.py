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


# --- StreamingLLM, turn by turn


def turns_case(folder, *, chunks, gen, start_size, recent_size):
    """A Llama of one layer, whose cache is cut before each turn by what will come and grows until the
    next."""
    rng, hidden, heads, kv_heads, vocab = np.random.default_rng(recent_size), 16, 4, 2, 19
    sizes = {"q_proj": hidden, "k_proj": hidden * kv_heads // heads, "v_proj": hidden * kv_heads // heads}
    attention = {f"self_attn.{name}.weight": (size, hidden) for name, size in sizes.items()}
    layer = attention | {"self_attn.o_proj.weight": (hidden, hidden), "mlp.gate_proj.weight": (24, hidden)}
    layer |= {"mlp.up_proj.weight": (24, hidden), "mlp.down_proj.weight": (hidden, 24)}
    layer |= {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
    shapes = {"model.embed_tokens.weight": (vocab, hidden), "lm_head.weight": (vocab, hidden)}
    shapes |= {"model.norm.weight": (hidden,)} | {f"model.layers.0.{name}": x for name, x in layer.items()}
    w = {name: rng.normal(size=shape) / np.sqrt(shape[-1]) for name, shape in shapes.items()}
    w = {name: value.astype(np.float32).astype(float) for name, value in w.items()}
    tokens = rng.integers(0, vocab, size=(2, sum(chunks) + gen * len(chunks)))

    def norm(x, name):
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6) * w[f"model.{name}.weight"]

    def linear(x, name):
        return x @ w[f"model.layers.0.{name}.weight"].T

    k, v = (np.zeros((2, kv_heads, 0, hidden // heads)) for _ in "kv")
    index, begin = [], 0
    logits, places, lengths, kept = [], [], [], []
    for chunk in chunks:
        count, coming = len(index), chunk + gen
        if count + coming > start_size + recent_size:
            stay = [*range(min(start_size, count)), *range(count - recent_size + coming, count)]
            k, v, index = k[:, :, stay], v[:, :, stay], [index[i] for i in stay]
        kept.append(list(index))
        for size in (chunk, *[1] * gen):
            x = w["model.embed_tokens.weight"][tokens[:, begin : begin + size]]
            y = norm(x, "layers.0.input_layernorm")
            q = in_heads(linear(y, "self_attn.q_proj"), heads)
            k, v = (
                np.concatenate([old, in_heads(linear(y, f"self_attn.{n}_proj"), kv_heads)], 2)
                for n, old in (("k", k), ("v", v))
            )
            index = [*index, *range(begin, begin + size)]
            at = np.arange(len(index) - size, len(index))
            keys, values = (z.repeat(heads // kv_heads, 1) for z in (turned(k, np.arange(len(index))), v))
            scores = np.einsum("bhtd,bhsd->bhts", turned(q, at), keys) / np.sqrt(hidden // heads)
            scores = np.where(at[:, None] >= np.arange(len(index)), scores, -np.inf)
            y = np.einsum("bhts,bhsd->bthd", softmax(scores), values).reshape(2, size, hidden)
            x = x + linear(y, "self_attn.o_proj")
            y = norm(x, "layers.0.post_attention_layernorm")
            gate = linear(y, "mlp.gate_proj")
            x = x + linear(gate / (1 + np.exp(-gate)) * linear(y, "mlp.up_proj"), "mlp.down_proj")
            logits.append(norm(x, "norm") @ w["lm_head.weight"].T)
            places, begin = [*places, *at], begin + size
            lengths.append(len(index))
    widest = max(map(len, kept))
    expected = {"logits": np.concatenate(logits, 1), "q_positions": places, "final_cache_k_layer0": k}
    expected |= {"cache_len_after_each_call": lengths, "final_cache_token_index": index}
    expected["kept_token_index_per_turn"] = np.asarray([[*row, *[-1] * (widest - len(row))] for row in kept])
    expected["final_cache_v_layer0"] = v
    meta = {"chunks": chunks, "gen": gen, "start_size": start_size, "recent_size": recent_size, "layers": 1}
    meta |= {"vocab": vocab, "hidden": hidden, "heads": heads, "kv_heads": kv_heads, "intermediate": 24}
    meta |= {"eps": 1e-6, "rope_theta": 1e4, "tolerance": "rtol 1e-4, atol 2e-5"}
    arrays = grouped("param", w) | grouped("out", expected) | {"in__input_ids": tokens}
    return case_of(folder, meta, **arrays)


@pytest.mark.slow
@pytest.mark.parametrize(
    "chunks, gen, start_size, recent_size",
    [
        ([3, 9, 2, 1], 2, 2, 6),  # the second turn is longer than the window, which leaves the sinks alone
        ([1, 1, 5, 5], 3, 4, 7),  # a turn that begins with fewer tokens than sinks
        ([12, 4, 3], 1, 0, 5),  # no sinks; the first turn already exceeds the window
        ([2, 4, 4, 1], 0, 3, 4),  # turns of exactly the window, and of no generation
        ([6, 2, 2, 2, 2], 1, 1, 9),
    ],
)
def test_streamingllm_makes_room_before_each_turn(chunks, gen, start_size, recent_size, tmp_path):
    from parity import streamingllm

    options = {"chunks": chunks, "gen": gen, "start_size": start_size, "recent_size": recent_size}
    case = turns_case(tmp_path, **options)
    streamingllm.check(case)
    case.finish()
