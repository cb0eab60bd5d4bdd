"""The settings of a request, checked before it waits."""

import dataclasses
from typing import Any

import numpy as np

from seqlab.checks import UserError
from seqlab.mixer import as_mixer
from seqlab.module import Module
from seqlab.serving.rooms import Rooms
from seqlab.serving.slots import BIASES, ENDS
from seqlab.streaming.generate import check_values, coming_steps, room_left
from seqlab.streaming.prompts import (
    Ends,
    check_flag,
    check_limits,
    check_number,
    read_ends,
    read_prompts,
)
from seqlab.streaming.sampling import Sampling, check_sampling, is_integer, is_number
from seqlab.streaming.states import Past, StreamState, adopted, check_seed
from seqlab.streaming.stream import begin_text
from seqlab.streaming.text import RowText
from seqlab.tokenizers import Tokenizer

ENDLESS = np.iinfo(np.int64).max  # the number of tokens of a stream without `max_tokens`


@dataclasses.dataclass
class Settings:
    """The checked settings of a request; arrays have one row.

    `prompt` [t]: token ids. `limit`: tokens at most. `room`: tokens that caches can hold after the prompt.
    `values`: of the batcher's `logits` function. `continued`: whether the stream began elsewhere, so that its
    states do not belong to its prompt alone. `options`: the arguments as given, to check them elsewhere.
    """

    prompt: np.ndarray
    sampling: Sampling
    ends: Ends
    limit: int
    room: int
    seed: int
    withhold: bool
    top: int
    values: Any
    priority: int
    deadline: float | None
    continued: bool
    options: dict[str, Any]


class Checks:
    """Checks the arguments of requests.

    Args:
      model, tokenizer: of the batcher; the model is prepared for streaming.
      rooms, steps: the sizes of its states, and the longest stream where caches grow.
      top: likeliest tokens that a request may ask for.
      function, values: the function of logits, and an example of its values for one row.
    """

    def __init__(
        self,
        model: Module,
        tokenizer: Tokenizer,
        rooms: Rooms,
        steps: int,
        top: int,
        function: Any,
        values: Any,
    ):
        self._model, self._tokenizer, self._rooms, self._steps = model, tokenizer, rooms, steps
        self._top, self._function, self._values = top, function, values

    def settings(
        self, prompt: Any, options: dict[str, Any], state: StreamState | None, before: int | None = None
    ) -> Settings:
        """The settings for `prompt` and the keyword arguments of `Batcher.submit`.

        Args:
          state: that the stream continues from, as returned by `state`.
          before: the steps of the stream before the prompt; by default those of `state`.
        Raises:
          ValueError: an option out of range, by its name.
        """
        rows = read_prompts(prompt, self._tokenizer, self._model.vocab_size, fresh=state is None)
        if len(rows) != 1:
            raise UserError(f"prompt must be one prompt per request, got {len(rows)}")
        if not len(rows[0]) and not int(state.length[0]):
            raise UserError("prompt is empty, and the state has not read anything yet")
        own = dict(options)
        limit = check_limits(own["max_tokens"], 1)
        sampling, ends = self._sampling(own), self._ends(own)
        if own["seed"] is None:
            own["seed"] = 0 if state is None else int(state.seed[0])
        if not is_integer(own["priority"]):
            raise UserError(f"priority must be an integer, got {own['priority']!r}")
        if (late := own["deadline"]) is not None and not (is_number(late) and late > 0):
            raise UserError(f"deadline must be a positive number of seconds, or None, got {late!r}")
        values = self._values if own["logits_values"] is None else own["logits_values"]
        if before is None:
            before = 0 if state is None else int(state.length[0])
        return Settings(
            prompt=rows[0],
            sampling=sampling,
            ends=ends,
            limit=int(limit[0]),
            room=self._room(before, rows, limit),
            seed=int(check_seed(own["seed"], 1)[0]),
            withhold=not check_flag("include_stop", own["include_stop"]),
            top=check_number("top_logprobs", own["top_logprobs"], 0, self._top),
            values=check_values(self._function, values, 1, self._model.vocab_size),
            priority=int(own["priority"]),
            deadline=None if late is None else float(late),
            continued=state is not None,
            options=own,
        )

    def state(self, state: Any) -> StreamState:
        """A state that enters from outside; ValueError if it is not one of a stream of this model."""
        own = adopted(self._model, state)
        if (rows := own.length.shape[0]) != 1:
            raise UserError(f"state must be of one row, got {rows}")
        return own

    def with_room(self, state: StreamState, settings: Settings) -> StreamState:
        """`state` before the turn that a request is, for caches that drop some of their past for a turn."""
        steps = coming_steps([settings.prompt], np.asarray([settings.limit], np.int64))
        return state._replace(model=as_mixer(self._model).make_room(state.model, steps))

    def text(self, settings: Settings, prompt: Any, state: StreamState | None) -> tuple[RowText, int]:
        """The text of a stream that goes on with `prompt` after `state`, and the number of tokens before it
        that can be part of a stop."""
        past = None if state is None else Past(*(np.asarray(part)[0] for part in state.past))
        return begin_text(self._tokenizer, settings.ends, settings.withhold, prompt, past)

    def _sampling(self, own: dict[str, Any]) -> Sampling:
        names = ("min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias")
        sampling = check_sampling(
            own["temperature"],
            own["top_k"],
            own["top_p"],
            **{name: own[name] for name in names},
            vocab_size=self._model.vocab_size,
        )
        _check_slots("logit_bias", sampling.bias_tokens, BIASES)
        return sampling

    def _ends(self, own: dict[str, Any]) -> Ends:
        ends = read_ends(own["stop"], own["stop_tokens"], self._tokenizer, 1, self._model.vocab_size)
        _check_slots("stop_tokens", ends.tokens, ENDS)
        return ends

    def _room(self, before: int, rows: list[np.ndarray], limit: np.ndarray) -> int:
        room = int(room_left(self._model, np.asarray([before]), rows, limit)[0])
        if self._rooms.endless:
            return room
        used = before + len(rows[0])
        wanted = 0 if limit[0] == ENDLESS else int(limit[0])
        if used + wanted > self._steps:
            raise UserError(
                f"prompt and max_tokens need {used + wanted} steps, but this batcher has room for streams of "
                f"steps={self._steps}"
            )
        return min(room, self._steps - used)


def _check_slots(name: str, values: np.ndarray, most: int) -> None:
    """Refuse a list of more tokens than the programs have places for."""
    if values.shape[1] > most:
        raise UserError(f"{name}: got more than the {most} tokens that a request of a batcher may name")
