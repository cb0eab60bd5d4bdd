"""Data augmentation of pictures: shifts, flips, RandAugment, erasing, mixup, cutmix. Pure functions of
picture and generator.

A picture is [h, w, c] with values in [0, 1]. Configs name an `Augment`; the changes of a row of a batch
depend only on the seed and the row's number in the run, so they are the same for any number of workers and
processes, and after a resume.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from seqlab.checks import UserError, check_choice

Picture = Float[np.ndarray, "h w c"]
Targets = Float[np.ndarray, " k"]


def warp(
    picture: Picture, matrix: Float[np.ndarray, "2 2"], shift: tuple[float, float] = (0.0, 0.0)
) -> Picture:
    """The picture sampled at matrix (position - centre) + centre + shift, bilinear; black outside."""
    height, width, _ = picture.shape
    centre = np.array([(height - 1) / 2, (width - 1) / 2])
    places = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), axis=-1) - centre
    where = places @ np.asarray(matrix, np.float64).T + centre + np.asarray(shift, np.float64)
    low = np.floor(where).astype(int)
    share = where - low
    result = np.zeros(picture.shape, np.float64)
    for i in (0, 1):
        for j in (0, 1):
            row, column = low[..., 0] + i, low[..., 1] + j
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            weight = np.abs(1 - i - share[..., 0]) * np.abs(1 - j - share[..., 1]) * inside
            result += weight[..., None] * picture[np.clip(row, 0, height - 1), np.clip(column, 0, width - 1)]
    return result.astype(picture.dtype)


def _rotate(picture: Picture, m: float) -> Picture:
    angle = np.deg2rad(30 * m)
    return warp(picture, np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]))


def _blend(picture: Picture, other: Picture | float, m: float) -> Picture:
    """Interpolation from `other` (m = -1) to the picture (0) and extrapolation beyond it."""
    return np.clip(other + (picture - other) * (1 + 0.9 * m), 0, 1)


def _grey(picture: Picture) -> Picture:
    return np.broadcast_to(picture.mean(axis=2, keepdims=True), picture.shape)


def _smooth(picture: Picture) -> Picture:
    padded = np.pad(picture, [(1, 1), (1, 1), (0, 0)], mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(0, 1))
    return windows.mean(axis=(-2, -1))


def _autocontrast(picture: Picture, m: float) -> Picture:
    low, high = picture.min(axis=(0, 1)), picture.max(axis=(0, 1))
    return np.where(high > low, (picture - low) / np.where(high > low, high - low, 1), picture)


def _equalize(picture: Picture, m: float) -> Picture:
    """Histogram equalization: each channel's values replaced by their ranks."""
    flat = picture.reshape(-1, picture.shape[2])
    ranks = np.stack([np.searchsorted(np.sort(c), c, side="right") for c in flat.T], axis=1)
    least = ranks.min(axis=0)
    return ((ranks - least) / np.maximum(len(flat) - least, 1)).reshape(picture.shape)


# Name -> function of a picture and a magnitude in [-1, 1], of which one-sided changes take the size. The list
# is RandAugment's.
OPERATIONS: dict[str, Callable[[Picture, float], Picture]] = {
    "identity": lambda x, m: x,
    "autocontrast": _autocontrast,
    "equalize": _equalize,
    "rotate": _rotate,
    "solarize": lambda x, m: np.where(x > 1 - abs(m), 1 - x, x),
    "posterize": lambda x, m: np.floor(x * 255 / 2 ** round(4 * abs(m))) * 2 ** round(4 * abs(m)) / 255,
    "color": lambda x, m: _blend(x, _grey(x), m),
    "contrast": lambda x, m: _blend(x, float(_grey(x).mean()), m),
    "brightness": lambda x, m: _blend(x, 0.0, m),
    "sharpness": lambda x, m: _blend(x, _smooth(x), m),
    "shear_x": lambda x, m: warp(x, np.array([[1, 0], [0.3 * m, 1]])),
    "shear_y": lambda x, m: warp(x, np.array([[1, 0.3 * m], [0, 1]])),
    "translate_x": lambda x, m: warp(x, np.eye(2), (0.0, 0.45 * m * x.shape[1])),
    "translate_y": lambda x, m: warp(x, np.eye(2), (0.45 * m * x.shape[0], 0.0)),
}
GEOMETRIC = ("identity", "rotate", "shear_x", "shear_y", "translate_x", "translate_y")


@dataclasses.dataclass(frozen=True)
class Augment:
    """Augmentation of training pictures; the default changes nothing.

    Args:
      shift: each picture is shifted by up to this many pixels in each direction, over black.
      flip: mirror half of them, left to right.
      operations, magnitude, names: RandAugment (arXiv 1909.13719): this many operations in sequence, drawn
        from `names`, keys of OPERATIONS, with a magnitude drawn around `magnitude` of 10 (deviation 0.5) and
        a sign. None for all names.
      erase: the probability that a rectangle of 2 % to a third of the picture becomes noise (arXiv
        1708.04896).
      mixup, cutmix: the parameter of the beta distribution that shares are drawn from, 0 for never (arXiv
        1710.09412, 1905.04899); if both are on, every picture gets one of them. Targets are mixed like
        pictures.
    Raises:
      ValueError: a probability or parameter out of range, or an unknown operation.
    """

    shift: int = 0
    flip: bool = False
    operations: int = 0
    magnitude: float = 9.0
    names: tuple[str, ...] | None = None
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        for name, highest in (
            ("shift", None),
            ("operations", None),
            ("magnitude", 10.0),
            ("erase", 1.0),
            ("mixup", None),
            ("cutmix", None),
        ):
            value = getattr(self, name)
            if value < 0 or (highest is not None and value > highest):
                raise UserError(
                    f"{name} must be at least 0{'' if highest is None else f' and at most {highest:g}'}, "
                    f"got {value!r}"
                )
        for name in self.names or ():
            check_choice(name, tuple(OPERATIONS), "names")

    @property
    def mixes(self) -> bool:
        """Whether pictures are mixed, so that targets become shares."""
        return bool(self.mixup or self.cutmix)

    def picture(self, picture: Picture, random: np.random.Generator) -> Picture:
        """One picture changed on its own."""
        if self.shift:
            down, right = random.integers(-self.shift, self.shift + 1, 2)
            picture = _moved(picture, int(down), int(right))
        if self.flip and random.random() < 0.5:
            picture = picture[:, ::-1]
        names = tuple(OPERATIONS) if self.names is None else self.names
        for _ in range(self.operations):
            name = names[random.integers(len(names))]
            size = np.clip(random.normal(self.magnitude, 0.5), 0, 10) / 10
            picture = OPERATIONS[name](picture, float(size if random.random() < 0.5 else -size))
        if self.erase and random.random() < self.erase:
            picture = _erased(picture, random)
        return np.ascontiguousarray(picture, np.float32)

    def pair(
        self, one: tuple[Picture, Targets], other: tuple[Picture, Targets], random: np.random.Generator
    ) -> tuple[Picture, Targets]:
        """Two pictures with their targets as one: mixup blends them, cutmix pastes a rectangle."""
        cut = bool(self.cutmix) and (not self.mixup or random.random() < 0.5)
        share = random.beta(*(self.cutmix if cut else self.mixup,) * 2)
        if cut:
            rows, columns = _rectangle(one[0].shape, 1 - share, random)
            picture = one[0].copy()
            picture[rows, columns] = other[0][rows, columns]
            share = 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (
                picture.shape[0] * picture.shape[1]
            )
        else:
            picture = share * one[0] + (1 - share) * other[0]
        return picture.astype(np.float32), (share * one[1] + (1 - share) * other[1]).astype(np.float32)


def _moved(picture: Picture, down: int, right: int) -> Picture:
    height, width, _ = picture.shape
    result = np.zeros_like(picture)
    rows, columns = (
        slice(max(by, 0), max(size + min(by, 0), 0)) for by, size in ((down, height), (right, width))
    )
    from_rows, from_columns = (
        slice(max(-by, 0), max(size - max(by, 0), 0)) for by, size in ((down, height), (right, width))
    )
    result[rows, columns] = picture[from_rows, from_columns]
    return result


def _rectangle(shape: tuple[int, ...], area: float, random: np.random.Generator) -> tuple[slice, slice]:
    """A rectangle with the picture's proportions and a share of its area, at a random position, cropped at
    the border."""
    sides = []
    for size in shape[:2]:
        half, middle = size * np.sqrt(area) / 2, random.integers(size)
        sides.append(slice(int(max(middle - half, 0)), int(min(round(middle + half), size))))
    rows, columns = (slice(side.start, max(side.stop, side.start)) for side in sides)
    return rows, columns


def _erased(picture: Picture, random: np.random.Generator) -> Picture:
    height, width, channels = picture.shape
    area, aspect = (
        random.uniform(0.02, 1 / 3) * height * width,
        np.exp(random.uniform(np.log(0.3), np.log(1 / 0.3))),
    )
    tall, wide = (
        int(np.clip(round(side), 1, size))
        for side, size in ((np.sqrt(area * aspect), height), (np.sqrt(area / aspect), width))
    )
    top, left = random.integers(height - tall + 1), random.integers(width - wide + 1)
    picture = picture.copy()
    picture[top : top + tall, left : left + wide] = random.random((tall, wide, channels))
    return picture
