"""MoBA: packed sequences in the parallel form with gradients, and each as a stream in chunks."""

import jax
import jax.numpy as jnp
import numpy as np

from seqlab.models.cache import MoBA, Scores
from seqlab.state import segments


def check(case):
    lens, block, top_k = case.meta["lens"], case.meta["chunk_size"], case.meta["topk"]
    q, k, v, d_out = (case.array(name)[None] for name in ("q", "k", "v", "d_out"))
    starts = np.asarray(case.inputs["cu_seqlens"])[:-1]
    assert starts.tolist() == np.cumsum([0, *lens[:-1]]).tolist()
    reset = jnp.zeros(q.shape[:2], bool).at[0, starts].set(True)
    policy = MoBA(block, top_k, capacity=-(-max(lens) // block) * block)

    run = jax.jit(lambda q, k, v, state, reset: policy(q, k, v, state, reset, None, Scores(unturned)))
    out, pull = jax.jit(lambda *floats: jax.vjp(lambda *floats: run(*floats, None, reset)[0], *floats))(
        q, k, v
    )
    case.check("o", out[0])
    for letter, gradient in zip("qkv", pull(d_out), strict=True):
        case.check(f"d{letter}", gradient[0])
    half, state = q.shape[1] // 2, policy.init_state(1, k.shape[2], k.shape[3], k.dtype)
    first, _, state = run(q[:, :half], k[:, :half], v[:, :half], state, reset[:, :half])
    second, _, state = run(q[:, half:], k[:, half:], v[:, half:], state, reset[:, half:])
    case.check("o", jnp.concatenate([first, second], axis=1)[0])
    for i, (start, length) in enumerate(zip(starts, lens, strict=True)):
        here = slice(start, start + length)
        _check_choice(case, i, policy, q[:, here], k[:, here], v[:, here])


def _check_choice(case, i, policy, q, k, v):
    """Which blocks each query sees, its own included, and the mean keys they are chosen by; of GQA the
    original repeats the keys."""
    length, block = q.shape[1], policy.block
    blocks = policy.whole(k, v)
    chosen = np.asarray(policy.choose(q, blocks, segments((1, length), 0, None, None)))[0]
    seen = np.zeros((q.shape[2], length, -(-length // block)), bool)
    for step, head, choice in np.ndindex(chosen.shape):
        if chosen[step, head, choice] >= 0:
            seen[head, step, chosen[step, head, choice]] = True
    seen[:, np.arange(length), np.arange(length) // block] = True
    case.check(f"block_selected_seq{i}", seen, exact=True)
    means = np.asarray(blocks.sums[0]) / block
    closed = case.expected(f"block_centroid_seq{i}")[: len(means)]
    np.testing.assert_allclose(
        np.repeat(means, q.shape[2] // k.shape[2], axis=1), closed, rtol=1e-5, atol=1e-6
    )


def unturned(x, positions):
    return x
