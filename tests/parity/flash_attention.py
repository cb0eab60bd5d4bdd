"""Dense attention with all its masks, and the gradients, in every implementation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from seqlab.kernels import attention


def check(case):
    meta = case.meta
    left, right = meta["window"]
    assert right in (None, 0) and not meta["alibi"] and not meta["learnable_sink"], (
        "options that seqlab lacks"
    )
    options = {"causal": meta["causal"], "sinks": meta["sink_tokens"], "softcap": meta["softcap"] or None}
    options["window"] = None if left is None else left + 1  # the original counts the keys before the query
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
    floats = tuple(case.array(name) for name in "qkv")
    for implementation in ("reference", "xla"):
        call = functools.partial(attention, **options, implementation=implementation)

        @jax.jit
        def run(floats, d_out, call=call):
            (out, lse), pull = jax.vjp(lambda floats: call(*floats), floats)
            return out, lse, *pull((d_out, jnp.zeros_like(lse)))[0]

        results = dict(
            zip(("o", "lse", "dq", "dk", "dv"), map(np.array, run(floats, case.array("d_out"))), strict=True)
        )
        results["lse"] = results["lse"].swapaxes(1, 2)
        for name, kept in (("o", rows), ("lse", rows), ("dq", rows), ("dk", keys), ("dv", keys)):
            # What the original leaves in padding means nothing.
            blank = kept[:, None] if name == "lse" else kept[:, :, None, None]
            expected = case.expected(name)
            case.check(name, np.where(blank, results[name], expected))
