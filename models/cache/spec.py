"""Cache policies as words, `sinks(4)+window(1020)+int4`, and as the names of one's own."""

import ast
import re

from seqlab.checks import UserError, check_choice
from seqlab.models.cache.heads import Heads
from seqlab.models.cache.parts import WORDS, Part, Term, Word
from seqlab.models.cache.policy import Policy
from seqlab.models.cache.product import Cache, Retention
from seqlab.names import imported

_NUMBERS = ("no numbers", "one number", "two numbers", "three numbers")


def parse_cache(spec: str) -> Policy:
    """The policy that `spec` describes, terms joined by + in any order: which steps stay,

        full(n)                 every key, up to n steps
        grows                   a full cache gets more slots where a stream goes on: no end, and more memory
        window(n)               the last n keys, the query's own included; window(n, turn=m) drops none while
                                a turn of up to m steps lasts, and makes room before it (StreamingLLM's chat)
        sinks(n)                and the first n, at their places in the cache (StreamingLLM)
        absolute                sinks at their places in the stream: not beyond the length of training

    how they are kept, exactly or as

        int2, int4, int8        old keys and values quantized; int4(group=32, residual=128, values=2) says how

    and which of them a query reads, all or

        moba(b, k)              of blocks of b keys the query's own and the k - 1 that score highest, and the
                                sinks; in a window, of the last n / b

    Heads may differ: heads(0 1 | A | B) gives key/value head 0 the cache A and head 1 the cache B
    (DuoAttention). `module:Name(...)` is a policy of one's own, called with literals; the module is imported.

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
    terms: dict[str, Term] = {}
    known = {name: word for name, (word, _) in WORDS.items()} | Retention.modifiers
    for text in filter(None, (part.strip() for part in spec.split("+"))):
        found = re.fullmatch(r"(\w+)(?:\((.*)\))?", text)
        if found is None:
            raise UserError(f"cache: {text!r} is not a term such as window(128); terms: {', '.join(known)}")
        name = found.group(1)
        check_choice(name, tuple(known), "cache term")
        if name in terms:
            raise UserError(f"cache: {name} is given twice in {spec!r}")
        terms[name] = _term(text, name, known[name], found.group(2))
    return _product(spec, terms)


def _product(spec: str, terms: dict[str, Term]) -> Policy:
    """The product of the parts that the terms describe."""
    of_kind: dict[str, list[str]] = {"retention": [], "storage": [], "selection": []}
    for name in terms:
        if name in WORDS:
            of_kind[WORDS[name][1].kind].append(name)
    if len(of_kind["retention"]) != 1:
        kinds = [word.form for word, part in WORDS.values() if part.kind == "retention"]
        raise UserError(
            f"cache: {spec!r} must hold one of {' and '.join(kinds)}: either every key stays or the last n do"
        )
    modifiers = {name: term for name, term in terms.items() if name not in WORDS}
    made: dict[str, Part] = {}
    for kind, names in of_kind.items():
        if len(names) > 1:
            instead = WORDS[names[0]][1].instead
            raise UserError(f"cache: {spec!r} asks for {' and '.join(names)} at once{instead}")
        if names:
            made[kind] = WORDS[names[0]][1].of_words(names[0], terms[names[0]], modifiers)
    product = Cache(**made)
    return product.retention if product == product.retention else product


def _term(term: str, name: str, word: Word, text: str | None) -> Term:
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
    if set(options) - set(word.options) or (word.options and not word.count and numbers):
        given = ", ".join([*map(str, numbers), *options])
        raise UserError(f"cache: {name} takes {' and '.join(word.options) or 'no options'}, got {given}")
    if len(numbers) != word.count:
        form = f", {word.form}" if word.count else ""
        raise UserError(f"cache: {name} takes {_NUMBERS[word.count]}{form}, got {term!r}")
    return Term(tuple(numbers), options)


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
