"""KIVI: codes, scales and packing; attention with a coded cache."""

import jax
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
    bits, steps, channels = (case.meta[name] for name in ("bits", "group_k_tokens", "group_v_channels"))
    k, v = case.array("k"), case.array("v")
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
    parts = np.asarray(levels).reshape(*levels.shape[:-1], -1, 32 // bits)
    return np.sum(parts << np.arange(0, 32, bits, dtype=np.uint32), axis=-1, dtype=np.uint32).view(np.int32)


def _check_attention(case):
    """A prefill that sees itself exactly, then one token a call; the original packs keys along time."""
    o = case.options
    assert o["k_bits"] == o["v_bits"], "seqlab codes keys and values in equally many bits"
    bits, group, residual = o["k_bits"], o["group_size"], o["residual_length"]
    cache = Quantized(256, bits=bits, group=group, residual=residual, edge="call")
    mixer = Attention(
        o["hidden"],
        heads=o["heads"],
        kv_heads=o["kv_heads"],
        rotary_base=o.get("rope_theta", 1e4),
        cache=cache,
        rngs=nnx.Rngs(0),
    )
    mixer, x = convert(mixer, case.params), case.array("x")
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
    case.check("final_k_code", _packed(codes_of(state.k.words, bits)[..., :keys], bits), exact=True)
    case.check(
        "final_v_code", _packed(codes_of(state.v.words, bits)[..., :values].swapaxes(2, 3), bits), exact=True
    )
    k_groups = [np.asarray(x)[:, :, : keys // group] for x in state.k[1:]]
    v_groups = [np.asarray(x)[..., :values] for x in state.v[1:]]
    for name, (scale, least) in (("k", k_groups), ("v", v_groups)):
        case.check(f"final_{name}_scale", scale.swapaxes(2, 3))
        case.check(f"final_{name}_min", least.swapaxes(2, 3))
    for name, own, first in (("k", state.rest_k, keys), ("v", state.rest_v, values)):
        order = np.arange(first, begin) % residual
        case.check(f"final_{name}_residual", np.asarray(own)[:, :, order])
