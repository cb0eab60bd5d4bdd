"""A conversation with a model that has a chat template: one stream, continued from turn to turn."""

from collections.abc import Iterator
from typing import Any

from seqlab.streaming.generate import Stream, StreamState, Token, stream_generate
from seqlab.studies.runs import Run


class Conversation:
    """Messages and the state after them.

        talk = Conversation(seqlab.load("folder"), temperature=0)
        for token in talk.say("What is gravity?"):
            print(token.text, end="")

    A turn processes only new tokens, as long as the template renders earlier turns unchanged.

    Args:
      run: a loaded model whose tokenizer has a chat template.
      system: a message to begin with, from the "system".
      options: options of `stream_generate` for every turn.

    Raises:
      ChatError: by `say`: the model has no chat template, or it refuses the messages.
    """

    def __init__(self, run: Run, system: str | None = None, **options: Any):
        self.messages: list[dict[str, str]] = (
            [] if system is None else [{"role": "system", "content": system}]
        )
        self.stream: Stream | None = None
        self._run, self._options = run, options
        self._state: StreamState | None = None
        self._read: list[int] = []

    def say(self, text: str) -> Iterator[Token]:
        """Send `text` as the user; yields the tokens of the answer, which becomes a message."""
        self.messages.append({"role": "user", "content": text})
        tokens = self._run.chat(self.messages).tolist()
        known = self._read
        if self._state is None or tokens[: len(known)] != known or len(tokens) == len(known):
            self._state, known = None, []
        self.stream = stream_generate(
            self._run.model,
            [tokens[len(known) :]],
            state=self._state,
            tokenizer=self._run.tokenizer,
            **self._options,
        )
        said: list[int] = []
        try:
            for token in self.stream:
                if token.token >= 0:  # of a row that cannot go on there is none
                    said.append(token.token)
                yield token
        finally:
            self._state, self._read = self.stream.state, tokens + said
            self.messages.append({"role": "assistant", "content": self._run.tokenizer.decode(said)})
