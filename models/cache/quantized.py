"""A quantized cache: old keys per channel, old values per token, the newest exact (KIVI, arXiv 2402.02750)."""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from seqlab.checks import UserError, check_at_least, check_choice, check_positive
from seqlab.kernels import decode_attention
from seqlab.kernels.attention import merge
from seqlab.kernels.decode_attention import BITS, Coded, keys_of, values_of, words_of
from seqlab.models.cache.common import (
    NEVER,
    Scores,
    Span,
    attend,
    beyond_is_nan,
    earlier,
    joined,
    new_span,
    only_valid,
    resized,
)
from seqlab.models.cache.policy import Policy, slots_for
from seqlab.models.cache.quantize import Groups, decode, dequantize, encode, groups_of, quantize
from seqlab.models.cache.quantized_parts import (
    Partial,
    QuantizedState,
    Recent,
    attend_recent,
    put_slot,
    put_slots,
)
from seqlab.models.cache.window import place_in_cache
from seqlab.shapes import Keys, LogSumExp, Queries, Steps, Values, accumulator
from seqlab.state import Segments, segments


@dataclasses.dataclass(frozen=True)
class Quantized(Policy):
    """KIVI over a full cache or a window. A query at step t sees the key of step u (both counted behind the
    sinks) exactly from the last multiple of `residual` up to t on, the value exactly where u >= t - residual,
    and both quantized otherwise. Sinks are always exact.

    Every query sees what it would see step by step, so a prompt may be cut anywhere. A call of one step leaves
    codes to `kernels.decode_attention`, which dequantizes them as it reads them; longer calls dequantize what
    is stored once.

    Args:
      capacity: steps that the cache holds; None with a window.
      window: W, the last keys that a query sees besides the sinks, its own included: constant memory.
      bits: 2, 4 or 8, of keys and values.
      group: steps of a channel (keys), channels of a step (values) that share a scale and a least value.
      residual: a multiple of `group`.
      half_groups: keep scales and least values in float16, as published code does with half-precision models.
      edge: "call" reproduces the published prefill: the first call of a sequence sees itself exactly.
      positions: of the sinks, as in `Window`.
      grows: with a capacity, whether streams go on beyond it in more memory, see `Full`.
      value_bits: of values; default: `bits`.
    """

    capacity: int | None = 4096
    window: int | None = None
    sinks: int = 0
    bits: int = 4
    group: int = 32
    residual: int = 128
    half_groups: bool = False
    edge: str = "step"
    positions: str = "cache"
    grows: bool = False
    value_bits: int | None = None
    state_type: ClassVar[type] = QuantizedState

    def __post_init__(self):
        if (self.capacity is None) == (self.window is None):
            raise UserError(
                f"give capacity or window, the other one None, got capacity={self.capacity}, "
                f"window={self.window}"
            )
        for name in ("capacity", "window"):
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name))
        check_choice(self.edge, ("step", "call"), "edge")
        check_choice(self.positions, ("absolute", "cache"), "positions")
        for name in ("bits", "value_bits"):
            if getattr(self, name) not in BITS and (name == "bits" or self.value_bits is not None):
                raise UserError(f"{name} must be one of {BITS}, got {getattr(self, name)!r}")
        if check_positive("residual", self.residual) % check_positive("group", self.group):
            raise UserError(f"residual must be a multiple of group={self.group}, got {self.residual}")
        check_at_least("sinks", self.sinks, 0)
        if self.grows and self.window is not None:
            raise UserError(f"grows changes nothing where a window of {self.window} steps is kept")
        # Where nothing is told apart, both spellings are one policy.
        if not self.sinks or self.window is None:
            object.__setattr__(self, "positions", "cache")
        if self.value_bits == self.bits:
            object.__setattr__(self, "value_bits", None)

    def __str__(self) -> str:
        held = f"full({self.capacity})" if self.window is None else f"window({self.window})"
        options = {
            "group": (self.group, 32),
            "residual": (self.residual, 128),
            "values": (self.v_bits, self.bits),
            "half_groups": (int(self.half_groups), 0),
            "edge": (self.edge, "step"),
        }
        changed = ", ".join(f"{name}={value}" for name, (value, usual) in options.items() if value != usual)
        words = [f"sinks({self.sinks})"] if self.sinks else []
        words += [held, f"int{self.bits}" + (f"({changed})" if changed else "")]
        words += ["absolute"] if self.positions == "absolute" else []
        return "+".join(words + (["grows"] if self.grows else []))

    @property
    def exact(self) -> bool:
        """Whether streams equal the parallel form, which quantizes too."""
        return self.edge == "step"

    @property
    def v_bits(self) -> int:
        """Bits of a value."""
        return self.bits if self.value_bits is None else self.value_bits

    @property
    def span(self) -> int:
        return self.sinks + (self.capacity - self.sinks if self.window is None else self.window)

    @property
    def reach(self) -> int | None:
        return None if self.grows or self.positions == "absolute" else self.span

    @property
    def slots(self) -> int:
        """Quantized steps that are held at most: whole blocks of `residual`."""
        steps = self.window - 1 if self.window is not None else self.capacity - self.sinks
        return max(1, -(-steps // self.residual)) * self.residual

    def init_state(
        self,
        batch: int,
        kv_heads: int,
        width: int,
        dtype: jax.typing.DTypeLike,
        v_width: int | None = None,
    ) -> QuantizedState:
        v_width = width if v_width is None else v_width
        lead, kind = (batch, kv_heads), jnp.float16 if self.half_groups else dtype

        def coded(width: int, bits: int, groups: tuple[int, int]) -> Coded:
            if width * bits % 32:
                raise UserError(f"a head of {width} channels must fill words of 32 bits, got int{bits}")
            words = jnp.zeros((*lead, width * bits // 32, self.slots), jnp.uint32)
            return Coded(words, jnp.zeros((*lead, *groups), kind), jnp.zeros((*lead, *groups), kind))

        if v_width % self.group:
            raise UserError(f"group must divide the {v_width} channels of a head's values, got {self.group}")
        return QuantizedState(
            jnp.zeros((*lead, self.sinks, width), dtype),
            jnp.zeros((*lead, self.sinks, v_width), dtype),
            coded(width, self.bits, (self.slots // self.group, width)),
            coded(v_width, self.v_bits, (v_width // self.group, self.slots)),
            jnp.zeros((*lead, self.residual, width), dtype),
            jnp.zeros((*lead, self.residual, v_width), dtype),
            jnp.zeros((batch,), jnp.int32),
        )

    def __call__(
        self,
        q: Queries,
        k: Keys,
        v: Values,
        state: QuantizedState | None,
        reset: Steps | None,
        valid: Steps | None,
        scores: Scores,
    ) -> tuple[Float[Array, "b t h v"], LogSumExp, QuantizedState | None]:
        streaming, unturned = state is not None, q
        if not streaming:
            fresh = self.init_state(q.shape[0], k.shape[2], k.shape[3], k.dtype, v.shape[3])
            state = self.resize(fresh, self.residual)
        where = segments(q.shape[:2], state.length, reset, valid)
        q, k = scores.rotary(q, where.positions), scores.rotary(k, where.positions)
        if streaming and q.shape[1] == 1 and reset is None:
            new = self._stored_one(state, k[:, 0], v[:, 0], where)
            parts = self._one_query(q, unturned, k, v, state, where, scores)
        else:
            recent = self._recent(state, k, v, where)
            new = self._stored(state, recent, where) if streaming else None
            first_call = (state.length == 0)[:, None, None]
            whole = first_call if self.edge == "call" and streaming else jnp.zeros((1, 1, 1), bool)
            place, limits = where.positions - self.sinks, {"residual": self.residual, "window": self.window}
            parts = [attend_recent(q, place, where, recent, whole, scores, **limits)]
            if streaming:
                parts.append(self._attend_coded(q, state, where, scores))
            if self.sinks:
                first = new if streaming and reset is None else None
                at = self._sink_queries(unturned, q, where, scores)
                parts.append(self._attend_sinks(at, k, v, state, first, where, scores))
        out, lse = functools.reduce(lambda a, b: merge(*a, *b), parts)
        out = only_valid(out, where)
        held = self.held(state) if streaming else self.slots
        if self.window is None or held < self.slots:
            out, lse = beyond_is_nan(out, lse, where.positions >= held + self.sinks)
        return out, lse, new

    @property
    def all_slots(self) -> int:
        return self.slots

    def held(self, state: QuantizedState) -> int:
        return state.k.words.shape[3]

    def slots_for(self, steps: int) -> int:
        return -(-slots_for(max(1, steps), self.slots, self.grows) // self.residual) * self.residual

    def resize(self, state: QuantizedState, slots: int) -> QuantizedState:
        k, v, groups = state.k, state.v, slots // self.group
        return state._replace(
            k=Coded(resized(k.words, slots, 3), *(resized(x, groups, 2) for x in (k.scale, k.least))),
            v=Coded(*(resized(x, slots, 3) for x in v)),
        )

    def rewind(self, state: QuantizedState, steps: Int[Array, " b"]) -> QuantizedState:
        """The state `steps` steps ago; ValueError once steps have been quantized: of the first `residual`
        behind the sinks none is."""
        length = earlier(state, steps)
        if bool(jnp.any((self._ends(state)[1] > 0) & (length < state.length)[:, None])):
            raise UserError(
                f"steps={jnp.asarray(steps).tolist()} cannot be taken back: {self} has quantized the steps "
                "before them"
            )

        def before(x: Array, first: int) -> Array:
            kept = first + jnp.arange(x.shape[2]) < length[:, None]
            return jnp.where(
                kept[:, None, :, None] | (length == state.length)[:, None, None, None],
                x,
                jnp.zeros((), x.dtype),
            )

        sinks = before(state.sink_k, 0), before(state.sink_v, 0)
        rest = before(state.rest_k, self.sinks), before(state.rest_v, self.sinks)
        return state._replace(sink_k=sinks[0], sink_v=sinks[1], rest_k=rest[0], rest_v=rest[1], length=length)

    # --- what is seen

    def _ends(self, state: QuantizedState) -> tuple[Array, Array]:
        """[b, 1]: steps behind the sinks that were seen, and how many of their keys are quantized."""
        seen = jnp.maximum(state.length - self.sinks, 0)[:, None]
        return seen, seen // self.residual * self.residual

    def _recent(self, state: QuantizedState, k: Keys, v: Values, where: Segments) -> Recent:
        """The last `residual` steps that were seen, and the chunk."""
        coded = self._ends(state)[1]
        old_k, old = self._recent_keys(state)
        places = jnp.concatenate([old, where.positions - self.sinks], axis=1)
        ids = jnp.concatenate([jnp.where(old >= 0, 1, 0), where.ids], axis=1)
        k_all = jnp.concatenate([old_k.swapaxes(1, 2).astype(k.dtype), k], axis=1)
        v_all = jnp.concatenate([state.rest_v.swapaxes(1, 2).astype(v.dtype), v], axis=1)
        open_ = (ids > 0) & (places >= jnp.where(ids == 1, coded, 0)) & (places >= 0)
        groups = self._key_groups(k_all, self._group_index(places, ids, coded), open_)
        coded_k = decode(encode(k_all, groups, self.bits), groups).astype(k.dtype)
        codes, value_groups = quantize(v_all, self.group, self.v_bits)
        return Recent(
            k_all,
            jnp.where(open_[..., None, None], coded_k, k_all),
            v_all,
            dequantize(codes, self._kept(value_groups)).astype(v.dtype),
            groups,
            places,
            ids,
            open_,
        )

    def _group_index(self, places: Array, ids: Array, coded: Array) -> Array:
        """[b, e]: the number of the group in the list: those of the carried sequence first, then those of the
        documents that follow."""
        carried = (places - coded) // self.group
        count = places.shape[1] // self.group + 2
        later = count + jnp.cumsum((ids > 1) & (places % self.group == 0) & (places >= 0), axis=1)
        return jnp.where(ids == 1, carried, later)

    def _key_groups(self, k: Array, index: Array, mine: Array) -> Groups:
        """Scale and least value of the group of each entry, [b, e, g, k]."""
        count = index.shape[1] // self.group + 3 + index.shape[1]
        index = jnp.where(mine, index, count)  # dropped
        rows = jnp.arange(k.shape[0])[:, None]
        acc = k.astype(accumulator(k.dtype))
        shape = (k.shape[0], count, *k.shape[2:])
        least = jnp.full(shape, jnp.inf, acc.dtype).at[rows, index].min(acc, mode="drop")
        greatest = jnp.full(shape, -jnp.inf, acc.dtype).at[rows, index].max(acc, mode="drop")
        found = jnp.isfinite(least)
        groups = groups_of(jnp.where(found, least, 0), jnp.where(found, greatest, 0), self.bits)
        index = jnp.minimum(index, count - 1)
        return self._kept(Groups(*(x[rows, index] for x in groups)))

    def _kept(self, groups: Groups) -> Groups:
        """As precise as they are stored."""
        if not self.half_groups:
            return groups
        return Groups(*(x.astype(jnp.float16).astype(x.dtype) for x in groups))

    def _coded_places(self, state: QuantizedState) -> Int[Array, "b s"]:
        """The newest step whose key is quantized in each slot; below 0 for none."""
        coded, slots = self._ends(state)[1], self.held(state)
        return coded - 1 - (coded - 1 - jnp.arange(slots)[None]) % slots

    def _attend_coded(self, q: Queries, state: QuantizedState, where: Segments, scores: Scores) -> Partial:
        """Attention over the steps before the residual, of which every query sees key and value quantized."""
        seen, places, acc = self._ends(state)[0], self._coded_places(state), accumulator(q.dtype)
        here = (places >= 0) & (places < seen - self.residual)
        k = keys_of(state.k, self.bits, acc).swapaxes(1, 2).astype(q.dtype)
        v = values_of(state.v, self.v_bits, acc).swapaxes(1, 2).astype(q.dtype)
        positions = jnp.where(here, places + self.sinks, NEVER)
        span = Span(k, v, positions, here.astype(jnp.int32))
        limits = {} if self.window is None else {"window": self.window}
        return attend(q, where.positions, where, span, scores, **limits)

    def _sink_queries(self, unturned: Queries, turned: Queries, where: Segments, scores: Scores) -> Queries:
        """The queries as they see the sinks."""
        if self.positions == "absolute" or self.window is None:
            return turned
        start = jnp.full(where.length.shape, self.sinks)
        place = place_in_cache(where.positions, where.ids, start, self.sinks, self.window)
        return scores.rotary(unturned, place)

    def _attend_sinks(
        self,
        q: Queries,
        k: Keys,
        v: Values,
        state: QuantizedState,
        new: QuantizedState | None,
        where: Segments,
        scores: Scores,
    ) -> Partial:
        """Attention over the sinks: those of `new`, where they lie by themselves; else those that are stored
        and those of the chunk."""
        at = jnp.broadcast_to(jnp.arange(self.sinks), (q.shape[0], self.sinks))

        def stored(state: QuantizedState) -> Span:
            k, v = (x.swapaxes(1, 2) for x in (state.sink_k, state.sink_v))
            here = at < state.length[:, None]
            return Span(k, v, jnp.where(here, at, NEVER), here.astype(jnp.int32))

        if new is not None:
            return attend(q, where.positions, where, stored(new)._replace(segments=None), scores)
        chunk = new_span(k, v, where)
        chunk = chunk._replace(positions=jnp.where(chunk.positions < self.sinks, chunk.positions, NEVER))
        return attend(q, where.positions, where, joined(stored(state), chunk), scores)

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
    ) -> list[Partial]:
        """The same attention without dequantizing a cache: steps of which key and value are quantized by
        `kernels.decode_attention` from their codes, and those of which one is exact."""
        seen, same = self._ends(state)[0], where.ids == 1
        places = self._coded_places(state)
        see = same & (places >= 0) & (places < seen - self.residual) & self._near(seen - places)
        parts = [decode_attention(q[:, 0], state.k, state.v, see, v_bits=self.v_bits, **scores.limits)]
        recent_k, at = self._recent_keys(state)
        k = jnp.concatenate([recent_k.astype(k.dtype), k.swapaxes(1, 2)], axis=2)
        v = jnp.concatenate([state.rest_v.astype(v.dtype), v.swapaxes(1, 2)], axis=2)
        see = jnp.concatenate([same & (at >= 0) & self._near(seen - at), where.ids > 0], axis=1)
        parts.append(decode_attention(q[:, 0], k, v, see, **scores.limits))
        if self.sinks:
            see = same & (jnp.arange(self.sinks)[None] < state.length[:, None])
            at_place = self._sink_queries(unturned, q, where, scores)[:, 0]
            parts.append(decode_attention(at_place, state.sink_k, state.sink_v, see, **scores.limits))
        return [(out[:, None], lse[:, None]) for out, lse in parts]

    def _near(self, distance: Int[Array, "b s"]) -> Bool[Array, "b s"]:
        return jnp.ones_like(distance, bool) if self.window is None else distance < self.window

    def _recent_keys(self, state: QuantizedState) -> tuple[Float[Array, "b g r k"], Int[Array, "b r"]]:
        """The keys of the steps whose values lie in the residual, and the steps. Those before the last
        multiple of `residual` are coded, in the block before it, as far from its start as their values from
        that of the ring."""
        seen, coded = self._ends(state)
        at = coded + jnp.arange(self.residual)[None]
        exact = at < seen
        begin = (coded[:, 0] - self.residual) % self.held(state)

        def block(x: Array, begin: Array, size: int, axis: int) -> Array:
            return jax.vmap(lambda x, n: jax.lax.dynamic_slice_in_dim(x, n, size, axis))(x, begin)

        count = self.residual // self.group
        groups = (block(x, begin // self.group, count, 1) for x in state.k[1:])
        keys = keys_of(
            Coded(block(state.k.words, begin, self.residual, 2), *groups),
            self.bits,
            accumulator(state.rest_k.dtype),
        )
        keys = jnp.where(exact[:, None, :, None], state.rest_k, keys.astype(state.rest_k.dtype))
        return keys, jnp.where(exact, at, at - self.residual)

    # --- what is stored

    def _stored(self, state: QuantizedState, recent: Recent, where: Segments) -> QuantizedState:
        carried = (where.last == 1)[:, None]
        length = where.length
        seen = jnp.maximum(length - self.sinks, 0)[:, None]
        coded = seen // self.residual * self.residual
        u, current = recent.places, (recent.segments == where.last[:, None]) & (recent.segments > 0)
        old = jnp.arange(u.shape[1])[None] < self.residual
        slots = self.held(state)
        key_here = current & recent.open_

        def put(x: Array, values: Array, slots: Array, keep: Array, last: bool = False) -> Array:
            """x [b, g, s, .], or [b, g, ., s] where slots come `last`, with values [b, e, g, .] in their
            slots."""
            x = jnp.where(carried[..., None, None], x, jnp.zeros((), x.dtype))
            if not x.size:
                return x  # no sinks
            slots = jnp.where(keep, slots, x.shape[3 if last else 2])[:, None]
            rows, heads = jnp.arange(x.shape[0])[:, None, None], jnp.arange(x.shape[1])[:, None]
            index = (rows, heads, slice(None), slots) if last else (rows, heads, slots)
            return x.at[index].set(values.swapaxes(1, 2).astype(x.dtype), mode="drop")

        def packed(codes: Array, bits: int) -> Array:
            return words_of(codes[..., None], bits)[..., 0]

        newest_k, newest_v = u >= coded, u >= seen - self.residual
        codes = encode(recent.k, recent.groups, self.bits)
        flush_k = key_here & (u < coded) & (u >= coded - slots)
        ends = flush_k & (u % self.group == self.group - 1)
        v_codes, v_groups = quantize(recent.v, self.group, self.v_bits)
        flush_v = current & (u >= 0) & (u < seen - self.residual) & (u >= seen - self.residual - slots)
        first = current & (u < 0) & ~old
        slot, ring = u % slots, u % self.residual
        rest_k = put(state.rest_k, recent.k, ring, key_here & newest_k & ~old)
        held = (coded + jnp.arange(self.residual)[None] < seen)[
            :, None, :, None
        ]  # what was coded leaves nothing behind
        k_groups = (
            put(x, y, slot // self.group, ends) for x, y in zip(state.k[1:], recent.groups, strict=True)
        )
        v_parts = zip(state.v, (packed(v_codes, self.v_bits), *v_groups), strict=True)
        return QuantizedState(
            put(state.sink_k, recent.k, u + self.sinks, first),
            put(state.sink_v, recent.v, u + self.sinks, first),
            Coded(put(state.k.words, packed(codes, self.bits), slot, flush_k, last=True), *k_groups),
            Coded(*(put(x, y, slot, flush_v, last=True) for x, y in v_parts)),
            jnp.where(held, rest_k, jnp.zeros((), rest_k.dtype)),
            put(state.rest_v, recent.v, ring, current & (u >= 0) & newest_v & ~old),
            length,
        )

    def _stored_one(self, state: QuantizedState, k: Array, v: Array, where: Segments) -> QuantizedState:
        """The state after one step with key and value [b, g, .]: they go into the residual; the value that is
        displaced there is quantized, and all its keys once they fill it."""
        u, size, slots = where.positions[:, 0] - self.sinks, self.residual, self.held(state)
        here, ring = where.ids[:, 0] > 0, u % size
        sink, behind = here & (u < 0), here & (u >= 0)
        fills = behind & (ring == size - 1)
        old_v = jnp.take_along_axis(state.rest_v, ring[:, None, None, None], axis=2)
        codes, groups = quantize(old_v, self.group, self.v_bits)
        coded_v = (
            words_of(codes.swapaxes(2, 3), self.v_bits),
            *(x.swapaxes(2, 3) for x in self._kept(groups)),
        )
        displaced, oldest = behind & (u >= size), (u - size) % slots
        rest_k = put_slot(state.rest_k, k, ring, behind)
        parts = rest_k.reshape(*rest_k.shape[:2], -1, self.group, rest_k.shape[3])
        groups = self._kept(groups_of(parts.min(3), parts.max(3), self.bits))
        codes = encode(parts, Groups(*(x[:, :, :, None] for x in groups)), self.bits).reshape(rest_k.shape)
        words, first = words_of(codes.swapaxes(2, 3), self.bits), (u - size + 1) % slots
        coded_k = Coded(
            put_slots(state.k.words, words, first, fills, 3),
            *(
                put_slots(x, y, first // self.group, fills, 2)
                for x, y in zip(state.k[1:], groups, strict=True)
            ),
        )
        return QuantizedState(
            put_slot(state.sink_k, k, u + self.sinks, sink),
            put_slot(state.sink_v, v, u + self.sinks, sink),
            coded_k,
            Coded(*(put_slots(x, y, oldest, displaced, 3) for x, y in zip(state.v, coded_v, strict=True))),
            jnp.where(fills[:, None, None, None], jnp.zeros((), rest_k.dtype), rest_k),
            put_slot(state.rest_v, v, ring, behind),
            where.length,
        )
