"""Checks of the inputs of a stream, before anything is computed: prompts, stops, limits."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from seqlab.checks import UserError, shown
from seqlab.streaming.sampling import is_integer, per_row, slots
from seqlab.streaming.states import RECENT
from seqlab.tokenizers import Tokenizer, begin, ends_of

Prompt = str | bytes | Sequence[int] | np.ndarray

_LONGEST_STOP = RECENT // 2  # bytes or tokens: must fit into the tokens kept by the state
_PROMPTS = "text, bytes, integer token ids [t], or a sequence of prompts or integer array [b, t], one per row"


class Ends(NamedTuple):
    """The ends of rows: `texts` byte strings, `sequences` of several tokens, and `tokens` [b, n], padded by
    -1."""

    texts: tuple[bytes, ...]
    sequences: tuple[tuple[int, ...], ...]
    tokens: np.ndarray


def read_prompts(prompt: Any, tokenizer: Tokenizer, vocab_size: int, fresh: bool) -> list[np.ndarray]:
    """The prompts as int64 token arrays, one per row, checked against the vocabulary."""
    rows = []
    for i, item in enumerate(_split(prompt)):
        if isinstance(item, str | bytes):
            ids = _encoded(item, tokenizer, i, fresh)
        else:
            ids = _integers(item, f"prompt {i}")
            if ids.ndim != 1:
                raise UserError(f"prompt {i} has {ids.ndim} dimensions, expected token ids [t]")
        bad = np.flatnonzero((ids < 0) | (ids >= vocab_size))
        if len(bad):
            raise UserError(
                f"prompt {i}: token {ids[bad[0]]} at place {bad[0]} is not in the model's vocabulary of "
                f"{vocab_size}"
            )
        rows.append(ids.astype(np.int64))
    if fresh:
        for i, ids in enumerate(rows):
            if not len(ids):
                raise UserError(f"prompt {i} is empty, and there is no state to continue from")
        if not rows:
            raise UserError("prompt is empty, and there is no state to continue from")
    return rows


def _split(prompt: Any) -> list[Any]:
    """The prompts of the rows: texts, and things that should be arrays of integers."""
    if isinstance(prompt, bytearray | memoryview):
        prompt = bytes(prompt)
    if isinstance(prompt, str | bytes):
        return [prompt]
    if isinstance(prompt, Mapping | set | frozenset) or not (
        hasattr(prompt, "__array__") or isinstance(prompt, Sequence)
    ):
        raise UserError(f"prompt must be {_PROMPTS}, got {type(prompt).__name__}")
    if hasattr(prompt, "__array__"):
        array = _integers(prompt, "prompt")
        if array.ndim not in (1, 2):
            raise UserError(f"prompt has {array.ndim} dimensions, expected [t] or [b, t]")
        return [array] if array.ndim == 1 else list(array)
    parts = [bytes(part) if isinstance(part, bytearray | memoryview) else part for part in prompt]
    if not parts or all(_is_token(part) for part in parts):
        return [parts]
    return parts


def _is_token(part: Any) -> bool:
    return is_integer(part) or (hasattr(part, "__array__") and np.ndim(part) == 0)


def _integers(value: Any, name: str) -> np.ndarray:
    """`value` as an array of integers; floats, booleans and everything else are refused."""
    expected = f"{name} must be {_PROMPTS}"
    if not hasattr(value, "__array__") and (
        isinstance(value, str | bytes | Mapping | set | frozenset) or not isinstance(value, Sequence)
    ):
        raise UserError(f"{expected}, got {shown(value)}")
    if isinstance(value, Sequence) and not len(value):
        return np.zeros((0,), np.int64)
    try:
        array = np.asarray(value)
    except Exception as error:  # ragged, too large, or of a library that refuses
        raise UserError(f"{expected}, got what is no array ({error})") from error
    if array.dtype.kind not in "iu" and array.size:
        raise UserError(f"{expected}, got an array of {array.dtype}")
    if array.dtype.kind not in "iu":
        array = array.astype(np.int64)
    return array


def _encoded(text: str | bytes, tokenizer: Tokenizer, row: int, fresh: bool) -> np.ndarray:
    try:
        return np.asarray(begin(tokenizer, text) if fresh else tokenizer.encode(text), np.int64)
    except (ValueError, TypeError) as error:  # lone surrogates, bytes that are no UTF-8, names of no token
        raise UserError(f"prompt {row}: the tokenizer cannot read {shown(text, 60)} ({error})") from error


def read_ends(stop: Any, stop_tokens: Any, tokenizer: Tokenizer, rows: int, vocab_size: int) -> Ends:
    """The ends of the rows: the tokenizer's own `eos`, `stop` and `stop_tokens`."""
    single = {int(token) for token in ends_of(tokenizer)}
    texts, sequences = [], []
    for one in _stops(stop):
        if isinstance(one, str | bytes):
            texts.append(_stop_bytes(one))
            continue
        tokens = _stop_tokens("stop", one, vocab_size)
        if len(tokens) == 1:
            single.update(tokens)
        elif len(tokens) > _LONGEST_STOP:
            raise UserError(f"stop must have at most {_LONGEST_STOP} tokens, got {len(tokens)}")
        else:
            sequences.append(tokens)
    nested = isinstance(stop_tokens, Sequence) and any(not _is_token(one) for one in stop_tokens)
    own = stop_tokens if nested else [() if stop_tokens is None else stop_tokens] * rows
    if len(own) != rows:
        raise UserError(f"stop_tokens: got {len(own)} sets of tokens, expected one for each of {rows} rows")
    each = [
        sorted(single | set(() if one is None else _stop_tokens("stop_tokens", one, vocab_size, least=0)))
        for one in own
    ]
    return Ends(tuple(texts), tuple(sequences), slots(each, -1, np.int32))


def _stops(stop: Any) -> list[Any]:
    if isinstance(stop, bytearray | memoryview):
        stop = bytes(stop)
    if isinstance(stop, str | bytes) or is_integer(stop):
        return [stop]
    if stop is None:
        return []
    if hasattr(stop, "__array__"):
        return list(_integers_of("stop", stop).tolist()) if np.ndim(stop) else [stop]
    if not isinstance(stop, Sequence):
        raise UserError(
            "stop must be text, bytes, a token, or a sequence of texts, bytes, tokens and sequences of "
            f"tokens, got {shown(stop)}"
        )
    return [bytes(one) if isinstance(one, bytearray | memoryview) else one for one in stop]


def _stop_bytes(stop: str | bytes) -> bytes:
    try:
        data = stop.encode() if isinstance(stop, str) else stop
    except UnicodeEncodeError as error:
        raise UserError(f"stop: {shown(stop, 60)} cannot be written as UTF-8") from error
    if not 1 <= len(data) <= _LONGEST_STOP:
        raise UserError(
            f"stop must have 1 to {_LONGEST_STOP} bytes each and contain no empty text, got {len(data)} "
            f"({shown(stop, 60)})"
        )
    return data


def _stop_tokens(name: str, value: Any, vocab_size: int, least: int = 1) -> tuple[int, ...]:
    tokens = (value,) if _is_token(value) else value
    if not hasattr(tokens, "__array__") and (
        isinstance(tokens, str | bytes | Mapping) or not isinstance(tokens, Sequence | set | frozenset)
    ):
        raise UserError(f"{name}: got {shown(value)}, expected tokens of the vocabulary of {vocab_size}")
    if isinstance(tokens, set | frozenset):
        tokens = list(tokens)
    found = _integers_of(name, tokens)
    if found.ndim != 1 or len(found) < least or (found < 0).any() or (found >= vocab_size).any():
        raise UserError(f"{name}: got {shown(value)}, expected tokens of the vocabulary of {vocab_size}")
    return tuple(found.tolist())


def _integers_of(name: str, value: Any) -> np.ndarray:
    try:
        array = np.asarray(value)
    except Exception:  # ragged, or of a library that refuses
        array = np.asarray(None)
    if array.dtype.kind not in "iu" and array.size:
        raise UserError(f"{name}: got {shown(value)}, expected integer tokens")
    return array.astype(np.int64)


def check_limits(max_tokens: Any, rows: int) -> np.ndarray:
    """The most tokens of each row [b]; the largest int64 without a limit."""
    endless = np.iinfo(np.int64).max
    expected = "an integer of at least 0 (0 reads the prompt only), or None"
    limits = per_row("max_tokens", max_tokens, rows, endless, lambda n: is_integer(n) and n >= 0, expected)
    return np.asarray([min(int(n), endless) for n in limits], np.int64)


def check_chunks(prefill_chunks: Any) -> tuple[int, ...]:
    """The sizes in which prompts are read, ascending."""
    sizes = prefill_chunks.tolist() if hasattr(prefill_chunks, "tolist") else prefill_chunks
    if (
        not isinstance(sizes, Sequence | set | frozenset)
        or not 1 <= len(sizes) <= 8
        or not all(is_integer(size) and 1 <= size <= 2**16 for size in sizes)
    ):
        raise UserError(
            f"prefill_chunks must be one to eight sizes from 1 to {2**16}, got {shown(prefill_chunks)}"
        )
    return tuple(sorted({int(size) for size in sizes}))


def check_number(name: str, value: Any, least: int, most: int) -> int:
    """`value` as an int from `least` to `most`."""
    if not is_integer(value) or not least <= value <= most:
        raise UserError(f"{name} must be an integer from {least} to {most}, got {shown(value)}")
    return int(value)


def check_flag(name: str, value: Any) -> bool:
    """`value`, refused unless it is True or False."""
    if not isinstance(value, bool | np.bool_):
        raise UserError(f"{name} must be True or False, got {shown(value)}")
    return bool(value)


def check_tokenizer(tokenizer: Any) -> Tokenizer:
    """`tokenizer`, refused unless it has the required methods."""
    lacking = [name for name in ("vocab_size", "bos", "encode", "decoder") if not hasattr(tokenizer, name)]
    if lacking:
        raise UserError(f"tokenizer: {shown(tokenizer, 60)} has no {', '.join(lacking)}")
    return tokenizer


def check_function(name: str, function: Any) -> Callable[..., Any] | None:
    """`function`, refused unless it can be called and hashed."""
    if function is not None and not (callable(function) and getattr(function, "__hash__", None)):
        raise UserError(f"{name} must be a function of logits and their context, got {shown(function)}")
    return function
