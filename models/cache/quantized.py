"""A quantized cache: old keys per channel, old values per token, the newest exact (KIVI, arXiv
2402.02750)."""

import dataclasses
from typing import ClassVar

from seqlab.checks import UserError, check_at_least, check_choice, check_positive
from seqlab.kernels.decode_attention import BITS
from seqlab.models.cache.coded import CodedSteps
from seqlab.models.cache.full import Full
from seqlab.models.cache.parts import Storage, Term, Word
from seqlab.models.cache.product import Product, Retention
from seqlab.models.cache.window import Window

_WORD_OPTIONS = ("group", "residual", "values", "half_groups", "edge")


@dataclasses.dataclass(frozen=True)
class Ints(Storage):
    """Keys and values as integers of few bits. A query at step t sees the key of step u (both counted behind
    the sinks) exactly from the last multiple of `residual` up to t on, the value exactly where u >= t -
    residual, and both quantized otherwise. Sinks are always exact.

    Every query sees what it would see step by step, so a prompt may be cut anywhere. A call of one step
    leaves codes to `kernels.decode_attention`, which dequantizes them as it reads them; longer calls
    dequantize what is stored once.

    Args:
      bits: 2, 4 or 8, of keys and values.
      group: steps of a channel (keys), channels of a step (values) that share a scale and a least value.
      residual: a multiple of `group`.
      half_groups: keep scales and least values in float16, as published code does with half-precision models.
      edge: "call" reproduces the published prefill: the first call of a sequence sees itself exactly.
      value_bits: of values; default: `bits`.
    """

    bits: int = 4
    group: int = 32
    residual: int = 128
    half_groups: bool = False
    edge: str = "step"
    value_bits: int | None = None
    words: ClassVar = {f"int{bits}": Word(f"int{bits}", _WORD_OPTIONS) for bits in BITS}
    instead: ClassVar[str] = "; int4(values=2) names two"

    def __post_init__(self):
        check_choice(self.edge, ("step", "call"), "edge")
        for name in ("bits", "value_bits"):
            if getattr(self, name) not in BITS and (name == "bits" or self.value_bits is not None):
                raise UserError(f"{name} must be one of {BITS}, got {getattr(self, name)!r}")
        if check_positive("residual", self.residual) % check_positive("group", self.group):
            raise UserError(f"residual must be a multiple of group={self.group}, got {self.residual}")
        if self.value_bits == self.bits:  # both spellings are one storage
            object.__setattr__(self, "value_bits", None)

    @property
    def exact(self) -> bool:
        """Whether streams equal the parallel form, which quantizes too."""
        return self.edge == "step"

    @property
    def v_bits(self) -> int:
        """Bits of a value."""
        return self.bits if self.value_bits is None else self.value_bits

    @classmethod
    def of_words(cls, name: str, term: Term, modifiers: dict[str, Term]) -> "Ints":
        options = dict(term.options)
        if "values" in options:
            options["value_bits"] = options.pop("values")
        if "half_groups" in options:
            options["half_groups"] = bool(options["half_groups"])
        return cls(int(name.removeprefix("int")), **options)

    def text(self) -> str:
        options = {
            "group": (self.group, 32),
            "residual": (self.residual, 128),
            "values": (self.v_bits, self.bits),
            "half_groups": (int(self.half_groups), 0),
            "edge": (self.edge, "step"),
        }
        changed = ", ".join(f"{name}={value}" for name, (value, usual) in options.items() if value != usual)
        return f"int{self.bits}" + (f"({changed})" if changed else "")

    def over(self, retention: Retention) -> CodedSteps:
        if retention.turn is not None:
            raise UserError(
                f"cache: turn and {self.text()} do not go together in '{retention.text()}+{self.text()}': "
                "codes "
                "stay step by step"
            )
        if retention.edge == "call":
            raise UserError(
                f"cache: give edge to {self.text()} instead of window in '{retention.text()}+{self.text()}'"
            )
        return CodedSteps(retention, self)


@dataclasses.dataclass(frozen=True, eq=False)
class Quantized(Product):
    """A full cache or a window in few bits: `Cache(Full(capacity), Ints(bits))`, see `Ints`.

    Args:
      capacity: steps that the cache holds; None with a window.
      window: W, the last keys that a query sees besides the sinks, its own included: constant memory.
      sinks: first steps that stay, exactly.
      bits, group, residual, half_groups, edge, value_bits: as in `Ints`.
      positions: of the sinks, as in `Window`.
      grows: with a capacity, whether streams go on beyond it in more memory, see `Full`.
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

    def __post_init__(self):
        if (self.capacity is None) == (self.window is None):
            raise UserError(
                f"give capacity or window, the other one None, got capacity={self.capacity}, "
                f"window={self.window}"
            )
        for name in ("capacity", "window"):
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name))
        check_choice(self.positions, ("absolute", "cache"), "positions")
        check_at_least("sinks", self.sinks, 0)
        if self.grows and self.window is not None:
            raise UserError(f"grows changes nothing where a window of {self.window} steps is kept")
        _ = self.retention, self.storage  # which check the rest

    @property
    def retention(self) -> Retention:
        if self.window is None:
            return Full(self.capacity, grows=self.grows, sinks=self.sinks)
        return Window(self.window, self.sinks, positions=self.positions)

    @property
    def storage(self) -> Ints:
        return Ints(self.bits, self.group, self.residual, self.half_groups, self.edge, self.value_bits)
