"""Options of the originals that no recorded case has: their equations written out in NumPy, step by step, as
cases for the adapters of `tests/parity`."""

import json

import jax
import numpy as np
import pytest
from flax import nnx
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


# --- LMUFormer's attention between spikes


class Spikes:
    """Layers of a spiking network on [b, channels, time] with weights drawn as they are asked for; `margin`:
    how near a membrane has come to its threshold."""

    def __init__(self, seed):
        self.rng, self.weights, self.margin = np.random.default_rng(seed), {}, np.inf

    def weight(self, name, *shape, scale=1.0, least=None):
        drawn = self.rng.normal(size=shape) if least is None else self.rng.uniform(least, 1, size=shape)
        self.weights[name] = (scale * drawn).astype(np.float32).astype(float)
        return self.weights[name]

    def conv(self, x, name, outputs, width=1, bias=False):
        w = self.weight(f"{name}.weight", outputs, x.shape[1], width, scale=1.5 / np.sqrt(width * x.shape[1]))
        padded = np.pad(x, ((0, 0), (0, 0), (width // 2, width // 2)))
        y = sum(np.einsum("oi,bit->bot", w[..., j], padded[..., j : j + x.shape[2]]) for j in range(width))
        return y + self.weight(f"{name}.bias", outputs, scale=0.3)[:, None] if bias else y

    def norm(self, x, name):
        size, parts = x.shape[1], {}
        for part, scale, least in (
            ("running_mean", 0.3, None),
            ("running_var", 0.5, 0.1),
            ("bias", 0.5, None),
        ):
            parts[part] = self.weight(f"{name}.{part}", size, scale=scale, least=least)[:, None]
        slope = self.weight(f"{name}.weight", size, least=0.5)[:, None]
        y = (x - parts["running_mean"]) / np.sqrt(parts["running_var"] + 1e-5)
        return y * slope + parts["bias"]

    def fire(self, x, threshold=1.0):
        v, spikes = np.zeros(x.shape[:2]), np.zeros(x.shape)
        for t in range(x.shape[2]):
            v = v + (x[..., t] - v) / 2
            self.margin = min(self.margin, np.abs(v - threshold).min())
            spikes[..., t] = v >= threshold
            v = v * (1 - spikes[..., t])
        return spikes

    def spike(self, x, name):
        return self.fire(self.norm(x, name))

    def attention(self, x, prefix, heads, causal=False):
        dim, time = x.shape[1:]
        s = self.spike(x, f"{prefix}pre_bn")
        q, k, v = (
            self.spike(self.conv(s, f"{prefix}{n}_conv", dim), f"{prefix}{n}_bn").reshape(
                len(x), heads, dim // heads, time
            )
            for n in "qkv"
        )
        scores = np.einsum("bhct,bhcs->bhts", q, k) * (np.tri(time) if causal else 1)
        y = 0.25 * np.einsum("bhts,bhcs->bhct", scores, v).reshape(x.shape)
        y = self.conv(self.fire(y, 0.5), f"{prefix}proj_conv", dim, bias=True)
        return self.norm(y, f"{prefix}proj_bn")

    def attention_model(self, x, dim, classes, ratio, heads, depth):
        """All logits of the running mean, and what the embedding and the blocks give."""
        mids = {}
        for i in ("", "1", "2"):
            x = self.spike(self.conv(x, f"patch_embed.proj_conv{i}", dim, 3), f"patch_embed.proj_bn{i}")
        x = self.conv(x, "patch_embed.proj_conv3", dim, 3)
        x = x + self.conv(self.spike(x, "patch_embed.proj_bn3"), "patch_embed.rpe_conv", dim, 3)
        mids["patch_embed"] = x
        for i in range(depth):
            mids[f"block{i}.attn"] = y = self.attention(x, f"block.{i}.attn.", heads)
            x = x + y
            y = self.conv(
                self.spike(x, f"block.{i}.mlp.fc1_bn"), f"block.{i}.mlp.fc1_conv", ratio * dim, 1, True
            )
            y = self.conv(self.spike(y, f"block.{i}.mlp.fc2_bn"), f"block.{i}.mlp.fc2_conv", dim, 1, True)
            mids[f"block{i}.mlp"], x = y, x + y
            mids[f"block{i}"] = x
        s = self.spike(x, "head_bn")
        y = np.einsum("oi,bit->tbo", self.weight("head.weight", classes, dim), s)
        y = y + self.weight("head.bias", classes)
        return np.cumsum(y, axis=0) / np.arange(1, len(y) + 1)[:, None, None], mids


@pytest.mark.slow
@pytest.mark.parametrize("seed, heads, depth, every", [(2, 2, 1, False), (17, 4, 2, True)])
def test_the_attention_model_between_spikes(seed, heads, depth, every, tmp_path):
    from parity import lmuformer

    net, o = Spikes(seed), {"in_channels": 3, "dim": 8, "num_classes": 4, "mlp_ratio": 2}
    x = net.rng.normal(size=(2, 14, 3)).astype(np.float32)
    logits, mids = net.attention_model(x.swapaxes(1, 2).astype(float), 8, 4, 2, heads, depth)
    assert net.margin > 1e-3
    assert np.ptp(logits) > 0.1 and all(np.ptp(y) > 0.1 for y in mids.values())
    o |= {"num_heads": heads, "depth": depth, "theta": 14, "test_mode": "all_seq" if every else "normal"}
    arrays = grouped("param", net.weights) | grouped("mid", mids) | {"in__x": x}
    case = case_of(
        tmp_path, {"hyper": o, "tol": "abs 2e-5"}, **arrays, out__logits=logits if every else logits[-1]
    )
    lmuformer.check(case)
    case.finish()
    assert set(mids) <= case.compared


@pytest.mark.parametrize("causal", [False, True])
def test_attention_between_spikes_of_packed_sequences(causal):
    """Each sequence of a row alone, with padding between: over all of itself, or up to each step."""
    from seqlab.interop.convert import convert
    from seqlab.models import SpikingAttention

    net = Spikes(3)
    x = net.rng.normal(size=(1, 23, 8)).astype(np.float32)
    cuts = [slice(0, 9), slice(11, 14), slice(14, 23)]
    valid, reset = np.zeros((1, 23), bool), np.zeros((1, 23), bool)
    for cut in cuts:
        valid[0, cut], reset[0, cut.start] = True, True
    expected, state = [], net.rng.bit_generator.state
    for cut in cuts:
        net.rng.bit_generator.state = state  # the same weights
        y = net.attention(x[:, cut].swapaxes(1, 2).astype(float), "", 4, causal)
        expected.append(y.swapaxes(1, 2))
    assert net.margin > 1e-4
    mixer = convert(SpikingAttention(8, heads=4, causal=causal, rngs=nnx.Rngs(0)), net.weights)
    packed = jax.jit(lambda x, reset, valid: mixer(x, None, reset, valid)[0])
    y = packed(np.where(valid[..., None], x, np.nan), reset, valid)
    for cut, own in zip(cuts, expected, strict=True):
        np.testing.assert_allclose(y[:, cut], own, atol=2e-5)
    alone = jax.jit(lambda x: mixer(x)[0])(x[:, cuts[2]])
    np.testing.assert_allclose(alone, expected[2], atol=2e-5)
    if not causal:
        with pytest.raises(ValueError, match="state must be None: with causal=False every step sees"):
            mixer(x, mixer.init_state(1))


# --- Legendre memories


def matrices(order, theta, discretizer):
    """Ā [d, d] and B̄ [d] from the continuous system."""
    from scipy.signal import cont2discrete

    A, B = np.zeros((order, order)), np.zeros((order, 1))
    for i in range(order):
        B[i] = (2 * i + 1) * (-1.0) ** i / theta
        for j in range(order):
            A[i, j] = (2 * i + 1) / theta * (-1.0 if i < j else (-1.0) ** (i - j + 1))
    if discretizer == "euler":
        return np.eye(order) + A, B[:, 0]
    A, B, *_ = cont2discrete((A, B, np.eye(order), np.zeros((order, 1))), 1.0, "zoh")
    return A, B[:, 0]


def keras_lmu(x, weights, A, B, o, activation, h, m):
    """Step by step: outputs [b, t, n] and memories [b, t, q, d]."""
    outputs, memories = [], []
    for t in range(x.shape[1]):
        read = [x[:, t], h] if o["hidden_to_memory"] else [x[:, t]]
        u = np.concatenate(read, -1) @ weights["kernel"] + weights.get("bias", 0)
        if o["memory_to_memory"]:
            u = u + m.reshape(len(m), -1) @ weights["recurrent_kernel"]
        m = m @ A.T + u[:, :, None] * B
        z = m.reshape(len(m), -1)
        z = np.concatenate([z, x[:, t]], -1) if o["input_to_hidden"] else z
        if "hidden_cell.kernel" in weights:
            y = z @ weights["hidden_cell.kernel"] + weights.get("hidden_cell.bias", 0)
            if "hidden_cell.recurrent_kernel" in weights:
                y = y + h @ weights["hidden_cell.recurrent_kernel"]
            z = activation(y)
        h = z
        outputs.append(h)
        memories.append(m)
    return np.stack(outputs, 1), np.stack(memories, 1)


ACTIVATIONS = {"tanh": np.tanh, "relu": lambda y: np.maximum(y, 0), "linear": lambda y: y}
SWITCHES = ("hidden_to_memory", "memory_to_memory", "input_to_hidden", "use_bias")


@pytest.mark.parametrize("precision", ["float32", pytest.param("float64", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "on, cell, discretizer, learnt, channels",
    [
        ((0, 1, 0, 0), "dense", "euler", False, 1),
        *(
            pytest.param(*options, marks=pytest.mark.slow)
            for options in (
                ((1, 1, 1, 1), "rnn", "zoh", True, 2),
                ((0, 1, 0, 1), "dense", "euler", False, 1),
                ((1, 0, 1, 0), "dense", "zoh", False, 2),
                ((1, 1, 0, 1), "none", "zoh", False, 3),
                ((0, 1, 1, 0), "none", "euler", True, 1),
                ((0, 0, 0, 0), "none", "zoh", False, 1),
                ((0, 0, 0, 0), "rnn", "euler", False, 2),
                ((0, 0, 1, 1), "rnn", "zoh", True, 1),
                ((1, 1, 0, 0), "rnn", "euler", True, 3),
                ((0, 1, 0, 0), "dense", "zoh", True, 1),
                ((1, 0, 0, 1), "rnn", "zoh", False, 1),
                ((1, 1, 1, 1), "dense", "euler", False, 2),
            )
        ),
    ],
)
def test_every_switch_of_the_cell_of_keras_lmu(on, cell, discretizer, learnt, channels, precision, tmp_path):
    from parity import lmuformer

    rng, order, inputs, batch = np.random.default_rng(sum(on)), 5, 3, 2
    o = dict(zip(SWITCHES, map(bool, on), strict=True)) | {"input_size": inputs, "memory_d": channels}
    theta = 40.0 if discretizer == "euler" else 8.5
    o |= {"order": order, "theta": theta, "discretizer": discretizer, "trainable_theta": learnt}
    memory = channels * order
    read = memory + inputs * o["input_to_hidden"]
    n = read if cell == "none" else 4
    sizes = {"kernel": (inputs + n * o["hidden_to_memory"], channels)}
    sizes |= {"bias": (channels,)} if o["use_bias"] else {}
    sizes |= {"recurrent_kernel": (memory, channels)} if o["memory_to_memory"] else {}
    sizes |= {} if cell == "none" else {"hidden_cell.kernel": (read, n)}
    sizes |= {"hidden_cell.bias": (n,)} if cell != "none" and o["use_bias"] else {}
    sizes |= {"hidden_cell.recurrent_kernel": (n, n)} if cell == "rnn" else {}
    weights = {name: 0.3 * rng.normal(size=shape) for name, shape in sizes.items()}
    activation = "tanh" if cell == "rnn" else "relu" if o["use_bias"] else "linear"
    if cell == "dense" and activation != "linear":
        o["hidden_cell"] = f"Dense(activation={activation})"
    learned = {"theta_inv": np.asarray(1.3 / theta)} if learnt else {}
    A, B = matrices(order, theta / 1.3 if learnt else theta, discretizer)
    x = rng.normal(size=(batch, 17, inputs))
    start = {"h0": rng.normal(size=(batch, n)), "m0": rng.normal(size=(batch, channels, order))}
    arguments = x, weights, A, B, o, ACTIVATIONS[activation]
    h, m = keras_lmu(*arguments, np.zeros((batch, n)), np.zeros((batch, channels, order)))
    h_from, m_from = keras_lmu(*arguments, *start.values())
    expected = {"h": h, "m": m, "h_from_state": h_from, "m_n_from_state": m_from[:, -1]}
    constants = {} if learnt else {"A": A, "B": B[:, None]}
    arrays = grouped("param", weights | learned | constants) | grouped("out", expected) | grouped("in", start)
    meta = {"hyper": o, "tol": "float64 1e-9, float32 1e-4"}
    with jax.enable_x64(precision == "float64"):
        case = case_of(tmp_path, meta, precision, in__x=x, **arrays)
        lmuformer.check(case)
    case.finish()


@pytest.mark.slow
@pytest.mark.parametrize(
    "discretizer, channels, learnt", [("euler", 2, True), ("zoh", 3, False), ("zoh", 3, True)]
)
def test_the_parallel_memory_with_its_options(discretizer, channels, learnt, tmp_path):
    from parity import lmuformer

    rng, order, theta = np.random.default_rng(1), 4, 30.0
    weights = {"W_u.weight": (channels, 3), "W_u.bias": (channels,)}
    weights |= {"W_h.weight": (5, channels * order + 3), "W_h.bias": (5,)}
    weights = {name: 0.5 * rng.normal(size=shape) for name, shape in weights.items()}
    x, m0 = rng.normal(size=(2, 19, 3)), rng.normal(size=(2, channels * order))
    A, B = matrices(order, theta / 1.2 if learnt else theta, discretizer)
    u, expected = np.maximum(x @ weights["W_u.weight"].T + weights["W_u.bias"], 0), {"u": None}
    for suffix, m in (("", np.zeros((2, channels, order))), ("_from_m0", m0.reshape(2, channels, order))):
        memories = []
        for t in range(19):
            m = m @ A.T + u[:, t, :, None] * B
            memories.append(m.reshape(2, -1))
        z = np.concatenate([np.stack(memories, 1), x], -1)
        h = np.maximum(z @ weights["W_h.weight"].T + weights["W_h.bias"], 0)
        expected |= {f"h{suffix}": h, f"m_n{suffix}": memories[-1]}
    expected["u"] = u
    learned = {"theta_inv": np.asarray(1.2 / theta)} if learnt else {}
    o = {"input_size": 3, "hidden_size": 5, "memory_size": order, "theta": theta, "discretizer": discretizer}
    arrays = grouped("param", weights | learned) | grouped("out", expected) | {"in__x": x, "in__m0": m0}
    case = case_of(tmp_path, {"hyper": o, "tol": "float64 1e-9, float32 1e-4"}, **arrays)
    lmuformer.check(case)
    case.finish()
    if learnt:
        from seqlab.models import LMU

        module = LMU(3, order=order, theta=theta, trainable_theta=True, rngs=nnx.Rngs(0))
        slope = nnx.grad(lambda module: jax.numpy.sum(module(x.astype(np.float32))[0]))(module)["theta_inv"]
        assert np.isfinite(slope[...]) and slope[...] != 0


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


# --- variants of Mamba-2


@pytest.mark.parametrize(
    "norm, groups, norm_groups, per_channel, ssm",
    [
        ("norm_first", 1, 2, True, 12),
        *(
            pytest.param(*options, marks=pytest.mark.slow)
            for options in (
                (None, 1, None, True, 16),
                ("gate_first", 2, 1, False, 16),
                ("gate_first", 1, 1, False, 8),
            )
        ),
    ],
)
def test_variants_of_mamba2(norm, groups, norm_groups, per_channel, ssm, tmp_path):
    """Norms in every place, a skip per channel, and channels that pass by as a gated MLP."""
    from parity import mamba2

    rng, dim, outer, width, n, taps, time = np.random.default_rng(ssm), 8, 16, 4, 3, 4, 13
    heads, beside = ssm // width, outer - ssm
    mixed = ssm + 2 * groups * n
    sizes = {"in_proj.weight": (2 * beside + ssm + mixed + heads, dim), "conv1d.weight": (mixed, 1, taps)}
    sizes |= {
        "conv1d.bias": (mixed,),
        "dt_bias": (heads,),
        "A_log": (heads,),
        "out_proj.weight": (dim, outer),
    }
    sizes |= {"D": (ssm if per_channel else heads,)} | ({} if norm is None else {"norm.weight": (ssm,)})
    w = {name: 0.5 * rng.normal(size=shape) for name, shape in sizes.items()}
    x = rng.normal(size=(2, time, dim))

    def silu(y):
        return y / (1 + np.exp(-y))

    parts = np.cumsum([beside, beside, ssm, mixed])
    z_beside, passed, z, xbc, dt = np.split(x @ w["in_proj.weight"].T, parts, axis=-1)
    padded = np.pad(xbc, ((0, 0), (taps - 1, 0), (0, 0)))
    xbc = silu(
        sum(padded[:, j : j + time] * w["conv1d.weight"][:, 0, j] for j in range(taps)) + w["conv1d.bias"]
    )
    values, b, c = np.split(xbc, [ssm, ssm + groups * n], axis=-1)
    values = values.reshape(2, time, heads, width)
    b, c = (y.reshape(2, time, groups, n).repeat(heads // groups, 2) for y in (b, c))
    delta, state, outputs = np.logaddexp(dt + w["dt_bias"], 0), np.zeros((2, heads, width, n)), []
    for t in range(time):
        fade = np.exp(-np.exp(w["A_log"]) * delta[:, t])[..., None, None]
        state = fade * state + (delta[:, t, :, None] * values[:, t])[..., None] * b[:, t, :, None]
        outputs.append(np.einsum("bhpn,bhn->bhp", state, c[:, t]))
    y = np.stack(outputs, 1) + w["D"].reshape(heads, -1) * values
    y = y.reshape(2, time, ssm)
    if norm != "norm_first":
        y = y * silu(z)
    if norm is not None:
        y = y.reshape(2, time, norm_groups, -1)
        y = (y / np.sqrt(np.mean(y**2, -1, keepdims=True) + 1e-5)).reshape(2, time, ssm) * w["norm.weight"]
    if norm == "norm_first":
        y = y * silu(z)
    y = np.concatenate([silu(z_beside) * passed, y], -1) @ w["out_proj.weight"].T
    o = {"hidden_size": dim, "expand": 2, "head_dim": width, "state_size": n, "n_groups": groups}
    o |= {"conv_kernel": taps, "use_conv_bias": True, "use_bias": False, "layer_norm_epsilon": 1e-5}
    o |= {"norm_before_gate": norm == "norm_first", "norm_groups": norm_groups}
    meta = {"config": o, "tolerance": "rtol 1e-4, atol 3e-5", "segments": [5, 1, 7]}
    arrays = grouped("param", w) | grouped("out", {"y": y, "y_stream": y}) | {"in__x": x}
    case = case_of(tmp_path, meta, **arrays)
    mamba2.check(case)
    case.finish()
