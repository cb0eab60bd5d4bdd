"""Bodies of requests: JSON that is checked field by field, with errors in OpenAI's form."""

import difflib
import json
import math
from collections.abc import Callable, Mapping
from typing import Any


class ApiError(Exception):
    """An error that the client is told of: HTTP status, message, and the field at fault."""

    def __init__(
        self, status: int, message: str, param: str | None = None, kind: str = "invalid_request_error"
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.kind = status, message, param, kind

    @property
    def body(self) -> dict[str, Any]:
        """The error as OpenAI writes it."""
        return {
            "error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.status}
        }


Check = Callable[[str, Any], Any]


def parse(body: bytes, fields: Mapping[str, Check]) -> dict[str, Any]:
    """The fields of a JSON object, checked; absent ones and those that are null are None.

    Raises:
      ApiError: 400, with the name of the field that is unknown or wrong.
    """
    try:
        given = json.loads(body, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}"[:300]) from error
    if not isinstance(given, dict):
        raise ApiError(400, f"the body must be a JSON object, got {type(given).__name__}")
    for name in given:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ApiError(400, f"unknown field {name[:60]!r}{hint}", name[:60])
    return {
        name: None if given.get(name) is None else check(name, given[name]) for name, check in fields.items()
    }


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def wrong(name: str, value: Any, expected: str) -> ApiError:
    """The error of a field with a wrong value."""
    return ApiError(400, f"{name} must be {expected}, got {json.dumps(value)[:80]}", name)


def integer(least: int, most: int) -> Check:
    """Integers in a range."""

    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise wrong(name, value, f"an integer from {least} to {most}")
        return value

    return check


def number(least: float, most: float) -> Check:
    """Numbers in a range."""

    def check(name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            raise wrong(name, value, f"a number from {least:g} to {most:g}")
        return float(value)

    return check


def boolean(name: str, value: Any) -> bool:
    """true or false."""
    if not isinstance(value, bool):
        raise wrong(name, value, "true or false")
    return value


def text(name: str, value: Any) -> str:
    """A string that can be written as UTF-8."""
    if not isinstance(value, str):
        raise wrong(name, value, "a string")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ApiError(400, f"{name} contains half of a surrogate pair", name)
    return value


def stops(name: str, value: Any) -> list[str]:
    """A string or a list of strings, none of them empty."""
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or len(found) > 16 or not all(isinstance(one, str) for one in found):
        raise wrong(name, value, "a string or a list of at most 16 strings")
    if any(not 1 <= len(text(name, one).encode()) <= 256 for one in found):
        raise wrong(name, value, "strings of 1 to 256 bytes")
    return found


def biases(name: str, value: Any) -> dict[int, float]:
    """{token: bias}."""
    expected = "an object from token ids to numbers from -100 to 100"
    if not isinstance(value, dict):
        raise wrong(name, value, expected)
    made = {}
    for token, bias in value.items():
        if not (token.isascii() and token.isdigit() and len(token) < 10):
            raise wrong(name, {token[:20]: bias}, expected)
        made[int(token)] = number(-100, 100)(name, bias)
    return {token: -math.inf if bias == -100 else bias for token, bias in made.items()}


def prompts(name: str, value: Any) -> list[str | list[int]]:
    """A string, token ids, or a list of either."""
    several = isinstance(value, list) and bool(value) and not isinstance(value[0], int)
    found = value if several else [value]
    for one in found:
        tokens = isinstance(one, list) and all(type(token) is int and 0 <= token < 2**31 for token in one)
        if not (isinstance(one, str) or tokens) or len(found) > 128:
            raise wrong(name, value, "a string, token ids, or a list of at most 128 of them")
        if isinstance(one, str):
            text(name, one)
    return found


def tokens(name: str, value: Any) -> list[int]:
    """Token ids."""
    if not isinstance(value, list) or not all(type(token) is int and 0 <= token < 2**31 for token in value):
        raise wrong(name, value, "a list of token ids")
    return value


def messages(name: str, value: Any) -> list[dict[str, Any]]:
    """Messages with a role and a text; parts of text are joined."""
    if not isinstance(value, list) or not value:
        raise wrong(name, value, "a list of messages with a role and a content")
    made = []
    for i, message in enumerate(value):
        where = f"{name}[{i}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise wrong(where, message, "an object with a role and a content")
        content = message.get("content")
        if isinstance(content, list):
            if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
                raise ApiError(400, f"{where}: only parts of type 'text' are supported", name)
            content = "".join(text(where, part.get("text")) for part in content)
        made.append({"role": text(where, message["role"]), "content": text(where, content)})
    return made


def refused(reason: str, allowed: Callable[[Any], bool] = lambda value: False) -> Check:
    """A known field that is not supported, except for values that change nothing."""

    def check(name: str, value: Any) -> None:
        if not allowed(value):
            raise ApiError(400, f"{name} is not supported: {reason}", name)

    return check


def stream_options(name: str, value: Any) -> dict[str, bool]:
    """{"include_usage": true}."""
    if not isinstance(value, dict) or value.keys() - {"include_usage", "include_obfuscation"}:
        raise wrong(name, value, "an object with include_usage")
    return {key: boolean(f"{name}.{key}", one) for key, one in value.items()}


SAMPLING: dict[str, Check] = {
    "model": text,
    "max_tokens": integer(0, 2**31 - 1),
    "temperature": number(0, 100),
    "top_p": number(1e-6, 1),
    "top_k": integer(1, 2**31 - 1),
    "min_p": number(0, 1),
    "n": integer(1, 128),
    "stop": stops,
    "seed": integer(-(2**63), 2**64 - 1),
    "presence_penalty": number(-100, 100),
    "frequency_penalty": number(-100, 100),
    "repetition_penalty": number(1e-3, 100),
    "logit_bias": biases,
    "stream": boolean,
    "stream_options": stream_options,
    "priority": integer(-1000, 1000),
    "user": text,
}
_TOOLS = refused("this server calls no tools", lambda value: value in ([], "none"))
COMPLETION = SAMPLING | {
    "prompt": prompts,
    "echo": boolean,
    "logprobs": integer(0, 20),
    "suffix": refused("models here only continue text"),
    "best_of": refused("use n", lambda value: value == 1),
}
CHAT = SAMPLING | {
    "messages": messages,
    "max_completion_tokens": integer(0, 2**31 - 1),
    "logprobs": boolean,
    "top_logprobs": integer(0, 20),
    "response_format": refused("only text", lambda value: value == {"type": "text"}),
    **dict.fromkeys(("tools", "tool_choice", "functions", "function_call", "parallel_tool_calls"), _TOOLS),
}
TOKENIZE: dict[str, Check] = {"model": text, "prompt": text}
DETOKENIZE: dict[str, Check] = {"model": text, "tokens": tokens}
