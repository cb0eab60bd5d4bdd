"""Cache policies as words: `sinks(4)+window(1020)+int4`."""

import re
from typing import Any

from seqlab.kernels.dispatch import check_name
from seqlab.models.cache.full import Full
from seqlab.models.cache.quantized import Quantized
from seqlab.models.cache.window import Window

_TERMS = ("full", "window", "sinks", "int2", "int4", "int8", "in_place")


def parse_cache(spec: str) -> Any:
    """The policy that `spec` describes, terms joined by +:

        full(n)                 every key, up to n steps
        window(n)               the last n keys, the query's own included
        sinks(n)                and the first n, in front of a window
        int2, int4, int8        old keys and values in so many bits; int4(group=32, residual=128) says how
        in_place                positions count places in the cache (StreamingLLM), so that sinks never get far away

    Raises:
      ValueError: an unknown term (with the nearest one there is), or terms that do not go together, with the reason.
    """
    terms: dict[str, tuple[int | None, dict[str, int]]] = {}
    for text in filter(None, (part.strip() for part in spec.split("+"))):
        found = re.fullmatch(r"(\w+)(?:\((.*)\))?", text)
        if found is None:
            raise ValueError(f"cache: {text!r} is not a term such as window(128); terms: {', '.join(_TERMS)}")
        name = found.group(1)
        check_name(name, _TERMS, "cache term")
        if name in terms:
            raise ValueError(f"cache: {name} stands twice in {spec!r}")
        terms[name] = _arguments(text, found.group(2))
    bits = [name for name in terms if name.startswith("int")]
    counts = {name: _count(name, terms[name]) for name in ("full", "window", "sinks") if name in terms}
    _check_product(spec, terms, bits)
    if bits:
        _, options = terms[bits[0]]
        if set(options) - {"group", "residual"}:
            raise ValueError(f"cache: {bits[0]} takes group and residual, got {', '.join(options)}")
        return Quantized(counts.get("full"), counts.get("window"), counts.get("sinks", 0), bits=int(bits[0][3:]), **options)
    if "full" in counts:
        return Full(counts["full"])
    return Window(counts["window"], counts.get("sinks", 0), positions="cache" if "in_place" in terms else "absolute")


def _check_product(spec: str, terms: dict[str, Any], bits: list[str]) -> None:
    if ("full" in terms) == ("window" in terms):
        raise ValueError(f"cache: {spec!r} must hold one of full(n) and window(n): either every key stays or the last n do")
    if "sinks" in terms and "full" in terms:
        raise ValueError(f"cache: sinks add nothing in {spec!r}: a full cache keeps the first keys anyway")
    if len(bits) > 1:
        raise ValueError(f"cache: {spec!r} asks for {' and '.join(bits)} at once")
    if "in_place" in terms and bits:
        raise ValueError(f"cache: in_place and {bits[0]} do not go together: keys are coded as they are turned, at absolute positions")
    if "in_place" in terms and "full" in terms:
        raise ValueError(f"cache: in_place changes nothing in {spec!r}: nothing is ever dropped")


def _arguments(term: str, text: str | None) -> tuple[int | None, dict[str, int]]:
    count, options = None, {}
    for part in filter(None, (part.strip() for part in (text or "").split(","))):
        found = re.fullmatch(r"(?:(\w+) *= *)?(\d+)", part)
        if found is None or (found.group(1) is None and count is not None):
            raise ValueError(f"cache: cannot read {part!r} in {term!r}: a number, or name=number")
        if found.group(1) is None:
            count = int(found.group(2))
        else:
            options[found.group(1)] = int(found.group(2))
    return count, options


def _count(name: str, term: tuple[int | None, dict[str, int]]) -> int:
    count, options = term
    if count is None or options:
        raise ValueError(f"cache: {name} takes one number, {name}(n)")
    return count
