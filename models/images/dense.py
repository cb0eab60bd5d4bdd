"""Dense prediction: segmentation, super-resolution, any output per position."""

from collections.abc import Sequence
from typing import ClassVar

from flax import nnx
from jaxtyping import Array, Float

from seqlab.checks import check_positive
from seqlab.models.images.metaformer import make_backbone
from seqlab.models.images.parts import ConvTranspose, Map
from seqlab.models.layers import Factory, Linear
from seqlab.models.model import check_dtype
from seqlab.module import Module
from seqlab.shapes import accumulator


class MapHead(Module):
    """Transposed convolutions that double the resolution, one for each of `widths`, then a linear map at
    every position."""

    torch_names: ClassVar = {"parts": ""}

    def __init__(self, dim: int, outputs: int, *, widths: Sequence[int], rngs: nnx.Rngs):
        before = (dim, *widths)
        spreads = [
            ConvTranspose(a, b, 4, stride=2, padding=1, rngs=rngs)
            for a, b in zip(before, widths, strict=False)
        ]
        self.parts = nnx.List([*spreads, Linear(before[-1], outputs, bias=True, rngs=rngs)])

    def __call__(self, x: Map) -> Float[Array, "b i j o"]:
        for part in self.parts:
            x = part(x)
        return x


class ImageToMap(Module):
    """Outputs [b, h', w', outputs] at every position of images [b, h, w, inputs]: a backbone and a head on
    its last map.

    A head with n doublings after a backbone of stride s gives 2^n / s times the resolution of the image: 1
    for segmentation, 2 for super-resolution by two.

    Args:
      outputs: classes per position, or channels of an image.
      backbone: as in `ImageClassifier`.
      widths: of the head's transposed convolutions, each of which doubles the resolution.
      dtype: compute dtype of the backbone; head and outputs are float32 at least.
    """

    def __init__(
        self,
        outputs: int,
        backbone: Factory,
        *,
        widths: Sequence[int],
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        self.outputs, self.dtype = check_positive("outputs", outputs), check_dtype(dtype)
        self.backbone = make_backbone(backbone, rngs)
        self.head = MapHead(self.backbone.widths[-1], outputs, widths=widths, rngs=rngs)

    def features(self, images: Map) -> list[Map]:
        """The output maps of the stages."""
        return self.backbone(images.astype(self.dtype))

    def __call__(self, images: Map) -> Float[Array, "b i j o"]:
        x = self.features(images)[-1]
        return self.head(x.astype(accumulator(x.dtype)))
