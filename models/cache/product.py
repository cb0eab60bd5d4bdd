"""A cache as the product of its parts: which steps stay, how they are kept, and which of them a query
reads."""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from seqlab.checks import UserError
from seqlab.models.cache.common import Scores
from seqlab.models.cache.exact import All, Exact
from seqlab.models.cache.parts import Part, Selection, Storage, Word
from seqlab.models.cache.policy import Policy
from seqlab.shapes import Counts, Keys, LogSumExp, Queries, Steps, Values
from seqlab.state import State


class Product(Policy):
    """A policy made of parts: everything that it does, they do.

    A subclass names its `retention`, `storage` and `selection`. Two products of equal parts are equal,
    whatever class writes them down.
    """

    retention: "Retention"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Product) and parts(self) == parts(other)

    def __hash__(self) -> int:
        found = parts(self)
        return hash(found if found[1:] != (Exact(), All()) else found[0])

    @property
    def storage(self) -> Storage:
        return Exact()

    @property
    def selection(self) -> Selection:
        return All()

    @property
    def kept(self) -> Any:
        """The cache that the parts make; ValueError where they do not go together."""
        return _made(self.retention, self.storage, self.selection)

    def __str__(self) -> str:
        kept = self.retention
        words = (kept.text(), self.storage.text(), self.selection.text(), *kept.endings())
        return "+".join(filter(None, words))

    @property
    def exact(self) -> bool:
        return self.retention.edge == "step" and self.storage.exact

    @property
    def span(self) -> int:
        return self.retention.sinks + self.retention.ring

    @property
    def reach(self) -> int | None:
        kept = self.retention
        grows = kept.grows or (kept.positions == "absolute" and kept.sinks and not kept.ends)
        return None if grows else self.span

    @property
    def end(self) -> int | None:
        kept = self.retention
        return self.span if kept.ends and not kept.grows else None

    @property
    def state_type(self) -> type:
        return self.kept.state_type

    @property
    def all_slots(self) -> int:
        return self.kept.all_slots

    def init_state(
        self,
        batch: int,
        kv_heads: int,
        width: int,
        dtype: jax.typing.DTypeLike,
        v_width: int | None = None,
    ) -> State:
        _check_sinks(self.retention, self.storage, self.selection)
        return self.kept.init_state(batch, kv_heads, width, dtype, width if v_width is None else v_width)

    def __call__(
        self,
        q: Queries,
        k: Keys,
        v: Values,
        state: State | None,
        reset: Steps | None,
        valid: Steps | None,
        scores: Scores,
    ) -> tuple[Float[Array, "b t h v"], LogSumExp, State | None]:
        return self.kept.attend(q, k, v, state, reset, valid, scores)

    def held(self, state: State) -> int:
        return self.kept.held(state)

    def slots_for(self, steps: int) -> int:
        return self.kept.slots_for(steps)

    def resize(self, state: State, slots: int) -> State:
        return self.kept.resize(state, slots)

    def rewind(self, state: State, steps: Counts) -> State:
        return self.kept.rewind(state, steps, str(self))

    def make_room(self, state: State, steps: Counts) -> State:
        return state if self.retention is self else self.retention.make_room(state, steps)

    def adopt(self, state: State) -> State:
        if not isinstance(state, self.state_type):
            self.check(state)
        state = self.kept.adopt(state, str(self))
        self.check(state)
        return state


@functools.lru_cache(maxsize=1024)
def _made(retention: "Retention", storage: Storage, selection: Selection) -> Any:
    return selection.over(storage.over(retention))


class Retention(Product, Part):
    """Which steps stay: the first `sinks` of a sequence and, behind them, the last `ring`, each in a slot of
    its own. A retention is itself a cache, the product with exact storage of which all is read.

    A subclass is a frozen dataclass with words, `text` and `ring`, and with as many of the rest as it needs.

    Attributes:
      sinks: first steps that stay visible.
      ends: whether a sequence ends where the slots do; otherwise the oldest step makes room.
      grows: whether a sequence that would end is given more slots instead.
      positions: of the sinks, "cache" or "absolute", see `Window`.
      edge: "step" or "call", see `Window`.
      turn: the most steps of a turn in which nothing is dropped, see `Window`; None for none.
    """

    kind: ClassVar[str] = "retention"
    modifiers: ClassVar[dict[str, Word]] = {
        "sinks": Word("sinks(n)"),
        "absolute": Word("absolute"),
        "in_place": Word("in_place"),
        "grows": Word("grows"),
    }
    sinks: int = 0
    ends: ClassVar[bool] = False
    grows: bool = False
    positions: str = "cache"
    edge: str = "step"
    turn: int | None = None

    @property
    def retention(self) -> "Retention":
        return self

    @property
    def ring(self) -> int:
        """Steps that are kept behind the sinks."""
        raise NotImplementedError

    @property
    def visible(self) -> int | None:
        """How many of the last steps a query sees, its own included; None for all that are kept."""
        return None

    def endings(self) -> tuple[str, ...]:
        """Words that stand behind those of the other parts."""
        return ()

    def apart(self, place: Int[Array, "*n"]) -> Int[Array, "*n"] | None:
        """The number of the group of each step, counted behind the sinks, where steps of different groups do
        not see each other; None where there are no such groups."""
        return None

    def sees(self, query: Int[Array, "..."], key: Int[Array, "..."]) -> Bool[Array, "..."]:
        """Whether a query sees an earlier step, broadcast; both counted behind the sinks."""
        seen = jnp.ones(jnp.broadcast_shapes(query.shape, key.shape), bool)
        if self.visible is not None:
            seen = seen & (query - key < self.visible)
        group = self.apart(key)
        return seen if group is None else seen & (self.apart(query) == group)

    def first_seen(self, place: Int[Array, "*n"]) -> Int[Array, "*n"]:
        """The first step that a query may see; both counted behind the sinks, below 0 where there is none."""
        return jnp.zeros_like(place) if self.ends else place - (self.visible or self.ring) + 1

    @property
    def in_cache(self) -> bool:
        """Whether sinks are read from another place than what lies behind them."""
        return self.positions == "cache" and self.sinks > 0 and not self.ends


@dataclasses.dataclass(frozen=True, eq=False)
class Cache(Product):
    """Any product: the steps that `retention` keeps, kept as `storage` does, read as `selection` does.

    Args:
      retention: `Full`, `Window`, or one of your own.
      storage: `Exact`, `Ints`, ...
      selection: `All`, `Blocks`, ...
    """

    retention: Retention
    storage: Storage = Exact()  # noqa: RUF009 - frozen
    selection: Selection = All()  # noqa: RUF009 - frozen

    def __post_init__(self):
        for name, kind in (("retention", Retention), ("storage", Storage), ("selection", Selection)):
            if not isinstance(getattr(self, name), kind):
                raise UserError(f"{name} must be a {kind.__name__}, got {getattr(self, name)!r}")
        if getattr(self.retention, "softcap", None) is not None:
            raise UserError(f"softcap={self.retention.softcap} is an option of Attention, not of its cache")
        _ = self.kept  # refuses what does not go together
        _check_sinks(self.retention, self.storage, self.selection)

    @property
    def grows(self) -> bool:
        return self.retention.grows


def parts(policy: Product) -> tuple[Retention, Storage, Selection]:
    """What makes a cache what it is."""
    return policy.retention, policy.storage, policy.selection


def _check_sinks(kept: Retention, storage: Storage, selection: Selection) -> None:
    if kept.ends and kept.sinks and (storage, selection) == (Exact(), All()):
        raise UserError(
            f"cache: sinks add nothing in '{kept.text()}': a full cache keeps the first keys anyway"
        )
