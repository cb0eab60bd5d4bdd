"""KIVI: codes, scales and packing; attention with a coded cache."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from parity import Tolerance
from seqlab.interop.convert import convert
from seqlab.kernels.decode_attention import codes_of
from seqlab.models import Attention
from seqlab.models.cache import Quantized
from seqlab.models.cache.quantize import Groups, decode, dequantize, encode, groups_of, quantize


def check(case):
    if "k" in case.inputs:
        _check_codes(case)
    else:
        _check_attention(case)


def _check_codes(case):
    o = case.meta
    steps, channels, bits = o["group_k_tokens"], o["group_v_channels"], o.get("k_bits", o.get("bits"))
    dtype = jnp.dtype(str(o.get("dtype", "float32")).removeprefix("torch."))  # scales are kept in it
    k, v = (case.array(name).astype(dtype) for name in "kv")
    case.tolerance = Tolerance(1e-6, 1e-7)  # of the scales; codes are exact
    parts = k.reshape(*k.shape[:2], -1, steps, k.shape[3])
    groups = Groups(*(x[..., None, :] for x in groups_of(parts.min(-2), parts.max(-2), bits)))
    levels = encode(parts, groups, bits)
    over_time = levels.reshape(k.shape).swapaxes(2, 3)
    decoded = decode(levels, groups).reshape(k.shape)
    case.check("k_levels", levels.reshape(k.shape), exact=True)
    case.check("k_scale", groups.scale)
    case.check("k_min", groups.least)
    words = _packed(over_time, bits)
    case.check("k_code_channel_major", words, exact=True)
    case.check("k_code", words.swapaxes(2, 3), exact=True)
    case.check("k_scale_channel_major", groups.scale[..., 0, :].swapaxes(2, 3))
    case.check("k_min_channel_major", groups.least[..., 0, :].swapaxes(2, 3))
    bits = o.get("v_bits", bits)
    codes, groups = quantize(v, channels, bits)
    case.check("v_levels", codes, exact=True)
    case.check("v_code", _packed(codes, bits), exact=True)
    case.check("v_scale", groups.scale[..., None])
    case.check("v_min", groups.least[..., None])
    case.tolerance = Tolerance(
        1e-6, 1e-6
    )  # code * scale + least: one rounding of numbers of size 4 more or less
    case.check("v_deq", dequantize(codes, groups))
    case.check("k_deq", decoded)


def _packed(levels, bits):
    """As the original packs: neighbours along the last axis in a word, the first one in the lowest bits."""
    count = levels.shape[-1] * bits // 32
    parts = np.asarray(levels).reshape(*levels.shape[:-1], count, 32 // bits)
    return np.sum(parts << np.arange(0, 32, bits, dtype=np.uint32), axis=-1, dtype=np.uint32).view(np.int32)


def _check_attention(case):
    """A prefill that sees itself exactly, then one token a call; the original packs keys along time."""
    o, x = case.options, case.array("x")
    bits = {"k": o["k_bits"], "v": o["v_bits"]}
    group, residual = o["group_size"], o["residual_length"]
    widths = {"group": group, "residual": residual, "bits": bits["k"], "value_bits": bits["v"]}
    mixer = Attention(
        o["hidden"],
        heads=o["heads"],
        kv_heads=o.get("kv_heads", o["heads"]),
        head_dim=o.get("head_dim"),
        rotary_base=o.get("rope_theta", 1e4),
        bias="q_proj.bias" in case.params,
        out_bias="o_proj.bias" in case.params,
        cache=Quantized(x.shape[1], edge="call", **widths),
        rngs=nnx.Rngs(0),
    )
    mixer = convert(mixer, case.params)
    run, state = jax.jit(lambda x, state: mixer(x, state)), mixer.init_state(len(x))
    outputs, lengths, begin = [], [], 0
    for size in (o["prefill"], *[1] * o["decode_steps"]):
        y, state = run(x[:, begin : begin + size], state)
        begin += size
        outputs.append(y)
        keys, values = begin // residual * residual, max(0, begin - residual)
        lengths.append([keys, begin - keys, values, begin - values, begin])
    case.check("attn_out", np.concatenate(outputs, axis=1))
    case.check("lens_kq_kres_vq_vres_total", lengths, exact=True)
    codes = {name: np.asarray(codes_of(getattr(state, name).words, bits[name])) for name in "kv"}
    codes = {"k": codes["k"][..., :keys], "v": codes["v"][..., :values].swapaxes(2, 3)}
    groups = {
        "k": [np.asarray(x)[:, :, : keys // group].swapaxes(2, 3) for x in state.k[1:]],
        "v": [np.asarray(x)[..., :values].swapaxes(2, 3) for x in state.v[1:]],
    }
    for name, own, first in (("k", state.rest_k, keys), ("v", state.rest_v, values)):
        case.check_all({f"final_{name}_code": _packed(codes[name], bits[name])}, exact=True)
        scale, least = groups[name]
        rest = np.asarray(own)[:, :, np.arange(first, begin) % residual]
        case.check_all(
            {f"final_{name}_scale": scale, f"final_{name}_min": least, f"final_{name}_residual": rest}
        )
