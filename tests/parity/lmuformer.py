"""The Legendre memory and what is made of it: matrices, both LMUs, the cell with several memories, LIF
neurons, LMUFormer with and without spikes, and with spiking attention."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from seqlab import kernels
from seqlab.interop.convert import convert
from seqlab.kernels.lmu import legendre
from seqlab.kernels.lmu.xla import impulse_response
from seqlab.models import LMU, LMUFormer, RecurrentLMU, SpikingAttention
from seqlab.models.legendre.spiking import lif


def check(case):
    if "specs" in case.meta:
        return _check_matrices(case)
    if "v_threshold" in case.options:
        return _check_lif(case)
    _check_constants(case)
    if "head.weight" in case.params:
        return _check_lmuformer(case)
    if "q_conv.weight" in case.params:
        return _check_attention(case)
    if "W_u.weight" in case.params:
        return _check_parallel(case)
    return _check_multi_channel(case) if "kernel" in case.params else _check_cell(case)


def _check_matrices(case):
    for spec in case.meta["specs"]:
        for name in ("zoh", "euler"):
            A, B = legendre(spec["order"], spec["theta"], name)
            suffix = f"{name}_{spec['index']}"
            case.check_all(
                {
                    f"A_{suffix}": A,
                    f"B_{suffix}": B[:, None],
                    f"H_{suffix}": impulse_response(A, B, spec["impulse_len"]).T,
                }
            )


def _check_constants(case):
    """The originals carry Ā, B̄ and the impulse response among their weights: ours are the same numbers."""
    if _learns_theta(case):  # then they are those of theta = 1, or of where training began
        return
    for name, value in case.params.items():
        if name.rpartition(".")[2] not in ("A", "B", "H"):
            continue
        order, steps = value.shape
        A, B = legendre(order, case.options["theta"], case.options.get("discretizer", "zoh"))
        expected = {"A": A, "B": B[:, None], "H": impulse_response(A, B, steps).T}[name.rpartition(".")[2]]
        np.testing.assert_allclose(
            value, expected, atol=1e-12 if value.dtype == np.float64 else 1e-5, err_msg=name
        )


def _learns_theta(case):
    return bool(case.options.get("trainable_theta")) or "theta_inv" in case.params


def _theta_inv(case):
    """The parameter of a window that is learnt."""
    if not _learns_theta(case):
        return {}
    return {"theta_inv": case.params.get("theta_inv", np.asarray(1 / case.options["theta"]))}


def _without_constants(case):
    return {
        name: value for name, value in case.params.items() if name.rpartition(".")[2] not in ("A", "B", "H")
    }


def _wide(module, case):
    """The module's parameters in the precision of this run."""
    return jax.tree.map(lambda leaf: leaf.astype(case.precision), module)


def _check_parallel(case):
    o = case.options
    channels = len(case.params["W_u.weight"])
    module = LMU(
        o["input_size"],
        hidden=o["hidden_size"],
        order=o["memory_size"],
        channels=channels,
        theta=o["theta"],
        discretizer=o.get("discretizer", "zoh"),
        trainable_theta=_learns_theta(case),
        rngs=nnx.Rngs(0),
    )
    module = convert(_wide(module, case), _without_constants(case) | _theta_inv(case))
    x = case.array("x")
    run = jax.jit(lambda x, state: module(x, state))
    u = jax.nn.relu(module.W_u(x))
    h, m = run(x, module.init_state(len(x), x.dtype))
    flat = m.reshape(len(x), -1)  # channel after channel
    case.check_all({"u": u, "m": module.memory(u)[0], "h": h, "h_n": h[:, -1], "m_n": flat})
    case.check("h", run(x, None)[0])
    if "m0" in case.inputs:
        h, m = run(x, case.array("m0").reshape(m.shape))
        case.check_all({"h_from_m0": h, "m_n_from_m0": m.reshape(len(x), -1), "h_n_from_m0": h[:, -1]})


def _check_cell(case):
    o = case.options
    module = RecurrentLMU(
        o["input_size"],
        hidden=o["hidden_size"],
        order=o["memory_size"],
        theta=o["theta"],
        discretizer=o.get("discretizer", "zoh"),
        rngs=nnx.Rngs(0),
    )
    module = convert(_wide(module, case), _without_constants(case), prefix="cell.")
    x = case.array("x")
    h, state = module(x, module.init_state(len(x), x.dtype))
    case.check_all({"h": h, "h_n": state.hidden, "m_n": state.memory[:, 0]})
    case.check("h", module(x)[0])
    if "h0" in case.inputs:
        start = module.init_state(len(x), x.dtype)._replace(
            hidden=case.array("h0"), memory=case.array("m0")[:, None]
        )
        h, state = module(x, start)
        case.check_all(
            {"h_from_state": h, "h_n_from_state": state.hidden, "m_n_from_state": state.memory[:, 0]}
        )


def _check_multi_channel(case):
    o, theirs = case.options, case.params
    dim, memory = o["input_size"], o["memory_d"] * o["order"]
    to_hidden = theirs.get("hidden_cell.kernel")
    cell = "rnn" if "hidden_cell.recurrent_kernel" in theirs else "none" if to_hidden is None else "dense"
    switches = {
        name: o.get(name, False) for name in ("hidden_to_memory", "memory_to_memory", "input_to_hidden")
    }
    module = RecurrentLMU(
        dim,
        hidden=None if cell == "none" else to_hidden.shape[1],
        channels=o["memory_d"],
        order=o["order"],
        theta=o["theta"],
        **switches,
        use_bias="bias" in theirs,
        hidden_bias="hidden_cell.bias" in theirs,
        cell=cell,
        activation=_activation(case, cell),
        discretizer=o.get("discretizer", "zoh"),
        trainable_theta=_learns_theta(case),
        rngs=nnx.Rngs(0),
    )
    ours = {"e_x": theirs["kernel"][:dim].T, "e_b": theirs.get("bias"), "W_b": theirs.get("hidden_cell.bias")}
    ours |= _theta_inv(case)
    kernels = {"e_m": theirs.get("recurrent_kernel"), "W_h": theirs.get("hidden_cell.recurrent_kernel")}
    if switches["hidden_to_memory"]:
        kernels["e_h"] = theirs["kernel"][dim:]
    if to_hidden is not None:
        kernels |= {
            "W_m": to_hidden[:memory],
            "W_x": to_hidden[memory:] if switches["input_to_hidden"] else None,
        }
    ours |= {name: value.T for name, value in kernels.items() if value is not None}
    module = convert(_wide(module, case), {name: value for name, value in ours.items() if value is not None})
    x = case.array("x")
    start = module.init_state(len(x), x.dtype)
    run = jax.jit(lambda x, state: module(x, state))
    h, state = run(x, start)
    case.check_all({"h": h, "h_n": h[:, -1], "m_n": state.memory})
    memories, now = [], start
    for t in range(x.shape[1]):
        _, now = run(x[:, t : t + 1], now)
        memories.append(now.memory)
    case.check_all({"m": np.stack(memories, axis=1)})
    np.testing.assert_allclose(state.memory, memories[-1], rtol=1e-5, atol=1e-6)
    if "m0" in case.inputs:
        given = {"memory": case.array("m0").reshape(start.memory.shape)}
        given |= {"hidden": case.array("h0")} if module.feeds_back and "h0" in case.inputs else {}
        h, state = run(x, start._replace(**given))
        case.check_all({"h_from_state": h, "h_n_from_state": h[:, -1], "m_n_from_state": state.memory})


def _activation(case, cell):
    """Of the hidden part: as `meta` says, or as Keras has it."""
    named = case.options.get("activation", case.options.get("hidden_activation"))
    text = f"{case.options.get('hidden_cell', '')} {case.meta.get('class', '')}"
    written = re.search(r"(?:SimpleRNN|Dense)\w*\((?:[^()]*activation=)?['\"]?([a-z]+)", text)
    name = named or (written.group(1) if written else "tanh" if cell == "rnn" else "linear")
    return "identity" if name == "linear" else name


def _check_lif(case):
    o = case.options
    alpha = float(o["surrogate"].split("alpha")[1]) if "alpha" in o.get("surrogate", "") else 4.0
    names = {
        "tau": "tau",
        "threshold": "v_threshold",
        "rest": "v_reset",
        "decay_input": "decay_input",
        "detach_reset": "detach_reset",
    }
    options = {ours: o[theirs] for ours, theirs in names.items() if theirs in o} | {"alpha": alpha}
    x, weight = (
        jnp.moveaxis(case.array(name), 0, 1) for name in ("x", "loss_weight")
    )  # time leads in the original
    (spikes, membranes), pull = jax.vjp(lambda x: lif(x, **options), x)
    case.check("spikes", jnp.moveaxis(spikes, 1, 0), exact=True)
    case.check("v_after", jnp.moveaxis(membranes, 1, 0))
    case.check("grad_x", jnp.moveaxis(pull((weight, jnp.zeros_like(membranes)))[0], 1, 0))


def _check_attention(case):
    """The attention block alone, whose original has channels before time."""
    dim, x = len(case.params["q_conv.weight"]), case.array("x")
    mixer = convert(SpikingAttention(dim, heads=case.options["num_heads"], rngs=nnx.Rngs(0)), case.params)
    channels_first = "[batch, channel" in str(case.meta.get("axes", "")) or x.shape[2] != dim
    y = jax.jit(lambda x: mixer(x)[0])(x.swapaxes(1, 2) if channels_first else x)
    [name] = case.outs
    case.check(name, y.swapaxes(1, 2) if channels_first else y)


def _check_lmuformer(case):
    o, spiking = case.options, "head_bn.weight" in case.params
    attends = "block.0.attn.q_conv.weight" in case.params
    model = LMUFormer(
        o["in_channels"],
        o["num_classes"],
        dim=o["dim"],
        depth=o["depth"],
        theta=o["theta"],
        expand=o["mlp_ratio"],
        order=o.get("memory_size"),
        spiking=spiking,
        attention_heads=o["num_heads"] if attends else None,
        rngs=nnx.Rngs(0),
    )
    model = convert(model, case.params, architecture="lmuformer")
    x = case.array("x")
    logits = jax.jit(lambda x: model(x)[0])(x)
    every = case.expected("logits").ndim == 3  # the original's test mode "all_seq", time first
    case.check("logits", jnp.moveaxis(logits, 1, 0) if every else logits[:, -1])
    case.check_all({"logits_all_seq": jnp.moveaxis(logits, 1, 0)})
    mids, whole = jax.jit(lambda x: _intermediates(model, x))(x)
    for name, value in whole.items():
        np.testing.assert_allclose(value, mids[name], atol=1e-6, err_msg=name)
    for name, value in mids.items():
        binary = spiking and name.endswith((".lmu", ".f_u", ".f_m"))
        case.check_all({name: value}, exact=binary)
    if model.causal:
        _check_stream(model, x, logits)


def _intermediates(model, x):
    """What the original shows of its inside, [b, channel, time] but for the memory unit; and blocks called as
    a whole."""
    z, whole = x, {}
    for part in model.embedding.parts:
        z, _ = part(z)
    mids = {"patch_embed": z.swapaxes(1, 2)}
    for i, block in enumerate(model.backbone.blocks):
        mixer, before = block.mixer, z
        mixed = mixer(z)[0]
        if isinstance(mixer, SpikingAttention):
            h = None
        elif hasattr(mixer, "spike"):
            s = mixer.spike(z)[0]
            unit = mixer.lmu
            u = unit.spike_u(unit.W_u(s))[0]
            m = unit.spike_m(_memory(unit, u))[0]
            h = unit(s, (None,) * 4, None, None)[0]
            mids |= {
                f"block{i}.attn.lmu.f_u": jnp.moveaxis(u, 1, 0),
                f"block{i}.attn.lmu.f_m": m.transpose(1, 2, 0),
            }
        else:
            h = mixer.lmu(z)[0]
        z = z + mixed
        channels = block.channel_mixer(z)[0]
        z = z + channels
        if h is not None:
            mids[f"block{i}.attn.lmu"] = h
        mids |= {
            f"block{i}.attn": mixed.swapaxes(1, 2),
            f"block{i}.mlp": channels.swapaxes(1, 2),
        }
        mids[f"block{i}"] = z.swapaxes(1, 2)
        whole[f"block{i}"] = block(before)[0].swapaxes(1, 2)
    return mids, whole


def _memory(unit, u):
    return kernels.lmu(u, *legendre(unit.order, unit.theta))[0][:, :, 0]


def _check_stream(model, x, logits):
    """Step by step, and as late as it says, the stream is the parallel form."""
    step = jax.jit(lambda x, state: model(x, state))
    state, streamed = model.init_state(len(x), x.dtype), []
    for t in range(x.shape[1]):
        y, state = step(x[:, t : t + 1], state)
        streamed.append(y)
    late = model.lookahead
    np.testing.assert_allclose(
        np.concatenate(streamed, axis=1)[:, late:], logits[:, : x.shape[1] - late], atol=2e-5
    )
