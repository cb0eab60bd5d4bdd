"""StreamingLLM: sinks and a window with positions in the cache, token by token and turn by turn, in models of
two architectures."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from parity import in_order
from seqlab.interop.convert import convert
from seqlab.models import Attention, LanguageModel, LayerNorm, RMSNorm, SwiGLU, Window
from seqlab.models.layers import MLP
from seqlab.models.video_positions import video_positions


def check(case):
    if "video_grid_thw" in case.inputs:
        _check_video(case)
    elif "chunks" in case.meta:
        _check_turns(case)
    else:
        _check_steps(case)


def _check_video(case):
    """StreamingVLM's positions in time, height and width, which start anew with what is left in the cache."""
    o, tokens = case.meta, case.inputs["input_ids"]
    options = {
        "video_token": o["video_token"],
        "merge": o["spatial_merge_size"],
        "tokens_per_second": o["tokens_per_second"],
    }
    positions = video_positions(
        tokens, case.inputs["video_grid_thw"], seconds_per_grid=2 / o["fps"], **options
    )
    case.check("position_ids", np.moveaxis(positions, 2, 0), exact=True)
    case.check("delta", positions.max(axis=(1, 2))[:, None] + 1 - tokens.shape[1], exact=True)


def llama(options, cache, params):
    def held(end):
        return any(name.endswith(end) for name in params)

    attention = functools.partial(
        Attention,
        heads=options["heads"],
        kv_heads=options["kv_heads"],
        head_dim=options.get("head_dim"),
        bias=held("q_proj.bias"),
        out_bias=held("o_proj.bias"),
        cache=cache,
        rotary_base=options["rope_theta"],
    )
    return LanguageModel(
        options["vocab"],
        options["hidden"],
        options["layers"],
        attention,
        channel_mixer=functools.partial(SwiGLU, hidden=options["intermediate"]),
        norm=functools.partial(RMSNorm, eps=options["eps"]),
        tie_embeddings=not held("lm_head.weight"),
        rngs=nnx.Rngs(0),
    )


def _check_steps(case):
    """One token a call: what is kept, where it stands, and what comes out."""
    options, tokens = case.options, case.array("input_ids")
    sinks, recent = options["start_size"], options["recent_size"]
    model, run = _built(case, Window.published(sinks, recent))
    state, logits, mixed, tables = model.init_state(len(tokens)), [], [], []
    for t in range(tokens.shape[1]):
        (y, first), state = run(tokens[:, t : t + 1], state)
        logits.append(y)
        mixed.append(first)
        tables.append(np.sort(np.asarray(state[0][0].positions[0])))
    case.check("logits", np.concatenate(logits, axis=1))
    case.check("attn_out_layer0", np.concatenate(mixed, axis=1))
    _check_tables(case, tables, sinks, recent)
    for layer in range(options["layers"]):
        k, v = _kept(state[layer][0], model.backbone.blocks[layer].mixer, sinks, recent)
        case.check(f"cache_k_layer{layer}", k)
        case.check(f"cache_v_layer{layer}", v)


def _built(case, cache):
    """The model, and its call as a function of tokens and state."""
    neox = any(name.startswith("gpt_neox.") for name in case.params)
    if neox:
        model = convert(*_neox(case.options, cache, case.params), architecture="neox")
    else:
        model = convert(llama(case.options, cache, case.params), case.params, architecture="llama")
    return model, jax.jit(functools.partial(_step, model, neox))


def _step(model, parallel, tokens, state):
    """The logits, and what the first layer's attention adds; NeoX lets attention and channels read the same
    input."""
    x, new, first = model.embedding(tokens), [], None
    for block, (mixed, channel) in zip(model.backbone.blocks, state, strict=True):
        y, mixed = block.mixer(block.mixer_norm(x), mixed)
        first = y if first is None else first
        z, channel = block.channel_mixer(block.channel_norm(x if parallel else x + y), channel)
        x = x + y + z
        new.append((mixed, channel))
    return (model.read_out(model.backbone.norm(x)), first), tuple(new)


def _check_tables(case, tables, sinks, recent):
    """Which tokens are seen, and kept behind the step; places in the cache count from 0. The original pads
    its rows with -1."""
    width = sinks + recent
    seen = np.full(case.expected("attended_token_index").shape, -1)
    kept = np.full(case.expected("cache_token_index_after").shape, -1)
    for t, table in enumerate(tables):
        here = table[table <= t]
        seen[t, : len(here)] = here
        after = here if len(here) <= width else np.concatenate([here[:sinks], here[len(here) - recent :]])
        kept[t, : len(after)] = after
    case.check("attended_token_index", seen, exact=True)
    case.check("cache_token_index_after", kept, exact=True)
    count = (seen >= 0).sum(axis=1)
    case.check("q_position", count - 1, exact=True)
    case.check("key_positions", np.where(seen >= 0, np.arange(seen.shape[1]), -1), exact=True)


def _kept(state, attention, sinks, recent):
    """Keys, turned back, and values of the sinks and the last `recent` steps, in order."""
    k, v, positions = in_order(state, sinks, recent)
    places = jnp.broadcast_to(jnp.asarray(positions), (len(k), len(positions)))
    half = attention.rotary_width // 2

    def swapped(
        x,
    ):  # the two halves that turn together: with them exchanged a rotation goes the other way round
        return jnp.concatenate([x[..., half : 2 * half], x[..., :half], x[..., 2 * half :]], axis=-1)

    k = swapped(attention.rotary(swapped(jnp.asarray(k).swapaxes(1, 2)), places))
    return np.asarray(k).swapaxes(1, 2), v


def _check_turns(case):
    """Turns: room is made for all that a turn will bring, then a call with its tokens, then one a token."""
    options, tokens = case.options, case.array("input_ids")
    sinks, recent, gen = options["start_size"], options["recent_size"], options["gen"]
    longest = max(options["chunks"]) + gen
    cache = Window(recent, sinks, turn=longest)
    model, run = _built(case, cache)
    state, logits, lengths, kept, places, begin = model.init_state(len(tokens)), [], [], [], [], 0
    for chunk in options["chunks"]:
        state = model.make_room(state, chunk + gen)
        kept.append(_table(state))
        for size in (chunk, *[1] * gen):
            places += range(len(_table(state)), len(_table(state)) + size)
            (y, _), state = run(tokens[:, begin : begin + size], state)
            begin += size
            logits.append(y)
            lengths.append(len(_table(state)))
    case.check("logits", np.concatenate(logits, axis=1))
    case.check("q_positions", places, exact=True)
    case.check("cache_len_after_each_call", lengths, exact=True)
    expected = case.expected("kept_token_index_per_turn")
    case.check(
        "kept_token_index_per_turn",
        [[*row, *[-1] * (expected.shape[1] - len(row))] for row in kept],
        exact=True,
    )
    case.check("final_cache_token_index", _table(state), exact=True)
    for layer in range(options["layers"]):
        k, v = _kept(state[layer][0], model.backbone.blocks[layer].mixer, sinks, cache.ring)
        case.check_all({f"final_cache_k_layer{layer}": k, f"final_cache_v_layer{layer}": v})


def _table(state):
    positions, length = np.asarray(state[0][0].positions[0]), int(state[0][0].length[0])
    return sorted(int(p) for p in positions if p < length)


def _neox(options, cache, params):
    """A GPT-NeoX: partial rotation, biases, layer norms; queries, keys and values are packed head by head."""
    heads, width = options["heads"], options["hidden"] // options["heads"]
    attention = functools.partial(
        Attention,
        heads=heads,
        cache=cache,
        rotary_base=float(options["rope_theta"]),
        rotary_width=int(options["rotary_pct"] * width),
        bias=True,
        out_bias=True,
    )
    model = LanguageModel(
        options["vocab"],
        options["hidden"],
        options["layers"],
        attention,
        channel_mixer=functools.partial(MLP, hidden=options["intermediate"]),
        norm=functools.partial(LayerNorm, eps=options["eps"]),
        tie_embeddings=False,
        rngs=nnx.Rngs(0),
    )
    renamed = {}
    for name, value in params.items():
        if "query_key_value" in name:
            parts = np.split(value.reshape(heads, 3, width, -1), 3, axis=1)
            for part, letter in zip(parts, "qkv", strict=True):
                flat = part.reshape(heads * width, -1)
                renamed[name.replace("query_key_value", f"{letter}_proj")] = (
                    flat[:, 0] if name.endswith("bias") else flat
                )
        elif "inv_freq" not in name:
            renamed[name] = value
    return model, renamed
