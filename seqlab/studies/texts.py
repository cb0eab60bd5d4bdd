"""Evaluation text for published models, which have no data of their own, or for any model on other text."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import fiddle as fdl
import numpy as np

from seqlab.checks import UserError, check_positive
from seqlab.models.cache import Window
from seqlab.studies import runs
from seqlab.tokenizers import ByteTokenizer, Tokenizer, begin
from seqlab.train import config
from seqlab.train.data import FileSource, Windows
from seqlab.train.experiment import Experiment

_LONGEST = 1024  # maximal steps per window
_STATE_SPACES = 2048  # the assumed training length of models without a bound
_DEFAULT_WINDOWS = 64


@dataclasses.dataclass(frozen=True)
class HeldOutText:
    """Tokenized files, all held out; each document begins like a text of the tokenizer.

    Args:
      tokenizer: of the model.
      paths: files and folders; none for the share of the Python standard library that seqlab's runs hold out.
      length: tokens per window.
    """

    tokenizer: Tokenizer
    paths: tuple[str, ...] = ()
    length: int = _LONGEST

    def train(self, seed: int) -> Windows:
        """Refused: held-out text is not trained on."""
        raise UserError("text that is held out is not trained on")

    def validation(self) -> Windows:
        """The windows. Raises OSError for a path that cannot be read, UserError for too little text."""
        source = (
            FileSource(self.paths, "train", validation=0.0) if self.paths else FileSource(None, "validation")
        )
        documents = [self._tokens(bytes(source[i])) for i in range(len(source))]
        sizes = np.array([len(document) for document in documents], np.int64)
        if sizes.sum() < 2:
            raise UserError(f"too little text: {sizes.sum()} tokens in {', '.join(self.paths)}")
        stream = np.concatenate(documents).astype(np.int32)
        return Windows(stream, np.cumsum(sizes) - sizes, min(self.length, len(stream) - 1), True)

    def _tokens(self, document: bytes) -> np.ndarray:
        if isinstance(self.tokenizer, ByteTokenizer):
            return begin(self.tokenizer, document)
        return begin(self.tokenizer, document.decode("utf-8", errors="replace"))


def is_published(run: runs.Run) -> bool:
    """Whether `run` is a published model, without its own data."""
    return isinstance(run.config, fdl.Partial)


def trained_length(run: runs.Run) -> int:
    """The training length of a published model: that of its full caches, or a window, or a default."""
    mixers = [block.mixer for block in run.model.unrolled().backbone.blocks]
    caches = [mixer.cache for mixer in mixers if hasattr(mixer, "cache")]
    spans = [cache.window if isinstance(cache, Window) else cache.capacity for cache in caches]
    return max(spans, default=_STATE_SPACES)


def experiment_of(
    run: runs.Run, text: Sequence[str | os.PathLike[str]] = (), length: int | None = None
) -> Experiment:
    """The experiment to evaluate `run` on: its own; for a published model, or if `text` is given, that text.

    Args:
      text: files and folders.
      length: tokens a window of text; by default what a published model was made for, 1,024 at most.

    Raises:
      RunError: the model does not read text, or has no tokenizer.
      ConfigError: the run's config cannot be built any more.
    """
    if not text and length is None and not is_published(run):
        return config.build(run.config)
    tokenizer = run.tokenizer
    if tokenizer is None and getattr(run.model, "vocab_size", None) == ByteTokenizer.vocab_size:
        tokenizer = ByteTokenizer()
    if tokenizer is None:
        raise runs.RunError(
            "the model has no tokenizer (a tokenizer.json in its folder), so it reads no text"
        )
    if length is None:
        length = (
            min(_LONGEST, trained_length(run)) if is_published(run) else config.build(run.config).data.length
        )
    data = HeldOutText(tokenizer, tuple(map(os.fspath, text)), check_positive("length", length))
    windows = len(data.validation()) if text else _DEFAULT_WINDOWS
    return Experiment(
        model=lambda rngs: run.model,
        data=data,
        optimizer=_no_optimizer,
        batch_size=4,
        validation_windows=windows,
    )


def _no_optimizer(steps: int) -> Any:
    raise UserError("a model that is measured is not trained")
