"""Policies side by side: some heads remember everything, others a window (DuoAttention, arXiv 2410.10819)."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from seqlab.checks import UserError
from seqlab.models.cache.common import Scores
from seqlab.models.cache.full import Full
from seqlab.models.cache.policy import Policy
from seqlab.models.cache.window import Window
from seqlab.shapes import Counts, Keys, LogSumExp, Queries, Steps, Values


@dataclasses.dataclass(frozen=True)
class Heads(Policy):
    """Each key/value head, with the queries that share it, has the policy `policies[of[head]]`. The state is
    the policies', in a tuple."""

    policies: tuple[Policy, ...]
    of: tuple[int, ...]

    def __post_init__(self):
        if not self.policies or sorted(set(self.of)) != list(range(len(self.policies))):
            raise UserError(
                f"of must name each of the {len(self.policies)} policies by its index, got {self.of}"
            )

    @property
    def exact(self) -> bool:
        return all(policy.exact for policy in self.policies)

    @property
    def capacity(self) -> int | None:
        return min((policy.end for policy in self.policies if policy.end is not None), default=None)

    @property
    def span(self) -> int:
        return max(policy.span for policy in self.policies)

    @property
    def reach(self) -> int | None:
        reaches = [policy.reach for policy in self.policies]
        return None if None in reaches else max(reaches)

    def __str__(self) -> str:
        return f"heads({' '.join(map(str, self.of))} | {' | '.join(map(str, self.policies))})"

    def init_state(
        self,
        batch: int,
        kv_heads: int,
        width: int,
        dtype: jax.typing.DTypeLike,
        v_width: int | None = None,
    ) -> tuple[Any, ...]:
        if kv_heads != len(self.of):
            raise UserError(
                f"of must have an entry for each of the {kv_heads} key/value heads, got {self.of}"
            )
        return tuple(
            policy.init_state(batch, self.of.count(i), width, dtype, v_width)
            for i, policy in enumerate(self.policies)
        )

    def __call__(
        self,
        q: Queries,
        k: Keys,
        v: Values,
        state: tuple[Any, ...] | None,
        reset: Steps | None,
        valid: Steps | None,
        scores: Scores,
    ) -> tuple[Float[Array, "b t h v"], LogSumExp, tuple[Any, ...] | None]:
        if k.shape[2] != len(self.of):
            raise UserError(
                f"of must have an entry for each of the {k.shape[2]} key/value heads, got {self.of}"
            )
        group, outs, lses, new, order = q.shape[2] // k.shape[2], [], [], [], []
        for i, policy in enumerate(self.policies):
            mine = [head for head, choice in enumerate(self.of) if choice == i]
            queries = [head * group + member for head in mine for member in range(group)]
            index, own = jnp.asarray(mine), None if state is None else state[i]
            out, lse, own = policy(
                q[:, :, jnp.asarray(queries)], k[:, :, index], v[:, :, index], own, reset, valid, scores
            )
            outs, lses, new, order = [*outs, out], [*lses, lse], [*new, own], order + queries
        back = jnp.asarray(sorted(range(len(order)), key=order.__getitem__))
        out, lse = (jnp.concatenate(parts, axis=2)[:, :, back] for parts in (outs, lses))
        return out, lse, None if state is None else tuple(new)

    def with_room(self, state: tuple[Any, ...], steps: int) -> tuple[Any, ...]:
        pairs = zip(self.policies, state, strict=True)
        return tuple(policy.with_room(own, steps) for policy, own in pairs)

    def make_room(self, state: tuple[Any, ...], steps: Counts) -> tuple[Any, ...]:
        pairs = zip(self.policies, state, strict=True)
        return tuple(policy.make_room(own, steps) for policy, own in pairs)

    def adopt(self, state: tuple[Any, ...]) -> tuple[Any, ...]:
        self.check(state)
        return tuple(policy.adopt(own) for policy, own in zip(self.policies, state, strict=True))

    def check(self, state: tuple[Any, ...]) -> None:
        if not isinstance(state, tuple) or len(state) != len(self.policies):
            raise UserError(
                f"state is not that of {self}, one for each of its caches: it was made by another"
            )
        for policy, own in zip(self.policies, state, strict=True):
            policy.check(own)

    def compact(self, state: tuple[Any, ...], steps: int) -> tuple[Any, ...]:
        pairs = zip(self.policies, state, strict=True)
        return tuple(policy.compact(own, steps) for policy, own in pairs)

    def rewind(self, state: tuple[Any, ...], steps: Counts) -> tuple[Any, ...]:
        """The state `steps` steps ago; ValueError where one of the policies no longer has it."""
        return tuple(policy.rewind(own, steps) for policy, own in zip(self.policies, state, strict=True))


def duo(
    retrieval: Sequence[bool],
    *,
    capacity: int,
    sinks: int = 64,
    window: int = 257,
    positions: str = "absolute",
    edge: str = "step",
) -> Full | Window | Heads:
    """DuoAttention's cache of a layer: retrieval heads keep all, streaming heads `sinks` and a `window`, the
    query's own key included, at the `positions` of the stream as published: retrieval heads end it at the
    trained length anyway."""
    full, streaming = Full(capacity), Window(window, sinks, positions=positions, edge=edge)
    if all(retrieval) or not any(retrieval):
        return full if all(retrieval) else streaming
    return Heads((full, streaming), tuple(0 if kept else 1 for kept in retrieval))
