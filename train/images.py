"""Image data: arrays, folders of pictures, TFDS, and tasks from scikit-learn's digits, which need no
download.

    data = DigitImages(augment=Augment(shift=1))        # has `train(seed)` and `validation()`


An item is `inputs` [h, w, c] in [0, 1], `targets` and `valid`; see `train.vision`. `Pictures.augment` changes
an item at random: `Batches` calls it with a generator for every row of a run.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int, Num, UInt8

from seqlab.checks import UserError, check_at_least, check_choice, expanded
from seqlab.train.augment import Augment
from seqlab.train.data import FileSource, tfds_source
from seqlab.train.packing import Item
from seqlab.train.tasks.digits import digit_arrays
from seqlab.train.tasks.examples import VALIDATION

# Case-insensitive: cameras write .JPG.
_SUFFIXES = tuple(
    "*." + "".join(f"[{letter}{letter.upper()}]" for letter in suffix)
    for suffix in ("png", "jpg", "jpeg", "bmp", "gif", "webp")
)


class Pictures:
    """Indexable examples, each an `Item`.

    Args:
      read: index -> picture [h, w, c], values in [0, 1] or bytes; all of one shape.
      targets: classes [n]; classes per position [n, h, w]; or pictures [n, h', w', c].
      classes: their number; None if targets are pictures.
      change: the augmentation in training; must be None or change nothing unless targets are classes of whole
        pictures.
      fingerprint: 16 hexadecimal digits of the data.
    """

    tokenizer = None

    def __init__(
        self,
        read: Callable[[int], Num[np.ndarray, "h w c"]],
        targets: Num[np.ndarray, "n *t"],
        *,
        classes: int | None = None,
        change: Augment | None = None,
        fingerprint: str | None = None,
    ) -> None:
        self._read, self.targets, self.classes, self._change, self.fingerprint = (
            read,
            targets,
            classes,
            change,
            fingerprint,
        )
        if change not in (None, Augment()) and targets.ndim != 1:
            raise UserError(
                "augment must be None where targets are maps: a picture and its targets would no longer agree"
            )

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Item:
        targets = self.targets[index]
        places = self.classes is not None and targets.ndim == 2
        return {
            "inputs": self._picture(index),
            "targets": np.asarray(targets, np.float32 if self.classes is None else np.int32),
            "valid": np.ones(targets.shape if places else (), bool),
        }

    def augment(self, item: Item, random: np.random.Generator) -> Item:
        """`item` augmented for one row of training. With mixup or cutmix its targets become shares of
        classes."""
        if self._change is None:
            return item
        change, picture = self._change, self._change.picture(item["inputs"], random)
        if not change.mixes:
            return item | {"inputs": picture}
        other = int(random.integers(len(self)))
        pair = (
            (picture, self._shares(item["targets"])),
            (change.picture(self._picture(other), random), self._shares(self.targets[other])),
        )
        picture, targets = change.pair(*pair, random)
        return item | {"inputs": picture, "targets": targets}

    def _picture(self, index: int) -> Float[np.ndarray, "h w c"]:
        picture = self._read(index)
        return np.asarray(picture, np.float32) / (255 if picture.dtype == np.uint8 else 1)

    def _shares(self, target: Int[np.ndarray, ""]) -> Float[np.ndarray, " k"]:
        return (np.arange(self.classes) == target).astype(np.float32)


def in_memory(
    images: Num[np.ndarray, "n h w c"], targets: Num[np.ndarray, "n *t"], **options: object
) -> Pictures:
    """Arrays as `Pictures`; `options` are those of `Pictures`."""
    digest = hashlib.sha256(f"{images.shape} {images.dtype} {targets.shape} {targets.dtype} ".encode())
    for array in (images, targets):
        digest.update(np.ascontiguousarray(array))
    return Pictures(images.__getitem__, targets, fingerprint=digest.hexdigest()[:16], **options)


@dataclasses.dataclass(frozen=True)
class FolderImages:
    """Pictures in a folder for each class: ROOT/dog/1.png. Classes are the folders in sorted order; files are
    read on demand.

    Args:
      path: the root.
      size: height and width that pictures are scaled to, after a central crop to that proportion.
      channels: 3 for colours, 1 for grey.
      held_out: the share of validation, by a hash of a file's path, as in `FileSource`.
      augment: what training does to a picture.
    Raises:
      OSError: a path or picture that cannot be read. ValueError: no pictures, or pictures that lie in no
        folder.
    """

    path: str
    size: tuple[int, int] = (224, 224)
    channels: int = 3
    held_out: float = 0.1
    augment: Augment | None = None

    tokenizer = None

    def __post_init__(self) -> None:
        _sized(self.size, self.channels)

    def train(self, seed: int) -> Pictures:
        """The same pictures for every seed; their order is drawn by `Batches`."""
        return self._pictures("train", self.augment)

    def validation(self) -> Pictures:
        return self._pictures("validation", None)

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the folders that hold pictures."""
        return tuple(
            sorted({self._class(file) for split in ("train", "validation") for file in self._files(split)})
        )

    def _files(self, split: str) -> list[pathlib.Path]:
        return FileSource(self.path, split, include=_SUFFIXES, validation=self.held_out).files

    def _class(self, file: pathlib.Path) -> str:
        parts = file.relative_to(expanded("path", self.path)).parts
        if len(parts) < 2:
            raise UserError(f"path: {file} lies in no folder below {self.path}, so its class is unknown")
        return parts[0]

    def _pictures(self, split: str, change: Augment | None) -> Pictures:
        files, classes = self._files(split), self.classes
        targets = np.array([classes.index(self._class(file)) for file in files])
        listed = "\n".join(f"{file} {file.stat().st_size}" for file in files) + f"{self.size}{self.channels}"
        read = _Read(tuple(map(str, files)), self.size, self.channels)
        return Pictures(read, targets, classes=len(classes), change=change, fingerprint=_digest(listed))


@dataclasses.dataclass(frozen=True)
class _Read:
    """Picture i of some files, decoded when asked for."""

    files: tuple[str, ...]
    size: tuple[int, int]
    channels: int

    def __call__(self, index: int) -> UInt8[np.ndarray, "h w c"]:
        from PIL import Image

        path = self.files[index]
        try:
            with Image.open(path) as image:
                pixels = _eight_bits(np.asarray(image)) if image.mode.startswith("I") else None
                pixels = np.asarray(image.convert("RGB")) if pixels is None else pixels
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise OSError(f"{path} cannot be read as a picture: {error}") from error
        return scaled(pixels, self.size, self.channels)


def _eight_bits(grey: np.ndarray) -> UInt8[np.ndarray, "h w 3"]:
    """A grey picture of 16 bits as one of three equal channels of 8, which a conversion would clip."""
    eight = np.round(np.asarray(grey, np.float64) / 257).clip(0, 255).astype(np.uint8)
    return np.repeat(eight[..., None], 3, axis=2)


@dataclasses.dataclass(frozen=True)
class TfdsImages:
    """Labelled pictures of a prepared TensorFlow Datasets data set ("mnist", "cifar10", ...), read and
    decoded one by one.

    Args:
      name, data_dir: as in `TfdsSource`; nothing is downloaded here.
      train_split, validation_split: a split or a range of one ("train[:90%]").
      image, label: the features.
      size, channels, augment: as in `FolderImages`.
    Raises:
      ValueError: as `TfdsSource`, or features that are no picture and no class.
    """

    name: str
    train_split: str = "train"
    validation_split: str = "test"
    image: str = "image"
    label: str = "label"
    size: tuple[int, int] = (224, 224)
    channels: int = 3
    augment: Augment | None = None
    data_dir: str | None = None

    tokenizer = None

    def __post_init__(self) -> None:
        _sized(self.size, self.channels)

    def train(self, seed: int) -> Pictures:
        """The same pictures for every seed; their order is drawn by `Batches`."""
        return self._pictures(self.train_split, self.augment)

    def validation(self) -> Pictures:
        return self._pictures(self.validation_split, None)

    def _pictures(self, split: str, change: Augment | None) -> Pictures:
        features, source = tfds_source(self.name, split, self.data_dir)
        for key in (self.image, self.label):
            if key not in features:
                raise UserError(
                    f"image, label: data set {self.name!r} has no feature {key!r}, but "
                    f"{', '.join(map(repr, features))}"
                )
        classes = getattr(features[self.label], "num_classes", None)
        if classes is None or len(features[self.image].shape) != 3:
            found = f"{features[self.image]} and {features[self.label]}"
            raise UserError(
                f"image, label: the features of data set {self.name!r} are {found}, expected a picture and "
                "a class"
            )
        targets = np.array([int(source[i][self.label]) for i in range(len(source))])

        def read(index: int) -> UInt8[np.ndarray, "h w c"]:
            return scaled(source[index][self.image], self.size, self.channels)

        words = f"{self.name} {split} {self.size} {self.channels} {targets.tobytes().hex()}"
        return Pictures(read, targets, classes=classes, change=change, fingerprint=_digest(words))


def scaled(
    picture: UInt8[np.ndarray, "h w c"], size: tuple[int, int], channels: int
) -> UInt8[np.ndarray, "i j o"]:
    """The largest central part of the proportion of `size`, scaled to it, in colour or grey."""
    from PIL import Image

    picture = picture[..., 0] if picture.shape[2] == 1 else picture
    image = Image.fromarray(picture).convert("RGB" if channels == 3 else "L")
    proportion = min(image.height / size[0], image.width / size[1])
    tall, wide = (max(round(side * proportion), 1) for side in size)
    top, left = (image.height - tall) // 2, (image.width - wide) // 2
    image = image.crop((left, top, left + wide, top + tall)).resize(
        (size[1], size[0]), Image.Resampling.BILINEAR
    )
    return np.asarray(image).reshape(*size, channels)


@dataclasses.dataclass(frozen=True)
class DigitImages:
    """scikit-learn's 1797 handwritten digits, 8 × 8 places of one channel, and which of ten they are.

    Args:
      held_out: pictures to validate on, the same for every seed.
      augment: what training does to a picture.
    """

    held_out: int = 360
    augment: Augment | None = None

    tokenizer = None

    def train(self, seed: int) -> Pictures:
        """The same pictures for every seed; their order is drawn by `Batches`."""
        return self._pictures(train=True, change=self.augment)

    def validation(self) -> Pictures:
        return self._pictures(train=False, change=None)

    def _pictures(self, train: bool, change: Augment | None) -> Pictures:
        images, digits = digit_arrays(self.held_out, train=train)
        return in_memory(images[..., None], digits, classes=10, change=change)


@dataclasses.dataclass(frozen=True)
class DigitScenes:
    """Digits strewn over a larger picture, to be found again, or to be made sharp again.

    Args:
      task: "segment": at every place which digit is there, 1 + digit, 0 for none. "upscale": the picture at
        half its resolution (means of 2 × 2 places) goes in, the whole picture is asked for.
      size: height and width, even.
      digits: how many in a picture; later ones lie over earlier ones.
      examples: to train on, drawn from the seed; validation has `held_out`, made of digits that training
        never sees.
    """

    task: str = "segment"
    size: int = 24
    digits: int = 4
    examples: int = 4000
    held_out: int = 200

    tokenizer = None

    def __post_init__(self) -> None:
        check_choice(self.task, ("segment", "upscale"), "task")
        if self.size < 8 or self.size % 2:
            raise UserError(f"size must be even and at least 8, a digit's, got {self.size}")
        for name in ("digits", "examples", "held_out"):
            check_at_least(name, getattr(self, name), 1)

    def train(self, seed: int) -> Pictures:
        return self._scenes(self.examples, seed, train=True)

    def validation(self) -> Pictures:
        return self._scenes(self.held_out, VALIDATION, train=False)

    def _scenes(self, count: int, seed: int, train: bool) -> Pictures:
        images, labels = digit_arrays(360, train=train)
        raw = np.random.PCG64(seed).random_raw((count, self.digits, 3))
        scenes, targets = (
            np.zeros((count, self.size, self.size), np.float32),
            np.zeros((count, self.size, self.size), np.int64),
        )
        for i, k in np.ndindex(count, self.digits):
            which, *corner = (
                int(number % limit)
                for number, limit in zip(raw[i, k], (len(images), *(self.size - 7,) * 2), strict=True)
            )
            place = (i, *(slice(start, start + 8) for start in corner))
            there = images[which] > 0.25
            scenes[place] = np.where(there, images[which], scenes[place])
            targets[place] = np.where(there, 1 + labels[which], targets[place])
        if self.task == "segment":
            return in_memory(scenes[..., None], targets, classes=11)
        half = scenes.reshape(count, self.size // 2, 2, self.size // 2, 2).mean(axis=(2, 4))
        return in_memory(half[..., None], scenes[..., None])


def _sized(size: tuple[int, int], channels: int) -> None:
    if len(size) != 2 or min(size) < 1 or channels not in (1, 3):
        raise UserError(
            f"size must be (height, width) and channels 1 or 3, got size={size}, channels={channels}"
        )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]
