"""Chat templates: conversations as the text that a published model was trained on.

A template is an untrusted Jinja program. It runs in Jinja's sandbox, without access to unsafe attributes,
with immutable values, and with the few functions that templates expect.
"""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from seqlab.checks import UserError

Message = Mapping[str, Any]


class ChatError(UserError):
    """A conversation that the template cannot render, or a model without a template; the message says
    which."""


def render(
    template: str,
    messages: Sequence[Message],
    *,
    answer: bool = True,
    names: Mapping[str, str] | None = None,
    **variables: Any,
) -> str:
    """The text of a conversation.

    Args:
      template: the template, Jinja's text.
      messages: {"role": ..., "content": ...} in turn, the oldest first.
      answer: end where the model's answer begins.
      names: the special tokens by name, such as bos_token.
      variables: further variables of the template, such as tools or enable_thinking.

    Raises:
      ChatError: invalid messages; the template refuses them or is invalid; jinja2 is missing.
    """
    for i, message in enumerate(_listed(messages)):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ChatError(f"messages[{i}]: got {message!r}, expected an object with a role and a content")
    jinja2 = _jinja()
    given = {"tools": None, "documents": None, **(names or {}), **variables}
    try:
        return _compiled(template).render(
            messages=[dict(message) for message in messages], add_generation_prompt=answer, **given
        )
    except jinja2.TemplateError as error:
        raise ChatError(f"the chat template refuses these messages: {error}") from error
    except (TypeError, ValueError, AttributeError, KeyError, RecursionError, OverflowError) as error:
        raise ChatError(
            f"the chat template fails on these messages: {type(error).__name__}: {error}"
        ) from error


def _listed(messages: Any) -> Sequence[Any]:
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise ChatError(f"messages: got {messages!r}, expected a list of messages with a role and a content")
    return messages


def _jinja() -> Any:
    try:
        import jinja2
    except ImportError as error:
        raise ChatError("chat templates need the jinja2 package: pip install jinja2") from error
    if tuple(map(int, jinja2.__version__.split(".")[:3])) < (3, 1, 6):
        raise ChatError(
            f"chat templates need jinja2 3.1.6 or newer, whose sandbox holds: got {jinja2.__version__}"
        )
    return jinja2


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """{% generation %} marks the assistant's text for training; here it renders its content."""

        tags = frozenset(("generation",))

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)
