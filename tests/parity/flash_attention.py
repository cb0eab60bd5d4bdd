"""Dense attention with all its masks, and the gradients, in every implementation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from seqlab.kernels import attention


def check(case):
    meta = case.meta
    sides = meta.get("window") or (None, None)
    options = {
        "causal": meta["causal"],
        "window": tuple(None if side is None or side < 0 else side for side in sides),
        "sinks": meta.get("sink_tokens") or 0,
        "softcap": meta.get("softcap") or None,
    }
    if isinstance(meta.get("softmax_scale"), int | float):  # else in words: that of the width
        options["scale"] = float(meta["softmax_scale"])
    t, s = meta["Sq"], meta["Sk"]
    rows, keys = np.ones((meta["B"], t), bool), np.ones((meta["B"], s), bool)
    if "q_len" in case.inputs:  # aligned at the end of every row
        q_len, k_len = case.inputs["q_len"][:, None], case.inputs["k_len"][:, None]
        rows, keys = np.arange(t) < q_len, np.arange(s) < k_len
        options |= {"q_segments": jnp.asarray(rows, jnp.int32), "kv_segments": jnp.asarray(keys, jnp.int32)}
        options |= {
            "q_positions": jnp.asarray(np.arange(t) + k_len - q_len),
            "kv_positions": jnp.tile(jnp.arange(s), (len(k_len), 1)),
        }
    floats = {name: case.array(name) for name in "qkv"}
    for option, word in (("sink_logits", "sink"), ("alibi", "slope"), ("alibi", "alibi")):
        named = [name for name in case.inputs if word in name]
        if named and meta.get("learnable_sink" if word == "sink" else "alibi"):
            floats[option] = case.array(named[0])
    for option, key in (("sink_logits", "learnable_sink"), ("alibi", "alibi")):
        assert bool(meta.get(key)) == (option in floats), f"no input holds the numbers of {key}"
    for implementation in ("reference", "xla"):
        call = functools.partial(attention, **options, implementation=implementation)

        @jax.jit
        def run(floats, d_out, call=call):
            (out, lse), pull = jax.vjp(lambda floats: call(**floats), floats)
            return out, lse, pull((d_out, jnp.zeros_like(lse)))[0]

        out, lse, gradients = jax.tree.map(np.array, run(floats, case.array("d_out")))
        results = {"o": out, "lse": lse} | {f"d{name}": gradients.pop(name) for name in "qkv"}
        for option, gradient in gradients.items():
            words = ("sink",) if option == "sink_logits" else ("slope", "alibi")
            for name in case.outs:
                if any(word in name for word in words):
                    case.check(name, gradient)
        results["lse"] = results["lse"].swapaxes(1, 2)
        for name, kept in (("o", rows), ("lse", rows), ("dq", rows), ("dk", keys), ("dv", keys)):
            # What the original leaves in padding means nothing.
            blank = kept[:, None] if name == "lse" else kept[:, :, None, None]
            expected = case.expected(name)
            case.check(name, np.where(blank, results[name], expected))
