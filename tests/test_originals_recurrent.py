"""Options of recurrent originals that no recorded case has, written out in NumPy: spiking attention, Legendre
memories, Mamba-2 and selective scans, as cases for the adapters of `tests/parity`."""

import jax
import numpy as np
import pytest
from flax import nnx
from test_originals import case_of, grouped, softmax

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


@pytest.mark.parametrize("causal", [False, pytest.param(True, marks=pytest.mark.slow)])
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


# --- variants of Mamba-2


@pytest.mark.slow
@pytest.mark.parametrize(
    "norm, groups, norm_groups, per_channel, ssm",
    [
        ("norm_first", 1, 2, True, 12),
        (None, 1, None, True, 16),
        ("gate_first", 2, 1, False, 16),
        ("gate_first", 1, 1, False, 8),
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


# --- scans whose maps are constant, or those of groups of channels


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [("constant", "time"), ("groups", "groups"), ("constant", "groups")])
def test_scans_with_maps_of_every_kind(kinds, tmp_path):
    from parity import mamba

    rng, channels, n, time, groups = np.random.default_rng(0), 6, 3, 15, 2
    shapes = {"constant": (channels, n), "time": (2, n, time), "groups": (2, groups, n, time)}
    f = {"u": rng.normal(size=(2, channels, time)), "delta": rng.normal(size=(2, channels, time))}
    f |= {"A": -np.exp(rng.normal(size=(channels, n))), "D": rng.normal(size=channels)}
    f |= {name: rng.normal(size=shapes[kind]) for name, kind in zip("BC", kinds, strict=True)}

    def at(name, t):
        """The map of step t, [b, e, n]."""
        x = f[name]
        if x.ndim == 2:
            return np.broadcast_to(x, (2, channels, n))
        x = x[..., t] if x.ndim == 4 else x[:, None, :, t]
        return x.repeat(channels // x.shape[1], 1)

    h, outputs, states = np.zeros((2, channels, n)), [], []
    for t in range(time):
        step = np.logaddexp(f["delta"][:, :, t], 0)[..., None]
        h = np.exp(step * f["A"]) * h + step * f["u"][:, :, t, None] * at("B", t)
        outputs.append(np.sum(h * at("C", t), -1) + f["D"] * f["u"][:, :, t])
        states.append(h)
    expected = {"y": np.stack(outputs, 2), "last_state": h, "state_after_cut": states[8]}
    meta = {"delta_softplus": True, "cut": 9, "tolerance": "rtol 1e-5, atol 2e-5"}
    case = case_of(tmp_path, meta, **grouped("in", f), **grouped("out", expected))
    mamba.check(case)
    case.finish()


# --- feature maps of linear attention


def features(kind, x, weights, prefix):
    w = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    if kind in ("t2r", "relu"):
        return np.maximum(x @ w["layer.weight"].T if kind == "t2r" else x, 0)
    if kind == "hedgehog":
        y = x @ w["layer.weight"].T + w["layer.bias"]
        return softmax(np.concatenate([2 * y, -2 * y], -1))
    if kind == "dpfp":
        r = np.concatenate([np.maximum(x, 0), -np.maximum(x, 0)], -1)
        return np.concatenate([r * np.roll(r, j, -1) for j in range(1, 5)], -1)
    return x


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, options",
    [
        ("t2r", {"tie_feature_map_qk": True, "norm_k": True}),
        ("hedgehog", {"do_feature_map_norm": True, "num_kv_heads": 1}),
        ("dpfp", {"expand_v": 2.0}),
        ("relu", {"norm_q": True, "norm_k": True, "do_feature_map_norm": True}),
        ("identity", {"output_norm": "identity"}),
    ],
)
def test_linear_attention_with_every_feature_map(kind, options, tmp_path):
    from parity import linear_attention

    rng, dim, heads, time = np.random.default_rng(len(kind)), 16, 2, 11
    kv, values = options.get("num_kv_heads", heads), int(dim // heads * options.get("expand_v", 1))
    width = dim // heads
    sizes = {"q_proj.weight": (heads * width, dim), "k_proj.weight": (kv * width, dim)}
    sizes |= {"v_proj.weight": (kv * values, dim), "o_proj.weight": (dim, heads * values)}
    sizes |= {} if "output_norm" in options else {"norm.weight": (values,)}
    for letter in "q" if options.get("tie_feature_map_qk") else "qk":
        if kind in ("t2r", "hedgehog"):
            sizes[f"feature_map_{letter}.layer.weight"] = (width, width)
        if kind == "hedgehog":
            sizes[f"feature_map_{letter}.layer.bias"] = (width,)
    w = {name: rng.normal(size=shape) / np.sqrt(shape[-1]) for name, shape in sizes.items()}
    x = rng.normal(size=(2, time, dim))
    q, k, v = ((x @ w[f"{n}_proj.weight"].T).reshape(2, time, heads if n == "q" else kv, -1) for n in "qkv")
    q = features(kind, q, w, "feature_map_q.")
    k = features(kind, k, w, f"feature_map_{'q' if options.get('tie_feature_map_qk') else 'k'}.")
    q = q / (q.sum(-1, keepdims=True) + 1e-4) if options.get("norm_q") else q
    k = k / (k.sum(-1, keepdims=True) + 1e-4) if options.get("norm_k") else k
    k, v = (y.repeat(heads // kv, 2) for y in (k, v))
    scale, state, total, outputs = q.shape[-1] ** -0.5, 0.0, 0.0, []
    for t in range(time):
        state = state + k[:, t, :, :, None] * v[:, t, :, None]
        total = total + k[:, t]
        o = scale * np.einsum("bhk,bhkv->bhv", q[:, t], state)
        if options.get("do_feature_map_norm"):
            o = o / (scale * np.sum(q[:, t] * total, -1, keepdims=True) + 1e-10)
        outputs.append(o)
    o = np.stack(outputs, 1)
    if "norm.weight" in w:
        o = o / np.sqrt(np.mean(o**2, -1, keepdims=True) + 1e-5) * w["norm.weight"]
    expected = {"y": o.reshape(2, time, -1) @ w["o_proj.weight"].T, "final_state": state}
    if options.get("do_feature_map_norm"):
        expected["final_z"] = total[:, None]
    config = {"hidden_size": dim, "num_heads": heads, "feature_map": kind} | options
    meta = {"config": config, "cls": "fla.layers.LinearAttention", "tolerance": "rtol 2e-4, atol 5e-5"}
    case = case_of(tmp_path, meta, **grouped("param", w), **grouped("out", expected), in__x=x)
    linear_attention.check(case)
    case.finish()
