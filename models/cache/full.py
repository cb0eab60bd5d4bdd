"""The cache that keeps everything, up to a capacity."""

import dataclasses
from typing import ClassVar

from seqlab.checks import UserError, check_at_least, check_positive
from seqlab.models.cache.parts import Term, Word
from seqlab.models.cache.product import Retention


@dataclasses.dataclass(frozen=True)
class Full(Retention):
    """Every key is kept, up to `capacity` steps of one sequence; attention beyond it gives NaN, never a wrong
    number.

    Args:
      capacity: steps of a sequence that are kept.
      softcap: deprecated, give it to `Attention`.
      grows: whether a stream goes on beyond the capacity: a host that sees the end coming gives the state
        more slots (`with_room`; `stream_generate` does), so that only memory ends it.
      sinks: of the capacity, first steps that a storage keeps exactly and that every query reads, whatever is
        selected; they mean nothing where all is exact and read.
    """

    capacity: int = 4096
    softcap: float | None = None
    grows: bool = False
    sinks: int = 0
    words: ClassVar = {"full": Word("full(n)")}
    ends: ClassVar[bool] = True

    def __post_init__(self):
        check_positive("capacity", self.capacity)
        check_at_least("sinks", self.sinks, 0)
        if self.sinks >= self.capacity:
            raise UserError(f"sinks must be fewer than capacity={self.capacity}, got {self.sinks}")

    @property
    def ring(self) -> int:
        return self.capacity - self.sinks

    @classmethod
    def of_words(cls, name: str, term: Term, modifiers: dict[str, Term]) -> "Full":
        for word in ("absolute", "in_place"):
            if word in modifiers:
                raise UserError(f"cache: {word} changes nothing beside full(n): nothing is ever dropped")
        sinks = modifiers["sinks"].numbers[0] if "sinks" in modifiers else 0
        return cls(term.numbers[0], grows="grows" in modifiers, sinks=sinks)

    def text(self) -> str:
        return (f"sinks({self.sinks})+" if self.sinks else "") + f"full({self.capacity})"

    def endings(self) -> tuple[str, ...]:
        return ("grows",) if self.grows else ()
