"""Cache policies as words, `sinks(4)+window(1020)+int4`, and as the names of one's own."""

import ast
import re
from typing import Any, NamedTuple

from seqlab.checks import UserError, check_choice
from seqlab.models.cache.full import Full
from seqlab.models.cache.heads import Heads
from seqlab.models.cache.moba import MoBA
from seqlab.models.cache.policy import Policy
from seqlab.models.cache.quantized import Quantized
from seqlab.models.cache.window import Window
from seqlab.names import imported

_TERMS = ("full", "window", "sinks", "int2", "int4", "int8", "moba", "absolute", "in_place", "grows")
_OPTIONS = {  # of each term, beside its numbers
    "window": ("edge", "turn"),
    "int2": ("group", "residual", "values", "half_groups", "edge"),
    "moba": (),
}
_OPTIONS |= dict.fromkeys(("int4", "int8"), _OPTIONS["int2"])
_COUNTS = {"full": "full(n)", "window": "window(n)", "sinks": "sinks(n)", "moba": "moba(block, top_k)"}


class _Term(NamedTuple):
    numbers: list[int]
    options: dict[str, int | str]


def parse_cache(spec: str) -> Policy:
    """The policy that `spec` describes, terms joined by +:

        full(n)                 every key, up to n steps
        window(n)               the last n keys, the query's own included; window(n, turn=m) drops none while a
                                turn of up to m steps lasts, and makes room before it (StreamingLLM's chat)
        sinks(n)                and the first n, at their places in the cache (StreamingLLM)
        absolute                sinks at their places in the stream: not beyond the length of training
        int2, int4, int8        old keys and values quantized; int4(group=32, residual=128, values=2) says how
        moba(b, k)              of blocks of b keys the query's own and the k - 1 that score highest; in a
                                window, of the last n / b
        grows                   a full cache gets more slots where a stream goes on: no end, and more memory
        heads(0 1 | A | B)      key/value head 0 has the cache A, head 1 has B (DuoAttention)

    or `module:Name(...)`: a policy of one's own, called with literals; the module is imported.

    `parse_cache(str(policy)) == policy` for every policy here. `in_place`, the default today, is accepted.

    Raises:
      ValueError: an unknown term (with the nearest one there is), or terms that do not go together, with the
      reason.
    """
    spec = spec.strip()
    if re.fullmatch(r"[\w.]+:\w+(\(.*\))?", spec, re.DOTALL):
        return _named(spec)
    if spec.startswith("heads(") and spec.endswith(")"):
        return _heads(spec)
    terms: dict[str, _Term] = {}
    for text in filter(None, (part.strip() for part in spec.split("+"))):
        found = re.fullmatch(r"(\w+)(?:\((.*)\))?", text)
        if found is None:
            raise UserError(f"cache: {text!r} is not a term such as window(128); terms: {', '.join(_TERMS)}")
        name = found.group(1)
        check_choice(name, _TERMS, "cache term")
        if name in terms:
            raise UserError(f"cache: {name} is given twice in {spec!r}")
        terms[name] = _term(text, name, found.group(2))
    return _product(spec, terms)


def _product(spec: str, terms: dict[str, _Term]) -> Policy:
    """The policy of terms that go together."""
    bits = [name for name in terms if name.startswith("int")]
    counts = {name: terms[name].numbers[0] for name in ("full", "window", "sinks") if name in terms}
    _check_product(spec, terms, bits)
    options: dict[str, Any] = {"positions": "absolute"} if "absolute" in terms else {}
    if bits:
        options |= terms[bits[0]].options
        if "values" in options:
            options["value_bits"] = options.pop("values")
        if "half_groups" in options:
            options["half_groups"] = bool(options["half_groups"])
        kept = (counts.get("full"), counts.get("window"), counts.get("sinks", 0))
        return Quantized(*kept, bits=int(bits[0][3:]), grows="grows" in terms, **options)
    if "moba" in terms:
        return _blocks(*terms["moba"].numbers, "grows" in terms, **counts)
    if "full" in counts:
        return Full(counts["full"], grows="grows" in terms)
    return Window(counts["window"], counts.get("sinks", 0), **options, **terms["window"].options)


def _check_product(spec: str, terms: dict[str, _Term], bits: list[str]) -> None:
    if ("full" in terms) == ("window" in terms):
        raise UserError(
            f"cache: {spec!r} must hold one of full(n) and window(n): either every key stays or the last n do"
        )
    if "sinks" in terms and "full" in terms:
        raise UserError(f"cache: sinks add nothing in {spec!r}: a full cache keeps the first keys anyway")
    if len(bits) > 1:
        raise UserError(f"cache: {spec!r} asks for {' and '.join(bits)} at once; int4(values=2) names two")
    if "absolute" in terms and "in_place" in terms:
        raise UserError(f"cache: {spec!r} asks for absolute positions and for those in the cache at once")
    for name in ("absolute", "in_place"):
        if name in terms and "full" in terms:
            raise UserError(f"cache: {name} changes nothing in {spec!r}: nothing is ever dropped")
    if "absolute" in terms and "sinks" not in terms:
        raise UserError(f"cache: absolute changes nothing in {spec!r}, which has no sinks")
    if "grows" in terms and "window" in terms:
        raise UserError("cache: grows and window do not go together: a window has no end")
    if bits and terms.get("window", _Term([], {})).options:
        if "turn" in terms["window"].options:
            raise UserError(
                f"cache: turn and {bits[0]} do not go together in {spec!r}: codes stay step by step"
            )
        raise UserError(f"cache: give edge to {bits[0]} instead of window in {spec!r}")
    if "moba" in terms:
        _check_blocks(spec, terms, bits)


def _check_blocks(spec: str, terms: dict[str, _Term], bits: list[str]) -> None:
    if "sinks" in terms:
        raise UserError(
            f"cache: sinks and moba do not go together in {spec!r}: of the steps before its own block a query "
            "sees those that it chooses"
        )
    if bits:
        raise UserError(
            f"cache: {bits[0]} and moba do not go together: a query gathers blocks of its own choice, and there "
            "is no kernel that gathers codes"
        )
    if "in_place" in terms or terms.get("window", _Term([], {})).options:
        raise UserError(
            "cache: in_place, edge, turn and moba do not go together: the means of blocks are those of keys at "
            "absolute positions"
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


def _term(term: str, name: str, text: str | None) -> _Term:
    """The numbers and options of a term, as many and such as it takes."""
    numbers, options = [], {}
    for part in filter(None, (part.strip() for part in (text or "").split(","))):
        found = re.fullmatch(r"(?:(\w+) *= *)?(\w+)", part)
        if found is None or not (found.group(1) or found.group(2).isdigit()):
            raise UserError(f"cache: cannot read {part!r} in {term!r}: a number, or name=value")
        value = int(found.group(2)) if found.group(2).isdigit() else found.group(2)
        if found.group(1) is None:
            numbers.append(value)
        else:
            options[found.group(1)] = value
    taken = _OPTIONS.get(name, ())
    if set(options) - set(taken) or (name.startswith("int") and numbers):
        given = ", ".join([*map(str, numbers), *options])
        raise UserError(f"cache: {name} takes {' and '.join(taken) or 'no options'}, got {given}")
    count = 2 if name == "moba" else int(name in _COUNTS)
    if len(numbers) != count:
        takes = f"takes {('no numbers', 'one number', 'two numbers')[count]}"
        form = f", {_COUNTS[name]}" if name in _COUNTS else ""
        raise UserError(f"cache: {name} {takes}{form}, got {term!r}")
    return _Term(numbers, options)


def _heads(spec: str) -> Heads:
    """`heads(0 1 | A | B)`."""
    of, *policies = spec[len("heads(") : -1].split("|")
    if not policies or not all(part.isdigit() for part in of.split()):
        raise UserError(
            f"cache: {spec!r} must be heads(0 1 ... | A | B): an index per key/value head, caches"
        )
    return Heads(tuple(parse_cache(policy) for policy in policies), tuple(map(int, of.split())))


def _named(spec: str) -> Policy:
    """`module:Name(...)`, called with literals."""
    module, _, call = spec.partition(":")
    name, parenthesis, arguments = call.partition("(")
    try:
        build = imported(f"{module}:{name}")
    except UserError:
        raise
    except Exception as error:  # of the module that is imported, which may be the user's own
        raise UserError(f"cache: cannot import {module}:{name} of {spec!r}: {error}") from error
    try:
        parsed = ast.parse(f"f({arguments}" if parenthesis else "f()", mode="eval").body
        values = [ast.literal_eval(argument) for argument in parsed.args]
        options = {option.arg: ast.literal_eval(option.value) for option in parsed.keywords}
    except (SyntaxError, ValueError, TypeError, AttributeError, MemoryError, RecursionError) as error:
        raise UserError(f"cache: the arguments of {spec!r} must be literals such as 8 or size=8") from error
    try:
        policy = build(*values, **options)
    except UserError:
        raise
    except Exception as error:  # what it makes of these arguments, if it can be called at all
        raise UserError(f"cache: {spec!r} makes no cache ({type(error).__name__}: {error})") from error
    if not isinstance(policy, Policy):
        raise UserError(f"cache: {spec!r} is a {type(policy).__name__}, not a seqlab.models.cache.Policy")
    return policy
