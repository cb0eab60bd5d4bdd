"""Steps that share scales: codes of old keys per channel and of old values per token, the newest steps
exact."""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from seqlab.checks import UserError
from seqlab.kernels.attention import merge
from seqlab.kernels.decode_attention import Coded, decode_attention, keys_of, values_of
from seqlab.models.cache.coded_parts import Partial, QuantizedState, Recent, attend_masked, attend_recent
from seqlab.models.cache.coded_store import Layout, key_groups, recent_keys, store_chunk, store_step
from seqlab.models.cache.common import (
    NEVER,
    Scores,
    Span,
    attend,
    attend_sinks,
    beyond_is_nan,
    earlier,
    new_span,
    only_valid,
    place_in_cache,
    resized,
)
from seqlab.models.cache.policy import slots_for
from seqlab.models.cache.quantize import decode, dequantize, encode, quantize
from seqlab.shapes import Counts, Keys, LogSumExp, Queries, Steps, Values, accumulator
from seqlab.state import Segments, segments


@dataclasses.dataclass(frozen=True)
class CodedSteps(Layout):
    """The steps that a `retention` keeps, in integers as `storage` says."""

    retention: Any
    storage: Any
    state_type: ClassVar[type] = QuantizedState

    @property
    def all_slots(self) -> int:
        """Quantized steps that are held at most: whole blocks of `residual`."""
        steps = self.retention.ring - (0 if self.retention.ends else 1)
        return max(1, -(-steps // self.residual)) * self.residual

    def init_state(
        self, batch: int, kv_heads: int, width: int, dtype: jax.typing.DTypeLike, v_width: int
    ) -> QuantizedState:
        lead, kind = (batch, kv_heads), jnp.float16 if self.storage.half_groups else dtype
        slots, group, sinks = self.all_slots, self.group, self.retention.sinks

        def coded(width: int, bits: int, groups: tuple[int, int]) -> Coded:
            if width * bits % 32:
                raise UserError(f"a head of {width} channels must fill words of 32 bits, got int{bits}")
            words = jnp.zeros((*lead, width * bits // 32, slots), jnp.uint32)
            return Coded(words, jnp.zeros((*lead, *groups), kind), jnp.zeros((*lead, *groups), kind))

        if v_width % group:
            raise UserError(f"group must divide the {v_width} channels of a head's values, got {group}")
        return QuantizedState(
            jnp.zeros((*lead, sinks, width), dtype),
            jnp.zeros((*lead, sinks, v_width), dtype),
            coded(width, self.bits, (slots // group, width)),
            coded(v_width, self.v_bits, (v_width // group, slots)),
            jnp.zeros((*lead, self.residual, width), dtype),
            jnp.zeros((*lead, self.residual, v_width), dtype),
            jnp.zeros((batch,), jnp.int32),
        )

    def held(self, state: QuantizedState) -> int:
        return state.k.words.shape[3]

    def slots_for(self, steps: int) -> int:
        slots = slots_for(max(1, steps), self.all_slots, self.retention.grows)
        return -(-slots // self.residual) * self.residual

    def resize(self, state: QuantizedState, slots: int) -> QuantizedState:
        k, v, groups = state.k, state.v, slots // self.group
        return state._replace(
            k=Coded(resized(k.words, slots, 3), *(resized(x, groups, 2) for x in (k.scale, k.least))),
            v=Coded(*(resized(x, slots, 3) for x in v)),
        )

    def adopt(self, state: QuantizedState, words: str) -> QuantizedState:
        return state

    def rewind(self, state: QuantizedState, steps: Counts, words: str) -> QuantizedState:
        """The state `steps` steps ago; ValueError once steps have been quantized: of the first `residual`
        behind the sinks none is."""
        length = earlier(state, steps)
        if bool(jnp.any((self.ends(state)[1] > 0) & (length < state.length)[:, None])):
            raise UserError(
                f"steps={jnp.asarray(steps).tolist()} cannot be taken back: {words} has quantized the steps "
                "before them"
            )

        def before(x: Array, first: int) -> Array:
            kept = first + jnp.arange(x.shape[2]) < length[:, None]
            return jnp.where(
                kept[:, None, :, None] | (length == state.length)[:, None, None, None],
                x,
                jnp.zeros((), x.dtype),
            )

        sinks, first = (before(state.sink_k, 0), before(state.sink_v, 0)), self.retention.sinks
        rest = before(state.rest_k, first), before(state.rest_v, first)
        return state._replace(sink_k=sinks[0], sink_v=sinks[1], rest_k=rest[0], rest_v=rest[1], length=length)

    def newest(self, state: QuantizedState) -> tuple[Float[Array, "b r g k"], Int[Array, "b r"]]:
        """The exact keys of a state that has quantized none, and their places behind the sinks, below 0 for
        none."""
        seen, coded = self.ends(state)
        at = coded + jnp.arange(self.residual)[None]
        return state.rest_k.swapaxes(1, 2), jnp.where(at < seen, at, -1)

    def attend(
        self,
        q: Queries,
        k: Keys,
        v: Values,
        state: QuantizedState | None,
        reset: Steps | None,
        valid: Steps | None,
        scores: Scores,
        picked: Any = None,
    ) -> tuple[Float[Array, "b t h v"], LogSumExp, QuantizedState | None]:
        """Out [b, t, h, v], its log-sum-exp and the new state, see `Policy`. `picked`: the blocks that each
        query reads, None for all, see `seqlab.models.cache.block_coded.Picked`."""
        kept, streaming, unturned = self.retention, state is not None, q
        if not streaming:
            fresh = self.init_state(q.shape[0], k.shape[2], k.shape[3], k.dtype, v.shape[3])
            state = self.resize(fresh, self.residual)
        where = segments(q.shape[:2], state.length, reset, valid)
        q, k = scores.rotary(q, where.positions), scores.rotary(k, where.positions)
        if streaming and q.shape[1] == 1 and reset is None:
            new = store_step(self, state, k[:, 0], v[:, 0], where)
            parts = self._one_query(q, unturned, k, v, state, where, scores, picked)
        else:
            recent = self._recent(state, k, v, where)
            new = store_chunk(self, state, recent, where) if streaming else None
            first_call = (state.length == 0)[:, None, None]
            at_once = self.storage.edge == "call" and streaming
            whole = first_call if at_once else jnp.zeros((1, 1, 1), bool)
            place = where.positions - kept.sinks
            parts = [attend_recent(self, q, place, where, recent, whole, scores, picked)]
            if streaming:
                parts.append(self._attend_coded(q, state, where, scores, picked))
            if kept.sinks:
                stored = self._sinks(new if streaming and reset is None else state)
                chunk = None if streaming and reset is None else new_span(k, v, where)
                at = self._sink_queries(unturned, q, where, scores, picked)
                parts.append(attend_sinks(at, where, scores, kept.sinks, stored, chunk))
        out, lse = functools.reduce(lambda a, b: merge(*a, *b), parts)
        out = only_valid(out, where)
        held = self.held(state) if streaming else self.all_slots
        if kept.ends or held < self.all_slots:
            out, lse = beyond_is_nan(out, lse, where.positions >= held + kept.sinks)
        return out, lse, new

    def _recent(self, state: QuantizedState, k: Keys, v: Values, where: Segments) -> Recent:
        """The last `residual` steps that were seen, and the chunk."""
        coded = self.ends(state)[1]
        old_k, old = recent_keys(self, state)
        places = jnp.concatenate([old, where.positions - self.retention.sinks], axis=1)
        ids = jnp.concatenate([jnp.where(old >= 0, 1, 0), where.ids], axis=1)
        k_all = jnp.concatenate([old_k.swapaxes(1, 2).astype(k.dtype), k], axis=1)
        v_all = jnp.concatenate([state.rest_v.swapaxes(1, 2).astype(v.dtype), v], axis=1)
        open_ = (ids > 0) & (places >= jnp.where(ids == 1, coded, 0)) & (places >= 0)
        groups = key_groups(self, k_all, places, ids, coded, open_)
        coded_k = decode(encode(k_all, groups, self.bits), groups).astype(k.dtype)
        codes, value_groups = quantize(v_all, self.group, self.v_bits)
        return Recent(
            k_all,
            jnp.where(open_[..., None, None], coded_k, k_all),
            v_all,
            dequantize(codes, self.as_kept(value_groups)).astype(v.dtype),
            groups,
            places,
            ids,
            open_,
        )

    def _coded_places(self, state: QuantizedState) -> Int[Array, "b s"]:
        """The newest step whose key is quantized in each slot; below 0 for none."""
        coded, slots = self.ends(state)[1], self.held(state)
        return coded - 1 - (coded - 1 - jnp.arange(slots)[None]) % slots

    def _attend_coded(
        self, q: Queries, state: QuantizedState, where: Segments, scores: Scores, picked: Any
    ) -> Partial:
        """Attention over the steps before the residual, of which every query sees key and value quantized."""
        kept, seen, places, acc = (
            self.retention,
            self.ends(state)[0],
            self._coded_places(state),
            accumulator(q.dtype),
        )
        here = (places >= 0) & (places < seen - self.residual)
        k = keys_of(state.k, self.bits, acc).swapaxes(1, 2).astype(q.dtype)
        v = values_of(state.v, self.v_bits, acc).swapaxes(1, 2).astype(q.dtype)
        if picked is not None or kept.apart(places) is not None:
            place = where.positions - kept.sinks
            see = here[:, None] & (where.ids == 1)[:, :, None] & kept.sees(place[:, :, None], places[:, None])
            see = see[:, :, None] if picked is None else see[:, :, None] & picked.sees(places)
            return attend_masked(q, k, v, see, scores)
        positions = jnp.where(here, places + kept.sinks, NEVER)
        span = Span(k, v, positions, here.astype(jnp.int32))
        limits = {} if kept.visible is None else {"window": kept.visible}
        return attend(q, where.positions, where, span, scores, **limits)

    def _sink_queries(
        self, unturned: Queries, turned: Queries, where: Segments, scores: Scores, picked: Any
    ) -> Queries:
        """The queries as they see the sinks."""
        kept = self.retention
        if not kept.in_cache:
            return turned
        first_seen = kept.first_seen if picked is None else picked.choice.first_seen
        first = first_seen(where.positions - kept.sinks) + kept.sinks
        start = jnp.full(where.length.shape, kept.sinks)
        place = place_in_cache(where.positions, where.ids, start, kept.sinks, first)
        return scores.rotary(unturned, place)

    def _sinks(self, state: QuantizedState) -> Span:
        """The sinks that are stored."""
        at = jnp.broadcast_to(jnp.arange(state.sink_k.shape[2]), (len(state.length), state.sink_k.shape[2]))
        k, v = (x.swapaxes(1, 2) for x in (state.sink_k, state.sink_v))
        here = at < state.length[:, None]
        return Span(k, v, jnp.where(here, at, NEVER), here.astype(jnp.int32))

    # --- one step

    def _one_query(
        self,
        q: Queries,
        unturned: Queries,
        k: Keys,
        v: Values,
        state: QuantizedState,
        where: Segments,
        scores: Scores,
        picked: Any,
    ) -> list[Partial]:
        """The same attention without dequantizing a cache: steps of which key and value are quantized by
        `kernels.decode_attention` from their codes, and those of which one is exact."""
        kept, seen, same = self.retention, self.ends(state)[0], where.ids == 1
        recent_k, at = recent_keys(self, state)
        k = jnp.concatenate([recent_k.astype(k.dtype), k.swapaxes(1, 2)], axis=2)
        v = jnp.concatenate([state.rest_v.astype(v.dtype), v.swapaxes(1, 2)], axis=2)
        see = jnp.concatenate([same & (at >= 0) & kept.sees(seen, at), where.ids > 0], axis=1)
        if picked is None:
            places = self._coded_places(state)
            old = same & (places >= 0) & (places < seen - self.residual) & kept.sees(seen, places)
            parts = [decode_attention(q[:, 0], state.k, state.v, old, v_bits=self.v_bits, **scores.limits)]
            parts.append(decode_attention(q[:, 0], k, v, see, **scores.limits))
        else:
            parts = [self._picked_codes(q, state, same, scores, picked)]
            places = jnp.concatenate([at, where.positions - kept.sinks], axis=1)
            see = see[:, None, None] & picked.sees(places)
            parts.append(_one_head_a_row(q, k, v, see[:, 0], scores))
        if kept.sinks:
            see = same & (jnp.arange(kept.sinks)[None] < state.length[:, None])
            at_place = self._sink_queries(unturned, q, where, scores, picked)[:, 0]
            parts.append(decode_attention(at_place, state.sink_k, state.sink_v, see, **scores.limits))
        return [(out[:, None], lse[:, None]) for out, lse in parts]

    def _picked_codes(
        self, q: Queries, state: QuantizedState, same: Array, scores: Scores, picked: Any
    ) -> Partial:
        """Attention of one query over the codes of the blocks that it reads, gathered head by head."""
        (b, _, h, _), g, slots = q.shape, state.k.words.shape[1], self.held(state)
        block, seen = picked.choice.block, self.ends(state)[0][:, :, None]
        places = (picked.blocks[:, 0, :, :, None] * block + jnp.arange(block)).reshape(b, h, -1)
        see = (places >= 0) & (places < seen - self.residual) & same[:, :, None]
        see = see & self.retention.sees(seen, places)
        slot = places % slots
        rows, heads = jnp.arange(b)[:, None, None], (jnp.arange(h) * g // h)[:, None]

        def gathered(x: Array, at: Array, last: bool) -> Array:
            """x [b, g, ., s], or [b, g, s, .] where slots are not `last`, at [b, h, m], heads as rows."""
            x = x[rows, heads, :, at].swapaxes(2, 3) if last else x[rows, heads, at]
            return x.reshape(b * h, 1, *x.shape[2:])

        k = Coded(
            gathered(state.k.words, slot, True),
            *(gathered(x, slot // self.group, False) for x in state.k[1:]),
        )
        v = Coded(*(gathered(x, slot, True) for x in state.v))
        rows_of = q[:, 0].reshape(b * h, 1, -1), see.reshape(b * h, -1)
        out, lse = decode_attention(rows_of[0], k, v, rows_of[1], v_bits=self.v_bits, **scores.limits)
        return out.reshape(b, h, -1), lse.reshape(b, h)


def _one_head_a_row(q: Queries, k: Array, v: Array, see: Array, scores: Scores) -> Partial:
    """Attention of one query over keys [b, g, e, k] and values, where each head sees others: `see` [b, h,
    e]."""
    b, h = see.shape[:2]
    k, v = (jnp.repeat(x, h // x.shape[1], axis=1).reshape(b * h, 1, *x.shape[2:]) for x in (k, v))
    rows = q[:, 0].reshape(b * h, 1, -1), see.reshape(b * h, -1)
    out, lse = decode_attention(rows[0], k, v, rows[1], **scores.limits)
    return out.reshape(b, h, -1), lse.reshape(b, h)
