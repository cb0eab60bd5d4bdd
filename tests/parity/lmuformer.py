"""The Legendre memory and what is made of it: matrices, both LMUs, the cell with several memories, LIF
neurons, LMUFormer with and without spikes, and with spiking attention."""

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
    for name, value in case.params.items():
        if name.rpartition(".")[2] not in ("A", "B", "H"):
            continue
        order, steps = value.shape
        A, B = legendre(order, case.options["theta"], case.options.get("discretizer", "zoh"))
        expected = {"A": A, "B": B[:, None], "H": impulse_response(A, B, steps).T}[name.rpartition(".")[2]]
        np.testing.assert_allclose(
            value, expected, atol=1e-12 if value.dtype == np.float64 else 1e-5, err_msg=name
        )


def _without_constants(case):
    return {
        name: value for name, value in case.params.items() if name.rpartition(".")[2] not in ("A", "B", "H")
    }


def _wide(module, case):
    """The module's parameters in the precision of this run."""
    return jax.tree.map(lambda leaf: leaf.astype(case.precision), module)


def _check_parallel(case):
    o = case.options
    module = LMU(
        o["input_size"], hidden=o["hidden_size"], order=o["memory_size"], theta=o["theta"], rngs=nnx.Rngs(0)
    )
    module = convert(_wide(module, case), _without_constants(case))
    x = case.array("x")
    u = jax.nn.relu(module.W_u(x))
    h, m = module(x, module.init_state(len(x), x.dtype))
    case.check_all({"u": u, "m": module.memory(u)[0], "h": h, "h_n": h[:, -1], "m_n": m[:, 0]})
    case.check("h", module(x)[0])
    if "m0" in case.inputs:
        h, m = module(x, case.array("m0")[:, None])
        case.check_all({"h_from_m0": h, "m_n_from_m0": m[:, 0], "h_n_from_m0": h[:, -1]})


def _check_cell(case):
    o = case.options
    module = RecurrentLMU(
        o["input_size"], hidden=o["hidden_size"], order=o["memory_size"], theta=o["theta"], rngs=nnx.Rngs(0)
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
    module = RecurrentLMU(
        dim,
        hidden=o["hidden"],
        channels=o["memory_d"],
        order=o["order"],
        theta=o["theta"],
        hidden_to_memory=o["hidden_to_memory"],
        memory_to_memory=o["memory_to_memory"],
        input_to_hidden=o["input_to_hidden"],
        use_bias=o["use_bias"],
        hidden_bias="hidden_cell.bias" in theirs,
        cell="rnn" if "hidden_cell.recurrent_kernel" in theirs else "none" if to_hidden is None else "dense",
        discretizer=o.get("discretizer", "zoh"),
        rngs=nnx.Rngs(0),
    )
    ours = {"e_x": theirs["kernel"][:dim].T, "e_b": theirs.get("bias"), "W_b": theirs.get("hidden_cell.bias")}
    kernels = {"e_m": theirs.get("recurrent_kernel"), "W_h": theirs.get("hidden_cell.recurrent_kernel")}
    if o["hidden_to_memory"]:
        kernels["e_h"] = theirs["kernel"][dim:]
    if to_hidden is not None:
        kernels |= {"W_m": to_hidden[:memory], "W_x": to_hidden[memory:] if o["input_to_hidden"] else None}
    ours |= {name: value.T for name, value in kernels.items() if value is not None}
    module = convert(_wide(module, case), {name: value for name, value in ours.items() if value is not None})
    x = case.array("x")
    h, state = module(x, module.init_state(len(x), x.dtype))
    case.check("h", h)
    memories, now = [], module.init_state(len(x), x.dtype)
    step = jax.jit(lambda x, state: module(x, state)[1])
    for t in range(x.shape[1]):
        now = step(x[:, t : t + 1], now)
        memories.append(now.memory)
    case.check("m", np.stack(memories, axis=1))
    np.testing.assert_allclose(state.memory, memories[-1], rtol=1e-5, atol=1e-6)


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
