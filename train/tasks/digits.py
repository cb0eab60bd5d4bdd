"""Handwritten digits as sequences: the 8 x 8 images of scikit-learn, one grey value per step (a small version
of sequential MNIST)."""

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from seqlab.checks import UserError, check_at_least
from seqlab.train.tasks.examples import Examples, answers_at_the_end

_SPLIT = 0  # the seed of the held-out split


@dataclasses.dataclass(frozen=True)
class Digits:
    """1797 images of 64 steps, row by row, values in [0, 1]; at the last step the digit, 0 to 9.

    Args:
      held_out: images to validate on, the same for every seed.
    Raises:
      ModuleNotFoundError: without scikit-learn, which has the images (`pip install scikit-learn`); raised
        when data are read.
    """

    held_out: int = 360

    length, tokenizer = 64, None  # not fields; inputs are numbers, not symbols

    def __post_init__(self) -> None:
        check_at_least("held_out", self.held_out, 1)
        if self.held_out > 1500:
            raise UserError(
                f"held_out must leave some of the 1797 images to train on (1500 at most), got {self.held_out}"
            )

    def train(self, seed: int) -> Examples:
        """The same images for every seed; their order is drawn by `Batches`."""
        return self._images(train=True)

    def validation(self) -> Examples:
        return self._images(train=False)

    def _images(self, train: bool) -> Examples:
        images, digits = digit_arrays(self.held_out, train=train)
        return answers_at_the_end(images.reshape(-1, 64, 1), digits[:, None])


def digit_arrays(held_out: int, *, train: bool) -> tuple[Float[np.ndarray, "n 8 8"], Int[np.ndarray, " n"]]:
    """The images, values in [0, 1], and their digits: all but the first `held_out` in a fixed order for
    training, or these."""
    from sklearn.datasets import load_digits

    images = load_digits()
    # NumPy guarantees only raw bits to be the same in all versions.
    order = np.argsort(np.random.PCG64(_SPLIT).random_raw(len(images.target)), kind="stable")
    order = order[held_out:] if train else order[:held_out]
    return images.images[order] / 16.0, images.target[order]
