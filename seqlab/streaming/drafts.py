"""Drafts for speculative decoding: the sources of cheap proposals that `stream_generate(draft=)` takes."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from seqlab.checks import UserError, check_choice, shown
from seqlab.mixer import Composite, as_mixer
from seqlab.models.model import Model
from seqlab.module import Module, merge, split
from seqlab.shapes import Activations, Steps, Tokens
from seqlab.state import State
from seqlab.streaming.prompts import check_number
from seqlab.streaming.states import Past

MOST = 64  # drafted tokens per pass at most
_RULES = ("coupled", "rejection")


@dataclasses.dataclass(frozen=True)
class NGram:
    """Prompt lookup: the tokens that followed the last earlier occurrence of the newest n-gram, among the
    last 512 tokens of the row. Costs nothing; helps where text repeats itself or its prompt.

    Args:
      n: the length of the n-gram.
      tokens: drafted tokens per pass of the model. A repetition shorter than that is continued periodically.
      rule: how sampled tokens are verified, as in `Draft`.
    """

    n: int = 3
    tokens: int = 8
    rule: str = "coupled"

    def __post_init__(self) -> None:
        check_number("draft: n", self.n, 1, 32)
        _check(self)


@dataclasses.dataclass(frozen=True)
class Draft:
    """A smaller model with the same vocabulary.

    Args:
      model: the drafting language model. It streams beside the target, with its own state.
      tokens: drafted tokens per pass of the target.
      rule: how sampled tokens are verified; both follow the target's distribution exactly. "coupled" draws
        from draft and target with the same random numbers and accepts equal tokens: a seed gives the tokens
        that it gives without a draft (arXiv 2408.07978). "rejection" accepts with probability min(1, p/q):
        more tokens are accepted, but they depend on the draft (arXiv 2211.17192). Greedy rows are the same.
    """

    model: Module
    tokens: int = 4
    rule: str = "coupled"

    def __post_init__(self) -> None:
        _check(self)


@dataclasses.dataclass(frozen=True)
class EarlyExit:
    """Some of the model's own layers, its final norm and its output layer; no further parameters or states:
    the draft starts from the target's states of these layers.

    Args:
      layers: k for the first k layers, or a tuple of the layers' indices.
      tokens, rule: as in `Draft`.
    """

    layers: int | tuple[int, ...] = 1
    tokens: int = 4
    rule: str = "coupled"

    def __post_init__(self) -> None:
        _check(self)


class Own(NamedTuple):
    """What of a `Draft` is compiled: its model is a part of `Paired`."""

    tokens: int
    rule: str


Plan = NGram | EarlyExit | Own


class PairState(NamedTuple):
    """`target`, `draft`: states of the two models."""

    target: State
    draft: State


class Paired(Composite, Module):
    """A target and its draft as one language model, with the target's outputs: whatever reads tokens advances
    both states."""

    def __init__(self, target: Module, draft: Module):
        self.target, self.draft, self.vocab_size = target, draft, target.vocab_size
        self.trained_length = getattr(target, "trained_length", None)

    def children(self) -> tuple[Module, Module]:
        return self.target, self.draft

    def map_states(self, state: PairState, function: Callable[[Any, State], State]) -> PairState:
        return PairState(function(self.target, state.target), function(self.draft, state.draft))

    def init_state(self, batch: int) -> PairState:
        return PairState(self.target.init_state(batch), self.draft.init_state(batch))

    def state_for(self, batch: int, steps: int, dtype: jax.typing.DTypeLike | None = None) -> PairState:
        return PairState(*(as_mixer(part).state_for(batch, steps, dtype) for part in self.children()))

    def features(
        self, tokens: Tokens, state: PairState, reset: Steps | None = None, valid: Steps | None = None
    ) -> tuple[Activations, PairState]:
        """The target's features."""
        x, target = self.target.features(tokens, state.target, reset, valid)
        return x, PairState(target, self.draft.features(tokens, state.draft, reset, valid)[1])

    def read_out(self, x: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
        """The target's logits."""
        return self.target.read_out(x)


def planned(draft: Any, model: Module, prepare: Callable[[Any], Module]) -> tuple[Plan | None, Module]:
    """What is compiled of `draft`, checked against `model`, and the model to stream; `prepare` makes a model
    streamable."""
    if draft is None:
        return None, model
    if isinstance(draft, NGram):
        return draft, model
    if isinstance(draft, EarlyExit):
        return dataclasses.replace(draft, layers=_layers(draft.layers, model)), model
    if not isinstance(draft, Draft):
        raise UserError(
            f"draft must be seqlab.NGram, seqlab.Draft, seqlab.EarlyExit or None, got {shown(draft)}"
        )
    small = prepare(draft.model)
    if small.vocab_size != model.vocab_size:
        raise UserError(
            f"draft must have the vocabulary of the model, {model.vocab_size} tokens, got {small.vocab_size}"
        )
    return Own(draft.tokens, draft.rule), Paired(model, small)


def _check(draft: Any) -> None:
    check_number("draft: tokens", draft.tokens, 1, MOST)
    check_choice(draft.rule, _RULES, "draft: rule")


def _layers(layers: Any, model: Module) -> tuple[int, ...]:
    if not isinstance(model, Model):
        raise UserError(f"draft: EarlyExit needs a model with a backbone, got {type(model).__name__}")
    depth = model.backbone.depth
    if not isinstance(layers, tuple | list):
        return tuple(range(check_number("draft: layers", layers, 1, depth - 1)))
    chosen = tuple(check_number("draft: layers", layer, 0, depth - 1) for layer in layers)
    if not chosen or list(chosen) != sorted(set(chosen)):
        raise UserError(f"draft: layers must be ascending indices of layers, got {shown(layers)}")
    return chosen


def after_ngram(plan: NGram, past: Past) -> tuple[Int[Array, "b g"], Bool[Array, " b"]]:
    """The drafted tokens after `past`, and whether there are any."""
    seen, n = past.tokens, plan.n
    size = seen.shape[1]
    starts = jnp.arange(size - n)
    match = starts >= size - past.known[:, None]
    for k in range(n):
        match &= seen[:, k : size - n + k] == seen[:, size - n + k, None]
    end = jnp.max(jnp.where(match, starts, -1), axis=1) + n
    place = end[:, None] + jnp.arange(plan.tokens) % (size - end)[:, None]
    return jnp.take_along_axis(seen, place, axis=1), jnp.any(match, axis=1)


def shallow(net: Model, layers: tuple[int, ...]) -> Model:
    """`net` with these layers only."""
    copy = merge(*split(net))
    copy.backbone.blocks = nnx.List([copy.backbone.blocks[layer] for layer in layers])
    copy.backbone.depth = len(layers)
    return copy
