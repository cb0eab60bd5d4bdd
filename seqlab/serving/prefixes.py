"""States by the prefixes of prompts, so that what many prompts share is read once.

A radix tree over tokens, as in SGLang's RadixAttention (arXiv 2312.07104), for any mixer: recurrent states
cannot be cut to a shorter prefix, so they are kept where prompts are likely to part: every `stride` tokens,
at ends of prompts, and wherever two prompts have parted before. Caches that keep all steps are kept at ends
only, and rewound.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from seqlab.checks import UserError, check_at_least, check_positive
from seqlab.mixer import CannotRewind, as_mixer
from seqlab.module import Module
from seqlab.streaming.states import RECENT, Past, StreamState, with_room_for

_WORTH = 64  # tokens from which on a prompt is kept, or waited for


@dataclasses.dataclass(eq=False)
class _Node:
    """A place in the tree: `tokens` lead to it from `parent`, `depth` tokens from the root. `parted`: whether
    prompts have gone different ways here."""

    tokens: np.ndarray
    depth: int
    parent: "_Node | None"
    children: dict[int, "_Node"] = dataclasses.field(default_factory=dict)
    state: StreamState | None = None
    parted: bool = False
    used: int = 0

    @property
    def bytes(self) -> int:
        states = 0 if self.state is None else sum(leaf.nbytes for leaf in jax.tree.leaves(self.state))
        return states + self.tokens.nbytes


class PrefixStore:
    """States of streams by the tokens that led to them, at most `limit` bytes; the least recently used go.

    Args:
      limit: bytes of states and tokens; 0 keeps nothing.
      stride: prefixes of every `stride` tokens are kept where states cannot be cut.
    Attributes:
      hits, tokens: requests that began with a stored state, and the tokens they did not read.
      bytes: held now.
    Raises:
      ValueError: a number out of range.
    """

    def __init__(self, limit: int, stride: int = 256):
        check_at_least("prefixes", limit, 0, "bytes")
        self._limit, self._stride = int(limit), check_positive("stride", stride)
        self._root = _Node(np.zeros(0, np.int32), 0, None)
        self._model: Any = None
        self._cuts = False  # whether states can be rewound to any prefix
        self._clock = 0
        self.hits = self.tokens = self.bytes = 0

    def __bool__(self) -> bool:
        return self._limit > 0

    def bind(self, model: Module) -> None:
        """Keep states of `model`; ValueError if the store holds those of another one."""
        if self._model is not None and self._model is not model:
            raise UserError("prefixes: the store holds the states of another batcher's model")
        self._model = model
        if self:
            try:
                as_mixer(model).rewind(with_room_for(model, 1).model, np.ones(1, np.int32))
            except CannotRewind:
                return
            except ValueError:  # there is no step to take back yet
                pass
            self._cuts = True

    def saw(self, prompt: np.ndarray) -> None:
        """Note a prompt, to find out where prompts part."""
        node, matched = self._walk(prompt)
        node = self._split(node, matched)
        if matched < len(prompt):
            node.parted = node.parted or (node is not self._root and bool(node.children))
            self._extend(node, prompt[matched:])
        self._touch(node)
        self._shed()

    def find(self, prompt: np.ndarray, beyond: int = 0) -> tuple[int, StreamState] | None:
        """The longest prefix of `prompt` whose state is known, its length and the state; None if it has no
        more than `beyond` tokens."""
        below, matched = self._walk(prompt)
        node = below
        while node is not None and (node.state is None or node.depth > matched):
            node = node.parent
        most = min(matched, len(prompt) - 1)
        if self._cuts and most > max(beyond, 0 if node is None else node.depth):
            deeper = next((one for one in self._subtree(below) if one.state is not None), None)
            if deeper is not None and (cut := self._rewound(deeper, prompt[:most])) is not None:
                self._touch(deeper)
                return most, cut
        if node is None or node.depth <= beyond:
            return None
        self._touch(node)
        return node.depth, node.state

    def hit(self, tokens: int) -> None:
        """Count a request that began with a stored state."""
        self.hits += 1
        self.tokens += tokens

    def stop(self, prompt: np.ndarray, read: int, count: int) -> int:
        """`count` tokens after the first `read` ones, or fewer, to end at a prefix worth keeping: the next
        place where prompts part, or else the last of the others."""
        ends = range(read + 1, read + count + 1)
        parted = [place for place in self._partings(prompt) if place in ends]
        places = [place for place in self._places(prompt) if place in ends]
        return min(parted, default=max(places, default=read + count)) - read

    def wants(self, prompt: np.ndarray, read: int) -> bool:
        """Whether the state after `read` tokens of `prompt` should be put."""
        if not self or read not in self._places(prompt):
            return False
        node, matched = self._walk(prompt[:read])
        return not (matched == read == node.depth and node.state is not None)

    def pending(self, prompt: np.ndarray, known: int, other: np.ndarray, read: int) -> bool:
        """Whether `other`, of which `read` tokens have been read, will leave a state that spares `prompt`, of
        which `known` tokens have one, enough reading to wait for."""
        if len(other) < _WORTH:
            return False
        size = min(len(prompt), len(other))
        different = np.flatnonzero(prompt[:size] != other[:size])
        shared = int(different[0]) if len(different) else size
        if not self._cuts:
            shared = max((place for place in self._places(other) if place <= shared), default=0)
            if read >= shared:
                return False
        return min(shared, len(prompt) - 1) - known >= _WORTH

    def put(self, prefix: np.ndarray, state: StreamState) -> None:
        """Keep the state after `prefix`."""
        node, matched = self._walk(prefix)
        node = self._split(node, matched)
        if matched < len(prefix):
            node = self._extend(node, prefix[matched:])
        self.bytes -= node.bytes
        node.state = state
        self.bytes += node.bytes
        self._touch(node)
        self._shed()

    def warm(self, state: StreamState) -> None:
        """Compile what rewinds states of the shapes of `state`, which has seen two tokens."""
        if self._cuts:
            self._rewound(_Node(np.zeros(0, np.int32), 2, None, state=state), np.zeros(1, np.int32))

    # The tree.

    def _places(self, prompt: np.ndarray) -> set[int]:
        """The lengths at which prefixes of `prompt` are worth keeping."""
        places = {len(prompt)} if len(prompt) >= _WORTH else set()
        if not self._cuts:
            places.update(range(self._stride, len(prompt), self._stride), self._partings(prompt))
        return places

    def _partings(self, prompt: np.ndarray) -> list[int]:
        """The lengths at which other prompts have parted from `prompt`, if states must be kept there."""
        node, matched = self._walk(prompt)
        places = []
        while node is not None and not self._cuts:
            if node.parted and node.depth <= matched:
                places.append(node.depth)
            node = node.parent
        return places

    def _walk(self, tokens: np.ndarray) -> tuple[_Node, int]:
        """The node at or below the end of the longest known prefix of `tokens`, and the length of that."""
        node, matched = self._root, 0
        while matched < len(tokens) and (child := node.children.get(int(tokens[matched]))) is not None:
            size = min(len(child.tokens), len(tokens) - matched)
            different = np.flatnonzero(child.tokens[:size] != tokens[matched : matched + size])
            node, matched = child, matched + (int(different[0]) if len(different) else size)
            if matched < child.depth:
                break
        return node, matched

    def _split(self, node: _Node, depth: int) -> _Node:
        """The node at `depth` on the edge to `node`."""
        if depth == node.depth:
            return node
        keep = depth - node.parent.depth
        upper = _Node(node.tokens[:keep], depth, node.parent, {int(node.tokens[keep]): node}, used=node.used)
        node.parent.children[int(upper.tokens[0])] = upper
        node.tokens, node.parent = node.tokens[keep:], upper
        return upper

    def _extend(self, node: _Node, tokens: np.ndarray) -> _Node:
        tokens = np.array(tokens, np.int32)
        child = _Node(tokens, node.depth + len(tokens), node)
        node.children[int(tokens[0])] = child
        self.bytes += child.bytes
        return child

    def _subtree(self, node: _Node) -> Iterator[_Node]:
        waiting = [node]
        while waiting:
            node = waiting.pop()
            yield node
            waiting.extend(node.children.values())

    def _touch(self, node: _Node) -> None:
        self._clock += 1
        node.used = self._clock

    def _shed(self) -> None:
        while self.bytes > self._limit and self._evict():
            pass

    def _evict(self) -> bool:
        """Forget the least recently used state, or a path that leads to none; whether there was one."""
        able = [one for one in self._subtree(self._root) if one.parent and (one.state or not one.children)]
        if not able:
            return False
        node = min(able, key=lambda one: one.used)
        self.bytes -= node.bytes
        node.state = None
        if node.children:
            self.bytes += node.bytes
        else:
            del node.parent.children[int(node.tokens[0])]
        return True

    def _rewound(self, node: _Node, prefix: np.ndarray) -> StreamState | None:
        """The state of `node` taken back to `prefix`; None where the past is gone, and then shorter prefixes
        are kept from now on."""
        back = np.full(1, node.depth - len(prefix), np.int32)
        try:
            model = as_mixer(self._model).rewind(node.state.model, back)
        except ValueError:
            self._cuts = False
            return None
        known = min(len(prefix), RECENT)
        tokens = np.zeros((1, RECENT), np.int32)
        tokens[0, RECENT - known :] = prefix[len(prefix) - known :]
        none = np.zeros(1, np.int32)
        past = Past(tokens, np.full(1, known, np.int32), none, none)
        return node.state._replace(model=model, length=np.full(1, len(prefix), np.int32), past=past)
