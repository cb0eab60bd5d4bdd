"""Parts that a cache is made of: storages and selections, each of which declares its own words.

A new part is one file in this folder with one class: it is found when the package is imported, and its words
are known from then on. A part of another package is registered by its import in the same way.
"""

from typing import Any, ClassVar, NamedTuple

from seqlab.checks import UserError


class Word(NamedTuple):
    """How a word is written, `moba(block, top_k)`, and the options that it takes besides:
    `int4(group=32)`."""

    form: str
    options: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """How many numbers it takes."""
        return self.form.count(",") + 1 if "(" in self.form else 0


class Term(NamedTuple):
    """The numbers and options that are given to a word."""

    numbers: tuple[int, ...]
    options: dict[str, int | str]


WORDS: dict[str, tuple[Word, "type[Part]"]] = {}  # filled by the classes themselves


class Part:
    """Base of retentions, storages and selections: frozen dataclasses that are written and read as words.

    Attributes:
      kind: "retention", "storage" or "selection"; a cache has one of each.
      words: the words that stand for it, registered where the class is defined.
    """

    kind: ClassVar[str]
    words: ClassVar[dict[str, Word]] = {}
    instead: ClassVar[str] = ""  # what to write instead of two words of one kind

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        for name, word in cls.__dict__.get("words", {}).items():
            known = WORDS.get(name)
            if known is not None and known[1].__qualname__ != cls.__qualname__:
                raise UserError(f"{cls.__qualname__}: the cache word {name!r} is {known[1].__qualname__}'s")
            WORDS[name] = word, cls

    @classmethod
    def of_words(cls, name: str, term: Term, modifiers: dict[str, Term]) -> "Part":
        """The part that the word `name` describes. `modifiers`: the words beside it that qualify a retention,
        such as sinks(4)."""
        return cls(*term.numbers, **term.options)

    def text(self) -> str:
        """Its word; empty for what need not be said."""
        raise NotImplementedError


class Storage(Part):
    """How steps are kept. `over(retention)` gives the cache of all kept steps: an object with `state_type`,
    `all_slots`, `init_state`, `held`, `slots_for`, `resize`, `rewind`, `adopt` and `attend`, see
    `seqlab.models.cache.exact.Steps`."""

    kind: ClassVar[str] = "storage"
    exact: ClassVar[bool] = True  # whether a stream equals the parallel form

    def over(self, retention: Any) -> Any:
        """The steps that `retention` keeps, kept in this way."""
        raise NotImplementedError


class Selection(Part):
    """Which of the kept steps a query reads. `over(kept)` is the same object as `Storage.over` gives, reading
    no more than is selected."""

    kind: ClassVar[str] = "selection"

    def over(self, kept: Any) -> Any:
        """A cache of which only the selected steps are read."""
        raise NotImplementedError
