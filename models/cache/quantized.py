"""A cache in few bits: old keys coded per channel, old values per token, the newest exact (KIVI, arXiv
2402.02750)."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from seqlab.checks import UserError, check_choice, check_positive
from seqlab.kernels import decode_attention
from seqlab.kernels.attention import merge
from seqlab.kernels.decode_attention import BITS, Coded, keys_of, values_of, words_of
from seqlab.models.cache.common import Rotary, earlier
from seqlab.models.cache.quantize import Groups, decode, dequantize, encode, groups_of, quantize
from seqlab.shapes import Keys, LogSumExp, Queries, Steps, Values, accumulator
from seqlab.state import Segments, segments


class QuantizedState(NamedTuple):
    """`sink_k`, `sink_v` [b, g, sinks, k]: the first steps, exact. `k`, `v`: packed codes [b, g, words, s] by
    slot, with scale and least value [b, g, s / group, k] of keys, over steps, and [b, g, k / group, s] of
    values, over channels. `rest_k`, `rest_v` [b, g, residual, k]: the newest steps, exact, in a ring.
    `length` [b]: steps seen."""

    sink_k: Float[Array, "b g n k"]
    sink_v: Float[Array, "b g n k"]
    k: Coded
    v: Coded
    rest_k: Float[Array, "b g r k"]
    rest_v: Float[Array, "b g r k"]
    length: Int[Array, " b"]


class _Part(NamedTuple):
    """Keys and values [b, e, g, k], exact and as they are coded, that stand at `places` [b, e] behind the
    sinks (below 0: a sink)."""

    k: Array | None
    coded_k: Array
    v: Array
    coded_v: Array
    places: Array
    segments: Array  # [b, e], 0 for nothing


@dataclasses.dataclass(frozen=True)
class Quantized:
    """KIVI: what a query sees of the step u behind the sinks, standing at step t: the key exactly from the
    last multiple of `residual` up to t on, the value exactly where u >= t - residual, both coded in `bits`
    otherwise. Sinks are always exact.

    Every query sees what it would see step by step, so the law holds, and a prompt may be cut anywhere. A
    call of one step leaves codes to `kernels.decode_attention`, which makes numbers of them as it reads them;
    longer calls make numbers of all that is stored first.

    Args:
      capacity: steps that the cache holds; None with a window.
      window: W, the last keys that a query sees besides the sinks, its own included: constant memory.
      bits: 2, 4 or 8, of keys and values.
      group: steps of a channel (keys), channels of a step (values) that share a scale and a least value.
      residual: a multiple of `group`.
      half_groups: keep scales and least values in float16, as published code does with half-precision models.
      edge: "call" reproduces the published prefill: the first call of a sequence sees itself exactly.
    """

    capacity: int | None = 4096
    window: int | None = None
    sinks: int = 0
    bits: int = 4
    group: int = 32
    residual: int = 128
    half_groups: bool = False
    edge: str = "step"

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
        if self.bits not in BITS:
            raise UserError(f"bits must be one of {BITS}, got {self.bits!r}")
        if check_positive("residual", self.residual) % check_positive("group", self.group):
            raise UserError(f"residual must be a multiple of group={self.group}, got {self.residual}")
        if isinstance(self.sinks, bool) or not isinstance(self.sinks, int) or self.sinks < 0:
            raise UserError(f"sinks must be an integer of at least 0, got {self.sinks!r}")

    def __str__(self) -> str:
        held = f"full({self.capacity})" if self.window is None else f"window({self.window})"
        return (f"sinks({self.sinks})+" if self.sinks else "") + f"{held}+int{self.bits}"

    @property
    def exact(self) -> bool:
        """Whether streams equal the parallel form, which codes too."""
        return self.edge == "step"

    @property
    def span(self) -> int:
        """How many steps it remembers at most."""
        return self.sinks + (self.capacity - self.sinks if self.window is None else self.window)

    @property
    def slots(self) -> int:
        """Coded steps that are held: whole blocks of `residual`."""
        steps = self.window - 1 if self.window is not None else self.capacity - self.sinks
        return max(1, -(-steps // self.residual)) * self.residual

    def init_state(
        self, batch: int, kv_heads: int, width: int, dtype: jax.typing.DTypeLike
    ) -> QuantizedState:
        if width % self.group or width * self.bits % 32:
            raise UserError(
                f"group must divide the {width} channels of a head, which must fill words of 32 bits, got "
                f"{self.group}"
            )
        lead, kind = (batch, kv_heads), jnp.float16 if self.half_groups else dtype
        exact = jnp.zeros((*lead, self.sinks, width), dtype), jnp.zeros((*lead, self.residual, width), dtype)
        words = jnp.zeros((*lead, width * self.bits // 32, self.slots), jnp.uint32)
        shared = (
            jnp.zeros((*lead, self.slots // self.group, width), kind),
            jnp.zeros((*lead, width // self.group, self.slots), kind),
        )
        k, v = (Coded(words, x, x) for x in shared)
        return QuantizedState(exact[0], exact[0], k, v, exact[1], exact[1], jnp.zeros((batch,), jnp.int32))

    def __call__(
        self,
        q: Queries,
        k: Keys,
        v: Values,
        state: QuantizedState | None,
        reset: Steps | None,
        valid: Steps | None,
        rotary: Rotary,
    ) -> tuple[Float[Array, "b t h v"], LogSumExp, QuantizedState | None]:
        streaming = state is not None
        state = state if streaming else self.init_state(q.shape[0], *k.shape[2:], k.dtype)
        where = segments(q.shape[:2], state.length, reset, valid)
        q, k = rotary(q, where.positions), rotary(k, where.positions)
        entries, groups, own = self._entries(state, k, v, where)
        if streaming and q.shape[1] == 1:
            out, lse = self._one_query(q, k, v, state, where)
        else:
            parts = [entries._replace(segments=jnp.where(own, entries.segments, 0))]
            if streaming:
                parts += [self._coded(state), self._first(state)]
            whole = self.edge == "call" and streaming
            out, lse = self._attend(
                q, where, parts, (state.length == 0)[:, None, None] if whole else jnp.zeros((1, 1, 1), bool)
            )
        if self.window is None:
            beyond = (where.positions >= self.slots + self.sinks)[:, :, None]
            out, lse = (
                jnp.where(beyond[..., None] & (where.ids > 0)[:, :, None, None], jnp.nan, out),
                jnp.where(beyond, jnp.nan, lse),
            )
        return out, lse, (self._stored(state, entries, groups, where) if streaming else None)

    def rewind(self, state: QuantizedState, steps: Int[Array, " b"]) -> QuantizedState:
        """The state `steps` steps ago; ValueError once steps have been coded: of the first `residual` behind
        the sinks none is."""
        length = earlier(state, steps)
        if bool(jnp.any((self._ends(state)[1] > 0) & (length < state.length)[:, None])):
            raise UserError(
                f"steps={jnp.asarray(steps).tolist()} cannot be taken back: {self} has coded the steps "
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
        """[b, 1]: steps behind the sinks that were seen, and how many of their keys are coded."""
        seen = jnp.maximum(state.length - self.sinks, 0)[:, None]
        return seen, seen // self.residual * self.residual

    def _entries(
        self, state: QuantizedState, k: Keys, v: Values, where: Segments
    ) -> tuple[_Part, Groups, Array]:
        """The residual and the chunk as one list, the groups that each one's key is coded by, and whether its
        key lies here at all: of the oldest values in the residual the keys are among the codes already."""
        (seen, coded), r = self._ends(state), jnp.arange(self.residual)[None]
        old = jnp.where(
            coded + r < seen, coded + r, coded + r - self.residual
        )  # the step whose value lies in slot r of the ring
        places = jnp.concatenate([old, where.positions - self.sinks], axis=1)
        ids = jnp.concatenate([jnp.where(old >= 0, 1, 0), where.ids], axis=1)
        k_all, v_all = (
            jnp.concatenate([x.swapaxes(1, 2).astype(y.dtype), y], axis=1)
            for x, y in ((state.rest_k, k), (state.rest_v, v))
        )
        mine = (ids > 0) & (places >= jnp.where(ids == 1, coded, 0)) & (places >= 0)
        index = self._group_index(places, ids, coded)
        groups = self._key_groups(k_all, index, mine)
        coded_k = decode(encode(k_all, groups, self.bits), groups)
        codes, value_groups = quantize(v_all, self.group, self.bits)
        value_groups = self._kept(value_groups)
        part = _Part(
            k_all,
            coded_k.astype(k.dtype),
            v_all,
            dequantize(codes, value_groups).astype(v.dtype),
            places,
            ids,
        )
        fresh = jnp.arange(places.shape[1])[None] >= self.residual
        return part, groups, mine | (fresh & (ids > 0))

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
        wide = k.astype(accumulator(k.dtype))
        shape = (k.shape[0], count, *k.shape[2:])
        least = jnp.full(shape, jnp.inf, wide.dtype).at[rows, index].min(wide, mode="drop")
        greatest = jnp.full(shape, -jnp.inf, wide.dtype).at[rows, index].max(wide, mode="drop")
        found = jnp.isfinite(least)
        groups = groups_of(jnp.where(found, least, 0), jnp.where(found, greatest, 0), self.bits)
        index = jnp.minimum(index, count - 1)
        return self._kept(Groups(*(x[rows, index] for x in groups)))

    def _kept(self, groups: Groups) -> Groups:
        """As precise as they are stored."""
        return (
            Groups(*(x.astype(jnp.float16).astype(x.dtype) for x in groups)) if self.half_groups else groups
        )

    def _coded(self, state: QuantizedState) -> _Part:
        """What lies in the slots: keys from their codes, values from theirs or, where they are still exact,
        from the residual."""
        (seen, _), places, wide = (
            self._ends(state),
            self._coded_places(state),
            accumulator(state.rest_k.dtype),
        )
        k, v = keys_of(state.k, self.bits, wide), values_of(state.v, self.bits, wide)
        fresh = (places >= seen - self.residual)[:, None, :, None]
        rest = jnp.take_along_axis(state.rest_v, (places % self.residual)[:, None, :, None], axis=2).astype(
            wide
        )
        codes, groups = quantize(rest, self.group, self.bits)
        coded_v = jnp.where(fresh, dequantize(codes, self._kept(groups)), v)
        k, v, coded_v = (
            x.swapaxes(1, 2).astype(state.rest_k.dtype) for x in (k, jnp.where(fresh, rest, v), coded_v)
        )
        return _Part(None, k, v, coded_v, places, jnp.where(places >= 0, 1, 0))

    def _coded_places(self, state: QuantizedState) -> Int[Array, "b s"]:
        """The newest step whose key is coded in each slot; below 0 for none."""
        coded = self._ends(state)[1]
        return coded - 1 - (coded - 1 - jnp.arange(self.slots)[None]) % self.slots

    def _first(self, state: QuantizedState) -> _Part:
        """The sinks that are stored."""
        places = jnp.broadcast_to(jnp.arange(-self.sinks, 0)[None], (state.length.shape[0], self.sinks))
        k, v = (x.swapaxes(1, 2) for x in (state.sink_k, state.sink_v))
        return _Part(k, k, v, v, places, jnp.where(places + self.sinks < state.length[:, None], 1, 0))

    def _attend(self, q: Queries, where: Segments, parts: list[_Part], whole: Array) -> tuple[Array, Array]:
        """Dense attention over the parts, each key and value as the query sees it, or exactly in the rows
        where `whole` [b, 1, 1]."""
        b, t, h, width = q.shape
        g, wide = parts[0].v.shape[2], accumulator(q.dtype)
        queries = q.reshape(b, t, g, h // g, width)
        place = (where.positions - self.sinks)[:, :, None]
        logits, exact_v = [], []
        for part in parts:
            u = part.places[:, None, :]
            see = (
                (part.segments[:, None, :] == where.ids[:, :, None])
                & (where.ids > 0)[:, :, None]
                & (u <= place)
            )
            if self.window is not None:
                see = see & ((place - u < self.window) | (u < 0))
            x = _scores(queries, part.coded_k, wide)
            if part.k is not None:
                exact = whole | (u < 0) | (u >= place // self.residual * self.residual)
                x = jnp.where(exact[:, None, None], _scores(queries, part.k, wide), x)
            logits.append(jnp.where(see[:, None, None], x, -jnp.inf))
            exact_v.append(whole | (u < 0) | (u >= place - self.residual))
        x = jnp.concatenate(logits, axis=-1)
        top = jax.lax.stop_gradient(jnp.maximum(x.max(-1, keepdims=True), jnp.finfo(wide).min))
        p = jnp.exp(x - top)
        total = p.sum(-1, keepdims=True)
        p, out, begin = p / jnp.where(total == 0, 1, total), 0, 0
        for part, exact in zip(parts, exact_v, strict=True):
            piece, begin = p[..., begin : begin + exact.shape[2]], begin + exact.shape[2]
            for weight, values in ((exact, part.v), (~exact, part.coded_v)):
                clean = jnp.where((part.segments > 0)[:, :, None, None], values, 0).astype(
                    wide
                )  # 0 * NaN is NaN
                out = out + jnp.einsum("bgrts,bsgv->btgrv", jnp.where(weight[:, None, None], piece, 0), clean)
        lse = jnp.where(total == 0, -jnp.inf, top + jnp.log(jnp.where(total == 0, 1, total)))
        lse = jnp.moveaxis(lse[..., 0], 3, 1).reshape(b, t, h)
        return out.reshape(b, t, h, -1).astype(q.dtype), lse

    # --- one step

    def _one_query(
        self, q: Queries, k: Keys, v: Values, state: QuantizedState, where: Segments
    ) -> tuple[Array, Array]:
        """What `_attend` gives, without making numbers of a cache: steps of which key and value are coded by
        `kernels.decode_attention` from their codes, merged with those of which one is exact."""
        seen, same = self._ends(state)[0], where.ids == 1
        places = self._coded_places(state)
        see = same & (places >= 0) & (places < seen - self.residual) & self._near(seen - places)
        old = decode_attention(q[:, 0], state.k, state.v, see)
        recent_k, at = self._recent_keys(state)
        parts = (state.sink_k, recent_k, k.swapaxes(1, 2)), (state.sink_v, state.rest_v, v.swapaxes(1, 2))
        k, v = (jnp.concatenate([x.astype(part[2].dtype) for x in part], axis=2) for part in parts)
        first = jnp.arange(self.sinks)[None] < state.length[:, None]
        see = jnp.concatenate([same & first, same & (at >= 0) & self._near(seen - at), where.ids > 0], axis=1)
        new = decode_attention(q[:, 0], k, v, see)
        return merge(*(x[:, None] for x in (*old, *new)))

    def _near(self, distance: Int[Array, "b s"]) -> Bool[Array, "b s"]:
        return jnp.ones_like(distance, bool) if self.window is None else distance < self.window

    def _recent_keys(self, state: QuantizedState) -> tuple[Float[Array, "b g r k"], Int[Array, "b r"]]:
        """The keys of the steps whose values lie in the residual, and the steps. Those before the last
        multiple of `residual` are coded, in the block before it, as far from its start as their values from
        that of the ring."""
        seen, coded = self._ends(state)
        at = coded + jnp.arange(self.residual)[None]
        exact = at < seen
        begin = (coded[:, 0] - self.residual) % self.slots

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

    def _stored(
        self, state: QuantizedState, entries: _Part, groups: Groups, where: Segments
    ) -> QuantizedState:
        carried = (where.last == 1)[:, None]
        length = where.length
        seen = jnp.maximum(length - self.sinks, 0)[:, None]
        coded = seen // self.residual * self.residual
        u, current = entries.places, (entries.segments == where.last[:, None]) & (entries.segments > 0)
        old = jnp.arange(u.shape[1])[None] < self.residual
        _, was_coded = self._ends(state)
        key_here = current & (u >= 0) & (~old | (u >= was_coded))

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

        def packed(codes: Array) -> Array:
            return words_of(codes[..., None], self.bits)[..., 0]

        newest_k, newest_v = u >= coded, u >= seen - self.residual
        codes = encode(entries.k, groups, self.bits)
        flush_k = key_here & (u < coded) & (u >= coded - self.slots)
        ends = flush_k & (u % self.group == self.group - 1)
        v_codes, v_groups = quantize(entries.v, self.group, self.bits)
        flush_v = current & (u >= 0) & (u < seen - self.residual) & (u >= seen - self.residual - self.slots)
        first = current & (u < 0) & ~old
        slot, ring = u % self.slots, u % self.residual
        rest_k = put(state.rest_k, entries.k, ring, key_here & newest_k & ~old)
        held = (coded + jnp.arange(self.residual)[None] < seen)[
            :, None, :, None
        ]  # what was coded leaves nothing behind
        k_groups = (put(x, y, slot // self.group, ends) for x, y in zip(state.k[1:], groups, strict=True))
        v_parts = zip(state.v, (packed(v_codes), *v_groups), strict=True)
        return QuantizedState(
            put(state.sink_k, entries.k, u + self.sinks, first),
            put(state.sink_v, entries.v, u + self.sinks, first),
            Coded(put(state.k.words, packed(codes), slot, flush_k, last=True), *k_groups),
            Coded(*(put(x, y, slot, flush_v, last=True) for x, y in v_parts)),
            jnp.where(held, rest_k, jnp.zeros((), rest_k.dtype)),
            put(state.rest_v, entries.v, ring, current & (u >= 0) & newest_v & ~old),
            length,
        )


def _scores(q: Array, k: Array, wide: jax.typing.DTypeLike) -> Array:
    """Logits [b, g, r, t, e]."""
    return jnp.einsum("btgrk,bsgk->bgrts", q, k, preferred_element_type=wide) * q.shape[-1] ** -0.5
