"""Cache policies as words: `sinks(4)+window(1020)+int4`."""

import re
from typing import Any

from seqlab.checks import UserError, check_choice
from seqlab.models.cache.full import Full
from seqlab.models.cache.moba import MoBA
from seqlab.models.cache.quantized import Quantized
from seqlab.models.cache.window import Window

_TERMS = ("full", "window", "sinks", "int2", "int4", "int8", "moba", "in_place", "grows")


def parse_cache(spec: str) -> Any:
    """The policy that `spec` describes, terms joined by +:

        full(n)                 every key, up to n steps
        window(n)               the last n keys, the query's own included
        sinks(n)                and the first n, in front of a window
        int2, int4, int8        old keys and values in so many bits; int4(group=32, residual=128) says how
        moba(b, k)              of blocks of b keys the query's own and the k - 1 that it likes best; in a
        window, of the last n / b
        grows                   what is full is doubled where a stream goes on: no end, and more and more
        memory
        in_place                positions count places in the cache (StreamingLLM), so that sinks never get
        far away

    Raises:
      ValueError: an unknown term (with the nearest one there is), or terms that do not go together, with the
      reason.
    """
    terms: dict[str, tuple[list[int], dict[str, int]]] = {}
    for text in filter(None, (part.strip() for part in spec.split("+"))):
        found = re.fullmatch(r"(\w+)(?:\((.*)\))?", text)
        if found is None:
            raise UserError(f"cache: {text!r} is not a term such as window(128); terms: {', '.join(_TERMS)}")
        name = found.group(1)
        check_choice(name, _TERMS, "cache term")
        if name in terms:
            raise UserError(f"cache: {name} stands twice in {spec!r}")
        terms[name] = _arguments(text, found.group(2))
    bits = [name for name in terms if name.startswith("int")]
    counts = {
        name: _numbers(name, terms[name], f"{name}(n)", 1)[0]
        for name in ("full", "window", "sinks")
        if name in terms
    }
    _check_product(spec, terms, bits)
    if bits:
        numbers, options = terms[bits[0]]
        if numbers or set(options) - {"group", "residual"}:
            raise UserError(
                f"cache: {bits[0]} takes group and residual, got {', '.join([*map(str, numbers), *options])}"
            )
        return Quantized(
            counts.get("full"), counts.get("window"), counts.get("sinks", 0), bits=int(bits[0][3:]), **options
        )
    if "moba" in terms:
        block, top_k = _numbers("moba", terms["moba"], "moba(block, top_k)", 2)
        return _blocks(block, top_k, "grows" in terms, **counts)
    if "full" in counts:
        return Full(counts["full"], grows="grows" in terms)
    return Window(
        counts["window"], counts.get("sinks", 0), positions="cache" if "in_place" in terms else "absolute"
    )


def _check_product(spec: str, terms: dict[str, Any], bits: list[str]) -> None:
    if ("full" in terms) == ("window" in terms):
        raise UserError(
            f"cache: {spec!r} must hold one of full(n) and window(n): either every key stays or the last n do"
        )
    if "sinks" in terms and "full" in terms:
        raise UserError(f"cache: sinks add nothing in {spec!r}: a full cache keeps the first keys anyway")
    if len(bits) > 1:
        raise UserError(f"cache: {spec!r} asks for {' and '.join(bits)} at once")
    if "in_place" in terms and bits:
        raise UserError(
            f"cache: in_place and {bits[0]} do not go together: keys are coded as they are turned, at "
            "absolute positions"
        )
    if "in_place" in terms and "full" in terms:
        raise UserError(f"cache: in_place changes nothing in {spec!r}: nothing is ever dropped")
    if "grows" in terms and (bits or "window" in terms):
        raise UserError(
            f"cache: grows and {bits[0] if bits else 'window'} do not go together: only caches full(n) of "
            "exact keys grow"
        )
    if "moba" in terms:
        _check_blocks(spec, terms, bits)


def _check_blocks(spec: str, terms: dict[str, Any], bits: list[str]) -> None:
    if "sinks" in terms:
        raise UserError(
            f"cache: sinks and moba do not go together in {spec!r}: what a query sees behind its own block, "
            "it chooses"
        )
    if bits:
        raise UserError(
            f"cache: {bits[0]} and moba do not go together: blocks are read one by one, for each query "
            "others, and exactly"
        )
    if "in_place" in terms:
        raise UserError(
            "cache: in_place and moba do not go together: the means of blocks are those of keys as they "
            "are turned once"
        )


def _blocks(
    block: int, top_k: int, grows: bool, *, full: int | None = None, window: int | None = None
) -> MoBA:
    if window is None:
        return MoBA(block, top_k, full, grows=grows)
    if block and window % block:
        raise UserError(
            f"cache: window must hold whole blocks of moba({block}, {top_k}), got window({window})"
        )
    return MoBA(block, top_k, None, stored=window // max(block, 1))


def _arguments(term: str, text: str | None) -> tuple[list[int], dict[str, int]]:
    numbers, options = [], {}
    for part in filter(None, (part.strip() for part in (text or "").split(","))):
        found = re.fullmatch(r"(?:(\w+) *= *)?(\d+)", part)
        if found is None:
            raise UserError(f"cache: cannot read {part!r} in {term!r}: a number, or name=number")
        if found.group(1) is None:
            numbers.append(int(found.group(2)))
        else:
            options[found.group(1)] = int(found.group(2))
    return numbers, options


def _numbers(name: str, term: tuple[list[int], dict[str, int]], form: str, count: int) -> list[int]:
    numbers, options = term
    if len(numbers) != count or options:
        raise UserError(f"cache: {name} takes {('one number', 'two numbers')[count - 1]}, {form}")
    return numbers
